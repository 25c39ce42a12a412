"""Pay more attention to the picture, and less to the words alone (PAI, Liu et al., 2024).

python examples/study/pai.py examples/images/three.png [MODEL]
"""

import math
import sys

import torch

from minigpt4_runtime import MiniGPT4, image
from minigpt4_runtime.lab import Answer, Lab, Place, Seen, StudiedPrompt

# As PAI's code asks MiniGPT-4, without system text and without a space at the end.
WITH_PICTURE = "###Human: <Img><ImageHere></Img> {question} ###Assistant:"
WITHOUT = "###Human: {question} ###Assistant:"


def pai(
    lab: Lab, prompt: StudiedPrompt, blind: StudiedPrompt, *, alpha: float = 0.2,
    gamma: float = 1.1, first_layer: int = 2, max_new_tokens: int = 300,
) -> Answer:  # fmt: skip
    """`blind` is the prompt without the picture; its own attention stays as it is."""
    columns = prompt.image_columns

    def look_more(scores: torch.Tensor, place: Place) -> torch.Tensor | None:
        if place.branch:
            return None
        scores = scores.clone()
        seen = scores[:, :, -1, columns]
        scores[:, :, -1, columns] = seen + alpha * seen.abs()
        return scores

    def guide(seen: Seen) -> torch.Tensor:
        logprobs = seen.logits.log_softmax(-1)
        other = seen.branches["blind"].log_softmax(-1)
        is_unlikely = logprobs < logprobs.amax(-1, keepdim=True) + math.log(0.1)
        guided = gamma * (logprobs - other) + other
        return guided.masked_fill(is_unlikely, float("-inf"))

    layers = range(first_layer, lab.config.language.num_hidden_layers)
    with lab.hook("scores", layers, look_more):
        (answer,) = lab.generate(
            prompt, [guide], branches={"blind": blind}, max_new_tokens=max_new_tokens
        )
    return answer


if __name__ == "__main__":
    opened = MiniGPT4.load(*sys.argv[2:3]).lab()
    question = "Describe this image in detail."
    asked = opened.prompt(WITH_PICTURE.format(question=question), [image(sys.argv[1])])
    print(pai(opened, asked, opened.prompt(WITHOUT.format(question=question))).text)
