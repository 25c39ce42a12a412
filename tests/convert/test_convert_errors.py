"""Each way in which published files can be wrong: one sentence with a name and what to do."""

import json
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published_files import edit, edit_json, read_language, read_published, shard_with
from safetensors.torch import save_file

from minigpt4_runtime.checkpoint import writer
from minigpt4_runtime.checkpoint.weights import WeightForm
from minigpt4_runtime.convert.convert import convert
from minigpt4_runtime.errors import CheckpointError


def drop(tensors, *starts: str) -> None:
    for name in [name for name in tensors if name.startswith(starts)]:
        del tensors[name]


class RunsCode:
    """What a hostile pickle holds."""

    def __reduce__(self):
        return os.system, ("touch it_ran",)


@pytest.fixture
def fails(tmp_path):
    """Convert, and give the sentence that it fails with. Nothing may be left behind."""

    def run(files, **options) -> str:
        before = set(tmp_path.iterdir())
        with pytest.raises(CheckpointError) as caught:
            convert(files, tmp_path / "out", **options)
        assert caught.value.__cause__ is None
        assert set(tmp_path.iterdir()) == before
        message = str(caught.value)
        assert "\n" not in message
        return message

    return run


# --- files that are not what they seem ---------------------------------------------------------

WEB_PAGE = b"\xef\xbb\xbf \n<!DOCTYPE html>\n<html><head><title>Google Drive</title></head></html>"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9976634558\n"


def cut_off(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: len(content) // 2]


def legacy(path: Path) -> bytes:
    torch.save(read_published(path), path, _use_new_zipfile_serialization=False)
    return path.read_bytes()


def zipped(path: Path) -> bytes:
    content = path.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pretrained/weights.pth", content)
    return path.read_bytes()


def scrambled(path: Path) -> bytes:
    return path.read_bytes().replace(b"ctorch", b"junk!!", 1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda _: WEB_PAGE, "is a web page saved in place of the file"),
        (lambda _: b'<?xml version="1.0"?><Error><Code>AccessDenied', "is a web page"),
        (lambda _: LFS_POINTER, "is a Git LFS pointer, not the file itself. Run `git lfs pull`"),
        (lambda _: b"", "is empty: the download did not finish"),
        (lambda _: b"Entry not found", "holds a text, not weights: 'Entry not found'. Download"),
        (cut_off, "is cut off: its end is missing, so the download did not finish. Download it"),
        (lambda path: legacy(path)[:-1], "is damaged ("),
        (lambda _: pickle.dumps({"a": 1}), "is a pickle that torch did not write"),
        (zipped, "is a zip archive that torch did not write"),
        (scrambled, "is damaged ("),
        (
            lambda _: b"\x1f\x8b\x08" + bytes(range(200, 250)),
            "is no weight file: it begins with 1f",
        ),
    ],
)
def test_a_stand_in_for_a_weight_file(llama2, make, said, fails):
    path = llama2.projection
    path.write_bytes(make(path))
    message = fails(llama2)
    assert str(path) in message
    assert said in message


@pytest.mark.parametrize("content", [WEB_PAGE, LFS_POINTER])
@pytest.mark.parametrize(
    "name",
    ["eva_vit_g.pth", *(
        f"llama/{name}"
        for name in ("pytorch_model-00002-of-00004.bin", "tokenizer.model", "config.json")
    )],
)  # fmt: skip
def test_a_stand_in_for_another_file(llama2, name, content, fails):
    path = llama2.vision.parent / name
    path.write_bytes(content)
    message = fails(llama2)
    assert str(path) in message
    assert "web page" in message or "Git LFS pointer" in message


def test_a_pickle_that_wants_to_run_code(llama2, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": read_published(llama2.projection), "x": RunsCode()}, llama2.projection)
    message = fails(llama2)
    assert f"{llama2.projection} wants to run code while it is opened (posix.system)" in message
    assert not (tmp_path / "it_ran").exists()


def test_a_damaged_list_of_tensors_is_not_called_hostile(llama2, fails):
    content = bytearray(llama2.projection.read_bytes())
    at = content.index(b"data.pkl") + 200
    content[at : at + 8] = b"\x00" * 8
    llama2.projection.write_bytes(content)
    message = fails(llama2)
    assert f"{llama2.projection} is damaged" in message
    assert "Download it again" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"epoch": 3}, "holds no tensors (only epoch)"),
        ([torch.ones(1)], "holds a list, not named tensors"),
        ({}, "holds no tensors (only nothing)"),
    ],
)
def test_a_torch_file_without_weights(llama2, content, said, fails):
    torch.save(content, llama2.projection)
    assert said in fails(llama2)


