"""The table from ops to their meanings, which mirror `dsv4c.ir.ops` file for file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from dsv4c.errors import GraphError
from dsv4c.ir.fused import Fused, trace
from dsv4c.ir.op import Op
from dsv4c.numerics.codec import Value, type_of

Result = Value | tuple[Value, ...]

MEANINGS: dict[type[Op], Callable[..., Result]] = {}

F = TypeVar("F", bound=Callable[..., Any])


def meaning(op: type[Op]) -> Callable[[F], F]:
    """Make the decorated `function(op, *operands)` the meaning of `op`. Raises GraphError if it has one."""

    def declare(function: F) -> F:
        if op in MEANINGS:
            raise GraphError(f"{op.name} already means {MEANINGS[op].__qualname__}; remove one of the two")
        MEANINGS[op] = function
        return function

    return declare


def run(op: Op, *operands: Value) -> Result:
    """Evaluate one op on torch values. An op that aliases an operand writes into it and returns it.

    A fused op without a meaning of its own means its body. Raises GraphError for any other op without one.
    """
    if isinstance(op, Fused) and type(op) not in MEANINGS:
        return _run_body(op, operands)
    if type(op) not in MEANINGS:
        raise GraphError(f"{op.name} has no meaning; declare one with @meaning({type(op).__name__})")
    return MEANINGS[type(op)](op, *operands)


def _run_body(op: Fused, operands: tuple[Value, ...]) -> Result:
    from dsv4c.reference.interpret import interpret

    body = trace(op, tuple(type_of(value) for value in operands))
    given = {variable.name: value for variable, value in zip(body.graph.inputs, operands, strict=True)}
    results = op.kept(tuple(interpret(body.graph, given, {}, {}).values()))
    return results[0] if len(results) == 1 else results
