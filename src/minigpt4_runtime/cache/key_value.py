"""The keys and values of all layers, in blocks of tokens.

Owns   their layout in memory and their format: how a key is stored, written and read back.
Takes  slots, which count tokens through all blocks: block · block_size + place in the block.
Never  knows which block belongs to which sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from minigpt4_runtime.cache.sending import send
from minigpt4_runtime.cache.sizes import head_bytes, int4_group
from minigpt4_runtime.config import CacheDTypeName


@dataclass(frozen=True)
class CacheShape:
    """One rank's share of a token: `num_heads` keys and values of `head_dim` in each layer."""

    num_layers: int
    num_heads: int
    head_dim: int
    block_size: int

    def block_bytes(self, dtype: CacheDTypeName) -> int:
        """The size of one block of all layers, keys and values."""
        return (
            2
            * self.num_layers
            * self.block_size
            * self.num_heads
            * head_bytes(self.head_dim, dtype)
        )


class KeyValueCache(Protocol):
    """A cache of one format. Attention kernels state which formats they read."""

    shape: CacheShape
    num_blocks: int
    dtype: torch.dtype  # What is stored.
    device: torch.device

    @classmethod
    def create(
        cls, shape: CacheShape, num_blocks: int, *, dtype: CacheDTypeName, device: torch.device
    ) -> Self:
        """A cache that is not written to: no memory is taken before a block is first used."""

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put (T, heads, dim) keys and values of a layer into (T,) slots."""

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """(S,) slots → the layer's keys and values there, each (S, heads, dim) floats."""

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks of all layers, without waiting for the device."""

    @classmethod
    def as_read(cls, rows: Tensor, dtype: CacheDTypeName) -> Tensor:
        """What would be read of (…, dim) rows if they were written, in the dtype of the rows."""


class FloatCache:
    """Keys and values as floats, each (layers, num_blocks, block_size, heads, dim)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        num_layers, self.num_blocks, block_size, num_heads, head_dim = keys.shape
        self.shape = CacheShape(num_layers, num_heads, head_dim, block_size)
        self.dtype = keys.dtype
        self.device = keys.device

    @classmethod
    def create(
        cls, shape: CacheShape, num_blocks: int, *, dtype: CacheDTypeName, device: torch.device
    ) -> Self:
        """See `KeyValueCache`."""
        size = (shape.num_layers, num_blocks, shape.block_size, shape.num_heads, shape.head_dim)
        return cls(
            *(torch.empty(size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
        )

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `KeyValueCache`."""
        for side, new in ((self.keys, keys), (self.values, values)):
            side[layer].flatten(0, 1).index_copy_(0, slots, new.to(side.dtype))

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """See `KeyValueCache`."""
        keys, values = (
            side[layer].flatten(0, 1).index_select(0, slots) for side in (self.keys, self.values)
        )
        return keys, values

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See `KeyValueCache`."""
        _copy((self.keys, self.values), 1, sources, targets)

    @classmethod
    def as_read(cls, rows: Tensor, dtype: CacheDTypeName) -> Tensor:
        """See `KeyValueCache`."""
        return rows.to(getattr(torch, dtype)).to(rows.dtype)


_ROUNDINGS = 16
# In place of a scale of 0, which numbers that are alike have, where it divides.
_SMALLEST = torch.finfo(torch.float32).tiny


class QuantisedCache(ABC):
    """Keys and values as numbers of a byte or less, and the scales that make floats of them.

    A token's head is rounded when it is written, by itself, and is not touched again: copies and
    shared blocks hold the same numbers. Both tensors begin with (layers, 2, num_blocks, block_size,
    heads); of the 2, the first are the keys. Each format says what stands behind these.

    With a `key_centre` (layers, heads, dim), set before any key is written, keys are kept as
    differences from it, and `read` adds it. A kernel that reads the numbers may leave it out: it
    adds the same to all scores of a query, and the softmax takes that away.
    """

    scale_dtype: ClassVar[torch.dtype]
    number_dtype: ClassVar[torch.dtype]

    def __init__(self, numbers: Tensor, scales: Tensor, head_dim: int) -> None:
        self.numbers = numbers
        self.scales = scales
        num_layers, _, self.num_blocks, block_size, num_heads = numbers.shape[:5]
        self.shape = CacheShape(num_layers, num_heads, head_dim, block_size)
        self.dtype = numbers.dtype
        self.device = numbers.device
        self.key_centre: Tensor | None = None

    @classmethod
    def find_centre(cls, first: Tensor, mean: Tensor) -> Tensor:
        """The mean of all keys, moved to where a sequence's `first` key loses nothing.

        That key is far from the mean, and many heads attend to it more than to any other. All are
        (layers, heads, dim) float32.
        """
        kept = first - mean
        # What was rounded once may be rounded to something else again; soon it is not.
        for _ in range(_ROUNDINGS):
            kept = cls.unpack(*cls.pack(kept))
        return first - kept

    @classmethod
    @abstractmethod
    def tails(cls, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What one head of one token takes: the shapes of its numbers and of its scales."""

    @classmethod
    @abstractmethod
    def pack(cls, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(…, dim) float32 → numbers and scales."""

    @classmethod
    @abstractmethod
    def unpack(cls, numbers: Tensor, scales: Tensor) -> Tensor:
        """Numbers and scales → (…, dim) float32."""

    @classmethod
    def create(
        cls,
        shape: CacheShape,
        num_blocks: int,
        *,
        dtype: CacheDTypeName,  # noqa: ARG003
        device: torch.device,
    ) -> Self:
        """See `KeyValueCache`."""
        lead = (shape.num_layers, 2, num_blocks, shape.block_size, shape.num_heads)
        numbers, scales = cls.tails(shape.head_dim)
        return cls(
            torch.empty(lead + numbers, dtype=cls.number_dtype, device=device),
            torch.empty(lead + scales, dtype=cls.scale_dtype, device=device),
            shape.head_dim,
        )

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `KeyValueCache`."""
        rows = torch.stack((keys, values)).float()
        if self.key_centre is not None:
            rows[0] -= self.key_centre[layer]
        parts = self.pack(rows)
        for side, new in zip((self.numbers, self.scales), parts, strict=True):
            # As bytes, since torch copies no float8.
            here, there = (x.view(torch.uint8) if x.dtype.itemsize == 1 else x for x in (side, new))
            here[layer].flatten(1, 2).index_copy_(1, slots, there)

    def read(self, layer: int, slots: Tensor, heads: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """See `KeyValueCache`; of some heads alone where it is asked for these."""
        numbers, scales = (
            side[layer].flatten(1, 2)[:, :, heads].index_select(1, slots)
            for side in (self.numbers.view(torch.uint8), self.scales)
        )
        keys, values = self.unpack(numbers.view(self.number_dtype), scales)
        if self.key_centre is not None:
            keys = keys + self.key_centre[layer, heads]
        return keys, values

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See `KeyValueCache`."""
        _copy((self.numbers.view(torch.uint8), self.scales), 2, sources, targets)

    @classmethod
    def as_read(cls, rows: Tensor, dtype: CacheDTypeName) -> Tensor:  # noqa: ARG003
        """See `KeyValueCache`."""
        return cls.unpack(*cls.pack(rows.float())).to(rows.dtype)


class ScaledCache(QuantisedCache):
    """Bytes, and one float32 scale for each head of a token: its largest number over `largest`."""

    scale_dtype = torch.float32
    largest: ClassVar[float]

    @classmethod
    def tails(cls, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `QuantisedCache`."""
        return (head_dim,), ()

    @classmethod
    def pack(cls, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `QuantisedCache`."""
        scales = rows.abs().amax(-1) / cls.largest
        numbers = rows / scales.clamp(min=_SMALLEST)[..., None]
        return cls.round(numbers).to(cls.number_dtype), scales

    @classmethod
    @abstractmethod
    def round(cls, numbers: Tensor) -> Tensor:
        """Floats from -`largest` to it → what `number_dtype` holds, or nearly."""

    @classmethod
    def unpack(cls, numbers: Tensor, scales: Tensor) -> Tensor:
        """See `QuantisedCache`."""
        return numbers.float().mul_(scales[..., None])


class Int8Cache(ScaledCache):
    """Whole numbers from -127 to 127."""

    number_dtype = torch.int8
    largest = 127

    @classmethod
    def round(cls, numbers: Tensor) -> Tensor:
        """See `ScaledCache`."""
        return numbers.round_()


class Fp8Cache(ScaledCache):
    """Floats of 8 bits (e4m3) from -448 to 448."""

    number_dtype = torch.float8_e4m3fn
    largest = 448

    @classmethod
    def round(cls, numbers: Tensor) -> Tensor:
        """See `ScaledCache`: what is a little larger would become NaN."""
        return numbers.clamp_(-cls.largest, cls.largest)


class Int4Cache(QuantisedCache):
    """Half a byte a number, from 0 to 15: how many steps it lies above its group's lowest.

    A group is of 8 neighbours, or fewer where these do not divide half a head. In memory come the
    first numbers of all groups, then the second ones, and so on: a lane of a vector meets one group
    again and again. A byte holds one of the first half of these in its low bits, and that of the
    same place in the second half.

    The scales of a head are two float16, 128/127 of its largest step and of its largest lowest by
    magnitude; and behind these two bytes for each group, its step and its lowest as 128ths of them:
    first all steps (cf. the scales of llama.cpp's k-quants). A float32 holds each product exactly,
    so that kernels find the same numbers whether they fuse it with a sum or not.
    """

    number_dtype = torch.uint8
    scale_dtype = torch.int8

    @classmethod
    def tails(cls, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `QuantisedCache`."""
        return (head_dim // 2,), (4 + 2 * head_dim // int4_group(head_dim),)

    @classmethod
    def pack(cls, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `QuantisedCache`."""
        groups = rows.reshape(*rows.shape[:-1], -1, int4_group(rows.shape[-1]))
        lowest, highest = groups.aminmax(dim=-1)
        wanted = torch.stack(((highest - lowest) / 15, lowest), -2)
        largest = (wanted.abs().amax(-1) * (128 / 127)).half()
        shares = wanted / cls._units(largest).clamp(min=_SMALLEST)
        # What is no number has a largest that is none, and is read so.
        shares = shares.nan_to_num_(0).round_().clamp_(-127, 127).to(torch.int8)
        # Rounded by the scales as they are stored.
        step, start = cls._scales(largest, shares)
        steps = ((groups - start) / step.clamp(min=_SMALLEST)).nan_to_num_(0)
        numbers = steps.round_().clamp_(0, 15).to(torch.uint8)
        low, high = numbers.mT.flatten(-2).chunk(2, -1)
        return low | high << 4, torch.cat((largest.view(torch.int8), shares.flatten(-2)), -1)

    @classmethod
    def unpack(cls, numbers: Tensor, scales: Tensor) -> Tensor:
        """See `QuantisedCache`."""
        largest = scales[..., :4].contiguous().view(torch.float16)
        step, start = cls._scales(largest, scales[..., 4:].reshape(*scales.shape[:-1], 2, -1))
        steps = torch.cat((numbers & 15, numbers >> 4), -1)
        steps = steps.view(*steps.shape[:-1], -1, step.shape[-2]).mT
        return torch.addcmul(start, steps.float(), step).flatten(-2)

    @classmethod
    def _units(cls, largest: Tensor) -> Tensor:
        return largest.float()[..., None] / 128

    @classmethod
    def _scales(cls, largest: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """(…, 2) and (…, 2, groups) → the step and the lowest of each group, (…, groups, 1)."""
        step, start = (cls._units(largest) * shares.float())[..., None].unbind(-3)
        return step, start


def _copy(
    sides: Sequence[Tensor], dim: int, sources: Sequence[int], targets: Sequence[int]
) -> None:
    """Copy the blocks `sources` to `targets` in each tensor, along `dim`."""
    there = send(torch.tensor((sources, targets)), sides[0].device)
    for side in sides:
        side.index_copy_(dim, there[1], side.index_select(dim, there[0]))


# A format for each EngineConfig.cache_dtype but "auto".
CACHE_FORMATS: dict[CacheDTypeName, type[KeyValueCache]] = {
    "float32": FloatCache,
    "float16": FloatCache,
    "bfloat16": FloatCache,
    "int8": Int8Cache,
    "int4": Int4Cache,
    "fp8": Fp8Cache,
}
