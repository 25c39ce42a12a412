"""BLIP-2's Q-Former (Li et al., 2023; upstream: minigpt4/models/Qformer.py), queries only.

Owns   the learned queries and the layers that let them read the image.
Takes  (N, P, C) rows of the image tower; gives (N, Q, hidden).
Never  reads text: the text branch of BLIP-2 is not part of MiniGPT-4.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from minigpt4_runtime.config import QFormerConfig
from minigpt4_runtime.model.linear import Joint, Linear
from minigpt4_runtime.model.row_operations import LayerNorm


class QFormerAttention(nn.Module):
    """BERT attention with its output norm. Its layer makes the queries, keys and values."""

    def __init__(self, config: QFormerConfig, context_size: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query = Linear(size, size, bias=True)
        self.key = Linear(context_size, size, bias=True)
        self.value = Linear(context_size, size, bias=True)
        self.out = Linear(size, size, bias=True)
        self.norm = LayerNorm(size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor, *inputs: Tensor) -> Tensor:
        """(N, Q, C) and q (N, Q, C), k and v (N, P, C) → (N, Q, C)."""
        q, k, v = (
            rows.view(*rows.shape[:2], self.num_heads, -1).transpose(1, 2) for rows in inputs
        )
        attended = functional.scaled_dot_product_attention(q, k, v)
        _, normed = self.norm(hidden, self.out(attended.transpose(1, 2).flatten(2)))
        return normed  # type: ignore[no-any-return]


class QFormerLayer(nn.Module):
    """Queries look at each other, then at the image (in some layers), then a feed-forward."""

    def __init__(self, config: QFormerConfig, vision_size: int, *, reads_image: bool) -> None:
        super().__init__()
        self.attention = own = QFormerAttention(config, config.hidden_size)
        self.inputs = Joint(own.query, own.key, own.value)
        self.cross_attention = QFormerAttention(config, vision_size) if reads_image else None
        self.mlp_in = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.mlp_out = Linear(config.intermediate_size, config.hidden_size, bias=True)
        self.mlp_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor, image_inputs: Iterator[Tensor]) -> Tensor:
        """(N, Q, C) → (N, Q, C). Of the image's keys and values (N, P, C) it takes the next two."""
        hidden = self.attention(hidden, *self.inputs(hidden))
        if (cross := self.cross_attention) is not None:
            hidden = cross(hidden, cross.query(hidden), next(image_inputs), next(image_inputs))
        widened = functional.gelu(self.mlp_in(hidden))
        _, normed = self.mlp_norm(hidden, self.mlp_out(widened))
        return normed  # type: ignore[no-any-return]


class QFormer(nn.Module):
    """Learned queries → the content of the image, in a fixed number of rows."""

    def __init__(self, config: QFormerConfig, vision_size: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(config.num_query_tokens, config.hidden_size))
        self.query_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        layers = [
            QFormerLayer(
                config, vision_size, reads_image=index % config.cross_attention_frequency == 0
            )
            for index in range(config.num_hidden_layers)
        ]
        self.layers = nn.ModuleList(layers)
        readers = [each for layer in layers if (each := layer.cross_attention) is not None]
        self.image_inputs = Joint(*(part for each in readers for part in (each.key, each.value)))

    def forward(self, image_rows: Tensor) -> Tensor:
        """(N, P, vision_size) → (N, Q, hidden)."""
        hidden = self.query_norm(self.query_tokens).expand(image_rows.shape[0], -1, -1)
        image_inputs = iter(self.image_inputs(image_rows))
        for layer in self.layers:
            hidden = layer(hidden, image_inputs)
        return hidden  # type: ignore[no-any-return]
