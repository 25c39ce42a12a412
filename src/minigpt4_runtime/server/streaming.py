"""Tickets → one stream of pieces → chunks and events, or one whole answer.

Owns   the merging of n answers, and the form of chunks and events.
Takes  tickets; gives OpenAI's chunks, chat completions and server-sent events.
Never  blocks: a ticket is read in the event loop.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel

from minigpt4_runtime.messages import Reply, TextDelta, TokenLogprobs, Usage
from minigpt4_runtime.server.answered import (
    AnswerMessage,
    ChatChunk,
    ChatCompletion,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    ErrorBody,
    TokenLogprob,
    TopLogprob,
    UsageCount,
    boxes_of,
)
from minigpt4_runtime.server.failures import Failure
from minigpt4_runtime.server.protocol import TextRequest

DONE = b"data: [DONE]\n\n"


class Answers:
    """The answers to one request as they grow."""

    def __init__(self, tickets: Sequence[AsyncIterator[TextDelta]]) -> None:
        """Begin to read; needs a running event loop."""
        self._came: asyncio.Queue[tuple[int, TextDelta] | Exception] = asyncio.Queue()
        self._num_open = len(tickets)
        self._readers = [
            asyncio.create_task(self._read(choice, ticket)) for choice, ticket in enumerate(tickets)
        ]

    async def _read(self, choice: int, ticket: AsyncIterator[TextDelta]) -> None:
        try:
            async for delta in ticket:
                self._came.put_nowait((choice, delta))
        except Exception as error:  # noqa: BLE001 - raised again where the answers are read.
            self._came.put_nowait(error)

    async def next(self) -> tuple[int, TextDelta] | None:
        """The next piece of any answer, with the answer's number; None when all are whole.

        The first error of any answer, or of `abort`, is raised and cancels the others.
        """
        if not self._num_open:
            return None
        item = await self._came.get()
        if isinstance(item, Exception):
            self.cancel()
            raise item
        if item[1].reply:
            self._num_open -= 1
        return item

    def abort(self, error: Exception) -> None:
        """Let `next` raise this error."""
        self._came.put_nowait(error)

    def cancel(self) -> None:
        """End all answers. A ticket whose reading is cancelled cancels its request."""
        self._num_open = 0
        for reader in self._readers:
            reader.cancel()


class AnswerWriter(Protocol):
    """Writes one request's answers, whole or as the events of a stream."""

    def whole(self, replies: Sequence[Reply]) -> BaseModel:
        """All answers, as the one body of a response."""

    def start(self) -> bytes:
        """The first events of a stream."""

    def piece(self, index: int, delta: TextDelta) -> bytes:
        """The event of a further piece of one answer."""

    def end(self, replies: Sequence[Reply]) -> bytes:
        """The last events of a stream whose answers are whole."""

    def failed(self, failure: Failure) -> bytes:
        """The last events of a stream that failed."""


class CompletionWriter:
    """The common part of chat completions and completions. `bytes_of` gives a token's bytes."""

    prefix: ClassVar[str]

    def __init__(
        self, asked: TextRequest, model_name: str, bytes_of: Callable[[int], bytes]
    ) -> None:
        # Not the request itself, which may hold images.
        self._num_choices = asked.num_choices
        self._num_prompts = max(1, len(asked.prompts))
        self._wants_usage, self._wants_counts = asked.wants_usage, asked.wants_counts
        self._bytes_of = bytes_of
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()),
            "model": model_name,
        }  # fmt: skip

    def failed(self, failure: Failure) -> bytes:
        """The event of an error."""
        return as_event(ErrorBody.model_validate(failure.as_body()))

    def _usage(self, replies: Sequence[Reply]) -> UsageCount:
        """The whole request's tokens: each of its prompts once, and all its answers."""
        per_prompt = len(replies) // self._num_prompts
        prompt = sum(reply.usage.prompt_tokens for reply in replies[::per_prompt])
        return _count([reply.usage for reply in replies], prompt)

    def _usage_so_far(self, delta: TextDelta) -> UsageCount | None:
        """One answer's tokens up to this piece, if each piece is to have them."""
        usage = delta.usage if self._wants_counts else None
        return _count([usage], usage.prompt_tokens) if usage else None


class ChatWriter(CompletionWriter):
    """Writes chat completions."""

    prefix = "chatcmpl"

    def whole(self, replies: Sequence[Reply]) -> ChatCompletion:
        """All answers, whole."""
        choices = [
            Choice(
                index=index,
                message=AnswerMessage(content=reply.text, boxes=boxes_of(reply)),
                logprobs=self._logprobs(reply.logprobs),
                finish_reason=reply.finish_reason,
            )
            for index, reply in enumerate(replies)
        ]
        return ChatCompletion(**self._head, choices=choices, usage=self._usage(replies))

    def start(self) -> bytes:
        """The event that opens each choice with its role."""
        return b"".join(
            self._event(ChunkChoice(index=index, delta=Delta(role="assistant", content="")))
            for index in range(self._num_choices)
        )

    def piece(self, index: int, delta: TextDelta) -> bytes:
        """The event of a further piece; the end of a choice is an event of its own."""
        logprobs, events = self._logprobs(delta.logprobs or None), b""
        usage = self._usage_so_far(delta)
        if delta.text or logprobs:
            choice = ChunkChoice(index=index, delta=Delta(content=delta.text), logprobs=logprobs)
            events += self._event(choice, usage=usage)
        if delta.reply:
            reason = delta.reply.finish_reason
            last = Delta(boxes=boxes_of(delta.reply))
            choice = ChunkChoice(index=index, delta=last, finish_reason=reason)
            events += self._event(choice, usage=usage)
        return events

    def end(self, replies: Sequence[Reply]) -> bytes:
        """The event with the usage, if the client wants it, and the last one."""
        usage = self._event(usage=self._usage(replies)) if self._wants_usage else b""
        return usage + DONE

    def _event(self, *choices: ChunkChoice, usage: UsageCount | None = None) -> bytes:
        return as_event(ChatChunk(**self._head, choices=list(choices), usage=usage))

    def _logprobs(self, tokens: Sequence[TokenLogprobs] | None) -> ChoiceLogprobs | None:
        if tokens is None:
            return None
        return ChoiceLogprobs(
            content=[
                TokenLogprob(
                    **self._top(token.token_id, token.logprob).model_dump(),
                    top_logprobs=[self._top(*each) for each in token.top],
                )
                for token in tokens
            ]
        )

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        text = self._bytes_of(token_id)
        return TopLogprob(
            token=text.decode(errors="replace"), logprob=finite(logprob), bytes=list(text)
        )


def finite(logprob: float) -> float:
    """JSON has no -inf; OpenAI writes -9999 for an impossible token."""
    return max(logprob, -9999.0)


def _count(usages: Sequence[Usage], prompt: int) -> UsageCount:
    # Of several answers, the most that has left the window of one.
    completion = sum(each.completion_tokens for each in usages)
    return UsageCount(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        evicted_tokens=max(each.evicted_tokens for each in usages) or None,
        evicted_images=max(each.evicted_images for each in usages) or None,
    )


def as_event(content: BaseModel) -> bytes:
    """A server-sent event."""
    return b"data: " + content.model_dump_json().encode() + b"\n\n"
