"""Contrast what a picture says with what its noisy copy says (VCD, Leng et al., 2023).

python examples/study/vcd.py examples/images/three.png [MODEL]
"""

import math
import sys
from collections.abc import Callable

import torch

from minigpt4_runtime import MiniGPT4, NextLogits, image
from minigpt4_runtime.lab import Answer, Lab, Seen, StudiedPrompt

NOISE_STEPS = 1000


def add_noise(
    model: Lab | MiniGPT4, pixels: torch.Tensor, step: int, *, seed: int = 0
) -> torch.Tensor:
    """The picture after so many steps of a diffusion, as VCD's code adds it: behind normalising."""
    betas = torch.linspace(-6, 6, NOISE_STEPS).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    kept = float((1 - betas).cumprod(0)[step])
    vision = model.config.vision
    mean, std = (torch.tensor(x)[:, None, None] for x in (vision.image_mean, vision.image_std))
    normed = (pixels.cpu() - mean) / std
    noise = torch.randn(normed.shape, generator=torch.Generator().manual_seed(seed))
    noisy = math.sqrt(kept) * normed + math.sqrt(1 - kept) * noise
    return (noisy * std + mean).to(pixels.device)


def contrasting(
    name: str, alpha: float, beta: float
) -> Callable[[Seen | NextLogits], torch.Tensor]:
    """(1 + alpha) · logits - alpha · the branch's, of ids that are at least beta times the best."""

    def contrast(seen: Seen | NextLogits) -> torch.Tensor:
        is_unlikely = seen.logits < seen.logits.amax(-1, keepdim=True) + math.log(beta)
        difference = (1 + alpha) * seen.logits - alpha * seen.branches[name]
        return difference.masked_fill(is_unlikely, float("-inf"))

    return contrast


def vcd(
    lab: Lab, prompt: StudiedPrompt, *, step: int = 500, alpha: float = 1.0, beta: float = 0.1,
    max_new_tokens: int = 300,
) -> Answer:  # fmt: skip
    """The likeliest answer under the contrast; VCD's own code draws one."""
    noisy = prompt.showing(add_noise(lab, prompt.pixels, step))
    (answer,) = lab.generate(
        prompt, [contrasting("noisy", alpha, beta)], branches={"noisy": noisy},
        max_new_tokens=max_new_tokens,
    )  # fmt: skip
    return answer


if __name__ == "__main__":
    opened = MiniGPT4.load(*sys.argv[2:3]).lab()
    content = [image(sys.argv[1]), "Describe this image in detail."]
    print(vcd(opened, opened.prompt([{"role": "user", "content": content}])).text)
