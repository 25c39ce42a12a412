"""POST /v1/chat/completions, from the first byte of a body to the last of an answer.

Owns   the road of a question: read, check, open pictures, submit, and write what comes.
Takes  a request that has a place; gives a response.
Never  works in the event loop: prompts and pictures are prepared in a few threads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from minigpt4_runtime.messages import ImageSource, Message, Reply, TextDelta, image
from minigpt4_runtime.server.admission import Place
from minigpt4_runtime.server.body import Body, BodyReader
from minigpt4_runtime.server.failures import BROKEN, Refusal, failure_of, no_such_model
from minigpt4_runtime.server.logs import log_failure
from minigpt4_runtime.server.media import MediaPolicy
from minigpt4_runtime.server.metrics import Metrics
from minigpt4_runtime.server.protocol import (
    ChatMessage,
    ChatRequest,
    ImagePart,
    TextPart,
    read_request,
)
from minigpt4_runtime.server.settings import ServerConfig
from minigpt4_runtime.server.streaming import DONE, Answers, Writer, error_event
from minigpt4_runtime.server.watch import EngineWatch

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4

T = TypeVar("T")
_PATIENCE_SECONDS = 5.0
# No token of any vocabulary has so many characters: longer text cannot fit and is not tokenised.
_CHARACTERS_PER_TOKEN = 64
_EVENT_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


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

    async def answer(self, request: Request, place: Place) -> Response:
        """Answer one request, whole or as a stream.

        Raises:
            Refusal, MiniGPT4Error: it cannot be served.
            ClientDisconnect: nobody waits for it any more.
        """
        _check_content_type(request)
        body = await self._bodies.read(request)
        place.grow(1)
        turn = _Turn(self._config, self._metrics, self._watch, request)
        try:
            asked, answers = await turn.before_deadline(
                while_connected(request, self._begin(body, place))
            )
        except Exception as error:
            self._watch.report(error)
            raise
        place.abort = answers.abort
        turn.begin(asked, answers, Writer(self._config.model_name, self._model.token_bytes))
        if asked.stream:
            return _EventStream(turn)
        replies = await while_connected(request, turn.replies())
        return Response(turn.writer.completion(replies).model_dump_json(),
                        media_type="application/json")  # fmt: skip

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _begin(self, body: Body, place: Place) -> tuple[ChatRequest, Answers]:
        asked = await self._in_thread(read_request, body.content)
        self._check(asked)
        place.grow(asked.num_choices)
        samplings = [
            asked.sampling(choice, self._config.max_tokens) for choice in range(asked.num_choices)
        ]
        messages = [await self._open(message, body) for message in asked.messages]
        body.forget()
        num_images = sum(isinstance(part, ImageSource) for m in messages for part in m.content)
        self._metrics.count_images(num_images)
        tickets = [await self._in_thread(self._model.submit, messages, each) for each in samplings]
        return asked, Answers(tickets)

    async def _in_thread(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def _check(self, asked: ChatRequest) -> None:
        if asked.model != self._config.model_name:
            raise no_such_model(asked.model, self._config.model_name)
        most = min(self._config.max_choices, self._config.max_requests)
        _check_number("n", asked.num_choices, most)
        _check_number("num_beams", asked.num_beams or 1, self._model.engine_config.max_running)
        self._check_messages(asked.messages)

    def _check_messages(self, messages: Sequence[ChatMessage]) -> None:
        parts = [part for message in messages for part in message.parts]
        num_characters = sum(len(part.text) for part in parts if isinstance(part, TextPart))
        most = self._model.config.language.max_position_embeddings
        if num_characters > most * _CHARACTERS_PER_TOKEN:
            raise Refusal(
                400,
                f"The messages have {num_characters:,} characters, far more than the {most:,} "
                "tokens of the model's context. Shorten them.",
                param="messages",
                code="context_length_exceeded",
            )
        num_images = sum(isinstance(part, ImagePart) for part in parts)
        if num_images > self._config.max_images:
            raise Refusal(
                400,
                f"The request has {num_images} pictures; this server allows "
                f"{self._config.max_images}.",
                param="messages",
                code="too_many_images",
            )

    async def _open(self, message: ChatMessage, body: Body) -> Message:
        parts = [
            part.text
            if isinstance(part, TextPart)
            else await self._open_picture(part.image_url.url, body)
            for part in message.parts
        ]
        return Message(message.role, tuple(parts))

    async def _open_picture(self, url: str, body: Body) -> ImageSource:
        held = await self._in_thread(body.picture, url)
        return await self._media.open(url) if held is None else image(held)


class _Turn:
    """One question on its way, and what is measured about it."""

    writer: Writer
    asked: ChatRequest

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

    def begin(self, asked: ChatRequest, answers: Answers, writer: Writer) -> None:
        """The question was understood and is being answered."""
        self.asked, self.writer, self._answers = asked, writer, answers
        self._state["told"] = {"choices": asked.num_choices, "stream": bool(asked.stream)}
        if self._config.logs_content:
            self._state["told"]["messages"] = [m.model_dump() for m in asked.messages]

    @property
    def seconds_left(self) -> float:
        """How long this request may still take."""
        return self._started + self._config.request_seconds - time.monotonic()

    async def before_deadline(self, work: Awaitable[T]) -> T:
        """Wait for something within the time that this request has.

        Raises:
            Refusal: the time is over.
        """
        try:
            async with asyncio.timeout(self.seconds_left):
                return await work
        except TimeoutError:
            raise Refusal(
                504,
                f"The answer took longer than {self._config.request_seconds:g} seconds.",
                kind=BROKEN,
                code="timeout",
            ) from None

    async def deltas(self) -> AsyncIterator[tuple[int, TextDelta]]:
        """What comes, each piece noted. In whatever way it ends, the answers end too."""
        assert self._answers is not None, "begin comes first"
        try:
            while True:
                try:
                    choice, delta = await self.before_deadline(self._answers.__anext__())
                except StopAsyncIteration:
                    return
                self._note(choice, delta)
                yield choice, delta
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
        """All that a stream sends. An error ends it with an event of its own."""
        self._state["outcome"] = "cancelled"  # Until it has ended otherwise.
        try:
            yield self.writer.start(self.asked.num_choices)
            async for choice, delta in self.deltas():
                if event := self.writer.piece(choice, delta):
                    yield event
            if self.asked.wants_usage:
                yield self.writer.usage(await self.replies())
            yield DONE
            self._state["outcome"] = "ok"
        except Exception as error:  # noqa: BLE001 - the status is out: an event must tell it.
            failure = failure_of(error)
            if failure.status == 500:
                log_failure(error, request_id=self._state["request_id"])
            self._state["outcome"] = "timeout" if failure.status == 504 else "failed"
            yield error_event(failure)

    def cancel(self) -> None:
        """Nobody reads any more."""
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
    """A stream that ends its answers in whatever way it ends, even before it began."""

    def __init__(self, turn: _Turn) -> None:
        super().__init__(
            turn.events(), media_type="text/event-stream", headers=_EVENT_STREAM_HEADERS
        )
        self._turn = turn

    async def __call__(self, *arguments: Any) -> None:
        try:
            # The stream ends itself in time, unless its client reads nothing.
            async with asyncio.timeout(self._turn.seconds_left + _PATIENCE_SECONDS):
                await super().__call__(*arguments)
        except TimeoutError:
            raise ClientDisconnect from None
        finally:
            self._turn.cancel()


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
            # It lets go of what it holds before anything else happens.
            with suppress(asyncio.CancelledError, Exception):
                await working


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_content_type(request: Request) -> None:
    # A web page can send other types to a local server without asking; this one it cannot.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = "Send the body as Content-Type: application/json."
        raise Refusal(415, message, code="unsupported_media_type")


def _check_number(param: str, number: int, most: int) -> None:
    if number > most:
        raise Refusal(400, f"{param} is {number}; this server allows {most}.", param=param)
