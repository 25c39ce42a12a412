"""A loaded model: the ranks and the engine that requests and measurements share.

Owns   the choice of device and dtype, the ranks, and the start, renewal and end of the engine.
Takes  a WeightSource and settings, then requests as ids and pixels; gives Tickets. Turns prompts
       and pictures into those.
Never  knows a message, or the meaning of a text.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, TypeVar, cast

import torch

from minigpt4_runtime.checkpoint.shelf import BUNDLED_DIR
from minigpt4_runtime.checkpoint.weight_source import WeightSource
from minigpt4_runtime.config import (
    DTYPE_NAMES,
    DTypeName,
    EngineConfig,
    SamplingParams,
    VisionSettings,
)
from minigpt4_runtime.engine.engine import Engine
from minigpt4_runtime.engine.request import (
    Beside,
    ImageInput,
    Request,
    StopWatch,
    TokenEvent,
    Window,
)
from minigpt4_runtime.engine.steering import LogitsProcessor
from minigpt4_runtime.engine.ticket import Ticket
from minigpt4_runtime.errors import (
    BackendUnavailableError,
    ConfigError,
    RankLostError,
    RequestError,
)
from minigpt4_runtime.grammar.guide import GrammarGuide, Grammars
from minigpt4_runtime.images.pixels import ImageLimits, PixelImage, load
from minigpt4_runtime.kernels.registry import row_choice
from minigpt4_runtime.messages import ImageSource
from minigpt4_runtime.model.parallel import check_world_size
from minigpt4_runtime.rank_model import load_rank_model, open_graph
from minigpt4_runtime.ranks import Ranks, Setup, free_memory_bytes, make_runner, open_rank_device
from minigpt4_runtime.text.prompt import Prompt
from minigpt4_runtime.text.tokenizer import EncodedPrompt, Tokenizer

DEMO_MODEL_DIR = BUNDLED_DIR / "demo"

T = TypeVar("T")


class LoadedModel:
    """One model at work. This process is its first rank."""

    def __init__(
        self,
        source: WeightSource,
        *,
        device: str,
        dtype: DTypeName | Literal["auto"],
        engine: EngineConfig,
        image_limits: ImageLimits,
        tensor_parallel: int,
        vision: VisionSettings,
    ) -> None:
        if dtype not in ("auto", *DTYPE_NAMES):
            raise ConfigError(f"dtype is {dtype!r}; it must be auto or {', '.join(DTYPE_NAMES)}.")
        self.source, self.config, self.model_dir = source, source.config, source.model_dir
        self.image_limits = image_limits
        self.ranks = Ranks(tensor_parallel)
        language = source.config.language
        engine.check_window(language.context_length)
        check_world_size(language, tensor_parallel)
        self.tokenizer = Tokenizer((source.model_dir or DEMO_MODEL_DIR) / "tokenizer.model")
        if source.model_dir is None and language.vocab_size < self.tokenizer.vocab_size:
            raise ConfigError(
                f"vocab_size is {language.vocab_size}; a model with random weights needs at least "
                f"the {self.tokenizer.vocab_size} ids of the demo model's tokenizer."
            )
        self._grammars = Grammars(self.tokenizer, language.vocab_size)
        self.backend = open_rank_device(device, tensor_parallel)
        self.dtype = self.backend.facts.default_dtype if dtype == "auto" else dtype
        with self.ranks.loading():
            self._load(source, engine, vision)

    def _load(self, source: WeightSource, engine: EngineConfig, vision: VisionSettings) -> None:
        backend, dtype = self.backend, self.dtype
        # A graph goes first: the free memory for keys and values is measured after it.
        self.vision_runtime, encoder = open_graph(vision, source, backend, dtype)
        setup = Setup(source, backend.device.type, dtype, engine)
        group = self.ranks.start(setup, backend.facts.collective)
        free_bytes = free_memory_bytes(backend, self.ranks.size)
        self.rank_model = load_rank_model(
            source, backend, dtype, group=group, encoder=encoder, free_bytes=free_bytes,
            capture=backend.capture if engine.cuda_graphs == "auto" else None,
        )  # fmt: skip
        self._start_engine(engine)

    def _start_engine(self, config: EngineConfig) -> None:
        runner = make_runner(self.rank_model, self.backend, config)
        self.engine = Engine(
            self.ranks.lead(runner),
            config,
            num_blocks=runner.num_blocks,
            max_context=self.config.language.context_length,
            bos_id=self.tokenizer.bos_id,
            eos_id=self.tokenizer.eos_id,
            has_float64=self.backend.facts.has_float64,
            runs_ahead=self.backend.facts.runs_ahead,
            choice=row_choice(self.backend.device),
        )
        self.engine_config = config
        self.key_centre = runner.key_centre
        # The other ranks end with the engine, even if the model is never closed.
        self._ending = weakref.finalize(self.engine, self.ranks.close)

    def use_engine(self, config: EngineConfig) -> None:
        """See `Probe.use_engine`."""
        before = self.engine_config
        config.check_window(self.config.language.context_length)
        self.engine.close()
        self._ending.detach()  # The other ranks go on.
        try:
            self._renew_engine(config)
        except RankLostError:
            raise
        except BackendUnavailableError:
            self._renew_engine(before)
            raise

    def _renew_engine(self, config: EngineConfig) -> None:
        with self.ranks.loading():
            self.ranks.renew(config)
        self._start_engine(config)

    def close(self) -> None:
        """End running requests with an error, and the other ranks."""
        self.engine.close()
        self.ranks.close()

    def submit(  # noqa: PLR0913, PLR0917 - a request, and how it is read.
        self,
        token_ids: Sequence[int],
        images: tuple[ImageInput, ...],
        sampling: SamplingParams,
        watch: StopWatch,
        read: Callable[[TokenEvent], T | None],
        window: Window | None = None,
        *,
        processors: tuple[LogitsProcessor, ...] = (),
        beside: tuple[Beside, ...] = (),
        adapter: str | None = None,
    ) -> Ticket[T]:
        """Go on from these ids. `watch` and `read` turn the answer into the ticket's pieces.

        Raises:
            RequestError: there is no adapter of that name.
        """
        number = self.find_adapter(adapter)
        request = Request(
            tuple(token_ids), self._tuned(images, number), sampling, watch, self.guide(sampling),
            window, processors=processors,
            beside=tuple(replace(each, images=self._tuned(each.images, number)) for each in beside),
            adapter=number,
        )  # fmt: skip
        return self.engine.submit(request, read)

    def _tuned(self, images: tuple[ImageInput, ...], adapter: int) -> tuple[ImageInput, ...]:
        """Where an adapter has an image side: under other digests, since rows are others too."""
        if adapter not in self.rank_model.tuned:
            return images
        return tuple(replace(each, digest=f"{each.digest} {adapter}") for each in images)

    def encode_prompt(self, prompt: Prompt) -> EncodedPrompt:
        """A prompt → its ids, with places for the rows of its pictures."""
        return self.tokenizer.encode_prompt(
            prompt,
            rows_per_image=self.config.rows_per_image,
            image_token_id=self.config.image_token_id,
        )

    def open_image(self, source: ImageSource) -> PixelImage:
        """A picture as the image side takes it.

        Raises:
            ImageError: it cannot be read.
        """
        return load(source, self.config.vision, self.image_limits)

    def image_input(self, picture: PixelImage, start: int) -> ImageInput:
        """A picture whose rows begin at this place of a prompt."""
        rows = self.config.rows_per_image
        return ImageInput(torch.from_numpy(picture.values), picture.digest, start, rows)

    def open_images(self, prompt: Prompt, encoded: EncodedPrompt) -> tuple[ImageInput, ...]:
        """All pictures of a prompt, at their places.

        Raises:
            ImageError: one cannot be read.
        """
        return tuple(
            self.image_input(self.open_image(source), span.start)
            for source, span in zip(prompt.images, encoded.image_spans, strict=True)
        )

    def submit_candidates(
        self,
        prompt: Prompt,
        candidates: Sequence[str | Sequence[int]],
        *,
        adapter: str | None = None,
    ) -> Ticket[tuple[float, ...]]:
        """See `MiniGPT4.submit_score`."""
        encode, number = self.tokenizer.encode, self.find_adapter(adapter)
        try:
            given = tuple(tuple(encode(s) if isinstance(s, str) else s) for s in candidates)
        except TypeError:
            given = ()
        if isinstance(candidates, str) or not given or not all(given):
            raise RequestError(
                "candidates is a list of one or more answers, each with at least one id or word."
            )
        known = tuple(map(self.check_ids, given))
        encoded = self.encode_prompt(prompt)
        self.engine.room.check_candidates(len(encoded.token_ids), max(map(len, known)))
        images = self._tuned(self.open_images(prompt, encoded), number)
        request = Request(
            encoded.token_ids, images, SamplingParams(), candidates=known, adapter=number
        )
        return self.engine.submit(request, lambda event: cast("tuple[float, ...]", event.note))

    def find_adapter(self, name: str | None) -> int:
        """The number by which the engine knows an adapter, 0 for none.

        Raises:
            RequestError: there is no adapter of that name.
        """
        names = [each for each, _ in self.source.adapters]
        if name is None:
            return 0
        if name not in names:
            known = ", ".join(names) or "none: load the model with adapters"
            raise RequestError(f"adapter is {name!r:.100}; this model has {known}.")
        return 1 + names.index(name)

    def check_ids(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """The ids as Python's own numbers, which a tensor's are not.

        Raises:
            RequestError: they are not one or more ids of the vocabulary.
        """
        vocab_size = self.config.language.vocab_size
        try:
            ids = tuple(map(operator.index, token_ids))
        except TypeError:
            ids = ()
        if not ids or not all(0 <= token_id < vocab_size for token_id in ids):
            raise RequestError(f"Give one or more ids from 0 to {vocab_size - 1}, the vocabulary.")
        return ids

    def guide(self, sampling: SamplingParams) -> GrammarGuide | None:
        """The guide of an answer with a form. Refuses a bias of ids outside the vocabulary."""
        vocab_size = self.config.language.vocab_size
        for token_id in dict(sampling.logit_bias):
            if token_id >= vocab_size:
                raise RequestError(
                    f"logit_bias names the id {token_id}; the vocabulary ends at {vocab_size - 1}."
                )
        return self._grammars.guide(sampling)
