"""Rotary position embedding: interleaved pairs over the last dimensions, angles in f32."""

from __future__ import annotations

from typing import ClassVar

from dsv4c.ir.op import Op, expect, expect_tensor, primitive
from dsv4c.types import F32, I32, TensorType, Type


@primitive
class RopeFrequencies(Op):
    """theta^(-2i/dims) for i < dims/2, with YaRN interpolation when factor > 1 -> f32[dims/2].

    A constant of the model: it depends on no operand, so it moves to load time.
    """

    theta: float
    dims: int
    factor: float
    original_max_position: int
    beta_fast: float
    beta_slow: float

    def infer(self) -> TensorType:
        expect(self.dims > 0 and self.dims % 2 == 0, f"dims must be even and positive, got {self.dims}")
        return TensorType(F32, (self.dims // 2,))


@primitive
class Rope(Op):
    """Rotate pairs (2i, 2i+1) of the last 2·len(frequencies) elements by (position·stride)·frequency_i.

    x[N, ..., D], positions i32[N], frequencies f32[d/2]. `inverse` rotates by the opposite angle.
    """

    by_row: ClassVar = frozenset({0, 1})
    weight: ClassVar = 2
    inverse: bool = False
    stride: int = 1

    def infer(self, x: Type, positions: Type, frequencies: Type) -> TensorType:
        tensor = expect_tensor(x, "x")
        expect_tensor(positions, "positions", 1, I32)
        expect_tensor(frequencies, "frequencies", 1, F32)
        expect(x.shape[:1] == positions.shape, f"x {x} and positions {positions} differ in rows")
        expect(2 * frequencies.shape[0] <= x.shape[-1], f"frequencies {frequencies} exceed the rows of {x}")
        return tensor


rope_frequencies, rope = RopeFrequencies.apply, Rope.apply
