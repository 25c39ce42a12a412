"""The one rule about fields that no request type declares: ignored, or refused by name.

Owns   the tables of such fields, and RequestPart, the base of all request types.
Takes  JSON objects; removes fields that have no effect.
Never  ignores a field that would change the answer.
"""

from __future__ import annotations

import functools
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator

# Fields that ask for a feature this server lacks. A request's declared fields are its own matter.
_LACKING = (
    "audio", "bad_words", "chat_template", "conversation", "file_id", "functions", "grammar",
    "guided_choice", "guided_grammar", "guided_json", "json_schema", "previous_response_id",
    "prompt", "prompt_logprobs", "regex", "stop_token_ids", "structural_tag", "suffix",
    "tool_calls", "tools", "web_search_options", "whitespace_pattern",
)  # fmt: skip
# All such fields, and the values with which OpenAI says "not wanted".
FEATURES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_LACKING, ()),
    "background": (False,),
    "best_of": (1,),
    "echo": (False,),
    "format": ({"type": "text"},),
    "function_call": ("none", "auto"),
    "include": (["reasoning.encrypted_content"],),
    "json_object": (False,),
    "modalities": (["text"],),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "use_beam_search": (False,),
}
# Client libraries often use a tool to get JSON, so that their users never wrote "tools".
_NO_TOOLS = "It calls no tools: leave them out, and ask for JSON with response_format."
INSTEAD = dict.fromkeys(("functions", "function_call", "tools", "tool_choice"), _NO_TOOLS)
# Fields that only describe the request, its sender, or the origin of an answer that is sent back.
DESCRIPTIVE = frozenset({
    "annotations", "cache_control", "detail", "id", "include_obfuscation", "metadata", "name",
    "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "reasoning",
    "reasoning_content", "refusal", "safety_identifier", "service_tier", "status", "user",
    "verbosity",
})  # fmt: skip
_MAX_TOLD, _MAX_NAME = 16, 64


class RequestPart(BaseModel):
    """An object in a request. Unknown fields are ignored, and listed in the log."""

    model_config = ConfigDict(
        extra="forbid",  # Any field left over asks for a missing feature.
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        json_schema_extra={"additionalProperties": True},
    )

    @model_validator(mode="before")
    @classmethod
    def _without_absent(cls, given: Any, info: ValidationInfo) -> Any:
        """Leave out fields without effect; names of unknown ones are added to the set `context`."""
        if not isinstance(given, dict):
            return given
        kept = {}
        for name, value in given.items():
            if value is None:
                continue
            if name in _known(cls):
                kept[name] = value
            elif value in ("", [], {}) or name in DESCRIPTIVE:
                continue
            elif name not in FEATURES:
                if info.context is not None and len(info.context) < _MAX_TOLD:
                    info.context.add(name[:_MAX_NAME])
            elif value not in FEATURES[name]:
                kept[name] = value
        return kept


@functools.cache
def _known(kind: type[RequestPart]) -> frozenset[str]:
    """The fields of such an object, as they are written in JSON."""
    return frozenset(field.alias or name for name, field in kind.model_fields.items())
