"""Weights that were published as a difference: known as such, and added to their base."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published_files import copy_golden, edit, read_language, read_published, shard_with
from safetensors.torch import load_file, save_file

from minigpt4_runtime.convert import recipe
from minigpt4_runtime.convert.convert import convert
from minigpt4_runtime.errors import CheckpointError

ENDINGS = (".bin", ".safetensors")
WORD_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def make_delta(files, base_dir: Path) -> dict[str, torch.Tensor]:
    """Turn a language model into a base and what was trained on top; gives their sum."""
    shutil.copytree(files.language_dir, base_dir)
    base = read_language(base_dir)
    for path in files.language_dir.glob("*.bin"):
        edit(path, lambda tensors: [t.copy_(torch.randn_like(t) * 0.003) for t in tensors.values()])
    delta = read_language(files.language_dir)
    return {name: base[name] + delta[name] for name in base}


@pytest.fixture
def base_dir(tmp_path) -> Path:
    return tmp_path / "base"


def fails(files, tmp_path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert(files, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_a_delta_without_its_base_is_named(llama2, tmp_path, base_dir):
    make_delta(llama2, base_dir)
    message = fails(llama2, tmp_path)
    assert f"{llama2.language_dir} holds delta weights, the difference between a model" in message
    assert "its norms are near 0 (at most 0.00" in message
    assert "`minigpt4 convert --base DIR`" in message


def test_whole_weights_are_no_delta(llama2, tmp_path):
    message = fails(replace(llama2, base_dir=llama2.language_dir), tmp_path)
    assert f"{llama2.language_dir} holds whole weights and no delta" in message
    assert "Leave --base out" in message


@pytest.mark.parametrize(
    ("variant", "form"),
    [("vicuna", "bins"), ("llama2", "safetensors"), ("llama2", "legacy")],
)
def test_a_delta_is_added_to_its_base(variant, form, tmp_path, base_dir):
    files = copy_golden(variant, tmp_path / "published")
    wanted = make_delta(files, base_dir)
    if form != "bins":
        tensors = {name: t.contiguous() for name, t in read_language(base_dir).items()}
        for path in base_dir.glob("pytorch_model*"):
            path.unlink()
        if form == "safetensors":
            save_file(tensors, base_dir / "model.safetensors")
        else:
            path = base_dir / "pytorch_model.bin"
            torch.save(tensors, path, _use_new_zipfile_serialization=False)
    conversion = convert(replace(files, base_dir=base_dir), tmp_path / "out", verify=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    names = {
        "model.embed_tokens.weight": "language.token_embedding.weight",
        "lm_head.weight": "language.head.weight",
        "model.norm.weight": "language.norm.weight",
        "model.layers.2.mlp.up_proj.weight": "language.layers.2.mlp_up.weight",
        "model.layers.0.self_attn.q_proj.weight": "language.layers.0.attention.query.weight",
        "model.layers.1.input_layernorm.weight": "language.layers.1.attention_norm.weight",
    }
    for published, ours in names.items():
        assert torch.equal(written[ours], wanted[published]), ours
    assert written["language.norm.weight"].dtype == torch.float16
    named = {source.name for source in conversion.manifest.sources if source.role == "base"}
    assert named == {path.name for path in base_dir.glob("*model*") if path.suffix in ENDINGS}


def test_the_sum_is_the_same_in_any_form(llama2, tmp_path, base_dir):
    """Without a base, the sum saved beforehand gives the same weights."""
    wanted = make_delta(llama2, base_dir)
    convert(replace(llama2, base_dir=base_dir), tmp_path / "added")
    for path in llama2.language_dir.glob("pytorch_model*"):
        path.unlink()
    torch.save(wanted, llama2.language_dir / "pytorch_model.bin")
    convert(llama2, tmp_path / "saved")
    name = "model.safetensors"
    assert (tmp_path / "added" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_rows_that_the_base_has_not(llama2, tmp_path, base_dir):
    """Vicuna v0 has one id more than LLaMA: the delta has its whole row."""
    wanted = make_delta(llama2, base_dir)
    for path in base_dir.glob("*.bin"):
        edit(path, lambda tensors: tensors.update(
            {name: tensors[name][:-1] for name in WORD_TABLES if name in tensors}
        ))  # fmt: skip
    delta = read_language(llama2.language_dir)
    convert(replace(llama2, base_dir=base_dir), tmp_path / "out", verify=True)
    table = load_file(tmp_path / "out" / "model.safetensors")["language.token_embedding.weight"]
    assert torch.equal(table[:-1], wanted["model.embed_tokens.weight"][:-1])
    assert torch.equal(table[-1], delta["model.embed_tokens.weight"][-1])


def test_dtypes_of_base_and_delta_may_differ(llama2, tmp_path, base_dir):
    make_delta(llama2, base_dir)
    name = "model.layers.1.mlp.up_proj.weight"
    for path in base_dir.glob("*.bin"):
        edit(path, lambda tensors: tensors.update({n: t.float() for n, t in tensors.items()}))
    wanted = read_language(base_dir)[name] + read_language(llama2.language_dir)[name].float()
    convert(replace(llama2, base_dir=base_dir), tmp_path / "out", verify=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["language.layers.1.mlp_up.weight"], wanted)


def test_a_base_that_does_not_fit(llama2, tmp_path, base_dir):
    make_delta(llama2, base_dir)
    files, name = replace(llama2, base_dir=base_dir), "model.layers.1.mlp.up_proj.weight"
    shard = next(path for path in base_dir.glob("*.bin") if name in read_published(path))
    edit(shard, lambda tensors: tensors.update({name: tensors[name][:100]}))
    message = fails(files, tmp_path)
    assert f"{shard}: {name} is 100×64, and {llama2.language_dir}" in message
    assert "adds 160×64 to it. Give --base the LLaMA of the same size." in message
    edit(shard, lambda tensors: tensors.pop(name))
    assert f"{base_dir} lacks {name}, to which {llama2.language_dir} adds" in fails(files, tmp_path)
    shard.unlink()
    assert f"names {shard.name}, which is not there" in fails(files, tmp_path)


def test_a_base_that_is_a_delta_or_no_folder(llama2, tmp_path, base_dir):
    make_delta(llama2, base_dir)
    message = fails(replace(llama2, base_dir=llama2.language_dir), tmp_path)
    assert f"{llama2.language_dir} holds delta weights" in message
    absent = tmp_path / "absent"
    assert f"{absent} is no folder" in fails(replace(llama2, base_dir=absent), tmp_path)


def test_no_more_of_the_base_than_a_weight_is_kept(llama2, tmp_path, base_dir, monkeypatch):
    """A base's file is open while one of its weights is added, and never beside another's."""
    make_delta(llama2, base_dir)
    alive, most = set(), 0
    real = recipe.open_tensors

    class Counted(dict):
        def __init__(self, path):
            nonlocal most
            super().__init__(real(path))
            self.path = path
            alive.add(id(self))
            most = max(most, len(alive))

        def __del__(self):
            alive.discard(id(self))

    monkeypatch.setattr(recipe, "open_tensors", Counted)
    convert(replace(llama2, base_dir=base_dir), tmp_path / "out", verify=True)
    assert most == 2
    assert not alive


def test_a_delta_in_8_bits(llama2, tmp_path, base_dir):
    """Widened first, and then added."""
    make_delta(llama2, base_dir)
    name = "model.layers.1.mlp.up_proj.weight"
    shard = shard_with(llama2.language_dir, name)
    numbers = torch.randint(-127, 128, (160, 64), dtype=torch.int8)
    scales = torch.full((160,), 0.25)
    edit(shard, lambda tensors: tensors.update({name: numbers, f"{name[:-6]}SCB": scales}))
    widened = (numbers.float() * 0.25 / 127).half()
    convert(replace(llama2, base_dir=base_dir), tmp_path / "out", verify=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    wanted = widened + read_language(base_dir)[name]
    assert torch.equal(written["language.layers.1.mlp_up.weight"], wanted)
