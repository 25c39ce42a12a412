"""`minigpt4 describe`: answers on stdout, all else on stderr, and results that survive."""

import json
import signal
import sys
from pathlib import Path

import pytest
from fake_api import FakeMiniGPT4
from PIL import Image

from minigpt4_runtime import SamplingParams
from minigpt4_runtime.cli.options import DEMO_NOTICE, SamplingOptions

MODEL = ("--model", "somewhere")
ANSWER = "Describe this image in detail. {} turn 1"


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_picture_gives_the_bare_answer(minigpt4, folder):
    shown = minigpt4("describe", "a.png", *MODEL)
    assert (shown.status, shown.out, shown.err) == (0, ANSWER.format("a.png") + "\n", "")


def test_without_a_model_it_says_what_the_demo_model_knows(minigpt4, folder):
    shown = minigpt4("describe", "a.png")
    assert shown.err == DEMO_NOTICE + "\n"
    assert "only drawn scenes" in DEMO_NOTICE
    assert shown.out == ANSWER.format("a.png") + "\n"


def test_options_reach_the_model(minigpt4, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(
        FakeMiniGPT4,
        "describe",
        lambda self, *asked: seen.append(asked) or self.chat([{"role": "user", "content": "x"}]),
    )
    minigpt4(
        "describe", "a.png", "--prompt", "Why?", "--max-new-tokens", "7", "--temperature", "0.5",
        "--top-p", "0.9", "--top-k", "3", "--repetition-penalty", "1.05", "--seed", "1",
        "--model", "m", "--device", "cuda:1", "--dtype", "bfloat16",
    )  # fmt: skip
    ((picture, prompt, sampling),) = seen
    assert (picture.name, prompt) == ("a.png", "Why?")
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (7, 0.5, 0.9)
    assert (sampling.top_k, sampling.repetition_penalty, sampling.seed) == (3, 1.05, 1)
    ((model, device, dtype),) = FakeMiniGPT4.loaded
    assert (str(model), device, dtype) == ("m", "cuda:1", "bfloat16")


def test_every_sampling_option_is_a_setting(tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "object"}', encoding="utf-8")
    options = SamplingOptions(
        min_p=0.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        json_schema=tmp_path / "schema.json",
    )
    assert options.params() == SamplingParams(
        min_p=0.1, presence_penalty=0.5, frequency_penalty=-0.5, json_schema='{"type": "object"}'
    )
    assert SamplingOptions(regex="a").params() == SamplingParams(regex="a")
    assert SamplingOptions().params() == SamplingParams()


def test_a_schema_that_cannot_be_read_is_one_sentence(minigpt4, folder):
    shown = minigpt4("describe", "a.png", "--json-schema", "none.json")
    assert (shown.status, shown.out) == (1, "")
    reason = "No such file or directory"
    assert shown.err == f"error: none.json cannot be read ({reason}). Check its path.\n"
    shown = minigpt4("describe", "a.png", "--json-schema", "a.png")
    assert shown.err == "error: a.png is not UTF-8 text (invalid start byte).\n"


def test_the_defaults_are_greedy_and_300_tokens(minigpt4, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(
        FakeMiniGPT4,
        "describe",
        lambda self, *asked: seen.append(asked) or self.chat([{"role": "user", "content": "x"}]),
    )
    minigpt4("describe", "a.png")
    ((_, prompt, sampling),) = seen
    assert prompt == "Describe this image in detail."
    assert (sampling.max_new_tokens, sampling.temperature, sampling.seed) == (300, 0.0, None)
    assert FakeMiniGPT4.loaded == [(None, "auto", "auto")]


def test_several_answers_say_whose_they_are(minigpt4, folder):
    shown = minigpt4("describe", "b.jpg", "a.png", *MODEL)
    assert shown.out.splitlines() == [
        f"{name}: {ANSWER.format(name)}" for name in ("b.jpg", "a.png")
    ]
    assert shown.err == "2 described, 0 failed\n"


def test_a_folder_with_one_picture_names_it_too(minigpt4, folder):
    shown = minigpt4("describe", "sub", *MODEL)
    assert shown.out == f"{Path('sub', 'c.png')}: {ANSWER.format('c.png')}\n"
    assert shown.err == ""


def test_every_line_of_an_answer_can_be_found(minigpt4, folder):
    shown = minigpt4("describe", "a.png", "b.jpg", "--prompt", "say one||three", *MODEL)
    assert shown.out == "a.png: one\na.png:\na.png: three\nb.jpg: one\nb.jpg:\nb.jpg: three\n"
    assert (
        minigpt4("describe", "a.png", "--prompt", "say one||three", *MODEL).out == "one\n\nthree\n"
    )


def test_a_recursive_run_finds_all(minigpt4, folder):
    shown = minigpt4("describe", "-r", ".", *MODEL)
    assert [line.partition(": ")[0] for line in shown.out.splitlines()] == [
        "a.png", "b.jpg", str(Path("sub", "c.png")),
    ]  # fmt: skip


def test_what_fails_is_reported_recorded_and_skipped(minigpt4, folder, bad_picture):
    out = folder / "r.jsonl"
    shown = minigpt4("describe", "no.png", "a.png", "bad.png", "b.jpg", "--out", out, *MODEL)
    assert shown.status == 1
    assert [line.partition(":")[0] for line in shown.out.splitlines()] == ["a.png", "b.jpg"]
    errors = shown.err.splitlines()
    assert errors[0] == "error: no.png does not exist."
    assert errors[1].startswith("error: bad.png is damaged")
    assert errors[2:] == ["2 described, 2 failed"]
    by_name = {record["image"]: record for record in records(out)}
    assert set(by_name["a.png"]) == {
        "image", "answer", "finish_reason", "prompt_tokens", "completion_tokens", "evicted_tokens",
        "token_ids", "boxes", "picture_size", "seconds", "error",
    }  # fmt: skip
    assert by_name["a.png"]["answer"] == ANSWER.format("a.png")
    assert by_name["a.png"]["finish_reason"] == "stop"
    assert by_name["a.png"]["completion_tokens"] == 8
    assert by_name["a.png"]["seconds"] >= 0
    assert by_name["a.png"]["error"] is None
    assert by_name["bad.png"]["answer"] is None
    assert by_name["bad.png"]["error"] in errors[1]
    assert by_name["no.png"]["error"] == "no.png does not exist."


def test_no_picture_in_a_folder_is_passed_over_in_silence(minigpt4, folder):
    (folder / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "photo.jxl").write_bytes(b"\xff\x0a and more")
    shown = minigpt4("describe", ".", "--out", "r.jsonl", *MODEL)
    assert shown.status == 1
    assert shown.out.splitlines() == [
        f"{name}: {ANSWER.format(name)}" for name in ("a.png", "b.jpg")
    ]
    assert "error: drawing.svg is a drawing in SVG, which is not read here." in shown.err
    assert "error: photo.jxl is not a picture that can be read here" in shown.err
    assert "notes.txt" not in shown.err
    assert shown.err.endswith("2 described, 2 failed\n")
    failed = {each["image"]: each["error"] for each in records(folder / "r.jsonl") if each["error"]}
    assert set(failed) == {"drawing.svg", "photo.jxl"}


def test_addresses_are_fetched_and_named(minigpt4, folder, site):
    shown = minigpt4(
        "describe", f"{site}/x.png", "a.png", f"{site}/x.png", "--allow-local-urls", *MODEL,
        "--out", "r.jsonl",
    )  # fmt: skip
    assert (shown.status, shown.err) == (0, "2 described, 0 failed\n")
    assert shown.out.splitlines()[0] == f"{site}/x.png: {ANSWER.format('x.png')}"
    assert [each["image"] for each in records(folder / "r.jsonl")] == [f"{site}/x.png", "a.png"]
    assert len(site.asked) == 1


def test_an_address_of_this_machine_is_refused_unless_it_is_allowed(minigpt4, folder, site):
    shown = minigpt4("describe", f"{site}/x.png", "a.png", *MODEL)
    assert shown.status == 1
    assert (
        f"error: {site}/x.png: 127.0.0.1:{site.port} leads to an address that is not" in shown.err
    )
    assert site.asked == []


def test_a_file_url_is_a_path(minigpt4, folder):
    shown = minigpt4("describe", (folder / "sub").as_uri(), (folder / "a.png").as_uri(), *MODEL)
    assert (shown.status, shown.err) == (0, "2 described, 0 failed\n")
    assert shown.out.splitlines()[0] == f"{folder}/sub/c.png: {ANSWER.format('c.png')}"


def test_a_picture_may_come_on_stdin(start, minigpt4, folder):
    png = (folder / "a.png").read_bytes()
    whole = start("describe", "-", *MODEL, encoding=None).communicate(png, timeout=60)
    assert whole == (f"{ANSWER.format('- (stdin)')}\n".encode(), b"")
    for content, message in (
        (b"", "is empty"),
        (png[:40], "is damaged"),
        (b"x", "is not a pic"),
    ):
        shown = minigpt4("describe", "-", *MODEL, given=content)
        assert (shown.status, shown.out) == (1, "")
        assert shown.err.startswith(f"error: - (stdin) {message}")


def test_an_error_advises_nothing_that_describe_cannot_do(minigpt4, folder):
    Image.new("1", (50_000, 3000)).save("large.png")
    Image.new("1", (70_000, 1)).save("thin.png")
    shown = minigpt4("describe", "large.png", "thin.png", *MODEL)
    assert "150,000,000 pixels; the limit is 100,000,000. Make it smaller.\n" in shown.err
    assert "thin.png is 70000×1 pixels; the limit is 65,535 a side. Make it smaller.\n" in shown.err


@pytest.mark.parametrize("command", ["describe", "chat"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--length-penalty 1", "--length-penalty needs --num-beams above 1: it ranks beams."),
        ("--num-beams 3 --temperature 1", "--num-beams searches and --temperature draws by lot."),
        ("--num-beams 3 --min-p 0.1", "--num-beams searches and --min-p draws by lot."),
    ],
)
def test_options_that_do_not_go_together_are_refused(minigpt4, folder, command, options, message):
    shown = minigpt4(command, "a.png", *options.split(), *MODEL)
    assert shown.status == 1
    assert shown.err.startswith(f"error: {message}")
    assert not FakeMiniGPT4.loaded


def test_answers_are_shown_in_order_and_written_as_they_come(minigpt4, folder, bad_picture):
    paths = ("a.png", "bad.png", "b.jpg")
    shown = minigpt4("describe", *paths, "--prompt", "backwards", "--out", "r.jsonl", *MODEL)
    assert [line.partition(":")[0] for line in shown.out.splitlines()] == ["a.png", "b.jpg"]
    written = [record["image"] for record in records(folder / "r.jsonl")]
    assert written == ["b.jpg", "bad.png", "a.png"]
    minigpt4("describe", *paths, "--prompt", "backwards", "--out", "r.json", *MODEL)
    assert list(json.loads((folder / "r.json").read_text(encoding="utf-8"))) == list(paths)


def test_an_error_without_a_name_gets_one(minigpt4, folder):
    shown = minigpt4("describe", "a.png", "--prompt", "why " * 300, *MODEL)
    assert (shown.status, shown.out) == (1, "")
    assert shown.err.startswith("error: a.png: The prompt has 300 tokens")


def test_what_is_missing_takes_no_model(minigpt4, folder):
    assert minigpt4("describe", "no.png", "nor.png").status == 1
    assert FakeMiniGPT4.loaded == []


@pytest.mark.parametrize(
    "arguments",
    [("--out", "nowhere/r.json"), ("--out", "r.csv"), ("--resume",), ("--top-p", "2")],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(minigpt4, folder, arguments):
    assert minigpt4("describe", "a.png", *arguments).status == 1
    assert FakeMiniGPT4.loaded == []


@pytest.mark.parametrize(
    ("options", "hint"), [((), "-r looks into its subfolders"), (("-r",), "Name another folder")]
)
def test_a_folder_without_pictures(minigpt4, folder, options, hint):
    (folder / "empty").mkdir()
    shown = minigpt4("describe", "empty", *options)
    assert shown.status == 1
    assert f"There are no pictures in the folder empty. {hint}" in shown.err


def test_a_json_object_of_answers(minigpt4, folder, bad_picture):
    shown = minigpt4("describe", "bad.png", "a.png", "--out", "r.json", *MODEL)
    assert shown.status == 1
    written = json.loads((folder / "r.json").read_text(encoding="utf-8"))
    assert written == {"bad.png": None, "a.png": ANSWER.format("a.png")}


def test_resume_asks_only_what_is_open(minigpt4, folder, bad_picture):
    out = folder / "r.jsonl"
    minigpt4("describe", "a.png", "bad.png", "--out", out, *MODEL)
    bad_picture.write_bytes((folder / "a.png").read_bytes())
    out.write_bytes(out.read_bytes() + b'{"image": "b.j')
    shown = minigpt4("describe", "a.png", "bad.png", "b.jpg", "--out", out, "--resume", *MODEL)
    assert shown.status == 0
    assert [line.partition(":")[0] for line in shown.out.splitlines()] == ["bad.png", "b.jpg"]
    assert shown.err == "2 described, 0 failed, 1 done before\n"
    assert [record["image"] for record in records(out)] == ["a.png", "bad.png", "b.jpg"]
    assert all(record["answer"] for record in records(out))


def test_when_all_is_done_no_model_is_loaded(minigpt4, folder):
    minigpt4("describe", "a.png", "--out", "r.jsonl")
    FakeMiniGPT4.loaded.clear()
    shown = minigpt4("describe", "a.png", "--out", "r.jsonl", "--resume")
    assert (shown.status, shown.out) == (0, "")
    assert shown.err == "0 described, 0 failed, 1 done before\n"
    assert FakeMiniGPT4.loaded == []


def test_a_name_that_is_no_text(start, folder):
    if sys.platform in ("win32", "darwin"):
        pytest.skip("file names are text here")
    (folder / "a.png").rename(folder / "caf\udce9.png")
    command = start("describe", "caf\udce9.png", "b.jpg", *MODEL, errors="surrogateescape")
    out, _ = command.communicate(timeout=60)
    assert command.returncode == 0
    assert out.startswith("caf\udce9.png: Describe")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
@pytest.mark.parametrize("name", ["r.json", "r.jsonl"])
def test_ctrl_c_loses_nothing(start, folder, name):
    command = start("describe", "a.png", "b.jpg", "--out", name, *MODEL, seconds=0.2)
    assert command.stdout.readline().startswith("a.png: ")
    command.send_signal(signal.SIGINT)
    out, err = command.communicate(timeout=60)
    assert (command.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert f"What was done is in {name}" in err
    text = (folder / name).read_text()
    assert list(json.loads(text)) == ["a.png"] if name == "r.json" else len(text.splitlines()) == 1


def test_a_full_disk_behind_the_results(start, minigpt4, folder):
    resource = pytest.importorskip("resource")
    command = start(
        "describe", "a.png", "b.jpg", "--out", "r.jsonl", *MODEL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)),
    )  # fmt: skip
    out, err = command.communicate(timeout=60)
    assert command.returncode == 1
    assert out.startswith("a.png: ")
    assert "error: r.jsonl cannot be written (File too large)." in err
    first, _torn = (folder / "r.jsonl").read_text().splitlines()
    assert json.loads(first)["image"] == "a.png"
    again = minigpt4("describe", "a.png", "b.jpg", "--out", "r.jsonl", "--resume", *MODEL)
    assert again.status == 0
    assert [record["image"] for record in records(folder / "r.jsonl")] == ["a.png", "b.jpg"]


BOXED = "say <p>a cat</p> {<10><20><50><100>}"


@pytest.fixture
def writes_boxes(monkeypatch):
    monkeypatch.setattr(FakeMiniGPT4, "has_boxes", True)


@pytest.mark.usefixtures("writes_boxes")
def test_boxes_are_drawn_recorded_and_exported(minigpt4, folder):
    asked = ("describe", "a.png", "b.jpg", "--prompt", BOXED, *MODEL)
    shown = minigpt4(*asked, "--draw", "drawn", "--out", "r.jsonl")
    assert shown.status == 0
    assert sorted(path.name for path in (folder / "drawn").iterdir()) == ["a.png", "b.png"]
    before = Image.open(folder / "a.png").convert("RGB")
    for record in records(folder / "r.jsonl"):
        width, height = record["picture_size"]
        (box,) = record["boxes"]
        assert box["label"] == "a cat"
        assert box["box"] == [width // 10, height // 5, width // 2, height]
        assert record["answer"][box["start"] : box["stop"]] == "{<10><20><50><100>}"
    drawn = Image.open(folder / "drawn/a.png").convert("RGB")
    assert drawn.resize(before.size).tobytes() != before.tobytes()
    assert minigpt4(*asked, "--out", "r.coco.json").status == 0
    coco = json.loads((folder / "r.coco.json").read_text())
    assert [each["file_name"] for each in coco["images"]] == ["a.png", "b.jpg"]
    assert len(coco["annotations"]) == 2


@pytest.mark.usefixtures("writes_boxes")
def test_pictures_without_boxes_are_not_drawn(minigpt4, folder):
    assert minigpt4("describe", "a.png", "--draw", "drawn", *MODEL).status == 0
    assert not (folder / "drawn").exists()


@pytest.mark.usefixtures("writes_boxes")
def test_pictures_of_one_name_have_drawings_of_their_own(minigpt4, folder):
    (folder / "sub/a.jpg").write_bytes((folder / "b.jpg").read_bytes())
    shown = minigpt4(
        "describe", "a.png", "sub/a.jpg", "--prompt", BOXED, "--draw", "drawn", *MODEL
    )  # fmt: skip
    assert shown.status == 0
    assert sorted(path.name for path in (folder / "drawn").iterdir()) == ["a-2.png", "a.png"]


@pytest.mark.usefixtures("writes_boxes")
def test_an_address_is_drawn_on_without_a_second_fetch(minigpt4, folder, site):
    shown = minigpt4(
        "describe", f"{site}/x.png", "--allow-local-urls", "--prompt", BOXED, "--draw", "drawn",
        *MODEL,
    )  # fmt: skip
    assert (shown.status, len(site.asked)) == (0, 1)
    assert [path.name for path in (folder / "drawn").iterdir()] == ["x.png"]


@pytest.mark.parametrize("wanted", [("--draw", "drawn"), ("--out", "r.coco.json")])
def test_a_model_without_boxes_is_told_from_one_that_sees_nothing(minigpt4, folder, wanted):
    shown = minigpt4("describe", "a.png", *wanted, *MODEL)
    assert shown.status == 1
    assert shown.err == f"error: This model writes no boxes: leave {' '.join(wanted)} out.\n"
    assert not (folder / wanted[1]).exists()


@pytest.mark.usefixtures("writes_boxes")
def test_a_picture_that_is_gone_when_it_is_drawn_is_named(minigpt4, folder, monkeypatch):
    describe = FakeMiniGPT4.describe

    def describe_and_lose(self, picture, *asked):
        reply = describe(self, picture, *asked)
        Path(picture.value).unlink()
        return reply

    monkeypatch.setattr(FakeMiniGPT4, "describe", describe_and_lose)
    asked = ("--prompt", BOXED, "--draw", "drawn", "--out", "r.jsonl", *MODEL)
    shown = minigpt4("describe", "a.png", *asked)
    assert (shown.status, shown.out) == (1, "<p>a cat</p> {<10><20><50><100>}\n")
    assert shown.err.startswith("error: a.png does not exist.")
    assert records(folder / "r.jsonl")[0]["boxes"]
    assert not (folder / "drawn").exists()
