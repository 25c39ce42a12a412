"""Contrast each picture of a folder with its noisy copy, many at once (VCD, Leng et al., 2023).

python examples/study/vcd_batch.py examples/images [MODEL]
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy
import torch
from PIL import Image
from vcd import add_noise, contrasting

from minigpt4_runtime import Message, MiniGPT4, image

QUESTION = "Describe this image in detail."


def noisy_copy(model: MiniGPT4, path: Path, *, step: int) -> torch.Tensor:
    """The picture at the model's size, with noise, in 0…1."""
    side = model.config.vision.image_size
    with Image.open(path) as opened:
        small = opened.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(numpy.asarray(small) / numpy.float32(255)).permute(2, 0, 1)
    return add_noise(model, pixels, step).clamp(0, 1)


def vcd_batch(
    model: MiniGPT4, paths: Iterable[Path], *, step: int = 500, alpha: float = 1.0,
    beta: float = 0.1,
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """The number of each picture, as it is done, and what is said of it under the contrast."""

    def noisy(path: Path) -> dict[str, list[Message]]:
        return {"noisy": [Message("user", (image(noisy_copy(model, path, step=step)), QUESTION))]}

    processors = [contrasting("noisy", alpha, beta)]
    for done in model.describe_all(paths, QUESTION, processors=processors, branches=noisy):
        yield done.index, done.reply.text if done.reply else str(done.error)


if __name__ == "__main__":
    loaded = MiniGPT4.load(*sys.argv[2:3])
    pictures = sorted(Path(sys.argv[1]).glob("*.png"))
    for number, text in vcd_batch(loaded, pictures):
        print(f"{pictures[number].name}: {text}")
