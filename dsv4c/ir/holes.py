"""Holes: what stands in a traced body for everything the trace does not know.

A body is ordinary code, so a hole is computed with, stored in attributes and branched on like the value it
stands for. What was computed from it is a hole again; a branch goes the way that the trace's `Script` says.
"""

from __future__ import annotations

import operator
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

from dsv4c.types import BF16, F32, QuantType, TensorType


class Needs(Exception):  # noqa: N818  (a signal of the tracer, not an error)
    """The trace cannot go on without the value of a hole."""

    def __init__(self, hole: Hole) -> None:
        super().__init__(hole.hole_text)
        self.hole = hole


class Script:
    """The decisions of one trace: answers given before, then the first alternative of each new question."""

    def __init__(self, answers: Sequence[tuple[Any, ...]], plain: bool) -> None:
        self.given = list(answers)  # per question: the answer, then the alternatives not tried yet
        self.plain = plain  # hand out bare element types, rather than holes that know them
        self.asked: dict[str, Any] = {}

    def ask(self, question: str, alternatives: tuple[Any, ...]) -> Any:
        if question not in self.asked:
            place = len(self.asked)
            if place == len(self.given):
                self.given.append(alternatives)
            self.asked[question] = self.given[place][0]
        return self.asked[question]

    def next(self) -> list[tuple[Any, ...]] | None:
        """The answers of the following trace, or None after the last."""
        rest = self.given[: len(self.asked)]
        while rest and len(rest[-1]) == 1:
            rest.pop()
        return [*rest[:-1], rest[-1][1:]] if rest else None


_script: ContextVar[Script] = ContextVar("script")


@contextmanager
def answered_by(script: Script) -> Iterator[None]:
    """Decisions inside that depend on a hole are asked of `script`."""
    token = _script.set(script)
    try:
        yield
    finally:
        _script.reset(token)


UNKNOWN = object()
"""What a hole knows that knows nothing."""


class Hole:
    """Something a trace does not know: a field, a type, or what is computed from them.

    It may be stored as an attribute and computed with. A decision by its truth, its length, its class or a
    comparison asks the script; one by its number raises Needs. Decisions about a `known` value go by that.
    """

    __slots__ = ("hole_field", "hole_known", "hole_text", "hole_type")

    def __init__(self, text: str, *, field: str = "", known: Any = UNKNOWN, type_: bool = False) -> None:
        self.hole_text, self.hole_field, self.hole_known, self.hole_type = text, field, known, type_

    def __repr__(self) -> str:
        return f"<{self.hole_text}>"

    @property
    def hole_open(self) -> bool:
        return self.hole_known is UNKNOWN

    def _number(self) -> Any:
        if self.hole_open:
            raise Needs(self)
        return self.hole_known

    def _derive(self, text: str, function: Callable[..., Any], *others: Any) -> Hole:
        given = [self, *others]
        if any(is_hole(v) and v.hole_open for v in given):
            return Hole(text)
        return Hole(text, known=function(*(v.hole_known if is_hole(v) else v for v in given)))

    @property
    def __class__(self) -> type:  # isinstance(x.type, QuantType) is a decision
        if not self.hole_open:
            return type(self.hole_known)
        if not self.hole_type:
            raise Needs(self)
        return _script.get().ask(f"type({self.hole_text})", (TensorType, QuantType))  # type: ignore[no-any-return]

    @__class__.setter
    def __class__(self, _: type) -> NoReturn:
        raise TypeError("a hole keeps its class")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        text = f"{self.hole_text}.{name}"
        if self.hole_type and name == "dtype" and self.hole_open:
            answer = _script.get().ask(text, (BF16, F32))
            return answer if _script.get().plain else Hole(text, known=answer)
        return self._derive(text, lambda v: getattr(v, name))

    def __getitem__(self, key: Any) -> Hole:
        return self._derive(f"{self.hole_text}[{key}]", operator.getitem, key)

    def __call__(self, *arguments: Any, **named: Any) -> Hole:
        return self._derive(f"{self.hole_text}(...)", lambda f, *a: f(*a, **named), *arguments)

    def __len__(self) -> int:
        if self.hole_open:
            return int(_script.get().ask(f"len({self.hole_text})", (3, 2, 1, 4)))
        return len(self.hole_known)

    def __iter__(self) -> Iterator[Hole]:
        return iter([self[i] for i in range(len(self))])

    def __bool__(self) -> bool:
        if self.hole_open:
            return bool(_script.get().ask(self.hole_text, (True, False)))
        return bool(self.hole_known)

    def __index__(self) -> int:
        return operator.index(self._number())

    def __int__(self) -> int:
        return int(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def __hash__(self) -> int:
        return hash(self._number())

    def __neg__(self) -> Hole:
        return self._derive(f"-{self.hole_text}", operator.neg)


def _operator(name: str, reflected: bool) -> Callable[[Hole, Any], Hole]:
    function = getattr(operator, name)

    def apply(self: Hole, other: Any) -> Hole:
        given = (lambda a, b: function(b, a)) if reflected else function
        return self._derive(f"({self.hole_text} {name} {other})", given, other)

    return apply


def _comparison(name: str) -> Callable[[Hole, object], bool]:
    function = getattr(operator, name)

    def compare(self: Hole, other: object) -> bool:
        return bool(self._derive(f"({self.hole_text} {name} {other})", function, other))

    return compare


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(Hole, f"__{_name}__", _operator(_name, False))
    setattr(Hole, f"__r{_name}__", _operator(_name, True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Hole, f"__{_name}__", _comparison(_name))


def is_hole(value: Any) -> typing.TypeGuard[Hole]:
    return type(value) is Hole


def holes_in(value: Any) -> Iterator[Hole]:
    """Holes in an attribute, inside tuples too."""
    if is_hole(value):
        yield value
    elif type(value) is tuple:
        for part in value:
            yield from holes_in(part)


def filled(value: Any) -> Any:
    """An attribute with its holes replaced by their known values."""
    if is_hole(value):
        return value.hole_known
    return tuple(map(filled, value)) if type(value) is tuple else value
