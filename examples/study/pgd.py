"""Perturb a picture within a bound until its caption goes (projected gradient; Madry et al., 2017).

python examples/study/pgd.py examples/images/three.png [MODEL]
"""

import sys

import torch

from minigpt4_runtime import MiniGPT4, image
from minigpt4_runtime.lab import Lab, StudiedPrompt


def perturb(
    lab: Lab, prompt: StudiedPrompt, token_ids: tuple[int, ...], *, bound: float = 8 / 255,
    step: float = 2 / 255, num_steps: int = 10,
) -> torch.Tensor:  # fmt: skip
    """(1, 3, S, S) pixels in 0…1, within `bound` of the picture's, that make an answer unlikely.

    Each step goes along the sign of the gradient of the answer's loss, and back into the bound.
    """
    clean, pixels = prompt.pixels, prompt.pixels
    for _ in range(num_steps):
        pixels = pixels.detach().requires_grad_()
        loss = lab.forward(prompt, pixels, token_ids).loss
        assert loss is not None
        (gradient,) = torch.autograd.grad(loss, pixels)
        moved = pixels.detach() + step * gradient.sign()
        pixels = moved.clamp(clean - bound, clean + bound).clamp(0, 1)
    return pixels


if __name__ == "__main__":
    opened = MiniGPT4.load(*sys.argv[2:3]).lab()
    content = [image(sys.argv[1]), "Describe this image in detail."]
    asked = opened.prompt([{"role": "user", "content": content}])
    (clean,) = opened.generate(asked)
    perturbed = asked.showing(perturb(opened, asked, clean.token_ids))
    print("clean:    ", clean.text)
    print("perturbed:", opened.generate(perturbed)[0].text)
