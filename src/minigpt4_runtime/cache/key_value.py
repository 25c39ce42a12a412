"""The keys and values of all layers, in blocks.

Owns   their layout in memory.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of all layers, each (layers, num_blocks, block_size, Hkv, D)."""

    keys: Tensor
    values: Tensor

    @property
    def block_size(self) -> int:
        """How many tokens a block holds."""
        return self.keys.shape[2]
