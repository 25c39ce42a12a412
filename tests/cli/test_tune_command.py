"""`minigpt4 tune`: the samples it shows, Ctrl-C and going on, and the page about it."""

import errno
import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from dialogue_file import write_dialogues

from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.checkpoint.manifest import read_manifest
from minigpt4_runtime.tune.learner import Learner
from minigpt4_runtime.tune.tune import RESULT_NAME, Training


@pytest.fixture
def dialogues(tmp_path):
    return write_dialogues(tmp_path)


def test_samples_are_shown(real_minigpt4, dialogues):
    checked = real_minigpt4("tune", "--data", dialogues, "--check-data")
    assert checked.status == 0
    assert checked.err == f"{dialogues}: 12 answers about 8 pictures.\n"
    assert checked.out.count("line ") == checked.out.count("  → ") == 10
    assert "###Human: <Img><ImageHere></Img> " in checked.out
    missing = dialogues.with_name("none.jsonl")
    given = ["tune", "--data", dialogues, "--held-out", missing, "--check-data"]
    done = real_minigpt4(*given)
    # It is not said to be --data, of which nothing is wrong.
    assert done.err == f"error: {missing} cannot be read (No such file or directory).\n"
    alone = real_minigpt4("tune", "--data", dialogues)
    assert (alone.status, alone.err.count("\n")) == (1, 1)
    assert "--out is missing" in alone.err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_ctrl_c_and_going_on(real_minigpt4, dialogues, tmp_path, monkeypatch):
    given = ["tune", "--data", dialogues, "--steps", 4, "--batch-size", 2, "--warmup-steps", 1]
    given += ["--samples", 1]
    whole = real_minigpt4(*given, "--out", tmp_path / "whole")
    assert (whole.status, whole.out.strip()) == (0, str(tmp_path / "whole" / RESULT_NAME))
    assert "step 4 of 4: loss " in whole.err
    assert f"The page of the training is {tmp_path / 'whole/tune.html'}." in whole.err
    assert "Answers before and after" in (tmp_path / "whole/tune.html").read_text("utf-8")
    given += ["--out", tmp_path / "broken"]
    real = Training.step

    def interrupted(self, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", interrupted)
        stopped = real_minigpt4(*given)
    assert stopped.status == 130
    assert "Stopped after 3 steps, which are kept in" in stopped.err
    assert real_minigpt4(*given, "--resume").status == 0
    broken, whole = (tmp_path / name / RESULT_NAME for name in ("broken", "whole"))
    assert broken.read_bytes() == whole.read_bytes()
    given = ["merge", DEMO_MODEL_DIR, "--adapter", whole, "--out", tmp_path / "merged"]
    done = real_minigpt4(*given)
    assert (done.status, done.out.strip()) == (0, str(tmp_path / "merged"))
    # Still a model of floats, which can be quantised.
    assert read_manifest(tmp_path / "merged").weight_format == "float"
    again = real_minigpt4(*given)
    assert (again.status, "--force" in again.err) == (1, True)


def test_the_page_about_it(real_minigpt4, tmp_path, monkeypatch):
    """All of its code and commands, in their order, with fewer scenes and steps."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs/tuning.md").read_text(encoding="utf-8")
    smaller = {"range(800)": "range(4)", "--steps 600": "--steps 2", "--scenes 100": "--scenes 1",
               "--warmup-steps 50": "--warmup-steps 1", "--steps 400": "--steps 2",
               "--warmup-steps 20": "--warmup-steps 1"}  # fmt: skip
    for written, small in smaller.items():
        assert page.count(written) == 1
        page = page.replace(written, small)
    num_run = 0
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE):
        if kind == "python":
            exec(compile(block, "docs/tuning.md", "exec"), {})
        for line in block.splitlines() if not kind else ():
            program, *given = line.split()
            assert program == "minigpt4"
            done = real_minigpt4(*given)
            assert done.status == 0, done.err
            num_run += 1
    assert num_run == 5
    (line,) = re.findall(r"^```json\n(.*?)\n```", page, flags=re.DOTALL | re.MULTILINE)
    Path("scenes/one.jsonl").write_text(line.replace("cat.png", "0.png"), encoding="utf-8")
    assert real_minigpt4("tune", "--data", "scenes/one.jsonl", "--check-data").status == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_pictures_that_are_not_all_encoded_leave_nothing(
    real_minigpt4, dialogues, tmp_path, monkeypatch
):
    def interrupt(file):
        os.kill(os.getpid(), signal.SIGINT)

    def fill_up(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    for end, status, said in ((interrupt, 130, ""), (fill_up, 1, "No space left on device")):
        monkeypatch.setattr("minigpt4_runtime.tune.features.sync", end)
        done = real_minigpt4("tune", "--data", dialogues, "--out", tmp_path / "new" / "out")
        assert done.status == status
        assert said in done.err
        assert not (tmp_path / "new").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
@pytest.mark.parametrize("then", [None, RecursionError("half imported")])
def test_ctrl_c_that_somebody_else_catches(real_minigpt4, dialogues, tmp_path, monkeypatch, then):
    """As imports of packages do. It is not forgotten, nor is what comes of it a fault of ours."""
    real = Learner.load

    def load(*given, **more):
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        if then is not None:
            raise then
        return real(*given, **more)

    monkeypatch.setattr(Learner, "load", load)
    given = ["--samples", 0, "--batch-size", 1, "--warmup-steps", 0, "--steps", 2]
    done = real_minigpt4("tune", "--data", dialogues, *given, "--out", tmp_path / "out")
    assert (done.status, done.out) == (130, "")
    assert "bug" not in done.err


def test_a_disk_that_is_full_for_the_page_alone(real_minigpt4, dialogues, tmp_path):
    (tmp_path / "out/tune.html").mkdir(parents=True)
    given = ["--steps", 1, "--warmup-steps", 0, "--batch-size", 1, "--samples", 0]
    done = real_minigpt4("tune", "--data", dialogues, *given, "--out", tmp_path / "out")
    assert (done.status, done.out.strip()) == (0, str(tmp_path / "out" / RESULT_NAME))
    assert "There is no page of the training: " in done.err
    if sys.platform == "linux":  # Elsewhere a process's peak is not known.
        assert re.search(r"It took \d+\.\d GiB of memory at most", done.err)
