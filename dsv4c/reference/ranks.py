"""A sharded graph, interpreted for all of its ranks together: what they mean, without kernels or memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dsv4c.errors import GraphError
from dsv4c.ir.graph import Graph
from dsv4c.ir.graph import Value as Variable
from dsv4c.numerics.codec import Value
from dsv4c.reference.interpret import apply, checked, clone


def interpret_ranks(
    graph: Graph,
    inputs: Mapping[str, Value],
    states: Sequence[Mapping[str, Value]],
    params: Sequence[Mapping[str, Value]],
) -> list[dict[str, Value]]:
    """Every rank's outputs by label. Inputs are alike on all; states (written in place) and params by rank.

    Raises GraphError as `interpret` does.
    """
    if len(states) != len(params):
        raise GraphError(f"graph {graph.name}: states of {len(states)} ranks, params of {len(params)}")
    values: list[dict[Variable, Value]] = []
    for state, param in zip(states, params, strict=True):
        groups = ((graph.inputs, inputs), (graph.states, state), (graph.params, param))
        values.append({v: checked(v, known) for variables, known in groups for v in variables})
    for node in graph.nodes:
        if node.op.collective:
            operands = [own[v] for own in values for v in node.inputs]
            made = apply(node, operands)
            for own in values:  # a rank's result is its own
                own.update(zip(node.outputs, map(clone, made), strict=True))
        else:
            for own in values:
                made = apply(node, [own[v] for v in node.inputs])
                own.update(zip(node.outputs, made, strict=True))
    return [{label: own[v] for label, v in graph.outputs.items()} for own in values]
