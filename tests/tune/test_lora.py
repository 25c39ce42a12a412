"""What learns beside the projection: LoRA on the language model, and the Q-Former."""

import json
import re
import sys
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from golden_cases import GOLDENS
from safetensors import safe_open
from safetensors.torch import load_file

from minigpt4_runtime import ConfigError, MiniGPT4
from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.mapped import map_tensors
from minigpt4_runtime.checkpoint.weights import read_folder_weights
from minigpt4_runtime.convert.key_map import language_origins
from minigpt4_runtime.model.linear import Linear
from minigpt4_runtime.quantise.choice import QuantisePlan
from minigpt4_runtime.quantise.quantise import quantise
from minigpt4_runtime.tune.data import read_data
from minigpt4_runtime.tune.features import picture_features
from minigpt4_runtime.tune.learner import Learner
from minigpt4_runtime.tune.lora import OWN_NAME_OF
from minigpt4_runtime.tune.settings import LORA_TARGETS, TuneSettings
from minigpt4_runtime.tune.tune import Training, tune

sys.path.append(str(GOLDENS.parent / "lab"))
from dense import Dense

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
ALL = TuneSettings(
    steps=6, batch_size=4, at_once=4, lr=3e-3, warmup_steps=1, train="qformer", lora=3,
    lora_alpha=12.0, lora_targets=LORA_TARGETS,
)  # fmt: skip


@pytest.fixture(scope="module")
def learned(dialogues, tmp_path_factory):
    """The demo model, all of which has learned another word that can: data, folder, steps."""
    out_dir = tmp_path_factory.mktemp("learned")
    path = dialogues.with_name("french.jsonl")
    path.write_text(dialogues.read_text("utf-8").replace("a ", "une "), "utf-8")
    data = read_data(path, DEMO_MODEL_DIR)
    steps = []
    done = tune(
        DEMO_MODEL_DIR, data, out_dir, ALL,
        device="cpu", on_step=steps.append, held_out=data, eval_every=100,
    )  # fmt: skip
    assert done.adapter == out_dir
    return SimpleNamespace(data=data, out_dir=out_dir, steps=steps)


@pytest.fixture(scope="module")
def seen(learned):
    """The features of its pictures, behind the Q-Former."""
    return picture_features(
        learned.data, DEMO_MODEL_DIR, "b", learned.out_dir, device=CPU["device"]
    )


def read_folder(out_dir):
    """An adapter's two files, by another reader than ours: settings, tensors and metadata."""
    config = json.loads((out_dir / "adapter_config.json").read_text("utf-8"))
    with safe_open(out_dir / "adapter_model.safetensors", "pt") as file:
        return config, {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def dense_loss(dense, example, rows):
    """The sum of -log p of an answer's ids, in float64."""
    spans = [SimpleNamespace(start=at, num_rows=rows.shape[1]) for at in example.places]
    prompt = SimpleNamespace(token_ids=example.prompt_ids, image_spans=spans)
    shown = rows[list(example.pictures)]
    logits, _, _ = dense.run(dense.rows_of(prompt, shown, example.answer_ids))
    said = logits[len(example.prompt_ids) - 1 : -1].log_softmax(-1)
    return -said[range(len(said)), list(example.answer_ids)].sum()


def with_lora(dense, factors, config):
    """Add alpha/r·B·A to the weights of a Dense, by the names of other programs."""
    for name, weight in dense.weights.items():
        found = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
        for target, own in OWN_NAME_OF.items() if found else ():
            if found[2] == own:
                block = "self_attn" if own.startswith("attention") else "mlp"
                stem = f"base_model.model.model.layers.{found[1]}.{block}.{target}"
                low, high = (factors.pop(f"{stem}.lora_{side}.weight").double() for side in "AB")
                scale = config["lora_alpha"] / config["r"]
                dense.weights[name] = weight + scale * high @ low
    assert not factors


def test_the_files_hold_what_was_learned(learned):
    """Put into a model by their names alone, they give the loss that the training had."""
    config, factors, metadata = read_folder(learned.out_dir)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 12.0)
    assert config["target_modules"] == list(LORA_TARGETS)
    assert all(tensor.dtype == torch.float32 for tensor in factors.values())
    record = json.loads(metadata["minigpt4_tuned"])
    assert (record["model"], record["lora"], record["data"]) == ("demo", 3, learned.data.digest)
    with MiniGPT4.load(adapter=learned.out_dir / "projection.safetensors", device="cpu") as model:
        lab = model.lab()
        dense = Dense(lab)
        with_lora(dense, factors, config)
        rows = torch.cat([lab.encode(lab.pixels(each)) for each in learned.data.pictures])
    examples = learned.data.examples
    wanted = sum(dense_loss(dense, each, rows) for each in examples)
    wanted /= sum(len(each.answer_ids) for each in examples)
    assert learned.steps[-1].held_out == pytest.approx(float(wanted), abs=1e-4)
    assert learned.steps[-1].held_out < learned.steps[0].loss - 0.05


