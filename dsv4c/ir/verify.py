"""What every graph between two passes must satisfy, one rule and one message each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dsv4c.errors import GraphError
from dsv4c.ir.graph import Graph, Kind, Value
from dsv4c.ir.op import OPS

Rule = Callable[[Graph], Iterator[str]]


def names_are_unique(graph: Graph) -> Iterator[str]:
    seen: set[str] = set()
    for value in graph.values():
        if value.name in seen:
            yield f"%{value.name} is defined twice"
        seen.add(value.name)


def operands_are_defined_before_use(graph: Graph) -> Iterator[str]:
    defined: set[Value] = {*graph.inputs, *graph.states, *graph.params}
    for node in graph.nodes:
        for value in node.inputs:
            if value not in defined:
                yield f"{node.name}: operand %{value.name} is not defined before it"
        defined.update(node.outputs)
    for name, value in graph.outputs.items():
        if value not in defined:
            yield f"output {name}: %{value.name} is not defined"


def ops_are_declared(graph: Graph) -> Iterator[str]:
    for node in graph.nodes:
        if OPS.get(node.op.name) is not type(node.op):
            yield f"{node.name}: op {node.op.name!r} is not declared"


def types_follow_the_rules(graph: Graph) -> Iterator[str]:
    for node in graph.nodes:
        try:
            wanted = node.op.results(tuple(v.type for v in node.inputs))
        except GraphError as error:
            yield f"{node.name}: {node.op.name}: {error}"
            continue
        found = tuple(v.type for v in node.outputs)
        if wanted != found:
            given = ", ".join(map(str, found))
            yield f"{node.name}: {node.op.name} gives {', '.join(map(str, wanted))}, the graph says {given}"


def writes_go_to_state(graph: Graph) -> Iterator[str]:
    for node in graph.nodes:
        for operand in node.op.alias.values():
            target = node.inputs[operand]
            if target not in graph.root_of:
                kind = target.kind.value
                yield f"{node.name}: {node.op.name} overwrites %{target.name}, a {kind}, not a state"


def overwritten_values_are_not_read(graph: Graph) -> Iterator[str]:
    writer: dict[Value, str] = {}
    for node in graph.nodes:
        for value in node.inputs:
            if value in writer:
                yield f"{node.name}: reads %{value.name} after {writer[value]} overwrote it"
        for operand in node.op.alias.values():
            writer[node.inputs[operand]] = node.name
    for name, value in graph.outputs.items():
        if value in writer:
            yield f"output {name}: %{value.name} was overwritten by {writer[value]}"


def an_aliased_operand_is_read_once(graph: Graph) -> Iterator[str]:
    for node in graph.nodes:
        for operand in node.op.alias.values():
            if node.inputs.count(node.inputs[operand]) > 1:
                yield f"{node.name}: %{node.inputs[operand].name} is overwritten and also another operand"


def aliases_keep_their_type(graph: Graph) -> Iterator[str]:
    for node in graph.nodes:
        for result, operand in node.op.alias.items():
            if node.outputs[result].type != node.inputs[operand].type:
                yield (
                    f"{node.name}: overwrites %{node.inputs[operand].name}: {node.inputs[operand].type} "
                    f"with {node.outputs[result].type}"
                )


def declared_values_are_used(graph: Graph) -> Iterator[str]:
    used = {v for node in graph.nodes for v in node.inputs} | set(graph.outputs.values())
    for value in (*graph.states, *graph.params):
        if value not in used:
            yield f"{value.kind.value} %{value.name} is never used"


def kinds_match_their_lists(graph: Graph) -> Iterator[str]:
    for values, kind in ((graph.inputs, Kind.INPUT), (graph.states, Kind.STATE), (graph.params, Kind.PARAM)):
        for value in values:
            if value.kind is not kind or value.node is not None:
                yield f"%{value.name} is listed as {kind.value} but is a {value.kind.value}"


RULES: tuple[Rule, ...] = (
    kinds_match_their_lists,
    names_are_unique,
    operands_are_defined_before_use,
    ops_are_declared,
    types_follow_the_rules,
    writes_go_to_state,
    aliases_keep_their_type,
    an_aliased_operand_is_read_once,
    overwritten_values_are_not_read,
    declared_values_are_used,
)


def verify(graph: Graph) -> Graph:
    """`graph` itself when every rule holds. Raises GraphError with what breaks the first broken rule."""
    for rule in RULES:
        broken = list(rule(graph))
        if broken:
            shown = "\n  ".join(broken[:10])
            more = f"\n  and {len(broken) - 10} more" if len(broken) > 10 else ""
            raise GraphError(
                f"graph {graph.name}: {rule.__name__.replace('_', ' ')} does not hold:\n  {shown}{more}"
            )
    return graph
