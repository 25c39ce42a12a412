"""Files under any name: what they are, whether they are whole, and whether they fit."""

import shutil
from dataclasses import replace

import pytest
import torch
from published_files import GOLDENS, edit_json, read_language
from safetensors.torch import save_file

from minigpt4_runtime.checkpoint.file_kind import read_json
from minigpt4_runtime.checkpoint.sources import ModelSources, PublishedPart, SourceFile
from minigpt4_runtime.convert.language_folder import read_llama_config
from minigpt4_runtime.convert.recognise import match_parts, recognise
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.presets import PRESETS

CHECKPOINT = GOLDENS / "vicuna" / "checkpoint"
NAMES = {
    "language": (
        "config.json",
        "tokenizer.model",
        "pytorch_model.bin.index.json",
        *(f"pytorch_model-0000{number}-of-00004.bin" for number in (1, 2, 3, 4)),
    ),
    "vision": ("eva_vit_g.pth",),
    "qformer": ("blip2.pth",),
    "bert": ("config.json",),
    "projection": ("pretrained.pth",),
}


def model(preset=None):
    parts = [
        PublishedPart(
            role, role, f"the {role}", "", tuple(SourceFile(name, ("x",)) for name in names)
        )
        for role, names in NAMES.items()
    ]
    return ModelSources("model", tuple(parts), preset)


def match(folder, preset=None):
    """What was found, by role."""
    return {part.role: found.files for part, found in match_parts(model(preset), folder).items()}


@pytest.fixture
def language(tmp_path):
    """The language model alone, in a folder to be changed."""
    return shutil.copytree(CHECKPOINT / "llama", tmp_path / "llama")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("eva_vit_g.pth", "vision"),
        ("blip2_pretrained_flant5xxl.pth", "qformer"),
        ("pretrained_minigpt4_7b.pth", "projection"),
        ("llama/pytorch_model-00001-of-00004.bin", "shard"),
        ("llama/config.json", "llama"),
        ("llama/tokenizer.model", "tokenizer"),
        ("llama/tokenizer_config.json", None),
        ("llama/pytorch_model.bin.index.json", "index"),
        ("bert-base-uncased/config.json", "bert"),
    ],
)
def test_a_file_is_told_by_its_content(path, kind, tmp_path):
    shutil.copyfile(CHECKPOINT / path, tmp_path / "anything")
    found = recognise(tmp_path / "anything")
    assert (found and found.kind) == kind


@pytest.mark.parametrize(
    "content",
    [b"", b"\x0a\x05hello", b"{", b'{"weight_map": {"a": []}}', b"PK\x03\x04", b"<html>", b"\xff"],
)
def test_anything_else_is_nothing(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert not any(match(tmp_path).values())


def test_a_whole_checkpoint():
    found = match(CHECKPOINT)
    assert found["vision"] == {"eva_vit_g.pth": CHECKPOINT / "eva_vit_g.pth"}
    assert sorted(found["language"]) == [
        "config.json",
        *(f"pytorch_model-0000{number}-of-00004.bin" for number in (1, 2, 3, 4)),
        "tokenizer.model",
    ]


def test_files_of_other_sizes_are_not_the_ones_wanted():
    found = match(CHECKPOINT, preset="vicuna-7b")
    assert not any(found[role] for role in ("vision", "bert", "projection"))
    assert "config.json" not in found["language"]


GOLDEN = read_llama_config(CHECKPOINT, read_json(CHECKPOINT / "llama" / "config.json"))


@pytest.mark.parametrize(
    "other", ["vocab_size", "num_hidden_layers", "max_position_embeddings", "hidden_size"]
)
def test_a_language_model_of_the_same_width_is_another(language, monkeypatch, other):
    """As Llama 2 7B is as wide as Vicuna 7B, and its shards have the same names."""
    monkeypatch.setitem(PRESETS, "vicuna-7b", replace(PRESETS["vicuna-7b"], language=GOLDEN))
    assert "config.json" in match(language, "vicuna-7b")["language"]
    wanted = replace(GOLDEN, **{other: 2 * getattr(GOLDEN, other)})
    monkeypatch.setitem(PRESETS, "vicuna-7b", replace(PRESETS["vicuna-7b"], language=wanted))
    found = match(language, "vicuna-7b")["language"]
    assert "config.json" not in found
    # The words are in the first shard.
    assert ("pytorch_model-00001-of-00004.bin" in found) == (
        other not in ("vocab_size", "hidden_size")
    )


@pytest.mark.parametrize("has_index", [True, False])
def test_of_a_half_language_model_what_can_be_told(language, has_index):
    """By the index where there is one; a shard's own published name is the last resort."""
    (language / "pytorch_model-00003-of-00004.bin").unlink()
    (language / "pytorch_model-00001-of-00004.bin").rename(language / "renamed")
    expected = set(NAMES["language"]) - {"pytorch_model-00003-of-00004.bin"}
    if not has_index:
        (language / "pytorch_model.bin.index.json").unlink()
        expected -= {"pytorch_model.bin.index.json", "pytorch_model-00001-of-00004.bin"}
    (found,) = [
        found for part, found in match_parts(model(), language).items() if part.role == "language"
    ]
    assert set(found.files) == expected
    assert not found.is_whole
    if has_index:
        assert found.files["pytorch_model-00001-of-00004.bin"] == language / "renamed"


def test_safetensors_are_taken_in_place_of_pickles(language):
    tensors = {name: tensor.contiguous() for name, tensor in read_language(language).items()}
    save_file(tensors, language / "all of it")
    found = match(language)["language"]
    assert found["model-00001-of-00001.safetensors"] == language / "all of it"
    assert len(found) == 3


def test_a_tower_in_safetensors_gets_the_ending_by_which_it_is_opened(tmp_path):
    tower = torch.load(CHECKPOINT / "eva_vit_g.pth", weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in tower.items()}, tmp_path / "tower")
    assert match(tmp_path)["vision"] == {"eva_vit_g.safetensors": tmp_path / "tower"}


def test_the_same_weights_twice(language):
    name = "pytorch_model-00001-of-00004.bin"
    shutil.copyfile(language / name, language / "copy.bin")
    with pytest.raises(CheckpointError, match="the same weights of a language model twice"):
        match(language)


def test_a_link_is_not_a_second_file(language):
    (language / "again").symlink_to(language / "pytorch_model-00001-of-00004.bin")
    assert match(language)["language"]


def test_two_language_models(language):
    shutil.copyfile(language / "config.json", language / "other.json")
    assert match(language)["language"]
    edit_json(language / "other.json", rms_norm_eps=1e-5)
    with pytest.raises(CheckpointError, match=r"more than one file .* language model's config"):
        match(language)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="is no folder; --from wants one"):
        match(tmp_path / "none")
