"""Contrast the last layer with the earlier one that differs most (DoLa, Chuang et al., 2023).

python examples/study/dola.py examples/images/three.png [MODEL]
"""

import math
import sys
from collections.abc import Sequence

import torch
from torch.nn import functional

from minigpt4_runtime import MiniGPT4, image
from minigpt4_runtime.lab import Answer, Lab, Seen, StudiedPrompt


def divergence(last: torch.Tensor, early: torch.Tensor) -> torch.Tensor:
    """How far (B, V) logits are from those of several layers (L, B, V): (L,).

    As DoLa's code computes it: the Kullback-Leibler divergences are of the mean from each side.
    """
    last, early = last.log_softmax(-1), early.log_softmax(-1)
    mean = (last.exp() + early.exp()) / 2
    sides = [
        functional.kl_div(each.expand_as(mean), mean, reduction="none").mean(-1)
        for each in (last, early)
    ]
    return sum(sides, torch.zeros(())).mean(-1) / 2


def dola(
    lab: Lab, prompt: StudiedPrompt, layers: Sequence[int], *, relative_top: float = 0.1,
    max_new_tokens: int = 300,
) -> Answer:  # fmt: skip
    """`layers` are the candidates; their rows go to the head without the final norm, as in DoLa."""

    def contrast(seen: Seen) -> torch.Tensor:
        assert seen.hidden is not None
        early = lab.lens(seen.hidden[:, :, -1], norm=False)
        base = early[int(divergence(seen.logits, early).argmax())].log_softmax(-1)
        logprobs = seen.logits.log_softmax(-1)
        is_unlikely = logprobs < logprobs.amax(-1, keepdim=True) + math.log(relative_top)
        return (logprobs - base).masked_fill(is_unlikely, float("-inf"))

    (answer,) = lab.generate(
        prompt, [contrast], keep={"hidden": layers}, max_new_tokens=max_new_tokens
    )
    return answer


if __name__ == "__main__":
    opened = MiniGPT4.load(*sys.argv[2:3]).lab()
    content = [image(sys.argv[1]), "Describe this image in detail."]
    asked = opened.prompt([{"role": "user", "content": content}])
    half = opened.config.language.num_hidden_layers // 2
    print(dola(opened, asked, range(0, half, 2)).text)
