"""Executes plans: pictures → rows, ids and rows → embeddings, embeddings → logits.

Owns   the hands: model, vision encoder, attention kernel, and the memory of the caches.
Takes  a StepPlan and the pixels it speaks of; gives logits.
Never  decides what runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from minigpt4_runtime.cache.image_cache import ImageCache
from minigpt4_runtime.cache.key_value import KeyValueCache
from minigpt4_runtime.config import EngineConfig
from minigpt4_runtime.engine.plan import StepPlan
from minigpt4_runtime.errors import BackendUnavailableError
from minigpt4_runtime.kernels.contracts import AttentionKernel, BatchLayout, SequenceSlice
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.vision.contracts import VisionEncoder

PICTURES_AT_ONCE = 8
_UNKNOWN_FREE_BYTES = 4 * 2**30  # Where a system does not say how much is free.


def fit_num_blocks(
    config: EngineConfig, language: Llama, *, free_bytes: int | None, share: float
) -> int:
    """How many blocks to make.

    What `share` of `free_bytes`, which the weights leave, holds of this rank's keys and values; and
    never more than all answers can fill.

    Raises:
        BackendUnavailableError: there is no room for a single block.
    """
    block = _new_cache(language, config, num_blocks=1, device="meta")
    block_bytes = block.keys.nbytes + block.values.nbytes
    most = config.max_running * -(-language.config.max_position_embeddings // config.block_size)
    left_bytes = _UNKNOWN_FREE_BYTES if free_bytes is None else free_bytes
    num_blocks = min(most, int(left_bytes * share) // block_bytes)
    if num_blocks < 1:
        raise BackendUnavailableError(
            "The weights leave no memory for the keys and values of a prompt. Load the model in a "
            "smaller dtype, or on another device."
        )
    return num_blocks


def _new_cache(
    language: Llama, config: EngineConfig, *, num_blocks: int, device: torch.device | str
) -> KeyValueCache:
    """Not written to, and so no memory is taken before a block is first used."""
    shape = (
        language.config.num_hidden_layers, num_blocks, config.block_size,
        language.num_key_value_heads, language.config.head_dim,
    )  # fmt: skip
    weight = language.token_embedding.weight
    return KeyValueCache(*(weight.new_empty(shape, device=device) for _ in range(2)))


class Runner:
    """Runs the model on one device, in a cache of a fixed number of blocks.

    Of several ranks, the leader alone has a vision encoder.
    """

    def __init__(
        self,
        language: Llama,
        vision: VisionEncoder | None,
        attention: AttentionKernel,
        *,
        config: EngineConfig,
        num_blocks: int,
    ) -> None:
        self._language = language
        self._vision = vision
        self._attention = attention
        self._images = ImageCache(config.image_cache_bytes)
        device = language.token_embedding.weight.device
        self._cache = _new_cache(language, config, num_blocks=num_blocks, device=device)
        self.num_blocks = num_blocks
        self.num_encoded_images, self.encode_seconds = 0, 0.0

    @torch.inference_mode()
    def execute(self, plan: StepPlan, pixels: Mapping[str, Tensor]) -> Tensor:
        """Compute a step: (R, V) float32 logits, a row for each sampled slice.

        `pixels` has every picture of the plan by its digest.
        """
        self._copy_blocks(plan)
        batch = _layout(plan)
        positions = torch.tensor(batch.positions(), device=self._cache.keys.device)
        attend = self._attention(self._cache, batch)
        hidden = self._language(self.embed(plan, pixels), positions, attend)
        ends, row = [], 0
        for each in plan.slices:
            row += len(each.token_ids)
            if each.is_sampled:
                ends.append(row - 1)
        return self._language.logits(hidden[ends])

    @torch.inference_mode()
    def embed(self, plan: StepPlan, pixels: Mapping[str, Tensor]) -> Tensor:
        """The plan's ids and pictures → (T, C) rows as the language model reads them."""
        ids = torch.tensor([i for each in plan.slices for i in each.token_ids])
        device = self._cache.keys.device
        embeddings = self._language.embed(ids.to(device, non_blocking=True))
        image_rows = self._encode(plan, pixels)
        first_row = 0
        for each in plan.slices:
            for part in each.images:
                rows = image_rows[part.digest][part.image_row : part.image_row + part.num_rows]
                start = first_row + part.slice_row
                embeddings[start : start + part.num_rows] = rows
            first_row += len(each.token_ids)
        # The leader's rows of pictures come along: the others have zeros there.
        return self._language.group.sum(embeddings)

    def _encode(self, plan: StepPlan, pixels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows of the plan's pictures; those not kept are encoded, several at once."""
        wanted = dict.fromkeys(part.digest for each in plan.slices for part in each.images)
        found = {digest: self._images.get(digest) for digest in wanted}
        missing = [digest for digest, rows in found.items() if rows is None]
        for first in range(0, len(missing), PICTURES_AT_ONCE):
            some = missing[first : first + PICTURES_AT_ONCE]
            assert self._vision is not None, "only the leader's plan has pictures"
            started = time.perf_counter()
            encoded = self._vision.encode(torch.stack([pixels[digest] for digest in some]))
            self.encode_seconds += time.perf_counter() - started
            self.num_encoded_images += len(some)
            # Copied apart: a view would keep its whole batch alive.
            found.update({d: rows.clone() for d, rows in zip(some, encoded, strict=True)})
        rows_by_digest = {digest: rows for digest, rows in found.items() if rows is not None}
        for digest, rows in rows_by_digest.items():
            self._images.put(digest, rows)
        return rows_by_digest

    def _copy_blocks(self, plan: StepPlan) -> None:
        if plan.copies:
            source, target = (list(side) for side in zip(*plan.copies, strict=True))
            for side in (self._cache.keys, self._cache.values):
                side[:, target] = side[:, source]


def _layout(plan: StepPlan) -> BatchLayout:
    row, sequences = 0, []
    for each in plan.slices:
        count = len(each.token_ids)
        sequences.append(SequenceSlice(row, count, each.start + count, each.blocks))
        row += count
    return BatchLayout(tuple(sequences))
