"""MiniGPT4: the promise to users, and all that tools may use.

Owns   the path of a request from messages to a reply, and the choice of device and dtype.
Takes  messages and pictures; gives replies, deltas, rows and encoded prompts.
Never  knows HTTP or the command line.
"""

from __future__ import annotations

import os
import queue
import sys
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

import numpy
import torch
from PIL.Image import Image
from torch import Tensor

from minigpt4_runtime.answer import AnswerText, StopWatch
from minigpt4_runtime.backend.contracts import DeviceBackend, VisionEncoder
from minigpt4_runtime.backend.vision_torch import TorchVisionEncoder
from minigpt4_runtime.checkpoint.load import load_config, load_model
from minigpt4_runtime.config import (
    DTYPE_NAMES,
    DTypeName,
    EngineConfig,
    ModelConfig,
    SamplingParams,
)
from minigpt4_runtime.engine.engine import Engine, EngineStats
from minigpt4_runtime.engine.request import ImageInput, Request, TokenEvent
from minigpt4_runtime.engine.ticket import Ticket
from minigpt4_runtime.errors import ConfigError, RequestError
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
from minigpt4_runtime.model.linear import set_widen_from
from minigpt4_runtime.model.parallel import check_world_size
from minigpt4_runtime.pixels import ImageLimits
from minigpt4_runtime.pixels import load as load_image
from minigpt4_runtime.prompt import DESCRIBE_PROMPT, Prompt, find_template, render
from minigpt4_runtime.ranks import Ranks, Setup, free_memory_bytes, make_runner, open_rank_device
from minigpt4_runtime.tokenizer import EncodedPrompt, ImageSpan, Tokenizer

_PICTURES_AT_ONCE = 8
DEMO_MODEL_DIR = Path(__file__).parent / "assets" / "demo"

Messages = Sequence[Message | Mapping[str, Any]]
Picture = ImageSource | str | PathLike[str] | bytes | Image | numpy.ndarray[Any, Any]


