"""What the original's training saves, as an adapter; and an adapter as what it saves."""

import json
import tempfile

import pytest
import torch
from adapter_folders import write_lora, write_projection
from published_files import GOLDENS, copy_golden, edit, read_published
from safetensors.torch import load_file, save_file

from minigpt4_runtime import CheckpointError, MiniGPT4, SamplingParams
from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.checkpoint.adapter import NAMES, encode_adapter, read_adapter
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.graph_folder import vision_digest
from minigpt4_runtime.checkpoint.mapped import map_tensors
from minigpt4_runtime.checkpoint.merge import merge
from minigpt4_runtime.checkpoint.weights import read_folder_weights
from minigpt4_runtime.convert.convert import convert
from minigpt4_runtime.convert.fine_tune import own_adapter
from minigpt4_runtime.convert.wrapping import plain_names
from minigpt4_runtime.export.original import export_original
from minigpt4_runtime.quantise.choice import QuantisePlan
from minigpt4_runtime.quantise.quantise import quantise

SAMPLING = SamplingParams(max_new_tokens=12)
PREFIX = "llama_model.base_model.model.model.layers"


def ids_of(model_dir, picture, **adapters):
    """What a model says; with named adapters, what "mine" does."""
    name = "mine" if "adapters" in adapters else None
    with MiniGPT4.load(model_dir, device="cpu", dtype="float32", **adapters) as model:
        return model.describe(picture, sampling=SAMPLING, adapter=name).token_ids


@pytest.fixture(scope="module")
def tuned(golden_model_dir, tmp_path_factory):
    """An adapter of the golden with a Q-Former: projection, Q-Former and LoRA of two matrices."""
    model_dir = golden_model_dir("vicuna")
    folder = tmp_path_factory.mktemp("tuned")
    record = {"base": vision_digest(model_dir), "model": "vicuna", "made_by": "a test"}
    factors = write_lora(
        folder, load_config(model_dir).language, seed=0, alpha=9.0, record=record,
        targets=("self_attn.q_proj", "self_attn.v_proj"),
    )  # fmt: skip
    torch.manual_seed(1)
    own = map_tensors(read_folder_weights(model_dir))
    own = {
        name: tensor.float() + 0.1 * torch.randn(tensor.shape)
        for name, tensor in own.items()
        if name.startswith(("vision.qformer.", "vision.projection."))
    }
    weight, bias = (own.pop(name) for name in NAMES)
    (folder / "projection.safetensors").write_bytes(encode_adapter(weight, bias, record, own))
    return folder, factors


