"""What each rank holds of a value, and one rule per op of how that passes from operands to results.

A value is replicated (the same bits everywhere), cut along a dimension (equal parts in order of the ranks),
or partial (an f32 addend of the whole on each). Types are a rank's own: of a cut value those of its part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, TypeVar

from dsv4c.errors import GraphError
from dsv4c.ir.graph import Graph, Value
from dsv4c.ir.op import Op, operand_names
from dsv4c.ir.ops.attention import AttentionScores, AttentionValues, SinkSoftmax
from dsv4c.ir.ops.collective import AllGather, AllReduce
from dsv4c.ir.ops.linear import ExpertLinear, GroupedLinear, Linear
from dsv4c.ir.ops.math import Add, Cast, Clamp, Mul, Scale, Shift, Sigmoid, Silu, SqrtSoftplus, Sum
from dsv4c.ir.ops.norm import RmsNorm
from dsv4c.ir.ops.quant import Dequantize, Quantize
from dsv4c.ir.ops.rope import Rope
from dsv4c.ir.ops.shape import Concat, Reshape, Slice
from dsv4c.types import GlobalScale, QuantFormat, QuantType, Type


@dataclass(frozen=True)
class Placement:
    """`axis` counts from the first dimension, and is 0 unless the value is cut."""

    kind: Literal["replicated", "cut", "partial"]
    axis: int = 0

    def __str__(self) -> str:
        return f"cut({self.axis})" if self.kind == "cut" else self.kind

    @property
    def conversion(self) -> str:
        """The exchange that makes it replicated."""
        return {"cut": f"all_gather {{axis={self.axis}}}", "partial": "all_reduce"}.get(self.kind, "nothing")


REPLICATED, PARTIAL = Placement("replicated"), Placement("partial")


def cut(axis: int) -> Placement:
    return Placement("cut", axis)


class MismatchError(GraphError):
    """Operand number `operand` is not placed as the op can take it."""

    def __init__(self, operand: int, found: Placement, wanted: Placement, why: str = "") -> None:
        self.operand, self.found, self.wanted, self.why = operand, found, wanted, why
        remedy = f"; insert {found.conversion}" if wanted == REPLICATED else "; cut what makes it"
        super().__init__(f"is {found}, expected {wanted}{f' ({why})' if why else ''}{remedy}")


Placements = tuple[Placement, ...]
Rule = Callable[[Any, Placements, Sequence[Type]], Placement | Placements]

RULES: dict[type[Op], Rule] = {}
"""By op; one that is not here takes replicated operands, and gives replicated results."""

R = TypeVar("R", bound=Rule)


def rule(*ops: type[Op]) -> Callable[[R], R]:
    def declare(function: R) -> R:
        for op in ops:
            if op in RULES:
                raise GraphError(f"{op.name} has a rule of placement already; remove one of the two")
            RULES[op] = function
        return function

    return declare


def results_of(op: Op, given: Placements, types: Sequence[Type]) -> Placements:
    """Placements of an op's results. Raises MismatchError for the first operand that does not fit."""
    found = RULES.get(type(op), _replicated)(op, given, types)
    return (found,) if isinstance(found, Placement) else found


def placements(graph: Graph, params: Mapping[str, Placement]) -> dict[Value, Placement]:
    """Of every value of a sharded graph, whose inputs and states are replicated, as are `params` that are not
    named. Raises GraphError naming the node and both placements where an operand does not fit.
    """
    found: dict[Value, Placement] = dict.fromkeys((*graph.inputs, *graph.states), REPLICATED)
    found |= {v: params.get(v.name, REPLICATED) for v in graph.params}
    for node in graph.nodes:
        given = tuple(found[v] for v in node.inputs)
        try:
            made = results_of(node.op, given, [v.type for v in node.inputs])
        except MismatchError as error:
            operand = node.inputs[error.operand]
            place = f"at {node.name}: {node.op.name}: %{operand.name}: {operand.type}"
            raise GraphError(f"{place} {error}") from None
        if len(made) == 1:
            made *= len(node.outputs)
        found.update(zip(node.outputs, made, strict=True))
    for label, value in graph.outputs.items():
        if found[value] != REPLICATED:
            wrong = MismatchError(0, found[value], REPLICATED)
            raise GraphError(f"output {label}: %{value.name}: {value.type} {wrong}")
    return found


def operand_name(op: Op, operand: int) -> str:
    names = operand_names(type(op))  # type: ignore[arg-type]  # mypy takes the class for an instance
    return names[min(operand, len(names) - 1)]


