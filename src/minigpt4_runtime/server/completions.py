"""OpenAI's completions: the continuation of a text or its ids, without template and pictures.

Owns   the types of requests to POST /v1/completions, and of its answers.
Takes  replies and their pieces; gives one whole answer, or the events of a stream.
Never  reads a body or a ticket itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, field_validator

from minigpt4_runtime.messages import FinishReason, Reply, TextDelta, TokenLogprobs
from minigpt4_runtime.server.answered import UsageCount
from minigpt4_runtime.server.protocol import TextRequest, within
from minigpt4_runtime.server.streaming import DONE, CompletionWriter, as_event, finite

_TokenIds = Annotated[list[int], Field(min_length=1)]
_Texts = Annotated[list[str], Field(min_length=1, max_length=256)]
_ManyTokenIds = Annotated[list[_TokenIds], Field(min_length=1, max_length=256)]


class CompletionRequest(TextRequest):
    """The body of POST /v1/completions. `prompt` is a text or its ids, or a list of either."""

    subject: ClassVar[str] = "prompt"
    default_max_tokens: ClassVar[int] = 16  # OpenAI's.

    prompt: str | _Texts | _TokenIds | _ManyTokenIds
    n: int | None = Field(None, ge=1)
    logprobs: int | None = within("logprobs")

    @property
    def prompts(self) -> Sequence[str | Sequence[int]]:
        """The texts to continue, each on its own."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts = [each for each in self.prompt if not isinstance(each, int)]
        return texts or [[each for each in self.prompt if isinstance(each, int)]]

    @property
    def num_choices(self) -> int:
        """How many texts are wanted: n for each prompt."""
        return len(self.prompts) * (self.n or 1)

    @field_validator("logprobs", mode="before")
    @classmethod
    def _false_is_none(cls, given: Any) -> Any:
        return None if given is False else given

    def _num_logprobs(self) -> int | None:
        return self.logprobs


class TextLogprobs(BaseModel):
    """Each token with its log-probability, the likeliest ones, and where it begins in the text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One text, or in a stream a further piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextCompletion(BaseModel):
    """The answer to POST /v1/completions, and each event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageCount | None


class TextWriter(CompletionWriter):
    """Writes completions."""

    prefix = "cmpl"

    def __init__(
        self, asked: CompletionRequest, model_name: str, bytes_of: Callable[[int], bytes]
    ) -> None:
        super().__init__(asked, model_name, bytes_of)
        self._offsets: dict[int, int] = {}

    def whole(self, replies: Sequence[Reply]) -> TextCompletion:
        """All texts, whole."""
        choices = [
            TextChoice(
                index=index,
                text=reply.text,
                logprobs=self._logprobs(index, reply.logprobs),
                finish_reason=reply.finish_reason,
            )
            for index, reply in enumerate(replies)
        ]
        return self._completion(choices, self._usage(replies))

    def start(self) -> bytes:
        """Nothing: the first piece is the first event."""
        return b""

    def piece(self, index: int, delta: TextDelta) -> bytes:
        """The event of a further piece; the last one of a text says why it ended."""
        choice = TextChoice(
            index=index,
            text=delta.text,
            logprobs=self._logprobs(index, delta.logprobs or None),
            finish_reason=delta.reply.finish_reason if delta.reply else None,
        )
        return as_event(self._completion([choice], self._usage_so_far(delta)))

    def end(self, replies: Sequence[Reply]) -> bytes:
        """The event with the usage, if the client wants it, and the last one."""
        usage = as_event(self._completion([], self._usage(replies)))
        return (usage if self._wants_usage else b"") + DONE

    def _completion(self, choices: list[TextChoice], usage: UsageCount | None) -> TextCompletion:
        return TextCompletion(**self._head, choices=choices, usage=usage)

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprobs] | None) -> TextLogprobs | None:
        if tokens is None:
            return None
        offsets, at = [], self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(at)
            at += len(self._text(token.token_id))
        self._offsets[index] = at
        return TextLogprobs(
            tokens=[self._text(token.token_id) for token in tokens],
            token_logprobs=[finite(token.logprob) for token in tokens],
            top_logprobs=[
                {self._text(token_id): finite(logprob) for token_id, logprob in token.top}
                for token in tokens
            ],
            text_offset=offsets,
        )

    def _text(self, token_id: int) -> str:
        return self._bytes_of(token_id).decode(errors="replace")
