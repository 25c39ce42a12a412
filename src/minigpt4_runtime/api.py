"""MiniGPT4: the promise to users, and all that tools may use.

Owns   the path of a request from messages to a reply, and the choice of device and dtype.
Takes  messages and pictures; gives replies, deltas, rows and encoded prompts.
Never  knows HTTP or the command line.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

import numpy
import torch
from PIL.Image import Image
from torch import Tensor

from minigpt4_runtime.batch.image_run import PictureRun
from minigpt4_runtime.checkpoint.shelf import find_model
from minigpt4_runtime.checkpoint.weight_source import WeightSource
from minigpt4_runtime.config import (
    DTYPE_NAMES,
    DTypeName,
    EngineConfig,
    ModelConfig,
    SamplingParams,
    VisionRuntimeName,
    VisionSettings,
)
from minigpt4_runtime.devices.contracts import DeviceBackend
from minigpt4_runtime.engine.engine import Engine, EngineStats
from minigpt4_runtime.engine.request import ImageInput, Request, TokenEvent
from minigpt4_runtime.engine.runner import PICTURES_AT_ONCE
from minigpt4_runtime.engine.ticket import Ticket
from minigpt4_runtime.errors import (
    BackendUnavailableError,
    ConfigError,
    RankLostError,
    RequestError,
)
from minigpt4_runtime.grammar.guide import Grammars, Guide
from minigpt4_runtime.images.pixels import ImageLimits, open_rgb, prepare
from minigpt4_runtime.images.pixels import load as load_image
from minigpt4_runtime.messages import (
    Described,
    ImageSource,
    Message,
    Reply,
    TextDelta,
    TokenLogprobs,
    Usage,
    image,
    read_messages,
)
from minigpt4_runtime.model.parallel import check_world_size
from minigpt4_runtime.ranks import Ranks, Setup, free_memory_bytes, make_runner, open_rank_device
from minigpt4_runtime.sides import load_sides, open_graph
from minigpt4_runtime.text.answer import AnswerText, StopWatch
from minigpt4_runtime.text.prompt import DESCRIBE_PROMPT, Prompt, find_template, render
from minigpt4_runtime.text.tokenizer import EncodedPrompt, ImageSpan, Tokenizer

DEMO_MODEL_DIR = Path(__file__).parent / "assets" / "demo"

Messages = Sequence[Message | Mapping[str, Any]]
Picture = ImageSource | str | PathLike[str] | bytes | Image | numpy.ndarray[Any, Any] | Tensor


class MiniGPT4:
    """A loaded model. Make one with `MiniGPT4.load`; use it from any number of threads at once.

    Requests run together, joining and leaving at every step, and share what their prompts share.
    """

    def __init__(
        self,
        source: WeightSource,
        tokenizer: Tokenizer,
        *,
        backend: DeviceBackend,
        dtype: DTypeName,
        engine: EngineConfig,
        image_limits: ImageLimits,
        ranks: Ranks,
        vision: VisionSettings,
    ) -> None:
        self.config: ModelConfig = source.config
        self.model_dir = source.model_dir
        self.dtype: DTypeName = dtype
        self.device = str(backend.device)
        self.tensor_parallel = ranks.size
        self._template = find_template(self.config.template)
        self._image_limits = image_limits
        self._tokenizer = tokenizer
        self._grammars = Grammars(tokenizer, self.config.language.vocab_size)
        self._backend = backend
        self._ranks = ranks
        setup = Setup(source, backend.device.type, dtype, engine)
        # A graph goes first: how much is free for keys and values is seen after it.
        self.vision_runtime, encoder = open_graph(vision, source, backend, dtype)
        group = ranks.start(setup, backend.facts.collective)
        free_bytes = free_memory_bytes(backend, ranks.size)
        self._sides = load_sides(
            source, backend, dtype, group=group, encoder=encoder, free_bytes=free_bytes
        )
        self._start_engine(engine)

    def _start_engine(self, config: EngineConfig) -> None:
        sides = self._sides
        runner = make_runner(
            sides.language, sides.vision, self._backend, config, free_bytes=sides.left_bytes
        )
        self._engine = Engine(
            self._ranks.lead(runner),
            config,
            num_blocks=runner.num_blocks,
            max_context=self.config.language.max_position_embeddings,
            bos_id=self._tokenizer.bos_id,
            eos_id=self._tokenizer.eos_id,
        )
        self.engine_config = config
        # However the program ends, no other rank outlives the last answer.
        self._ending = weakref.finalize(self._engine, self._ranks.close)

    @classmethod
    def load(  # noqa: PLR0913 - the one place where all that can be chosen is.
        cls,
        model: str | PathLike[str] | None = None,
        *,
        device: str = "auto",
        dtype: DTypeName | Literal["auto"] = "auto",
        engine: EngineConfig | Mapping[str, Any] | None = None,
        image_limits: ImageLimits | None = None,
        tensor_parallel: int = 1,
        vision_runtime: VisionRuntimeName = "auto",
        vision_graph: str | PathLike[str] | None = None,
        provider: str | None = None,
    ) -> MiniGPT4:
        """Load a model folder; without one, the bundled demo model, which knows drawn scenes.

        Args:
            model: a folder made by `minigpt4 convert`, or the name of a fetched model: "vicuna-7b".
            device: auto, cpu, cuda, cuda:1, npu, …; auto takes the first accelerator, else the CPU.
            dtype: auto, float32, float16 or bfloat16; auto is float32 on a CPU, else float16.
            engine: how many requests run at once, and what is kept between them.
            image_limits: what a picture may weigh at most.
            tensor_parallel: over how many devices the language model is divided. This process
                leads and starts the others; or torchrun has started all of them, and then each
                calls `follow` first.
            vision_runtime: auto, torch, onnx or om: what the image side runs in. auto is what the
                graph is for where there is one, else torch.
            vision_graph: a folder made by `minigpt4 export vision`, or a file in it.
            provider: what ONNX Runtime computes on: cuda, cann, openvino or cpu. Without it, the
                first of these that it has.

        Raises:
            ConfigError: a setting has no meaning, or this process is to `follow` another.
            CheckpointError: the folder is no whole model, the named one is not fetched yet, or the
                graph is another model's.
            BackendUnavailableError: the device is not on this machine, or has too little memory.
        """
        model_dir = find_model(model) if model is not None else DEMO_MODEL_DIR
        source = WeightSource.folder(model_dir)
        vision = VisionSettings(runtime=vision_runtime, graph=vision_graph, provider=provider)
        return cls._on_ranks(
            source, device=device, dtype=dtype, engine=_as_engine_config(engine),
            image_limits=image_limits or ImageLimits(), tensor_parallel=tensor_parallel,
            vision=vision,
        )  # fmt: skip

    @classmethod
    def with_random_weights(
        cls,
        config: ModelConfig,
        *,
        device: str = "auto",
        dtype: DTypeName | Literal["auto"] = "auto",
        engine: EngineConfig | Mapping[str, Any] | None = None,
        tensor_parallel: int = 1,
        seed: int = 0,
    ) -> MiniGPT4:
        """Make a model of any shape without a file: it computes as any, and answers nonsense.

        It takes the demo model's tokenizer; of the ids beyond that, an answer's text shows nothing.
        Settings are those of `load`.

        Raises:
            ConfigError: a setting has no meaning, or the shape has fewer ids than the tokenizer.
            BackendUnavailableError: the device is not on this machine, or has too little memory.
        """
        return cls._on_ranks(
            WeightSource(config, seed=seed), device=device, dtype=dtype,
            engine=_as_engine_config(engine), image_limits=ImageLimits(),
            tensor_parallel=tensor_parallel, vision=VisionSettings(),
        )  # fmt: skip

    @classmethod
    def _on_ranks(
        cls,
        source: WeightSource,
        *,
        device: str,
        dtype: DTypeName | Literal["auto"],
        engine: EngineConfig,
        image_limits: ImageLimits,
        tensor_parallel: int,
        vision: VisionSettings,
    ) -> MiniGPT4:
        """Start all ranks of a model; returns in the first."""
        if dtype not in ("auto", *DTYPE_NAMES):
            raise ConfigError(f"dtype is {dtype!r}; it must be auto or {', '.join(DTYPE_NAMES)}.")
        ranks = Ranks(tensor_parallel)
        check_world_size(source.config.language, tensor_parallel)
        tokenizer = Tokenizer((source.model_dir or DEMO_MODEL_DIR) / "tokenizer.model")
        if source.model_dir is None and source.config.language.vocab_size < tokenizer.vocab_size:
            raise ConfigError(
                f"vocab_size is {source.config.language.vocab_size}; a model with random weights "
                f"needs at least the {tokenizer.vocab_size} ids of the demo model's tokenizer."
            )
        backend = open_rank_device(device, tensor_parallel)
        with ranks.loading():
            return cls(
                source,
                tokenizer,
                backend=backend,
                dtype=backend.facts.default_dtype if dtype == "auto" else dtype,
                engine=engine,
                image_limits=image_limits,
                ranks=ranks,
                vision=vision,
            )

    def use_engine(self, engine: EngineConfig | Mapping[str, Any]) -> None:
        """Run with other settings from here on. Nothing computed before is kept.

        Answers that are in progress end with a RequestError.

        Raises:
            ConfigError: a setting has no meaning.
            BackendUnavailableError: the cache does not fit. The settings then stay as they were.
        """
        engine, before = _as_engine_config(engine), self.engine_config
        self._engine.close()
        self._ending.detach()  # The other ranks go on.
        try:
            self._renew_engine(engine)
        except RankLostError:
            raise
        except BackendUnavailableError:
            self._renew_engine(before)
            raise

    def _renew_engine(self, config: EngineConfig) -> None:
        with self._ranks.loading():
            self._ranks.renew(config)
        self._start_engine(config)

    def close(self) -> None:
        """End what still runs with an error, and the other ranks. Nothing can be asked then."""
        self._engine.close()
        self._ranks.close()

    def __enter__(self) -> Self:
        """For `with`: closed at its end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def describe(
        self,
        picture: Picture,
        prompt: str = DESCRIBE_PROMPT,
        sampling: SamplingParams | None = None,
    ) -> Reply:
        """Ask one question about one picture."""
        return self.chat([_question(picture, prompt)], sampling)

    def chat(self, messages: Messages, sampling: SamplingParams | None = None) -> Reply:
        """Answer the last message of a dialogue, or go on with it where it is the assistant's.

        An answer that is continued has its further text alone: put it behind what was given.

        Raises:
            RequestError: messages, a picture or the prompt's length cannot be served.
        """
        reply = None
        for delta in self.stream(messages, sampling):
            reply = delta.reply
        assert reply is not None, "a stream ends with its reply"
        return reply

    def stream(
        self, messages: Messages, sampling: SamplingParams | None = None
    ) -> Iterator[TextDelta]:
        """Answer like `chat`, giving the text as it grows. Wrong input is refused at once.

        The last delta carries the finished `reply`. The deltas' texts together are its text, unless
        the model itself writes "Assistant:", up to which a reply is dropped, as in the original.
        """
        return iter(self.submit(messages, sampling))

    def submit(
        self, messages: Messages, sampling: SamplingParams | None = None
    ) -> Ticket[TextDelta]:
        """Begin to answer, and give a ticket to read: iterate it, `async for` it, or cancel it.

        The answer grows whether the ticket is read or not; dropping the ticket cancels it.
        """
        sampling = sampling or SamplingParams()
        prompt = render(read_messages(messages), self._template)
        encoded = self._encode(prompt)
        self._engine.check(len(encoded.token_ids), sampling)
        images = tuple(
            self._image_input(source, span)
            for source, span in zip(prompt.images, encoded.image_spans, strict=True)
        )
        before, space = self._tokenizer.encode_begun(prompt.begun)
        is_spaced = not before or prompt.begun[-1].isspace()
        answer = AnswerText(
            self._tokenizer,
            self._template,
            sampling.stop,
            before=before,
            begins_with=None if is_spaced else space,
            has_form=sampling.grammar is not None,
        )
        return self._submit(encoded.token_ids, images, sampling, answer)

    def submit_text(
        self, text: str | Sequence[int], sampling: SamplingParams | None = None
    ) -> Ticket[TextDelta]:
        """Go on from a text, or its ids, as it is: no template, no pictures, nothing trimmed.

        It ends at `</s>` and at what `stop` names; the template's stops are none here. Of an answer
        that has a form the space before it is left out, as everywhere.

        Raises:
            RequestError: an id is not in the vocabulary, or there are none or too many.
        """
        sampling = sampling or SamplingParams()
        token_ids = self.encode_text(text) if isinstance(text, str) else text
        self._check_ids(token_ids)
        self._engine.check(len(token_ids), sampling)
        answer = AnswerText(
            self._tokenizer,
            None,
            sampling.stop,
            before=token_ids,
            begins_with="",
            has_form=sampling.grammar is not None,
        )
        return self._submit(token_ids, (), sampling, answer)

    def _submit(
        self,
        token_ids: Sequence[int],
        images: tuple[ImageInput, ...],
        sampling: SamplingParams,
        answer: AnswerText,
    ) -> Ticket[TextDelta]:
        watch = StopWatch(answer.fork()) if answer.has_stops else None
        request = Request(tuple(token_ids), images, sampling, watch, self._guide(sampling))
        return self._engine.submit(request, _Reader(answer, len(token_ids)))

    def submit_tokens(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        on_token: Callable[[int], object] | None = None,
    ) -> Ticket[int]:
        """Go on from ids as they are: no template, no pictures, no stop strings. Gives new ids.

        `on_token` is called with each of them when it is known, from the engine's thread; but not
        with the end id that ends an answer.

        Raises:
            RequestError: an id is not in the vocabulary, or there are none or too many.
        """
        sampling = sampling or SamplingParams()
        self._check_ids(token_ids)
        if on_token is not None and sampling.num_beams > 1:
            raise RequestError("With beams no token is known before the end: leave out on_token.")
        listener = _Listener(on_token) if on_token is not None else None
        return self._engine.submit(
            Request(tuple(token_ids), (), sampling, listener, self._guide(sampling)),
            lambda event: event.token_id,
        )

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        vocab_size = self.config.language.vocab_size
        if not token_ids or not all(0 <= token_id < vocab_size for token_id in token_ids):
            raise RequestError(f"Give one or more ids from 0 to {vocab_size - 1}, the vocabulary.")

    def describe_all(
        self,
        pictures: Iterable[Picture],
        prompt: str = DESCRIBE_PROMPT,
        sampling: SamplingParams | None = None,
    ) -> Iterator[Described]:
        """Ask one question about each of any number of pictures, many at once.

        Pictures are opened ahead, in threads, and no more of them than the engine needs to be kept
        full. Results come as they are done; a picture that cannot be served is one with an error.

        Raises:
            GrammarError: the schema or regex of `sampling` cannot be followed.
        """
        self.prepare(sampling or SamplingParams())
        run = PictureRun[Picture](
            lambda picture: self.submit([_question(picture, prompt)], sampling),
            max_running=self.engine_config.max_running,
        )
        return run.of(pictures)

    def stats(self) -> EngineStats:
        """What the engine has done so far, and what it holds."""
        return replace(
            self._engine.stats(),
            traffic=self._ranks.traffic,
            encode_seconds=self._sides.vision.seconds,
        )

    def prepare(self, sampling: SamplingParams) -> None:
        """Compile the form that answers are to have, so that the first question need not wait.

        Raises:
            GrammarError: the schema or regex cannot be followed.
            BackendUnavailableError: llguidance is not installed.
        """
        self._guide(sampling)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token of a reply adds to its text, as UTF-8; a control token gives its name."""
        return self._tokenizer.bytes_of(token_id)

    def embed_images(
        self,
        pictures: Sequence[Picture],
        *,
        at_once: int = PICTURES_AT_ONCE,
        on_stage: Callable[[str], object] | None = None,
    ) -> Tensor:
        """Pictures → (N, rows, hidden) float32 on the CPU, as the language model reads them.

        `on_stage` hears the name of each stage as it ends, when the device rests: decode and
        preprocess for each picture, tower and projection for each `at_once` of them. A compiled
        graph does the last two as one, which ends as projection.
        """
        if isinstance(pictures, (str, bytes)) or not isinstance(pictures, Sequence):
            raise RequestError("embed_images takes a list of pictures, not a single one.")
        if at_once < 1:
            raise RequestError(f"at_once is {at_once}; it must be at least 1.")

        def ended(stage: str) -> None:
            if on_stage is not None:
                self.synchronize()
                on_stage(stage)

        rows = [torch.empty(0, self.config.rows_per_image, self.config.language.hidden_size)]
        for first in range(0, len(pictures), at_once):
            pixels = []
            for picture in pictures[first : first + at_once]:
                rgb = open_rgb(_as_source(picture), self._image_limits)
                ended("decode")
                pixels.append(prepare(rgb, self.config.vision).values)
                ended("preprocess")
            stacked = torch.from_numpy(numpy.stack(pixels))
            encoded = self._sides.vision.encode(stacked, on_tower=lambda: ended("tower"))
            ended("projection")
            rows.append(encoded.float().cpu())
        return torch.cat(rows)

    def synchronize(self) -> None:
        """Wait until the device has done all it was given. Then a clock may be read."""
        self._backend.synchronize()

    def weight_bytes(self) -> dict[str, int]:
        """What the weights take: "vision", "embedding", "layers" and "head" of the language."""
        return self._sides.weight_bytes()

    def free_memory_bytes(self) -> int | None:
        """What the device can still give, within a container's limit; None where it does not tell.

        On a CPU what could be swapped out is counted too.
        """
        return self._backend.free_memory_bytes()

    def reset_peak_memory(self) -> None:
        """Let `peak_memory_bytes` count from here on."""
        self._backend.reset_peak_memory()

    def peak_memory_bytes(self) -> int | None:
        """The most memory taken at once: tensors on an accelerator, on a CPU the whole process.

        None where the system does not tell.
        """
        return self._backend.peak_memory_bytes()

    def encode_prompt(self, messages: Messages) -> EncodedPrompt:
        """What the model would be given: ids, image spans, ids per text piece, and the text."""
        return self._encode(render(read_messages(messages), self._template))

    def encode_text(self, text: str) -> tuple[int, ...]:
        """What the model would be given for a text as it is: the BOS id, and the text's ids."""
        return (self._tokenizer.bos_id, *self._tokenizer.encode(text))

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        return self._tokenizer.encode_prompt(
            prompt,
            rows_per_image=self.config.rows_per_image,
            image_token_id=self.config.image_token_id,
        )

    def _guide(self, sampling: SamplingParams) -> Guide | None:
        """What holds an answer to its form. What the vocabulary lacks is refused here."""
        vocab_size = self.config.language.vocab_size
        for token_id in dict(sampling.logit_bias):
            if token_id >= vocab_size:
                raise RequestError(
                    f"logit_bias names the id {token_id}; the vocabulary ends at {vocab_size - 1}."
                )
        return self._grammars.guide(sampling)

    def _image_input(self, source: ImageSource, span: ImageSpan) -> ImageInput:
        picture = load_image(source, self.config.vision, self._image_limits)
        return ImageInput(
            torch.from_numpy(picture.values), picture.digest, span.start, span.num_rows
        )


