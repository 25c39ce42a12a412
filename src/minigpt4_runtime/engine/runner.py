"""Executes plans: pictures → rows, ids and rows → embeddings, embeddings → logits.

Owns   the hands: model, vision encoder, attention kernel, and the memory of the caches.
Takes  a StepPlan and the pixels it speaks of; gives logits.
Never  decides what runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from minigpt4_runtime.cache.image_cache import ImageCache
from minigpt4_runtime.cache.key_value import CACHE_FORMATS, CacheShape, KeyValueCache
from minigpt4_runtime.config import DTypeName, EngineConfig
from minigpt4_runtime.engine.plan import StepPlan
from minigpt4_runtime.engine.step_buffers import StepBuffers
from minigpt4_runtime.errors import BackendUnavailableError
from minigpt4_runtime.kernels.contracts import AttentionKernel
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
    dtype = cache_dtype(config, language)
    block_bytes = CACHE_FORMATS[dtype].block_bytes(_cache_shape(config, language), dtype)
    most = config.max_running * -(-language.config.max_position_embeddings // config.block_size)
    left_bytes = _UNKNOWN_FREE_BYTES if free_bytes is None else free_bytes
    num_blocks = min(most, int(left_bytes * share) // block_bytes)
    if num_blocks < 1:
        raise BackendUnavailableError(
            "The weights leave no memory for the keys and values of a prompt. Load the model in a "
            "smaller dtype, or on another device."
        )
    return num_blocks


def cache_dtype(config: EngineConfig, language: Llama) -> DTypeName:
    """What keys and values are kept in; auto is what the model computes in."""
    if config.cache_dtype != "auto":
        return config.cache_dtype
    return str(language.token_embedding.weight.dtype).removeprefix("torch.")  # type: ignore[return-value]


def create_cache(config: EngineConfig, language: Llama, num_blocks: int) -> KeyValueCache:
    """An empty cache for this rank's keys and values."""
    dtype, device = cache_dtype(config, language), language.token_embedding.weight.device
    shape = _cache_shape(config, language)
    return CACHE_FORMATS[dtype].create(shape, num_blocks, dtype=dtype, device=device)


def _cache_shape(config: EngineConfig, language: Llama) -> CacheShape:
    return CacheShape(
        language.config.num_hidden_layers, language.num_key_value_heads,
        language.config.head_dim, config.block_size,
    )  # fmt: skip


class Runner:
    """Runs the model on one device, in a cache of a fixed number of blocks.

    `bind` gives the attention kernel for that cache. Of several ranks, the leader alone has a
    vision encoder.
    """

    def __init__(
        self,
        language: Llama,
        vision: VisionEncoder | None,
        bind: Callable[[KeyValueCache], AttentionKernel],
        *,
        config: EngineConfig,
        num_blocks: int,
    ) -> None:
        self._language = language
        self._vision = vision
        self._images = ImageCache(config.image_cache_bytes)
        self._cache = create_cache(config, language, num_blocks)
        self._attention = bind(self._cache)
        self._buffers = StepBuffers(
            config,
            max_context=language.config.max_position_embeddings,
            device=language.token_embedding.weight.device,
        )
        self.num_blocks = num_blocks
        self.num_encoded_images, self.encode_seconds = 0, 0.0

    @torch.inference_mode()
    def execute(self, plan: StepPlan, pixels: Mapping[str, Tensor]) -> Tensor:
        """Compute a step: (R, V) float32 logits, a row for each sampled slice.

        `pixels` has every picture of the plan by its digest.
        """
        if plan.copies:
            self._cache.copy_blocks(*zip(*plan.copies, strict=True))
        step = self._buffers.load(plan)
        attend = self._attention(step.batch)
        embeddings = self._embed(plan, step.token_ids, pixels)
        hidden = self._language(embeddings, step.positions, attend)
        return self._language.logits(hidden.index_select(0, step.sampled_rows))

    def _embed(self, plan: StepPlan, token_ids: Tensor, pixels: Mapping[str, Tensor]) -> Tensor:
        """The plan's ids and pictures → (T, C) rows as the language model reads them."""
        embeddings = self._language.embed(token_ids)
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
