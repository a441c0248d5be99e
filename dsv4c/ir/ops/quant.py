"""Conversions that round, made explicit."""

from __future__ import annotations

from dsv4c.ir.op import Op, expect, expect_tensor, primitive
from dsv4c.types import F32, DType, GlobalScale, QuantFormat, QuantType, TensorType, Type


@primitive
class Quantize(Op):
    """Block quantization along the last dimension.

    With a `global_scale` f32[N, k] (one per token and expert) an x[N, K] is encoded once for each: [N, k, K].
    """

    format: QuantFormat

    def rows_of(self, operands: tuple[Type, ...]) -> frozenset[int] | None:
        return frozenset(range(len(operands))) if len(operands[0].shape) > 1 else None

    def infer(self, x: Type, global_scale: Type | None = None) -> QuantType:
        tensor = expect_tensor(x, "x", least=1)
        expect(tensor.dtype.is_float, f"x must be floating point, got {x}")
        expect(self.format.tail < x.shape[-1], f"{self.format} leaves nothing to quantize in {x}")
        shape = tensor.shape
        if global_scale is not None:
            expect_tensor(global_scale, "global_scale", dtype=F32)
            expect(
                self.format.global_scale is GlobalScale.ROW,
                f"a given global scale needs a format with one per row, got {self.format}",
            )
            expect(
                shape[:-1] in (global_scale.shape, global_scale.shape[:-1]),
                f"global_scale {global_scale} does not fit x {x}",
            )
            shape = (*global_scale.shape, shape[-1])
        return QuantType(self.format, shape)


@primitive
class Dequantize(Op):
    """The exact value of each element, rounded once to `out`."""

    out: DType

    def rows_of(self, operands: tuple[Type, ...]) -> frozenset[int] | None:
        return frozenset({0}) if len(operands[0].shape) > 1 else None

    def infer(self, x: Type) -> TensorType:
        expect(isinstance(x, QuantType), f"x must be quantized, got {x}")
        return TensorType(self.out, x.shape)


@primitive
class Hadamard(Op):
    """Orthonormal Sylvester-Hadamard transform of the last dimension, a power of two; f32 inside."""

    def rows_of(self, operands: tuple[Type, ...]) -> frozenset[int] | None:
        return frozenset({0}) if len(operands[0].shape) > 1 else None

    def infer(self, x: Type) -> TensorType:
        tensor = expect_tensor(x, "x", least=1)
        n = tensor.shape[-1]
        expect(n > 0 and n & (n - 1) == 0, f"the last dimension must be a power of two, got {x}")
        return tensor


quantize, dequantize, hadamard = Quantize.apply, Dequantize.apply, Hadamard.apply
