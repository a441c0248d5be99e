"""Matrix products with weights stored [out, in]."""

from __future__ import annotations

from typing import ClassVar

from dsv4c.ir.op import Cost, Op, Rounding, elements, expect, expect_tensor, primitive
from dsv4c.types import BF16, F32, I32, DType, QuantType, TensorType, Type


def _float_operand(type_: Type, name: str) -> None:
    if isinstance(type_, TensorType):
        expect_tensor(type_, name, least=1)
        expect(type_.dtype in (F32, BF16), f"{name} must be f32, bf16 or quantized, got {type_}")


def _compatible(x: Type, w: Type) -> None:
    """Operands a GEMM accepts: both plain, both quantized, or plain activations with quantized weights."""
    _float_operand(x, "x")
    _float_operand(w, "w")
    if isinstance(x, QuantType):
        expect(
            isinstance(w, QuantType),
            f"x is {x.format} but w is {w}: quantize w, or dequantize x to {getattr(w, 'dtype', BF16)}",
        )
        expect(x.format.block[0] == 1 and not x.format.tail, f"x must have row-wise scales, got {x.format}")


@primitive
class Linear(Op):
    """x[..., K] · w[M, K]ᵀ -> out[..., M]. Quantized operands multiply exactly inside a scale block."""

    product: ClassVar = True
    weight: ClassVar = 1
    rounding: ClassVar = Rounding.ONCE
    out: DType

    def rows_of(self, operands: tuple[Type, ...]) -> frozenset[int] | None:
        return frozenset({0}) if len(operands[0].shape) > 1 else None

    def infer(self, x: Type, w: Type) -> TensorType:
        _compatible(x, w)
        expect(len(w.shape) == 2, f"w must be [out, in], got {w}")
        expect(x.shape[-1] == w.shape[1], f"x {x} does not fit w {w}: {x.shape[-1]} != {w.shape[1]}")
        return TensorType(self.out, (*x.shape[:-1], w.shape[0]))

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        flops = 2 * elements(results[0]) * operands[1].shape[-1]
        return Cost(flops, tuple(o.nbytes for o in operands), (results[0].nbytes,))


@primitive
class GroupedLinear(Op):
    """Block-diagonal product: x[N, G, K] · w[G, M, K]ᵀ -> out[N, G, M]."""

    by_row: ClassVar = frozenset({0})
    product: ClassVar = True
    weight: ClassVar = 1
    rounding: ClassVar = Rounding.ONCE
    out: DType

    def infer(self, x: Type, w: Type) -> TensorType:
        _compatible(x, w)
        expect(len(x.shape) == 3 and len(w.shape) == 3, f"x must be [N, G, K] and w [G, M, K], got {x}, {w}")
        expect(x.shape[1] == w.shape[0], f"x {x} has {x.shape[1]} groups, w {w} has {w.shape[0]}")
        expect(x.shape[2] == w.shape[2], f"x {x} does not fit w {w}: {x.shape[2]} != {w.shape[2]}")
        return TensorType(self.out, (*x.shape[:2], w.shape[1]))

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        flops = 2 * elements(results[0]) * operands[1].shape[-1]
        return Cost(flops, tuple(o.nbytes for o in operands), (results[0].nbytes,))


@primitive
class ExpertLinear(Op):
    """Tokens through their experts: x[N, K] or x[N, k, K], w[E, M, K], experts i32[N, k] -> out[N, k, M]."""

    by_row: ClassVar = frozenset({0, 2})
    product: ClassVar = True
    weight: ClassVar = 1
    picks: ClassVar = {2: (1, 0)}
    out: DType

    def infer(self, x: Type, w: Type, experts: Type) -> TensorType:
        _compatible(x, w)
        chosen = expect_tensor(experts, "experts", 2, I32)
        expect(len(w.shape) == 3, f"w must be [experts, out, in], got {w}")
        expect(
            x.shape[:-1] in (chosen.shape[:1], chosen.shape),
            f"x must be [N, K] or [N, k, K] for experts {chosen}, got {x}",
        )
        expect(x.shape[-1] == w.shape[2], f"x {x} does not fit w {w}: {x.shape[-1]} != {w.shape[2]}")
        return TensorType(self.out, (*chosen.shape, w.shape[1]))

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        x, w, experts = operands
        touched = min(elements(experts), w.shape[0])
        reads = (x.nbytes, w.nbytes * touched // w.shape[0], experts.nbytes)
        return Cost(2 * elements(results[0]) * w.shape[-1], reads, (results[0].nbytes,))


linear, grouped_linear, expert_linear = Linear.apply, GroupedLinear.apply, ExpertLinear.apply