def test_files_that_are_absent_or_folders(llama2, fails, tmp_path):
    absent = tmp_path / "absent.pth"
    assert f"{absent} does not exist" in fails(replace(llama2, vision=absent))
    assert "is a folder; a file is wanted" in fails(replace(llama2, vision=llama2.language_dir))
    assert "--language wants the folder" in fails(replace(llama2, language_dir=absent))
    assert "is a file; --language wants" in fails(replace(llama2, language_dir=llama2.vision))


def test_safetensors_under_another_name(llama2, fails):
    save_file(read_published(llama2.projection), llama2.projection)
    assert "is a safetensors file; give it a name that ends in .safetensors" in fails(llama2)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:-100], "is cut off: it has"),
        (lambda content: content + b"more", "is damaged: it has"),
        (lambda content: content[:20], "is no safetensors file, or cut off"),
        (lambda content: content[:8] + b"}" + content[9:], "has a damaged header"),
        (lambda _: b"Access to this model is restricted.", "holds a text, not weights"),
    ],
)
def test_a_damaged_safetensors_shard(llama2, damage, said, fails):
    tensors = {name: t.contiguous() for name, t in read_language(llama2.language_dir).items()}
    path = llama2.language_dir / "model.safetensors"
    save_file(tensors, path)
    path.write_bytes(damage(path.read_bytes()))
    message = fails(llama2)
    assert str(path) in message
    assert said in message


# --- files that do not belong together ---------------------------------------------------------


def widen_projection(width: int):
    def change(tensors):
        reads = tensors["llama_proj.weight"].shape[1]
        tensors["llama_proj.weight"] = torch.zeros(width, reads)
        tensors["llama_proj.bias"] = torch.zeros(width)

    return change


@pytest.mark.parametrize(("projection", "language"), [(5120, 4096), (4096, 5120)])
def test_a_projection_for_another_language_model(llama2, projection, language, fails, monkeypatch):
    edit(llama2.projection, widen_projection(projection))
    edit_json(llama2.language_dir / "config.json", hidden_size=language)
    message = fails(llama2)
    sizes = {4096: "(a 7B model)", 5120: "(a 13B model)"}
    assert (
        f"{llama2.projection} was made for a language model of a width of {projection} " in message
    )
    assert f"{llama2.language_dir} is {language} wide {sizes[language]}" in message
    assert "Give the projection that belongs to this language model" in message


def test_a_vicuna_projection_without_a_qformer(vicuna, fails):
    message = fails(replace(vicuna, qformer=None, bert_dir=None))
    assert f"{vicuna.projection} reads rows of a width of 48" in message
    assert "(without one it would read 704)" in message
    assert "Add --qformer" in message


def test_a_qformer_with_a_llama2_projection(vicuna, fails):
    edit(vicuna.projection, lambda t: t.update({"llama_proj.weight": torch.zeros(64, 704)}))
    message = fails(vicuna)
    assert "was made for the variant without a Q-Former" in message
    assert "Leave --qformer and --bert out" in message


def test_a_projection_for_nothing_that_is_given(vicuna, fails):
    edit(vicuna.projection, lambda t: t.update({"llama_proj.weight": torch.zeros(64, 50)}))
    message = fails(vicuna)
    assert "reads rows of a width of 50; the Q-Former gives 48 and four patches" in message


def test_a_qformer_without_bert_and_the_reverse(vicuna, fails, tmp_path):
    assert "Add --bert with the folder of bert-base-uncased" in fails(
        replace(vicuna, bert_dir=None)
    )
    assert "--bert is given without --qformer" in fails(replace(vicuna, qformer=None))
    assert f"{tmp_path} holds no config.json. --bert wants" in fails(
        replace(vicuna, bert_dir=tmp_path)
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 768}, "says hidden_size 768, but in"),
        ({"num_hidden_layers": 12}, "says num_hidden_layers 12, but in"),
        ({"intermediate_size": ...}, "says intermediate_size absent, but in"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5, which does not divide 48"),
        ({"hidden_act": "relu"}, 'hidden_act is "relu"; only "gelu" is known'),
        ({"layer_norm_eps": "tiny"}, 'layer_norm_eps is "tiny"'),
    ],
)
def test_another_bert(vicuna, changes, said, fails):
    edit_json(vicuna.bert_dir / "config.json", **changes)
    assert said in fails(vicuna)


