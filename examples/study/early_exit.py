"""Contrast the whole image tower with its first blocks (LayerCD, Tong et al., 2025).

python examples/study/early_exit.py examples/images/three.png [MODEL]
"""

import math
import sys

import torch

from minigpt4_runtime import MiniGPT4, image
from minigpt4_runtime.lab import Answer, Lab, Seen, StudiedPrompt


def contrast_early_exit(
    lab: Lab, prompt: StudiedPrompt, *, exit_layer: int, alpha: float = 0.5, beta: float = 0.1,
    max_new_tokens: int = 300,
) -> Answer:  # fmt: skip
    """Favour what only the later blocks of the tower make likely."""
    with torch.no_grad():
        shallow = prompt.reading(lab.encode(prompt.pixels, exit_layer=exit_layer))

    def contrast(seen: Seen) -> torch.Tensor:
        is_unlikely = seen.logits < seen.logits.amax(-1, keepdim=True) + math.log(beta)
        difference = (1 + alpha) * seen.logits - alpha * seen.branches["shallow"]
        return difference.masked_fill(is_unlikely, float("-inf"))

    (answer,) = lab.generate(
        prompt, [contrast], branches={"shallow": shallow}, max_new_tokens=max_new_tokens
    )
    return answer


if __name__ == "__main__":
    opened = MiniGPT4.load(*sys.argv[2:3]).lab()
    content = [image(sys.argv[1]), "Describe this image in detail."]
    asked = opened.prompt([{"role": "user", "content": content}])
    depth = opened.config.vision.num_hidden_layers
    for layer in range(depth // 4, depth, max(1, depth // 4)):
        answer = contrast_early_exit(opened, asked, exit_layer=layer)
        print(f"behind block {layer} of {depth}: {answer.text}")
