"""Normalizations. Statistics are f32 unless a field says otherwise."""

from __future__ import annotations

from typing import ClassVar

from dsv4c.ir.op import Op, expect, expect_tensor, primitive
from dsv4c.types import BF16, F32, DType, TensorType, Type


@primitive
class RmsNorm(Op):
    """x * rsqrt(mean(x²) + eps) * gain over the last dimension, computed in f32 with one cast at the end.

    `precision=bf16` rounds after each step (square, mean, rsqrt, product), as the official q norm per head.
    """

    weight: ClassVar = 1
    eps: float
    precision: DType = F32

    def rows_of(self, operands: tuple[Type, ...]) -> frozenset[int] | None:
        return frozenset({0}) if len(operands[0].shape) > 1 else None

    def infer(self, x: Type, gain: Type | None = None) -> TensorType:
        tensor = expect_tensor(x, "x", least=1)
        expect(tensor.dtype.is_float, f"x must be floating point, got {x}")
        expect(self.precision in (F32, BF16), f"precision must be f32 or bf16, got {self.precision}")
        if gain is not None:
            expect_tensor(gain, "gain", 1)
            expect(self.precision is F32, "a gain goes with f32 precision")
            expect(gain.shape == x.shape[-1:], f"gain {gain} does not fit {x}")
        return tensor


@primitive
class RsqrtMeanSquare(Op):
    """rsqrt(mean(x²) + eps) over the last dimension: x[..., K] -> f32[..., 1]."""

    eps: float

    def rows_of(self, operands: tuple[Type, ...]) -> frozenset[int] | None:
        return frozenset({0}) if len(operands[0].shape) > 1 else None

    def infer(self, x: Type) -> TensorType:
        return TensorType(F32, (*expect_tensor(x, "x", least=1).shape[:-1], 1))


@primitive
class Normalize(Op):
    """x / (sum of x over `axis` + eps), f32."""

    axis: int
    eps: float

    def rows_of(self, operands: tuple[Type, ...]) -> frozenset[int] | None:
        leading = self.axis % len(operands[0].shape) == 0
        return None if leading else frozenset(range(len(operands)))

    def infer(self, x: Type) -> TensorType:
        tensor = expect_tensor(x, "x", dtype=F32)
        expect(-len(x.shape) <= self.axis < len(x.shape), f"axis {self.axis} is outside {x}")
        return tensor


@primitive
class Softmax(Op):
    """exp(x) / sum of exp(x) over `axis`, f32."""

    axis: int

    def rows_of(self, operands: tuple[Type, ...]) -> frozenset[int] | None:
        leading = self.axis % len(operands[0].shape) == 0
        return None if leading else frozenset(range(len(operands)))

    def infer(self, x: Type) -> TensorType:
        tensor = expect_tensor(x, "x", dtype=F32)
        expect(-len(x.shape) <= self.axis < len(x.shape), f"axis {self.axis} is outside {x}")
        return tensor


rms_norm, rsqrt_mean_square = RmsNorm.apply, RsqrtMeanSquare.apply
normalize, softmax = Normalize.apply, Softmax.apply
