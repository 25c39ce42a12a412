"""`minigpt4 chat`: turns that build on each other, in a terminal and through a pipe."""

import json
import os
import signal
import sys
import time

import pytest
from fake_api import FakeMiniGPT4

from minigpt4_runtime.cli.options import DEMO_NOTICE

MODEL = ("--model", "somewhere")


def chat(minigpt4, *lines, picture="a.png"):
    return minigpt4("chat", *[picture] * (picture is not None), *MODEL, given="\n".join(lines))


def test_a_pipe_gets_answers_and_nothing_else(minigpt4, folder):
    shown = chat(minigpt4, "What?", "", "  Why?  ")
    assert shown.status == 0
    assert shown.out == "What? a.png turn 1\nWhy? a.png turn 3\n"
    assert shown.err == ""


def test_a_task_goes_with_every_question(minigpt4, folder):
    shown = minigpt4("chat", "a.png", *MODEL, "--task", "vqa", given="What?\nWhy?\n/save d.json")
    assert shown.out == "[vqa] What? a.png turn 1\n[vqa] Why? a.png turn 3\n"
    saved = json.loads((folder / "d.json").read_text("utf-8"))
    assert [turn.get("task") for turn in saved] == ["vqa", None, "vqa", None]
    assert "Invalid value for '--task'" in minigpt4("chat", "a.png", "--task", "count").err


def test_without_questions_nothing_happens(minigpt4, folder):
    assert chat(minigpt4).out == ""
    assert minigpt4("chat", "a.png").err == DEMO_NOTICE + "\n"


def test_a_picture_shown_later_joins_the_dialogue(minigpt4, folder):
    shown = chat(minigpt4, "One?", "/image b.jpg", "Two?", "/image sub/c.png", "/image a.png", "3?")
    assert shown.out.splitlines() == [
        "One? a.png turn 1",
        "Two? a.png+b.jpg turn 3",
        "3? a.png+b.jpg+c.png+a.png turn 5",
    ]
    assert "b.jpg is shown with your next question." in shown.err


def test_a_dialogue_may_begin_without_a_picture(minigpt4, folder):
    shown = chat(minigpt4, "What?", "/image b.jpg", "Now?", picture=None)
    assert shown.out == "Now? b.jpg turn 1\n"
    assert "error: There is no picture to talk about. Show one: /image PATH\n" in shown.err
    assert shown.status == 1


def test_reset_keeps_the_picture_shown_last(minigpt4, folder):
    shown = chat(minigpt4, "One?", "/image b.jpg", "Two?", "/reset", "Again?", "And?")
    assert shown.out.splitlines()[2:] == ["Again? b.jpg turn 1", "And? b.jpg turn 3"]


@pytest.mark.parametrize("name", ['"my picture.png"', "'my picture.png'", "my picture.png"])
def test_a_path_may_have_blanks_and_quotes(minigpt4, folder, name):
    (folder / "a.png").rename(folder / "my picture.png")
    assert chat(minigpt4, f"/image {name}", "Hm?", picture="b.jpg").out == (
        "Hm? b.jpg+my picture.png turn 1\n"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image no.png", "no.png does not exist"),
        ("/image bad.png", "bad.png is damaged"),
        ("/image notes.txt", "notes.txt is not a picture"),
        ("/image .", ". is a folder"),
        ("/image", "/image wants a path after it"),
        ('/image ""', "/image wants a path after it"),
        ("/save", "/save wants a path after it"),
        ("/save new.json", "nothing to save yet"),
        ("/paint", "There is no command /paint"),
        ("why " * 300, "The prompt has 300 tokens"),
        ("overflow at the third word", "numbers overflowed"),
    ],
)
def test_what_fails_is_reported_and_forgotten(minigpt4, folder, bad_picture, line, message):
    shown = chat(minigpt4, line, "And now?")
    assert shown.status == 1
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert shown.out.splitlines()[-1] == "And now? a.png turn 1"


def test_a_failure_in_the_middle_ends_its_line(minigpt4, folder):
    assert chat(minigpt4, "overflow at the third word", "So?").out == (
        "overflow at\nSo? a.png turn 1\n"
    )


def test_after_a_failed_image_it_is_said_whom_questions_are_about(minigpt4, folder):
    lines = ("/image no.png", "/image b.jpg", "/image", "/image file://elsewhere/c.png")
    shown = chat(minigpt4, *lines, picture="a.png")
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert [error.partition(" Questions are still about ")[2] for error in errors] == [
        "a.png.", "b.jpg.", "b.jpg.",
    ]  # fmt: skip
    assert "still about" not in chat(minigpt4, "/image no.png", picture=None).err


@pytest.mark.skipif(os.name == "nt", reason="a path there has backslashes")
@pytest.mark.parametrize(
    "typed",
    [r"my\ picture\ \(1\)\ it\'s.png", "'my picture (1) it'\\''s.png'",
     '"my picture (1) it\'s.png"', "my picture (1) it's.png",
     "file:{}/my%20picture%20(1)%20it's.png"],
)  # fmt: skip
def test_a_path_may_be_dragged_into_the_terminal(minigpt4, folder, typed):
    (folder / "a.png").rename(folder / "my picture (1) it's.png")
    shown = chat(minigpt4, f"/image {typed.format(folder)}", "Hm?", picture="b.jpg")
    assert shown.out == "Hm? b.jpg+my picture (1) it's.png turn 1\n"


