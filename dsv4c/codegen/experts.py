"""The experts of one MoE layer at decode: two launches, `up` (w1, w3, SwiGLU, quantize) and `down` (w2, weighted sum).

Each (token, expert) pair is its own job: a CTA has one activation row. Routed experts' addresses come from the router,
so their weights start after the wait; the shared expert's start before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsv4c.codegen.emit import Emission, Parameter, floor_us, render
from dsv4c.codegen.gemv import BITS, FORMATS, SHARED_PER_CTA, SHARED_PER_SM, STAGES, WARPS
from dsv4c.codegen.lib.shapes import BYTES, Product, Ring
from dsv4c.errors import BuildError

CLUSTER = 4  # CTAs that share a block of 128 hidden columns, 2 tiles of w1 and of w3 each


@dataclass(frozen=True)
class ExpertsSpec:
    """Shapes of one MoE layer: x [batch, hidden], `top_k` routed experts of `experts`, one shared expert.

    Formats are fp8, bf16, mxfp4 or nvfp4; with bf16 the activations and the hidden rows are bf16, else FP8.
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

    @property
    def x_kind(self) -> str:
        """What the activations and the hidden rows are."""
        return "bf16" if self.routed == "bf16" else "e4m3"

    @property
    def weight_bytes(self) -> int:
        """Bytes of one [intermediate, hidden] matrix in each of the top_k routed experts and the shared one."""
        bits = self.top_k * BITS[self.routed] + BITS[self.shared]
        return int(self.intermediate * self.hidden * bits / 8)


def _check(spec: ExpertsSpec) -> None:
    if not 1 <= spec.batch <= 8:
        raise BuildError(f"{spec.name}: batch {spec.batch}: the experts' GEMVs take 1 to 8 rows, more need a GEMM")
    if spec.top_k > 32:
        raise BuildError(f"{spec.name}: {spec.top_k} experts per token: a warp holds the addresses of 32")
    for format in (spec.routed, spec.shared):
        if format not in BYTES:
            raise BuildError(f"{spec.name}: weight format {format!r}: known are {', '.join(BYTES)}")
    if (spec.routed == "bf16") != (spec.shared == "bf16"):
        raise BuildError(f"{spec.name}: {spec.routed} routed and {spec.shared} shared experts do not share activations")
    unit = 16 if spec.routed == "bf16" else 128
    if spec.hidden % unit or spec.intermediate % unit:
        sizes = f"hidden {spec.hidden} and intermediate {spec.intermediate}"
        raise BuildError(f"{spec.name}: {sizes}: {spec.routed} experts want multiples of {unit}")


def _scales(operand: str, format: str) -> list[Parameter]:
    component = {"fp8": "scale", "nvfp4": "global_scale"}.get(format)
    return [Parameter(operand, component)] if component else []


def _weight(operand: str, format: str) -> list[Parameter]:
    return [Parameter(operand), *_scales(operand, format)]


def _rows(operand: str, kind: str) -> list[Parameter]:
    return [Parameter(operand), Parameter(operand, "scale")] if kind == "e4m3" else [Parameter(operand)]