def test_an_adapter_goes_out_and_in_again(tuned, golden_model_dir, tmp_path):
    """Under the original's names and shapes, which its own files have; and it answers the same."""
    (folder, factors), model_dir = tuned, golden_model_dir("vicuna")
    path = tmp_path / "checkpoint.pth"
    needs = export_original(folder, model_dir, path)
    assert "lora_r: 3 and lora_alpha: 9 " in needs[0]
    assert "in minigpt_v2 alone" in needs[1]
    content = torch.load(path, weights_only=True)
    settings = content["config"]["model"]
    assert (settings["lora_r"], settings["lora_alpha"], settings["image_size"]) == (3, 9.0, 56)
    named = content["model"]
    published = {
        name: tensor
        for file in ("blip2_pretrained_flant5xxl.pth", "pretrained_minigpt4_7b.pth")
        for name, tensor in read_published(GOLDENS / "vicuna/checkpoint" / file).items()
    }
    # The original drops what texts alone go through (upstream: minigpt4.py, init_Qformer).
    dropped = ("position_ids", "word_embeddings.weight", "position_embeddings.weight")
    trained = {
        name: tensor.shape
        for name, tensor in published.items()
        if name.startswith(("Qformer.bert.", "query_tokens", "llama_proj"))
        and not name.endswith(dropped)
        and ".intermediate." not in name and not (".output." in name and "ttention" not in name)
    }  # fmt: skip
    lora = {name: tensor for name, tensor in named.items() if "lora" in name}
    assert {name: each.shape for name, each in named.items() if name not in lora} == trained
    saved = read_published(GOLDENS / "minigptv2/checkpoint/minigptv2_checkpoint.pth")
    known = {name for name in saved if "lora" in name}
    layers = {name for name in lora if name.startswith((f"{PREFIX}.0.", f"{PREFIX}.1."))}
    assert layers == {n for n in known if n.startswith((f"{PREFIX}.0.", f"{PREFIX}.1."))}
    for name, tensor in lora.items():
        assert torch.equal(tensor, factors[name.removeprefix("llama_model.")])
    picture = GOLDENS / "vicuna/images/photo_rgb.jpg"
    said = ids_of(model_dir, picture, adapter=folder)
    assert ids_of(model_dir, picture) != said
    assert ids_of(model_dir, picture, adapter=path) == said
    assert ids_of(model_dir, picture, adapters={"mine": str(path), "same": folder}) == said
    with own_adapter(path, model_dir) as again:
        made, wanted = (read_adapter(each / "projection.safetensors") for each in (again, folder))
        assert made[1] == wanted[1] | {"from": "checkpoint.pth"}
        tensors, same = map_tensors(made[0]), map_tensors(wanted[0])
        assert tensors.keys() == same.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in same.items())
    assert not again.exists()


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    """MiniGPT-v2, its LoRA kept or merged, and the files of a training that went on with that."""
    made = tmp_path_factory.mktemp("v2")
    files = copy_golden("minigptv2", made / "files")
    convert(files, made / "merged")
    convert(files, made / "kept", keep_lora=True)
    torch.manual_seed(2)

    def train(tensors):
        for name, tensor in tensors.items():
            if "lora_" in name or name.startswith("llama_proj"):
                tensors[name] = tensor + 0.3 * tensor.std() * torch.randn(tensor.shape)

    edit(files.projection, train)
    convert(files, made / "after")
    return made, files.projection


def test_a_fine_tune_of_minigpt_v2_takes_the_place_of_its_lora(v2, tmp_path):
    made, path = v2
    picture = GOLDENS / "minigptv2/images/photo_rgb.jpg"
    said = ids_of(made / "after", picture)
    assert ids_of(made / "kept", picture) != said
    assert ids_of(made / "kept", picture, adapter=path) == said
    with own_adapter(path, made / "kept") as adapter:
        merge(made / "kept", adapter, tmp_path / "merged")
    assert ids_of(tmp_path / "merged", picture) == said
    with pytest.raises(CheckpointError, match=r"has other LoRA merged .* convert --keep-lora"):
        MiniGPT4.load(made / "merged", adapter=path)
    with pytest.raises(CheckpointError, match="Give it alone, without a name"):
        MiniGPT4.load(made / "kept", adapters={"mine": path}, device="cpu")


