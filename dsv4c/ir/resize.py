"""One graph for other calls: more sequences, or more tokens of each, and everything else as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dsv4c.ir.graph import Builder, Graph, Value
from dsv4c.ir.op import Op
from dsv4c.types import Type


def resized(graph: Graph, name: str, inputs: Mapping[str, Type], tokens: int) -> Graph:
    """`graph` as `name`, with its inputs of these types and `tokens` tokens of each sequence per call.

    Nodes keep their names; ops change only where they count those tokens (`Op.per_call`) or have room for
    them (`Op.room`). States and params keep their types. Raises GraphError where a type rule does not hold
    for the new shapes.
    """
    builder = Builder(name)
    values: dict[Value, Value] = {v: builder.input(v.name, inputs[v.name]) for v in graph.inputs}
    values |= {v: builder.state(v.name, v.type) for v in graph.states}
    values |= {v: builder.param(v.name, v.type) for v in graph.params}
    for node in graph.nodes:
        operands = tuple(values[v] for v in node.inputs)
        names = [v.name for v in node.outputs]
        made = builder.emit(
            _counting(node.op, tokens), operands, names=names, scope=node.scope, origin=node.origin
        )
        values.update(zip(node.outputs, made, strict=True))
    return builder.finish({label: values[v] for label, v in graph.outputs.items()})


def _counting(op: Op, tokens: int) -> Op:
    """The op for calls of so many tokens; 0 stays, for an op that does not count them where it stands."""
    if not op.per_call or not getattr(op, op.per_call):
        return op
    changed = {op.per_call: tokens}
    if op.room and getattr(op, op.room):
        changed[op.room] = getattr(op, op.room) + tokens - getattr(op, op.per_call)
    return replace(op, **changed)  # type: ignore[type-var]
