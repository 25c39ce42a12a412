"""Executes plans: images → rows, ids and rows → embeddings, embeddings → logits.

Owns   the model, the vision encoder, the attention kernel, and the memory of the caches.
Takes  a StepPlan and the pixels of its images; gives logits.
Never  decides what runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from minigpt4_runtime.cache.image_cache import ImageCache
from minigpt4_runtime.cache.key_value import (
    CACHE_FORMATS,
    CacheShape,
    Int4Cache,
    KeyValueCache,
    QuantisedCache,
)
from minigpt4_runtime.config import CacheDTypeName, EngineConfig
from minigpt4_runtime.devices.contracts import Capture
from minigpt4_runtime.engine.graphs import DecodeGraphs
from minigpt4_runtime.engine.plan import StepPlan
from minigpt4_runtime.engine.step_buffers import Step, StepBuffers
from minigpt4_runtime.errors import BackendUnavailableError
from minigpt4_runtime.kernels.contracts import AttentionKernel
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.model.usual_keys import usual_keys
from minigpt4_runtime.vision.contracts import VisionEncoder

IMAGES_AT_ONCE = 8
_UNKNOWN_FREE_BYTES = 4 * 2**30  # Where a system does not say how much is free.


def fit_num_blocks(
    config: EngineConfig, language: Llama, *, free_bytes: int | None, share: float
) -> int:
    """How many blocks to make.

    As many as fit into `share` of `free_bytes`, the memory that the weights leave, and no more than
    all answers can fill.

    Raises:
        BackendUnavailableError: there is no room for a single block.
    """
    shape, dtype = _cache_form(config, language)
    block_bytes = shape.block_bytes(dtype)
    most = config.max_running * -(-language.config.context_length // config.block_size)
    left_bytes = _UNKNOWN_FREE_BYTES if free_bytes is None else free_bytes
    num_blocks = min(most, int(left_bytes * share) // block_bytes)
    if num_blocks < 1:
        raise BackendUnavailableError(
            "The weights leave no memory for the keys and values of a prompt. Load the model in a "
            "smaller dtype, or on another device."
        )
    return num_blocks


def _cache_form(config: EngineConfig, language: Llama) -> tuple[CacheShape, CacheDTypeName]:
    """The shape and dtype of this rank's cache; auto is the dtype that the model computes in."""
    shape = CacheShape(
        language.config.num_hidden_layers, language.num_key_value_heads,
        language.config.head_dim, config.block_size,
    )  # fmt: skip
    computes_in = str(language.token_embedding.weight.dtype).removeprefix("torch.")
    dtype = computes_in if config.cache_dtype == "auto" else config.cache_dtype
    return shape, cast(CacheDTypeName, dtype)


@dataclass
class EncodeCount:
    """How many images a runner has encoded, and how long that took."""

    num_images: int = 0
    seconds: float = 0.0


