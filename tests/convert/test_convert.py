"""Published files → a model folder: every weight, every variant, every form of the files."""

import hashlib
import json
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest
import torch
from published_files import (
    GOLDENS,
    edit,
    edit_json,
    files_of,
    read_language,
    read_published,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minigpt4_runtime.checkpoint import writer
from minigpt4_runtime.checkpoint.blank_model import model_shapes
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.load import load_model
from minigpt4_runtime.convert import convert as convert_module
from minigpt4_runtime.convert import key_map, recipe, verify
from minigpt4_runtime.convert.convert import Conversion, convert
from minigpt4_runtime.errors import CheckpointError, ConfigError
from minigpt4_runtime.model.eva_vit import resize_positions
from minigpt4_runtime.model.rotary import rotary_speeds

# Ours → published, written independently of the key map.
REVERSED = [
    (r"vision\.vit\.patch_embedding\.", "patch_embed.proj."),
    (r"vision\.vit\.blocks\.(\d+)\.attention_norm\.", r"blocks.\1.norm1."),
    (r"vision\.vit\.blocks\.(\d+)\.mlp_norm\.", r"blocks.\1.norm2."),
    (r"vision\.vit\.blocks\.(\d+)\.attention\.qkv\.", r"blocks.\1.attn.qkv."),
    (r"vision\.vit\.blocks\.(\d+)\.attention\.out\.", r"blocks.\1.attn.proj."),
    (r"vision\.vit\.blocks\.(\d+)\.mlp_in\.", r"blocks.\1.mlp.fc1."),
    (r"vision\.vit\.blocks\.(\d+)\.mlp_out\.", r"blocks.\1.mlp.fc2."),
    (r"vision\.ln_vision\.", "ln_vision."),
    (r"vision\.qformer\.query_norm\.", "Qformer.bert.embeddings.LayerNorm."),
    (r"vision\.qformer\.layers\.", "Qformer.bert.encoder.layer."),
    (r"\.cross_attention\.", ".crossattention."),
    (r"(Qformer.*attention)\.(query|key|value)\.", r"\1.self.\2."),
    (r"(Qformer.*attention)\.out\.", r"\1.output.dense."),
    (r"(Qformer.*attention)\.norm\.", r"\1.output.LayerNorm."),
    (r"(Qformer.*)\.mlp_in\.", r"\1.intermediate_query.dense."),
    (r"(Qformer.*)\.mlp_out\.", r"\1.output_query.dense."),
    (r"(Qformer.*)\.mlp_norm\.", r"\1.output_query.LayerNorm."),
    (r"vision\.projection\.", "llama_proj."),
    (r"language\.token_embedding\.", "model.embed_tokens."),
    (r"language\.head\.", "lm_head."),
    (r"language\.norm\.", "model.norm."),
    (r"language\.(layers\.\d+)\.attention_norm\.", r"model.\1.input_layernorm."),
    (r"language\.(layers\.\d+)\.mlp_norm\.", r"model.\1.post_attention_layernorm."),
    (r"language\.(layers\.\d+)\.mlp_(gate|up|down)\.", r"model.\1.mlp.\2_proj."),
    (r"language\.(layers\.\d+)\.attention\.query\.", r"model.\1.self_attn.q_proj."),
    (r"language\.(layers\.\d+)\.attention\.key\.", r"model.\1.self_attn.k_proj."),
    (r"language\.(layers\.\d+)\.attention\.value\.", r"model.\1.self_attn.v_proj."),
    (r"language\.(layers\.\d+)\.attention\.out\.", r"model.\1.self_attn.o_proj."),
]


def all_published(files) -> dict[str, torch.Tensor]:
    tensors = read_language(files.language_dir) | read_published(files.vision)
    if files.qformer is not None:
        tensors |= read_published(files.qformer)
    return tensors | read_published(files.projection)


def expected_weight(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    whole = {
        "vision.vit.class_embedding": "cls_token",
        "vision.vit.position_embedding": "pos_embed",
        "vision.qformer.query_tokens": "query_tokens",
    }
    if name in whole:
        return tensors[whole[name]].reshape(-1, tensors[whole[name]].shape[-1]).squeeze()
    if name == "vision.vit.patch_embedding.weight":
        return tensors["patch_embed.proj.weight"].flatten(1)
    if match := re.fullmatch(r"vision\.vit\.blocks\.(\d+)\.attention\.qkv\.bias", name):
        query, value = (tensors[f"blocks.{match[1]}.attn.{part}_bias"] for part in "qv")
        return torch.cat([query, torch.zeros(len(query), dtype=query.dtype), value])
    published = name
    for pattern, replacement in REVERSED:
        published = re.sub(pattern, replacement, published)
    if published == "ln_vision.weight" and published not in tensors:
        return torch.ones(tensors["cls_token"].shape[-1])
    if published == "ln_vision.bias" and published not in tensors:
        return torch.zeros(tensors["cls_token"].shape[-1])
    return tensors[published]


@dataclass(frozen=True)
class Converted:
    """A golden that was converted and verified, and the steps of its progress."""

    folder: Path
    conversion: Conversion
    steps: list[tuple[str, int, int]]

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model.safetensors")

    def read_bytes(self) -> bytes:
        return (self.folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Callable[..., Converted]:
    """Converts a golden once for each dtype and image size. Do not change the folders."""

    @cache
    def run(variant, dtype=None, image_size=None):
        files = files_of(variant, GOLDENS / variant / "checkpoint")
        folder, steps = tmp_path_factory.mktemp(variant) / "out", []
        conversion = convert(
            files, folder, dtype=dtype, image_size=image_size, verify=True,
            progress=lambda *step: steps.append(step),
        )  # fmt: skip
        return Converted(folder, conversion, steps)

    return run


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_weight_is_the_published_one_rounded(published, variant, dtype, converted):
    found = converted(variant, dtype)
    conversion, written, tensors = found.conversion, found.weights, all_published(published)
    assert {name: tuple(weight.shape) for name, weight in written.items()} == model_shapes(
        conversion.config
    )
    for name, weight in written.items():
        assert weight.dtype == getattr(torch, dtype)
        assert torch.equal(weight, expected_weight(name, tensors).to(weight.dtype)), name
    assert conversion.manifest.dtypes == (dtype,)


def test_without_a_dtype_nothing_is_rounded(published, variant, converted):
    found = converted(variant)
    conversion, written, tensors = found.conversion, found.weights, all_published(published)
    assert {name: tuple(weight.shape) for name, weight in written.items()} == model_shapes(
        conversion.config
    )
    for name, weight in written.items():
        expected = expected_weight(name, tensors)
        assert weight.dtype == expected.dtype, name
        # As bits: to `equal`, -0.0 would be 0.0.
        bits = [each.contiguous().view(torch.uint8) for each in (weight, expected)]
        assert torch.equal(*bits), name
    assert conversion.manifest.dtypes == ("float16", "float32")
    assert conversion.num_bytes == sum(weight.nbytes for weight in written.values())


def test_without_a_dtype_a_model_in_float32_is_the_same(variant, converted):
    own, wide = (
        load_model(each.folder, device=torch.device("cpu"), dtype=torch.float32).state_dict()
        for each in (converted(variant), converted(variant, "float32"))
    )
    assert own.keys() == wide.keys()
    assert all(torch.equal(own[name], wide[name]) for name in own)


def test_every_dtype_survives_and_what_is_made_of_two_takes_the_wider(vicuna, tmp_path):
    bias, norm = "blocks.1.attn.{}_bias", "Qformer.bert.embeddings.LayerNorm.weight"

    def widen(tensors):
        tensors[bias.format("v")] = torch.rand(176)
        tensors["pos_embed"] = tensors["pos_embed"].bfloat16()

    edit(vicuna.vision, widen)
    edit(vicuna.qformer, lambda t: t.update({norm: t[norm].bfloat16()}))
    conversion = convert(vicuna, tmp_path / "out", verify=True)
    written, tensors = load_file(tmp_path / "out" / "model.safetensors"), all_published(vicuna)
    assert conversion.manifest.dtypes == ("bfloat16", "float16", "float32")
    joined = written["vision.vit.blocks.1.attention.qkv.bias"]
    query, key, value = joined.chunk(3)
    assert joined.dtype == torch.float32
    assert torch.equal(query, tensors[bias.format("q")].float())
    assert not key.any()
    assert torch.equal(value, tensors[bias.format("v")])
    assert torch.equal(written["vision.qformer.query_norm.weight"], tensors[norm])
    assert torch.equal(written["vision.vit.position_embedding"], tensors["pos_embed"][0])


def test_the_config_is_read_from_the_shapes(published, variant, converted):
    config = load_config(converted(variant).folder)
    assert config.template == variant
    assert (config.vision.image_size, config.vision.patch_size) == (56, 14)
    assert (config.vision.hidden_size, config.vision.num_attention_heads) == (176, 2)
    assert (config.vision.num_hidden_layers, config.vision.intermediate_size) == (3, 768)
    assert (config.qformer is None) == (variant == "llama2")
    if config.qformer is not None:
        assert (config.qformer.num_query_tokens, config.qformer.num_hidden_layers) == (8, 4)
        assert (config.qformer.cross_attention_frequency, config.qformer.layer_norm_eps) == (
            2,
            1e-12,
        )
        assert config.qformer.num_attention_heads == 4
    language = json.loads((published.language_dir / "config.json").read_text("utf-8"))
    for name in ("hidden_size", "intermediate_size", "rms_norm_eps", "vocab_size"):
        assert getattr(config.language, name) == language[name]


def test_the_folder_holds_what_it_should(published, variant, converted):
    folder = converted(variant).folder
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "manifest.json", "model.safetensors", "tokenizer.model"}
    tokenizer = (folder / "tokenizer.model").read_bytes()
    assert tokenizer == (published.language_dir / "tokenizer.model").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert manifest["format_version"] == 1
    assert manifest["weight_format"] == "float"
    assert manifest["dtypes"] == ["float16", "float32"]
    assert manifest["made_by"].startswith("minigpt4-runtime ")
    by_name = {(source["role"], source["name"]): source for source in manifest["sources"]}
    record = by_name["vision", "eva_vit_g.pth"]
    content = published.vision.read_bytes()
    assert record["size"] == len(content)
    assert record["sha256"] == hashlib.sha256(content).hexdigest()
    assert ("language", "pytorch_model-00004-of-00004.bin") in by_name
    assert (("bert", "config.json") in by_name) == (published.bert_dir is not None)


def test_the_same_files_give_the_same_bytes(published, variant, converted, tmp_path):
    convert(published, tmp_path / "again")
    for path in converted(variant).folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_shards(published, variant, converted, tmp_path):
    convert(published, tmp_path / "out", max_shard_bytes=500_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text("utf-8"))
    whole = converted(variant).weights
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert len(files) > 4
    assert set(index["weight_map"]) == set(whole)
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in whole.values())
    for path in files:
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 — A safe_open cannot be iterated.
                assert index["weight_map"][name] == path.name
                assert torch.equal(shard.get_tensor(name), whole[name])
        header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
        assert (8 + header_bytes) % 64 == 0
        assert path.stat().st_size <= 500_000 + 8 + header_bytes


def test_small_pieces_make_the_same_files(variant, published, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK_ITEMS", 1000)
    convert(published, tmp_path / "out", verify=True)
    whole = converted(variant).read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(("dtype", "verify"), [(None, False), (None, True), ("float32", True)])
def test_progress_reaches_the_total(published, variant, dtype, verify, converted, tmp_path):
    steps: list[tuple[str, int, int]] = []
    if verify:
        steps = converted(variant, dtype).steps
    else:
        convert(published, tmp_path / "out", progress=lambda *step: steps.append(step))
    stages, done, totals = zip(*steps, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]}
    expected = ["reading", "writing", *(["comparing", "computing"] if verify else [])]
    assert list(dict.fromkeys(stages)) == expected


# --- forms in which the language model comes --------------------------------------------------


def replace_language(files, tensors, form: str) -> None:
    """Write the language model anew, in another form."""
    for path in files.language_dir.glob("pytorch_model*"):
        path.unlink()
    folder, names = files.language_dir, sorted(tensors)
    halves = [
        {name: tensors[name].contiguous() for name in part}
        for part in (names[: len(names) // 2], names[len(names) // 2 :])
    ]
    if form == "one bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif form == "bins without an index":
        for number, half in enumerate(halves, start=1):
            torch.save(half, folder / f"pytorch_model-{number:05d}-of-00002.bin")
    elif form == "one safetensors":
        save_file(halves[0] | halves[1], folder / "model.safetensors")
    else:
        weight_map = {}
        for number, half in enumerate(halves, start=1):
            name = f"model-{number:05d}-of-00002.safetensors"
            save_file(half, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(half, name)
        if form == "indexed safetensors":
            (folder / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": weight_map})
            )


@pytest.mark.parametrize(
    "form",
    [
        "one bin", "bins without an index", "one safetensors", "indexed safetensors",
        "safetensors without an index",
    ],
)  # fmt: skip
def test_forms_of_the_language_model(llama2, form, converted, tmp_path):
    replace_language(llama2, read_language(llama2.language_dir), form)
    convert(llama2, tmp_path / "out", verify=True)
    before = converted("llama2").weights
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_safetensors_are_preferred_to_pickles(llama2, tmp_path):
    tensors = read_language(llama2.language_dir)
    contiguous = {name: weight.contiguous() for name, weight in tensors.items()}
    save_file(contiguous, llama2.language_dir / "model.safetensors")
    conversion = convert(llama2, tmp_path / "out")
    names = {source.name for source in conversion.manifest.sources}
    assert "model.safetensors" in names
    assert not any(name.endswith(".bin") for name in names)


def change_language_config(files, **changes) -> None:
    edit_json(files.language_dir / "config.json", **changes)


def test_shared_key_value_heads(llama2, tmp_path):
    tensors = read_language(llama2.language_dir)
    for name in tensors:
        if "k_proj" in name or "v_proj" in name:
            tensors[name] = tensors[name][:32]
    replace_language(llama2, tensors, "one bin")
    change_language_config(llama2, num_key_value_heads=2)
    conversion = convert(llama2, tmp_path / "out", verify=True)
    assert conversion.config.language.num_key_value_heads == 2


@pytest.mark.parametrize("has_head", [True, False])
def test_tied_head(llama2, has_head, tmp_path):
    tensors = read_language(llama2.language_dir)
    if not has_head:
        del tensors["lm_head.weight"]
    replace_language(llama2, tensors, "one bin")
    change_language_config(llama2, tie_word_embeddings=True)
    convert(llama2, tmp_path / "out", verify=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["language.head.weight"], written["language.token_embedding.weight"])
    assert torch.equal(written["language.head.weight"], tensors["model.embed_tokens.weight"])


def test_settings_that_may_be_absent(llama2, tmp_path):
    change_language_config(
        llama2, num_key_value_heads=..., max_position_embeddings=..., hidden_act=...,
        tie_word_embeddings=..., architectures=["LLaMAForCausalLM"], rope_scaling=None,
    )  # fmt: skip
    language = convert(llama2, tmp_path / "out").config.language
    assert (language.num_key_value_heads, language.max_position_embeddings) == (4, 2048)
    assert language.rope_theta == 10000.0


@pytest.mark.parametrize(
    "changes",
    [{"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}],
)
def test_rope_theta(llama2, changes, tmp_path):
    change_language_config(llama2, **changes)
    assert convert(llama2, tmp_path / "out", verify=True).config.language.rope_theta == 5e5


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "ntk"])
def test_stretched_positions_are_verified_and_written(llama2, kind, tmp_path):
    change_language_config(llama2, rope_scaling={"type": kind, "factor": 4})
    config = convert(llama2, tmp_path / "out", verify=True).config
    assert config.language.context_length == 4 * 2048
    assert load_config(tmp_path / "out") == config
    written = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["text_config"]
    # Here, for it takes seconds, also of those who only collect tests.
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(LlamaConfig(**written))
    speeds = rotary_speeds(config.language, torch.device("cpu"))
    torch.testing.assert_close(speeds, theirs.inv_freq, rtol=1e-5, atol=0)
    assert theirs.attention_scaling == pytest.approx(1.1386294 if kind == "yarn" else 1.0)


def test_tensors_that_lie_crosswise_or_share_a_storage(llama2, converted, tmp_path):
    tensors = read_language(llama2.language_dir)
    replace_language(llama2, tensors, "one bin")
    crosswise = {
        name: weight.T.contiguous().T if weight.dim() == 2 else weight
        for name, weight in tensors.items()
    }
    together = torch.stack([tensors[f"model.layers.{n}.input_layernorm.weight"] for n in range(3)])
    for n in range(3):
        crosswise[f"model.layers.{n}.input_layernorm.weight"] = together[n]
    torch.save(crosswise, llama2.language_dir / "pytorch_model.bin")
    convert(llama2, tmp_path / "out", verify=True)
    whole = converted("llama2").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole


# --- what a projection file may hold more ------------------------------------------------------


def test_a_flat_projection(vicuna, tmp_path):
    torch.save({**read_published(vicuna.projection), "epoch": 3}, vicuna.projection)
    convert(vicuna, tmp_path / "out", verify=True)


def test_a_fine_tunes_own_tensors_replace_the_published_ones(vicuna, tmp_path):
    layer = "Qformer.bert.encoder.layer.1.attention.self.query.weight"
    own = {
        "ln_vision.weight": torch.full((176,), 2.0),
        "ln_vision.bias": torch.full((176,), 0.5),
        "query_tokens": torch.randn(1, 5, 48),
        layer: torch.randn(48, 48),
    }
    buffers = {
        "llama_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "Qformer.bert.embeddings.position_ids": torch.arange(64)[None],
    }
    edit(vicuna.projection, lambda tensors: tensors.update(own | buffers))
    conversion = convert(vicuna, tmp_path / "out", dtype="float32", verify=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert conversion.config.rows_per_image == 5
    assert torch.equal(written["vision.ln_vision.bias"], own["ln_vision.bias"])
    assert torch.equal(written["vision.qformer.query_tokens"], own["query_tokens"][0])
    assert torch.equal(written["vision.qformer.layers.1.attention.query.weight"], own[layer])
    published = read_published(vicuna.qformer)["Qformer.bert.embeddings.LayerNorm.weight"]
    assert torch.equal(written["vision.qformer.query_norm.weight"], published)


def test_a_llama2_projection_with_its_own_ln_vision(llama2, tmp_path):
    own = {"ln_vision.weight": torch.rand(176), "ln_vision.bias": torch.rand(176)}
    edit(llama2.projection, lambda tensors: tensors.update(own))
    convert(llama2, tmp_path / "out", dtype="float32", verify=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["vision.ln_vision.weight"], own["ln_vision.weight"])


def test_another_image_size(published, variant, converted):
    found = converted(variant, image_size=112)
    conversion = found.conversion
    assert conversion.config.vision.image_size == 112
    assert conversion.config.rows_per_image == (8 if variant == "vicuna" else 16)
    table = read_published(published.vision)["pos_embed"][0]
    assert table.dtype == torch.float16
    written = found.weights["vision.vit.position_embedding"]
    assert written.dtype == torch.float32
    assert torch.equal(written, resize_positions(table.float(), 64))


def test_an_image_size_that_patches_do_not_fill(published, tmp_path):
    with pytest.raises(ConfigError, match="image_size 100 is not a multiple"):
        convert(published, tmp_path / "out", image_size=100)


def test_an_unknown_dtype(published, tmp_path):
    with pytest.raises(ConfigError, match="'int8'; it must be one of float32, float16, bfloat16"):
        convert(published, tmp_path / "out", dtype="int8")


# --- --verify ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "image_size"),
    [(None, None), ("float32", None), ("float16", None), ("bfloat16", None), (None, 112),
     ("float16", 112)],
)  # fmt: skip
def test_verify_computes_both_sides(variant, dtype, image_size, converted):
    conversion = converted(variant, dtype, image_size).conversion
    verification = conversion.verification
    assert verification.num_weights == len(model_shapes(conversion.config))
    assert 0 < verification.rows_difference < 1e-5
    assert 0 < verification.logits_difference < 1e-5


@pytest.mark.parametrize(
    ("table", "first", "second", "what"),
    [
        ("_LANGUAGE_LAYER", "mlp.gate_proj", "mlp.up_proj", "logits"),
        ("_LANGUAGE_LAYER", "input_layernorm", "post_attention_layernorm", "logits"),
        ("_VISION_BLOCK", "norm1", "norm2", "image rows"),
    ],
)
def test_verify_finds_a_wrong_key_map(published, table, first, second, what, tmp_path, monkeypatch):
    entries = dict(getattr(key_map, table))
    entries[first], entries[second] = entries[second], entries[first]
    monkeypatch.setattr(key_map, table, entries)
    with pytest.raises(CheckpointError, match=f"{what} differ from the original's"):
        convert(published, tmp_path / "out", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_verify_finds_a_wrong_bias(published, tmp_path, monkeypatch):
    def swap(tensors):
        query, value = tensors
        return torch.cat([value, torch.zeros_like(query), query])

    monkeypatch.setattr(key_map, "_join_biases", swap)
    with pytest.raises(CheckpointError, match="image rows differ"):
        convert(published, tmp_path / "out", verify=True)


def test_verify_finds_a_flipped_bit(published, tmp_path, monkeypatch):
    describe = convert_module.write_descriptions

    def flip_and_describe(folder, *rest):
        describe(folder, *rest)
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-5, 2)
            (byte,) = file.read(1)
            file.seek(-5, 2)
            file.write(bytes([byte ^ 1]))

    monkeypatch.setattr(convert_module, "write_descriptions", flip_and_describe)
    with pytest.raises(CheckpointError, match=r"vision\.projection\.bias on the disk differs from"):
        convert(published, tmp_path / "out", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_verify_takes_a_nan_for_a_difference():
    with pytest.raises(CheckpointError, match="differ"):
        verify._compare("logits", torch.tensor([float("nan")]), torch.ones(1))


def test_one_published_file_is_open_at_a_time(published, tmp_path, monkeypatch):
    """A mapped file counts as memory until its last tensor goes, so the next must wait for that."""
    alive: list[weakref.ref] = []
    real = recipe.open_tensors

    def open_and_watch(path):
        assert [ref() for ref in alive if ref() is not None] == [], f"open beside {path}"
        tensors = real(path)
        alive.extend(weakref.ref(tensor.untyped_storage()) for tensor in tensors.values())
        return tensors

    monkeypatch.setattr(recipe, "open_tensors", open_and_watch)
    convert(published, tmp_path / "out", dtype="float32")
    assert alive


def test_a_missing_bert_setting_has_berts_default(vicuna, tmp_path):
    edit_json(vicuna.bert_dir / "config.json", layer_norm_eps=...)
    assert convert(vicuna, tmp_path / "out").config.qformer.layer_norm_eps == 1e-12
