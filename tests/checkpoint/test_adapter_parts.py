"""LoRA in PEFT's folders: over a model, merged into one, or refused in one clear sentence."""

import json
import re
import shutil

import pytest
import torch
from adapter_folders import merge_by_hand, write_lora, write_projection
from published_files import copy_golden
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minigpt4_runtime import MiniGPT4
from minigpt4_runtime.checkpoint.adapters import AdapterParts
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.graph_folder import vision_digest
from minigpt4_runtime.checkpoint.load import load_language, load_model
from minigpt4_runtime.checkpoint.manifest import read_manifest
from minigpt4_runtime.checkpoint.merge import merge
from minigpt4_runtime.convert.convert import convert
from minigpt4_runtime.errors import CheckpointError, ConfigError
from minigpt4_runtime.export.original import export_original
from minigpt4_runtime.model.causal import causal_attention
from minigpt4_runtime.quantise.choice import QuantisePlan
from minigpt4_runtime.quantise.quantise import quantise

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def base(golden_model_dir):
    """A model whose keys have fewer heads than its queries. Do not change it."""
    return golden_model_dir("llama2-gqa")


@pytest.fixture(scope="module")
def language(base):
    return load_config(base).language


@pytest.fixture(scope="module")
def made(base, language, tmp_path_factory):
    """A folder with LoRA of every matrix and a projection, and its factors."""
    folder = tmp_path_factory.mktemp("adapters") / "mine"
    record = {"base": vision_digest(base), "model": "gqa"}
    tensors = write_lora(folder, language, seed=1, record=record)
    write_projection(folder / "projection.safetensors", base, seed=2)
    return folder, tensors


def logits(model):
    ids = torch.arange(3, 40)
    language = model.language
    rows = language(language.embed(ids), torch.arange(len(ids)), causal_attention())
    return language.logits(rows)


def by_hand(base, tensors, *, scale=2.0):
    """The model with its weights changed in this test: alpha 6 over rank 3 is 2."""
    model = load_model(base, **CPU)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    merge_by_hand(tensors, weights, scale=scale)
    model.load_state_dict(weights)
    return model


def test_it_computes_what_the_changed_weights_compute(base, made):
    folder, tensors = made
    expected = logits(by_hand(base, tensors))
    model = load_model(base, adapter=folder, **CPU)
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (logits(load_model(base, **CPU)) - expected).abs().max() > 0.05 * expected.abs().max()
    projection = load_file(folder / "projection.safetensors")["vision.projection.weight"]
    assert torch.equal(model.vision.projection.weight, projection)


class SecondOfTwo:
    """A group as its second rank sees it."""

    rank, size = 1, 2


def test_a_rank_holds_its_part_of_the_factors(base, made):
    whole = load_model(base, adapter=made[0], **CPU).language
    part = load_language(base, adapter=made[0], group=SecondOfTwo(), **CPU)
    for name, divided in (("attention.value", "high"), ("mlp_down", "low")):
        full, half = (
            each.layers[0].get_submodule(name).adapter.state_dict() for each in (whole, part)
        )
        other = {"high": "low", "low": "high"}[divided]
        assert torch.equal(half[other], full[other])
        assert torch.equal(half[divided], full[divided].chunk(2, {"high": 0, "low": 1}[divided])[1])


def test_a_merge_rounds_each_weight_once(base, made, tmp_path):
    folder, tensors = made
    merge(base, folder, tmp_path / "out")
    weights = load_file(base / "model.safetensors")
    merge_by_hand(tensors, weights, scale=2.0)
    weights |= load_file(folder / "projection.safetensors")
    merged = load_file(tmp_path / "out/model.safetensors")
    assert merged.keys() == weights.keys()
    for name, weight in weights.items():
        assert merged[name].dtype == weight.dtype, name
        # Another order of the sum of three products may round the other way.
        assert torch.allclose(merged[name].float(), weight.float(), rtol=2**-9, atol=1e-6), name
    assert load_config(tmp_path / "out").language.adapters is None
    roles = [each.role for each in read_manifest(tmp_path / "out").sources]
    assert roles[-3:] == ["projection", "lora", "lora_config"]


def test_a_sum_that_its_dtype_cannot_hold(tmp_path):
    """It is no damage of a file, which would be told to be downloaded again."""
    files = copy_golden("llama2", tmp_path / "files")
    convert(files, tmp_path / "model", dtype="float16")
    language = load_config(tmp_path / "model").language
    write_lora(tmp_path / "large", language, seed=1, size=3e4)
    with pytest.raises(
        CheckpointError, match=r"query\.weight .*holds .*e\+\d\d, which float16 cannot"
    ):
        merge(tmp_path / "model", tmp_path / "large", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lora_of_integers_stays_beside_them(base, made, tmp_path):
    folder, _ = made
    plan = QuantisePlan(weights="w8a16", head="keep", image_side="keep")
    quantise(base, tmp_path / "w8a16", plan)
    merge(tmp_path / "w8a16", folder, tmp_path / "out")
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("w8a16", "out"))
    names = [name for name in before if name.startswith("language.")]
    assert all(torch.equal(before[name], after[name]) for name in names)
    merged, beside = (
        logits(load_model(*given, **CPU)) for given in ((tmp_path / "out",), (tmp_path / "w8a16",))
    )
    laid_over = logits(load_model(tmp_path / "w8a16", adapter=folder, **CPU))
    assert torch.equal(merged, laid_over)
    assert not torch.allclose(merged, beside, rtol=0.1)