def test_a_qformer_for_another_image_tower(vicuna, fails):
    def widen(tensors):
        for name in tensors:
            if name.endswith(
                ("crossattention.self.key.weight", "crossattention.self.value.weight")
            ):
                tensors[name] = torch.zeros(48, 264)

    edit(vicuna.qformer, widen)
    message = fails(vicuna)
    assert "reads an image tower of a width of 264" in message
    assert f"{vicuna.vision} is 176 wide" in message


def test_files_given_under_the_wrong_flag(vicuna, fails):
    message = fails(replace(vicuna, vision=vicuna.qformer))
    assert f"{vicuna.qformer} holds no patch_embed.proj.weight. --vision wants" in message
    message = fails(replace(vicuna, qformer=vicuna.vision))
    assert f"{vicuna.vision} holds no query_tokens. --qformer wants" in message
    message = fails(replace(vicuna, projection=vicuna.vision))
    assert f"{vicuna.vision} holds no llama_proj.weight. --projection wants" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update({"pos_embed": torch.zeros(1, 19, 176)}), "pos_embed has 19 rows"),
        (lambda t: t.update({"pos_embed": torch.zeros(17, 176)}), "pos_embed 17×176"),
        (
            lambda t: t.update({"patch_embed.proj.weight": torch.zeros(180, 3, 14, 14)}),
            "is 180 wide, which is no multiple of the 88 of one attention head",
        ),
        (lambda t: drop(t, "blocks.1.", "blocks.2.", "blocks.3."), "holds a single block"),
    ],
)
def test_a_strange_image_tower(llama2, change, said, fails):
    edit(llama2.vision, change)
    message = fails(llama2)
    assert str(llama2.vision) in message
    assert said in message


def test_irregular_cross_attention(vicuna, fails):
    edit(vicuna.qformer, lambda t: drop(t, "Qformer.bert.encoder.layer.0.crossattention."))
    message = fails(vicuna)
    assert f"{vicuna.qformer} has cross-attention in the layers 2 of 4; only every n-th" in message


def test_a_qformer_with_a_layer_missing(vicuna, fails):
    edit(vicuna.qformer, lambda t: drop(t, "Qformer.bert.encoder.layer.2."))
    message = fails(vicuna)
    assert "there is Qformer.bert.encoder.layer.3, but only 3 layers in all" in message


# --- tensors that are missing, too many, misshapen or damaged ----------------------------------


def test_missing_tensors_are_named(vicuna, fails):
    name = "model.layers.1.mlp.up_proj.weight"
    edit(shard_with(vicuna.language_dir, name), lambda t: t.pop(name))
    message = fails(vicuna)
    assert f"{vicuna.language_dir}: 1 tensor missing ({name})." in message
    assert "Download the file again" in message


def test_many_missing_tensors_are_counted(vicuna, fails):
    edit(vicuna.vision, lambda t: drop(t, "blocks.1."))
    message = fails(vicuna)
    assert f"{vicuna.vision}: 13 tensors missing (blocks.1." in message
    assert "and 9 more" in message


def test_extra_tensors_are_named(vicuna, fails):
    name = "model.layers.0.self_attn.q_proj.bias"
    shard = shard_with(vicuna.language_dir, "model.embed_tokens.weight")
    edit(shard, lambda t: t.update({name: torch.ones(64)}))
    message = fails(vicuna)
    assert f"{vicuna.language_dir}: 1 tensor too many ({name})" in message


@pytest.mark.parametrize(
    "name",
    [
        "llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "visual_encoder.blocks.0.attn.q_bias",
        "Qformer.bert.encoder.layer.9.attention.self.query.weight",
    ],
)
def test_a_fine_tune_with_tensors_that_have_no_place(vicuna, name, fails):
    edit(vicuna.projection, lambda t: t.update({name: torch.ones(4)}))
    assert name.removesuffix(".attention.self.query.weight") in fails(vicuna)