class MiniGPT4:
    """A loaded model. Make one with `MiniGPT4.load`; use it from any number of threads at once.

    Requests run together, joining and leaving at every step, and share what their prompts share.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        backend: DeviceBackend,
        dtype: DTypeName,
        engine: EngineConfig,
        image_limits: ImageLimits,
        ranks: Ranks,
    ) -> None:
        self.config: ModelConfig = load_config(model_dir)
        self.model_dir = model_dir
        self.dtype: DTypeName = dtype
        self.device = str(backend.device)
        self.tensor_parallel = ranks.size
        self._template = find_template(self.config.template)
        self._image_limits = image_limits
        self._tokenizer = Tokenizer(model_dir / "tokenizer.model")
        self._engine_config = engine
        self._ranks = ranks
        setup = Setup(str(model_dir), backend.device.type, dtype, engine)
        group = ranks.start(setup, backend.facts.collective)
        torch_dtype = getattr(torch, dtype)
        free_bytes = free_memory_bytes(backend, ranks.size)
        model = load_model(
            model_dir, device=backend.device, dtype=torch_dtype, free_bytes=free_bytes, group=group
        )
        widen_from = backend.widen_from(torch_dtype)
        set_widen_from(model, widen_from)
        self._vision = _TimedEncoder(
            TorchVisionEncoder(model.vision, in_float32=widen_from is not None)
        )
        if free_bytes is not None:
            free_bytes -= sum(weight.nbytes for weight in model.parameters())
        runner = make_runner(model.language, self._vision, backend, engine, free_bytes=free_bytes)
        self._engine = Engine(
            ranks.lead(runner),
            engine,
            num_blocks=runner.num_blocks,
            max_context=self.config.language.max_position_embeddings,
            bos_id=self._tokenizer.bos_id,
            eos_id=self._tokenizer.eos_id,
        )
        # However the program ends, no other rank outlives the last answer.
        weakref.finalize(self._engine, ranks.close)

    @classmethod
    def load(
        cls,
        model: str | PathLike[str] | None = None,
        *,
        device: str = "auto",
        dtype: DTypeName | Literal["auto"] = "auto",
        engine: EngineConfig | Mapping[str, Any] | None = None,
        image_limits: ImageLimits | None = None,
        tensor_parallel: int = 1,
    ) -> MiniGPT4:
        """Load a model folder; without one, the bundled demo model, which knows drawn scenes.

        Args:
            model: a folder made by `minigpt4 convert`.
            device: auto, cpu, cuda, cuda:1, npu, …; auto takes the first accelerator, else the CPU.
            dtype: auto, float32, float16 or bfloat16; auto is float32 on a CPU, else float16.
            engine: how many requests run at once, and what is kept between them.
            image_limits: what a picture may weigh at most.
            tensor_parallel: over how many devices the language model is divided. This process
                leads and starts the others; or all were started by torchrun, and then this never
                returns in any but the first.

        Raises:
            ConfigError: a setting has no meaning.
            CheckpointError: the folder is no whole model.
            BackendUnavailableError: the device is not on this machine, or has too little memory.
        """
        if dtype not in ("auto", *DTYPE_NAMES):
            raise ConfigError(f"dtype is {dtype!r}; it must be auto or {', '.join(DTYPE_NAMES)}.")
        if not isinstance(engine, EngineConfig):
            engine = EngineConfig.from_mapping(engine or {})
        model_dir = Path(model) if model is not None else DEMO_MODEL_DIR
        check_world_size(load_config(model_dir).language, tensor_parallel)
        ranks = Ranks(tensor_parallel)
        if ranks.rank > 0:
            ranks.follow()
            sys.exit()
        backend = open_rank_device(device, tensor_parallel)
        with ranks.loading():
            return cls(
                model_dir,
                backend=backend,
                dtype=backend.facts.default_dtype if dtype == "auto" else dtype,
                engine=engine,
                image_limits=image_limits or ImageLimits(),
                ranks=ranks,
            )

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
        """Answer the last message of a dialogue.

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
        request = self._request(messages, sampling or SamplingParams())
        answer = AnswerText(self._tokenizer, self._template, request.sampling.stop)
        return self._engine.submit(request, _Reader(answer, len(request.token_ids)))

    def describe_all(
        self,
        pictures: Iterable[Picture],
        prompt: str = DESCRIBE_PROMPT,
        sampling: SamplingParams | None = None,
    ) -> Iterator[Described]:
        """Ask one question about each of any number of pictures, many at once.

        Pictures are opened ahead, in threads, and no more of them than the engine needs to be kept
        full. Results come as they are done; a picture that cannot be served is one with an error.
        """
        return _Descriptions(self, prompt, sampling, self._engine_config.max_running).of(pictures)

    def stats(self) -> EngineStats:
        """What the engine has done so far, and what it holds."""
        return replace(
            self._engine.stats(),
            traffic=self._ranks.traffic,
            encode_seconds=self._vision.seconds,
        )

    def token_bytes(self, token_id: int) -> bytes:
        """What a token of a reply adds to its text, as UTF-8; a control token gives its name."""
        return self._tokenizer.bytes_of(token_id)

    def embed_images(self, pictures: Sequence[Picture]) -> Tensor:
        """Pictures → (N, rows, hidden) float32 on the CPU, as the language model reads them."""
        if isinstance(pictures, (str, bytes)) or not isinstance(pictures, Sequence):
            raise RequestError("embed_images takes a list of pictures, not a single one.")
        rows = [torch.empty(0, self.config.rows_per_image, self.config.language.hidden_size)]
        for first in range(0, len(pictures), _PICTURES_AT_ONCE):
            some = pictures[first : first + _PICTURES_AT_ONCE]
            pixels = [
                load_image(_as_source(picture), self.config.vision, self._image_limits).values
                for picture in some
            ]
            rows.append(self._vision.encode(torch.from_numpy(numpy.stack(pixels))).float().cpu())
        return torch.cat(rows)

    def encode_prompt(self, messages: Messages) -> EncodedPrompt:
        """What the model would be given: ids, image spans, ids per text piece, and the text."""
        return self._encode(render(read_messages(messages), self._template))

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        return self._tokenizer.encode_prompt(
            prompt,
            rows_per_image=self.config.rows_per_image,
            image_token_id=self.config.image_token_id,
        )

    def _request(self, messages: Messages, sampling: SamplingParams) -> Request:
        prompt = render(read_messages(messages), self._template)
        encoded = self._encode(prompt)
        self._engine.check(len(encoded.token_ids), sampling)
        images = tuple(
            self._image_input(source, span)
            for source, span in zip(prompt.images, encoded.image_spans, strict=True)
        )
        watched = AnswerText(self._tokenizer, self._template, sampling.stop)
        watch = StopWatch(watched) if watched.has_stops else None
        return Request(encoded.token_ids, images, sampling, watch)

    def _image_input(self, source: ImageSource, span: ImageSpan) -> ImageInput:
        picture = load_image(source, self.config.vision, self._image_limits)
        return ImageInput(
            torch.from_numpy(picture.values), picture.digest, span.start, span.num_rows
        )