class Runner:
    """Runs the model on one device, in a cache of a fixed number of blocks.

    `bind` gives the attention kernel for that cache. Of several ranks, the leader alone has a
    vision encoder. With `capture`, decode steps are launched as graphs; `least` then gives the
    smallest of all ranks' numbers. `tuned` are the encoders of adapters that have one.
    """

    def __init__(
        self,
        language: Llama,
        vision: VisionEncoder | None,
        bind: Callable[[KeyValueCache], AttentionKernel],
        *,
        config: EngineConfig,
        num_blocks: int,
        capture: Capture | None = None,
        least: Callable[[int], int] = int,
        tuned: Mapping[int, VisionEncoder] | None = None,
    ) -> None:
        self._language = language
        self._vision = vision
        self._tuned = tuned or {}
        self._images = ImageCache(config.image_cache_bytes)
        max_context = language.config.context_length
        device = language.token_embedding.weight.device
        shape, dtype = _cache_form(config, language)
        # One more block, for the rows that pad a step.
        self._cache = CACHE_FORMATS[dtype].create(shape, num_blocks + 1, dtype=dtype, device=device)
        # With 8 bits there is next to nothing to win: see docs/log.md.
        if isinstance(self._cache, Int4Cache):
            self._cache.key_centre = Int4Cache.find_centre(*usual_keys(language))
        self._attention = bind(self._cache)
        self._buffers = StepBuffers(
            config, max_context=max_context, scratch_block=num_blocks, device=device
        )
        # Of the model and the kernel alone: holding the runner would keep its cache alive.
        self._graphs = DecodeGraphs(
            partial(_decode, language, self._attention),
            capture if self._attention.is_capturable else None,
            max_running=config.max_running, vocab_size=language.config.vocab_size, least=least,
        )  # fmt: skip
        self.num_blocks = num_blocks
        self.encoded = EncodeCount()

    @property
    def key_centre(self) -> Tensor | None:
        """See `QuantisedCache`."""
        return self._cache.key_centre if isinstance(self._cache, QuantisedCache) else None

    def room_for_choices(self, count: int) -> Tensor:
        """Where the choices of a step come to, from the rank that makes them: (count,) ids."""
        return torch.empty(count, dtype=torch.int64, device=self._cache.device)

    @torch.inference_mode()
    def execute(
        self, plan: StepPlan, pixels: Mapping[str, Tensor], choices: Tensor | None = None
    ) -> Tensor:
        """Compute a step: (R, V) float32 logits, a row for each sampled token.

        `pixels` has every image of the plan by its digest. `choices` are those of the step before,
        where the plan has ids that are not known yet. The logits are valid until the next step.
        """
        if plan.copies:
            self._cache.copy_blocks(*zip(*plan.copies, strict=True))
        size = self._graphs.size_of(plan)
        step = self._buffers.load(plan, num_sequences=size, choices=choices)
        if size:
            return self._graphs.logits(step)[: len(plan.slices)]
        attend = self._attention(step.batch)
        embeddings = self._embed(plan, step.token_ids, pixels)
        hidden = self._language(embeddings, step.positions, attend, step.adapters)
        return self._language.logits(hidden.index_select(0, step.sampled_rows))

    def _embed(self, plan: StepPlan, token_ids: Tensor, pixels: Mapping[str, Tensor]) -> Tensor:
        """The plan's ids and images → (T, C) rows as the language model reads them."""
        embeddings = self._language.embed(token_ids)
        image_rows = self._encode(plan, pixels)
        first_row = 0
        for each in plan.slices:
            for part in each.images:
                rows = image_rows[part.digest][part.image_row : part.image_row + part.num_rows]
                start = first_row + part.slice_row
                embeddings[start : start + part.num_rows] = rows
            first_row += len(each.token_ids)
        # Only the leader has rows of images: the other ranks add zeros.
        return self._language.group.sum(embeddings)

    def _encode(self, plan: StepPlan, pixels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows of the plan's images; those not in the cache are encoded, several at once."""
        wanted = {part.digest: each.adapter for each in plan.slices for part in each.images}
        found = {digest: self._images.get(digest) for digest in wanted}
        missing: dict[VisionEncoder | None, list[str]] = {}
        for digest in (digest for digest, rows in found.items() if rows is None):
            missing.setdefault(self._tuned.get(wanted[digest], self._vision), []).append(digest)
        for encoder, digests in missing.items():
            assert encoder is not None, "only the leader's plan has images"
            for first in range(0, len(digests), IMAGES_AT_ONCE):
                some = digests[first : first + IMAGES_AT_ONCE]
                started = time.perf_counter()
                encoded = encoder.encode(torch.stack([pixels[digest] for digest in some]))
                self.encoded.seconds += time.perf_counter() - started
                self.encoded.num_images += len(some)
                # Cloned: a view would keep its whole batch alive.
                found.update({d: rows.clone() for d, rows in zip(some, encoded, strict=True)})
        rows_by_digest = {digest: rows for digest, rows in found.items() if rows is not None}
        for digest, rows in rows_by_digest.items():
            self._images.put(digest, rows)
        return rows_by_digest


def _decode(language: Llama, attention: AttentionKernel, step: Step) -> Tensor:
    """A step in which all rows are sampled, and none is of an image → its logits."""
    embeddings = language.group.sum(language.embed(step.token_ids))
    attend = attention(step.batch)
    return language.logits(language(embeddings, step.positions, attend, step.adapters))
