"""The table from ops to their meanings, which mirror `dsv4c.ir.ops` file for file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from dsv4c.errors import GraphError
from dsv4c.ir.op import Op
from dsv4c.numerics.codec import Value

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
