"""MiniGPT-v2: LoRA adapters merged, the settings beside weights, and the variant that they tell."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from published_files import (
    GOLDENS,
    edit,
    edit_json,
    read_language,
    read_published,
    shard_with,
)
from safetensors.torch import load_file, save_file

from minigpt4_runtime import MiniGPT4, SamplingParams
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.convert import recipe
from minigpt4_runtime.convert.convert import convert
from minigpt4_runtime.errors import CheckpointError, ConfigError
from minigpt4_runtime.quantise.choice import QuantisePlan, choose
from minigpt4_runtime.quantise.quantise import quantise

QUERY = "language.layers.0.attention.query.weight"
OWNER = "llama_model.base_model.model.model.layers.0.self_attn.q_proj"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def save_settings(path: Path, change: Callable[[dict], object]) -> None:
    """Change what stands beside the weights."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def merged(files, owner: str, alpha: float = 16) -> torch.Tensor:
    """W + B·A·alpha/r in float64, by hand."""
    own = read_published(files.projection)
    name = owner.removeprefix("llama_model.base_model.model.")
    weight = read_language(files.language_dir)[f"{name}.weight"].double()
    low, high = (own[f"{owner}.lora_{side}.weight"].double() for side in "AB")
    return weight + high @ low * (alpha / len(low))


@pytest.fixture
def fails(tmp_path):
    def convert_and_fail(files, **options) -> str:
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            convert(files, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    return convert_and_fail


def test_the_originals_merged_weight_and_positions(golden_model_dir):
    weights = weights_of(golden_model_dir("minigptv2"))
    arrays = np.load(GOLDENS / "minigptv2/arrays.npz")
    for ours, theirs in ((QUERY, "layer0_q_proj_merged"),
                         ("vision.vit.position_embedding", "pos_embed")):  # fmt: skip
        found = np.abs(weights[ours].float().numpy() - arrays[theirs]).max()
        assert found <= 1e-4 * np.abs(arrays[theirs]).max()


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_merged_in_float32_and_rounded_once(minigptv2, tmp_path, dtype):
    conversion = convert(minigptv2, tmp_path / "out", dtype=dtype, verify=True)
    assert conversion.variant == "MiniGPT-v2"
    weights = weights_of(tmp_path / "out")
    wanted = merged(minigptv2, OWNER).float()
    found = weights[QUERY]
    assert found.dtype == getattr(torch, dtype or "float32")
    assert torch.allclose(found.float(), wanted.to(found.dtype).float(), atol=1e-6, rtol=2**-8)
    value = weights[QUERY.replace("query", "value")].float()
    assert torch.allclose(
        value, merged(minigptv2, OWNER.replace("q_", "v_")).float(), atol=1e-3, rtol=2**-7
    )
    untouched = read_language(minigptv2.language_dir)["model.layers.0.self_attn.k_proj.weight"]
    key = weights[QUERY.replace("query", "key")]
    assert torch.equal(key, untouched.to(key.dtype))


@pytest.mark.parametrize("rank", [1, 8, 100])
def test_another_rank_and_other_alphas(minigptv2, tmp_path, rank):
    low, high = torch.randn(rank, 64), torch.randn(64, rank)
    changed = {f"{OWNER}.lora_A.weight": low, f"{OWNER}.lora_B.weight": high}
    edit(minigptv2.projection, lambda t: t.update(changed))
    convert(minigptv2, tmp_path / "asked", lora_alpha=5)
    found = weights_of(tmp_path / "asked")[QUERY]
    assert torch.allclose(found, merged(minigptv2, OWNER, 5).float(), atol=1e-4)
    save_settings(minigptv2.projection, lambda c: c["config"]["model"].update(lora_alpha=32))
    convert(minigptv2, tmp_path / "written")
    found = weights_of(tmp_path / "written")[QUERY]
    assert torch.allclose(found, merged(minigptv2, OWNER, 32).float(), atol=1e-4)
    save_settings(minigptv2.projection, lambda c: c["config"]["model"].pop("lora_alpha"))
    convert(minigptv2, tmp_path / "absent")
    found = weights_of(tmp_path / "absent")[QUERY]
    assert torch.allclose(found, merged(minigptv2, OWNER, 16).float(), atol=1e-4)


def test_names_of_later_peft_and_of_other_targets(minigptv2, tmp_path):
    """`lora_A.default`, `base_layer` beside it, and an adapter of the feed-forward."""
    own = read_published(minigptv2.projection)
    base = read_language(minigptv2.language_dir)["model.layers.0.self_attn.q_proj.weight"].float()
    up = OWNER.replace("self_attn.q_proj", "mlp.up_proj")
    added = {f"{up}.lora_A.weight": torch.randn(4, 64), f"{up}.lora_B.weight": torch.randn(160, 4)}
    later = {
        name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): tensor
        for name, tensor in (own | added).items()
    }
    torch.save({"model": later | {f"{OWNER}.base_layer.weight": base + 1}}, minigptv2.projection)
    convert(minigptv2, tmp_path / "out", image_size=56)
    weights = weights_of(tmp_path / "out")
    edit(minigptv2.projection, lambda t: t.update(own | added))
    assert torch.allclose(weights[QUERY], 1 + merged(minigptv2, OWNER).float(), atol=1e-4)
    assert torch.allclose(
        weights["language.layers.0.mlp_up.weight"], merged(minigptv2, up).float(), atol=1e-4
    )


