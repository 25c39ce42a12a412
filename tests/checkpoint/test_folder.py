"""A model folder appears whole or not at all, and nobody's other folder is ever deleted."""

import errno
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from published_files import GOLDENS, copy_golden, files_of
from safetensors.torch import load_file

from minigpt4_runtime.checkpoint import folder as folder_module
from minigpt4_runtime.checkpoint import writer
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.folder import write_folder
from minigpt4_runtime.checkpoint.load import load_model
from minigpt4_runtime.checkpoint.manifest import SourceRecord, read_manifest
from minigpt4_runtime.cli import convert as convert_command
from minigpt4_runtime.cli.main import run
from minigpt4_runtime.convert.convert import convert
from minigpt4_runtime.errors import CheckpointError

LLAMA2 = files_of("llama2", GOLDENS / "llama2" / "checkpoint")


def fail_after(num_writes: int, error: BaseException):
    """A stand-in for writer._write_one that fails midway."""
    real, calls = writer._write_one, []

    def write_or_fail(*args, **kwargs):
        calls.append(1)
        if len(calls) > num_writes:
            raise error
        real(*args, **kwargs)

    return write_or_fail


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_where_a_volume_begins_is_refused_first(tmp_path, monkeypatch):
    """As a container's: it is empty, and the whole folder could not take its place."""
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(CheckpointError, match="name of a new folder in it"):
        folder_module.check_target(tmp_path, force=False)
    folder_module.check_target(tmp_path / "model", force=False)


def test_a_place_that_may_not_be_written_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    with pytest.raises(CheckpointError, match=r"Nothing can be written in .*Choose another --out"):
        folder_module.check_target(tmp_path / "new" / "folder", force=False)


def test_a_root_is_refused_as_any_other_folder():
    with pytest.raises(CheckpointError, match="--out"):
        folder_module.check_target(Path(Path.cwd().anchor), force=False)


def test_a_place_in_what_may_not_be_looked_into_is_refused(tmp_path, monkeypatch):
    """As in another user's home, where even asking what is there fails."""
    real = os.stat

    def refuse(path, **how):
        if tmp_path in Path(path).parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, **how)

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(os, "lstat", refuse)
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    with pytest.raises(CheckpointError, match="Nothing can be written in"):
        folder_module.check_target(tmp_path / "theirs" / "model", force=False)


FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (FULL_DISK, CheckpointError, "has no room: the model needs 7.1 MiB. Free some space"),
        (OSError(errno.EIO, "I/O error", "x"), CheckpointError, "cannot be written: I/O error"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
        (MemoryError(), MemoryError, ""),
    ],
)
@pytest.mark.parametrize("replaces", [False, True])
def test_a_failure_midway_leaves_nothing(
    error, raised, said, replaces, vicuna_folder, tmp_path, monkeypatch
):
    out_dir = tmp_path / "out"
    if replaces:
        convert(LLAMA2, out_dir)
    before = snapshot(out_dir) if replaces else None
    monkeypatch.setattr(writer, "_write_one", fail_after(30, error))
    with pytest.raises(raised) as caught:
        convert(LLAMA2, out_dir, dtype="float16", max_shard_bytes=500_000, force=replaces)
    assert said in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if replaces else [])
    assert (snapshot(out_dir) if replaces else None) == before


def test_a_failure_in_the_last_step_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, text):
        raise FULL_DISK

    monkeypatch.setattr(folder_module, "write_text", fail)
    with pytest.raises(CheckpointError, match="has no room"):
        convert(LLAMA2, tmp_path / "new" / "and new" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), KeyboardInterrupt()])
