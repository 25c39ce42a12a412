"""The original's side of original.py, run by the Python of an environment with its packages.

Owns   the original's model on published files, its preparation of pictures, and the clock.
Takes  on stdin, one JSON object a line: first {"source", "files", "threads"}; then works
       {"pictures": [path], "prompt", "new": count}, answered with {"seconds", "answers"}.
Never  changes the original's code. torchvision is left out: what would import it gets a stand-in,
       and pictures are resized by Pillow, which is what torchvision would call.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import types
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy
import torch
from PIL import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
SIDE = 224
# What the original's modules import and this benchmark does not reach.
ABSENT = ("torchvision", "pandas", "minigpt4.processors")


class _Absent(MetaPathFinder, Loader):
    """Gives a stand-in for each module of ABSENT."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        """The stand-in's, if it is one of them."""
        is_absent = any(name == each or name.startswith(f"{each}.") for each in ABSENT)
        return ModuleSpec(name, self, is_package=True) if is_absent else None

    def create_module(self, spec: ModuleSpec) -> Any:
        """A module that has every name."""
        module = MagicMock(name=spec.name)
        module.__path__, module.__version__ = [], "0.15.0"
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to do."""


def load(source: str, files: Path) -> Any:
    """The original's MiniGPT4 in float32, with Vicuna's settings."""
    sys.meta_path.insert(0, _Absent())
    # Its own __init__ would import all datasets and tasks.
    package = types.ModuleType("minigpt4")
    package.__path__ = [str(Path(source, "minigpt4"))]
    sys.modules["minigpt4"] = package
    eva_vit: Any = import_module("minigpt4.models.eva_vit")
    build: Any = import_module("minigpt4.models.minigpt4").MiniGPT4
    eva_vit.download_cached_file = lambda *_, **__: files / "eva_vit_g.pth"
    with tempfile.TemporaryDirectory() as here:
        # It is asked for by name, and found in the working folder.
        Path(here, "bert-base-uncased").symlink_to(files / "bert")
        os.chdir(here)
        model = build(
            vit_precision="fp32", llama_model=str(files / "llama"),
            q_former_model=str(files / "blip2.pth"),
        )  # fmt: skip
        os.chdir("/")
    trained = torch.load(files / "projection.pth", map_location="cpu")["model"]
    model.load_state_dict(trained, strict=False)
    return model.float().eval()


def prepare(path: str) -> torch.Tensor:
    """Pixels (3, 224, 224), as the original's evaluation makes them."""
    picture = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = numpy.asarray(picture, dtype=numpy.float32) / 255
    return torch.from_numpy(((pixels - MEAN) / DEVIATION).astype(numpy.float32)).permute(2, 0, 1)


def main() -> None:
    """Answer what stdin asks, until it ends."""
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)
    wanted = json.loads(sys.stdin.readline())
    torch.set_num_threads(wanted["threads"])
    model = load(wanted["source"], Path(wanted["files"]))
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        started = time.perf_counter()
        pixels = torch.stack([prepare(path) for path in work["pictures"]])
        # No answer ends before it has all of its tokens.
        said = model.generate(
            pixels, [work["prompt"]] * len(pixels), max_new_tokens=work["new"],
            min_length=work["new"] + 1,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "answers": said}), file=answers, flush=True)


if __name__ == "__main__":
    main()
