"""The form of an answer, in all the ways that requests ask for it.

Owns   the types of OpenAI's `response_format` and `text.format` and of vLLM's
       `structured_outputs`, and their translation into a setting of SamplingParams.
Takes  the parsed fields of a request; gives a setting, or a Failure if the schema is missing.
Never  compiles a schema: the model does.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field

from minigpt4_runtime.server.absent import RequestPart
from minigpt4_runtime.server.failures import Failure

Kind = Literal["text", "json_object", "json_schema"]


class JsonSchema(RequestPart):
    """A schema, with a name and a description for people."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestPart):
    """The form of the answer: any text, any JSON object, or JSON of a schema."""

    type: Kind
    json_schema: JsonSchema | None = None

    def setting(self, where: str) -> dict[str, Any]:
        """The setting of SamplingParams; `where` is this field's name in the request.

        Raises:
            Failure: the schema is missing.
        """
        schema = self.json_schema.schema_ if self.json_schema else None
        return _json_setting(self.type, schema, f"{where}.json_schema")


class TextFormat(RequestPart):
    """The same as responses have it, without an object around the schema."""

    type: Kind
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def setting(self, where: str) -> dict[str, Any]:
        """The setting of SamplingParams; `where` is this field's name in the request.

        Raises:
            Failure: the schema is missing.
        """
        return _json_setting(self.type, self.schema_, f"{where}.schema")


class StructuredOutputs(RequestPart):
    """The form of the answer as vLLM's clients ask for it: one of these."""

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None

    @property
    def settings(self) -> list[dict[str, Any]]:
        """A setting of SamplingParams for each form that is given."""
        settings: list[dict[str, Any]] = []
        if self.json_ not in (None, ""):
            settings.append({"json_schema": self.json_})
        if self.regex:
            settings.append({"regex": self.regex})
        if self.choice:
            settings.append({"regex": "|".join(map(_escape, self.choice))})
        return settings


def _json_setting(kind: Kind, schema: dict[str, Any] | None, where: str) -> dict[str, Any]:
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    if schema is None:
        raise Failure(400, f"{where} is missing.", param=where, code="missing_parameter")
    return {"json_schema": schema}


def _escape(text: str) -> str:
    """A regex that matches this text."""
    return re.sub(r"[][\\.+*?(){}|^$#&~-]", r"\\\g<0>", text)
