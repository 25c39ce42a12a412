"""Find the heads that an answer needs by silencing each (Michel et al., 2019).

python examples/study/knock_out.py examples/images/three.png [MODEL]
"""

import sys

import torch

from minigpt4_runtime import MiniGPT4, image
from minigpt4_runtime.lab import Lab, Place, StudiedPrompt


def silence(head: int, heads: torch.Tensor) -> torch.Tensor:
    """(B, Q, H, D) without what one head has gathered."""
    heads = heads.clone()
    heads[:, :, head] = 0
    return heads


@torch.no_grad()
def needed_heads(lab: Lab, prompt: StudiedPrompt, token_ids: tuple[int, ...]) -> torch.Tensor:
    """By how much the answer's loss grows without each head: (L, H)."""
    language = lab.config.language
    # The picture is the same each time.
    prompt = prompt.reading(lab.encode(prompt.pixels))

    def loss() -> float:
        done = lab.forward(prompt, answer=token_ids)
        assert done.loss is not None
        return float(done.loss)

    whole = loss()
    grown = torch.zeros(language.num_hidden_layers, language.num_attention_heads)
    for layer, head in torch.cartesian_prod(*map(torch.arange, grown.shape)).tolist():

        def without(heads: torch.Tensor, _: Place, head: int = head) -> torch.Tensor:
            return silence(head, heads)

        with lab.hook("heads", layer, without):
            grown[layer, head] = loss() - whole
    return grown


if __name__ == "__main__":
    opened = MiniGPT4.load(*sys.argv[2:3]).lab()
    content = [image(sys.argv[1]), "Describe this image in detail."]
    asked = opened.prompt([{"role": "user", "content": content}])
    (answer,) = opened.generate(asked)
    grown = needed_heads(opened, asked, answer.token_ids)
    for place in grown.flatten().argsort(descending=True)[:10].tolist():
        layer, head = divmod(place, grown.shape[1])
        print(f"layer {layer:2}, head {head:2}: {grown[layer, head]:+.3f} nats a token")
