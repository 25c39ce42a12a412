"""A question over HTTP, from the first byte of a body to the last of an answer.

Owns   the steps of a request: read, check, open images, submit, and write the answers.
Takes  a request that has a slot; gives a response.
Never  works in the event loop: prompts and images are prepared in a few threads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.errors import GrammarError, RequestError
from minigpt4_runtime.messages import (
    DATA_URL_NAME,
    ImageSource,
    Message,
    Reply,
    TaskName,
    TextDelta,
)
from minigpt4_runtime.server.admission import Slot
from minigpt4_runtime.server.body import Body, BodyReader
from minigpt4_runtime.server.explained import Explained, Explainer, ExplainRequest
from minigpt4_runtime.server.failures import BROKEN, Failure, failure_of, no_such_model
from minigpt4_runtime.server.logs import log_failure
from minigpt4_runtime.server.media import MediaPolicy
from minigpt4_runtime.server.metrics import Metrics
from minigpt4_runtime.server.protocol import (
    ChatMessage,
    ImagePart,
    TextPart,
    TextRequest,
    read_request,
)
from minigpt4_runtime.server.settings import ServerConfig
from minigpt4_runtime.server.streaming import Answers, AnswerWriter
from minigpt4_runtime.server.tokens import Tokenized, TokenizeRequest, tokenize
from minigpt4_runtime.server.watch import EngineWatch

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4

T = TypeVar("T")
_PATIENCE_SECONDS = 5.0
_CONTENT = {"messages", "prompt", "input", "instructions"}  # Fields for a log with content.
# No token of any vocabulary has so many characters: longer text cannot fit and is not tokenised.
_CHARACTERS_PER_TOKEN = 64
_EVENT_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class Endpoint:
    """One form of asking and answering: where, and the types of both."""

    path: str
    summary: str
    asked: type[TextRequest]
    answered: type[BaseModel]
    writer: Callable[[Any, str, Callable[[int], bytes]], AnswerWriter]


class Chat:
    """Answers questions."""

    def __init__(
        self, model: MiniGPT4, config: ServerConfig, *, metrics: Metrics, watch: EngineWatch
    ) -> None:
        self._model = model
        self._config = config
        self._metrics = metrics
        self._watch = watch
        self._threads = ThreadPoolExecutor(config.num_workers, thread_name_prefix="prompts")
        # A slow compilation of a form delays only other forms.
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._explainer = Explainer(model) if config.explains else None
        self._bodies = BodyReader(
            max_bytes=config.max_body_bytes,
            max_arriving_bytes=config.max_body_bytes * config.max_requests,
            seconds=config.body_seconds,
        )
        self._media = MediaPolicy(
            domains=frozenset(domain.lower() for domain in config.media_domains),
            folder=config.media_dir,
            max_bytes=config.max_body_bytes,
            seconds=config.fetch_seconds,
        )

    async def answer(self, request: Request, slot: Slot, endpoint: Endpoint) -> Response:
        """Answer one request, whole or as a stream.

        Raises:
            Failure, MiniGPT4Error: it cannot be served.
            ClientDisconnect: the client has gone away.
        """
        body = await self._read(request, slot)
        running = _RunningRequest(self._config, self._metrics, self._watch, request)
        try:
            asked, answers = await running.before_deadline(
                while_connected(request, self._begin(body, slot, endpoint.asked))
            )
        except Exception as error:
            self._watch.report(error)
            raise
        slot.abort = answers.abort
        writer = endpoint.writer(asked, asked.model, self._model.token_bytes)
        running.begin(asked, answers, writer)
        is_stream = asked.stream
        del asked  # Frees its pictures, which have been opened.
        if is_stream:
            return _EventStream(running)
        replies = await while_connected(request, running.replies())
        return Response(writer.whole(replies).model_dump_json(), media_type="application/json")

    async def tokenize(self, request: Request, slot: Slot) -> Tokenized:
        """Give the ids of a prompt or a dialogue.

        Raises:
            Failure, MiniGPT4Error: there are none.
        """
        body = await self._read(request, slot)
        asked = await self._in_thread(read_request, body.content, TokenizeRequest)
        self._adapter_of(asked.model or self._config.model_name)
        self._check_content([] if asked.prompt is None else [asked.prompt], asked.messages or ())
        return await self._in_thread(tokenize, self._model, asked)

    async def explain(self, request: Request, slot: Slot) -> Explained:
        """Say where a word of an answer looked.

        Raises:
            Failure, MiniGPT4Error: there is no such word or model, or it took too long.
            ClientDisconnect: the client has gone away.
        """
        assert self._explainer is not None
        body = await self._read(request, slot)
        asked = await self._in_thread(read_request, body.content, ExplainRequest)
        adapter = self._adapter_of(asked.model or self._config.model_name)
        self._check_content([asked.answer], asked.messages)
        messages = [await self._open(message, body) for message in asked.messages]
        running = _RunningRequest(self._config, self._metrics, self._watch, request)
        return await running.before_deadline(
            while_connected(request, self._explainer.explain(messages, asked, adapter))
        )

    def close(self) -> None:
        """End the threads."""
        if self._explainer:
            self._explainer.close()
        for threads in (self._threads, self._compiler):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _read(self, request: Request, slot: Slot) -> Body:
        # Browsers let any web page send other types to a local server without a preflight request.
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            message = "Send the body as Content-Type: application/json."
            raise Failure(415, message, code="unsupported_media_type")
        body = await self._bodies.read(request)
        slot.grow(1)
        return body

    async def _begin(
        self, body: Body, slot: Slot, kind: type[TextRequest]
    ) -> tuple[TextRequest, Answers]:
        asked = await self._in_thread(read_request, body.content, kind)
        self._check(asked)
        slot.grow(asked.num_choices)
        per_prompt = asked.num_choices // max(1, len(asked.prompts))
        samplings = [
            asked.sampling(choice % per_prompt, self._config.max_tokens)
            for choice in range(asked.num_choices)
        ]
        try:
            return asked, Answers(await self._submit(asked, samplings, body))
        except RequestError as error:
            raise failure_of(error, asked.subject) from error

    async def _submit(
        self, asked: TextRequest, samplings: Sequence[SamplingParams], body: Body
    ) -> list[AsyncIterator[TextDelta]]:
        await self._prepare(asked, samplings[0])
        messages = [await self._open(message, body) for message in asked.dialogue]
        messages = _with_task(messages, getattr(asked, "task", None))
        body.forget()
        num_images = sum(isinstance(part, ImageSource) for m in messages for part in m.content)
        self._metrics.count_images(num_images)
        adapter = self._adapter_of(asked.model)
        if not asked.prompts:
            submit = partial(self._model.submit, messages, adapter=adapter)
            return [await self._in_thread(submit, each) for each in samplings]
        submit_text = partial(self._model.submit_text, adapter=adapter)
        per_prompt = len(samplings) // len(asked.prompts)
        prompts = [prompt for prompt in asked.prompts for _ in range(per_prompt)]
        return [
            await self._in_thread(submit_text, prompt, each)
            for prompt, each in zip(prompts, samplings, strict=True)
        ]

    async def _prepare(self, asked: TextRequest, sampling: SamplingParams) -> None:
        if sampling.grammar is None:
            return
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._compiler, self._model.prepare, sampling)
        except GrammarError as error:
            message, code = str(error), "invalid_grammar"
            raise Failure(400, message, param=asked.form_param, code=code) from None

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def _check(self, asked: TextRequest) -> None:
        self._adapter_of(asked.model)
        most = min(self._config.max_choices, self._config.max_requests)
        _check_number("n", asked.num_choices, most)
        _check_number("num_beams", asked.num_beams or 1, self._model.engine_config.max_running)
        self._check_task(getattr(asked, "task", None))
        self._check_content(asked.prompts, asked.dialogue, asked.subject)

    def _check_task(self, task: TaskName | None) -> None:
        if task is not None and task not in self._model.tasks:
            known = ", ".join(self._model.tasks) or "none: only MiniGPT-v2 has tasks"
            message = f"task is {task!r}; known to this model are {known}."
            raise Failure(400, message, param="task", code="invalid_value")

    def _check_content(
        self,
        prompts: Sequence[str | Sequence[int]],
        dialogue: Sequence[ChatMessage],
        subject: str = "messages",
    ) -> None:
        parts = [part for message in dialogue for part in message.parts]
        lengths = [
            sum(len(part.text) for part in message.parts if isinstance(part, TextPart))
            for message in dialogue
        ]
        # Older messages may leave a window: then only single ones can be too long.
        has_window = self._model.engine_config.cache_window is not None
        in_dialogue = max(lengths, default=0) if has_window else sum(lengths)
        num_characters = max((in_dialogue, *map(len, prompts)))
        most = self._model.config.language.context_length
        if num_characters > most * _CHARACTERS_PER_TOKEN:
            message = (
                f"There are {num_characters:,} characters, far more than the {most:,} tokens of "
                "the model's context. Shorten the text."
            )
            raise Failure(400, message, param=subject, code="context_length_exceeded")
        num_images, most = sum(isinstance(p, ImagePart) for p in parts), self._config.max_images
        if num_images > most:
            message = f"The request has {num_images} pictures; this server allows {most}."
            raise Failure(400, message, param=subject, code="too_many_images")

    def _adapter_of(self, name: str) -> str | None:
        """The adapter that a model's name means, None for the model itself."""
        own, adapters = self._config.model_name, self._model.adapters
        if name not in (own, *adapters):
            raise no_such_model(name, (own, *adapters))
        return None if name == own else name

    async def _open(self, message: ChatMessage, body: Body) -> Message:
        parts = [
            part.text
            if isinstance(part, TextPart)
            else await self._open_image(part.image_url.url, body)
            for part in message.parts
        ]
        return Message(message.speaker, tuple(parts))

    async def _open_image(self, url: str, body: Body) -> ImageSource:
        held = await self._in_thread(body.image, url)
        if held is None:
            return await self._media.open(url)
        return ImageSource(held, label=DATA_URL_NAME)


