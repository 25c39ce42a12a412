"""The Llama language model (Touvron et al., 2023; upstream: transformers' modeling_llama).

Owns   embeddings → hidden rows → logits for packed tokens: T rows of any number of sequences.
Takes  the rows, their positions, and `attend`, which knows the sequences and their cache.
Never  sees a cache, a batch or a device: those are bound into `attend` by whoever calls.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from minigpt4_runtime.config import LanguageConfig
from minigpt4_runtime.model.linear import Linear


class Attend(Protocol):
    """Causal attention of layer `layer` for the packed tokens of this step."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, H, D), (T, Hkv, D), (T, Hkv, D) → (T, H, D)."""
        ...


class RMSNorm(nn.Module):
    """Scale rows to unit root mean square, in float32, then by a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """(T, C) → (T, C)."""
        if hidden.dtype == torch.float32:
            return functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
        normed = functional.rms_norm(hidden.float(), self.weight.shape, eps=self.eps)
        return self.weight * normed.to(hidden.dtype)


class Rotation:
    """Rotary positions (Su et al., 2021) for the tokens of one step, shared by all layers."""

    def __init__(self, positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> None:
        exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
        angles = positions.float()[:, None] * (1.0 / theta**exponents)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self._cos = torch.cat([cos, cos], dim=-1)[:, None]  # (T, 1, D)
        self._sin = torch.cat([-sin, sin], dim=-1)[:, None]

    def __call__(self, heads: Tensor) -> Tensor:
        """(T, H, D) → (T, H, D): the first half of a head turns against the second."""
        swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
        return torch.addcmul(heads * self._cos, swapped, self._sin)


class LlamaAttention(nn.Module):
    """Queries, keys and values of one layer; the attention itself is `attend`."""

    def __init__(self, config: LanguageConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        size, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.query = Linear(size, size, bias=False)
        self.key = Linear(size, kv_size, bias=False)
        self.value = Linear(size, kv_size, bias=False)
        self.out = Linear(size, size, bias=False)

    def forward(self, hidden: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """(T, C) → (T, C)."""
        q, k, v = (
            rows.view(len(hidden), -1, self.head_dim)
            for rows in (self.query(hidden), self.key(hidden), self.value(hidden))
        )
        attended = attend(self.layer, rotation(q), rotation(k), v)
        return self.out(attended.reshape(len(hidden), -1))  # type: ignore[no-any-return]


class LlamaLayer(nn.Module):
    """Pre-norm attention and a gated feed-forward, each added to its input."""

    def __init__(self, config: LanguageConfig, layer: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.attention_norm = RMSNorm(size, config.rms_norm_eps)
        self.attention = LlamaAttention(config, layer)
        self.mlp_norm = RMSNorm(size, config.rms_norm_eps)
        self.mlp_gate = Linear(size, config.intermediate_size, bias=False)
        self.mlp_up = Linear(size, config.intermediate_size, bias=False)
        self.mlp_down = Linear(config.intermediate_size, size, bias=False)

    def forward(self, hidden: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """(T, C) → (T, C)."""
        hidden = hidden + self.attention(self.attention_norm(hidden), rotation, attend)
        normed = self.mlp_norm(hidden)
        gated = functional.silu(self.mlp_gate(normed)) * self.mlp_up(normed)
        return hidden + self.mlp_down(gated)  # type: ignore[no-any-return]


class Llama(nn.Module):
    """The language model: embedding table, layers, final norm and head."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        # Given its weight, so that torch draws no numbers for it: on the meta device that alone
        # would load torch's compiler.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size, _weight=table)
        self.layers = nn.ModuleList(
            LlamaLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, token_ids: Tensor) -> Tensor:
        """(T,) ids → (T, C) rows."""
        return self.token_embedding(token_ids)  # type: ignore[no-any-return]

    def forward(self, embeddings: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """(T, C) rows at (T,) positions → (T, C) hidden rows, normed and ready for the head."""
        rotation = Rotation(
            positions, self.config.head_dim, self.config.rope_theta, embeddings.dtype
        )
        hidden: Tensor = embeddings
        for layer in self.layers:
            hidden = layer(hidden, rotation, attend)
        return self.norm(hidden)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, C) hidden rows → (B, V) logits in float32. Give it only the rows that choose."""
        return self.head(hidden).float()  # type: ignore[no-any-return]