def test_a_failure_in_the_swap_puts_the_old_folder_back(error, tmp_path, monkeypatch):
    convert(LLAMA2, tmp_path / "out")
    before, rename = snapshot(tmp_path / "out"), Path.rename

    def rename_or_fail(self, target):
        if self.suffix == ".partial":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_or_fail)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        convert(LLAMA2, tmp_path / "out", dtype="float32", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert snapshot(tmp_path / "out") == before


def test_force_replaces_a_model_folder(tmp_path):
    convert(LLAMA2, tmp_path / "out")
    convert(LLAMA2, tmp_path / "out", dtype="float32", force=True)
    assert read_manifest(tmp_path / "out").dtypes == ("float32",)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_does_not_replace_a_folder_that_holds_the_sources(tmp_path):
    out_dir = tmp_path / "out"
    convert(LLAMA2, out_dir)
    inside = copy_golden("llama2", out_dir / "published")
    before = sorted(out_dir.rglob("*"))
    with pytest.raises(CheckpointError, match=r"lies in .*out, which --force would replace"):
        convert(inside, out_dir, force=True)
    assert sorted(out_dir.rglob("*")) == before


@pytest.mark.parametrize("force", [False, True])
def test_an_empty_folder_is_taken(force, tmp_path):
    (tmp_path / "out").mkdir()
    convert(LLAMA2, tmp_path / "out", force=force)
    assert (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("force", [False, True])
def test_the_folder_that_one_is_in_stays(force, tmp_path, monkeypatch):
    convert(LLAMA2, tmp_path / "out")
    (tmp_path / "out" / "inner").mkdir()
    before = snapshot(tmp_path / "out" / "inner")
    monkeypatch.chdir(tmp_path / "out" / "inner")
    for out_dir in (Path(), Path("..")):
        with pytest.raises(CheckpointError, match="is the folder that you are in"):
            convert(LLAMA2, out_dir, force=force)
    assert snapshot(tmp_path / "out" / "inner") == before
    convert(LLAMA2, Path("new"))


@pytest.mark.parametrize("manifest", [None, '{"name": "My web app", "start_url": "/"}', "{"])
@pytest.mark.parametrize("force", [False, True])
def test_no_other_folder_is_deleted(manifest, force, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    if manifest is not None:
        (home / "manifest.json").write_text(manifest)
    before = snapshot(home)
    with pytest.raises(CheckpointError, match=r"is not a model folder .* it is never replaced"):
        convert(LLAMA2, home, force=force)
    assert snapshot(home) == before


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path, monkeypatch):
    left = tmp_path / ".out.0badcafe.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    convert(LLAMA2, tmp_path / "out")
    assert load_config(tmp_path / "out").template == "llama2"
    monkeypatch.setattr(writer, "_write_one", fail_after(3, FULL_DISK))
    with pytest.raises(CheckpointError) as caught:
        convert(LLAMA2, tmp_path / "out", force=True)
    assert str(caught.value).endswith("An interrupted run left .out.0badcafe.partial there.")


@pytest.mark.skipif(os.name != "posix", reason="makes a link, which needs rights on Windows")
def test_folders_on_the_way_are_made_and_links_followed(tmp_path):
    convert(LLAMA2, tmp_path / "models" / "deep" / "out")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "models" / "deep" / "out", target_is_directory=True)
    convert(LLAMA2, link, dtype="float32", force=True)
    assert link.is_symlink()
    assert read_manifest(tmp_path / "models" / "deep" / "out").dtypes == ("float32",)


@pytest.mark.parametrize("stage", ["reading", "writing", "comparing", "computing"])
def test_ctrl_c_at_the_command_line(stage, tmp_path, monkeypatch, capsys):
    @contextmanager
    def bar_that_interrupts():
        def interrupt(now, done_bytes, total_bytes):
            if now == stage:
                signal.raise_signal(signal.SIGINT)

        yield interrupt

    words = [
        "minigpt4", "convert", "--verify", "--language", LLAMA2.language_dir,
        "--vision", LLAMA2.vision, "--projection", LLAMA2.projection, "--out", tmp_path / "out",
    ]  # fmt: skip
    monkeypatch.setattr(convert_command, "byte_bar", bar_that_interrupts)
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(SystemExit) as ending:
        run()
    assert ending.value.code == 130
    assert capsys.readouterr() == ("", "Stopped. No half model was left behind.\n")
    assert list(tmp_path.iterdir()) == []


# --- write_folder ------------------------------------------------------------------------------


@pytest.fixture
def tensors(vicuna_folder) -> dict[str, torch.Tensor]:
    return load_file(vicuna_folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_write_folder_writes_what_load_model_reads(vicuna_folder, tensors, dtype, tmp_path):
    config = load_config(vicuna_folder)
    source = SourceRecord.of("training", vicuna_folder / "config.json")
    shuffled = dict(sorted(tensors.items(), reverse=True))
    write_folder(
        tmp_path / "out", config, shuffled, vicuna_folder / "tokenizer.model",
        dtype=dtype, sources=(source,),
    )  # fmt: skip
    model = load_model(tmp_path / "out", device=torch.device("cpu"), dtype=torch.float32)
    assert all(torch.equal(w, tensors[name].float()) for name, w in model.state_dict().items())
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.dtypes, manifest.sources) == ((dtype,), (source,))
    assert load_config(tmp_path / "out") == config


def test_write_folder_keeps_each_dtype(mixed_folder, tmp_path):
    config, tokenizer = load_config(mixed_folder), mixed_folder / "tokenizer.model"
    name = "model.safetensors"
    tensors = load_file(mixed_folder / name)
    write_folder(tmp_path / "out", config, tensors, tokenizer)
    written = load_file(tmp_path / "out" / name)
    assert all(written[key].dtype == tensors[key].dtype for key in tensors)
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)
    assert read_manifest(tmp_path / "out").dtypes == ("float16", "float32")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_write_folder_refuses_other_dtypes(vicuna_folder, tensors, dtype, tmp_path):
    config, tokenizer = load_config(vicuna_folder), vicuna_folder / "tokenizer.model"
    name = "language.norm.weight"
    changed = {**tensors, name: tensors[name].to(dtype)}
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=rf"{name} of dtype {kind}; float32, float16 and"):
        write_folder(tmp_path / "out", config, changed, tokenizer)
    assert list(tmp_path.iterdir()) == []
    write_folder(tmp_path / "out", config, changed, tokenizer, dtype="float16")


