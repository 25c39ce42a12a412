"""Probe: the measuring points of a loaded model.

Owns   callbacks at the end of stages and tokens, what the model expects of a given answer, memory,
       traffic between ranks, other engines.
Takes  a LoadedModel; `MiniGPT4.probe` is one.
Never  measures: it reads no clock of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from minigpt4_runtime.cache.key_value import CACHE_FORMATS
from minigpt4_runtime.config import EngineConfig, SamplingParams
from minigpt4_runtime.devices.contracts import Traffic
from minigpt4_runtime.engine.request import Heard, NoWatch
from minigpt4_runtime.engine.runner import IMAGES_AT_ONCE
from minigpt4_runtime.engine.sampler import overflow_error
from minigpt4_runtime.engine.ticket import Ticket
from minigpt4_runtime.errors import PromptTooLongError, RequestError
from minigpt4_runtime.images.pixels import open_rgb, prepare
from minigpt4_runtime.loaded import LoadedModel
from minigpt4_runtime.messages import image
from minigpt4_runtime.model.causal import causal_attention
from minigpt4_runtime.model.llama import Attend

if TYPE_CHECKING:
    from minigpt4_runtime.messages import ImageLike


class Probe:
    """Lets a caller observe a model and wait for it. The caller measures."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    def embed_images(
        self,
        images: Sequence[ImageLike],
        *,
        at_once: int = IMAGES_AT_ONCE,
        on_stage: Callable[[str], object] | None = None,
    ) -> Tensor:
        """See `MiniGPT4.embed_images`; `at_once` images are encoded together.

        `on_stage` gets the name of each stage as it ends, when the device rests: decode and
        preprocess for each image, tower and projection for each `at_once` of them. A compiled
        graph does the last two as one, which ends as projection.
        """
        if isinstance(images, (str, bytes)) or not isinstance(images, Sequence):
            raise RequestError("embed_images takes a list of pictures, not a single one.")
        if at_once < 1:
            raise RequestError(f"at_once is {at_once}; it must be at least 1.")

        def ended(stage: str) -> None:
            if on_stage is not None:
                self.synchronize()
                on_stage(stage)

        config, encoder = self._loaded.config, self._loaded.rank_model.vision
        assert encoder is not None, "a loaded model is rank 0"
        rows = [torch.empty(0, config.rows_per_image, config.language.hidden_size)]
        for first in range(0, len(images), at_once):
            pixels = []
            for each in images[first : first + at_once]:
                rgb = open_rgb(image(each), self._loaded.image_limits)
                ended("decode")
                pixels.append(prepare(rgb, config.vision).values)
                ended("preprocess")
            stacked = torch.from_numpy(numpy.stack(pixels))
            encoded = encoder.encode(stacked, on_tower=lambda: ended("tower"))
            ended("projection")
            rows.append(encoded.float().cpu())
        return torch.cat(rows)

    def submit_tokens(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        on_token: Callable[[int], object] | None = None,
    ) -> Ticket[int]:
        """Go on from ids as they are: no template, no images, no stop strings. Gives new ids.

        `on_token` is called with each of them when it is known, from the engine's thread.

        Raises:
            RequestError: an id is not in the vocabulary, or there are none or too many.
        """
        sampling = sampling or SamplingParams()
        token_ids = self._loaded.check_ids(token_ids)
        if on_token is not None and sampling.num_beams > 1:
            raise RequestError("With beams no token is known before the end: leave out on_token.")
        watch = _Listener(on_token) if on_token is not None else NoWatch()
        return self._loaded.submit(token_ids, (), sampling, watch, lambda event: event.token_id)

    @torch.inference_mode()
    def expect(
        self,
        prompt_ids: Sequence[int],
        answer_ids: Sequence[int],
        *,
        image_rows: Mapping[int, Tensor],
    ) -> Tensor:
        """Log-probabilities before each token of a given answer: (T, V) float64 on the CPU.

        `image_rows` are rows as `embed_images` gives them, by where they begin in the prompt. All
        places are computed at once with the model's weights and products, but without the engine.
        Keys and values are rounded as its cache would keep them.

        Raises:
            RequestError: ranks share the model, its numbers overflow, or the ids are none of its
                vocabulary, or too many.
        """
        language = self._loaded.rank_model.language
        if language.group.size > 1:
            raise RequestError("Ranks share this model. Load it without tensor_parallel for that.")
        self._loaded.check_ids(answer_ids)
        token_ids = [*prompt_ids, *answer_ids[:-1]]
        if len(token_ids) > language.config.context_length:
            raise PromptTooLongError(len(token_ids), language.config.context_length)
        device = language.token_embedding.weight.device
        embeddings = language.embed(torch.tensor(token_ids, device=device))
        for start, rows in image_rows.items():
            embeddings[start : start + len(rows)] = rows
        positions = torch.arange(len(token_ids), device=device)
        hidden = language(embeddings, positions, self._attend_rounded())[-len(answer_ids) :]
        logits = language.logits(hidden).cpu().double()
        if not logits.isfinite().all():
            raise overflow_error()
        return logits.log_softmax(-1)

    def _attend_rounded(self) -> Attend:
        """Dense attention with keys and values as the engine's cache keeps them."""
        attend, chosen = causal_attention(), self._loaded.engine_config.cache_dtype
        if chosen == "auto":
            return attend
        kept, centre = CACHE_FORMATS[chosen], self._loaded.key_centre

        def attend_rounded(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # What is taken from all keys alike changes no weight.
            taken = k if centre is None else k - centre[layer]
            return attend(
                layer, q, kept.as_read(taken, chosen).to(k.dtype), kept.as_read(v, chosen)
            )

        return attend_rounded

    def use_engine(self, engine: EngineConfig | Mapping[str, Any]) -> None:
        """Run with other settings from here on. Nothing computed before is kept.

        Answers that are in progress end with a RequestError.

        Raises:
            ConfigError: a setting has no meaning.
            BackendUnavailableError: the cache does not fit. The settings then stay as they were.
        """
        self._loaded.use_engine(EngineConfig.read(engine))

    def synchronize(self) -> None:
        """Wait until the device has done all it was given. Then a clock may be read."""
        self._loaded.backend.synchronize()

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the weights: "vision", "embedding", "layers" and "head" of the language."""
        return self._loaded.rank_model.weight_bytes()

    def free_memory_bytes(self) -> int | None:
        """The free memory of the device, within a container's limit; None if it is not known.

        On a CPU this includes memory that could be swapped out.
        """
        return self._loaded.backend.free_memory_bytes()

    def reset_peak_memory(self) -> None:
        """Let `peak_memory_bytes` count from here on."""
        self._loaded.backend.reset_peak_memory()

    def peak_memory_bytes(self) -> int | None:
        """The most memory taken at once: tensors on an accelerator, on a CPU the whole process.

        None if the system does not tell.
        """
        return self._loaded.backend.peak_memory_bytes()

    def traffic(self) -> Traffic:
        """The messages between this rank and the others so far."""
        return self._loaded.ranks.traffic


class _Listener(NoWatch):
    """Passes each token to a caller. It need not fork: `submit_tokens` refuses beams with it."""

    def __init__(self, on_token: Callable[[int], object]) -> None:
        self._on_token = on_token

    def feed(self, token_id: int, *, is_last: bool) -> Heard:
        """Pass a token on."""
        self._on_token(token_id)
        return super().feed(token_id, is_last=is_last)
