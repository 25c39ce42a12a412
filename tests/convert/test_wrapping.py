"""Whatever a program has put around published weights, the converted folder is the same."""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from published_files import GOLDENS, copy_golden, edit, edit_json, files_of, read_published
from safetensors.torch import load_file, save_file

from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.convert.architecture import _read_vision
from minigpt4_runtime.convert.convert import convert
from minigpt4_runtime.convert.inventory import take_inventory
from minigpt4_runtime.convert.key_map import PARTS, matches
from minigpt4_runtime.convert.recognise import recognise
from minigpt4_runtime.convert.wrapping import plain_names
from minigpt4_runtime.errors import CheckpointError

BEFORE_NAMES = ["", "module.", "model.", "_orig_mod.", "module.model.", "model.module.", "net."]
BESIDE = {
    "epoch": 3,
    "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]},
    "hyper_parameters": argparse.Namespace(lr=1e-4, betas=(0.9, 0.98)),
    "best": np.float64(0.7),
    "config": {"model": {"arch": "mini_gpt4"}},
}
HOLDERS = [
    lambda tensors: tensors,
    lambda tensors: {"state_dict": tensors, **BESIDE},
    lambda tensors: {**BESIDE, "model": tensors},
    lambda tensors: {"model_state_dict": tensors},
    lambda tensors: {"module": tensors, "dp_world_size": 8},
    lambda tensors: {"model": {"state_dict": tensors, "epoch": 1}},
    lambda tensors: {**tensors, "epoch": 3},
]
PREFIXES = {"vision": "visual_encoder.", "language": "llama_model."}


def in_a_wrapper(rng: random.Random, tensors: dict, path: Path) -> None:
    """Save tensors as some program would."""
    before = rng.choice(BEFORE_NAMES)
    named = {f"{before}{name}": tensor for name, tensor in tensors.items()}
    torch.save(rng.choice(HOLDERS)(named), path, _use_new_zipfile_serialization=rng.random() < 0.5)


def read_folder(folder: Path) -> dict[str, bytes]:
    """All of a model folder but the digests of the files that it was made of."""
    names = ("config.json", "model.safetensors", "tokenizer.model")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert {path.name for path in folder.iterdir()} == {*names, "manifest.json"}
    return {
        "dtypes": json.dumps(manifest["dtypes"]).encode(),
        **{name: (folder / name).read_bytes() for name in names},
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What the goldens become without a wrapper."""
    folder = tmp_path_factory.mktemp("plain")
    for variant in ("vicuna", "llama2"):
        convert(files_of(variant, GOLDENS / variant / "checkpoint"), folder / variant)
    return {variant: read_folder(folder / variant) for variant in ("vicuna", "llama2")}


def weight_files(files) -> list[Path]:
    paths = [files.vision, files.projection, *sorted(files.language_dir.glob("*.bin"))]
    return paths if files.qformer is None else [*paths, files.qformer]


@pytest.mark.parametrize("seed", range(4))
def test_any_wrapper_gives_the_same_folder(variant, seed, plain, tmp_path):
    rng = random.Random(seed)
    files = copy_golden(variant, tmp_path / "published")
    for path in weight_files(files):
        in_a_wrapper(rng, read_published(path), path)
    convert(files, tmp_path / "out", verify=seed == 0)
    assert read_folder(tmp_path / "out") == plain[variant]


def whole_model(files, *, num_blocks: int) -> dict[str, torch.Tensor]:
    """What a running model saves: the published weights under its attributes' names."""
    tensors = {}
    for path in weight_files(files):
        for name, tensor in read_published(path).items():
            role = next((r for r in PREFIXES if matches(name, PARTS[r])), None)
            is_used = not name.startswith((f"blocks.{num_blocks}.", "head.", "norm.", "t5_proj."))
            if is_used:
                tensors[PREFIXES.get(role, "") + name] = tensor
    return tensors


@pytest.mark.parametrize(("given", "seed"), [("in every place", 0), ("as the projection", 1)])
def test_a_whole_model_in_one_file(variant, seed, given, plain, tmp_path):
    files = copy_golden(variant, tmp_path / "published")
    whole = tmp_path / "whole.pth"
    in_a_wrapper(random.Random(seed), whole_model(files, num_blocks=3), whole)
    if given == "in every place":
        for path in files.language_dir.glob("pytorch_model*"):
            path.unlink()
        qformer = None if files.qformer is None else whole
        files = replace(files, vision=whole, qformer=qformer, projection=whole)
    else:  # Upstream loads it over everything else.
        for path in [files.vision, *files.language_dir.glob("*.bin")]:
            edit(path, lambda tensors: [t.zero_() for n, t in tensors.items() if "norm" not in n])
        files = replace(files, projection=whole)
    convert(files, tmp_path / "out", verify=seed == 0)
    assert read_folder(tmp_path / "out") == plain[variant]
    assert recognise(whole).kind == "projection"


def test_a_fine_tuned_tower_replaces_the_published_one(llama2, tmp_path):
    own = {"visual_encoder.blocks.1.attn.q_bias": torch.full((176,), 3.0)}
    edit(llama2.projection, lambda tensors: tensors.update(own))
    convert(llama2, tmp_path / "out", dtype="float32", verify=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    query, key, value = written["vision.vit.blocks.1.attention.qkv.bias"].chunk(3)
    published = read_published(llama2.vision)
    assert query.eq(3).all()
    assert not key.any()
    assert torch.equal(value, published["blocks.1.attn.v_bias"].float())


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("module.llama_model.model.layers.0.mlp.up_proj.weight",
         "model.layers.0.mlp.up_proj.weight"),
        ("model.model.norm.weight", "model.norm.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("model.layers.0._fsdp_wrapped_module.mlp.up_proj.weight",
         "model.layers.0.mlp.up_proj.weight"),
        ("model.visual_encoder._checkpoint_wrapped_module.blocks.0.norm1.bias",
         "blocks.0.norm1.bias"),
        ("model.query_tokens", "query_tokens"),
        ("Qformer.bert.embeddings.LayerNorm.bias", "Qformer.bert.embeddings.LayerNorm.bias"),
        ("_orig_mod.lm_head.weight", "lm_head.weight"),
    ],
)  # fmt: skip
def test_names_without_what_was_put_around_them(stored, name):
    assert plain_names([stored]) == {stored: name}


