"""EVA-ViT-g, the image tower (Fang et al., "EVA", 2022; upstream: minigpt4/models/eva_vit.py).

Owns   pixels → patch rows, without the head and the final norm, which MiniGPT-4 does not use.
Takes  (N, 3, S, S) normalised pixels; gives (N, P, C) with the class row first.
Never  resizes: pixels and the position table must already agree (see `resize_positions`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from minigpt4_runtime.config import VisionConfig
from minigpt4_runtime.model.linear import Linear
from minigpt4_runtime.model.row_operations import LayerNorm, Residual


class EvaAttention(nn.Module):
    """Self-attention over all rows. Queries and values have a bias, keys have none (it is zero)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.out = Linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, P, C) → (N, P, C)."""
        n, p, c = hidden.shape
        qkv = self.qkv(hidden).view(n, p, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v)
        return self.out(attended.transpose(1, 2).reshape(n, p, c))  # type: ignore[no-any-return]


class EvaBlock(nn.Module):
    """Pre-norm attention and a GELU feed-forward, each added to its input."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = EvaAttention(config)
        self.mlp_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp_in = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.mlp_out = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, rows: Residual) -> Residual:
        """(N, P, C) → (N, P, C)."""
        hidden, normed = self.attention_norm(*rows)
        hidden, normed = self.mlp_norm(hidden, self.attention(normed))
        return Residual(hidden, self.mlp_out(functional.gelu(self.mlp_in(normed))))


class EvaVit(nn.Module):
    """The tower: patches, a class row, learned positions and the blocks."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.patch_size = config.patch_size
        # A convolution whose stride is its width: one product per patch, upstream's PatchEmbed.
        self.patch_embedding = Linear(3 * config.patch_size**2, size, bias=True)
        self.class_embedding = nn.Parameter(torch.empty(size))
        self.position_embedding = nn.Parameter(torch.empty(config.num_patches + 1, size))
        self.blocks = nn.ModuleList(EvaBlock(config) for _ in range(config.num_hidden_layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) → (N, P, C). Example: 224 px and patch 14 give P = 257."""
        patches = self.patch_embedding(self._cut(pixels))
        class_row = self.class_embedding.expand(pixels.shape[0], 1, -1)
        rows = Residual(torch.cat([class_row, patches], dim=1) + self.position_embedding)
        for block in self.blocks:
            rows = block(rows)
        return rows.total

    def _cut(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) → (N, patches, 3·p·p): row by row of patches, each channel by channel."""
        n, _, side, _ = pixels.shape
        count, patch = side // self.patch_size, self.patch_size
        grid = pixels.reshape(n, 3, count, patch, count, patch).permute(0, 2, 4, 1, 3, 5)
        return grid.reshape(n, count * count, 3 * patch * patch)


def resize_positions(table: Tensor, num_patches: int) -> Tensor:
    """Stretch a position table to another image size, bicubic, as upstream's interpolate_pos_embed.

    (1 + P, C) → (1 + num_patches, C); the class position stays. Both patch counts are squares.
    """
    if len(table) == num_patches + 1:
        return table
    old, new = round((len(table) - 1) ** 0.5), round(num_patches**0.5)
    grid = table[1:].float().view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    patches = grid.permute(0, 2, 3, 1).reshape(num_patches, -1).to(table.dtype)
    return torch.cat([table[:1], patches])
