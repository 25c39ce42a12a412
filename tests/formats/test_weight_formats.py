"""The contract of a weight format, held by every row of the table on fresh shapes.

Formats that are no part of the package stand in rows of their own here: what they pass through
(packing, a folder, loading, the cut for ranks, a Linear) asks the format and knows none by name.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional

from minigpt4_runtime.cache.sizes import token_bytes
from minigpt4_runtime.checkpoint.blank_model import blank_model, dtype_of, list_weights
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.folder import write_folder
from minigpt4_runtime.checkpoint.load import load_language, load_model
from minigpt4_runtime.checkpoint.manifest import read_manifest
from minigpt4_runtime.checkpoint.random_weights import fill_at_random
from minigpt4_runtime.checkpoint.report import inspect_folder
from minigpt4_runtime.checkpoint.sizes import running_bytes, weight_bytes
from minigpt4_runtime.checkpoint.weight_source import WeightSource
from minigpt4_runtime.config import LanguageConfig, ModelConfig, QFormerConfig, VisionConfig
from minigpt4_runtime.errors import CheckpointError, ConfigError
from minigpt4_runtime.formats.contracts import InOrder, Part
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.formats.registry import WEIGHT_FORMATS, format_of, weight_format
from minigpt4_runtime.kernels.registry import linear_kernel
from minigpt4_runtime.model.linear import Linear, settle
from minigpt4_runtime.model.parallel import Solo, split_dimension
from minigpt4_runtime.presets import PRESETS
from minigpt4_runtime.vision.torch import TorchVisionEncoder

CPU = torch.device("cpu")
DEMO_DIR = Path(__file__).parents[2] / "src/minigpt4_runtime/assets/demo"
GROUP = 8


class Int8Rows:
    """Whole numbers of 8 bits, and a scale for each row."""

    name = family = "int8-rows"
    numbers_per_item: ClassVar = {"scale": 0}

    def parts(self, out_features, in_features):
        scale = Part((out_features,), "float32", split=(0, None))
        return {"weight": Part((out_features, in_features), "int8"), "scale": scale}

    def pack(self, weight):
        scale = weight.float().abs().amax(dim=1).clamp(min=1e-9) / 127
        whole = (weight.float() / scale[:, None]).round().to(torch.int8)
        return {"weight": whole, "scale": scale}

    def unpack(self, parts):
        return parts["weight"].float() * parts["scale"][:, None]

    def multiply(self, rows, parts, bias):
        product = functional.linear(rows.float(), parts["weight"].float()) * parts["scale"]
        return (product if bias is None else product + bias.float()).to(rows.dtype)


class Int4Groups:
    """4 bits, two to a byte, with a scale and a least value for each GROUP inputs of a row."""

    name = family = "int4-groups"
    numbers_per_item: ClassVar = {"packed": 2, "scale": 0, "least": 0}

    def parts(self, out_features, in_features):
        if in_features % GROUP:
            raise ConfigError(f"{in_features} inputs do not divide into groups of {GROUP}.")
        group = Part((out_features, in_features // GROUP))
        packed = Part((out_features, in_features // 2), "uint8")
        return {"packed": packed, "scale": group, "least": group}

    def pack(self, weight):
        groups = weight.float().unflatten(1, (-1, GROUP))
        least = groups.amin(-1).to(weight.dtype)
        scale = ((groups.amax(-1) - least).clamp(min=1e-3) / 15).to(weight.dtype)
        whole = (groups - least.float()[..., None]) / scale.float()[..., None]
        whole = whole.round().clamp(0, 15).to(torch.uint8).flatten(1)
        return {"packed": whole[:, ::2] | whole[:, 1::2] << 4, "scale": scale, "least": least}

    def unpack(self, parts):
        packed = parts["packed"]
        whole = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).unflatten(1, (-1, GROUP))
        scale, least = (parts[name].float()[..., None] for name in ("scale", "least"))
        return (whole * scale + least).flatten(1)

    def multiply(self, rows, parts, bias):
        return DENSE.multiply_wide(rows, self.unpack(parts), bias)


class Adapted:
    """Floats, and a product of two narrow matrices that is added to them."""

    name = family = "adapted"
    numbers_per_item: ClassVar = {"down": 0, "up": 0}

    def parts(self, out_features, in_features):
        down = Part((2, in_features), split=(None, 1))
        up = Part((out_features, 2), split=(0, None))
        return {**DENSE.parts(out_features, in_features), "down": down, "up": up}

    def pack(self, weight):
        up, down = weight[:, :2].contiguous(), weight.new_full((2, weight.shape[1]), 0.125)
        return {"weight": weight - up @ down, "down": down, "up": up}

    def unpack(self, parts):
        return parts["weight"].float() + parts["up"].float() @ parts["down"].float()

    def multiply(self, rows, parts, bias):
        added = DENSE.multiply_wide(rows.float(), parts["down"], None)
        added = DENSE.multiply_wide(added, parts["up"], None)
        return (DENSE.multiply(rows.float(), parts, bias) + added).to(rows.dtype)


INT8_ROWS, INT4_GROUPS, ADAPTED = TOYS = Int8Rows(), Int4Groups(), Adapted()
NAMES = [*WEIGHT_FORMATS, *(toy.name for toy in TOYS)]
# As parts of the largest number of the weight: half a step of whole numbers, and its rounding.
TOLERANCES = {
    "float": 0, "int8-rows": 0.6 / 127, "int4-groups": 1.2 / 15, "adapted": 0.01,
    # Clipped, the largest number alone is further off, and its square counts.
    "w8a16": 0.03, "w8a8": 0.03, "w4a16": 0.45, "w4a8": 0.45,
    # Half of the numbers are taken for zero.
    "w8a16-sparse24": 1, "w8a8-sparse24": 1,
    # Three bits behind the first, of the numbers and of what they multiply.
    "w8a8-fp8": 0.07,
}  # fmt: skip
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module", autouse=True)
def rows_of_their_own():
    with pytest.MonkeyPatch.context() as patch:
        for toy in ("INT8_ROWS", "INT4_GROUPS", "ADAPTED"):
            patch.setitem(WEIGHT_FORMATS, globals()[toy].name, f"{__name__}:{toy}")
        yield


def tolerance(name):
    return TOLERANCES[weight_format(name).family]


def steps_of(name):
    """What the outputs and the inputs of a weight in this format are multiples of."""
    out_step = 8 if name.startswith("w4") and name.endswith("-asymmetric") else 1
    return out_step, getattr(weight_format(name), "group_size", None) or GROUP


def assert_near(found, truth, share):
    assert found.shape == truth.shape
    assert float((found.float() - truth).abs().max()) <= share * float(truth.abs().max())


def assert_product(found, rows, weight, bias, share):
    """That a product is as near as may be where each number of the weight is off by `share`."""
    truth = functional.linear(rows.float(), weight, bias.float() if bias is not None else None)
    assert found.shape == truth.shape
    largest = rows.float().abs().sum(-1).max() * weight.abs().max() + truth.abs().max()
    assert float((found.float() - truth).abs().max()) <= share * float(largest)


# --- a weight ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_what_is_packed_multiplies_like_the_floats(name, data):
    chosen = weight_format(name)
    out_step, in_step = steps_of(name)
    num_out = out_step * data.draw(st.integers(1, 40 // out_step))
    num_in = in_step * data.draw(st.integers(1, 96 // in_step or 2))
    dtype = data.draw(st.sampled_from(list(ROUNDING)))
    rows_dtype = data.draw(st.sampled_from([torch.float32, dtype]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    weight = torch.randn(num_out, num_in).to(dtype)
    bias = torch.randn(num_out).to(dtype) if data.draw(st.booleans()) else None
    rows = torch.randn(data.draw(st.integers(1, 9)), 2, num_in).to(rows_dtype)
    parts = chosen.parts(num_out, num_in)
    packed = chosen.pack(weight)
    assert list(packed) == list(parts)
    for part_name, part in parts.items():
        assert part_name != "bias"
        assert tuple(packed[part_name].shape) == part.shape
        assert packed[part_name].dtype == dtype_of(part, dtype)
    share = tolerance(name) + ROUNDING[rows_dtype]
    assert_near(chosen.unpack(packed).float(), weight.float(), share)
    product = chosen.multiply(rows, packed, bias)
    assert product.dtype == rows_dtype
    assert_product(product, rows, weight.float(), bias, share)
    # So does whatever is chosen in its place, on either route.
    for widen_from in (None, 8):
        kernel, held = linear_kernel(chosen, device=CPU, widen_from=widen_from), packed
        if isinstance(kernel, InOrder):
            held, kernel = kernel.arrange(packed)
        assert_product(kernel(rows, held, bias), rows, weight.float(), bias, share)


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_of_a_weight_are_counted_in_its_parts(name):
    chosen = weight_format(name)
    per_item = chosen.numbers_per_item
    parts = chosen.parts(8, 5 * 128)
    assert per_item.keys() <= parts.keys()
    sizes = {part: torch.Size(each.shape).numel() for part, each in parts.items()}
    assert sum(per_item.get(part, 1) * size for part, size in sizes.items()) == 8 * 5 * 128


# --- a model -------------------------------------------------------------------------------------


def tiny_config(seed):
    """Fresh widths that 1, 2 and 4 ranks divide, but for the ids."""
    draw = torch.Generator().manual_seed(seed)
    steps = [int(n) for n in torch.randint(1, 4, (5,), generator=draw)]
    hidden = 128 * steps[0]
    return ModelConfig(
        vision=VisionConfig(
            image_size=16, patch_size=8, hidden_size=32 * steps[1], num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=32,
        ),
        qformer=QFormerConfig(
            hidden_size=32 * steps[2], num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, num_query_tokens=3, cross_attention_frequency=2,
        ),
        language=LanguageConfig(
            hidden_size=hidden, intermediate_size=128 * steps[3], num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, vocab_size=68 + steps[4],
            max_position_embeddings=64, rms_norm_eps=1e-6,
        ),
        template="vicuna",
    )  # fmt: skip


class OneOf(Solo):
    def __init__(self, rank, size):
        self.rank, self.size = rank, size


# Of formats that differ in the size of groups alone, one.
CHOICES = [
    *(name for name in NAMES if "-g64" not in name and "-g128" not in name and "-asym" not in name),
    "w8a16-asymmetric",
    {"language.layers": "int8-rows", "language.layers.1.mlp_down": "int4-groups"},
    {"language.layers": "w4a8-g32-asymmetric", "language.head": "w8a8"},
]


@pytest.fixture(scope="module", params=CHOICES, ids=str)
def written(request, tmp_path_factory):
    """(choice, config, the floats, a folder of float16 that holds them in these formats)."""
    seed = CHOICES.index(request.param)
    config = tiny_config(seed)
    source = WeightSource(config, seed=seed)
    floats = source.load_model(device=CPU, dtype=torch.float16).state_dict()
    out_dir = tmp_path_factory.mktemp("written") / "model"
    tokenizer = DEMO_DIR / "tokenizer.model"
    write_folder(out_dir, config, floats, tokenizer, formats=request.param)
    return request.param, config, floats, out_dir


def linears(module):
    return {n: part for n, part in module.named_modules() if isinstance(part, Linear)}


def test_a_folder_says_its_formats_and_every_byte_is_counted(written, monkeypatch):
    choice, config, floats, folder = written
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["weight_format"] == read_manifest(folder).weight_format == choice
    stored = load_file(folder / "model.safetensors")
    model = load_model(folder, device=CPU, dtype=torch.float16)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(tensor, stored[name]), name
    num_bytes = sum(tensor.nbytes for tensor in model.parameters())
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert (folder / "model.safetensors").stat().st_size == 8 + header + num_bytes
    report = inspect_folder(folder)
    assert report.num_bytes == num_bytes
    assert report.num_parameters == sum(weight.numel() for weight in floats.values())
    assert set(report.dtypes) == {str(t.dtype).removeprefix("torch.") for t in stored.values()}
    monkeypatch.setitem(PRESETS, "tiny", config)
    assert weight_bytes("tiny", "float16", choice) == num_bytes
    kept = running_bytes("tiny", "float16", choice) - num_bytes
    assert kept == 64 * token_bytes(config.language, "float16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_linear_of_a_loaded_model_multiplies_by_its_weight(written, dtype):
    choice, _, floats, folder = written
    used = []

    def kernel_of(chosen):
        used.append(chosen.name)
        return chosen.multiply

    model = load_model(folder, device=CPU, dtype=dtype, kernel_of=kernel_of)
    assert len(used) == len(linears(model))
    for (name, linear), used_name in zip(linears(model).items(), used, strict=True):
        assert linear.weight_format.name == used_name == format_of(choice, name).name
        weight = floats[f"{name}.weight"].float()
        rows, bias = torch.randn(3, weight.shape[1]), floats.get(f"{name}.bias")
        assert_product(linear(rows), rows, weight, bias, tolerance(used_name) + 1e-5)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        rows = model.vision(pixels.to(dtype))
    assert rows.dtype == dtype
    # The image side may compute wider than its floats; parts of weights stay as they are.
    before = {name: p.dtype for name, p in model.vision.named_parameters()}
    wide = TorchVisionEncoder(model.vision, in_float32=True).encode(pixels)
    assert wide.dtype == dtype
    # A step of an 8-bit float is large: where rounding decides, rows part by several of them.
    assert_near(rows, wide.float(), 0.15 if choice == "w8a8-fp8" else 20 * ROUNDING[dtype])
    parts = {f"{n}.{p}" for n, each in linears(model.vision).items() for p in each.part_names}
    for name, parameter in model.vision.named_parameters():
        assert parameter.dtype == (before[name] if name in parts else torch.float32), name


def test_a_kernel_gets_the_loaded_parts_in_its_own_order(written):
    """Here: flipped, and doubled, which no product with the parts as they are stored would show."""
    choice, _, floats, folder = written

    def kernel_of(chosen):
        def arrange(parts):
            def multiply(rows, flipped, bias):
                held = {name: part.flip(0) for name, part in flipped.items()}
                return 2 * chosen.multiply(rows, held, bias)

            return {name: part.flip(0) for name, part in parts.items()}, multiply

        return chosen.multiply if chosen is DENSE else InOrder(arrange)

    where = {"device": CPU, "dtype": torch.float32, "kernel_of": kernel_of}
    loaded = load_model(folder, **where)
    blank = blank_model(load_config(folder), None, choice, kernel_of)
    drawn = linears(fill_at_random(blank, **where))
    for name, linear in linears(loaded).items():
        assert linear.wanted_order is None
        assert not any(part.requires_grad for part in linear.parameters())
        weight = floats[f"{name}.weight"].float()
        rows, bias = torch.randn(3, weight.shape[1]), floats.get(f"{name}.bias")
        factor = 1 if linear.weight_format is DENSE else 2
        share = tolerance(linear.weight_format.name) + 1e-5
        assert_product(linear(rows) / factor, rows, weight, bias, share)
        assert drawn[name](rows).isfinite().all()
        assert drawn[name].wanted_order is None


def test_a_linear_multiplies_before_it_is_settled_too():
    linear = Linear(8, 4, bias=False)
    linear.use(DENSE, InOrder(lambda parts: (dict(parts), lambda rows, *_: rows * 0)))
    linear.requires_grad_(False)
    rows = torch.randn(2, 8)
    assert torch.equal(linear(rows), rows @ linear.weight.T)
    settle(linear)
    assert torch.equal(linear(rows), torch.zeros(2, 8))


def test_the_parts_of_ranks_make_up_the_whole(written):
    folder, size = written[3], 4
    whole = linears(load_model(folder, device=CPU, dtype=torch.float32).language)
    where = {"device": CPU, "dtype": torch.float32}
    ranks = [load_language(folder, **where, group=OneOf(rank, size)) for rank in range(size)]
    seen = set()
    # Of rows that are rounded, each rank rounds its part by a scale of its own.
    share = {"w8a8": 0.03, "w8a8-sparse24": 0.03, "w8a8-fp8": 0.15}.get(str(written[0]), 1e-5)
    for name in linears(ranks[0]):
        rows = torch.randn(5, whole[name].shape[1])
        truth = whole[name](rows)
        mine = [linears(rank)[name] for rank in ranks]
        seen.add(dimension := split_dimension(f"{name}.weight"))
        if dimension == 0:
            together = torch.cat([each(rows) for each in mine], dim=-1)
        else:
            cut = rows.split([each.shape[1] for each in mine], dim=-1)
            together = sum(each(some) for each, some in zip(mine, cut, strict=True))
        assert_near(together, truth, share)
    assert seen == {0, 1}
    held, all_of_it = (
        sum(w.nbytes for linear in each.values() for w in linear.parameters())
        for each in (linears(ranks[0]), whole)
    )
    assert held <= all_of_it * (1 / size + 0.1)


def test_random_weights_are_drawn_in_the_format(written):
    choice, config, floats, _ = written
    source = WeightSource(config, seed=CHOICES.index(choice), formats=choice)
    assert WeightSource.from_mapping(json.loads(json.dumps(source.to_mapping()))) == source
    model = source.load_model(device=CPU, dtype=torch.float16)
    for weight in list_weights(model):
        # The same draw as of floats, packed.
        for name, tensor in weight.pack(floats[weight.name]).items():
            assert torch.equal(model.get_parameter(name), tensor), name
    mine = source.load_language(device=CPU, dtype=torch.float16, group=OneOf(1, 2))
    assert all(
        linear(torch.randn(2, linear.shape[1])).isfinite().all()
        for linear in linears(mine).values()
    )


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_part_of_another_dtype_is_refused(tmp_path):
    config = tiny_config(3)
    floats = WeightSource(config).load_model(device=CPU, dtype=torch.float16).state_dict()
    out_dir, tokenizer = tmp_path / "model", DEMO_DIR / "tokenizer.model"
    write_folder(out_dir, config, floats, tokenizer, formats=INT8_ROWS.name)
    stored = load_file(path := out_dir / "model.safetensors")
    name = "language.head.weight"
    save_file({**stored, name: stored[name].half()}, path)
    with pytest.raises(CheckpointError, match=r"head\.weight of dtype F16; int8 is wanted\. Conv"):
        load_model(out_dir, device=CPU, dtype=torch.float16)
    save_file({n: w for n, w in stored.items() if n != "language.head.scale"}, path)
    with pytest.raises(CheckpointError, match=r"1 weight missing \(language\.head\.scale\)"):
        load_model(out_dir, device=CPU, dtype=torch.float16)


def test_ranks_that_a_format_cannot_be_cut_for_are_refused():
    config = tiny_config(0)
    gated = replace(config, language=replace(config.language, intermediate_size=4 * 6 * GROUP))
    blank_model(gated, OneOf(1, 4), INT4_GROUPS.name)
    narrow = replace(config, language=replace(config.language, intermediate_size=6 * GROUP))
    blank_model(narrow, OneOf(1, 2), INT4_GROUPS.name)
    with pytest.raises(ConfigError, match="12 inputs do not divide into groups of 8"):
        blank_model(narrow, OneOf(1, 4), INT4_GROUPS.name)


def test_the_narrowest_part_decides_and_whole_words_alone():
    choice = {"language.layers.1": "int8-rows", "language.layers.1.mlp_up": "float"}
    assert format_of(choice, "language.layers.1.mlp_down").name == "int8-rows"
    assert format_of(choice, "language.layers.1.mlp_up").name == "float"
    assert format_of(choice, "language.layers.11.mlp_down").name == "float"
    assert format_of({}, "language.head") is DENSE


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"language": "int3"}, "in the format 'int3', which this program does not read"),
        ({"language": ["float"]}, r"in the format \['float'\], which this program does not read"),
        (3, "is not the manifest of a MiniGPT-4 model folder"),
    ],
)
def test_formats_that_are_not_known(tmp_path, value, said):
    manifest = json.loads((DEMO_DIR / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "weight_format": value}))
    with pytest.raises(CheckpointError, match=said):
        read_manifest(tmp_path)


def test_a_manifest_that_names_no_format_is_of_floats(tmp_path):
    manifest = json.loads((DEMO_DIR / "manifest.json").read_text())
    del manifest["weight_format"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert read_manifest(tmp_path).weight_format == "float"
    assert load_config(DEMO_DIR)


def test_shapes_are_known_without_torch():
    code = (
        "import sys\n"
        "from minigpt4_runtime.formats.registry import WEIGHT_FORMATS, weight_format\n"
        "for name in WEIGHT_FORMATS: assert weight_format(name).parts(8, 128)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