def test_names_are_those_of_the_published_files():
    origins = language_origins(load_config(DEMO_MODEL_DIR).language)
    for theirs, ours in OWN_NAME_OF.items():
        (published,) = origins[f"language.layers.2.{ours}.weight"].names
        assert published.endswith(f".{theirs}.weight")


def test_a_stop_changes_no_bit(learned, tmp_path):
    steps = []
    given = (DEMO_MODEL_DIR, learned.data, tmp_path, ALL)
    tune(*given, device="cpu", on_step=steps.append, should_stop=lambda: len(steps) == 2)
    assert not (tmp_path / "adapter_config.json").exists()
    tune(*given, device="cpu", resume=True)
    for name in ("projection.safetensors", "adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (learned.out_dir / name).read_bytes()


def test_gradients_of_lora_are_those_written_down_once_more(learned, seen):
    """On all matrices, with a B that is not 0, in float64 from W + scale·B·A."""
    settings = TuneSettings(
        batch_size=3, at_once=2, train="none", lora=2, lora_alpha=6, lora_targets=LORA_TARGETS
    )
    learner = Learner.load(DEMO_MODEL_DIR, settings, **CPU)
    torch.manual_seed(0)
    for adapter in learner.adapters.values():
        torch.nn.init.normal_(adapter.high, std=0.02)
    assert all("adapter" in name for name in learner.learned)
    factors = {n: each.detach().double().requires_grad_() for n, each in learner.learned.items()}
    with MiniGPT4.load(device="cpu") as model:
        dense = Dense(model.lab())
    for owner in learner.adapters:
        low, high = (factors[f"language.{owner}.adapter.{side}"] for side in ("low", "high"))
        dense.weights[f"{owner}.weight"] = dense.weights[f"{owner}.weight"] + 3 * high @ low
    training = Training(learner, learned.data, seen, settings)
    loss, _ = training.gradients(0)
    examples = [learned.data.examples[index] for index in settings.batch(0, 12)]
    with torch.no_grad():
        rows = learner.image_end(seen)
    wanted = sum(dense_loss(dense, each, rows) for each in examples)
    wanted = wanted / sum(len(each.answer_ids) for each in examples)
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()), abs=1e-4)
    for name, each in learner.learned.items():
        largest = float(factors[name].grad.abs().max())
        assert largest > 1e-5
        assert torch.allclose(each.grad.double(), factors[name].grad, atol=1e-3 * largest), name


