"""`minigpt4 convert` and `minigpt4 inspect`, and what a folder says about itself."""

import json
import shutil
import subprocess
import sys

import pytest
import typer
from published_files import GOLDENS, files_of
from typer.testing import CliRunner

from minigpt4_runtime.checkpoint.blank_model import model_shapes
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.report import inspect_folder
from minigpt4_runtime.checkpoint.weights import show_bytes
from minigpt4_runtime.cli.convert import convert as convert_command
from minigpt4_runtime.cli.inspect import inspect as inspect_command
from minigpt4_runtime.convert.convert import convert
from minigpt4_runtime.errors import CheckpointError

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
app.command()(convert_command)
app.command()(inspect_command)


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# --- inspect -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["vicuna", "llama2", "minigptv2"])
def test_the_numbers_add_up(published, variant, tmp_path):
    convert(published, tmp_path / "out", dtype="bfloat16", max_shard_bytes=500_000)
    report, config = inspect_folder(tmp_path / "out"), load_config(tmp_path / "out")
    sizes = {name: shape.numel() for name, shape in _torch_sizes(config).items()}
    assert report.num_parameters == sum(sizes.values())
    assert report.num_bytes == 2 * report.num_parameters
    assert (report.variant, report.template) == (variant, variant)
    assert (report.dtypes, report.weight_format) == (("bfloat16",), "float")
    assert report.rows_per_image == config.rows_per_image
    towers = {tower.name: tower for tower in report.towers}
    assert ("qformer" in towers) == (variant == "vicuna")
    assert all(tower.dtypes == ("bfloat16",) for tower in report.towers)
    projection = [size for name, size in sizes.items() if name.startswith("vision.projection.")]
    assert towers["projection"].num_parameters == sum(projection)
    language = config.language
    numbers = 2 * language.num_hidden_layers * language.num_key_value_heads * language.head_dim
    assert report.token_bytes["float16"] == 2 * numbers
    held = [f"{2**30 // report.token_bytes[name]:,} tokens in {name}" for name in ("int8", "int4")]
    assert dict(report.facts())["a GiB holds"].endswith(", ".join(held))
    layers = 2 if variant == "minigptv2" else 3
    assert towers["vision"].sizes == {"width": 176, "layers": layers, "heads": 2}
    assert report.num_files == len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def _torch_sizes(config):
    import torch

    return {name: torch.Size(shape) for name, shape in model_shapes(config).items()}


def test_inspect_prints_tables(vicuna_folder):
    done = run("inspect", vicuna_folder)
    assert done.exit_code == 0
    for said in (
        str(vicuna_folder), "vicuna (with a Q-Former)", "56 pixels a side, 8 rows", "float16",
        "width 176, layers 3, heads 2", "1,715,360", "pretrained_minigpt4_7b.pth", "sha256",
    ):  # fmt: skip
        assert said in done.stdout
    assert done.stderr == ""


def test_inspect_says_how_positions_are_told_apart(vicuna_folder, tmp_path):
    shown = run("inspect", vicuna_folder).stdout
    assert "rotary, base 10000 " in shown
    assert "stretched" not in shown
    shutil.copytree(vicuna_folder, folder := tmp_path / "stretched")
    values = json.loads((folder / "config.json").read_text("utf-8"))
    scaling = {"rope_type": "yarn", "factor": 4.0}
    values["text_config"]["rope_scaling"] = scaling
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    shown = run("inspect", folder).stdout
    assert "8192 tokens, vocabulary" in shown
    assert "rotary, base 10000, stretched by yarn:4 from 2048 tokens" in shown
    said = json.loads(run("inspect", folder, "--json").stdout)
    assert said["context_length"] == 8192
    assert said["rope_scaling"].items() >= scaling.items()


