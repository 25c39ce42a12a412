"""A projection learns what it should, and goes on after a stop as if there had been none."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from golden_cases import GOLDENS
from safetensors.torch import save_file

from minigpt4_runtime import CheckpointError, ConfigError, MiniGPT4, SamplingParams
from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.checkpoint.adapter import lay_over, read_adapter, read_projection
from minigpt4_runtime.checkpoint.manifest import read_manifest
from minigpt4_runtime.checkpoint.mapped import map_tensors
from minigpt4_runtime.checkpoint.merge import merge
from minigpt4_runtime.checkpoint.weights import read_folder_weights
from minigpt4_runtime.formats.registry import format_of
from minigpt4_runtime.tune.data import read_data
from minigpt4_runtime.tune.features import picture_features
from minigpt4_runtime.tune.learner import Learner
from minigpt4_runtime.tune.settings import TuneSettings
from minigpt4_runtime.tune.tune import RESULT_NAME, Training, tune

sys.path.append(str(GOLDENS.parent / "lab"))
from dense import Dense

SETTINGS = TuneSettings(
    steps=12, batch_size=4, at_once=2, lr=1e-2, warmup_steps=2, fresh=True, seed=3
)


def run(data, out_dir, settings=SETTINGS, **more):
    return tune(
        DEMO_MODEL_DIR, read_data(data, DEMO_MODEL_DIR), out_dir, settings, device="cpu", **more
    )


@pytest.fixture(scope="session")
def unbroken(dialogues, tmp_path_factory):
    """A whole training: its folder, and its steps."""
    out_dir, steps = tmp_path_factory.mktemp("unbroken"), []
    held_out = read_data(dialogues, DEMO_MODEL_DIR)
    done = run(dialogues, out_dir, on_step=steps.append, held_out=held_out, eval_every=5)
    assert (done.steps, done.adapter) == (12, out_dir / RESULT_NAME)
    return out_dir, steps


@pytest.fixture(scope="module", params=["vicuna", "llama2-gqa"])
def golden(request, golden_model_dir, tmp_path_factory):
    """A golden checkpoint's learner with two answers of different length, one with two pictures."""
    model_dir = golden_model_dir(request.param)
    pictures = sorted((GOLDENS / request.param / "images").iterdir())[:2]
    first, second = ({"type": "image_url", "image_url": str(each)} for each in pictures)
    lines = [
        [{"role": "user", "content": [first, "what is this ?"]},
         {"role": "assistant", "content": "a dog"}],
        [{"role": "user", "content": [second, first, "and this ?"]},
         {"role": "assistant", "content": "there is a small house on the left"}],
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp(request.param)
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps({"messages": said}) + "\n" for said in lines), "utf-8")
    data = read_data(path, model_dir)
    cpu = torch.device("cpu")
    features = picture_features(data, model_dir, "base", folder, device=cpu)
    learner = Learner.load(model_dir, TuneSettings(), device=cpu, dtype=torch.float32)
    return SimpleNamespace(model_dir=model_dir, data=data, features=features, learner=learner)


