"""What the keys of a language model have in common, whatever the text.

Owns   the ids that are tried for it. Takes a Llama, which all its ranks ask together; gives keys.
Never  knows how a cache rounds them.
"""

import torch
from torch import Tensor

from minigpt4_runtime.model.causal import causal_attention
from minigpt4_runtime.model.llama import Llama

# More change nothing that could be measured: see docs/log.md.
_NUM_IDS = 64


@torch.inference_mode()
def usual_keys(language: Llama) -> tuple[Tensor, Tensor]:
    """The key of a text's first token, and the mean of all others: (layers, Hkv, D) float32 each.

    Both are taken from one text of random ids, the same each time. The first token's key hardly
    depends on what the token is, and is far from all others: most heads attend to it when nothing
    else matters (attention sinks: Xiao et al., 2023).
    """
    found: list[Tensor] = []
    attend = causal_attention()

    def listen(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found.append(k.float())
        return attend(layer, q, k, v)

    config, device = language.config, language.token_embedding.weight.device
    num_ids = min(_NUM_IDS, config.context_length)
    ids = torch.randint(config.vocab_size, (num_ids,), generator=torch.Generator().manual_seed(0))
    embeddings = language.group.sum(language.embed(ids.to(device)))
    language(embeddings, torch.arange(num_ids, device=device), listen)
    keys = torch.stack(found)
    return keys[:, 0], keys[:, 1:].mean(1)
