"""The Llama language model (Touvron et al., 2023; upstream: transformers' modeling_llama).

Owns   embeddings → hidden rows → logits for packed tokens: T rows of any number of sequences.
Takes  the rows, their positions, and `attend`, which knows the sequences and their cache; and the
       group of ranks that share the model: each computes some of the heads, and two sums a layer
       make them whole.
Never  sees a cache, a batch or a device: the caller binds those into `attend`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from minigpt4_runtime.config import AdapterConfig, LanguageConfig
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.model.linear import Joint, Linear
from minigpt4_runtime.model.parallel import Group, Solo, share
from minigpt4_runtime.model.rotary import Rotation
from minigpt4_runtime.model.row_operations import Residual, UsesOperations


class Attend(Protocol):
    """Causal attention of layer `layer` for the packed tokens of this step."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, H, D), (T, Hkv, D), (T, Hkv, D) → (T, H, D)."""


@dataclass(frozen=True)
class TurningAttend:
    """An `Attend` that can turn queries and keys itself, on their way into its cache.

    `attend` takes their rotation too; with None they are turned already, as for any `Attend`.
    """

    attend: Callable[[int, Tensor, Tensor, Tensor, Rotation | None], Tensor]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        return self.attend(layer, q, k, v, None)


class RMSNorm(UsesOperations):
    """Scale rows to unit root mean square, in float32, then by a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(T, C) rows → their sum, if any are added, and its norm. `added` may be overwritten."""
        return self.operations.add_and_norm(hidden, added, self.weight, self.eps)


class LlamaAttention(nn.Module):
    """Queries, keys and values of one layer; the attention itself is `attend`."""

    def __init__(self, config: LanguageConfig, layer: int, group: Group) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self._group = group
        size = config.hidden_size
        q_size = config.num_attention_heads * config.head_dim // group.size
        kv_size = config.num_key_value_heads * config.head_dim // group.size
        self.query = Linear(size, q_size, bias=False)
        self.key = Linear(size, kv_size, bias=False)
        self.value = Linear(size, kv_size, bias=False)
        self.out = Linear(q_size, size, bias=False)
        self.inputs = Joint(self.query, self.key, self.value)

    def forward(
        self, hidden: Tensor, rotation: Rotation, attend: Attend, chosen: Tensor | None = None
    ) -> Tensor:
        """(T, C) → (T, C)."""
        q, k, v = (
            rows.view(len(hidden), -1, self.head_dim) for rows in self.inputs(hidden, chosen)
        )
        if isinstance(attend, TurningAttend):
            attended = attend.attend(self.layer, q, k, v, rotation)
        else:
            attended = attend(self.layer, rotation(q), rotation(k), v)
        return self._group.sum(self.out(attended.reshape(len(hidden), -1), chosen))


class LlamaLayer(UsesOperations):
    """Pre-norm attention and a gated feed-forward, each added to its input."""

    def __init__(self, config: LanguageConfig, layer: int, group: Group) -> None:
        super().__init__()
        self._group = group
        size, gated_size = config.hidden_size, config.intermediate_size // group.size
        self.attention_norm = RMSNorm(size, config.rms_norm_eps)
        self.attention = LlamaAttention(config, layer, group)
        self.mlp_norm = RMSNorm(size, config.rms_norm_eps)
        self.mlp_gate = Linear(size, gated_size, bias=False)
        self.mlp_up = Linear(size, gated_size, bias=False)
        self.mlp_down = Linear(gated_size, size, bias=False)
        self.mlp_inputs = Joint(self.mlp_gate, self.mlp_up)

    def forward(
        self,
        rows: Residual,
        rotation: Rotation,
        attend: Attend,
        chosen: Tensor | None = None,
    ) -> Residual:
        """(T, C) → (T, C)."""
        hidden, normed = self.attention_norm(*rows)
        hidden, normed = self.mlp_norm(hidden, self.attention(normed, rotation, attend, chosen))
        gated = self.operations.gate(*self.mlp_inputs(normed, chosen))
        return Residual(hidden, self._group.sum(self.mlp_down(gated, chosen)))


class Llama(nn.Module):
    """The language model: embedding table, layers, final norm and head."""

    def __init__(self, config: LanguageConfig, group: Group | None = None) -> None:
        super().__init__()
        self.config = config
        self.group = group = group or Solo()
        self.num_key_value_heads = config.num_key_value_heads // group.size
        self._held_ids = share(config.vocab_size, group)
        num_ids = len(self._held_ids)
        # Given its weight, so that torch draws no numbers for it, which on the meta device would
        # load torch's compiler.
        table = torch.empty(num_ids, config.hidden_size)
        self.token_embedding = nn.Embedding(num_ids, config.hidden_size, _weight=table)
        self.layers = nn.ModuleList(
            LlamaLayer(config, layer, group) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, num_ids, bias=False)
        if config.adapters is not None:
            self._adapt(config.adapters)

    def _adapt(self, adapters: AdapterConfig) -> None:
        linears = {n: each for n, each in self.named_modules() if isinstance(each, Linear)}
        for name, rank in adapters.ranks:
            if name not in linears:
                raise ConfigError(
                    f"config.json has an adapter for {name!r:.80}, which is no weight of the "
                    "language model. Convert again."
                )
            linears[name].adapt(rank, adapters.alpha)

    def embed(self, token_ids: Tensor) -> Tensor:
        """(T,) ids → (T, C) rows: this rank's part of the sum that is the embeddings.

        Ids past the vocabulary stand for rows of an image. The caller replaces their rows.
        """
        held = token_ids - self._held_ids.start
        rows: Tensor = self.token_embedding(held.clamp(0, len(self._held_ids) - 1))
        if self.group.size == 1:
            return rows
        is_foreign = (held < 0) | (held >= len(self._held_ids))
        return rows.masked_fill(is_foreign[:, None], 0)

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        attend: Attend,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """(T, C) rows at (T,) positions → (T, C) hidden rows, normed and ready for the head.

        `chosen` (T,) are the numbers of the rows' adapters, as `Linear.choice` has them.
        """
        rotation = Rotation(positions, self.config, embeddings.dtype)
        rows = Residual(embeddings)
        for layer in self.layers:
            rows = layer(rows, rotation, attend, chosen)
        _, normed = self.norm(*rows)
        return normed  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, C) hidden rows → (B, V) logits in float32. Give it only the rows that choose."""
        part, longest = self.head(hidden), -(-self.config.vocab_size // self.group.size)
        if len(self._held_ids) < longest:
            part = functional.pad(part, (0, longest - len(self._held_ids)))
        return self.group.join(part)[:, : self.config.vocab_size].float()