def _want(operand: int, found: Placement, wanted: Placement, why: str = "") -> None:
    if found != wanted:
        raise MismatchError(operand, found, wanted, why)


# --- the rules ---


def _replicated(op: Op, given: Placements, types: Sequence[Type]) -> Placement:
    for operand, placement in enumerate(given):
        _want(operand, placement, REPLICATED)
    return REPLICATED


@rule(AllReduce)
def _all_reduce(op: AllReduce, given: Placements, types: Sequence[Type]) -> Placement:
    _want(0, given[0], PARTIAL)
    return REPLICATED


@rule(AllGather)
def _all_gather(op: AllGather, given: Placements, types: Sequence[Type]) -> Placement:
    _want(0, given[0], cut(op.axis % len(types[0].shape)))
    return REPLICATED


@rule(Linear)
def _linear(op: Linear, given: Placements, types: Sequence[Type]) -> Placement:
    """Rows of the weight give columns of the result; columns take those of x and give addends."""
    x, w = given
    last = len(types[0].shape) - 1
    if w == cut(1):
        _want(0, x, cut(last), "the weight is cut along what they share")
        return PARTIAL
    _want(0, x, REPLICATED)
    return cut(last) if w == cut(0) else REPLICATED


@rule(GroupedLinear)
def _grouped_linear(op: GroupedLinear, given: Placements, types: Sequence[Type]) -> Placement:
    x, w = given
    _want(0, x, cut(1) if w == cut(0) else REPLICATED, "groups go with their weights")
    _want(1, w, x if x == REPLICATED else cut(0))
    return x


@rule(ExpertLinear)
def _expert_linear(op: ExpertLinear, given: Placements, types: Sequence[Type]) -> Placement:
    x, w, experts = given
    _want(2, experts, REPLICATED)
    if w == cut(2):
        _want(0, x, cut(len(types[0].shape) - 1), "the weight is cut along what they share")
        return PARTIAL
    _want(0, x, REPLICATED)
    if w not in (REPLICATED, cut(1)):
        _want(1, w, REPLICATED)
    return cut(2) if w == cut(1) else REPLICATED


@rule(Cast, Clamp, Shift, Sigmoid, Silu, SqrtSoftplus)
def _elementwise(op: Op, given: Placements, types: Sequence[Type]) -> Placement:
    if given[0] == PARTIAL:
        _want(0, given[0], REPLICATED, "a sum is not done addend by addend")
    return given[0]


@rule(Scale)
def _scale(op: Scale, given: Placements, types: Sequence[Type]) -> Placement:
    return given[0]


@rule(Add, Mul)
def _broadcast(op: Op, given: Placements, types: Sequence[Type]) -> Placement:
    """Cut alike, or one is broadcast along the cut. Addends add to addends, and take replicated factors."""
    kinds = {placement.kind for placement in given}
    if "partial" in kinds:
        if isinstance(op, Add) and kinds == {"partial"}:
            return PARTIAL
        if isinstance(op, Mul) and kinds == {"partial", "replicated"}:
            return PARTIAL
        operand = next(i for i, placement in enumerate(given) if placement == PARTIAL)
        _want(operand, PARTIAL, REPLICATED)
    rank = max(len(type_.shape) for type_ in types)
    axes = {p.axis + rank - len(t.shape) for p, t in zip(given, types, strict=True) if p.kind == "cut"}
    if not axes:
        return REPLICATED
    axis = axes.pop()
    for operand, (placement, type_) in enumerate(zip(given, types, strict=True)):
        own = axis - rank + len(type_.shape)
        if placement == REPLICATED and own >= 0 and type_.shape[own] != 1:
            other = next(i for i, p in enumerate(given) if p.kind == "cut")
            _want(other, given[other], REPLICATED, f"{operand_name(op, operand)} is whole")
        if axes and placement.kind == "cut":
            _want(operand, placement, REPLICATED, "the operands are cut along different dimensions")
    return cut(axis)


@rule(Sum)
def _sum(op: Sum, given: Placements, types: Sequence[Type]) -> Placement:
    x, axis = given[0], op.axis % len(types[0].shape)
    if x.kind != "cut":
        return x
    if x.axis == axis:
        return PARTIAL
    return cut(x.axis - (axis < x.axis))


@rule(Reshape)
def _reshape(op: Reshape, given: Placements, types: Sequence[Type]) -> Placement:
    """A cut dimension may become another that begins where it did."""
    x = given[0]
    if x in (PARTIAL, REPLICATED):
        return x
    axis = reshaped_axis(types[0].shape, op.infer(types[0]).shape, x.axis)
    if axis is None:
        _want(0, x, REPLICATED, f"no dimension of {list(op.shape)} begins where the cut one does")
    assert axis is not None
    return cut(axis)


