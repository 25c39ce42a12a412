"""`minigpt4 convert` on files that are published in unusual ways."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_tensors

GOLDEN = Path(__file__).parents[1] / "goldens" / "vicuna" / "checkpoint"


@pytest.fixture
def language_dir(tmp_path) -> Path:
    """A language model to be changed; its untouched copy is `GOLDEN / "llama"`."""
    return Path(shutil.copytree(GOLDEN / "llama", tmp_path / "llama"))


@pytest.fixture
def convert(real_minigpt4, language_dir, tmp_path):
    """Runs the command on the golden's other files."""

    def run(*more):
        return real_minigpt4("convert", *convert_options(language_dir, tmp_path / "out"), *more)

    return run


def convert_options(language_dir, out_dir):
    return (
        "--language", language_dir, "--vision", GOLDEN / "eva_vit_g.pth",
        "--qformer", GOLDEN / "blip2_pretrained_flant5xxl.pth",
        "--bert", GOLDEN / "bert-base-uncased",
        "--projection", GOLDEN / "pretrained_minigpt4_7b.pth", "--out", out_dir,
    )  # fmt: skip


def test_a_delta_is_added_to_its_base(convert, language_dir, tmp_path):
    for path in language_dir.glob("*.bin"):
        tensors = torch.load(path, weights_only=True)
        torch.save({name: torch.full_like(t, 0.002) for name, t in tensors.items()}, path)
    refused = convert()
    assert refused.status == 1
    assert f"{language_dir} holds delta weights" in refused.err
    assert "--base DIR" in refused.err
    assert convert("--base", GOLDEN / "llama").status == 0
    sources = json.loads((tmp_path / "out" / "manifest.json").read_text("utf-8"))["sources"]
    assert [source["role"] for source in sources].count("base") == 4


def test_a_later_vicuna_is_warned_of_on_stderr(convert, language_dir):
    path = language_dir / "config.json"
    values = json.loads(path.read_text("utf-8"))
    # A width of the published models, which these weights have not: the warning comes first.
    path.write_text(json.dumps({**values, "hidden_size": 4096, "_name_or_path": "vicuna-7b-v1.1"}))
    shown = convert()
    assert shown.out == ""
    assert "seems to be no Vicuna v0" in shown.err


def test_weights_are_quantised_as_they_are_written(convert, real_minigpt4, tmp_path):
    made = convert("--format", "w4a16", "--image-side", "keep")
    assert made.status == 0
    assert "w4a16-g32 in language.layers, w8a16 in language.head, float elsewhere." in made.err
    # The same as in two steps, to the last byte.
    one = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert convert("--force").status == 0
    two = real_minigpt4(
        "quantise", tmp_path / "out", "--format", "w4a16", "--image-side", "keep", "--out",
        tmp_path / "two",
    )  # fmt: skip
    assert two.status == 0
    assert load(one) == load((tmp_path / "two" / "model.safetensors").read_bytes())
    manifests = [json.loads((tmp_path / each / "manifest.json").read_text("utf-8"))
                 for each in ("out", "two")]  # fmt: skip
    assert manifests[0]["sources"] == manifests[1]["sources"] != []


def load(content):
    return {name: (each.dtype, each.tolist()) for name, each in load_tensors(content).items()}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "w4a16", "--verify"], "--verify compares floats, and --format rounds them"),
        (["--format", "w4a16", "--group-size", "128"], "64 inputs, as 128 does not divide them"),
        (["--head", "keep"], "--head and --image-side go with --format"),
    ],
)
def test_options_of_a_format_that_cannot_be(convert, tmp_path, options, said):
    refused = convert(*options)
    assert refused.status == 1
    assert said in refused.err
    assert not (tmp_path / "out").exists()


def test_a_conversion_loads_no_compiler(language_dir, tmp_path):
    """Torch's takes seconds to load, and some operations on the meta device ask for it."""
    code = (
        "import sys\n"
        "from minigpt4_runtime.cli.main import run\n"
        "try: run()\n"
        "except SystemExit as ending: print(ending.code, 'torch._dynamo' in sys.modules)"
    )
    options = convert_options(language_dir, tmp_path / "out")
    shown = subprocess.run(
        [sys.executable, "-c", code, "convert", *options], capture_output=True, text=True
    )
    assert shown.stdout.splitlines()[-1] == "0 False", shown.stderr
