"""Code of the CPU target: ops by name, fused ones with their bodies spelled out in primitives."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from hashlib import sha256

from dsv4c.codegen.lower import Operand, Part
from dsv4c.ir.fused import Fused, trace
from dsv4c.ir.graph import Graph, Node
from dsv4c.ir.text import print_attribute, print_graph
from dsv4c.passes.expand import expand
from dsv4c.passes.schedule import Group
from dsv4c.plan.records import BodyCode
from dsv4c.types import Type


class Bodies:
    """A `Coder` that takes every node, each as a launch of its own. `files` are the bodies, equal ones in one
    file: a plan runs without the source of its fused ops.
    """

    groups: Sequence[Group] = ()

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self._names: dict[tuple[Fused, tuple[Type, ...]], str] = {}

    def code(
        self, graph: Graph, nodes: Sequence[Node], plain: frozenset[str] = frozenset()
    ) -> tuple[Part, ...]:
        (node,) = nodes
        fields = node.op.attributes()
        attributes = ", ".join(f"{key}={print_attribute(value)}" for key, value in fields.items())
        operands = [Operand(c.name, "r", v) for v in node.inputs for c in v.type.components]
        results = [Operand(c.name, "w", v) for v in node.outputs for c in v.type.components]
        return (Part(BodyCode(attributes, self._file(node)), (*operands, *results)),)

    def keep(self, kernels: Collection[str]) -> None:
        """There are none."""

    def _file(self, node: Node) -> str:
        """Name of the file with the body of a fused node: its operands as inputs, its results in order."""
        if not isinstance(node.op, Fused):
            return ""
        key = node.op, tuple(v.type for v in node.inputs)
        if key not in self._names:
            text = body_text(*key)
            name = f"bodies/{node.op.name}-{sha256(text.encode()).hexdigest()[:12]}.txt"
            self.files[name] = text.encode()
            self._names[key] = name
        return self._names[key]


def body_text(op: Fused, types: tuple[Type, ...]) -> str:
    """A fused op on operands of these types as a graph of primitives."""
    body = trace(op, types)
    kept = {str(i): v for i, v in enumerate(op.kept(body.results))}
    graph = body.graph
    return print_graph(expand(Graph(graph.name, graph.inputs, (), (), graph.nodes, kept)))
