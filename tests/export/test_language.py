"""The exported language model: published names, and the layouts of compressed-tensors.

Where compressed-tensors is installed (`pip install --no-deps compressed-tensors loguru psutil`), it
unpacks every weight itself; without it the documented layout is read here.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minigpt4_runtime.checkpoint.load import load_model
from minigpt4_runtime.convert.key_map import language_origins
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.export.language import export_language
from minigpt4_runtime.quantise.choice import QuantisePlan
from minigpt4_runtime.quantise.quantise import quantise

DEMO_DIR = Path(__file__).parents[2] / "src/minigpt4_runtime/assets/demo"
PLANS = [
    ("w8a16", None, True), ("w8a16", 32, False), ("w8a8", None, True), ("w4a16", 32, True),
    ("w4a16", 32, False), ("w4a8", 32, False),
]  # fmt: skip


@pytest.fixture(scope="module", params=PLANS, ids=str)
def exported(request, tmp_path_factory):
    """(model folder, exported folder)."""
    name, group_size, is_symmetric = request.param
    plan = QuantisePlan(weights=name, group_size=group_size, is_symmetric=is_symmetric)
    above = tmp_path_factory.mktemp("exported")
    quantise(DEMO_DIR, above / "model", plan)
    export_language(above / "model", above / "language")
    return above / "model", above / "language"


def unpacked(packed, bits, shape):
    """Numbers of `bits` bits from the lowest bits of each word up, as documented."""
    per_word = 32 // bits
    words = packed.long() & 0xFFFFFFFF
    numbers = [(words >> bits * place) & (2**bits - 1) for place in range(per_word)]
    return torch.stack(numbers, -1).flatten(1)[:, : shape[1]] - 2 ** (bits - 1)


def documented_weight(parts, settings):
    """The float matrix that a module's tensors stand for."""
    bits = settings["num_bits"]
    scale, zero = parts["weight_scale"].float(), parts.get("weight_zero_point")
    if "weight_packed" in parts:
        shape = parts["weight_shape"].tolist()
        integers = unpacked(parts["weight_packed"], bits, shape)
        if zero is not None:
            zero = unpacked(zero.T, bits, [0, shape[0]]).T
    else:
        integers = parts["weight"]
    groups = integers.float().view(*scale.shape, -1)
    offset = 0 if zero is None else zero.float()[..., None]
    return ((groups - offset) * scale[..., None]).flatten(1)


def modules_of(folder):
    """The tensors of each module that the exported folder holds."""
    modules = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        owner, _, part = name.rpartition(".")
        modules.setdefault(owner, {})[part] = tensor
    return modules


def test_every_layer_unpacks_to_our_weight(exported):
    model_dir, folder = exported
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = settings["config_groups"].values()
    assert (settings["quant_method"], settings["ignore"]) == ("compressed-tensors", ["lm_head"])
    modules = modules_of(folder)
    model = load_model(model_dir, device=torch.device("cpu"), dtype=torch.float32)
    origins = language_origins(model.config.language)
    assert len(origins) == len(modules)
    for name, origin in origins.items():
        owner = origin.names[0].removesuffix(".weight")
        ours = model.get_submodule(name.removesuffix(".weight"))
        if not owner.endswith("_proj"):
            wanted = (
                ours.weight_format.unpack(dict(ours.named_parameters()))
                if owner == "lm_head"
                else ours.weight
            )
            torch.testing.assert_close(
                modules[owner]["weight"], wanted.half(), rtol=1e-3, atol=1e-6
            )
            continue
        wanted = ours.weight_format.unpack(dict(ours.named_parameters()))
        found = documented_weight(modules[owner], group["weights"])
        assert torch.equal(found, wanted)
        layout = "pack-quantized" if group["input_activations"] is None else "int-quantized"
        assert group["format"] == settings["format"] == layout
        assert ("weight_packed" in modules[owner]) == (layout == "pack-quantized")


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None
    or importlib.util.find_spec("loguru") is None,
    reason="compressed-tensors is not installed",
)
def test_compressed_tensors_unpacks_it_itself(exported):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model_dir, folder = exported
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = next(iter(QuantizationConfig(**settings).config_groups.values()))
    compressor = BaseCompressor.get_value_from_registry(settings["format"])
    model = load_model(model_dir, device=torch.device("cpu"), dtype=torch.float32)
    modules = modules_of(folder)
    seen = 0
    for name, origin in language_origins(model.config.language).items():
        owner = origin.names[0].removesuffix(".weight")
        if owner.endswith("_proj"):
            ours = model.get_submodule(name.removesuffix(".weight"))
            wanted = ours.weight_format.unpack(dict(ours.named_parameters()))
            found = compressor.decompress(modules[owner], scheme)["weight"]
            torch.testing.assert_close(found.float(), wanted, rtol=2e-3, atol=1e-6)
            seen += 1
    assert seen == 7 * model.config.language.num_hidden_layers


def test_a_model_of_floats_is_exported_as_it_is(tmp_path):
    export_language(DEMO_DIR, tmp_path / "language")
    settings = json.loads((tmp_path / "language" / "config.json").read_text())
    assert "quantization_config" not in settings
    assert (settings["architectures"], settings["model_type"]) == (["LlamaForCausalLM"], "llama")
    found, ours = (
        load_file(tmp_path / "language" / "model.safetensors"),
        load_file(DEMO_DIR / "model.safetensors"),
    )
    for name, tensor in ours.items():
        if name.startswith("language.layers.3.attention.query"):
            assert torch.equal(found["model.layers.3.self_attn.q_proj.weight"], tensor)
    with pytest.raises(CheckpointError, match=r"is a language model folder already"):
        export_language(DEMO_DIR, tmp_path / "language")
    export_language(DEMO_DIR, tmp_path / "language", force=True)
    assert [each.name for each in tmp_path.iterdir()] == ["language"]
