"""Elementwise arithmetic with NumPy broadcasting. f32 with bf16 gives f32."""

from __future__ import annotations

from typing import ClassVar

from dsv4c.ir.op import Op, expect, expect_tensor, primitive
from dsv4c.types import E2M1, E4M3, F32, UE8M0, DType, TensorType, Type


def broadcast(a: Type, b: Type) -> TensorType:
    """Result type of an elementwise op. Raises GraphError when the shapes do not broadcast."""
    x, y = expect_tensor(a, "a"), expect_tensor(b, "b")
    rank = max(len(x.shape), len(y.shape))
    left, right = (1,) * (rank - len(x.shape)) + x.shape, (1,) * (rank - len(y.shape)) + y.shape
    expect(
        all(m == n or 1 in (m, n) for m, n in zip(left, right, strict=True)), f"{a} and {b} do not broadcast"
    )
    expect(x.dtype is y.dtype or F32 in (x.dtype, y.dtype), f"{a} and {b} differ in type; cast one")
    return TensorType(F32 if F32 in (x.dtype, y.dtype) else x.dtype, tuple(map(max, left, right)))


def with_rows(operands: tuple[Type, ...]) -> frozenset[int]:
    """Those that have a row for each of the result's; what has one less is broadcast to all."""
    lead = broadcast(*operands)
    return frozenset(
        i for i, o in enumerate(operands) if len(o.shape) == len(lead.shape) and o.shape[:1] == lead.shape[:1]
    )


def _same(x: Type) -> TensorType:
    tensor = expect_tensor(x, "x")
    expect(tensor.dtype.is_float, f"x must be floating point, got {x}")
    return tensor


@primitive
class Add(Op):
    """a + b."""

    commutative: ClassVar = True

    def rows_of(self, operands: tuple[Type, ...]) -> frozenset[int] | None:
        return with_rows(operands)

    def infer(self, a: Type, b: Type) -> TensorType:
        return broadcast(a, b)


@primitive
class Mul(Op):
    """a * b."""

    commutative: ClassVar = True

    def rows_of(self, operands: tuple[Type, ...]) -> frozenset[int] | None:
        return with_rows(operands)

    def infer(self, a: Type, b: Type) -> TensorType:
        return broadcast(a, b)


@primitive
class Scale(Op):
    """x * factor."""

    by_row: ClassVar = frozenset({0})
    factor: float

    def infer(self, x: Type) -> TensorType:
        return _same(x)


@primitive
class Shift(Op):
    """x + offset."""

    by_row: ClassVar = frozenset({0})
    offset: float

    def infer(self, x: Type) -> TensorType:
        return _same(x)


@primitive
class Clamp(Op):
    """x limited to [low, high]; None leaves that side open."""

    by_row: ClassVar = frozenset({0})
    low: float | None
    high: float | None

    def infer(self, x: Type) -> TensorType:
        expect(self.low is not None or self.high is not None, "clamp needs a bound")
        if self.low is not None and self.high is not None:
            expect(self.low <= self.high, f"low {self.low} is above high {self.high}")
        return _same(x)


@primitive
class Silu(Op):
    """x * sigmoid(x)."""

    by_row: ClassVar = frozenset({0})

    def infer(self, x: Type) -> TensorType:
        return _same(x)


@primitive
class Sigmoid(Op):
    """1 / (1 + exp(-x))."""

    by_row: ClassVar = frozenset({0})

    def infer(self, x: Type) -> TensorType:
        return _same(x)


@primitive
class SqrtSoftplus(Op):
    """sqrt(log(1 + exp(x))), linear under the root above 20: the router's score function."""

    by_row: ClassVar = frozenset({0})

    def infer(self, x: Type) -> TensorType:
        return _same(x)


@primitive
class Cast(Op):
    """x in another element type, rounded to nearest even."""

    by_row: ClassVar = frozenset({0})
    to: DType

    def infer(self, x: Type) -> TensorType:
        coded = self.to in (E4M3, E2M1, UE8M0)
        expect(not coded, f"cast gives f32, bf16, f16 or an integer, not {self.to}; use quantize")
        return TensorType(self.to, expect_tensor(x, "x").shape)


@primitive
class Sum(Op):
    """Sum over `axis` in f32, rounded once to `out`."""

    axis: int
    out: DType

    def rows_of(self, operands: tuple[Type, ...]) -> frozenset[int] | None:
        leading = self.axis % len(operands[0].shape) == 0
        return None if leading else frozenset(range(len(operands)))

    def infer(self, x: Type) -> TensorType:
        shape = list(_same(x).shape)
        expect(-len(shape) <= self.axis < len(shape), f"axis {self.axis} is outside {x}")
        del shape[self.axis]
        return TensorType(self.out, tuple(shape))


add, mul, scale, shift, clamp = Add.apply, Mul.apply, Scale.apply, Shift.apply, Clamp.apply
silu, sigmoid, sqrt_softplus = Silu.apply, Sigmoid.apply, SqrtSoftplus.apply
cast, sum_ = Cast.apply, Sum.apply