def _span(product: Product, k_warps: int) -> int:
    """Units per step: FP4 units are small, a stage of about 4 KB measured best; others take one."""
    if product.weight in ("fp8", "bf16"):
        return 1
    return next(n for n in (4, 3, 2, 1) if product.units // k_warps % n == 0)


def _k_warps(columns: int, most: int) -> int:
    return max(n for n in range(1, most + 1) if -(-columns // 128) % n == 0)


def place(sizes: dict[str, int]) -> dict[str, int]:
    """Offsets of shared arrays one after the other, and `end`."""
    places, at = {}, 0
    for name, size in sizes.items():
        places[name] = at
        at += -(-size // 16) * 16
    return {**places, "end": at}


def _most_stages(name: str, layout: Callable[[int], dict[str, int]]) -> int:
    """The deepest ring that leaves room for two CTAs per SM, or for one."""
    for limit in (SHARED_PER_SM // 2 - 1024, SHARED_PER_CTA):
        for stages in range(STAGES, 1, -1):
            if layout(stages)["end"] <= limit:
                return stages
    raise BuildError(f"{name}: the activations leave no shared memory for two stages of weights")


# up -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UpPart:
    """Routed or shared half of `up`."""

    name: str
    ring: Ring

    @property
    def places(self) -> dict[str, int]:
        """Shared arrays of a CTA of this part."""
        r = self.ring
        return place(
            {
                "ring": r.ring_bytes,
                "x": r.product.x_bytes,
                "fx": r.product.fx_bytes,
                "scale": 2 * r.scale_bytes,
                "part": r.part_bytes,
                "maxima": 4 * CLUSTER,
                "bars": r.bars_bytes,
                "bar": 8,
            }
        )


def _up_part(spec: ExpertsSpec, name: str, format: str) -> UpPart:
    product = Product(format, spec.x_kind, 1, spec.hidden)
    k_warps = _k_warps(spec.hidden, WARPS // 4)

    def planned(stages: int) -> UpPart:
        return UpPart(name, Ring(product, 2, k_warps, _span(product, k_warps), stages, matrices=2))

    return planned(_most_stages(spec.name, lambda stages: planned(stages).places))


def emit_experts_up(spec: ExpertsSpec) -> Emission:
    """h = bf16(silu(min(x w1, limit)) * clamp(x w3, +-limit) * routing weight), FP8 unless weights are bf16."""
    _check(spec)
    parts = [_up_part(spec, "shared", spec.shared), _up_part(spec, "routed", spec.routed)]
    quantized = spec.x_kind == "e4m3"
    groups = -(-spec.intermediate // 32)
    parameters = (
        *_rows("x", spec.x_kind),
        Parameter("expert_ids"),
        Parameter("expert_weights"),
        *_weight("w1", spec.routed),
        *_weight("w3", spec.routed),
        *_weight("shared_w1", spec.shared),
        *_weight("shared_w3", spec.shared),
        *_rows("h", spec.x_kind),
        *_rows("shared_h", spec.x_kind),
    )
    grid = ((1 + spec.top_k) * groups, spec.batch, 1)
    cluster = (CLUSTER, 1, 1) if quantized else (1, 1, 1)
    shared = max(part.places["end"] for part in parts)
    nbytes = 2 * spec.weight_bytes
    source = render(
        "experts_up.py.jinja",
        spec=spec,
        parts=parts,
        pointers=[p.name for p in parameters],
        quantized=quantized,
        groups=groups,
        matrix_bytes={part.name: groups * part.ring.group_bytes for part in parts},
        grid=grid,
        cluster=cluster,
        warps=parts[0].ring.warps,
        shared=shared,
        nbytes=nbytes,
        floor=floor_us(nbytes),
        formats=FORMATS,
    )
    packing = {}
    for part, prefix in zip(parts, ("shared_", ""), strict=True):
        for name in ("w1", "w3"):
            packing[prefix + name] = f"{part.ring.product.weight}/{part.ring.tile_warps}x{part.ring.span}"
    return Emission(
        symbol=f"{spec.name}_0",
        source=source,
        grid=grid,
        block=parts[0].ring.warps * 32,
        shared=shared,
        parameters=parameters,
        cluster=cluster,
        packing=packing,
    )


# down -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DownRings:
    """Both streams of a `down` CTA: the shared expert's tile, then the tile of every routed expert, a round each."""

    shared: Ring
    routed: Ring
    rows: Product  # the routed experts' hidden rows, together

    @property
    def places(self) -> dict[str, int]:
        """Shared arrays of a CTA."""
        return place(
            {
                "ring": self.routed.ring_bytes,
                "shared_ring": self.shared.ring_bytes,
                "x": self.rows.x_bytes,
                "fx": self.rows.fx_bytes,
                "shared_x": self.shared.product.x_bytes,
                "shared_fx": self.shared.product.fx_bytes,
                "scale": self.routed.scale_bytes,
                "shared_scale": self.shared.scale_bytes,
                "part": self.routed.part_bytes,
                "shared_part": self.shared.part_bytes,
                "bars": self.routed.bars_bytes,
                "shared_bars": self.shared.bars_bytes,
                "bar": 16,
            }
        )


def _down_rings(spec: ExpertsSpec) -> DownRings:
    k_warps = _k_warps(spec.intermediate, WARPS)
    routed = Product(spec.routed, spec.x_kind, 1, spec.intermediate)
    shared = Product(spec.shared, spec.x_kind, 1, spec.intermediate)
    rows = Product(spec.routed, spec.x_kind, spec.top_k, spec.intermediate)

    def planned(stages: int) -> DownRings:
        return DownRings(
            Ring(shared, 1, k_warps, _span(shared, k_warps), 2),
            Ring(routed, 1, k_warps, _span(routed, k_warps), stages, rounds=spec.top_k),
            rows,
        )

    return planned(_most_stages(spec.name, lambda stages: planned(stages).places))


def emit_experts_down(spec: ExpertsSpec) -> Emission:
    """y = bf16(sum over the token's routed experts of h w2, plus the shared expert's), accumulated in f32."""
    _check(spec)
    rings = _down_rings(spec)
    parameters = (
        *_rows("h", spec.x_kind),
        *_rows("shared_h", spec.x_kind),
        Parameter("expert_ids"),
        *_weight("w2", spec.routed),
        *_weight("shared_w2", spec.shared),
        Parameter("y"),
    )
    grid = (spec.hidden // 16, spec.batch, 1)
    source = render(
        "experts_down.py.jinja",
        spec=spec,
        rings=rings,
        pointers=[p.name for p in parameters],
        grid=grid,
        warps=rings.routed.warps,
        shared=rings.places["end"],
        nbytes=spec.weight_bytes,
        floor=floor_us(spec.weight_bytes),
        formats=FORMATS,
    )
    return Emission(
        symbol=f"{spec.name}_0",
        source=source,
        grid=grid,
        block=rings.routed.warps * 32,
        shared=rings.places["end"],
        parameters=parameters,
        packing={
            "w2": f"{spec.routed}/1x{rings.routed.span}",
            "shared_w2": f"{spec.shared}/1x{rings.shared.span}",
        },
    )
