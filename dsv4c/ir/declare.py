"""Declaring a fused op: `@fused` checks the body, then registers the class as an op.

The body is drawn once for every shape that its operands and fields give it. What the matcher could not find
later, or would find wrongly, is refused here, where the author sees it.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

from dsv4c.errors import GraphError
from dsv4c.ir.fused import (
    OPERANDS,
    SEEN,
    Fused,
    Pattern,
    Seen,
    alias_of_trace,
    body_parameters,
    draw,
    operand_counts,
    operand_labels,
    optional_fields,
    own_fields,
)
from dsv4c.ir.graph import Value
from dsv4c.ir.holes import UNKNOWN, Hole, Needs, holes_in
from dsv4c.ir.op import expect, register, snake_case
from dsv4c.types import parse_type

F = TypeVar("F", bound=type[Fused])


@typing.dataclass_transform(frozen_default=True)
def fused(cls: F) -> F:
    """Declare a fused op: freezes the dataclass, names it after the class, checks its body, registers it.

    Raises GraphError when an attribute of an op in the body is a constant that `literals` does not name, when
    a field reaches no attribute and nothing proposes it, or when the body falls into unconnected parts.
    """
    made: Any = dataclass(frozen=True)(cls)
    if "name" not in cls.__dict__:
        made.name = snake_case(cls.__name__)
    check(made)
    register(made)
    return made  # type: ignore[no-any-return]


def proposes(op: type[Fused]) -> bool:
    return op.propose.__func__ is not Fused.propose.__func__  # type: ignore[attr-defined]


def check(op: type[Fused]) -> None:
    """The registration check of `fused`, over every shape that operands and fields give the body."""
    expect(hasattr(op, "body"), f"{op.name} declares no body")
    counts = operand_counts(op)
    expect(
        not proposes(op) or op.anchor is not None, f"{op.name} proposes fields; say at which op in `anchor`"
    )
    expect(bool(counts) or proposes(op), f"{op.name} has a variadic body; propose the number of operands")
    optional = optional_fields(op)
    reached: set[str] = set()
    seen = SEEN.setdefault(op, Seen())
    shapes = product(counts or (_example_count(op),), product((False, True), repeat=len(optional)))
    for count, absent in shapes:
        without = {name for name, gone in zip(optional, absent, strict=True) if gone}
        for pattern in _draw_example(op, count, without):
            _check_literals(op, pattern, without)
            _check_connected(op, pattern)
            alias = alias_of_trace(pattern.operands, pattern.nodes, pattern.results)
            seen.results.add(len(pattern.results))
            seen.aliases += [alias] if alias not in seen.aliases else []
            for node in pattern.nodes:
                for attribute in node.op.attributes().values():
                    reached |= {h.hole_field for h in holes_in(attribute)}
    for f in own_fields(op):
        expect(
            f.name in reached or proposes(op) or f.type in (bool, "bool"),
            f"{op.name}: the field {f.name} reaches no attribute of the body, so no match can capture it; "
            f"pass it to an op or propose it",
        )


def _example_count(op: type[Fused]) -> int:
    least = sum(p.kind is not p.VAR_POSITIONAL for p in body_parameters(op))
    return int(op.example.get(OPERANDS, least + 2))


def _draw_example(op: type[Fused], count: int, without: set[str]) -> Iterator[Pattern]:
    example = {k: parse_type(v) if isinstance(v, str) and "[" in v else v for k, v in op.example.items()}
    attributes: dict[str, Any] = {}
    for f in own_fields(op):
        unknown = 2 if f.type in (int, "int") and proposes(op) else UNKNOWN
        known = example.get(f.name, unknown)
        attributes[f.name] = None if f.name in without else Hole(f"self.{f.name}", field=f.name, known=known)
    operands = {
        n: Hole(f"{n}.type", known=example.get(n, UNKNOWN), type_=True) for n in operand_labels(op, count)
    }
    try:
        yield from draw(op, attributes, operands, plain=False)
    except Needs as signal:
        raise GraphError(
            f"{op.name}: the body depends on the number {signal.hole.hole_text}; give it (or the type of "
            f"the operand) in `example`, so that the body can be checked here"
        ) from None


def _check_literals(op: type[Fused], pattern: Pattern, without: set[str]) -> None:
    for node in pattern.nodes:
        for name, value in node.op.attributes().items():
            if any(True for _ in holes_in(value)) or f"{node.op.name}.{name}" in op.literals:
                continue
            if value is None and without:  # an absent field, passed on
                continue
            raise GraphError(
                f"{op.name}: {node.op.name}.{name} is {value} in the body: capture it in a field, derive it "
                f"from an operand's type, or, if no other value may match, name it in `literals` as "
                f'"{node.op.name}.{name}"'
            )


def _check_connected(op: type[Fused], pattern: Pattern) -> None:
    expect(bool(pattern.nodes), f"{op.name} has an empty body")
    group = {v: v for v in pattern.operands}

    def find(value: Value) -> Value:
        while group[value] is not value:
            value = group[value]
        return value

    for node in pattern.nodes:
        group.update({v: v for v in node.outputs})
        for value in (*node.inputs, *node.outputs):
            group[find(value)] = find(node.outputs[0])
    unread = [v.name for v in pattern.operands if not any(v in node.inputs for node in pattern.nodes)]
    expect(not unread, f"{op.name}: the body never reads {', '.join(unread)}")
    near = [v for v in pattern.operands if v.name not in op.apart]
    for value in pattern.operands:
        if value.name in op.apart:
            group[find(value)] = find(near[0])
    expect(
        len({find(v) for v in group}) == 1,
        f"{op.name}: the body falls into parts that share no value; propose one's operands, see `apart`",
    )