@pytest.mark.parametrize("weights", ["w8a16", "w4a16"])
def test_gradients_through_packed_weights(weights, learned, seen, tmp_path):
    """Those of the same model with its weights widened once; and no matrix is kept for them."""
    quantise(DEMO_MODEL_DIR, tmp_path / "q", QuantisePlan(weights=weights, image_side="keep"))
    settings = TuneSettings(batch_size=3, at_once=3, lora=2)
    found, kept = [], []
    for is_wide in (False, True):
        learner = Learner.load(tmp_path / "q", settings, **CPU)
        for adapter in learner.adapters.values():
            torch.nn.init.constant_(adapter.high, 0.02)
        with ExitStack() as stack:
            for linear in learner.language.modules():
                if isinstance(linear, Linear) and is_wide:
                    parts = {name: linear.get_parameter(name) for name in linear.part_names}
                    wide = linear.weight_format.unpack(parts)
                    stack.enter_context(linear.multiplying_by(wide))
            wide_shapes = {
                each.shape for each in learner.language.modules() if hasattr(each, "shape")
            }
            sizes = []
            keep = torch.autograd.graph.saved_tensors_hooks(
                lambda each, sizes=sizes: sizes.append(tuple(each.shape)) or each, lambda each: each
            )
            stack.enter_context(keep)
            loss, _ = Training(learner, learned.data, seen, settings).gradients(0)
        found.append((loss, {name: each.grad for name, each in learner.learned.items()}))
        kept.append(sum(tuple(size[::-1]) in wide_shapes for size in sizes))
    (loss, grads), (wide_loss, wide_grads) = found
    assert loss == pytest.approx(wide_loss, abs=1e-5)
    narrow = Learner.load(tmp_path / "q", settings, device=CPU["device"], dtype=torch.bfloat16)
    loss, _ = Training(narrow, learned.data, seen, settings).gradients(0)
    unlearned = Learner.load(tmp_path / "q", settings, **CPU)
    assert loss == pytest.approx(
        Training(unlearned, learned.data, seen, settings).gradients(0)[0], rel=0.02
    )
    for name, grad in grads.items():
        assert float(grad.abs().max()) > 0
        assert torch.allclose(grad, wide_grads[name], rtol=1e-4, atol=1e-6), name
    assert kept == [0, 6 * 7 + 1]


def test_the_qformer_learns_and_answers(learned, seen):
    """All of it, from what the tower sees; keys' biases alone, which no softmax feels, do not."""
    learner = Learner.load(DEMO_MODEL_DIR, TuneSettings(train="qformer"), **CPU)
    tower = picture_features(
        learned.data, DEMO_MODEL_DIR, "b", learned.out_dir, device=CPU["device"],
        before_qformer=True,
    )  # fmt: skip
    assert tower.shape == (8, 65, 160)
    with torch.no_grad():
        assert torch.allclose(learner.image_end.qformer(tower), seen, atol=1e-5)
    Training(learner, learned.data, tower, TuneSettings(train="qformer")).gradients(0)
    for name, each in learner.learned.items():
        assert name.endswith("key.bias") or float(each.grad.abs().max()) > 1e-5, name
    with MiniGPT4.load(adapter=learned.out_dir / "projection.safetensors", device="cpu") as model:
        weights = model.lab().weights
    changed = 0
    with safe_open(learned.out_dir / "projection.safetensors", "pt") as file:
        assert set(file.keys()) == set(learner.learned)
        for name in file.keys():  # noqa: SIM118
            assert torch.equal(weights[name], file.get_tensor(name))
            changed += not torch.equal(weights[name], learner.learned[name])
    assert changed > 0.8 * len(learner.learned)


def test_words_alone_are_learned_from_too(tmp_path):
    path = tmp_path / "words.jsonl"
    said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A blue ring."}]
    path.write_text(json.dumps({"messages": said}), "utf-8")
    with pytest.raises(ConfigError, match="With --lora this can be learned from"):
        read_data(path, DEMO_MODEL_DIR)
    data, steps = read_data(path, DEMO_MODEL_DIR, needs_pictures=False), []
    settings = TuneSettings(steps=4, batch_size=1, lr=1e-2, warmup_steps=1, lora=2)
    tune(DEMO_MODEL_DIR, data, tmp_path, settings, device="cpu", on_step=steps.append)
    assert steps[-1].loss < steps[0].loss - 0.1