def _with_task(messages: list[Message], task: TaskName | None) -> list[Message]:
    """The last question gets the task; earlier ones have theirs in their text."""
    last = max((at for at, each in enumerate(messages) if each.role == "user"), default=None)
    if task is None or last is None:
        return messages
    return [*messages[:last], replace(messages[last], task=task), *messages[last + 1 :]]


class _RunningRequest:
    """One request in progress, with its times and counts."""

    writer: AnswerWriter

    def __init__(
        self, config: ServerConfig, metrics: Metrics, watch: EngineWatch, request: Request
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._watch = watch
        self._state = request.scope["state"]
        self._started = time.monotonic()
        self._answers: Answers | None = None
        self._replies: dict[int, Reply] = {}
        self._first_texts: dict[int, float] = {}

    def begin(self, asked: TextRequest, answers: Answers, writer: AnswerWriter) -> None:
        """Note that the request is being answered."""
        self.writer, self._answers = writer, answers
        self._state["told"] = {"choices": asked.num_choices, "stream": bool(asked.stream)}
        if asked.ignored:
            self._state["told"]["ignored"] = asked.ignored
        if self._config.logs_content:
            self._state["told"] |= asked.model_dump(include=_CONTENT)

    @property
    def seconds_left(self) -> float:
        """How long this request may still take."""
        return self._started + self._config.request_seconds - time.monotonic()

    async def before_deadline(self, work: Awaitable[T]) -> T:
        """Wait for something within the time that this request has.

        Raises:
            Failure: the time is over.
        """
        try:
            async with asyncio.timeout(self.seconds_left):
                return await work
        except TimeoutError:
            raise Failure(
                504,
                f"The answer took longer than {self._config.request_seconds:g} seconds.",
                kind=BROKEN,
                code="timeout",
            ) from None

    async def deltas(self) -> AsyncIterator[tuple[int, TextDelta]]:
        """The pieces of all answers, each noted. When this ends, the answers are cancelled."""
        assert self._answers is not None, "begin comes first"
        try:
            while (piece := await self.before_deadline(self._answers.next())) is not None:
                self._note(*piece)
                yield piece
        except Exception as error:
            self._watch.report(error)
            raise
        finally:
            self._answers.cancel()

    async def replies(self) -> list[Reply]:
        """The finished answers, in order."""
        async for _ in self.deltas():
            pass
        return [self._replies[choice] for choice in sorted(self._replies)]

    async def events(self) -> AsyncIterator[bytes]:
        """All events of a stream. An error ends it with an event of its own."""
        self._state["outcome"] = "cancelled"  # Until it has ended otherwise.
        try:
            yield self.writer.start()
            async for choice, delta in self.deltas():
                if event := self.writer.piece(choice, delta):
                    yield event
            yield self.writer.end(await self.replies())
            self._state["outcome"] = "ok"
        except Exception as error:  # noqa: BLE001 - the status was sent: an event reports it.
            failure = failure_of(error)
            if failure.status == 500:
                log_failure(error, request_id=self._state["request_id"])
            self._state["outcome"] = "timeout" if failure.status == 504 else "failed"
            yield self.writer.failed(failure)

    def cancel(self) -> None:
        """Cancel the answers: the client has gone away."""
        if self._answers:
            self._answers.cancel()

    def _note(self, choice: int, delta: TextDelta) -> None:
        now = time.monotonic()
        if choice not in self._first_texts:
            self._first_texts[choice] = now
            self._metrics.first_text(now - self._started)
        if delta.reply:
            self._replies[choice] = delta.reply
            self._metrics.answered(delta.reply, now - self._first_texts[choice])
            told = self._state["told"]
            told["prompt_tokens"] = delta.reply.usage.prompt_tokens
            told["answer_tokens"] = (
                told.get("answer_tokens", 0) + delta.reply.usage.completion_tokens
            )
            if self._config.logs_content:
                told.setdefault("answers", []).append(delta.reply.text)


class _EventStream(StreamingResponse):
    """A stream that cancels its answers when it ends in any way, even before its start."""

    def __init__(self, running: _RunningRequest) -> None:
        super().__init__(
            running.events(), media_type="text/event-stream", headers=_EVENT_STREAM_HEADERS
        )
        self._running = running

    async def __call__(self, *arguments: Any) -> None:
        try:
            # The stream ends itself in time, unless its client reads nothing.
            async with asyncio.timeout(self._running.seconds_left + _PATIENCE_SECONDS):
                await super().__call__(*arguments)
        except TimeoutError:
            raise ClientDisconnect from None
        finally:
            self._running.cancel()


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Wait for something as long as the client does. The body must have been read.

    Raises:
        ClientDisconnect: it went away; the work was cancelled.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            # Wait until it has released its resources.
            with suppress(asyncio.CancelledError, Exception):
                await working


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_number(param: str, number: int, most: int) -> None:
    if number > most:
        raise Failure(400, f"{param} is {number}; this server allows {most}.", param=param)
