"""Objects of a JSON schema that have the properties which it lists, and no others.

Owns   the rule for which objects are closed.
Takes  a schema; gives one with additionalProperties: false in objects that do not say otherwise.
       A model that may add properties of its own seldom comes to an end.
Never  closes an object that allows further properties itself, nor any of a schema that combines.
"""

from __future__ import annotations

from typing import Any

_ONE = {"items", "additionalProperties"}
_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
_BY_NAME = {"properties", "patternProperties", "$defs", "definitions"}
_SAYS_WHAT_ELSE = {
    "additionalProperties", "unevaluatedProperties", "patternProperties", "minProperties",
}  # fmt: skip
# With one of these and more, several places list an object's properties. If closed, each would
# forbid those of the others.
_COMBINES = {"anyOf", "oneOf", "allOf", "$ref"}
_SAYS_MORE = _COMBINES | _SAYS_WHAT_ELSE | {"properties", "required"}


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
    if _is_combined(schema):
        raise _CombinedError
    own = {name: _closed_within(name, value) for name, value in schema.items()}
    return own | {"additionalProperties": False} if _lists_all(schema) else own


def _closed_within(name: str, value: Any) -> Any:
    """The value of a keyword, with its schemas closed if it holds any."""
    if name in _ONE:
        return _closed(value)
    if name in _LISTS and isinstance(value, list):
        return [_closed(each) for each in value]
    if name in _BY_NAME and isinstance(value, dict):
        return {key: _closed(each) for key, each in value.items()}
    return value


def _is_combined(schema: dict[str, Any]) -> bool:
    several = schema.get("allOf")
    if isinstance(several, list) and len(several) > 1:
        return True
    return bool(_COMBINES & schema.keys()) and len(_SAYS_MORE & schema.keys()) > 1


def _lists_all(schema: dict[str, Any]) -> bool:
    listed, required = schema.get("properties"), schema.get("required")
    if not isinstance(listed, dict) or _SAYS_WHAT_ELSE & schema.keys():
        return False
    needed = required if isinstance(required, list) else []
    return all(isinstance(name, str) and name in listed for name in needed)