def test_a_name_with_a_backslash_is_taken_as_it_is(minigpt4, folder):
    (folder / "a.png").rename(folder / "a\\b.png")
    assert chat(minigpt4, "/image a\\b.png", "Hm?", picture="b.jpg").status == 0


def test_an_address_is_fetched_once(minigpt4, folder, site):
    shown = minigpt4(
        "chat", f"{site}/a.png", "--allow-local-urls", *MODEL, given="One?\nTwo?\n/save d.json"
    )
    assert shown.out.splitlines() == ["One? a.png turn 1", "Two? a.png turn 3"]
    assert len(site.asked) == 1
    saved = json.loads((folder / "d.json").read_text())
    assert saved[0]["content"][0]["image_url"]["url"] == f"{site}/a.png"
    refused = chat(minigpt4, f"/image {site}/a.png", "Now?")
    assert "or the picture itself. Questions are still about a.png." in refused.err


def test_stdin_is_no_picture_of_a_dialogue(minigpt4, folder):
    assert "- is stdin, where the questions come from" in chat(minigpt4, "Hm?", picture="-").err


def test_a_dialogue_that_grew_too_long_can_go_on(minigpt4, folder):
    shown = chat(minigpt4, "One?", "long " * 199, "/reset", "Two?")
    assert "/reset starts over" in shown.err
    assert shown.out.splitlines() == ["One? a.png turn 1", "Two? a.png turn 1"]


@pytest.mark.parametrize("word", ["/quit", "/exit"])
def test_words_that_end(minigpt4, folder, word):
    shown = chat(minigpt4, "One?", word, "Two?")
    assert (shown.status, shown.out) == (0, "One? a.png turn 1\n")


def test_two_slashes_send_one(minigpt4, folder):
    assert chat(minigpt4, "//quit").out == "/quit a.png turn 1\n"


def test_help_names_every_command(minigpt4, folder):
    shown = chat(minigpt4, "/help")
    for word in ("/image", "/reset", "/save", "/help", "/quit", "//", "Ctrl-C"):
        assert word in shown.err
    assert shown.out == ""


def test_a_bad_first_picture_ends_before_the_model_is_loaded(minigpt4, folder, bad_picture):
    shown = chat(minigpt4, "What?", picture="bad.png")
    assert (shown.status, shown.out) == (1, "")
    assert shown.err.startswith("error: bad.png is damaged")
    assert FakeMiniGPT4.loaded == []


def test_save_writes_what_the_library_reads(minigpt4, folder):
    shown = chat(minigpt4, "Größe?", "/image b.jpg", "Two?", "/save d.json")
    assert shown.status == 0
    assert "The dialogue is in d.json." in shown.err
    text = (folder / "d.json").read_text(encoding="utf-8")
    turns = json.loads(text)
    assert "Größe?" in text
    assert turns == [
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "a.png"}},
            {"type": "text", "text": "Größe?"},
        ]},
        {"role": "assistant", "content": "Größe? a.png turn 1"},
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "b.jpg"}},
            {"type": "text", "text": "Two?"},
        ]},
        {"role": "assistant", "content": "Two? a.png+b.jpg turn 3"},
    ]  # fmt: skip
    asked = [*turns, {"role": "user", "content": "Three?"}]
    assert FakeMiniGPT4().chat(asked).text == "Three? a.png+b.jpg turn 5"


def test_save_overwrites_nothing(minigpt4, folder):
    before = (folder / "notes.txt").read_text()
    shown = chat(minigpt4, "One?", "/save notes.txt", "/save nowhere/d.json", "/save ok.json")
    assert shown.status == 1
    assert "error: notes.txt exists already. Give another name." in shown.err
    assert "nowhere/d.json cannot be written" in shown.err.replace(os.sep, "/")
    assert (folder / "notes.txt").read_text() == before
    assert (folder / "ok.json").exists()


needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")


@needs_signals
def test_ctrl_c_stops_the_answer_and_not_the_program(start, folder):
    command = start("chat", "a.png", *MODEL, seconds=0.2)
    command.stdin.write("say " + "word " * 100 + "\n")
    command.stdin.flush()
    assert command.stdout.read(10) == "word word "
    command.send_signal(signal.SIGINT)
    out, err = command.communicate("And now?\n", timeout=60)
    assert command.returncode == 0
    assert err == "Stopped.\n"
    rest, answer = out.splitlines()
    assert len(rest.split()) < 50
    # What was said until then stays in the dialogue.
    assert answer == "And now? a.png turn 3"


@needs_signals
def test_ctrl_c_ends_a_pipe_that_says_nothing(start, folder):
    command = start("chat", "a.png", *MODEL)
    command.stdin.write("One?\n")
    command.stdin.flush()
    assert command.stdout.readline() == "One? a.png turn 1\n"
    time.sleep(0.5)  # Until it waits for the next line.
    command.send_signal(signal.SIGINT)
    assert command.wait(timeout=60) == 130
    assert command.stderr.read() == ""
