"""What a kernel's own rounding may do to a result that it computes on the very operands of its nodes.

A certificate bounds what a rewrite changes when both sides run by their meaning. A kernel sums in another
order besides, and keeps f32 where its nodes round on the way. The bounds are relative errors in the norm of a
result, by its op and format; selections must be equal, as sets. Recorded models keep them on the hardware.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4c.ir.graph import Node
from dsv4c.ir.graph import Value as Variable
from dsv4c.ir.op import Rounding
from dsv4c.numerics.codec import Quantized, Value, dequantize
from dsv4c.types import DType, QuantFormat, QuantType, TensorType, Type

# Sums run in another order, which moves f32 by a few 1e-7 and seldom moves a bf16 result to its neighbor;
# were all moved, that would be 2^-8.
ORDER, NEIGHBOR = 1e-5, 2.0**-8
# Kernels keep f32 where the graph rounds to bf16 on the way (gate and up, probabilities, experts' results).
ROUNDING = 2.0**-7
# One code further: 6 to 12 % of an FP8 value, so 1 code in 20 is 0.02; no quantization at all would be 0.026.
# An NVFP4 row whose largest value goes to the next bf16 moves all scales by 2^-8: 2 % of the codes (45 % of a
# value) and 6 % of the block scales (9 %), together 0.067, and the worst of hundreds of rows is larger.
FP8_CODES, FP4_CODES = 0.02, 0.12

OUTPUTS = 0.2
"""What all nodes of a model together may do to its outputs, each within its bound: codes and selections flip,
and that piles up from layer to layer. Runs of one model with other rounding points are up to 0.19 apart.
"""


def limit(node: Node, variable: Variable) -> float:
    """What a result may differ by: nothing for integers and copies, else as its op and format say."""
    type_, inside = variable.type, getattr(node.op, "format", None)
    if node.op.rounding is Rounding.NOWHERE or integers(type_):
        return 0.0
    if isinstance(type_, QuantType):
        return _codes(type_.format)
    outside = any(isinstance(v.type, QuantType) and v.type.format == inside for v in node.outputs)
    if inside is not None and not outside:
        return _codes(inside)
    if node.op.rounding is Rounding.CODES:
        return FP8_CODES
    if node.op.rounding is Rounding.ONCE:
        return ORDER if type_.dtype is DType.F32 else NEIGHBOR
    return NEIGHBOR if type_.dtype is DType.F32 else ROUNDING


def integers(type_: Type) -> bool:
    """Must a result of that type be equal?"""
    return isinstance(type_, TensorType) and type_.dtype in (DType.I32, DType.I64)


def _codes(format: QuantFormat) -> float:
    return FP4_CODES if format.value is DType.E2M1 else FP8_CODES


@dataclass(frozen=True)
class Apart:
    """How far off a result is, and how far it may be: relative errors."""

    result: str
    far: float
    limit: float

    @property
    def within(self) -> bool:
        return self.far <= self.limit

    def __str__(self) -> str:
        return f"{self.result}: relative error {self.far:.3g}, more than the {self.limit:.3g} of rounding"


def beyond(
    node: Node,
    expected: Mapping[str, Value],
    found: Mapping[str, Value],
    before: Mapping[str, Value],
) -> str:
    """Which result is farther off than a kernel's rounding explains, in words; "" if none is.

    `before` is what results that overwrite a state found there: of those only what changed counts.
    """
    return next((str(a) for a in apart(node, expected, found, before) if not a.within), "")


def apart(
    node: Node,
    expected: Mapping[str, Value],
    found: Mapping[str, Value],
    before: Mapping[str, Value],
) -> Iterator[Apart]:
    """How far each result that is in both is off, as `beyond` looks at them."""
    for variable in node.outputs:
        if variable.name not in expected or variable.name not in found:
            continue
        want, got = expected[variable.name], found[variable.name]
        ids = _selection(node, variable)
        if ids is not None and ids.name in expected and ids.name in found:
            want, got = _in_order(want, expected[ids.name]), _in_order(got, found[ids.name])
        yield Apart(variable.name, distance(want, got, before.get(variable.name)), limit(node, variable))


def _selection(node: Node, variable: Variable) -> Variable | None:
    """The numbers that were chosen with these weights: a selection is a set, in any order."""
    if integers(variable.type) or isinstance(variable.type, QuantType) or len(variable.type.shape) < 2:
        return None
    chosen = (v for v in node.outputs if integers(v.type) and v.type.shape == variable.type.shape)
    return next(chosen, None)


def _in_order(weights: Value, ids: Value) -> Tensor:
    assert isinstance(weights, Tensor)
    assert isinstance(ids, Tensor)
    return weights.gather(-1, ids.long().argsort(-1))


def distance(expected: Value, found: Value, before: Value | None = None) -> float:
    """|found - expected| / |expected| over what is finite in both, infinite where only one of them is finite
    or integers differ. `before`: count only what one of them changed.
    """
    if isinstance(expected, torch.Tensor) and not expected.is_floating_point():
        assert isinstance(found, torch.Tensor)
        a, b = (x.sort(-1).values if x.ndim > 1 else x for x in (expected, found))
        return 0.0 if torch.equal(a, b) else float("inf")
    want, got = _wide(expected), _wide(found)
    counts = torch.ones_like(want, dtype=torch.bool)
    if before is not None:
        old = _wide(before)
        counts = (want != old) | (got != old)
    finite = want.isfinite()
    if bool(((finite != got.isfinite()) & counts).any()):
        return float("inf")
    want, got = (x.masked_fill(~(finite & counts), 0) for x in (want, got))
    error = (got - want).norm()
    return float(error / want.norm().clamp(min=1e-30)) if float(error) else 0.0


def _wide(value: Value) -> Tensor:
    return dequantize(value, torch.float64) if isinstance(value, Quantized) else value.double()
