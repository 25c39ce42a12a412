"""`minigpt4 merge` with the checkpoints of the original's training, both ways."""

import pytest
import torch
from adapter_folders import write_lora, write_projection
from golden_cases import GOLDENS
from safetensors.torch import load_file

from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.manifest import SourceRecord, read_manifest

CHECKPOINT = GOLDENS / "llama2-gqa/checkpoint/pretrained_minigpt4_llama2_7b.pth"


@pytest.fixture(scope="module")
def base(golden_model_dir):
    return golden_model_dir("llama2-gqa")


def fine_tune(path, **more):
    """A checkpoint as the original's training saves one, with what it saves beside the model."""
    content = torch.load(CHECKPOINT, weights_only=True) | {"iters": 200}
    content["model"] = {n: w + 0.25 for n, w in content["model"].items()} | more
    torch.save(content, path)
    return content["model"]


def test_a_fine_tune_of_the_original_goes_in_and_out(real_minigpt4, base, tmp_path):
    tensors = fine_tune(tmp_path / "checkpoint_0.pth")
    given = ["merge", base, "--adapter", tmp_path / "checkpoint_0.pth"]
    out, again = tmp_path / "merged", tmp_path / "again.pth"
    done = real_minigpt4(*given, "--out", out, "--export-original", again)
    assert (done.status, done.out.split()) == (0, [str(out), str(again)]), done.err
    merged = load_file(out / "model.safetensors")
    source = read_manifest(out).sources[-1]
    # A folder that was there for this while is not named, but what was given.
    assert source == SourceRecord.of("adapter", tmp_path / "checkpoint_0.pth")
    assert read_manifest(out).sources == (*read_manifest(base).sources, source)
    exported = torch.load(again, weights_only=True)
    assert exported.keys() == {"model", "config"}
    assert exported["model"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(merged[name.replace("llama_proj", "vision.projection")], tensor.float())
        assert torch.equal(exported["model"][name], tensor.float())
    asked = ["describe", GOLDENS / "llama2-gqa/images/bit1.png", "--max-new-tokens", 8]
    said = [
        real_minigpt4(*asked, "--model", base, "--adapter", again),
        real_minigpt4(*asked, "--model", out),
        real_minigpt4(*asked, "--model", base),
    ]
    assert said[0].out == said[1].out != said[2].out
    write_projection(tmp_path / "projection.safetensors", base, seed=1)
    given = ["merge", base, "--adapter", tmp_path / "projection.safetensors"]
    # The checkpoint that is read may be the only one, with more in it than goes out.
    before = again.read_bytes()
    taken = real_minigpt4(*given, "--out", tmp_path / "late", "--export-original", again)
    assert (taken.status, "is there already" in taken.err) == (1, True)
    assert (again.read_bytes(), taken.out) == (before, "")
    assert real_minigpt4(*given, "--export-original", again, "--force").status == 0
    ours = load_file(tmp_path / "projection.safetensors")["vision.projection.weight"]
    assert torch.equal(torch.load(again, weights_only=True)["model"]["llama_proj.weight"], ours)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again.pth", "checkpoint_0.pth", "merged", "projection.safetensors",
    ]  # fmt: skip


def test_what_cannot_be(real_minigpt4, base, golden_model_dir, tmp_path):
    write_lora(tmp_path / "lora", load_config(base).language, seed=0)
    path, with_lora = tmp_path / "tuned.pth", tmp_path / "lora.pth"
    lora = {"llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight":
            torch.ones(2, 2)}  # fmt: skip
    fine_tune(path)
    fine_tune(with_lora, **lora)
    out = ["--export-original", tmp_path / "x.pth"]
    for model, adapter, given, message in (
        (base, tmp_path / "lora", [], "Nothing is to be made"),
        (base, with_lora, out, "has only one of two LoRA factors"),
        (golden_model_dir("vicuna"), path, out, "Give the model that it was"),
        (base, path, ["--export-original", tmp_path / "no/x.pth"], "cannot be written"),
        (base, path, ["--out", tmp_path / "y", "--export-original", tmp_path / "lora", "--force"],
         "lora is a folder. Name a file"),
        (tmp_path / "gone", tmp_path / "lora", ["--out", tmp_path / "y"],
         "gone does not exist. Give a folder that `minigpt4 convert` made"),
    ):  # fmt: skip
        done = real_minigpt4("merge", model, "--adapter", adapter, *given)
        assert (done.status != 0, message in done.err) == (True, True), done.err
    assert not (tmp_path / "x.pth").exists()
    assert not (tmp_path / "y").exists()
