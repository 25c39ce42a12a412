"""What a pass keeps of its layers, so that memory holds that and no more.

Owns   the choice of layers, heads, rows and columns, and what is kept while it is gathered.
Takes  names, or a mapping with numbers; gives tensors whose first dimension is the kept layers.
Never  keeps what was not asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from minigpt4_runtime.config import check_field_names
from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.lab.hooks import Layers, pick

KeepLike = Sequence[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Keep:
    """What to keep.

    `hidden` are numbers of rows behind layers: 0 is the embeddings, L the last layer's, before the
    final norm. `attention` are layers, 0 to L - 1, of which only these `heads`. `rows` and
    `columns` are slices of the whole sequence, counted from its beginning: of whom something is
    kept, and for attention at whom they look.
    """

    hidden: Layers = ()
    attention: Layers = ()
    heads: Layers = "all"
    rows: slice | None = None
    columns: slice | None = None

    @classmethod
    def read(cls, given: KeepLike) -> Keep:
        """Names of what to keep whole, or a mapping with these fields.

        Raises:
            RequestError: something cannot be kept.
            ConfigError: the mapping has another name.
        """
        if isinstance(given, str):
            raise RequestError(f"keep is {given!r}; write keep=({given!r},).")
        values = given if isinstance(given, Mapping) else dict.fromkeys(given, "all")
        check_field_names(values, tuple(field.name for field in fields(cls)), "keep")
        keep = cls(**values)
        for name in ("rows", "columns"):
            value = getattr(keep, name)
            if value is not None and not (isinstance(value, slice) and value.step in (None, 1)):
                raise RequestError(f"keep: {name} is {value!r}; it must be a slice without steps.")
        return keep


class Kept:
    """What one pass over the rows `start` to `stop` keeps."""

    def __init__(
        self, keep: Keep, *, num_layers: int, num_heads: int, start: int, stop: int
    ) -> None:
        self._hidden_layers = pick(keep.hidden, num_layers + 1, "row of hidden")
        self._attention_layers = pick(keep.attention, num_layers, "layer")
        self._heads = pick(keep.heads, num_heads, "head")
        first, last, _ = (keep.rows or slice(None)).indices(stop)
        self._rows = slice(max(0, first - start), max(0, last - start))
        self._columns = keep.columns or slice(None)
        self.rows_of: dict[int, Tensor] = {}
        self.shares_of: dict[int, Tensor] = {}

    def wants_attention(self, layer: int) -> bool:
        """Whether the shares of a layer are kept."""
        return layer in self._attention_layers

    def wants_hidden(self, number: int) -> bool:
        """Whether the rows behind so many layers are kept."""
        return number in self._hidden_layers

    def take_attention(self, layer: int, shares: Tensor) -> None:
        """Keep of (B, H, Q, T) shares of attention."""
        if self.wants_attention(layer):
            self.shares_of[layer] = _part(shares[:, self._heads, self._rows, self._columns])

    def take_hidden(self, number: int, rows: Tensor) -> None:
        """Keep of (B, Q, C) rows."""
        if self.wants_hidden(number):
            self.rows_of[number] = _part(rows[:, self._rows])

    def select(self, rows: Sequence[int]) -> Kept:
        """The same of these sequences, in this order."""
        other, index = copy(self), list(rows)
        other.rows_of = {at: kept[index] for at, kept in self.rows_of.items()}
        other.shares_of = {at: kept[index] for at, kept in self.shares_of.items()}
        return other

    @property
    def hidden(self) -> Tensor | None:
        """(kept, B, Q, C), in the order in which layers were named; None if none was."""
        return _stack(self.rows_of, self._hidden_layers)

    @property
    def attention(self) -> Tensor | None:
        """(kept, B, H, Q, T), each row's shares of those that it sees; None if none was named."""
        return _stack(self.shares_of, self._attention_layers)


def _part(kept: Tensor) -> Tensor:
    """In memory of its own: else the whole would be held that it is a part of."""
    is_whole = kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
    return kept if is_whole else kept.clone()


def _stack(kept: Mapping[int, Tensor], order: Sequence[int]) -> Tensor | None:
    return torch.stack([kept[number] for number in order]) if order else None
