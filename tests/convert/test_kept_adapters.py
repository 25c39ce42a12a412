"""LoRA kept beside the weights: the merged model's numbers, in each form, or one clear sentence."""

import json

import pytest
import torch
from published_files import GOLDENS, copy_golden, edit
from safetensors.torch import load_file

from minigpt4_runtime import MiniGPT4, SamplingParams
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.load import load_model
from minigpt4_runtime.config import LanguageConfig
from minigpt4_runtime.convert.convert import convert
from minigpt4_runtime.errors import CheckpointError, ConfigError
from minigpt4_runtime.export.language import export_language
from minigpt4_runtime.model.causal import causal_attention
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.quantise.choice import QuantisePlan
from minigpt4_runtime.quantise.quantise import quantise

OWNER = "llama_model.base_model.model.model.layers.{}"
PICTURE = GOLDENS / "minigptv2/images/photo_rgb.jpg"
SAMPLING = SamplingParams(max_new_tokens=12)
# Beside those of queries and values in all three layers: sums over ranks, and another rank.
OTHERS = {("0", "self_attn.o_proj"): (64, 64, 3), ("1", "mlp.down_proj"): (160, 64, 5),
          ("1", "mlp.up_proj"): (64, 160, 8)}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The golden checkpoint, with adapters of more weights."""
    torch.manual_seed(6)
    files = copy_golden("minigptv2", tmp_path_factory.mktemp("published") / "files")
    added = {}
    for (layer, name), (inputs, outputs, rank) in OTHERS.items():
        owner = f"{OWNER.format(layer)}.{name}"
        added[f"{owner}.lora_A.weight"] = 0.1 * torch.randn(rank, inputs)
        added[f"{owner}.lora_B.weight"] = 0.1 * torch.randn(outputs, rank)
    edit(files.projection, lambda tensors: tensors.update(added))
    return files


@pytest.fixture(scope="module")
def folders(files, tmp_path_factory):
    """The model folders: merged, and kept apart."""
    made = tmp_path_factory.mktemp("made")
    convert(files, made / "merged", verify=True)
    convert(files, made / "kept", verify=True, keep_lora=True)
    return made / "merged", made / "kept"


@pytest.fixture(scope="module")
def answer(folders):
    """The merged model's answer."""
    with MiniGPT4.load(folders[0], device="cpu", dtype="float32") as model:
        return describe(model)


def describe(model):
    return model.describe(PICTURE, sampling=SAMPLING, task="caption").token_ids


def logits(folder, **changes):
    where = {"device": torch.device("cpu"), "dtype": torch.float32} | changes
    language = load_model(folder, **where).language
    ids = torch.arange(3, 40)
    rows = language(language.embed(ids), torch.arange(len(ids)), causal_attention())
    return language.logits(rows)


def test_the_folder_holds_the_weights_as_published_and_the_factors(files, folders):
    merged, kept = map(load_file, (folder / "model.safetensors" for folder in folders))
    added = kept.keys() - merged.keys()
    assert len(added) == 2 * (6 + len(OTHERS))
    assert kept["language.layers.1.mlp_down.adapter.low"].shape == (5, 160)
    assert kept["language.layers.1.mlp_down.adapter.high"].shape == (64, 5)
    adapters = load_config(folders[1]).language.adapters
    assert adapters.alpha == 16
    assert dict(adapters.ranks)["layers.0.attention.out"] == 3
    # A change of low rank is what tells the two apart.
    for name, rank in adapters.ranks:
        weight, low, high = (kept[f"language.{name}.{part}"].double() for part in
                             ("weight", "adapter.low", "adapter.high"))  # fmt: skip
        change = merged[f"language.{name}.weight"].double() - weight
        assert torch.allclose(change, high @ low * 16 / rank, atol=1e-4)
        assert change.abs().max() > 1e-3


def test_it_computes_what_the_merged_model_computes(folders, answer):
    merged, kept = map(logits, folders)
    assert (merged - kept).abs().max() <= 1e-5 * merged.abs().max()
    with MiniGPT4.load(folders[1], device="cpu", dtype="float32") as model:
        assert describe(model) == answer


def test_two_ranks_compute_the_same(folders, answer):
    with MiniGPT4.load(folders[1], device="cpu", dtype="float32", tensor_parallel=2) as model:
        assert describe(model) == answer


@pytest.mark.parametrize("weights", ["w8a16", "w4a16"])
def test_rounded_weights_with_exact_adapters(folders, tmp_path, weights):
    """The factors stay floats, so it is nearer than a rounded merge, or as near."""
    exact = logits(folders[0])
    for folder, name in zip(folders, ("merged", "kept"), strict=True):
        quantise(folder, tmp_path / name, QuantisePlan(weights=weights))
    far, near = ((logits(tmp_path / name) - exact).norm() for name in ("merged", "kept"))
    assert 0 < near < 1.5 * far
    with MiniGPT4.load(tmp_path / "kept", device="cpu", dtype="float32") as model:
        assert describe(model)


def test_what_cannot_go_with_it(files, folders, llama2, tmp_path):
    with pytest.raises(CheckpointError, match="keeps LoRA adapters beside its weights"):
        export_language(folders[1], tmp_path / "out")
    with pytest.raises(ConfigError, match="--calibrate would not see"):
        quantise(
            folders[1], tmp_path / "out", QuantisePlan(weights="w4a16"), calibrate=PICTURE.parent
        )
    with pytest.raises(ConfigError, match="Leave one of the three out"):
        convert(files, tmp_path / "out", keep_lora=True, verify=True, dtype="float16")
    with pytest.raises(CheckpointError, match=r"has no LoRA adapters\. Leave it out"):
        convert(llama2, tmp_path / "out", keep_lora=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ranks": {"layers.9.attention.query": 4}}, "adapter for 'layers.9.attention.query'"),
        ({"ranks": {"layers.0.attention.query": 0}}, "rank of the adapter .* is 0"),
        ({"ranks": ["layers.0"]}, "alpha and ranks by names are wanted"),
        ({"alpha": 0}, "adapters.alpha is 0; it must be above 0"),
        ({"beta": 1}, "adapters has no setting 'beta'"),
    ],
)
def test_a_config_that_says_something_else(folders, tmp_path, change, said):
    values = json.loads((folders[1] / "config.json").read_text())["text_config"]
    adapters = values["adapters"] | change
    with pytest.raises(ConfigError, match=said):
        Llama(LanguageConfig.from_mapping({**values, "adapters": adapters}))
    assert LanguageConfig.from_mapping(values).to_mapping() == values