def test_the_laboratory_reads_a_checkpoint_again(tmp_path, monkeypatch):
    """Where weights lie in the order of a kernel; and nothing of it is left behind."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    plan = QuantisePlan(weights="w4a16", image_side="keep")
    quantise(DEMO_MODEL_DIR, tmp_path / "small", plan)
    write_lora(tmp_path / "lora", load_config(DEMO_MODEL_DIR).language, seed=0)
    path = tmp_path / "tuned.pth"
    export_original(tmp_path / "lora", tmp_path / "small", path)
    logits = []
    for adapter in (tmp_path / "lora", path):
        with MiniGPT4.load(tmp_path / "small", adapter=adapter, device="cpu") as model:
            lab = model.lab()
            logits.append(lab.forward(lab.prompt("a red star")).logits)
    assert torch.equal(*logits)
    assert not list(temporary.iterdir())


def test_what_is_no_adapter_of_this_model(v2, golden_model_dir, tmp_path):
    vicuna, llama2 = golden_model_dir("vicuna"), golden_model_dir("llama2-gqa")
    plain = read_published(GOLDENS / "vicuna/checkpoint/pretrained_minigpt4_7b.pth")
    qformer = {
        name: tensor
        for name, tensor in read_published(
            GOLDENS / "vicuna/checkpoint/blip2_pretrained_flant5xxl.pth"
        ).items()
        if name.startswith(("Qformer", "query_tokens"))
    }
    low, high = (f"{PREFIX}.0.self_attn.q_proj.lora_{side}.default.weight" for side in "AB")
    factors = {low: torch.ones(2, 64), high: torch.ones(64, 2)}
    narrow = {**plain, "llama_proj.bias": torch.ones(3)}
    failed = {**plain, "llama_proj.bias": torch.full((64,), torch.nan)}
    numbers = {**plain, "llama_proj.bias": torch.ones(64, dtype=torch.int64)}
    partial = {**plain, **qformer}
    del partial["query_tokens"]
    outside = {f"{PREFIX.rpartition('.')[0]}.embed_tokens.lora_A.weight": torch.ones(2, 2)}
    cases = (
        (llama2, {**plain, **qformer}, {}, "holds more than an adapter of this model can: Qf"),
        (vicuna, partial, {}, "holds no query_tokens"),
        (vicuna, {"llama_proj.weight": plain["llama_proj.weight"]}, {}, "no llama_proj.bias"),
        (vicuna, qformer, {}, r"holds no llama_proj\.weight.* as --projection"),
        (vicuna, narrow, {}, r"llama_proj\.bias is 3, and that of .* is 64"),
        (vicuna, numbers, {}, "is of dtype int64"),
        (vicuna, failed, {}, r"llama_proj\.bias holds NaN .* Take an earlier checkpoint"),
        (vicuna, {**plain, low: factors[low]}, {}, "has only one of two LoRA factors"),
        (vicuna, {low: torch.ones(2, 3), high: torch.ones(64, 2)}, {}, "the factors of"),
        (vicuna, {**plain, **outside}, {}, "more than an adapter of this model can: .*embed_tok"),
        (vicuna, {low.removeprefix("llama_model."): factors[low]}, {}, "PEFT's own names"),
        (vicuna, plain, {"arch": "minigpt_v2"}, "was trained as minigpt_v2, and .* of minigpt4"),
        (vicuna, plain, {"minigpt4_tuned": json.dumps({"base": "x"})}, "has another digest"),
    )
    for number, (model_dir, tensors, settings, message) in enumerate(cases):
        path = tmp_path / f"{number}.pth"
        torch.save({"model": tensors, "config": {"model": settings}}, path)
        with pytest.raises(CheckpointError, match=message), own_adapter(path, model_dir):
            pass
    # What is wrong with the folder that is made of it is said of the file that was given.
    path = tmp_path / "large.pth"
    torch.save({"model": {**plain, "llama_proj.bias": torch.full((64,), 1e30)}}, path)
    with pytest.raises(CheckpointError, match=r"large\.pth holds a weight of 1e\+30"):
        MiniGPT4.load(vicuna, adapter=path, device="cpu", dtype="float16")
    torch.save({"model": factors}, tmp_path / "lora.pth")
    with own_adapter(tmp_path / "lora.pth", vicuna) as folder:
        found = load_file(folder / "adapter_model.safetensors")
        assert [each.shape for each in found.values()] == [(2, 64), (64, 2)]
        assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 16.0
        assert not (folder / "projection.safetensors").exists()


def test_ranks_that_the_original_has_not(golden_model_dir, tmp_path):
    model_dir = golden_model_dir("vicuna")
    write_lora(tmp_path, load_config(model_dir).language, seed=0, rank=2)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if "layers.0.self_attn.q_proj" in name]:
        tensors[name] = torch.cat([tensors[name]] * 2, 0 if "lora_A" in name else 1)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"of the ranks \[2, 4\], and the original has one"):
        export_original(tmp_path, model_dir, tmp_path / "x.pth")
    write_projection(tmp_path / "projection.safetensors", model_dir, seed=1)
    assert export_original(tmp_path / "projection.safetensors", model_dir, tmp_path / "x.pth") == []
    named = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
    assert list(plain_names(named)) == ["llama_proj.weight", "llama_proj.bias"]