def test_what_stands_before_some_known_names_stands_before_all():
    names = ["net.norm.weight", "net.t5_proj.bias", "net.cls_token", "other.weight"]
    assert list(plain_names(names).values()) == [
        "norm.weight", "t5_proj.bias", "cls_token", "other.weight",
    ]  # fmt: skip
    assert plain_names(["model.norm.weight"]) == {"model.norm.weight": "model.norm.weight"}


def fails(files, tmp_path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert(files, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_weight_under_two_names(llama2, tmp_path):
    edit(llama2.projection, lambda t: t.update({"module.llama_proj.bias": torch.ones(64)}))
    assert (
        f"{llama2.projection} holds one weight twice, as llama_proj.bias and as "
        "module.llama_proj.bias" in fails(llama2, tmp_path)
    )


def test_a_content_that_holds_itself(llama2, tmp_path):
    content: dict = {"epoch": 3}
    content["model"] = content
    torch.save(content, llama2.projection)
    assert "holds no tensors (only epoch, model)" in fails(llama2, tmp_path)


# --- how many blocks of the image tower are used ------------------------------------------------


def eva_vit_g(num_blocks: int, *, before: str = "") -> dict[str, torch.Tensor]:
    """A tower of the published width; each tensor has a single number, laid out many times."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.ones((), dtype=torch.float16).expand(shape)

    tensors = {
        "cls_token": tensor(1, 1, 1408), "pos_embed": tensor(1, 257, 1408),
        "patch_embed.proj.weight": tensor(1408, 3, 14, 14), "patch_embed.proj.bias": tensor(1408),
    }  # fmt: skip
    for block in range(num_blocks):
        tensors[f"blocks.{block}.mlp.fc1.weight"] = tensor(6144, 1408)
    return {f"{before}{name}": each for name, each in tensors.items()}


@pytest.mark.parametrize("before", ["", "visual_encoder.", "module.visual_encoder."])
@pytest.mark.parametrize(("num_blocks", "used"), [(40, 39), (39, 39)])
def test_a_tower_of_the_published_width(num_blocks, used, before, tmp_path):
    torch.save(eva_vit_g(num_blocks, before=before), tmp_path / "eva.pth")
    inventory = take_inventory(tmp_path / "eva.pth", [tmp_path / "eva.pth"])
    assert _read_vision(inventory, None).num_hidden_layers == used


@pytest.mark.parametrize("num_blocks", [1, 12, 38, 41])
def test_a_tower_of_another_depth_is_refused(num_blocks, llama2, tmp_path):
    torch.save(eva_vit_g(num_blocks), llama2.vision)
    assert (
        f"{llama2.vision} has {num_blocks} blocks of a width of 1408; 39 and 40 are known"
        in fails(llama2, tmp_path)
    )


def test_a_tower_saved_while_it_ran_keeps_all_its_blocks(llama2, tmp_path):
    tensors = read_published(llama2.vision)
    torch.save({f"visual_encoder.{name}": t for name, t in tensors.items()}, llama2.vision)
    conversion = convert(llama2, tmp_path / "out", verify=True)
    assert conversion.config.vision.num_hidden_layers == 4
    written = load_file(tmp_path / "out" / "model.safetensors")
    name = "mlp.fc2.weight"
    assert torch.equal(written["vision.vit.blocks.3.mlp_out.weight"], tensors[f"blocks.3.{name}"])


# --- 8 bits -------------------------------------------------------------------------------------


def to_8_bits(tensors: dict, *, order: int | None = None) -> dict[str, torch.Tensor]:
    """What bitsandbytes saves: whole numbers, and the largest value of each row."""
    made = {}
    for name, tensor in tensors.items():
        made[name] = tensor
        if "_proj.weight" in name and "layers" in name:
            scale = tensor.float().abs().amax(dim=1)
            made[name] = (tensor.float() / scale[:, None] * 127).round().to(torch.int8)
            made[f"{name.removesuffix('weight')}SCB"] = scale
            if order is not None:
                made[f"{name.removesuffix('weight')}weight_format"] = torch.tensor(
                    order, dtype=torch.uint8
                )
    return made


def dequantised(tensors: dict, name: str) -> torch.Tensor:
    scale = tensors[f"{name.removesuffix('weight')}SCB"]
    return (tensors[name].float() * scale[:, None] / 127).half()


@pytest.mark.parametrize(
    ("form", "order"), [("bins", None), ("bins", 0), ("safetensors", 0), ("whole model", None)]
)
def test_8_bits_with_scales_are_read(llama2, form, order, tmp_path):
    made = {}
    for path in sorted(llama2.language_dir.glob("*.bin")):
        shard = to_8_bits(read_published(path), order=order)
        made |= shard
        torch.save(shard, path)
    if form == "safetensors":
        for path in llama2.language_dir.glob("pytorch_model*"):
            path.unlink()
        contiguous = {name: tensor.contiguous() for name, tensor in made.items()}
        save_file(contiguous, llama2.language_dir / "model.safetensors")
        edit_json(
            llama2.language_dir / "config.json",
            quantization_config={"load_in_8bit": True, "quant_method": "bitsandbytes"},
        )
    elif form == "whole model":
        for path in llama2.language_dir.glob("pytorch_model*"):
            path.unlink()
        edit(
            llama2.projection,
            lambda tensors: tensors.update({f"llama_model.{n}": t for n, t in made.items()}),
        )
    conversion = convert(llama2, tmp_path / "out", verify=True)
    assert conversion.manifest.dtypes == ("float16", "float32")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for ours, theirs in (("attention.query", "self_attn.q_proj"), ("mlp_down", "mlp.down_proj")):
        found = written[f"language.layers.1.{ours}.weight"]
        assert torch.equal(found, dequantised(made, f"model.layers.1.{theirs}.weight"))


def test_8_bits_in_the_order_of_a_graphics_card(llama2, tmp_path):
    for path in sorted(llama2.language_dir.glob("*.bin")):
        torch.save(to_8_bits(read_published(path), order=2), path)
    assert "of 8 bits lies in the order of a graphics card" in fails(llama2, tmp_path)


def test_8_bits_with_scales_that_do_not_fit(llama2, tmp_path):
    for path in sorted(llama2.language_dir.glob("*.bin")):
        made = to_8_bits(read_published(path))
        cut = {name: t[:-1] if name.endswith("SCB") else t for name, t in made.items()}
        torch.save(cut, path)
    assert "a scale for each row is known" in fails(llama2, tmp_path)


# --- what is none of this: one sentence that names it -------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
         "PEFT adapter (LoRA)"),
        ("base_model.model.model.layers.0.self_attn.q_proj.weight", "PEFT adapter (LoRA)"),
        ("model.layers.0.self_attn.q_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.0.self_attn.q_proj.weight.absmax", "4 bits by bitsandbytes"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4",
         "4 bits by bitsandbytes"),
        ("layers.0.attention.wq.weight", "Meta's own format"),
        ("vision_model.embeddings.class_embedding", "in the names of transformers"),
        ("t5_model.encoder.block.0.layer.0.SelfAttention.q.weight", "another BLIP-2"),
    ],
)  # fmt: skip
def test_another_layout_is_named(name, said, llama2, tmp_path):
    for path in llama2.language_dir.glob("pytorch_model*"):
        path.unlink()
    torch.save({name: torch.ones(4)}, llama2.language_dir / "pytorch_model.bin")
    message = fails(llama2, tmp_path)
    assert str(llama2.language_dir) in message
    assert said in message


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "PEFT adapter (LoRA)"),
        ("language_projection.weight", "in the names of transformers"),
        ("opt_model.model.decoder.embed_tokens.weight", "another BLIP-2"),
    ],
)
def test_another_layout_in_place_of_a_projection(name, said, llama2, tmp_path):
    torch.save({name: torch.ones(4)}, llama2.projection)
    message = fails(llama2, tmp_path)
    assert f"{llama2.projection} holds no llama_proj.weight. It holds" in message
    assert said in message


def test_a_language_model_in_a_layout_that_is_not_read(vicuna, tmp_path):
    shard = next(vicuna.language_dir.glob("*00002*.bin"))
    edit(shard, lambda t: t.update({"model.layers.0.mlp.up_proj.qzeros": torch.ones(4)}))
    message = fails(vicuna, tmp_path)
    assert f"{vicuna.language_dir}: 1 tensor too many" in message
    assert "It holds weights quantised by GPTQ or AWQ: take the files" in message


def test_an_adapter_folder_is_called_one(llama2, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "vicuna-7b"}')
    (adapter / "adapter_model.bin").write_bytes(b"PK")
    said = f'{adapter} is a PEFT adapter (adapter_config.json, base model "vicuna-7b")'
    for field in ("language_dir", "vision", "projection"):
        assert said in fails(replace(llama2, **{field: adapter}), tmp_path)
    with pytest.raises(CheckpointError, match="is a PEFT adapter") as caught:
        load_config(adapter)
    assert said in str(caught.value)
