"""One model over several ranks: every weight cut or whole, and exchanges where whole values are wanted.

All ranks run the same graph, each on its own part of the weights. Two exchanges a layer: attention's output
and that of the experts are sums. What a layer projects its row to first, keys and hyper-connections are the
same on all ranks, which compute them alike. Logits are gathered.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from dsv4c.errors import GraphError
from dsv4c.exchange import MOST_RANKS
from dsv4c.ir.graph import Builder, Graph, Kind, Node, Value
from dsv4c.ir.op import Op
from dsv4c.ir.ops.collective import AllGather, AllReduce
from dsv4c.ir.ops.math import Cast
from dsv4c.ir.ops.shape import Reshape
from dsv4c.passes.placement import (
    PARTIAL,
    REPLICATED,
    MismatchError,
    Placement,
    cut,
    operand_name,
    reshaped_axis,
    results_of,
)
from dsv4c.types import F32, DType, QuantType, TensorType, Type

CUTS: tuple[tuple[str, int], ...] = (
    ("*.attn.wq_b", 0),  # heads
    ("*.attn.attn_sink", 0),
    ("*.attn.wo_a", 0),  # groups of heads
    ("*.attn.wo_b", 1),
    ("*.experts.w1", 1),  # of every expert: which ones a token takes does not matter
    ("*.experts.w3", 1),
    ("*.experts.w2", 2),
    ("*.shared_experts.w1", 0),
    ("*.shared_experts.w3", 0),
    ("*.shared_experts.w2", 1),
    ("head", 0),  # the vocabulary
    ("mtp.*.head", 0),
    ("*.markov_w2", 0),
)
"""Which weights are cut along which dimension, by patterns of their names; all others are whole on each rank.
What projects a layer's row first is, and the indexer's queries: they are read in less time than another
exchange takes. With `wq_a`, `wkv` and the compressors' cut by rows, a step of 20 Flash layers, on one of two
ranks, takes 1.022 times as long (H200, 2026-11-30).
"""


def placement_of(name: str) -> Placement:
    """How the model's weight of that name is placed."""
    return next((cut(axis) for pattern, axis in CUTS if fnmatchcase(name, pattern)), REPLICATED)


def local_type(name: str, type_: Type, axis: int, ranks: int) -> Type:
    """A rank's part of a weight. Raises GraphError where ranks do not divide it.

    Ranks may share a block of scales, each with a copy of its own, but a part has no pieces of several.
    """
    size = type_.shape[axis]
    part, rest = divmod(size, ranks)
    if rest or not part:
        raise GraphError(
            f"shard: %{name}: {type_}: {size} do not divide over {ranks} ranks; give a number of ranks that "
            "divides it"
        )
    if isinstance(type_, QuantType):
        from_last = len(type_.shape) - 1 - axis
        block = type_.format.block[1 - from_last] if from_last < 2 else 1
        if part % block and (from_last == 0 or block % part):
            raise GraphError(
                f"shard: %{name}: {type_}: {part} for each of {ranks} ranks are no whole blocks of {block}; "
                "give fewer ranks"
            )
    return type_.with_shape((*type_.shape[:axis], part, *type_.shape[axis + 1 :]))


def shard(graph: Graph, ranks: int) -> Graph:
    """The graph that each of so many ranks runs. Raises GraphError, naming both placements, where an operand
    cannot be what an op wants of it.
    """
    if not 2 <= ranks <= MOST_RANKS:
        raise GraphError(f"shard: {ranks} ranks, expected 2 to {MOST_RANKS}")
    return _Sharder(graph, ranks).run()