def test_a_quantised_qformer_learns_in_floats(learned, tmp_path):
    """From what its integers stand for; and so it is loaded, over a tower that stays quantised."""
    quantise(DEMO_MODEL_DIR, tmp_path / "q", QuantisePlan(weights="w8a16"))
    settings = TuneSettings(steps=1, batch_size=2, warmup_steps=0, train="qformer")
    done = tune(tmp_path / "q", learned.data, tmp_path / "out", settings, device="cpu")
    found, own = load_file(done.adapter), map_tensors(read_folder_weights(DEMO_MODEL_DIR))
    for name, tensor in found.items():
        size = float(own[name].abs().max())
        assert float((tensor - own[name]).abs().max()) < 0.02 * size + 1e-4, name
    with MiniGPT4.load(tmp_path / "q", adapter=done.adapter, device="cpu") as model:
        weights = model.lab().weights
        assert all(torch.equal(weights[name], tensor) for name, tensor in found.items())
        assert weights["vision.vit.blocks.0.mlp_in.weight"].dtype == torch.int8


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"train": "vit"}, "train is 'vit'; it must be projection, qformer or none"),
        ({"train": "none"}, "nothing would learn"),
        ({"lora_targets": ("k_proj",)}, "lora_targets is given, and lora, the rank, is not"),
        ({"lora_alpha": 8.0}, "lora_alpha is given"),
        ({"train": "none", "lora": 1, "fresh": True}, "Leave one of both out"),
        ({"lora": -1}, "lora is -1"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_targets": ("q_proj", "query")}, "lora_targets is 'q_proj,query'; it must be"),
        ({"lora_targets": ("q_proj", "q_proj")}, "each once"),
        ({"lora_targets": ()}, "one or more of"),
    ],
)
def test_settings_that_cannot_be(change, seen):
    with pytest.raises(ConfigError, match=seen):
        TuneSettings(**change)


@pytest.mark.parametrize(
    ("rank", "targets", "seen"),
    [
        (129, ("q_proj",), "lora is 129, and q_proj of this model is 128×128: no change of it has"),
        (
            33,
            ("q_proj", "v_proj"),
            "and v_proj of this model is 32×128: .* rank above 32. Lower lora",
        ),
        (10**9, LORA_TARGETS, "lora is 1000000000, and q_proj"),
    ],
)
def test_a_rank_that_no_change_can_have(learned, golden_model_dir, tmp_path, rank, targets, seen):
    settings = TuneSettings(lora=rank, lora_targets=targets)
    with pytest.raises(ConfigError, match=seen):
        tune(golden_model_dir("llama2-gqa"), learned.data, tmp_path / "o", settings, device="cpu")
    assert not (tmp_path / "o").exists()


def test_models_that_cannot_learn_so(learned, golden_model_dir, tmp_path):
    for name, settings, seen in (
        ("llama2-gqa", TuneSettings(train="qformer"), "has none, as it groups patches"),
        ("kept", TuneSettings(lora=2), "keeps LoRA adapters beside its weights"),
    ):
        model_dir = golden_model_dir("llama2-gqa")
        if name == "kept":
            model_dir = tmp_path / "kept"
            model_dir.mkdir()
            for path in golden_model_dir("llama2-gqa").iterdir():
                (model_dir / path.name).write_bytes(path.read_bytes())
            config = json.loads((model_dir / "config.json").read_text("utf-8"))
            kept = {"alpha": 16.0, "ranks": {"layers.0.attention.query": 2}}
            config["text_config"]["adapters"] = kept
            (model_dir / "config.json").write_text(json.dumps(config), "utf-8")
        with pytest.raises(ConfigError, match=seen):
            tune(model_dir, learned.data, tmp_path / name, settings, device="cpu")
        assert not list((tmp_path / name).glob("features*"))
