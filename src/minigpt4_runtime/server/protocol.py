"""The types of requests: the settings of all of them, and OpenAI's chat completions.

Owns   names, types and ranges, and the translation of settings into SamplingParams.
Takes  the bytes of a body; gives a request, or a Failure that names the faulty field.
Never  ignores an undeclared field by itself: `absent` has that rule for all requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from minigpt4_runtime.config import LOGIT_BIAS_RANGE, SAMPLING_RANGES, SamplingParams
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.messages import Role, TaskName
from minigpt4_runtime.server.absent import INSTEAD, RequestPart
from minigpt4_runtime.server.failures import Failure
from minigpt4_runtime.server.forms import ResponseFormat, StructuredOutputs

A = TypeVar("A", bound=RequestPart)


def within(setting: str) -> Any:
    """A field that may be left out, with the range of this setting of SamplingParams."""
    return Field(None, **SAMPLING_RANGES[setting].bounds)


class TextPart(RequestPart):
    """A piece of text in a message."""

    type: Literal["text"]
    text: str


class ImageURL(RequestPart):
    """A picture's address: a data URL, or another URL that the server allows."""

    url: str


class ImagePart(RequestPart):
    """A picture in a message; its URL may stand there without the object around it."""

    type: Literal["image_url"]
    image_url: ImageURL

    @field_validator("image_url", mode="before")
    @classmethod
    def _around_url(cls, given: Any) -> Any:
        return {"url": given} if isinstance(given, str) else given


ChatPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(RequestPart):
    """One turn. An answer may be sent back as it came, one without any text too.

    An answer without content is not told to the model; MiniGPT-v2 sees `</s>` in its place.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ChatPart], Field(max_length=256)]

    @model_validator(mode="before")
    @classmethod
    def _may_be_silent(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("role") == "assistant":
            return given if given.get("content") is not None else {**given, "content": []}
        return given

    @property
    def speaker(self) -> Role:
        """The role. For its newer models OpenAI calls the system role `developer`."""
        return "system" if self.role == "developer" else self.role

    @property
    def parts(self) -> Sequence[TextPart | ImagePart]:
        """The content, a plain string as the one part that it is short for."""
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content


_Stop = Annotated[str, Field(max_length=256)]
# In JSON all keys are strings.
_TokenId = Annotated[int, Field(ge=0, strict=False)]
_Bias = Annotated[float, Field(**LOGIT_BIAS_RANGE.bounds)]


class StreamOptions(RequestPart):
    """The additions to a stream of text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class TextRequest(RequestPart):
    """The settings of every request for a text. Those from `top_k` on are extensions.

    Answers are greedy unless a temperature is given.
    """

    model: str
    max_tokens: int | None = within("max_new_tokens")
    temperature: float | None = within("temperature")
    top_p: float | None = within("top_p")
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    seed: int | None = within("seed")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: float | None = within("frequency_penalty")
    presence_penalty: float | None = within("presence_penalty")
    logit_bias: dict[_TokenId, _Bias] | None = Field(None, max_length=1024)
    response_format: ResponseFormat | None = None
    top_k: int | None = within("top_k")
    min_p: float | None = within("min_p")
    repetition_penalty: float | None = within("repetition_penalty")
    min_tokens: int | None = within("min_new_tokens")
    num_beams: int | None = within("num_beams")
    length_penalty: float | None = within("length_penalty")
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_regex: str | None = None

    # The field with the dialogue or text. Errors about pictures and lengths name it.
    subject: ClassVar[str] = "messages"
    default_max_tokens: ClassVar[int] = SamplingParams.max_new_tokens
    _ignored: frozenset[str] = frozenset()

    def model_post_init(self, context: Any) -> None:
        """Keep the names that validation ignored."""
        self._ignored = frozenset(context or ())

    @property
    def ignored(self) -> list[str]:
        """The unknown fields that were ignored."""
        return sorted(self._ignored)

    @property
    def num_choices(self) -> int:
        """How many answers are wanted."""
        return 1

    @property
    def dialogue(self) -> Sequence[ChatMessage]:
        """The messages of which the last is to be answered."""
        return ()

    @property
    def prompts(self) -> Sequence[str | Sequence[int]]:
        """The texts to continue, if there is no dialogue."""
        return ()

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_counts(self) -> bool:
        """Whether each piece of a stream has the usage up to there."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def sampling(self, choice: int, max_tokens: int) -> SamplingParams:
        """How the answer with this number is chosen; the server allows `max_tokens` tokens.

        Raises:
            Failure: settings that exclude each other, or too many tokens.
        """
        values: dict[str, Any] = {
            "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k,
            "min_p": self.min_p, "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty, "logit_bias": self.logit_bias,
            "repetition_penalty": self.repetition_penalty, "num_beams": self.num_beams,
            "length_penalty": self.length_penalty, "min_new_tokens": self.min_tokens,
            "stop": self._stops(), "ignore_eos": self.ignore_eos,
            "logprobs": self._num_logprobs(), **self._form(),
        }  # fmt: skip
        # With no seed each choice draws its own.
        seed = None if self.seed is None else (self.seed + choice) % 2**63
        given = {name: value for name, value in values.items() if value is not None}
        max_new_tokens = self._max_tokens(max_tokens)
        is_beams = (self.num_beams or 1) > 1
        if self.length_penalty is not None and not is_beams:
            message = "length_penalty needs num_beams above 1: it ranks beams."
            raise Failure(400, message, param="length_penalty", code="invalid_value")
        try:
            return SamplingParams(max_new_tokens=max_new_tokens, seed=seed, **given)
        except ConfigError as error:
            # Ranges were checked. The rest are fields without bounds, and conflicts with beams.
            first = str(error).partition(" ")[0]
            param = first if first in type(self).model_fields else "num_beams"
            raise Failure(400, str(error), param=param, code="invalid_value") from None

    def _max_tokens(self, most: int) -> int:
        names = ("max_tokens", "max_completion_tokens", "max_output_tokens")
        given = {name: value for name in names if (value := getattr(self, name, None)) is not None}
        if len(set(given.values())) > 1:
            message = f"{' and '.join(given)} say different things. Give one of them."
            raise Failure(400, message, param="max_tokens")
        wanted = next(iter(given.values()), None)
        if wanted is None:
            wanted = max(min(self.default_max_tokens, most), self.min_tokens or 0)
        if wanted > most:
            raise Failure(
                400, f"max_tokens is {wanted}; this server allows {most}.", param="max_tokens"
            )
        if (self.min_tokens or 0) > wanted:
            raise Failure(
                400,
                f"min_tokens is {self.min_tokens}, above max_tokens {wanted}.",
                param="min_tokens",
            )
        return wanted

    def _stops(self) -> tuple[str, ...] | None:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        # Empty ones do not count. Without any, the template's stay, except with ignore_eos.
        return tuple(stop for stop in stops if stop) or (() if self.ignore_eos else None)

    def _form(self) -> dict[str, Any]:
        forms = self.forms
        if len(forms) > 1:
            names = dict.fromkeys(name for name, _ in forms)
            message = f"{' and '.join(names)}: give one form."
            raise Failure(400, message, param=self.form_param, code="invalid_value")
        return forms[0][1] if forms else {}

    @property
    def forms(self) -> list[tuple[str, dict[str, Any]]]:
        """The wanted forms as SamplingParams' settings, each with the field that asks for it."""
        forms: list[tuple[str, dict[str, Any]]] = []
        if self.response_format:
            name = "response_format"
            forms.append((name, self.response_format.setting(name)))
        if self.structured_outputs:
            forms += [("structured_outputs", each) for each in self.structured_outputs.settings]
        if self.guided_regex:
            forms.append(("guided_regex", {"regex": self.guided_regex}))
        return [(name, setting) for name, setting in forms if setting]

    @property
    def form_param(self) -> str:
        """The field that gives the answer's form."""
        return self.forms[-1][0]

    def _num_logprobs(self) -> int | None:
        return None