class _Sharder:
    """Node by node. What is wanted whole is exchanged where it is first read."""

    def __init__(self, graph: Graph, ranks: int) -> None:
        self.graph, self.ranks = graph, ranks
        self.builder = Builder(graph.name)
        self.own: dict[Value, Value] = {}  # what a rank has of each value
        self.whole: dict[Value, Value] = {}  # what was exchanged
        self.placed: dict[Value, Placement] = {}

    def run(self) -> Graph:
        declare = {Kind.INPUT: self.builder.input, Kind.STATE: self.builder.state}
        for value in (*self.graph.inputs, *self.graph.states):
            self._know(value, declare[value.kind](value.name, value.type), REPLICATED)
        for value in self.graph.params:
            placed, type_ = placement_of(value.name), value.type
            if placed.kind == "cut":
                type_ = local_type(value.name, type_, placed.axis, self.ranks)
            self._know(value, self.builder.param(value.name, type_), placed)
        for node in self.graph.nodes:
            if node.outputs[0] not in self.own:
                self._visit(node)
        return self.builder.finish({label: self._entire(v) for label, v in self.graph.outputs.items()})

    def _know(self, value: Value, own: Value, placed: Placement) -> None:
        self.own[value], self.placed[value] = own, placed

    def _visit(self, node: Node) -> None:
        if isinstance(node.op, Cast) and self.placed[node.inputs[0]] == PARTIAL:
            total = AllReduce(ranks=self.ranks, out=node.op.to)
            self._emit(node, total, (self.own[node.inputs[0]],), (REPLICATED,))
            return
        exchanged: set[int] = set()
        while True:
            given = tuple(REPLICATED if i in exchanged else self.placed[v] for i, v in enumerate(node.inputs))
            try:
                op, made = self._placed(node, given)
                break
            except MismatchError as error:
                value = node.inputs[error.operand]
                if error.wanted != REPLICATED or error.operand in exchanged:
                    raise GraphError(
                        f"shard: at {node.name}: {operand_name(node.op, error.operand)} %{value.name}: "
                        f"{value.type} {error}"
                    ) from None
                self._entire(value)
                exchanged.add(error.operand)
        operands = tuple(self.whole[v] if i in exchanged else self.own[v] for i, v in enumerate(node.inputs))
        self._emit(node, op, operands, made)

    def _emit(self, node: Node, op: Op, operands: tuple[Value, ...], made: tuple[Placement, ...]) -> None:
        names = [v.name for v in node.outputs]
        outputs = self.builder.emit(op, operands, names=names, scope=node.scope, origin=node.origin)
        for value, own, placed in zip(node.outputs, outputs, made, strict=True):
            self._know(value, own, placed)

    def _placed(self, node: Node, given: tuple[Placement, ...]) -> tuple[Op, tuple[Placement, ...]]:
        """The op as a rank runs it, and how its results are placed. Raises MismatchError."""
        op: Any = node.op
        if isinstance(op, Reshape):
            op = self._reshape(node, op, given[0])
        types = [
            self.own[v].type if p != REPLICATED else v.type for v, p in zip(node.inputs, given, strict=True)
        ]
        made = results_of(op, given, types)
        if PARTIAL in made and hasattr(op, "out"):
            op = replace(op, out=F32)  # rounded once, behind the sum
        return op, made * len(node.outputs) if len(made) == 1 else made

    def _reshape(self, node: Node, op: Reshape, placed: Placement) -> Reshape:
        """To the shape of a rank's part, where it is one."""
        if placed.kind != "cut":
            return op
        shape = node.outputs[0].type.shape
        axis = reshaped_axis(node.inputs[0].type.shape, shape, placed.axis)
        if axis is None or shape[axis] % self.ranks:
            raise MismatchError(0, placed, REPLICATED, f"{list(shape)} is not cut so")
        sizes = tuple(n if i != axis or n == -1 else n // self.ranks for i, n in enumerate(op.shape))
        return replace(op, shape=sizes)

    def _entire(self, value: Value) -> Value:
        """The value as all ranks have it, exchanged if need be."""
        placed = self.placed[value]
        if placed == REPLICATED:
            return self.own[value]
        if value not in self.whole:
            scope = "" if value.node is None else value.node.scope
            if placed == PARTIAL:
                op: Op = AllReduce(ranks=self.ranks, out=_dtype(value))
            else:
                op = AllGather(axis=placed.axis, ranks=self.ranks)
            names = [self.builder.fresh(f"{value.name}_{'sum' if placed == PARTIAL else 'whole'}")]
            (self.whole[value],) = self.builder.emit(op, (self.own[value],), names=names, scope=scope)
        return self.whole[value]


def _dtype(value: Value) -> DType:
    assert isinstance(value.type, TensorType)
    return value.type.dtype