def reshaped_axis(shape: Sequence[int], new: Sequence[int], axis: int) -> int | None:
    """The dimension of `new` that begins where dimension `axis` of `shape` does: of several, beside some of
    size 1, that of the same number.
    """
    before = prod(shape[:axis])
    found = [i for i in range(len(new)) if prod(new[:i]) == before]
    return axis if axis in found else max(found, default=None)


@rule(Slice)
def _slice(op: Slice, given: Placements, types: Sequence[Type]) -> Placement:
    if given[0] == cut(op.axis % len(types[0].shape)):
        _want(0, given[0], REPLICATED, "a slice is of the whole dimension")
    return given[0]


@rule(Concat)
def _concat(op: Concat, given: Placements, types: Sequence[Type]) -> Placement:
    """Operands that are placed alike, but not cut where they are joined."""
    for operand, placement in enumerate(given):
        if placement != given[0] or placement == cut(op.axis % len(types[0].shape)):
            _want(operand, placement, REPLICATED, "parts of several values are no part of them joined")
    return given[0]


@rule(RmsNorm)
def _rms_norm(op: RmsNorm, given: Placements, types: Sequence[Type]) -> Placement:
    return _by_row(given, types, "a norm is of whole rows")


@rule(Rope)
def _rope(op: Rope, given: Placements, types: Sequence[Type]) -> Placement:
    if given[0] == cut(0):
        _want(0, given[0], REPLICATED, "rows have positions")
    return _by_row(given, types, "the last elements of a row are rotated")


def _by_row(given: Placements, types: Sequence[Type], why: str) -> Placement:
    """The first operand may be cut, but not inside of its rows; the others are whole."""
    x = given[0]
    if x == PARTIAL or x == cut(len(types[0].shape) - 1):
        _want(0, x, REPLICATED, why)
    for operand, placement in enumerate(given[1:], 1):
        _want(operand, placement, REPLICATED)
    return x


@rule(Quantize)
def _quantize(op: Quantize, given: Placements, types: Sequence[Type]) -> Placement:
    x, *scale = given
    if scale:
        _want(1, scale[0], REPLICATED)
    alone = not scale and op.format.global_scale is not GlobalScale.NONE
    return _in_blocks(x, op.format, types[0], alone)


@rule(Dequantize)
def _dequantize(op: Dequantize, given: Placements, types: Sequence[Type]) -> Placement:
    assert isinstance(types[0], QuantType)
    return _in_blocks(given[0], types[0].format, types[0], alone=False)


def _in_blocks(x: Placement, format: QuantFormat, type_: Type, alone: bool) -> Placement:
    """Parts are whole blocks. `alone`: a scale is found over whole rows."""
    if x == PARTIAL:
        _want(0, x, REPLICATED, "a sum is not rounded addend by addend")
    if x.kind != "cut":
        return x
    from_last = len(type_.shape) - 1 - x.axis
    if from_last == 0 and (alone or format.tail or type_.shape[-1] % format.block[1]):
        why = (
            "a scale is of a whole row" if alone or format.tail else f"a part is no whole blocks of {format}"
        )
        _want(0, x, REPLICATED, why)
    if from_last == 1 and type_.shape[-2] % format.block[0]:
        _want(0, x, REPLICATED, f"a part is no whole blocks of {format}")
    return x


@rule(AttentionScores)
def _attention_scores(op: AttentionScores, given: Placements, types: Sequence[Type]) -> Placement:
    """Heads may be cut; keys are one head, which all of them read."""
    return _heads(given, 1)


@rule(SinkSoftmax)
def _sink_softmax(op: SinkSoftmax, given: Placements, types: Sequence[Type]) -> Placements:
    scores, sink = given
    if scores != cut(1):
        _want(0, scores, REPLICATED)
    _want(1, sink, cut(0) if scores == cut(1) else REPLICATED, "sinks go with their heads")
    return scores, scores


@rule(AttentionValues)
def _attention_values(op: AttentionValues, given: Placements, types: Sequence[Type]) -> Placement:
    return _heads(given, 2)


def _heads(given: Placements, count: int) -> Placement:
    """The first `count` operands are cut along their heads or not, all alike; the others are whole."""
    x = given[0]
    if x != cut(1):
        _want(0, x, REPLICATED)
    for operand, placement in enumerate(given[1:], 1):
        _want(operand, placement, x if operand < count else REPLICATED)
    return x