class _Listener:
    """Stands where stop strings are watched for, and lets somebody hear each token."""

    def __init__(self, on_token: Callable[[int], object]) -> None:
        self._on_token = on_token

    def feed(self, token_id: int) -> bool:
        """Pass a token on. No answer ends here."""
        self._on_token(token_id)
        return False

    def fork(self) -> _Listener:
        """Only beams fork, and they are not listened to."""
        return self


class _Reader:
    """Turns one request's events into deltas of text."""

    def __init__(self, answer: AnswerText, num_prompt: int) -> None:
        self._answer = answer
        self._num_prompt = num_prompt
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._num_told = 0  # Of the logprobs.

    def __call__(self, event: TokenEvent) -> TextDelta | None:
        self._token_ids.append(event.token_id)
        if event.logprobs:
            self._logprobs.append(event.logprobs)
        text = self._answer.feed(event.token_id)
        usage = Usage(self._num_prompt, len(self._token_ids))
        if event.finish_reason is None:
            return TextDelta(text, None, self._new_logprobs(), usage) if text else None
        text += self._answer.finish()
        reply = Reply(
            self._answer.reply,
            tuple(self._token_ids),
            event.finish_reason,
            usage,
            tuple(self._logprobs) or None,
        )
        return TextDelta(text, reply, self._new_logprobs(), usage)

    def _new_logprobs(self) -> tuple[TokenLogprobs, ...]:
        first, self._num_told = self._num_told, len(self._logprobs)
        return tuple(self._logprobs[first:])


def _as_engine_config(engine: EngineConfig | Mapping[str, Any] | None) -> EngineConfig:
    return engine if isinstance(engine, EngineConfig) else EngineConfig.from_mapping(engine or {})


def _as_source(picture: Picture) -> ImageSource:
    return picture if isinstance(picture, ImageSource) else image(picture)


def _question(picture: Picture, prompt: str) -> Message:
    return Message("user", (_as_source(picture), prompt))