def test_inspect_prints_json(vicuna_folder):
    done = run("inspect", vicuna_folder, "--json")
    values = json.loads(done.stdout)
    assert values["variant"] == "vicuna"
    assert values["num_parameters"] == 1715360
    assert [tower["name"] for tower in values["towers"]] == [
        "vision", "qformer", "projection", "language",
    ]  # fmt: skip
    assert len(values["sources"][0]["sha256"]) == 64


def test_inspect_of_several_dtypes(mixed_folder):
    assert "float (float16, float32), files: 1" in run("inspect", mixed_folder).stdout
    values = json.loads(run("inspect", mixed_folder, "--json").stdout)
    assert values["dtypes"] == ["float16", "float32"]
    assert {tower["name"]: tower["dtypes"] for tower in values["towers"]} == {
        "vision": ["float16", "float32"],
        "qformer": ["float32"],
        "projection": ["float32"],
        "language": ["float16"],
    }


def test_inspect_of_something_else(tmp_path):
    done = run("inspect", tmp_path)
    assert isinstance(done.exception, CheckpointError)
    assert "`minigpt4 convert` first" in str(done.exception)


def test_inspect_loads_no_torch(vicuna_folder):
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from minigpt4_runtime.cli import convert, inspect\n"
        "inspect.inspect(Path(sys.argv[1]), as_json=True)\n"
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, vicuna_folder],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# --- convert -----------------------------------------------------------------------------------


def flags(variant: str) -> list[object]:
    files = files_of(variant, GOLDENS / variant / "checkpoint")
    given = ["--language", files.language_dir, "--vision", files.vision]
    given += ["--projection", files.projection]
    if files.qformer is not None:
        given += ["--qformer", files.qformer, "--bert", files.bert_dir]
    return given


@pytest.mark.parametrize("variant", ["vicuna", "llama2", "minigptv2"])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_convert_says_what_it_made(variant, dtype, tmp_path):
    out_dir = tmp_path / "my model"
    given = [] if dtype is None else ["--dtype", dtype]
    done = run("convert", *flags(variant), "--out", out_dir, "--verify", *given)
    assert done.exit_code == 0, done.exception
    assert done.stdout == f"{out_dir}\n"
    made, *doubt, verified, tip = done.stderr.splitlines()
    name = {"vicuna": "Vicuna", "llama2": "Llama-2", "minigptv2": "MiniGPT-v2"}[variant]
    size = show_bytes(inspect_folder(out_dir).num_bytes)
    held = "float32" if dtype else "float16 and float32"
    assert made == f"The {name} variant, {size} of {held} weights."
    # Its golden file has no config.model.arch.
    assert [line.partition(" taken for ")[2][:7] for line in doubt] == (
        ["the Lla"] if variant == "llama2" else []
    )
    num_weights = len(model_shapes(load_config(out_dir)))
    rounded = " in float32" if dtype else ""
    assert verified.startswith(f"Verified: all {num_weights} weights are the published ones")
    assert f"the published ones{rounded}. Computed from both, an image's rows differ" in verified
    assert tip == f"Try it: minigpt4 describe PICTURE --model '{out_dir}'"
    assert inspect_folder(out_dir).dtypes == ((dtype,) if dtype else ("float16", "float32"))


def test_convert_passes_every_flag_on(tmp_path):
    out_dir = tmp_path / "out"
    assert run("convert", *flags("llama2"), "--out", out_dir).exit_code == 0
    again = run("convert", *flags("llama2"), "--out", out_dir)
    assert isinstance(again.exception, CheckpointError)
    assert "--force" in str(again.exception)
    done = run("convert", *flags("llama2"), "--out", out_dir, "--force", "--image-size", "112")
    assert done.exit_code == 0
    assert inspect_folder(out_dir).image_size == 112


@pytest.mark.parametrize("given", [["--dtype", "int8"], ["--image-size", "0"], ["--nonsense"]])
def test_wrong_usage(given, tmp_path):
    assert run("convert", *flags("llama2"), "--out", tmp_path / "out", *given).exit_code == 2
