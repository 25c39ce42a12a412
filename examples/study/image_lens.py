"""Read the image rows as words, layer by layer (the logit lens; nostalgebraist, 2020).

python examples/study/image_lens.py examples/images/three.png [MODEL]
"""

import sys

import torch

from minigpt4_runtime import MiniGPT4, image
from minigpt4_runtime.lab import Lab, StudiedPrompt


@torch.no_grad()
def read_image_rows(lab: Lab, prompt: StudiedPrompt) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest id of each image row behind each layer, and its share: (L + 1, R) each."""
    done = lab.forward(prompt, keep={"hidden": "all", "rows": prompt.image_columns})
    assert done.hidden is not None
    # One layer at a time: the logits of all are many.
    best = [lab.lens(rows[0]).softmax(-1).max(-1) for rows in done.hidden]
    return torch.stack([each.indices for each in best]), torch.stack([each.values for each in best])


if __name__ == "__main__":
    opened = MiniGPT4.load(*sys.argv[2:3]).lab()
    content = [image(sys.argv[1]), "Describe this image in detail."]
    ids, shares = read_image_rows(opened, opened.prompt([{"role": "user", "content": content}]))
    for layer, (row_ids, row_shares) in enumerate(zip(ids, shares, strict=True)):
        words = (
            f"{opened.text_of([int(i)]) or '·'} {float(share):.0%}"
            for i, share in zip(row_ids, row_shares, strict=True)
        )
        print(f"layer {layer:2}: ", " | ".join(words))