def test_other_forms_of_peft(base, language, tmp_path):
    """Ranks by pattern, α by the root of the rank, and a Llama without its head."""
    named = {"r": 8, "rank_pattern": {".*": 4}, "init_lora_weights": "gaussian"}
    tensors = write_lora(tmp_path / "rs", language, seed=3, rank=4, use_rslora=True, **named)
    bare = {name.replace("model.model.", "model."): each for name, each in tensors.items()}
    save_file(bare, tmp_path / "rs/adapter_model.safetensors")
    expected = logits(by_hand(base, tensors, scale=6 / 4**0.5))
    found = logits(load_model(base, adapter=tmp_path / "rs", **CPU))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, 'has peft_type "IA3"; only LORA'),
        ({"use_dora": True}, "has use_dora true, which cannot be used"),
        ({"alpha_pattern": {"q_proj": 3}}, "has alpha_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, 'init_lora_weights "pissa_niter_4": its factors'),
        ({"init_lora_weights": "olora"}, 'init_lora_weights "olora": its factors belong'),
        ({"bias": "all"}, 'has bias "all"; only none'),
        ({"r": 8}, r"has r 8, and the factors in adapter_model.safetensors have \[3\]. Give two"),
        ({"rank": 0}, "holds no LoRA factor"),
    ],
)
def test_settings_that_are_refused(base, language, tmp_path, settings, message):
    if settings.pop("rank", None) == 0:
        write_lora(tmp_path / "a", language, seed=0, targets=())
    else:
        write_lora(tmp_path / "a", language, seed=0, **settings)
    with pytest.raises(CheckpointError, match=message):
        load_model(base, adapter=tmp_path / "a", **CPU)


@pytest.mark.parametrize(
    ("number", "seen"),
    [(True, "true"), (None, "null"), ("16", '"16"'), ([16], "[16]"), (0, "0"), (-16, "-16"),
     (1e-300, "1e-300"), (float("nan"), "NaN"), (float("inf"), "Infinity"), (1e300, "1e+300"),
     (10**400, "1" + 79 * "0")],
)  # fmt: skip
def test_numbers_that_are_refused(base, language, tmp_path, number, seen):
    for name, wanted in (("lora_alpha", "a number above 0 and at"), ("r", "a whole number from 1")):
        write_lora(tmp_path / name, language, seed=0, **{name: number})
        said = re.escape(f"adapter_config.json has {name} {seen}; it must be {wanted}")
        with pytest.raises(CheckpointError, match=said):
            load_model(base, adapter=tmp_path / name, **CPU)


def test_a_number_too_long_to_be_read(base, language, tmp_path):
    write_lora(tmp_path / "a", language, seed=0)
    path = tmp_path / "a/adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 6.0', f'"lora_alpha": {"9" * 5000}'))
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        load_model(base, adapter=tmp_path / "a", **CPU)


def without(tensors, part):
    return {name: each for name, each in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "layers.0.mlp.up_proj.lora_B"), "only one of two LoRA factors"),
        (lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.ones(2)}, "lm_head"),
        (lambda t: {n.replace("layers.0.", "layers.9."): e for n, e in t.items()},
         "changes layer 9 of a language model, and this one has"),
        (lambda t: {n: e[:, :-1].contiguous() if "q_proj.lora_A" in n else e for n, e in t.items()},
         "the weight is .* Give the model that the adapter was made for"),
        (lambda t: {n: e.to(torch.int8) for n, e in t.items()}, "is of dtype I8"),
    ],
)  # fmt: skip
def test_factors_that_are_refused(base, made, tmp_path, change, message):
    folder = shutil.copytree(made[0], tmp_path / "a")
    save_file(change(made[1]), folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_model(base, adapter=folder, **CPU)


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    ("part", "name"),
    [("projection.safetensors", "vision.projection.bias"),
     ("adapter_model.safetensors", "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight")],
)  # fmt: skip
def test_numbers_that_are_not_finite(base, made, tmp_path, part, name, number):
    """Whoever opens it says so: it would spoil every answer, and be written into a folder."""
    folder = shutil.copytree(made[0], tmp_path / "a")
    path = folder / part
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = number
    save_file(tensors, path, metadata)
    given = (path if part.startswith("projection") else folder), folder
    message = f"{re.escape(str(path))}: {re.escape(name)} holds NaN or an infinite value"
    for adapter in given:
        for use in (
            lambda adapter: load_model(base, adapter=adapter, **CPU),
            lambda adapter: MiniGPT4.load(base, adapters={"broken": adapter}, device="cpu"),
            lambda adapter: merge(base, adapter, tmp_path / "out"),
            lambda adapter: export_original(adapter, base, tmp_path / "out"),
        ):
            with pytest.raises(CheckpointError, match=message):
                use(adapter)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_refused(base, made, language, golden_model_dir, tmp_path):
    with pytest.raises(CheckpointError, match="a folder without adapter_config"):
        AdapterParts.find(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(CheckpointError, match="has no adapter_model"):
        load_model(base, adapter=tmp_path / "a", **CPU)
    write_lora(tmp_path / "b", language, seed=0, record={"base": "0" * 64, "model": "other"})
    with pytest.raises(CheckpointError, match="tuned over the image side of other"):
        load_model(base, adapter=tmp_path / "b", **CPU)
    with pytest.raises(CheckpointError, match="Give the model that the adapter was made for"):
        load_model(golden_model_dir("vicuna"), adapter=made[0], **CPU)
    # LoRA beside LoRA that the folder keeps: here what a merge over integers makes.
    kept = tmp_path / "kept"
    quantise(base, tmp_path / "w8", QuantisePlan(weights="w8a16", image_side="keep"))
    write_lora(tmp_path / "c", language, seed=0)
    merge(tmp_path / "w8", tmp_path / "c", kept)
    with pytest.raises(ConfigError, match="keeps LoRA adapters beside its weights already"):
        load_model(kept, adapter=tmp_path / "c", **CPU)
