"""A model folder → a quantised one: its formats, its whole life, and what is refused."""

import errno
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt4_runtime.api import MiniGPT4
from minigpt4_runtime.checkpoint import folder as folder_module
from minigpt4_runtime.checkpoint import writer
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.load import load_model
from minigpt4_runtime.checkpoint.manifest import read_manifest
from minigpt4_runtime.checkpoint.report import inspect_folder
from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.errors import CheckpointError, ConfigError
from minigpt4_runtime.formats.registry import format_of
from minigpt4_runtime.messages import image
from minigpt4_runtime.model.linear import Linear
from minigpt4_runtime.presets import PRESETS
from minigpt4_runtime.quantise.choice import QuantisePlan, choose
from minigpt4_runtime.quantise.quantise import quantise

ROOT = Path(__file__).parents[2]
DEMO_DIR = ROOT / "src/minigpt4_runtime/assets/demo"
PICTURES = [ROOT / "examples/images" / f"{name}.png" for name in ("one", "three", "four")]
CPU = torch.device("cpu")
# How far logits may be from those of floats, as a share of their largest value.
LOGITS = {"w8a16": 0.02, "w8a8": 0.06, "w4a16": 0.2, "w4a8": 0.2}


@pytest.fixture(scope="module")
def folder_in(tmp_path_factory):
    """Quantises the demo model once for each format. Do not change the folders."""
    out_dir = tmp_path_factory.mktemp("quantised")

    @cache
    def make(name):
        quantise(DEMO_DIR, out_dir / name, QuantisePlan(weights=name))
        return out_dir / name

    return make


@pytest.fixture(scope="module", params=LOGITS)
def quantised(request, folder_in):
    """(format, folder) of the demo model."""
    return request.param, folder_in(request.param)


def answers(folder, **how):
    with MiniGPT4.load(folder, dtype="float32", **how) as model:
        greedy = SamplingParams(max_new_tokens=60)
        return [model.describe(image(each), sampling=greedy).text for each in PICTURES]


@pytest.fixture(scope="module")
def float_answers():
    return answers(DEMO_DIR)


# --- what is made --------------------------------------------------------------------------------


def test_every_matrix_is_the_float_one_rounded(quantised):
    family, folder = quantised
    config, formats = load_config(folder), read_manifest(folder).weight_format
    assert config == load_config(DEMO_DIR)
    floats = load_file(DEMO_DIR / "model.safetensors")
    model = load_model(folder, device=CPU, dtype=torch.float32)
    steps = {8: 0.03, 4: 0.45}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            chosen = format_of(formats, name)
            assert module.weight_format is chosen
            wanted = floats.pop(f"{name}.weight").float()
            found = chosen.unpack(dict(module.named_parameters()))
            off = float((found - wanted).abs().max() / wanted.abs().max())
            assert off <= (steps[chosen.bits] if chosen.name != "float" else 0), name
            assert chosen.name == "float" or not torch.equal(found, wanted)
    layers = format_of(formats, "language.layers.0.mlp_up")
    assert layers.family == family
    assert layers.group_size == (32 if layers.bits == 4 else None)
    # What is no matrix is unchanged.
    for name, weight in floats.items():
        assert torch.equal(model.get_parameter(name), weight.float()), name


def test_it_is_smaller_by_what_its_format_says(quantised):
    family, folder = quantised
    before, after = inspect_folder(DEMO_DIR), inspect_folder(folder)
    assert after.num_parameters == before.num_parameters
    share = {"w8a16": 0.56, "w8a8": 0.56, "w4a16": 0.45, "w4a8": 0.45}[family]
    assert after.num_bytes < share * before.num_bytes
    towers = {tower.name: tower.formats for tower in after.towers}
    eight_bits = f"w8{family[2:]}"
    wanted = f"{family}-g32" if family.startswith("w4") else family
    assert towers["language"][0] == wanted
    assert set(towers["language"]) == {wanted, eight_bits, "float16"}
    assert towers["vision"] == (eight_bits, "float16")
    assert towers["qformer"] == (eight_bits,)
    assert towers["projection"] == ("float16",)


def test_logits_stay_near_those_of_floats(quantised):
    family, folder = quantised
    ids, positions = torch.arange(1, 25), torch.arange(24)
    from minigpt4_runtime.model.causal import causal_attention

    with torch.inference_mode():
        wanted, found = (
            model.language.logits(
                model.language(model.language.embed(ids), positions, causal_attention())
            )
            for model in (
                load_model(each, device=CPU, dtype=torch.float32) for each in (DEMO_DIR, folder)
            )
        )
    assert 0 < float((found - wanted).abs().max() / wanted.abs().max()) < LOGITS[family]


def test_answers_are_those_of_floats(quantised, float_answers):
    assert answers(quantised[1]) == float_answers


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_it_answers_in_other_dtypes(quantised, dtype):
    with MiniGPT4.load(quantised[1], dtype=dtype) as model:
        reply = model.describe(image(PICTURES[0]), sampling=SamplingParams(max_new_tokens=40))
    assert "cross" in reply.text


def test_ranks_share_it(folder_in, float_answers):
    assert answers(folder_in("w8a16"), device="cpu", tensor_parallel=2) == float_answers


def test_a_group_that_ranks_would_cut_is_refused_in_words(folder_in):
    with pytest.raises(ConfigError, match="each rank's part counts"):
        answers(folder_in("w4a16"), device="cpu", tensor_parallel=2)


