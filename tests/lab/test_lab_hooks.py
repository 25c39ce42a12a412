"""Functions inside a pass and other weights do what they say, and leave nothing behind."""

import json

import pytest
import torch
from dense import Dense
from safetensors.torch import save_file

from minigpt4_runtime import MiniGPT4, RequestError

SITES = ["scores", "heads", "attention", "feed_forward", "residual"]
ANSWER = (5, 9, 17)


def changed(value):
    return value * 0.5 + 0.01 * torch.arange(value.shape[-1], dtype=value.dtype)


@pytest.mark.parametrize("site", SITES)
def test_each_site_is_where_it_says(lab, prompt, site):
    places = []

    def change(value, place):
        places.append((place, tuple(value.shape)))
        return changed(value)

    with lab.hook(site, [0, 2], change):
        logits = lab.forward(prompt, answer=ANSWER).logits[0]
    dense = Dense(lab)

    def change_there(at, layer, value):
        return changed(value) if at == site and layer in (0, 2) else value

    rows = dense.rows_of(prompt, lab.encode(prompt.pixels), ANSWER)
    wanted, _, _ = dense.run(rows, change_there)
    assert torch.allclose(logits.double(), wanted, atol=1e-4)
    plain, _, _ = dense.run(rows)
    assert not torch.allclose(logits.double(), plain, atol=1e-2)
    config, total = lab.config.language, len(rows)
    heads, size = config.num_attention_heads, config.head_dim
    shape = {"scores": (1, heads, total, total), "heads": (1, total, heads, size)}
    assert [(place.layer, place.start, shape_seen) for place, shape_seen in places] == [
        (layer, 0, shape.get(site, (1, total, config.hidden_size))) for layer in (0, 2)
    ]


def test_hooks_follow_an_answer_as_it_grows(lab, prompt):
    """The same rows are changed whether they come together or one by one."""

    def push(value, place):
        value = value.clone()
        value[..., :4] += 0.5
        return value

    with lab.hook("residual", 1, push), lab.hook("heads", "all", lambda value, place: value * 0.9):
        state = lab.start(prompt)
        stepped = [state.logits, *(state.step([each]) for each in ANSWER)]
        whole = lab.forward(prompt, answer=ANSWER).logits[0, -4:]
    assert torch.allclose(torch.cat(stepped), whole, atol=1e-4)


def test_hooks_know_their_branch_and_their_rows(lab, prompt):
    seen = []

    def note(value, place):
        seen.append((place.branch, place.start, value.shape[1]))

    with lab.hook("attention", -1, note):
        lab.generate(prompt, branches={"other": prompt}, max_new_tokens=3, stop=())
    total = len(prompt.token_ids)
    assert seen == [
        (name, start, rows)
        for start, rows in ((0, total), (total, 1), (total + 1, 1))
        for name in ("", "other")
    ]


def test_nothing_stays(vicuna, lab, prompt):
    asked = vicuna.question(vicuna.cases("single")[0])
    before = lab.forward(prompt, answer=ANSWER).logits
    told = vicuna.model.chat(asked, vicuna.sampling())
    names = list(lab.weights)
    others = {name: torch.zeros_like(weight) for name, weight in lab.weights.items()}
    with lab.edited(others):
        assert float(lab.forward(prompt).logits.abs().max()) == 0
        # The engine answers as ever, what it has in no cache too.
        vicuna.model.probe.use_engine(vicuna.model.engine_config)
        assert vicuna.model.chat(asked, vicuna.sampling()) == told
    with pytest.raises(RequestError), lab.edited({**others, "x": torch.ones(1)}):
        pass
    with pytest.raises(ZeroDivisionError), lab.hook("residual", "all", lambda *_: 1 / 0):
        lab.forward(prompt)
    hooked = [module for module in lab._opened.model.modules() if module._forward_hooks]
    assert hooked == []
    assert sorted(lab.weights) == sorted(names)
    assert torch.equal(lab.forward(prompt, answer=ANSWER).logits, before)


def test_edited_weights_count(lab, prompt):
    """Every weight of the language model does something, and a double edit keeps the inner one."""
    before = lab.forward(prompt, answer=ANSWER).logits
    for name, weight in lab.weights.items():
        with lab.edited({name: weight * 1.5 + 0.1}):
            assert not torch.equal(lab.forward(prompt, answer=ANSWER).logits, before), name
    name = "language.norm.weight"
    weight = lab.weights[name]
    with lab.edited({name: weight * 2}):
        with lab.edited({name: weight * 3}):
            assert torch.allclose(lab.forward(prompt, answer=ANSWER).logits, before * 3, atol=1e-4)
        assert torch.allclose(lab.forward(prompt, answer=ANSWER).logits, before * 2, atol=1e-4)


def test_an_edit_of_low_rank_is_an_adapter(vicuna, lab, prompt, tmp_path):
    """A matrix projected away from directions, as Nullu does it, laid over the model as LoRA."""
    name, layer = (
        "language.layers.1.mlp_down.weight",
        "base_model.model.model.layers.1.mlp.down_proj",
    )
    weight = lab.weights[name]
    wide = torch.randn(len(weight), 2, generator=torch.Generator().manual_seed(2))
    away = torch.linalg.qr(wide).Q
    with lab.edited({name: weight - away @ (away.T @ weight)}), torch.no_grad():
        wanted = lab.forward(prompt, answer=ANSWER).logits
    factors = {"A": (away.T @ weight).detach(), "B": -away}
    save_file(
        {f"{layer}.lora_{side}.weight": each.contiguous() for side, each in factors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["down_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    model = MiniGPT4.load(vicuna.model.model_dir, device="cpu", dtype="float32", adapter=tmp_path)
    other = model.lab()
    with torch.no_grad():
        found = other.forward(prompt, answer=ANSWER).logits
    assert torch.allclose(found, wanted, atol=1e-4)
    assert not torch.allclose(lab.forward(prompt, answer=ANSWER).logits, wanted, atol=1e-2)


def test_what_cannot_be_is_said(lab, prompt):
    ones = torch.ones(3)
    for said, enter in {
        "site is 'score'": lambda: lab.hook("score", 0, changed),
        "There is no layer 7": lambda: lab.hook("heads", [0, 7], changed),
        "give 'all', a number": lambda: lab.hook("heads", "every", changed),
        "Did you mean 'language.norm.weight'": lambda: lab.edited({"language.norm.wait": ones}),
        "Take a name of lab.weights": lambda: lab.edited({"x": ones}),
        r"is \(64,\); the weight given for it is \(3,\)": lambda: lab.edited(
            {"language.norm.weight": ones}
        ),
    }.items():  # fmt: skip
        with pytest.raises(RequestError, match=said), enter():
            pass
    wrong = lab.hook("heads", 0, lambda value, place: value[0])
    with wrong, pytest.raises(RequestError, match="hook at heads of layer 0 gave"):
        lab.forward(prompt)
