"""A warning where a folder's own words say that it is no Vicuna v0."""

import json

import pytest
from published_files import copy_golden, edit_json

from minigpt4_runtime.convert import vicuna_version
from minigpt4_runtime.convert.convert import convert
from minigpt4_runtime.convert.vicuna_version import describe_version

V0 = {
    "_name_or_path": "/weights/vicuna-7b-v0", "hidden_size": 4096, "vocab_size": 32001,
    "max_position_embeddings": 2048,
}  # fmt: skip


def folder_of(tmp_path, config: dict, added: dict | None = None):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if added is not None:
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    return tmp_path


@pytest.mark.parametrize(
    ("config", "added"),
    [
        (V0, None),
        (V0, {"[PAD]": 32000}),
        ({**V0, "vocab_size": 32000}, {"[PAD]": 32000}),
        ({**V0, "vocab_size": "32001", "hidden_size": 5120.0}, None),
        ({**V0, "_name_or_path": None}, None),
        # Sizes of no published model: nothing is known of it.
        ({**V0, "hidden_size": 64, "vocab_size": 32000}, None),
        ({}, None),
    ],
)
def test_nothing_is_said_of_v0(config, added, tmp_path):
    assert describe_version(folder_of(tmp_path, config, added)) == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"_name_or_path": "lmsys/vicuna-7b-v1.3"}, "calls it 'lmsys/vicuna-7b-v1.3'"),
        ({"_name_or_path": "/models/Vicuna_13B_1.1"}, "calls it '/models/Vicuna_13B_1.1'"),
        ({"vocab_size": 32000}, "its vocab_size is 32000, and v0 has 32001 with [PAD]"),
        ({"max_position_embeddings": 4096}, "its context is 4096 tokens, and v0's is 2048"),
    ],
)
def test_a_later_version_is_told(changes, said, tmp_path):
    text = describe_version(folder_of(tmp_path, {**V0, **changes}))
    assert str(tmp_path) in text
    assert "no Vicuna v0" in text
    assert said in text


def test_a_conversion_warns_and_goes_on(vicuna, tmp_path, monkeypatch):
    monkeypatch.setattr(vicuna_version, "_WIDTHS", (64,))
    llama2 = copy_golden("llama2", tmp_path / "other")
    for files in (vicuna, llama2):
        edit_json(files.language_dir / "config.json", _name_or_path="vicuna-7b-v1.5")
    with pytest.warns(UserWarning, match=r"seems to be no Vicuna v0.*vicuna-7b-v1\.5"):
        convert(vicuna, tmp_path / "vicuna")
    told = []
    convert(vicuna, tmp_path / "again", warn=told.append)
    assert len(told) == 1
    convert(llama2, tmp_path / "llama2", warn=told.append)
    assert len(told) == 1
