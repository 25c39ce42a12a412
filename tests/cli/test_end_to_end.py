"""The command with a real model and real files, once in a process of its own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_api import environment

from minigpt4_runtime import MiniGPT4, SamplingParams, image

GOLDENS = Path(__file__).parents[1] / "goldens"
SHORT = SamplingParams(max_new_tokens=12)
PICTURE = Path(__file__).parents[2] / "examples/images/three.png"
NOTE = r"The oldest \d+ tokens have left the window; pictures among them: \d+\."


@pytest.fixture(scope="module")
def model_dir(golden_model_dir):
    return golden_model_dir("vicuna")


@pytest.fixture(scope="module")
def model(model_dir):
    return MiniGPT4.load(model_dir, device="cpu")


def test_describe_says_what_the_library_says(model_dir, model, tmp_path):
    folder, out = GOLDENS / "vicuna" / "images", tmp_path / "r.jsonl"
    (tmp_path / "torn.png").write_bytes((folder / "grey.png").read_bytes()[:100])
    shown = subprocess.run(
        [
            sys.executable, "-m", "minigpt4_runtime.cli.main", "describe", folder,
            tmp_path / "torn.png", "--out", out, "--model", model_dir,
            "--device", "cpu", "--max-new-tokens", "12",
        ],
        capture_output=True, encoding="utf-8", env=environment(), timeout=300,
    )  # fmt: skip
    assert shown.returncode == 1
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    # They are written as they come, and shown in order.
    records.sort(key=lambda record: str(record["image"]).startswith(str(tmp_path)))
    *good, torn = records
    names = ["alpha.png", "grey.png", "photo_rgb.jpg"]
    assert sorted(Path(record["image"]).name for record in good) == names
    shown_names = [line.partition(": ")[0] for line in shown.stdout.splitlines()]
    assert list(dict.fromkeys(shown_names)) == [str(folder / name) for name in names]
    for record in good:
        reply = model.describe(record["image"], sampling=SHORT)
        assert record["answer"] == reply.text
        assert record["finish_reason"] == reply.finish_reason
        assert record["prompt_tokens"] == reply.usage.prompt_tokens
        assert record["completion_tokens"] == reply.usage.completion_tokens
        assert record["token_ids"] == list(reply.token_ids)
        assert f"{record['image']}: {reply.text.splitlines()[0]}" in shown.stdout
    error, *notes, summary = shown.stderr.splitlines()
    assert (error, summary) == (f"error: {torn['error']}", "3 described, 1 failed")
    num_cut_off = sum(record["finish_reason"] == "length" for record in good)
    assert [int(line.split()[0]) for line in notes] == [num_cut_off] * bool(num_cut_off)


def test_chat_through_a_pipe_says_what_the_library_says(real_minigpt4, model_dir, model):
    picture = GOLDENS / "vicuna" / "images" / "grey.png"
    questions = ["What is this?", "And what else?"]
    shown = real_minigpt4(
        "chat", picture, "--model", model_dir, "--device", "cpu", "--max-new-tokens", "12",
        given="\n".join(questions),
    )  # fmt: skip
    assert (shown.status, shown.err) == (0, "")
    first = model.chat([{"role": "user", "content": [image(picture), questions[0]]}], SHORT).text
    second = model.chat(
        [
            {"role": "user", "content": [image(picture), questions[0]]},
            {"role": "assistant", "content": first},
            {"role": "user", "content": questions[1]},
        ],
        SHORT,
    ).text
    assert shown.out == f"{first}\n{second}\n"


def test_a_folder_that_is_no_model_is_one_line(real_minigpt4, tmp_path):
    picture = GOLDENS / "vicuna" / "images" / "grey.png"
    shown = real_minigpt4("describe", picture, "--model", tmp_path)
    assert (shown.status, shown.out) == (1, "")
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1


def test_a_chat_within_a_window_never_ends_and_notes_what_has_left(real_minigpt4):
    """Twelve pictures, of which the window holds four."""
    lines = [line for _ in range(12) for line in (f"/image {PICTURE}", "What is in this picture?")]
    shown = real_minigpt4(
        "chat", "--device", "cpu", "--cache-window", "200", given="\n".join(lines)
    )
    assert shown.status == 0
    assert len(shown.out.splitlines()) == 12
    notes = [line for line in shown.err.splitlines() if "have left the window" in line]
    # Not with every answer: only where more has left.
    assert 2 <= len(notes) <= 6
    assert all(re.fullmatch(NOTE, line) for line in notes)
    counts = [int(re.findall(r"\d+", line)[-1]) for line in notes]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize(("longest", "is_cut"), [(5, True), (50, False)])
def test_a_description_that_is_cut_off_is_told(real_minigpt4, longest, is_cut):
    shown = real_minigpt4("describe", PICTURE, "--device", "cpu", "--max-new-tokens", longest)
    assert shown.status == 0
    assert ("1 of the answers are cut off: --max-new-tokens, or" in shown.err) is is_cut


def test_a_description_that_outgrows_its_window_says_so(real_minigpt4, tmp_path):
    shown = real_minigpt4(
        "describe", PICTURE, "--device", "cpu", "--cache-window", "150", "--regex", "(a|b){400}",
        "--max-new-tokens", "2000", "--out", tmp_path / "out.jsonl",
    )  # fmt: skip
    assert shown.status == 0
    assert "1 of the answers outgrew the window: the end of such an" in shown.err
    record = json.loads((tmp_path / "out.jsonl").read_text("utf-8"))
    assert record["evicted_tokens"] > 0