def test_a_llama2_projection_with_qformer_tensors(llama2, fails):
    edit(llama2.projection, lambda t: t.update({"query_tokens": torch.ones(1, 8, 48)}))
    message = fails(llama2)
    assert f"{llama2.projection}: 1 tensor too many (query_tokens)" in message
    assert "must be merged into the file that they belong to" in message


def test_half_an_ln_vision(llama2, fails):
    edit(llama2.projection, lambda t: t.update({"ln_vision.weight": torch.ones(176)}))
    assert "1 tensor missing (ln_vision.bias)" in fails(llama2)


def test_a_wrong_shape_is_named(vicuna, fails):
    name = "model.layers.1.mlp.up_proj.weight"
    edit(
        shard_with(vicuna.language_dir, name),
        lambda t: t.update({name: t[name].T.contiguous()}),
    )
    message = fails(vicuna)
    assert f"{name} 64×160, but 160×64 is needed" in message


def test_a_vocabulary_other_than_the_configs(vicuna, fails):
    edit_json(vicuna.language_dir / "config.json", vocab_size=1201)
    assert "model.embed_tokens.weight 1200×64, but 1201×64 is needed" in fails(vicuna)


def test_a_strange_class_token(vicuna, fails):
    edit(vicuna.vision, lambda t: t.update({"cls_token": torch.ones(())}))
    assert "cls_token a single number, but 176 is needed" in fails(vicuna)


@pytest.mark.parametrize(
    ("value", "said", "dtype"),
    [
        (float("nan"), "holds NaN", None),
        (float("nan"), "holds NaN", "float16"),
        (float("-inf"), "holds an infinite value", "float16"),
        (float("-inf"), "holds an infinite value", "float32"),
    ],
)
def test_nan_and_inf_are_named(vicuna, value, said, dtype, fails):
    name = "Qformer.bert.encoder.layer.1.output_query.dense.weight"

    def spoil(tensors):
        tensors[name][3, 5] = value

    edit(vicuna.qformer, spoil)
    message = fails(vicuna, dtype=dtype)
    assert f"{vicuna.qformer}: {name} {said}" in message
    assert "Download it again" in message


def test_a_value_that_overflows_is_named(vicuna, fails, tmp_path):
    def grow(tensors):
        tensors["llama_proj.weight"][0, 0] = 70000.0

    edit(vicuna.projection, grow)
    message = fails(vicuna, dtype="float16")
    assert (
        f"{vicuna.projection}: llama_proj.weight holds 70000, which float16 cannot hold" in message
    )
    assert "Convert with --dtype bfloat16 or without --dtype." in message
    convert(vicuna, tmp_path / "bfloat16", dtype="bfloat16")
    convert(vicuna, tmp_path / "own")


def test_a_value_beyond_bfloat16(vicuna, fails):
    def grow(tensors):
        tensors["llama_proj.weight"][0, 0] = 3.4e38

    edit(vicuna.projection, grow)
    assert "bfloat16 cannot hold. Convert without --dtype." in fails(vicuna, dtype="bfloat16")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused_by_name(vicuna, dtype, fails):
    name = "model.layers.1.mlp.up_proj.weight"
    edit(shard_with(vicuna.language_dir, name), lambda t: t.update({name: t[name].to(dtype)}))
    message = fails(vicuna)
    assert f"{name} is of dtype {str(dtype)[6:]}" in message
    assert "published before quantisation" in message


def test_sparse_tensors_are_refused_by_name(llama2, fails):
    edit(llama2.projection, lambda t: t.update({"llama_proj.bias": torch.ones(64).to_sparse()}))
    assert f"{llama2.projection}: llama_proj.bias are sparse" in fails(llama2)


def test_quantised_safetensors_are_refused_by_name(vicuna, fails):
    tensors = {name: t.contiguous() for name, t in read_language(vicuna.language_dir).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, vicuna.language_dir / "model.safetensors")
    assert f"{name} is of dtype F8_E4M3. Only float32" in fails(vicuna)


# --- the language folder -----------------------------------------------------------------------


def test_missing_shards_are_named(vicuna, fails):
    for number in (2, 4):
        (vicuna.language_dir / f"pytorch_model-0000{number}-of-00004.bin").unlink()
    message = fails(vicuna)
    assert (
        "pytorch_model.bin.index.json names pytorch_model-00002-of-00004.bin, "
        "pytorch_model-00004-of-00004.bin, which are not there" in message
    )
    assert "Download the missing files" in message


