"""Objects of a JSON schema that have the properties which it lists, and no others.

Owns   the rule for which objects are closed.
Takes  a schema as it was given; gives one that says additionalProperties: false where nothing else
       is said. A model that may add properties of its own seldom comes to an end.
Never  closes an object that says itself what else it may have, nor any of a schema that combines.
"""

from __future__ import annotations

from typing import Any

_ONE = {"items", "additionalProperties"}
_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
_BY_NAME = {"properties", "patternProperties", "$defs", "definitions"}
_SAYS_WHAT_ELSE = {"additionalProperties", "unevaluatedProperties", "patternProperties"}
# What a property is may be said in several places: closed, none of them would know the others'.
_COMBINES = {"properties", "anyOf", "oneOf", "allOf", "$ref"}


class _CombinedError(Exception):
    """Several schemas say together what one object is."""


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its objects closed; itself where any part of it combines several."""
    try:
        return dict(_closed(schema))
    except _CombinedError:
        return schema


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    several = schema.get("allOf")
    if len(_COMBINES & schema.keys()) > 1 or (isinstance(several, list) and len(several) > 1):
        raise _CombinedError
    own = {name: _closed_within(name, value) for name, value in schema.items()}
    return own | {"additionalProperties": False} if _lists_all(schema) else own


def _closed_within(name: str, value: Any) -> Any:
    """What stands under a keyword, where that is one or several schemas."""
    if name in _ONE:
        return _closed(value)
    if name in _LISTS and isinstance(value, list):
        return [_closed(each) for each in value]
    if name in _BY_NAME and isinstance(value, dict):
        return {key: _closed(each) for key, each in value.items()}
    return value


def _lists_all(schema: dict[str, Any]) -> bool:
    listed, required = schema.get("properties"), schema.get("required")
    is_said = bool(_SAYS_WHAT_ELSE & schema.keys())
    needed = required if isinstance(required, list) else []
    return isinstance(listed, dict) and not is_said and all(name in listed for name in needed)
