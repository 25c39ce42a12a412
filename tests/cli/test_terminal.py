"""What a person at a real terminal sees. Needs a pseudo-terminal, which Windows does not have."""

import contextlib
import os
import re
import select
import signal
import time

import pytest

pty = pytest.importorskip("pty")
MODEL = ("--model", "somewhere")


class Screen:
    """The other end of a pseudo-terminal: `wait_for` a text, `type` keys."""

    def __init__(self):
        self.fd, self.end = pty.openpty()
        self.seen = ""

    def wait_for(self, text, seconds=60):
        until = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < until, f"{text!r} is not in {self.seen!r}"
            self.read(0.2)

    def read(self, seconds):
        if select.select([self.fd], [], [], seconds)[0]:
            # Linux ends a terminal that nobody holds any more with an error.
            with contextlib.suppress(OSError):
                self.seen += os.read(self.fd, 4096).decode()

    def type(self, keys):
        os.write(self.fd, keys.encode())

    @property
    def lines(self):
        """What is left when the escape sequences are gone."""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.seen)
        return [line.split("\r")[-1].strip() for line in text.replace("\r\n", "\n").split("\n")]

    def close(self):
        os.close(self.fd)
        os.close(self.end)


@pytest.fixture
def screen():
    screen = Screen()
    yield screen
    screen.close()


def test_a_person_is_prompted_and_ctrl_c_ends_nothing(start, folder, screen):
    end = screen.end
    command = start(
        "chat", "a.png", *MODEL, seconds=0.05, stdin=end, stdout=end, stderr=end,
        start_new_session=True,
    )  # fmt: skip
    screen.wait_for("Ask about a.png. /help lists what else you can type.")
    screen.wait_for("> ")
    screen.type("What?\n")
    screen.wait_for("What? a.png turn 1")
    screen.type("say " + "word " * 100 + "\n")
    screen.wait_for("\r\nword word word")
    command.send_signal(signal.SIGINT)
    screen.wait_for("Stopped.\r\n> ")
    time.sleep(0.2)
    command.send_signal(signal.SIGINT)
    screen.wait_for("Ctrl-D or /quit ends.")
    screen.type("/image no.png\n")
    screen.wait_for("error: no.png does not exist.")
    screen.type("Still there?\n")
    screen.wait_for("Still there? a.png turn 5\r\n> ")
    time.sleep(0.2)
    screen.type("\x04")
    # A failed question is no failed dialogue when a person has seen it.
    assert command.wait(timeout=60) == 0
    assert "Traceback" not in screen.seen


def test_the_prompt_does_not_enter_a_file_of_answers(start, folder, screen):
    command = start("chat", "a.png", *MODEL, stdin=screen.end, stderr=screen.end)
    screen.wait_for("> ")
    screen.type("What?\n")
    assert command.stdout.readline() == "What? a.png turn 1\n"
    screen.type("/quit\n")
    assert command.wait(timeout=60) == 0
    assert command.stdout.read() == ""


def test_the_bar_stands_beside_whole_lines(start, folder, screen):
    (folder / "bad.png").write_bytes(b"GIF89a")
    end = screen.end
    command = start(
        "describe", "-r", ".", *MODEL, seconds=0.05, stdout=end, stderr=end,
    )  # fmt: skip
    while command.poll() is None:
        screen.read(0.05)
    screen.wait_for("3 described, 1 failed")
    assert re.search(r"[1-4]/4", screen.seen), "no bar was drawn"
    words = "Describe this image in detail."
    for line in (f"a.png: {words} a.png turn 1", f"b.jpg: {words} b.jpg turn 1"):
        assert line in screen.lines
    assert any(line.startswith("error: bad.png is damaged") for line in screen.lines)
    assert screen.lines[-2:] == ["3 described, 1 failed", ""]


def test_the_bar_does_not_enter_a_pipe(start, folder, screen):
    command = start("describe", "-r", ".", *MODEL, stderr=screen.end)
    out = command.stdout.read()
    assert command.wait(timeout=60) == 0
    assert [line.partition(":")[0] for line in out.splitlines()] == ["a.png", "b.jpg", "sub/c.png"]
    assert "\x1b" not in out
    screen.wait_for("3 described, 0 failed")


def test_one_picture_needs_no_bar(start, folder, screen):
    command = start("describe", "a.png", *MODEL, stderr=screen.end)
    assert command.wait(timeout=60) == 0
    screen.read(0.2)
    assert screen.seen == ""