def test_one_weight_is_merged_at_a_time(minigptv2, tmp_path, monkeypatch):
    """The projection's file is open only while a weight is made of it."""
    opened, real = [], recipe.open_tensors
    monkeypatch.setattr(recipe, "open_tensors", lambda path: opened.append(path.name) or real(path))
    convert(minigptv2, tmp_path / "out")
    assert opened.count(minigptv2.projection.name) == 1 + 6 + 1  # Listed, merged, projected.


# --- the variant, and the size of pictures ------------------------------------------------------


def test_settings_tell_the_image_size(minigptv2, tmp_path):
    convert(minigptv2, tmp_path / "written")
    config = load_config(tmp_path / "written")
    assert (config.vision.image_size, config.rows_per_image) == (112, 16)
    assert config.template == "minigptv2"
    convert(minigptv2, tmp_path / "asked", image_size=224)
    assert load_config(tmp_path / "asked").vision.image_size == 224


def test_nothing_tells_the_image_size(minigptv2, fails, tmp_path):
    save_file(read_published(minigptv2.projection), tmp_path / "own.safetensors")
    files = replace(minigptv2, projection=tmp_path / "own.safetensors")
    message = fails(files)
    assert f"{files.projection} has no config.model.image_size" in message
    assert "176 wide (known: 448 for a width of 1408). Give --image-size." in message
    # Still MiniGPT-v2, by its adapters.
    assert convert(files, tmp_path / "out", image_size=112).variant == "MiniGPT-v2"


def test_what_tells_the_variant(minigptv2, llama2, tmp_path, fails):
    conversion = convert(llama2, tmp_path / "doubtful")
    assert conversion.variant == "Llama-2"
    assert "names no variant, and is taken for the Llama-2 variant" in conversion.doubt
    named = convert(replace(llama2, variant="minigptv2"), tmp_path / "named", image_size=56)
    assert (named.variant, named.doubt) == ("MiniGPT-v2", "")
    for arch in ("minigpt4", "mini_gpt4"):  # The second is the older name.
        save_settings(
            llama2.projection, lambda c, arch=arch: c["config"].update(model={"arch": arch})
        )
        told = convert(llama2, tmp_path / arch)
        assert (told.variant, told.doubt) == ("Llama-2", "")
    without = {n: t for n, t in read_published(minigptv2.projection).items() if "lora" not in n}
    save_settings(minigptv2.projection, lambda c: c.update(model=without))
    assert convert(minigptv2, tmp_path / "arch").variant == "MiniGPT-v2"
    assert "--variant is 'vicuna', but the files are those of llama2 or minigptv2" in fails(
        replace(llama2, variant="vicuna")
    )


def test_adapters_of_the_vicuna_variant_are_merged(vicuna, tmp_path):
    """Upstream's other model takes them too."""
    changed = {f"{OWNER}.lora_A.weight": torch.randn(4, 64), f"{OWNER}.lora_B.weight":
               torch.randn(64, 4)}  # fmt: skip
    edit(vicuna.projection, lambda t: t.update(changed))
    conversion = convert(vicuna, tmp_path / "out")
    assert conversion.variant == "Vicuna"
    found = weights_of(tmp_path / "out")[QUERY]
    assert torch.allclose(found, merged(vicuna, OWNER).float(), atol=1e-4)


# --- what does not fit --------------------------------------------------------------------------


def test_half_an_adapter(minigptv2, fails):
    edit(minigptv2.projection, lambda t: t.pop(f"{OWNER}.lora_B.weight"))
    message = fails(minigptv2)
    assert f"{OWNER}.lora_A.weight is a LoRA factor, and its other factor is in no file" in message