class ChatRequest(TextRequest):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = within("max_new_tokens")
    n: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = within("logprobs")
    task: TaskName | None = None

    @property
    def num_choices(self) -> int:
        """How many answers are wanted."""
        return self.n or 1

    @property
    def dialogue(self) -> Sequence[ChatMessage]:
        """The messages of which the last is to be answered."""
        return self.messages

    def _num_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise Failure(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


def read_request(body: bytes | bytearray, kind: type[A]) -> A:
    """Parse and check a body as one of these requests.

    Raises:
        Failure: it is not JSON, or not a request of this kind; `param` names the field.
    """
    try:
        asked = kind.model_validate_json(body, context=set())
    except ValidationError as error:
        raise _refusal_of(error) from None
    if isinstance(asked, TextRequest) and asked.wants_usage and not asked.stream:
        raise Failure(400, "stream_options needs stream to be true.", param="stream_options")
    return asked


def _refusal_of(error: ValidationError) -> Failure:
    # Of a union's alternatives, the one that fits furthest is the one that was meant.
    faults = error.errors(include_url=False, include_input=False)
    fault = max(faults, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
    where, kind = _path(fault["loc"]), fault["type"]
    if kind == "json_invalid":
        return Failure(400, f"The body is not JSON that can be read: {fault['msg']}.")
    if kind == "extra_forbidden":
        advice = INSTEAD.get(str(fault["loc"][-1]), "Leave it out.")
        message = f"{where} is not supported by this server. {advice}"
        return Failure(400, message, param=where, code="unsupported_parameter")
    if kind == "missing":
        return Failure(400, f"{where} is missing.", param=where, code="missing_parameter")
    return Failure(400, f"{where or 'The body'}: {fault['msg']}.", param=where or None,
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


def request_schemas(kinds: Sequence[type[RequestPart]]) -> dict[str, Any]:
    """These requests and their parts by name, for an OpenAPI document's components."""
    schemas: dict[str, Any] = {}
    for kind in kinds:
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= {**schema.pop("$defs", {}), kind.__name__: schema}
    return schemas
