"""Plain interpretation of a graph: every op by its meaning, in source order, on fresh tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from dsv4c.errors import GraphError
from dsv4c.ir.fused import Fused, trace
from dsv4c.ir.graph import Graph, Node
from dsv4c.ir.graph import Value as Variable
from dsv4c.ir.op import Op
from dsv4c.numerics.codec import Quantized, Value, parts_of, type_of
from dsv4c.reference.registry import MEANINGS, Result
from dsv4c.types import DType, TensorType, Type

Watch = Callable[[str, Value], None] | Collection[str]


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
    body = trace(op, tuple(type_of(value) for value in operands))
    given = {variable.name: value for variable, value in zip(body.graph.inputs, operands, strict=True)}
    results = op.kept(tuple(interpret(body.graph, given, {}, {}).values()))
    return results[0] if len(results) == 1 else results


def interpret(
    graph: Graph,
    inputs: Mapping[str, Value],
    states: Mapping[str, Value],
    params: Mapping[str, Value],
    *,
    watch: Watch = (),
) -> dict[str, Value]:
    """Evaluate `graph` and return its outputs by their labels. States are written in place.

    `watch` is a set of names of results, which are returned under those names as well, or a function that is
    called with every result's name and value. Raises GraphError for a value that is missing or not of its
    type, and for an op that returns something else than its type rule says.
    """
    names = () if callable(watch) else watch
    unknown = [name for name in names if name not in graph.by_name]
    if unknown:
        raise GraphError(f"graph {graph.name} has no value %{unknown[0]} to watch")
    values: dict[Variable, Value] = {}
    for variables, given in ((graph.inputs, inputs), (graph.states, states), (graph.params, params)):
        for variable in variables:
            values[variable] = checked(variable, given)
    result: dict[str, Value] = {n: v for n in names if (v := values.get(graph.by_name[n])) is not None}
    left = {value: len(users) for value, users in graph.users.items()}
    for variable in graph.outputs.values():
        left[variable] += 1
    for node in graph.nodes:
        for variable, made in zip(node.outputs, apply(node, [values[v] for v in node.inputs]), strict=True):
            values[variable] = made
            if callable(watch):
                watch(variable.name, made)
            elif variable.name in names:
                result[variable.name] = clone(made)  # a state may be overwritten later
        for variable in dict.fromkeys(node.inputs):
            left[variable] -= 1
            if not left[variable]:
                del values[variable]
    return result | {label: values[variable] for label, variable in graph.outputs.items()}


def checked(variable: Variable, given: Mapping[str, Value]) -> Value:
    """What is given for an input, a state or a param. Raises GraphError for nothing, or another type."""
    if variable.name not in given:
        raise GraphError(f"{variable.kind.value} %{variable.name}: {variable.type} is not given")
    value = given[variable.name]
    if not is_of(value, variable.type):
        raise GraphError(
            f"{variable.kind.value} %{variable.name} is {type_of(value)}, expected {variable.type}"
        )
    return value


def apply(node: Node, operands: Sequence[Value]) -> tuple[Value, ...]:
    """A node's results of these operands, of the types that its rule says. Raises GraphError."""
    result = run(node.op, *operands)
    results: tuple[Value, ...] = result if type(result) is tuple else (result,)  # type: ignore[assignment]
    found = []
    for index, (variable, value) in enumerate(zip(node.outputs, results, strict=True)):
        if not is_of(value, variable.type):
            raise GraphError(
                f"{node.name}: {node.op.name} returned {type_of(value)}, its type rule says {variable.type}"
            )
        shared = index not in node.op.alias and any(_same_bytes(value, operand) for operand in operands)
        found.append(clone(value) if shared else value)
    return tuple(found)


def is_of(value: Value, type_: Type) -> bool:
    """Is `value` of that type? Exponents (ue8m0) and bytes are the same to torch."""
    found = type_of(value)
    if isinstance(type_, TensorType) and type_.dtype is DType.UE8M0:
        return found == TensorType(DType.U8, type_.shape)
    return found == type_


def clone(value: Value) -> Value:
    return value.map(torch.clone) if isinstance(value, Quantized) else value.clone()


def _same_bytes(value: Value, other: Value) -> bool:
    """Does a result share storage with an operand? Then a later write to a state would change it."""
    return bool(_storages(value) & _storages(other))


def _storages(value: Value) -> set[int]:
    return {part.untyped_storage().data_ptr() for part in parts_of(value).values()}
