"""Executes steps: images → rows, ids and rows → embeddings, embeddings → logits.

Owns   the hands: model, vision encoder and attention kernel, and the caches made for sequences.
Takes  what to run. Never decides what that is.
"""

import torch
from torch import Tensor

from minigpt4_runtime.backend.contracts import (
    AttentionKernel,
    BatchLayout,
    KeyValueCache,
    SequenceSlice,
    VisionEncoder,
)
from minigpt4_runtime.engine.request import Request
from minigpt4_runtime.model.minigpt4 import MiniGPT4Model


class SequenceCache:
    """Room for the keys and values of one sequence, in all layers."""

    def __init__(self, layers: tuple[KeyValueCache, ...], slots: Tensor) -> None:
        self.layers = layers
        self.slots = slots
        self.num_tokens = 0


class Runner:
    """Runs the model on one device."""

    def __init__(
        self, model: MiniGPT4Model, vision: VisionEncoder, attention: AttentionKernel
    ) -> None:
        self._model = model
        self._vision = vision
        self._attention = attention
        self.config = model.config

    @torch.inference_mode()
    def embed(self, request: Request) -> Tensor:
        """A prompt's ids and pictures → (T, C) rows as the language model reads them."""
        weight = self._model.language.token_embedding.weight
        ids = torch.tensor(request.token_ids, device=weight.device)
        # An image's ids lie past the vocabulary; any row will do until its own is put there.
        embeddings = self._model.language.embed(ids.clamp(max=self.config.language.vocab_size - 1))
        for picture in request.images:
            rows = self._vision.encode(picture.pixels[None])[0]
            embeddings[picture.start : picture.start + picture.num_rows] = rows
        return embeddings

    @torch.inference_mode()
    def embed_token(self, token_id: int) -> Tensor:
        """One id → (1, C)."""
        weight = self._model.language.token_embedding.weight
        return self._model.language.embed(torch.tensor([token_id], device=weight.device))

    def new_cache(self, num_slots: int) -> SequenceCache:
        """Empty caches with room for `num_slots` tokens."""
        weight, language = self._model.language.token_embedding.weight, self.config.language
        shape = (num_slots, language.num_key_value_heads, language.head_dim)
        layers = tuple(
            KeyValueCache(weight.new_empty(shape), weight.new_empty(shape))
            for _ in range(language.num_hidden_layers)
        )
        return SequenceCache(layers, torch.arange(num_slots, device=weight.device))

    @torch.inference_mode()
    def forward(self, embeddings: Tensor, cache: SequenceCache) -> Tensor:
        """Append (T, C) rows to a sequence and give the (V,) logits that follow the last."""
        first, count = cache.num_tokens, len(embeddings)
        cache.num_tokens += count
        slots = cache.slots[: cache.num_tokens]
        batch = BatchLayout((SequenceSlice(first_row=0, num_rows=count, slots=slots),))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._attention(q, k, v, cache=cache.layers[layer], batch=batch)

        hidden = self._model.language(embeddings, slots[first:], attend)
        return self._model.language.logits(hidden[-1:])[0]
