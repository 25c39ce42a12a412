"""What a field of a request asks for, and the one rule about fields that ask for nothing.

Owns   the tables of such fields, and the base of everything that may be asked.
Takes  JSON objects; gives them without what is as good as absent.
Never  lets a feature pass that this server lacks: what would change the answer is refused by name.
"""

from __future__ import annotations

import functools
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator

# What would need a feature that is not here, and the values with which OpenAI says "not wanted".
# A field that some request knows is that request's own matter, and not looked up.
FEATURES: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "background": (False,),
    "bad_words": (),
    "best_of": (1,),
    "chat_template": (),
    "conversation": (),
    "echo": (False,),
    "file_id": (),
    "format": ({"type": "text"},),
    "function_call": ("none", "auto"),
    "functions": (),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "include": (["reasoning.encrypted_content"],),
    "json_object": (False,),
    "json_schema": (),
    "modalities": (["text"],),
    "previous_response_id": (),
    "prompt": (),
    "prompt_logprobs": (),
    "regex": (),
    "stop_token_ids": (),
    "store": (False,),
    "structural_tag": (),
    "suffix": (),
    "tool_calls": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "use_beam_search": (False,),
    "web_search_options": (),
    "whitespace_pattern": (),
}
# Clients that want JSON often ask for it by a tool, and their users never wrote that word.
_NO_TOOLS = "It calls no tools: leave them out, and ask for JSON with response_format."
INSTEAD = dict.fromkeys(("functions", "function_call", "tools", "tool_choice"), _NO_TOOLS)
# What only describes: the request, its sender or, in an answer that is sent back, where it is from.
DESCRIPTIVE = frozenset({
    "annotations", "cache_control", "detail", "id", "include_obfuscation", "metadata", "name",
    "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "reasoning",
    "reasoning_content", "refusal", "safety_identifier", "service_tier", "status", "user",
    "verbosity",
})  # fmt: skip
_MAX_TOLD, _MAX_NAME = 16, 64


class Asked(BaseModel):
    """An object in a request. Unknown fields that start no feature are ignored, and named."""

    model_config = ConfigDict(
        extra="forbid",  # What is left then is a feature.
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        json_schema_extra={"additionalProperties": True},
    )

    @model_validator(mode="before")
    @classmethod
    def _without_absent(cls, given: Any, info: ValidationInfo) -> Any:
        """Leave out what asks for nothing; `context` is the set of names that were ignored."""
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
def _known(kind: type[Asked]) -> frozenset[str]:
    """The fields of such an object, as they are written in JSON."""
    return frozenset(field.alias or name for name, field in kind.model_fields.items())
