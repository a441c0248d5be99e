"""What both launches of a MoE layer's experts share: `experts_up` (w1, w3, SwiGLU), `experts_down` (w2, sum).

The hidden rows go through memory in bf16 and are quantized by their readers: quantizing them in `up` ties 8
tiles of two matrices together, a cluster per 128 columns, and that measured a third slower than CTAs that
stream any tiles without a break.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Parameter
from dsv4c.codegen.kernels.gemv import BITS, MMA_ROWS, STAGES
from dsv4c.codegen.lib.shapes import BYTES, Layout
from dsv4c.cuts import PLANNED, Cut
from dsv4c.errors import BuildError


@dataclass(frozen=True)
class ExpertsSpec:
    """Shapes of one MoE layer: x [batch, hidden], `top_k` routed experts of `experts`, one shared expert.

    Formats are fp8, bf16, mxfp4 or nvfp4. With bf16 weights x is bf16 and the hidden rows stay so; else x is
    FP8 (e4m3 with ue8m0 scales per 128) and the hidden rows are quantized to FP8. `packed`: x and the rows
    that `down` reads are NVFP4 with a global scale each. `out`: what `down` makes, bf16, or f32 for addends.
    `judged`: rows come with positions, and those of position -1 have weights of 0; where rows take turns,
    these take none, and their experts are not read.
    """

    name: str
    batch: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    routed: str
    shared: str
    limit: float
    packed: bool = False
    out: str = "bf16"
    judged: bool = False

    @property
    def quantized(self) -> bool:
        """Whether activations meet the weights as FP8 or NVFP4."""
        return self.routed != "bf16"

    @property
    def turns(self) -> int:
        """Rows that a CTA takes, one after the other: all of a step's, so that they cost what their weights
        take to read and not a start each. FP8 and BF16 experts, and NVFP4 rows, have one.
        """
        several = self.routed in ("mxfp4", "nvfp4") and self.shared == "fp8"
        return self.batch if several and self.batch <= MMA_ROWS else 1

    @property
    def skips(self) -> bool:
        """Do rows that are not there take no turn?"""
        return self.judged and self.turns > 1

    @property
    def weight_bytes(self) -> int:
        """Bytes of one matrix of every routed expert of a token, and of the shared one."""
        bits = self.top_k * BITS[self.routed] + BITS[self.shared]
        return int(self.intermediate * self.hidden * bits / 8)


def check_experts(spec: ExpertsSpec) -> None:
    if spec.top_k > 32:
        raise BuildError(f"{spec.name}: {spec.top_k} experts per token: a warp holds the addresses of 32")
    if spec.hidden % 16 or spec.intermediate % 16:
        raise BuildError(
            f"{spec.name}: hidden {spec.hidden}, intermediate {spec.intermediate}: want multiples of 16"
        )
    for format in (spec.routed, spec.shared):
        if format not in BYTES:
            raise BuildError(f"{spec.name}: weight format {format!r}: known are {', '.join(BYTES)}")
    if (spec.routed == "bf16") != (spec.shared == "bf16"):
        raise BuildError(
            f"{spec.name}: {spec.routed} routed and {spec.shared} shared experts do not share activations"
        )
    if spec.packed and not spec.quantized:
        raise BuildError(f"{spec.name}: NVFP4 rows do not meet {spec.routed} weights")
    if spec.quantized and (spec.hidden % 128 or spec.intermediate % 128):
        sizes = f"hidden {spec.hidden}, intermediate {spec.intermediate}"
        raise BuildError(f"{spec.name}: {sizes}: {spec.routed} experts want multiples of 128")


def _scales(operand: str, format: str) -> list[Parameter]:
    component = {"fp8": "scale", "nvfp4": "global_scale"}.get(format)
    return [Parameter(operand, component)] if component else []


def weight_parameters(operand: str, format: str) -> list[Parameter]:
    return [Parameter(operand), *_scales(operand, format)]


def row_parameters(operand: str, spec: ExpertsSpec, scaled: bool) -> list[Parameter]:
    """Activation rows, with their scales if they come quantized."""
    components = ["scale"] * scaled + ["global_scale"] * spec.packed
    return [Parameter(operand), *(Parameter(operand, c) for c in components)]


def most_stages(name: str, layout: Callable[[int], Layout], arch: Arch, cut: Cut = PLANNED) -> int:
    """The deepest ring that leaves room for two CTAs per SM, or for one."""
    for resident in (2, 1):
        for stages in (cut.stages,) if cut.stages else range(STAGES, 1, -1):
            if layout(stages).end <= arch.shared_of(resident):
                return stages
    raise BuildError(f"{name}: the activations leave no shared memory for two stages of weights")
