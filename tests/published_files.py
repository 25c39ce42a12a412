"""The goldens' published files, and how a test reads and changes them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt4_runtime.convert.convert import PublishedFiles

GOLDENS = Path(__file__).parent / "goldens"
PROJECTIONS = {
    "vicuna": "pretrained_minigpt4_7b.pth",
    "llama2": "pretrained_minigpt4_llama2_7b.pth",
    "minigptv2": "minigptv2_checkpoint.pth",
}


def files_of(variant: str, folder: Path) -> PublishedFiles:
    """A golden checkpoint's files, in its own folder or in a copy of it."""
    files = PublishedFiles(
        language_dir=folder / "llama",
        vision=folder / "eva_vit_g.pth",
        projection=folder / PROJECTIONS[variant],
    )
    if variant != "vicuna":
        return files
    return replace(
        files,
        qformer=folder / "blip2_pretrained_flant5xxl.pth",
        bert_dir=folder / "bert-base-uncased",
    )


def copy_golden(variant: str, folder: Path) -> PublishedFiles:
    """A golden checkpoint's files, to be changed."""
    shutil.copytree(GOLDENS / variant / "checkpoint", folder)
    return files_of(variant, folder)


def read_published(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    return content.get("model", content)


def read_language(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.bin")):
        tensors |= read_published(path)
    return tensors


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a published file in place."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    change(content.get("model", content))
    torch.save(content, path)


def shard_with(folder: Path, name: str) -> Path:
    """The language model's shard that holds a tensor."""
    return next(path for path in sorted(folder.glob("*.bin")) if name in read_published(path))


def edit_json(path: Path, **changes: Any) -> None:
    """Change named values of a JSON file; `...` takes one out."""
    values = {**json.loads(path.read_text("utf-8")), **changes}
    kept = {name: value for name, value in values.items() if value is not ...}
    path.write_text(json.dumps(kept), "utf-8")