def test_an_adapter_of_no_weight(minigptv2, fails):
    changed = {f"{OWNER}x.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    edit(minigptv2.projection, lambda t: t.update(changed))
    assert "layers.0.self_attn.q_projx.weight is in no file" in fails(minigptv2)


def test_adapters_of_another_language_model(minigptv2, fails):
    edit(minigptv2.projection, lambda t: t.update({f"{OWNER}.lora_A.weight": torch.ones(64, 32)}))
    message = fails(minigptv2)
    assert "is 64×32 and lora_B 64×64; their product does not fit" in message
    assert str(minigptv2.language_dir) in message


def test_factors_that_are_no_floats(minigptv2, fails):
    name = f"{OWNER}.lora_A.weight"
    edit(minigptv2.projection, lambda t: t.update({name: torch.ones(64, 64, dtype=torch.int64)}))
    assert f"{name} is of dtype int64" in fails(minigptv2)


def test_adapters_in_the_language_model_s_own_files(minigptv2, fails):
    """Of those no alpha is known."""
    shard = shard_with(minigptv2.language_dir, "model.norm.weight")
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    edit(shard, lambda t: t.update({name: torch.ones(4, 64)}))
    assert "PEFT adapter (LoRA)" in fails(minigptv2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_size": "large"}, "config.model.image_size is 'large'; a number above 0"),
        ({"image_size": 11.5}, "config.model.image_size is 11.5"),
        ({"lora_alpha": 0}, "config.model.lora_alpha is 0"),
        ({"lora_alpha": [16]}, "config.model.lora_alpha is [16]"),
    ],
)
def test_settings_that_make_no_sense(minigptv2, changes, said, fails):
    save_settings(minigptv2.projection, lambda c: c["config"]["model"].update(changes))
    message = fails(minigptv2)
    assert f"{minigptv2.projection}: {said}" in message


def test_an_alpha_that_is_none(minigptv2, fails):
    assert "lora_alpha is -1; it must be above 0" in fails(minigptv2, lora_alpha=-1)


def test_settings_in_the_older_form_of_torch(minigptv2, tmp_path):
    content = torch.load(minigptv2.projection, weights_only=True)
    torch.save(content, minigptv2.projection, _use_new_zipfile_serialization=False)
    convert(minigptv2, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["template"] == "minigptv2"


# --- what is made of it -------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["w8a16", "w8a8", "w4a16", "w4a8"])
def test_quantised_at_once_as_afterwards(minigptv2, golden_model_dir, tmp_path, weights):
    plan = QuantisePlan(weights=weights)
    convert(minigptv2, tmp_path / "once", choose_formats=lambda config: choose(plan, config))
    quantise(golden_model_dir("minigptv2"), tmp_path / "later", plan)
    once, later = weights_of(tmp_path / "once"), weights_of(tmp_path / "later")
    assert once.keys() == later.keys()
    assert all(torch.equal(once[name], later[name]) for name in once)
    picture = GOLDENS / "minigptv2/images/photo_rgb.jpg"
    sampling = SamplingParams(max_new_tokens=8)
    with MiniGPT4.load(tmp_path / "once", device="cpu", dtype="float32") as model:
        reply = model.describe(picture, sampling=sampling, task="caption")
        assert reply.token_ids
        assert reply.usage.prompt_tokens > model.config.rows_per_image == 16


def resized(files, *, hidden: int, heads: int, rank: int, image: int) -> None:
    """Other random weights, of other widths, in the same published layout."""
    language, new_sizes = read_language(files.language_dir), {64: hidden, 160: 2 * hidden}

    def draw(tensor: torch.Tensor, sizes: dict[int, int]) -> torch.Tensor:
        return torch.randn([sizes.get(size, size) for size in tensor.shape]) * 0.1

    drawn = {
        name: draw(tensor, new_sizes) + ("norm" in name)  # Norms near 0 are those of a delta.
        for name, tensor in language.items()
    }
    for path in files.language_dir.glob("pytorch_model*"):
        path.unlink()
    torch.save(drawn, files.language_dir / "pytorch_model.bin")
    edit_json(
        files.language_dir / "config.json", hidden_size=hidden, intermediate_size=2 * hidden,
        num_attention_heads=heads, num_key_value_heads=heads,
    )  # fmt: skip

    def redraw(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in list(tensors.items()):
            if "lora_A" in name:
                tensors[name] = torch.randn(rank, hidden)
            elif "lora_B" in name:
                tensors[name] = torch.randn(hidden, rank)
            elif "llama_proj" in name:
                tensors[name] = draw(tensor, {64: hidden})

    edit(files.projection, redraw)
    save_settings(files.projection, lambda c: c["config"]["model"].update(image_size=image))


def test_other_widths_ranks_and_sizes(minigptv2, tmp_path):
    """As in a 13B: another width of the language model beside the same image tower."""
    resized(minigptv2, hidden=80, heads=5, rank=6, image=84)
    conversion = convert(minigptv2, tmp_path / "out", verify=True)
    # A 6×6 grid: groups of 4 run over the ends of lines.
    assert (conversion.config.vision.image_size, conversion.config.rows_per_image) == (84, 9)
    found = weights_of(tmp_path / "out")[QUERY]
    assert torch.allclose(found, merged(minigptv2, OWNER).float(), atol=1e-4)
    with MiniGPT4.load(tmp_path / "out", device="cpu", dtype="float32") as model:
        picture = GOLDENS / "minigptv2/images/grey.png"
        assert model.describe(picture, sampling=SamplingParams(max_new_tokens=4)).token_ids
