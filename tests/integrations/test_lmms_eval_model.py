"""lmms-eval's requests reach the model many at once; its base class and its records are faked."""

import importlib.util
import sys
import types
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from minigpt4_runtime import MiniGPT4, RequestError, SamplingParams, image

ROOT = Path(__file__).parents[2]
QUESTION = "How many shapes are there?"
CHOICES = ("There is one shape.", "There are two shapes.", "Six")
# A document a picture; the last is text alone.
DOCUMENTS = [*(ROOT / f"examples/images/{name}.png" for name in ("one", "two", "three")), None]


@dataclass
class Record:
    """Stands for TokenCounts, GenerationResult and Instance alike."""

    first: object
    second: object = None

    @property
    def args(self):
        return self.first


@pytest.fixture(scope="module")
def lmms_eval_model():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.instance", "lmms_eval.api.model"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["lmms_eval.api.model"].lmms = type("lmms", (), {})
        for name in ("GenerationResult", "Instance", "TokenCounts"):
            setattr(sys.modules["lmms_eval.api.instance"], name, Record)
        file = ROOT / "integrations" / "lmms_eval_model.py"
        spec = importlib.util.spec_from_file_location("lmms_eval_model", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def asker(lmms_eval_model):
    # As its registry makes it, with what it was told of batches.
    made = lmms_eval_model.MiniGPT4Runtime("demo", batch_size=1, device="cpu", dtype="float32")
    made.task_dict = {"shapes": {"test": DOCUMENTS}}
    return made


def show(document):
    if document is None:
        return []
    with Image.open(document) as picture:
        return [picture.convert("RGB")]


def request(text, *more, number=0):
    return Record((text, *more, number, "shapes", "test"))


def test_answers_are_those_of_describe_and_begin_together(asker, monkeypatch):
    how, running, most = {"max_new_tokens": 24, "until": ["shape"], "do_sample": False}, [], []
    submit = MiniGPT4.submit

    def watched(self, *given):
        ticket = submit(self, *given)
        running.append(ticket)
        most.append(sum(not each._is_over for each in running))
        return ticket

    asked = [request(QUESTION, how, show, number=number) for number in range(len(DOCUMENTS))]
    with monkeypatch.context() as patch:
        patch.setattr(MiniGPT4, "submit", watched)
        found = asker.generate_until(asked)
    assert max(most) == len(DOCUMENTS)
    sampling = SamplingParams(max_new_tokens=24, stop=("shape",))
    content = [[*map(image, show(document)), QUESTION] for document in DOCUMENTS]
    wanted = [asker.model.chat([{"role": "user", "content": each}], sampling) for each in content]
    assert [each.first for each in found] == [each.text for each in wanted]
    assert found[0].first == "There is one"
    counts = [(each.usage.prompt_tokens, each.usage.completion_tokens) for each in wanted]
    assert [(each.second.first, each.second.second) for each in found] == counts


def test_losses_are_the_laboratorys(asker):
    """Prompts side by side, a target that a document tells, and one behind nothing."""
    requests = [
        request(QUESTION, f" {choice}", show, number=number)
        for number in (0, 1)
        for choice in CHOICES
    ]
    requests.append(request(QUESTION, lambda document: document.stem, show))
    requests.append(Record(("", "red")))
    found = [each.first for each in asker.loglikelihood(requests)]
    lab, wanted = asker.model.lab(), []
    for document, choices in ((DOCUMENTS[0], CHOICES), (DOCUMENTS[1], CHOICES),
                              (DOCUMENTS[0], ("one",)), (None, ("red",))):  # fmt: skip
        content = [*map(image, show(document)), "" if choices == ("red",) else QUESTION]
        scores = lab.score(lab.prompt([{"role": "user", "content": content}]), choices).tolist()
        wanted += [
            -score / len(lab.ids_of(text)) for score, text in zip(scores, choices, strict=True)
        ]
    assert [loss for loss, _ in found] == pytest.approx(wanted, abs=1e-4)
    assert [said for _, said in found] == [True, False, False, False, True, *[False] * 3]


def test_rounds_go_on_until_the_task_says_so(asker):
    """Each has its own number of rounds, and the task may change what was said."""
    calls = []

    def go_on(document, *, previous_output, round_idx, previous_round_info):
        calls.append((document, round_idx, previous_round_info))
        if round_idx == (1 if document == DOCUMENTS[1] else 2):
            return None, None, True, [*previous_output, "over"], None
        return show(document), "Describe this image.", False, previous_output, document.stem

    found = asker.generate_until_multi_round(
        [request(QUESTION, {}, show, go_on, number=number) for number in (0, 1, 2)]
    )
    for document, said in zip(DOCUMENTS, found, strict=False):
        first = asker.model.describe(document, QUESTION).text
        second = [] if document == DOCUMENTS[1] else [
            asker.model.describe(document, "Describe this image.").text
        ]  # fmt: skip
        assert said == [first, *second, "over"]
    assert [(number, note) for _, number, note in calls] == [
        (1, None), (1, None), (1, None), (2, "one"), (2, "three"),
    ]  # fmt: skip


def test_pictures_stand_where_the_text_says(lmms_eval_model):
    def placed(text, *names):
        content = lmms_eval_model._message(text, names).content
        return [each if isinstance(each, str) else each.name for each in content]

    assert placed("<image> or <image>?", "a", "b") == ["a", " or ", "b", "?"]
    assert placed("What?", "a", "b") == ["a", "b", "What?"]
    # As many places as pictures, or else they are words.
    assert placed("<image> and <image>?", "a") == ["a", "<image> and <image>?"]
    assert placed("What?") == ["What?"]


def test_settings_of_a_task(lmms_eval_model, asker):
    read = lmms_eval_model._sampling
    assert read({"do_sample": False, "temperature": 0.7, "top_p": 0}) == SamplingParams()
    given = {"temperature": 0.7, "top_p": 0.5, "max_new_tokens": 9, "image_aspect_ratio": "pad"}
    drawn = SamplingParams(temperature=0.7, top_p=0.5, max_new_tokens=9)
    assert read({**given, "until": "\n\n"}) == SamplingParams(
        temperature=0.7, top_p=0.5, max_new_tokens=9, stop=("\n\n",)
    )
    assert read({**given, "num_beams": None}) == drawn
    assert read({"do_sample": True, "temperature": 1.5, "num_beams": 1}).temperature == 1.5


def test_a_request_that_cannot_be_served_ends_no_run(asker, lmms_eval_model, tmp_path, caplog):
    """Wherever it is found: by the task, with the picture, or with the prompt."""
    cut = BytesIO(DOCUMENTS[0].read_bytes()[:300])
    wrong = (lambda _: [Image.open(tmp_path / "gone.png")], lambda _: [Image.open(cut)],
             lambda _: ["clip.mp4"])  # fmt: skip
    long = request("word " * 5000, {}, show)
    asked = [request(QUESTION, {}, each, number=1) for each in wrong]
    right = request(QUESTION, {}, show, number=2)
    *found, last = asker.generate_until([*asked, long, right])
    assert last.first == "There are three shapes."
    for each, reason in zip(found, ("gone.png", "truncated", "clip.mp4", "tokens"), strict=True):
        assert each.first.startswith(f"{lmms_eval_model.NO_ANSWER} ")
        assert (reason in each.first, each.second) == (True, None)
    assert len(caplog.records) == 4
    assert "Document 1 of shapes (test) has no answer: " in caplog.text

    def end(_, *, previous_output, **more):
        return None, None, True, previous_output, None

    rounds = [request(QUESTION, {}, pictures, end) for pictures in (wrong[2], show)]
    (failed,), (served,) = asker.generate_until_multi_round(rounds)
    assert failed.startswith(lmms_eval_model.NO_ANSWER)
    assert served == "There is one shape."


def test_a_loss_that_cannot_be_ends_the_run_with_its_name(asker):
    for pictures, reason in ((lambda _: ["clip.mp4"], r"clip\.mp4"), (show, "tokens")):
        text = QUESTION if pictures is not show else "word " * 5000
        with pytest.raises(RequestError, match=rf"Document 1 of shapes \(test\) .*{reason}"):
            asker.loglikelihood([request(text, "yes", pictures, number=1)])
