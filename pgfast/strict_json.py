"""JSON to dataclasses, strictly: the annotations are the schema."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar


def refuse_constant(name: str) -> None:
    """For `json.loads(parse_constant=...)`: NaN and Infinity are no JSON."""
    raise ValueError(f"{name} is not a JSON number")


T = TypeVar("T")
MOST_KEY = 300
"""Characters of a key; names of files and tensors are shorter."""


def parse(kind: type[T], value: Any) -> T:
    """Build a dataclass from parsed JSON: no missing or unknown keys, no conversions.

    Args:
        kind: A dataclass of plain types, lists, dicts, optional values and other such dataclasses.
        value: What `json.loads` returned.

    Raises:
        ValueError: The message says where and what.
    """
    return _value(kind, value, "")


def _value(kind: type[T], value: Any, where: str) -> T:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return typing.cast(T, _dataclass(kind, value, where))
    if origin is types.UnionType:
        if value is None:
            return typing.cast(T, None)
        return typing.cast(T, _value(args[0], value, where))
    if origin is dict and isinstance(value, dict):
        for key in value:
            if not key.isprintable() or len(key) > MOST_KEY:  # keys are parts of messages
                raise ValueError(f"{where.lstrip('.')} has the unusable key {key!r:.100}")
        return typing.cast(T, {key: _value(args[1], item, f"{where}.{key}") for key, item in value.items()})
    if origin is list and isinstance(value, list):
        return typing.cast(T, [_value(args[0], item, where) for item in value])
    if kind is Any:
        return typing.cast(T, value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        return typing.cast(T, float(value))
    if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(f"{where.lstrip('.')} holds half a character")
    if origin is None and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where.lstrip('.')} is not a {getattr(kind, '__name__', kind)}")


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where.lstrip('.')} is not an object")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(value) - set(fields)):
        raise ValueError(f"{where.lstrip('.') or 'the manifest'} has the unknown key {unknown[0]!r:.100}")
    required = {name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - set(value)):
        raise ValueError(f"{'.'.join([*where.lstrip('.').split('.'), missing[0]]).lstrip('.')} is missing")
    return kind(**{name: _value(hints[name], item, f"{where}.{name}") for name, item in value.items()})
