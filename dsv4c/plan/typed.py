"""Checks records against their annotations, so that data from a file is what its readers expect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dsv4c.errors import PlanError
from dsv4c.types import QuantType, TensorType

MOST = 1 << 60
"""Largest size, offset or count that a record may name; sums of a few of them stay 64-bit numbers."""


def require_types(record: Any, name: str) -> None:
    """Raise PlanError, naming the field, unless all fields of `record` and of those in it have their types.

    Integers are counts: from -1, for none, to `MOST`.
    """
    _require(record, type(record), (name,))


Place = tuple[Any, ...]
"""Where a value is: the place that it is in, and how it is called there; spelled out for errors alone."""


def _spelled(place: Place) -> str:
    if len(place) == 1:
        return str(place[0])
    inside, form, name = place
    return str(form).format(_spelled(inside), str(name)[:80])


def _require(value: Any, hint: Any, where: Place) -> None:
    origin, inner, record = _form(hint)
    if hint is Any or (isinstance(value, TensorType | QuantType) and hint in (TensorType, QuantType)):
        return
    if origin in (Union, UnionType):
        kinds = [kind for kind in inner if isinstance(value, get_origin(kind) or kind)]
        if not kinds:
            raise _wrong(value, hint, where)
        _require(value, kinds[0], where)
    elif origin is Literal:
        if value not in inner:
            raise _wrong(value, " or ".join(map(repr, inner)), where)
    elif origin is tuple:
        _require_tuple(value, inner, where)
    elif origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(value, "an object", where)
        for key, item in value.items():
            _require(key, inner[0], (where, "a key of {0}", key))
            _require(item, inner[1], (where, "{0}.{1}", key))
    elif record:
        if not isinstance(value, hint):
            raise _wrong(value, getattr(hint, "__name__", hint), where)
        for field, kind in _hints(hint):
            _require(getattr(value, field), kind, (where, "{0}.{1}", field))
    elif hint is int:
        if type(value) is not int or not -1 <= value <= MOST:
            raise _wrong(value, "a count", where)
    elif hint is float:
        if type(value) not in (int, float):
            raise _wrong(value, "a number", where)
    elif not isinstance(value, hint):
        raise _wrong(value, hint.__name__, where)


def _require_tuple(value: Any, inner: tuple[Any, ...], where: Place) -> None:
    repeated = len(inner) == 2 and inner[1] is Ellipsis
    if not isinstance(value, tuple) or not (repeated or len(value) == len(inner)):
        raise _wrong(value, "a list" if repeated else f"a list of {len(inner)}", where)
    for number, item in enumerate(value):
        _require(item, inner[0] if repeated else inner[number], (where, "{0}[{1}]", number))


@cache
def _form(hint: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """What a generic type is of, its arguments, and whether it is a dataclass."""
    return get_origin(hint), get_args(hint), is_dataclass(hint)


@cache
def _hints(record: type) -> list[tuple[str, Any]]:
    hints = get_type_hints(record)
    return [(field.name, hints[field.name]) for field in fields(record)]


def _wrong(value: Any, wanted: object, where: Place) -> PlanError:
    found = f"{type(value).__name__} {value!r}"
    return PlanError(f"{_spelled(where)} is {found[:100]}; expected {wanted}")
