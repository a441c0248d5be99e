"""Products of many rows on wgmma: y[M, N] = x[M, K] w[N, K]^T, one or several matrices per launch, and those
of a MoE layer's experts, of rows that are listed by expert.

Weights lie as the GEMVs want them, so that all buckets share one copy. How many of a bucket's rows there are
is read on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Emission, Parameter, render
from dsv4c.codegen.kernels.formats import WEIGHT_FORMATS
from dsv4c.codegen.lib.tiles import PIECES, Tiles
from dsv4c.errors import BuildError
from dsv4c.numerics.forms import Packing, parse_packing
from dsv4c.numerics.resident import PLAIN

FEWEST_ROWS = 9  # a GEMV serves fewer
FEW = 2  # an expert may have as many times its share of the rows, before tiles of 128 serve it better


@dataclass(frozen=True)
class GemmMatrix:
    """One weight matrix [rows, k], or two of equal size whose columns an activation pairs, and its result."""

    names: tuple[str, ...]
    rows: int
    out: str


@dataclass(frozen=True)
class GemmSpec:
    """`rows` rows of `k` columns times `matrices`, all packed as `packing` says.

    x is e4m3 with scales per 128 (`scaled`) or bf16. `groups` g > 1: rows are [M, g, k], and matrix rows
    r * (rows / g) .. belong to group r. `counted`: an operand `lengths` says how many rows there are. Of
    paired matrices results are SwiGLU with `limit`. `experts` matrices lie one behind the other: then there
    are `rows` rows of results, which operands `order` and `counts` list by expert; an expert has at most
    rows / `top_k`. Row n of them is that of row n / `divide` of x; of paired ones `weights` are factors.
    """

    name: str
    rows: int
    k: int
    matrices: tuple[GemmMatrix, ...]
    packing: str
    scaled: bool
    out_dtype: str = "bf16"
    groups: int = 1
    counted: bool = False
    limit: float | None = None
    experts: int = 0
    top_k: int = 1
    divide: int = 1

    @property
    def paired(self) -> bool:
        """Whether results are of two matrices."""
        return self.limit is not None

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """In ABI order."""
        format = self.packing.partition("/")[0]
        scales = {"fp8": ["scale"], "nvfp4": ["global_scale"]}.get(format, [])
        x = [Parameter("x"), *([Parameter("x", "scale")] if self.scaled else [])]
        for m in self.matrices:
            for name in m.names:
                x += [Parameter(name), *(Parameter(name, c) for c in scales)]
            x.append(Parameter(m.out))
        if self.experts:
            x += [Parameter("order"), Parameter("counts")]
            x += [Parameter("weights")] if self.paired else []
        return (*x, *([Parameter("lengths")] if self.counted else []))


@dataclass(frozen=True)
class Place:
    """A matrix in a launch: `columns` of results from tile `first` on."""

    names: tuple[str, ...]
    out: str
    rows: int
    columns: int
    first: int


def tiles_of(spec: GemmSpec) -> Tiles:
    """How a launch is cut. Raises BuildError for what the family does not cover."""
    packing = Packing("plain", 1, 1) if spec.packing == PLAIN else parse_packing(spec.packing)
    kind = "bf16" if not spec.scaled else "f16" if packing.format == "nvfp4" else "e4m3"
    if (packing.format, kind) not in PIECES:
        rows = "e4m3 rows with scales" if spec.scaled else "bf16 rows"
        raise BuildError(f"{spec.name}: does not multiply {rows} with {packing.format}")
    if spec.k % 128:
        raise BuildError(f"{spec.name}: rows of {spec.k} columns: want a multiple of 128")
    height = 64 if spec.rows // max(1, spec.experts // FEW) <= 64 else 128
    steps = spec.k // (128 if kind == "e4m3" else 64)
    loaders = 2 if packing.format in ("mxfp4", "nvfp4") and steps % 2 == 0 else 1
    ahead = 2 if steps % (2 * loaders) == 0 else 1
    return Tiles(
        weight=packing.format,
        kind=kind,
        k=spec.k,
        stride=spec.groups * spec.k * (1 if spec.scaled else 2),
        height=height,
        tiles=packing.tiles,
        span=packing.span,
        stages=7 if height == 64 else 5,
        loaders=loaders,
        ahead=ahead,
        scaled=spec.scaled,
        paired=spec.paired,
        experts=spec.experts,
    )


def _places(spec: GemmSpec, t: Tiles) -> tuple[Place, ...]:
    found: list[Place] = []
    first = 0
    for m in spec.matrices:
        if m.rows % 8 or (m.rows // spec.groups) % (128 if spec.groups > 1 else 8):
            raise BuildError(f"{spec.name}.{m.names[0]}: {m.rows} rows in {spec.groups} groups")
        found.append(Place(m.names, m.out, m.rows, m.rows, first))
        first += -(-m.rows // t.made)
    return tuple(found)


def emit_gemm(spec: GemmSpec, arch: Arch) -> Emission:
    """The kernel of a spec. Raises BuildError for shapes and architectures that the family does not cover."""
    if arch.tensor_memory:
        raise BuildError(f"{spec.name}: is written in wgmma, which {arch.name} has not")
    t = tiles_of(spec)
    matrices = _places(spec, t)
    column_tiles = matrices[-1].first + -(-matrices[-1].rows // t.made)
    row_tiles = -(-spec.rows // t.height) + spec.experts
    ctas = min(arch.sms, row_tiles * column_tiles)
    parameters = spec.parameters
    pointers = [p.name for p in parameters]
    source = render(
        "gemm.py.jinja",
        spec=spec,
        t=t,
        fields=[(f.name, _literal(getattr(t, f.name))) for f in fields(t)],
        matrices=matrices,
        column_tiles=column_tiles,
        ctas=ctas,
        pointers=pointers,
        experts=bool(spec.experts),
        format=WEIGHT_FORMATS.get(t.weight, "bf16"),
        packed="as it lies" if spec.packing == PLAIN else f"packed {spec.packing}",
        size=2 if spec.out_dtype == "bf16" else 4,
        x_text=_x_text(spec),
        out_rows="N",
        formula="silu(min(x w1, limit)) * clamp(x w3)" if spec.paired else "x w",
        expert_bytes=parse_packing(spec.packing).nbytes(matrices[0].rows, t.k) if spec.experts else 0,
        listed=spec.rows // spec.top_k,
        expert_scales=-(-matrices[0].rows // 128) * t.blocks,
        group_rows=matrices[0].rows // spec.groups,
        group_bytes=t.k * (1 if spec.scaled else 2),
    )
    packed = spec.packing != PLAIN
    packing = {name: spec.packing for m in matrices for name in m.names} if packed else {}
    return Emission(f"{spec.name}_0", source, (ctas, 1, 1), t.threads, t.shared, parameters, packing=packing)


def _x_text(spec: GemmSpec) -> str:
    groups = f"{spec.groups}," if spec.groups > 1 else ""
    return f"{'q[e4m3,ue8m0,1x128]' if spec.scaled else 'bf16'}[N,{groups}{spec.k}]"


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def packings_of(names: Sequence[str], packing: dict[str, str]) -> str:
    """The one packing of several matrices. Raises BuildError where they differ."""
    found = {packing[name] for name in names}
    if len(found) > 1:
        raise BuildError(f"{', '.join(names)} are packed as {', '.join(sorted(found))}: want one packing")
    return found.pop()
