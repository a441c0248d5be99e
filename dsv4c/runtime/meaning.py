"""What the launches of a CPU plan compute: ops by their meaning, fused ones by the bodies in the plan.

The one module of the runtime that knows ops.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from dsv4c.errors import PlanError
from dsv4c.ir.op import OPS
from dsv4c.ir.text import make_op, parse_graph
from dsv4c.plan.folder import Plan
from dsv4c.plan.records import BodyCode, Launch
from dsv4c.reference import interpret, run


def meaning_of(plan: Plan, launch: Launch) -> Callable[..., Any]:
    """What a launch computes, as a function of its operands. Raises PlanError for one that has a kernel."""
    if not isinstance(launch.code, BodyCode):
        raise PlanError(
            f"plan {plan.name}: launch {launch.name} has a kernel, expected a body; compile it again"
        )
    if launch.code.body:
        return _body(plan.files[launch.code.body])
    op = make_op(launch.op, launch.code.attributes)
    return lambda *operands: run(op, *operands)


def joins_ranks(launch: Launch) -> bool:
    """Does a launch take the operands of all ranks, rank after rank?"""
    return launch.op in OPS and OPS[launch.op].collective


@cache
def _body(text: bytes) -> Callable[..., Any]:
    """A fused op, interpreted: its body's inputs are the operands, its outputs the results, in order."""
    graph = parse_graph(text.decode())
    names = [v.name for v in graph.inputs]
    return lambda *operands: tuple(interpret(graph, dict(zip(names, operands, strict=True)), {}, {}).values())