def test_its_image_side_becomes_a_graph_of_its_own(folder_in, float_answers, tmp_path):
    pytest.importorskip("onnxruntime")
    from minigpt4_runtime.export.onnx import export_onnx

    folder = folder_in("w8a8")  # Every format's image side is unpacked in the same way.
    with pytest.raises(CheckpointError, match=r"is not a folder made by"):
        answers(folder, vision_graph=DEMO_DIR)
    export_onnx(folder, tmp_path / "graph", images=[image(PICTURES[0])])
    assert answers(folder, vision_graph=tmp_path / "graph") == float_answers
    with pytest.raises(CheckpointError, match="was not made from the weights"):
        answers(DEMO_DIR, vision_graph=tmp_path / "graph")


def test_shards_are_read_one_weight_at_a_time(folder_in, tmp_path):
    stored = load_file(DEMO_DIR / "model.safetensors")
    source = Path(shutil.copytree(DEMO_DIR, tmp_path / "shards"))
    (source / "model.safetensors").unlink()
    names = sorted(stored)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in files.items():
        save_file({name: stored[name] for name in some}, source / file)
    weight_map = {name: file for file, some in files.items() for name in some}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    one, other = tmp_path / "one", folder_in("w4a8")
    seen = []
    quantise(source, one, QuantisePlan(weights="w4a8"), progress=lambda *each: seen.append(each))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    total = inspect_folder(one).num_bytes
    done = [num_bytes for _, num_bytes, _ in seen]
    assert done == sorted(done)
    assert seen[-1] == ("rounding", total, total)


# --- what is chosen ------------------------------------------------------------------------------


def test_the_choice_without_a_word_on_head_and_image_side():
    config = PRESETS["vicuna-7b"]
    assert choose(QuantisePlan(weights="w4a8"), config) == {
        "language.layers": "w4a8-g32",
        "language.head": "w8a8",
        "vision": "w8a8",
        "vision.vit.patch_embedding": "float",
        "vision.projection": "float",
    }
    asymmetric = QuantisePlan(weights="w4a16", group_size=128, is_symmetric=False)
    assert choose(asymmetric, config)["language.layers"] == "w4a16-g128-asymmetric"


def test_head_and_image_side_have_words_of_their_own():
    config = PRESETS["llama2-7b"]
    kept = choose(QuantisePlan(weights="w8a16", head="keep", image_side="keep"), config)
    assert kept == {"language.layers": "w8a16"}
    plan = QuantisePlan(weights="w4a16", group_size=32, head="w4a16", image_side="w4a8-g128")
    assert choose(plan, config) == {
        "language.layers": "w4a16-g32",
        "language.head": "w4a16-g32",
        "vision": "w4a8-g128",
        "vision.vit.patch_embedding": "float",
        "vision.projection": "float",
    }


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"weights": "w3a16"}, r"no weight format 'w3a16'; there is w8a16, w8a8, w4a16, w4a8"),
        ({"weights": "keep"}, "no weight format 'keep'"),
        ({"weights": "w4a16", "group_size": 16}, r"group size is 16; it can be 32, 64, 128\."),
        ({"weights": "w4a16", "group_size": 128}, r"160 inputs, as 128 does not divide .* of 32"),
        ({"weights": "w8a8", "image_side": "int8"}, "no weight format 'int8'"),
    ],
)
def test_what_cannot_be_is_one_sentence(plan, said, tmp_path):
    with pytest.raises(ConfigError, match=said) as refused:
        quantise(DEMO_DIR, tmp_path / "out", QuantisePlan(**plan))
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["w8a8-sparse24", "w4a16-g32"])
@pytest.mark.parametrize("more", [{"group_size": 32}, {"is_symmetric": False}])
def test_a_whole_name_leaves_nothing_to_choose(name, more):
    with pytest.raises(ConfigError, match=f"{name} has its own groups"):
        choose(QuantisePlan(weights=name, **more), load_config(DEMO_DIR))


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_quantised_model_is_not_quantised_again(quantised, tmp_path):
    with pytest.raises(CheckpointError, match=r"is quantised already \(.*model of floats"):
        quantise(quantised[1], tmp_path / "out", QuantisePlan(weights="w8a16"))
    with pytest.raises(CheckpointError, match=r"is the model itself"):
        quantise(DEMO_DIR, DEMO_DIR, QuantisePlan(weights="w8a16"), force=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_nothing_half_made_is_left(error, raised, tmp_path, monkeypatch):
    real, calls = writer._write_one, []

    def write_or_fail(*args, **kwargs):
        calls.append(1)
        if len(calls) > 20:
            raise error
        real(*args, **kwargs)

    monkeypatch.setattr(writer, "_write_one", write_or_fail)
    with pytest.raises(raised):
        quantise(DEMO_DIR, tmp_path / "new" / "out", QuantisePlan(weights="w4a16"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_before(tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 10**6)
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"has no room: the model needs .* are missing"):
        quantise(DEMO_DIR, tmp_path / "out", QuantisePlan(weights="w8a8"))
    assert not list(tmp_path.iterdir())


def test_a_damaged_weight_is_named(tmp_path):
    source = Path(shutil.copytree(DEMO_DIR, tmp_path / "source"))
    stored = load_file(path := source / "model.safetensors")
    stored["language.layers.2.mlp_up.weight"][3, 5] = float("nan")
    save_file(stored, path)
    with pytest.raises(CheckpointError, match=r"language\.layers\.2\.mlp_up\.weight holds NaN"):
        quantise(source, tmp_path / "out", QuantisePlan(weights="w4a16"))
    assert [each.name for each in tmp_path.iterdir()] == ["source"]