def test_missing_shards_without_an_index_are_named(vicuna, fails):
    (vicuna.language_dir / "pytorch_model.bin.index.json").unlink()
    (vicuna.language_dir / "pytorch_model-00003-of-00004.bin").unlink()
    assert f"{vicuna.language_dir} lacks pytorch_model-00003-of-00004.bin." in fails(vicuna)


def test_an_index_that_leads_elsewhere(vicuna, fails):
    path = vicuna.language_dir / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "../secret.bin"}}))
    assert "names '../secret.bin', which is not a plain file name" in fails(vicuna)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}'])
def test_an_index_without_names(vicuna, content, fails):
    (vicuna.language_dir / "pytorch_model.bin.index.json").write_text(content)
    assert "names no weights" in fails(vicuna)


def test_a_folder_without_weights(vicuna, fails):
    for path in vicuna.language_dir.glob("pytorch_model*"):
        path.unlink()
    message = fails(vicuna)
    assert f"{vicuna.language_dir} holds no model*.safetensors" in message
    (vicuna.language_dir / "consolidated.00.pth").touch()
    assert "It holds Meta's own format" in fails(vicuna)


def test_the_same_tensor_in_two_shards(vicuna, fails):
    name = "model.norm.weight"
    edit(
        shard_with(vicuna.language_dir, "lm_head.weight"),
        lambda t: t.update({name: torch.ones(64)}),
    )
    assert f"{name} stands both in" in fails(vicuna)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mistral"}, 'of model_type "mistral"; only "llama"'),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": 3}, 'describes 3 of model_type "llama"'),
        ({"model_type": "minigpt4"}, "is a MiniGPT-4 model folder already"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            'rope_scaling is {"type": "dynamic", "factor": 2}; rope_scaling of the kind',
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling.factor is None; it must be"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1 is known"),
        ({"attention_bias": True}, "attention_bias is true; only false is known"),
        ({"mlp_bias": True}, "mlp_bias is true; only false is known"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; only "silu" is known'),
        ({"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4}; only null or'),
        ({"head_dim": 32}, "head_dim is 32, but 4 heads of a width of 64 are 16 wide"),
        ({"hidden_size": ...}, "lacks hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be"),
        ({"num_attention_heads": "four"}, "num_attention_heads is 'four'"),
        ({"num_key_value_heads": 3}, "cannot share 3 key/value heads evenly"),
        (
            {"vocab_size": 500},
            "knows 1200 pieces, but the vocabulary of the language model has 500",
        ),
    ],
)
def test_another_language_model(llama2, changes, said, fails):
    edit_json(llama2.language_dir / "config.json", **changes)
    message = fails(llama2)
    assert said in message
    assert str(llama2.language_dir) in message


@pytest.mark.parametrize(("content", "said"), [("{", "is not valid JSON"), ("[1]", "holds a list")])
def test_a_damaged_config(llama2, content, said, fails):
    (llama2.language_dir / "config.json").write_text(content)
    assert said in fails(llama2)


def test_the_tokenizer(llama2, fails):
    path = llama2.language_dir / "tokenizer.model"
    path.write_bytes(b"\x0a\x05junk!")
    assert f"{path} is not a sentencepiece model" in fails(llama2)
    path.unlink()
    assert "holds no tokenizer.model" in fails(llama2)


# --- where the folder shall be -----------------------------------------------------------------


def test_out_exists(llama2, tmp_path):
    convert(llama2, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"out is a model folder already.*--force"):
        convert(llama2, tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists and is not a folder"):
        convert(llama2, llama2.vision, force=True)


def test_a_full_disk_is_seen_before_it_is_full(llama2, fails, monkeypatch):
    free = writer.total_bytes({"x": WeightForm((1000, 1000), "float16")})
    monkeypatch.setattr(
        "minigpt4_runtime.checkpoint.folder.shutil.disk_usage",
        lambda _: type("Usage", (), {"free": free})(),
    )
    message = fails(llama2, dtype="float16")
    assert (
        "has no room: the model needs 7.1 MiB, and 1.9 MiB are free: 5.2 MiB are missing. Free"
    ) in message