class _TimedEncoder:
    """Encodes as another does and adds up how long this thread took for it."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self._encoder = encoder
        self.seconds = 0.0

    def encode(self, pixels: Tensor) -> Tensor:
        started = time.perf_counter()
        rows = self._encoder.encode(pixels)
        self.seconds += time.perf_counter() - started
        return rows


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
        if event.finish_reason is None:
            return TextDelta(text, logprobs=self._new_logprobs()) if text else None
        text += self._answer.finish()
        reply = Reply(
            self._answer.reply,
            tuple(self._token_ids),
            event.finish_reason,
            Usage(self._num_prompt, len(self._token_ids)),
            tuple(self._logprobs) or None,
        )
        return TextDelta(text, reply, self._new_logprobs())

    def _new_logprobs(self) -> tuple[TokenLogprobs, ...]:
        first, self._num_told = self._num_told, len(self._logprobs)
        return tuple(self._logprobs[first:])


class _Descriptions:
    """The work of `describe_all`: threads open pictures and submit, one place collects."""

    def __init__(
        self, model: MiniGPT4, prompt: str, sampling: SamplingParams | None, max_running: int
    ) -> None:
        self._model = model
        self._prompt = prompt
        self._sampling = sampling
        self._num_threads = min(8, os.cpu_count() or 1)
        self._num_ahead = max_running + 4 * self._num_threads
        self._tickets: dict[int, tuple[Ticket[TextDelta], float]] = {}
        # What came: an index whose ticket has news, a result, or an error that ends it all.
        self._news: queue.SimpleQueue[int | Described | Exception] = queue.SimpleQueue()

    def of(self, pictures: Iterable[Picture]) -> Iterator[Described]:
        """Give results until all pictures are done."""
        numbered, num_open = enumerate(pictures), 0
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="pictures")
        try:
            while True:
                while num_open < self._num_ahead and (item := next(numbered, None)) is not None:
                    pool.submit(self._start, *item)
                    num_open += 1
                if not num_open:
                    return
                result = self._collect()
                if result is not None:
                    num_open -= 1
                    yield result
        finally:
            pool.shutdown(cancel_futures=True)
            for ticket, _ in self._tickets.values():
                ticket.cancel()

    def _start(self, index: int, picture: Picture) -> None:
        started = time.perf_counter()
        try:
            ticket = self._model.submit([_question(picture, self._prompt)], self._sampling)
        except RequestError as error:
            self._news.put(Described(index, None, error, time.perf_counter() - started))
        except Exception as error:  # noqa: BLE001 - raised again where the results are read.
            self._news.put(error)
        else:
            self._tickets[index] = ticket, started
            self._news.put(index)

    def _collect(self) -> Described | None:
        """Wait for news, and give the result if a picture is done."""
        news = self._wait()
        if isinstance(news, Exception):
            raise news
        if isinstance(news, Described):
            return news
        ticket, started = self._tickets[news]
        try:
            while (delta := ticket.poll(lambda: self._news.put(news))) is not None:
                if delta.reply:
                    del self._tickets[news]
                    return Described(news, delta.reply, None, time.perf_counter() - started)
        except RequestError as error:
            del self._tickets[news]
            return Described(news, None, error, time.perf_counter() - started)
        return None

    def _wait(self) -> int | Described | Exception:
        while True:
            try:
                # Windows hands Ctrl-C to Python only between two waits.
                return self._news.get(timeout=0.5)
            except queue.Empty:
                continue


def _as_source(picture: Picture) -> ImageSource:
    return picture if isinstance(picture, ImageSource) else image(picture)


def _question(picture: Picture, prompt: str) -> Message:
    return Message("user", (_as_source(picture), prompt))