def test_write_folder_takes_a_model_in_training(vicuna_folder, tmp_path):
    model = load_model(vicuna_folder, device=torch.device("cpu"), dtype=torch.float32)
    model.requires_grad_(True)
    config, tokenizer = load_config(vicuna_folder), vicuna_folder / "tokenizer.model"
    weights = model.state_dict(keep_vars=True)
    write_folder(tmp_path / "out", config, weights, tokenizer, dtype="float16")
    name = "model.safetensors"
    written, before = load_file(tmp_path / "out" / name), load_file(vicuna_folder / name)
    assert all(torch.equal(written[key], before[key]) for key in before)


def test_write_folder_is_strict(vicuna_folder, tensors, tmp_path):
    config, tokenizer = load_config(vicuna_folder), vicuna_folder / "tokenizer.model"

    def write(changed, **options):
        write_folder(tmp_path / "out", config, changed, tokenizer, dtype="float16", **options)

    name = "language.norm.weight"
    with pytest.raises(CheckpointError, match=rf"1 weight missing \({name}\)"):
        write({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(CheckpointError, match=r"1 weight too many \(extra\)"):
        write({**tensors, "extra": torch.ones(1)})
    with pytest.raises(CheckpointError, match=f"{name} is 3; the model needs 64"):
        write({**tensors, name: torch.ones(3)})
    with pytest.raises(CheckpointError, match=f"{name} holds NaN"):
        write({**tensors, name: torch.full((64,), float("nan"))})
    assert list(tmp_path.iterdir()) == []
    write(tensors)
    with pytest.raises(CheckpointError, match="is a model folder already"):
        write(tensors)
    write(tensors, force=True)


def test_a_full_disk_names_what_does_not_fit(tmp_path, monkeypatch):
    """The numbers must bear the refusal out, though the weights alone would fit."""
    usage = type("Usage", (), {"free": 11 * 2**20})()
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda _: usage)
    kind = folder_module.FolderKind("graph", "export.json", read_manifest)
    with (
        pytest.raises(
            CheckpointError,
            match=r"the graph needs 12\.8 MiB, and 11\.0 MiB are free: "
            r"1\.8 MiB are missing",
        ),
        folder_module.staged_folder(
            tmp_path / "out", needed_bytes=int(8.8 * 2**20), force=False, kind=kind
        ),
    ):
        pass
