"""OpenAI's chat completions as types: what may be asked, and how answers are written.

Owns   the names, types and ranges of both, and how a question becomes SamplingParams.
Takes  the bytes of a body; gives a ChatRequest, or a Refusal that names what is wrong.
Never  ignores: a name that is not listed here is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.messages import FinishReason
from minigpt4_runtime.server.failures import Refusal

MAX_SEED = 2**63 - 1

# --- what is asked ------------------------------------------------------------------------------


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(_Asked):
    """A piece of text in a message."""

    type: Literal["text"]
    text: str


class ImageURL(_Asked):
    """Where a picture is: a data URL, or what the server was started to allow."""

    url: str
    detail: Literal["auto"] | None = None


class ImagePart(_Asked):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(_Asked):
    """One turn. `refusal` is there so that an answer can be sent back as it came."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=256)]
    refusal: None = None

    @property
    def parts(self) -> Sequence[TextPart | ImagePart]:
        """The content, a plain string as the one part that it is short for."""
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content


_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(_Asked):
    """What a stream has beside the text."""

    include_usage: bool | None = None


class ChatRequest(_Asked):
    """The body of POST /v1/chat/completions. The last five are extensions.

    Answers are greedy unless a temperature is given. Frequency and presence penalties are not
    computed here, so that only 0 is accepted.
    """

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    user: str | None = None
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, gt=0)
    min_tokens: int | None = Field(None, ge=0)
    num_beams: int | None = Field(None, ge=1)
    length_penalty: float | None = Field(None, ge=-10, le=10)

    @property
    def num_choices(self) -> int:
        """How many answers are wanted."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with what it cost."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, choice: int, max_tokens: int) -> SamplingParams:
        """How the answer with this number is chosen; the server allows `max_tokens` tokens.

        Raises:
            Refusal: settings that exclude each other, or too many tokens.
        """
        values: dict[str, Any] = {
            "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty, "num_beams": self.num_beams,
            "length_penalty": self.length_penalty, "min_new_tokens": self.min_tokens,
            "stop": self._stops(), "logprobs": self._num_logprobs(),
        }  # fmt: skip
        # With no seed each choice draws its own.
        seed = None if self.seed is None else (self.seed + choice) % (MAX_SEED + 1)
        given = {name: value for name, value in values.items() if value is not None}
        max_new_tokens = self._max_tokens(max_tokens)
        is_beams = (self.num_beams or 1) > 1
        if self.length_penalty is not None and not is_beams:
            message = "length_penalty needs num_beams above 1: it ranks beams."
            raise Refusal(400, message, param="length_penalty", code="invalid_value")
        try:
            return SamplingParams(max_new_tokens=max_new_tokens, seed=seed, **given)
        except ConfigError as error:
            # Ranges are checked: what is left does not go together with beams, or has no bounds.
            param = "num_beams" if is_beams else str(error).partition(" ")[0]
            raise Refusal(400, str(error), param=param, code="invalid_value") from None

    def _max_tokens(self, most: int) -> int:
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise Refusal(
                400,
                "max_tokens and max_completion_tokens say different things. Give one of them.",
                param="max_tokens",
            )
        wanted = given.pop() if given else None
        if wanted is None:
            wanted = max(min(SamplingParams.max_new_tokens, most), self.min_tokens or 0)
        if wanted > most:
            raise Refusal(
                400, f"max_tokens is {wanted}; this server allows {most}.", param="max_tokens"
            )
        if (self.min_tokens or 0) > wanted:
            raise Refusal(
                400,
                f"min_tokens is {self.min_tokens}, above max_tokens {wanted}.",
                param="min_tokens",
            )
        return wanted

    def _stops(self) -> tuple[str, ...] | None:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return stops or None  # An empty list adds none; the template's own stay.

    def _num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


def read_request(body: bytes | bytearray) -> ChatRequest:
    """Parse and check a body.

    Raises:
        Refusal: it is no JSON, or not of the form that is wanted; `param` says where.
    """
    try:
        asked = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal_of(error) from None
    if asked.stream_options is not None and not asked.stream:
        raise Refusal(400, "stream_options needs stream to be true.", param="stream_options")
    return asked


def _refusal_of(error: ValidationError) -> Refusal:
    # Of a union's alternatives, the one that fits furthest is the one that was meant.
    faults = error.errors(include_url=False, include_input=False)
    fault = max(faults, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
    where, kind = _path(fault["loc"]), fault["type"]
    if kind == "json_invalid":
        return Refusal(400, f"The body is not JSON that can be read: {fault['msg']}.")
    if kind == "extra_forbidden":
        message = f"{where} is not supported by this server. Leave it out."
        return Refusal(400, message, param=where, code="unsupported_parameter")
    if where in ("frequency_penalty", "presence_penalty"):
        message = f"{where} is not supported by this server; only 0 is accepted."
        return Refusal(400, message, param=where, code="unsupported_parameter")
    if kind == "missing":
        return Refusal(400, f"{where} is missing.", param=where, code="missing_parameter")
    return Refusal(400, f"{where or 'The body'}: {fault['msg']}.", param=where or None,
                   code="invalid_value")  # fmt: skip


def _path(location: tuple[int | str, ...]) -> str:
    """Pydantic's location as a client would write it: messages[0].content[1].image_url.url."""
    path, is_part = "", False
    for at, name in enumerate(location):
        if isinstance(name, int):
            path += f"[{name}]"
            continue
        is_alternative = "[" in name or name in ("str", "constrained-str")
        # After the number of a part comes its type, as which it was read.
        is_type = is_part and isinstance(location[at - 1], int)
        is_part = is_part or name.startswith("list[tagged-union")
        if is_type:
            is_part = False
        elif not is_alternative:
            path += f".{name}" if path else name
    return path[:200]


# --- what is answered ---------------------------------------------------------------------------


class _Answered(BaseModel):
    pass


class TopLogprob(_Answered):
    """One token that could have stood there. `bytes` are UTF-8, `token` may be half a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token that was chosen, and the likeliest ones."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(_Answered):
    """A log-probability for every token, the one that ended the answer included."""

    content: list[TokenLogprob]


class AnswerMessage(_Answered):
    """The answer's text."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(_Answered):
    """One answer of n."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason


class UsageCount(_Answered):
    """What it cost, in tokens; the prompt counts once. Rows of pictures are prompt tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(_Answered):
    """The answer to a request that does not stream."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: UsageCount


_LEFT_OUT = Field(exclude_if=lambda value: value is None)


class Delta(_Answered):
    """What is new. The role stands in a choice's first piece only."""

    role: Annotated[Literal["assistant"] | None, _LEFT_OUT] = None
    content: Annotated[str | None, _LEFT_OUT] = None


class ChunkChoice(_Answered):
    """A further piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(_Answered):
    """One event of a stream. With include_usage a last one has the usage and no choice."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageCount | None = None


class ModelCard(_Answered):
    """The model that answers here. `description` is an extension: what it can do."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["minigpt4-runtime"] = "minigpt4-runtime"
    description: str


class ModelList(_Answered):
    """All models that answer here: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorContent(_Answered):
    """What went wrong; `param` names what to change."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Answered):
    """The body of every answer that is an error."""

    error: ErrorContent


class Status(_Answered):
    """Whether the server is alive, or ready; if it is not, why."""

    status: Literal["alive", "ready", "not ready"]
    reason: str | None = None


def request_schemas() -> dict[str, Any]:
    """ChatRequest and its parts by name, for an OpenAPI document's components."""
    schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    parts: dict[str, Any] = schema.pop("$defs")
    return {**parts, ChatRequest.__name__: schema}