def test_a_steps_loss_and_gradients_are_those_written_down_once_more(golden):
    weights = map_tensors(read_folder_weights(golden.model_dir))
    with MiniGPT4.load(golden.model_dir, device="cpu", dtype="float32") as model:
        dense, lab = Dense(model.lab()), model.lab()
        shown = [lab.pixels(picture) for picture in golden.data.pictures]
        rows = torch.cat([lab.encode(pixels) for pixels in shown])
    weight, bias = (
        weights[f"vision.projection.{name}"].double().requires_grad_()
        for name in ("weight", "bias")
    )
    projected = golden.features.double() @ weight.T + bias
    # What the picture's rows are was not learned from this room.
    assert torch.allclose(projected.float(), rows, atol=1e-4)
    total, count = 0.0, 0
    for example in golden.data.examples:
        spans = [SimpleNamespace(start=at, num_rows=rows.shape[1]) for at in example.places]
        prompt = SimpleNamespace(token_ids=example.prompt_ids, image_spans=spans)
        logits, _, _ = dense.run(
            dense.rows_of(prompt, projected[list(example.pictures)], example.answer_ids)
        )
        said = logits[len(example.prompt_ids) - 1 : -1].log_softmax(-1)
        total = total - said[range(len(said)), list(example.answer_ids)].sum()
        count += len(said)
    loss = total / count
    loss.backward()
    for at_once in (1, 2):
        settings = TuneSettings(batch_size=2, at_once=at_once)
        training = Training(golden.learner, golden.data, golden.features, settings)
        found, num_tokens = training.gradients(0)
        assert found == pytest.approx(loss.item(), abs=1e-4)
        assert num_tokens == sum(
            len(each.prompt_ids) + len(each.answer_ids) for each in golden.data.examples
        )
        learned = golden.learner.learned.values()
        for mine, theirs in zip(learned, (weight, bias), strict=True):
            assert torch.allclose(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
            assert float(theirs.grad.abs().max()) > 1e-3


def test_the_ids_are_those_that_the_model_reads_and_says(golden):
    with MiniGPT4.load(golden.model_dir, device="cpu") as model:
        lab = model.lab()
        for example in golden.data.examples:
            pictures = [golden.data.pictures[number] for number in example.pictures]
            question = example.text.rpartition("</Img> ")[2].partition(" ?")[0] + " ?"
            asked = [{"role": "user", "content": [*pictures, question]}]
            assert lab.prompt(asked).token_ids == example.prompt_ids
            assert lab.answer(lab.prompt(asked), example.answer_ids).text == example.answer
            assert lab.answer(lab.prompt(asked), example.answer_ids).finish_reason == "stop"


def test_a_projection_drawn_at_random_learns(unbroken):
    _, steps = unbroken
    assert [step.number for step in steps] == list(range(1, 13))
    before, after = (sum(each.loss for each in some) for some in (steps[:3], steps[-3:]))
    assert after < before - 0.9
    measured = {step.number: step.held_out for step in steps if step.held_out is not None}
    assert list(measured) == [5, 10, 12]
    assert measured[12] < measured[5] - 0.1


def test_the_rate_and_the_order():
    settings = TuneSettings(steps=100, batch_size=3, warmup_steps=10)
    rates = [settings.rate(step) for step in range(100)]
    assert (rates[0], rates[5]) == (1e-6, pytest.approx(1e-6 + 2.9e-5 / 2))
    assert rates[50] == pytest.approx((3e-5 + 1e-5) / 2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    order = [index for step in range(100) for index in settings.batch(step, 7)]
    epochs = [order[first : first + 7] for first in range(0, 294, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 30


def test_a_stop_and_going_on_change_no_bit(unbroken, dialogues, tmp_path):
    out_dir, whole = unbroken
    steps = []
    done = run(dialogues, tmp_path, on_step=steps.append, should_stop=lambda: len(steps) == 5)
    assert (done.steps, done.adapter) == (5, None)
    assert not (tmp_path / RESULT_NAME).exists()
    with pytest.raises(ConfigError, match="Go on with --resume"):
        run(dialogues, tmp_path)
    with pytest.raises(ConfigError, match=r"of a training with lr 0\.01\. Go on with the same"):
        run(dialogues, tmp_path, TuneSettings(**{**SETTINGS.to_mapping(), "lr": 0.02}), resume=True)
    with pytest.raises(ConfigError, match=r"holds no state\.safetensors to go on from"):
        run(dialogues, tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists(), "no picture was encoded for that"
    run(dialogues, tmp_path, on_step=steps.append, resume=True)
    assert [step.loss for step in steps] == [step.loss for step in whole]
    # Measuring what is held out changes nothing.
    for name in (RESULT_NAME, "state.safetensors"):
        assert (tmp_path / name).read_bytes() == (out_dir / name).read_bytes()
    tables = [(each / "losses.csv").read_text("utf-8").splitlines() for each in (tmp_path, out_dir)]
    assert tables[0][1:] == [f"{line.rpartition(',')[0]}," for line in tables[1][1:]]
    assert len(tables[0]) == 13


def test_a_loss_that_is_no_number_loses_nothing(dialogues, tmp_path):
    settings = TuneSettings(steps=5, batch_size=1, lr=9e18, warmup_steps=0, min_lr=0)
    with pytest.raises(ConfigError, match=r"Step 3 has no finite gradient \(line \d+; its loss"):
        run(dialogues, tmp_path, settings)
    assert len((tmp_path / "losses.csv").read_text("utf-8").splitlines()) == 3
    assert (tmp_path / "state.safetensors").exists()


def test_no_memory_loses_nothing_and_less_at_once_goes_on(dialogues, tmp_path, monkeypatch):
    gradients = Training.gradients

    def refuse(training, number):
        if number == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return gradients(training, number)

    monkeypatch.setattr(Training, "gradients", refuse)
    with pytest.raises(ConfigError, match=r"suffice for step 3\. What was done is kept"):
        run(dialogues, tmp_path)
    monkeypatch.undo()
    (features,) = tmp_path.glob("features-*")
    features.write_bytes(features.read_bytes()[:5000])
    less = TuneSettings(**SETTINGS.to_mapping() | {"at_once": 1, "recompute": True})
    steps = []
    assert run(dialogues, tmp_path, less, resume=True, on_step=steps.append).steps == 12
    assert steps[0].number == 3
    (tmp_path / "state.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"is damaged\. Leave out --resume"):
        run(dialogues, tmp_path, resume=True)
    for record in ({}, {"minigpt4_training": "{"}, {"minigpt4_training": "[1]"}):
        save_file({"x": torch.ones(1)}, tmp_path / "state.safetensors", record)
        with pytest.raises(ConfigError, match=r"is no state of a training\. Leave out"):
            run(dialogues, tmp_path, less, resume=True)


def test_what_is_computed_again_gives_the_same_gradients(golden):
    learner = Learner.load(
        golden.model_dir, TuneSettings(), device=torch.device("cpu"), dtype=torch.float32
    )
    num_kept, gradients = [], []
    for again in (False, True):
        if again:
            learner.recompute()
        training = Training(learner, golden.data, golden.features, TuneSettings(batch_size=2))
        kept = []

        def keep(tensor, kept=kept):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            training.gradients(0)
        num_kept.append(sum(kept))
        gradients.append(learner.image_end.projection.weight.grad.clone())
    assert torch.equal(*gradients)
    assert num_kept[1] < num_kept[0] / 2


def test_the_mean_that_is_measured(golden):
    """Over all of it, however it is cut."""
    found = []
    for at_once in (1, 2):
        training = Training(
            golden.learner,
            golden.data,
            golden.features,
            TuneSettings(batch_size=2, at_once=at_once),
        )
        found.append(training.measure(golden.data, golden.features))
    loss, _ = training.gradients(0)
    assert found == [pytest.approx(loss, abs=1e-5)] * 2


def test_a_quantised_language_model(dialogues, unbroken, tmp_path):
    """It is tuned through its plain product, and takes the file of the floats it came from."""
    from minigpt4_runtime.quantise.choice import QuantisePlan
    from minigpt4_runtime.quantise.quantise import quantise

    for weights in ("w4a16", "w8a8"):
        plan = QuantisePlan(weights=weights, head="keep", image_side="keep")
        quantise(DEMO_MODEL_DIR, tmp_path / weights, plan)
    data = read_data(dialogues, DEMO_MODEL_DIR)
    settings = TuneSettings(steps=2, batch_size=2, warmup_steps=0)
    done = tune(tmp_path / "w4a16", data, tmp_path / "out", settings, device="cpu")
    learned = map_tensors(read_adapter(done.adapter)[0])["vision.projection.weight"]
    before, _ = read_projection(DEMO_MODEL_DIR)
    assert 1e-5 < float((learned - before).abs().max()) < 1e-4
    merge(tmp_path / "w4a16", unbroken[0] / RESULT_NAME, tmp_path / "merged")
    with pytest.raises(CheckpointError, match="holds the adapter itself"):
        merge(tmp_path / "w4a16", unbroken[0] / RESULT_NAME, unbroken[0], force=True)
    before, after = (
        map_tensors(read_folder_weights(tmp_path / name)) for name in ("w4a16", "merged")
    )
    assert read_manifest(tmp_path / "merged").weight_format != "float"
    learned = map_tensors(read_adapter(unbroken[0] / RESULT_NAME)[0])
    for name, tensor in {**before, **learned}.items():
        assert torch.equal(after.pop(name), tensor)
    assert not after
    asked = (dialogues.parent / "0.png", "What?", SamplingParams(max_new_tokens=20))
    with MiniGPT4.load(tmp_path / "merged", device="cpu") as merged:
        answer = merged.describe(*asked)
    with MiniGPT4.load(
        tmp_path / "w4a16", adapter=unbroken[0] / RESULT_NAME, device="cpu"
    ) as model:
        assert model.describe(*asked).token_ids == answer.token_ids
    with pytest.raises(ConfigError, match="holds weights in w8a8, which rounds what it multiplies"):
        tune(tmp_path / "w8a8", data, tmp_path / "other", settings, device="cpu")


def test_the_result_answers_at_once_and_only_over_its_model(
    unbroken, golden_model_dir, dialogues, tmp_path
):
    path = unbroken[0] / RESULT_NAME
    stored, record = read_adapter(path)
    assert record["data"] == read_data(dialogues, DEMO_MODEL_DIR).digest
    assert (record["model"], record["steps"], record["examples"]) == ("demo", 12, 12)
    learned = map_tensors(stored)
    with MiniGPT4.load(adapter=path, device="cpu") as model, MiniGPT4.load(device="cpu") as plain:
        for name, tensor in learned.items():
            assert torch.equal(model.lab().weights[name], tensor)
        assert not torch.equal(plain.lab().weights[name], tensor)
        replies = [
            each.describe(dialogues.parent / "0.png", sampling=SamplingParams(max_new_tokens=40))
            for each in (model, plain)
        ]
        assert replies[0].text != replies[1].text
    vicuna = golden_model_dir("vicuna")
    with pytest.raises(CheckpointError, match="tuned over the image side of demo"):
        MiniGPT4.load(vicuna, adapter=path)
    with pytest.raises(ConfigError, match="vision_graph and adapter are both given"):
        MiniGPT4.load(adapter=path, vision_graph=tmp_path)
    for name in ("model.safetensors", "nothing"):
        with pytest.raises(CheckpointError, match="Name the file projection"):
            MiniGPT4.load(adapter=DEMO_MODEL_DIR / name)
    # Of a quantised folder the projection is floats then, and all else as it was.
    for formats in ("w8a16", {"vision": "w8a16", "language.layers": "w8a16"}):
        _, mixed = lay_over(path, DEMO_MODEL_DIR, read_folder_weights(DEMO_MODEL_DIR), formats)
        names = ("vision.projection", "vision.vit.blocks.0.mlp_in", "language.layers.0.mlp_up")
        found = [format_of(mixed, each).name for each in names]
        assert found == ["float", "w8a16", "w8a16"]


GOOD = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "0.png"}}, "What?"]},
    {"role": "assistant", "content": "A ring."},
]
BAD = {
    "{": "It is no JSON",
    "[]": 'It must be {"messages": […]}; seen: list.',
    json.dumps({"messages": GOOD, "weight": 2}): "seen: ['messages', 'weight']",
    json.dumps({"messages": "hello"}): "messages must be a list of messages",
    json.dumps({"messages": [*GOOD, GOOD[0]]}): "The roles are user, assistant, user;",
    json.dumps({"messages": GOOD[:1] * 2 + GOOD[1:]}): "'assistant' must take turns",
    json.dumps({"messages": [GOOD[0], {"role": "assistant", "content": " "}]}): "answer is empty",
    json.dumps({"messages": [GOOD[0], {"role": "assistant", "content": "a###b"}]}): "holds '###'",
    json.dumps(
        {"messages": [{"role": "user", "content": "What?"}, GOOD[1]]}
    ): "There is no picture",
    json.dumps({"messages": GOOD}).replace("0.png", "9.png"): "9.png",
    json.dumps({"messages": GOOD}).replace("0.png", "http://a/0.png"): "is an address",
    json.dumps({"messages": GOOD}).replace("A ring.", "A ring. " * 900): "the model holds",
    json.dumps({"messages": GOOD}).replace("assistant", "robot"): "role is 'robot'",
}


def test_every_bad_line_is_named(dialogues):
    path = dialogues.with_name("bad.jsonl")
    path.write_text("\n".join(["", json.dumps({"messages": GOOD, "id": 1}), *BAD]), "utf-8")
    with pytest.raises(ConfigError, match="13 of 14 dialogues cannot be learned from") as caught:
        read_data(path, DEMO_MODEL_DIR)
    _, *faults = str(caught.value).splitlines()
    for number, (fault, wanted) in enumerate(zip(faults, BAD.values(), strict=True), start=3):
        assert fault.startswith(f"line {number}: ")
        assert wanted in fault
    path.write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(ConfigError, match="line 1: It is not UTF-8 text"):
        read_data(path, DEMO_MODEL_DIR)
    path.write_text("\n", "utf-8")
    with pytest.raises(ConfigError, match="is empty"):
        read_data(path, DEMO_MODEL_DIR)
    with pytest.raises(ConfigError, match=r"none\.jsonl cannot be read"):
        read_data(path.with_name("none.jsonl"), DEMO_MODEL_DIR)
    with pytest.raises(ConfigError, match=r"none, where pictures are to be, is no folder"):
        read_data(dialogues, DEMO_MODEL_DIR, pictures=path.with_name("none"))


def test_layouts_of_others(dialogues, tmp_path):
    own = read_data(dialogues, DEMO_MODEL_DIR)
    lines = map(json.loads, dialogues.read_text("utf-8").splitlines())
    names = {"user": "human", "assistant": "gpt"}
    entries, notes = [], []
    for number, line in enumerate(lines):
        turns = []
        for said in line["messages"]:
            text = said["content"] if isinstance(said["content"], str) else said["content"][1]
            mark = "" if isinstance(said["content"], str) else "<image>\n"
            turns.append({"from": names[said["role"]], "value": mark + text})
        entries.append({"id": number, "image": f"{number}.png", "conversations": turns})
        notes.append({"image_id": str(number), "caption": turns[1]["value"]})
    llava = tmp_path / "llava.json"
    llava.write_text(json.dumps(entries), "utf-8")
    read = read_data(llava, DEMO_MODEL_DIR, pictures=dialogues.parent)
    assert [each.prompt_ids for each in read.examples] == [each.prompt_ids for each in own.examples]
    assert read.picture_digests == own.picture_digests
    (tmp_path / "image").mkdir()
    for number in range(8):  # What a file is, its content says.
        content = (dialogues.parent / f"{number}.png").read_bytes()
        (tmp_path / f"image/{number}.jpg").write_bytes(content)
    (tmp_path / "filter_cap.json").write_text(json.dumps({"annotations": notes}), "utf-8")
    captions = read_data(tmp_path, DEMO_MODEL_DIR)
    first_answers = [each for each in own.examples if "</Img>" in each.text.rpartition("###")[0]]
    assert {each.answer_ids for each in captions.examples} <= {e.answer_ids for e in first_answers}
    assert captions.picture_digests == own.picture_digests
    assert len({each.text for each in captions.examples}) == 4
    for content, fault in (
        ("{}", "holds no list"), ("[", "is no JSON"), ("[]", "is empty"),
        ("[1]", "entry 1: It must have a list of conversations"),
        ('[{"conversations": [{"from": "cat", "value": "x"}]}]', "from is 'cat'"),
        ('[{"conversations": [{"from": "human", "value": "<image>"}]}]', "image must be a text"),
        ('[{"image": "a", "conversations": [{"from": "human", "value": "<image> <image>"}]}]',
         "has several <image>"),
        ('[{"conversations": [{"from": "gpt", "value": "an <image>"}]}]', "from gpt has <image"),
    ):  # fmt: skip
        llava.write_text(content, "utf-8")
        with pytest.raises(ConfigError, match=re.escape(fault)):
            read_data(llava, DEMO_MODEL_DIR)
    for content, fault in (("[]", "must be"), ('{"annotations": [{"image_id": 1}]}', "caption")):
        (tmp_path / "filter_cap.json").write_text(content, "utf-8")
        with pytest.raises(ConfigError, match=fault):
            read_data(tmp_path, DEMO_MODEL_DIR)


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": 0}, "lr is 0"),
        ({"min_lr": 1}, "above lr"),
        ({"steps": 100}, "lr would never be reached"),
    ],
)
def test_settings_that_cannot_be(change, seen):
    with pytest.raises(ConfigError, match=seen):
        TuneSettings(**change)
