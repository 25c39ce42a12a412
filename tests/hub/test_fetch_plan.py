"""What a fetch needs, and how its files come together."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from published_web import BUCKET

from minigpt4_runtime.checkpoint.sizes import running_bytes, weight_bytes
from minigpt4_runtime.checkpoint.sources import (
    ModelSources,
    PublishedPart,
    SourceFile,
    read_sources,
)
from minigpt4_runtime.hub.fetch import assembled, cache_lock
from minigpt4_runtime.hub.fetch_plan import FetchPlan, PlannedFile, make_plan

GB = 10**9


@pytest.fixture
def plan(cache_home):
    """A plan for Vicuna 7B whose files are all small and already here."""
    model = read_sources()["vicuna-7b"]
    files = []
    for part in model.parts:
        for file in part.files:
            target = cache_home / "downloads" / part.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(f"{part.role}/{file.name}")
            files.append(PlannedFile(part, file, target, "host", 2 * GB, GB))
    return FetchPlan(model, {}, tuple(files), cache_home / "models" / "vicuna-7b", None)


def test_what_is_kept_is_not_downloaded_again(plan):
    assert plan.download_bytes == len(plan.files) * GB


def test_sizes_follow_from_the_preset_where_the_dtype_is_given(plan):
    assert plan.model_bytes == len(plan.files) * 2 * GB
    half = FetchPlan(plan.model, {}, plan.files, plan.out_dir, "float16")
    assert half.model_bytes == weight_bytes("vicuna-7b", "float16")
    assert plan.smallest_running_bytes == running_bytes("vicuna-7b", "float16")


def test_without_sizes_the_preset_tells_what_the_model_takes(plan):
    files = tuple(replace(each, size=None) for each in plan.files)
    unknown = replace(plan, files=files)
    assert plan.is_size_known
    assert not unknown.is_size_known
    assert unknown.model_bytes == weight_bytes("vicuna-7b", "float16")


def test_a_host_with_another_file_is_passed_over(web, cache_home):
    """Of another size than the published one: the next host is planned with."""
    size = len(web.files["pytorch_model-00001-of-00004.bin"])
    places = (
        f"{web.site}{BUCKET}/eva_vit_g.pth",
        "hub:Vision-CAIR/vicuna-7b/pytorch_model-00001-of-00004.bin",
    )
    file = SourceFile("tower.bin", places, size=size)
    part = PublishedPart("tower", "vision", "a tower", "none", (file,))
    plan = make_plan(
        ModelSources("own", (part,), None), out_dir=cache_home / "models/own", from_dir=None,
        dtype=None, say=print,
    )  # fmt: skip
    assert plan.files[0].size == size
    assert web.seen[0].path.endswith("eva_vit_g.pth")
    assert web.requests_for("pytorch_model-00001")


@pytest.mark.parametrize("allowed", ["symbolic links", "hard links", "copies"])
def test_files_come_together_under_their_published_names(plan, monkeypatch, allowed):
    """Windows allows symbolic links only to some, and hard links only on one disk."""

    def refuse(*_):
        raise OSError(1, "not permitted")

    if allowed != "symbolic links":
        monkeypatch.setattr(Path, "symlink_to", refuse)
    if allowed == "copies":
        monkeypatch.setattr(os, "link", refuse)
    with assembled(plan) as files:
        names = sorted(path.name for path in files.language_dir.iterdir())
        assert names == sorted(
            each.file.name for each in plan.files if each.part.role == "language"
        )
        assert files.vision.read_text() == "vision/eva_vit_g.pth"
        assert files.qformer.read_text() == "qformer/blip2_pretrained_flant5xxl.pth"
        assert files.projection.read_text() == "projection/pretrained_minigpt4_7b.pth"
        assert (files.bert_dir / "config.json").read_text() == "bert/config.json"
    assert all(each.target.exists() for each in plan.files)
    assert not files.vision.exists()


@pytest.mark.parametrize(
    "name",
    [
        "downloads/.links-abc",
        ".downloads.0123abcd.deleted",
        "models/.vicuna-7b.0123abcd.deleted",
        "models/.vicuna-7b.0123abcd.partial",
    ],
)
def test_what_a_killed_fetch_left_is_cleared_away(cache_home, name):
    model = cache_home / "models" / "vicuna-7b.partial"
    for folder in (cache_home / name, model):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
    with cache_lock():
        assert not (cache_home / name).exists()
    assert (model / "model.safetensors").exists()


def test_a_link_that_was_being_deleted_leaves_its_model_alone(cache_home, tmp_path):
    model = tmp_path / "kept elsewhere"
    model.mkdir()
    (model / "model.safetensors").touch()
    (cache_home / "models").mkdir(parents=True)
    link = cache_home / "models" / ".mine.0123abcd.deleted"
    link.symlink_to(model)
    with cache_lock():
        assert not link.is_symlink()
    assert (model / "model.safetensors").exists()
