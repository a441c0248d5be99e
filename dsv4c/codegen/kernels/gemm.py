"""Products of many rows on wgmma: y[M, N] = x[M, K] w[N, K]^T, one or several matrices per launch, and those
of a MoE layer's experts, of rows that are listed by expert.

Weights lie as the GEMVs want them, so that all buckets share one copy. How many of a bucket's rows there are
is read on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Emission, Parameter, branches, call_text, compose
from dsv4c.codegen.kernels.chunk_rows import emit_norm_quantize_fp8, emit_quantize_fp8
from dsv4c.codegen.kernels.formats import WEIGHT_FORMATS
from dsv4c.codegen.kernels.gemv import Activations, Epilogue, GemvSpec, plan_parts, pointers
from dsv4c.codegen.kernels.quantize import scratch_for
from dsv4c.codegen.lib.tiles import PIECES, Columns, Few, FewRows, Gemm, Tiles
from dsv4c.codegen.registry import Launchable, Request, Scratch, launchable
from dsv4c.errors import BuildError
from dsv4c.numerics.forms import Packing, parse_packing
from dsv4c.numerics.resident import PLAIN
from dsv4c.plan.records import Box
from dsv4c.types import FP8_ROW, QuantType

FEWEST_ROWS = 9  # a GEMV serves fewer
MOST_OF_FEW = 16  # rows of each expert, on the average, whose time is that of its weights
WIDE = ("fp8", "bf16", "plain")  # formats of weights that tiles of 256 rows are for
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
    are `rows` rows of results, which operands `order` and `counts` list by expert, and row n of them is that
    of row n / `divide` of x; of paired ones `weights` are factors. What an `epilogue` makes of results of a
    single matrix takes their place.
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
    divide: int = 1
    epilogue: Epilogue | None = None

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
            x += [Parameter(m.out)] if self.epilogue is None else []
        if self.experts:
            x += [Parameter("order"), Parameter("counts")]
            x += [Parameter("weights")] if self.paired else []
        x += [Parameter("lengths", early=not self.experts)] if self.counted else []
        return (*x, *(self.epilogue.parameters if self.epilogue is not None else ()))


@dataclass(frozen=True)
class Place:
    """A matrix in a launch: `columns` of results from tile `first` on."""

    names: tuple[str, ...]
    out: str
    rows: int
    columns: int
    first: int


def tiles_of(spec: GemmSpec, sms: int) -> Tiles:
    """How a launch is cut for a GPU of so many SMs. Raises BuildError for what the family does not cover."""
    packing = Packing("plain", 1, 1) if spec.packing == PLAIN else parse_packing(spec.packing)
    kind = "bf16" if not spec.scaled else "f16" if packing.format == "nvfp4" else "e4m3"
    if (packing.format, kind) not in PIECES:
        rows = "e4m3 rows with scales" if spec.scaled else "bf16 rows"
        raise BuildError(f"{spec.name}: does not multiply {rows} with {packing.format}")
    if spec.k % 128:
        raise BuildError(f"{spec.name}: rows of {spec.k} columns: want a multiple of 128")
    pieces = PIECES[packing.format, kind]
    height, splits = _cut(spec, packing.format, kind, sms)
    steps = spec.k // _each(kind) // splits
    loaders = 2 if pieces and steps % 2 == 0 else 1
    t = Tiles(
        weight=packing.format,
        kind=kind,
        k=spec.k,
        stride=spec.groups * spec.k * (1 if spec.scaled else 2),
        height=height,
        tiles=packing.tiles,
        span=packing.span,
        stages=STAGES[height],
        loaders=loaders,
        ahead=1 if steps % (2 * loaders) else 2,
        scaled=spec.scaled,
        paired=spec.paired,
        experts=spec.experts,
        splits=splits,
    )
    return replace(t, stages={64: 5, 128: 4}[height]) if t.expands else t


STAGES = {64: 7, 128: 6, 256: 4}  # by height: what shared memory holds
MOVED = {64: 56, 128: 80, 256: 144}
"""KB that a step of a tile moves through shared memory: to tensor cores, of x, and of w."""
SUMMED = 6  # KB more for each row of a tile whose sums CTAs add up, from each other's shared memory


def _each(kind: str) -> int:
    """Columns of k in a step."""
    return 128 if kind == "e4m3" else 64


def _cut(spec: GemmSpec, format: str, kind: str, sms: int) -> tuple[int, int]:
    """Rows of x in a tile, and CTAs that share its k: those with which the busiest SM moves the fewest bytes
    through shared memory.
    """
    heights = [64] if spec.rows // max(1, spec.experts // FEW) <= 64 else [128]
    if heights == [128] and not spec.experts and format in WIDE:
        heights = [128, 256] if spec.paired else [64, 128, 256]
    widened = 16 if PIECES[format, kind] else 0  # w is laid down twice
    made = 64 if spec.paired else 128
    columns = sum(-(-m.rows // made) for m in spec.matrices)
    least = 4 if spec.paired else 1  # groups of 8 columns of a warpgroup that a CTA adds up
    steps = spec.k // _each(kind)

    def splits(height: int) -> list[int]:
        tiles, groups = -(-spec.rows // height) * columns, (8 if height == 64 else 16) // least
        if spec.experts or height == 256:
            return [1]
        # four steps each, on SMs that would have nothing to do otherwise, of which clusters do not fill all
        most = {2: sms, 4: sms * 4 // 5, 8: sms * 4 // 5}
        return [1, *(n for n in most if n * tiles <= most[n] and n <= groups and steps % (4 * n) == 0)]

    def moved(cut: tuple[int, int]) -> float:
        height, split = cut
        waves = -(-(-(-spec.rows // height) * columns * split) // sms)
        return waves * (steps / split * (MOVED[height] + widened) + (SUMMED * height if split > 1 else 0))

    return min(((h, n) for h in heights for n in splits(h)), key=moved)


def _places(spec: GemmSpec, t: Tiles | Few) -> tuple[Place, ...]:
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
    if (few := few_of(spec)) is not None:
        return _emit_few(spec, few, arch)
    t = tiles_of(spec, arch.sms)
    matrices = _places(spec, t)
    row_tiles = -(-spec.rows // t.height) + spec.experts
    g = Gemm(
        tiles=t,
        seats=tuple(Columns(m.rows, m.first) for m in matrices),
        rows=spec.rows,
        ctas=0,
        size=2 if spec.out_dtype == "bf16" else 4,
        groups=spec.groups,
        divide=spec.divide,
        counted=spec.counted,
        limit=spec.limit or 0.0,
    )
    g = replace(g, ctas=min(arch.sms // t.splits, row_tiles * g.column_tiles))
    ctas, after = g.ctas * t.splits, spec.epilogue
    copied = ["many_rows.expand(SPEC, s, at, work)", "many_rows.copy(SPEC, m, s, at, work)"]
    emission = compose(
        spec.name,
        f"{spec.name}: products of up to {spec.rows} rows on tensor cores, as {t.kind}.\n\n"
        f"{_what(spec, matrices, t.weight, t.k)}",
        dict.fromkeys((replace(p, box=_box(spec, t, p)) for p in spec.parameters), ""),
        f"Launch: {f'clusters of {t.splits}, ' if t.splits > 1 else ''}{ctas} CTAs of {t.threads} threads, "
        f"which take tiles of {t.height} rows and {t.made} columns in turn; {t.shared} bytes of shared "
        "memory.",
        [
            "ptx.launch_dependents()",
            "at = many_rows.enter()",
            f"s = (ptx.shared({t.shared}) + 1023) & Int32(-1024)",
            "many_rows.open_ring(SPEC, s, at)",
            *([] if t.early else ["ptx.wait()"]),
            "work = many_rows.count(SPEC, m, s, at)",
            branches(
                [
                    f"many_rows.multiply(SPEC, m, s, at, work{f', {spec.name}_epilogue' if after else ''})",
                    *(copied if t.expands else ["many_rows.load(SPEC, m, s, at, work)"]),
                ],
                [t.CONSUMERS // 32, t.CONSUMERS // 32 + t.EXPANDERS],
                "at.warp",
            ),
        ],
        threads=t.threads,
        grid=(ctas, 1, 1),
        cluster=t.splits,
        spec=g,
        record="many_rows.Operands",
        given=_given(spec, matrices, t),
        functions=[after.function(spec.name, matrices[0].out)] if after else (),
        elements=after.elements if after else None,
        meanings=("math", "values") if after else (),
    )
    packed = spec.packing != PLAIN
    packing = {name: spec.packing for m in matrices for name in m.names} if packed else {}
    return replace(emission, packing=packing)


def _what(spec: GemmSpec, matrices: Sequence[Place], weight: str, k: int) -> str:
    """Operands and results, for people."""
    packed = "as it lies" if spec.packing == PLAIN else f"packed {spec.packing}"
    experts = f"{spec.experts}," if spec.experts else ""
    lines = [f"x: {_x_text(spec)}"]
    for m in matrices:
        format = WEIGHT_FORMATS.get(weight, "bf16")
        lines.append(f"{', '.join(m.names)}: {format}[{experts}{m.rows},{k}], {packed}")
        lines.append(f"{m.out}: {spec.out_dtype}[N,{m.rows}] = {_formula(spec)}")
    lines += [spec.epilogue.text] if spec.epilogue else []
    if spec.experts:
        lines.append(
            f"order: i32[{spec.experts},{spec.rows}], numbers of rows of results of each expert, of which it "
            f"has counts: i32[{spec.experts}]"
        )
    return "\n".join(f"    {line}" for line in lines)


def _given(spec: GemmSpec, matrices: Sequence[Place], t: Tiles) -> dict[str, str]:
    """The fields of the record."""
    suffix = {"fp8": "_scale", "nvfp4": "_global_scale"}.get(t.weight, "")
    made = []
    for m in matrices:
        fields = {}
        for field, name in itertools.zip_longest(("w", "v"), m.names):
            fields[field] = f"m_{name}" if name else "None"
            fields[f"{field}_scale"] = f"m_{name}{suffix}" if name and suffix else "None"
        fields["y"] = f"m_{m.out}" if spec.epilogue is None else "None"
        made.append(call_text("many_rows.Matrix", [f"{k}={v}" for k, v in fields.items()]))
    there = {p.name for p in spec.parameters}
    others = ("order", "counts", "weights", "lengths")
    return {
        "x": "m_x",
        "x_scale": "m_x_scale" if spec.scaled else "None",
        "matrices": call_text("", made) if len(made) > 1 else f"({made[0]},)",
        **{name: f"m_{name}" if f"m_{name}" in there else "None" for name in others},
        "others": pointers([p.name for p in spec.epilogue.parameters] if spec.epilogue else []),
    }


def _box(spec: GemmSpec, t: Tiles, parameter: Parameter) -> Box | None:
    """What a copy of a step of an operand takes, if it is copied by a tensor map."""
    size = 1 if spec.scaled else 2
    if parameter == Parameter("x") and t.boxed:
        return Box(size, (spec.groups * t.k, spec.rows), (t.stride,), (t.each, t.height), swizzled=True)
    rows = next((m.rows for m in spec.matrices if parameter in map(Parameter, m.names)), 0)
    if not rows or not t.run:
        return None
    if t.weight == "plain":
        return Box(2, (t.k, rows), (2 * t.k,), (t.each, t.COLUMNS), swizzled=True)
    units, groups = t.k // t.each, -(-rows // (16 * t.tiles))
    side = min(t.run, t.tiles)
    return Box(
        8,
        (t.unit // 8, t.span, t.tiles, -(-units // t.span), groups),
        (t.unit, t.span * t.unit, t.tiles * t.span * t.unit, t.group_bytes),
        (t.unit // 8, 1, side, 1, t.run // side),
    )


def few_of(spec: GemmSpec) -> Few | None:
    """How a launch is cut whose experts have few rows each, if the spec is one of those."""
    if not spec.experts or not spec.scaled or spec.out_dtype != "bf16":
        return None
    packing = parse_packing(spec.packing)
    if packing.format != "mxfp4" or spec.rows / spec.experts > MOST_OF_FEW or spec.k % 128:
        return None
    few = Few(
        k=spec.k,
        stride=spec.k,
        tiles=packing.tiles,
        span=packing.span,
        experts=spec.experts,
        paired=spec.paired,
    )
    return few if few.covered else None


def _emit_few(spec: GemmSpec, t: Few, arch: Arch) -> Emission:
    """The kernel of experts who have few rows each."""
    (m,) = _places(spec, t)
    f = FewRows(t, m.rows, spec.rows, 0, spec.divide, spec.limit or 0.0)
    f = replace(
        f, ctas=min(t.RESIDENT * arch.sms, (-(-spec.rows // t.height) + spec.experts) * f.column_tiles)
    )
    given = {"x": "m_x", "x_scale": "m_x_scale"}
    given |= {"w": f"m_{m.names[0]}", "v": f"m_{m.names[1]}" if spec.paired else "None", "y": f"m_{m.out}"}
    given |= {"order": "m_order", "counts": "m_counts", "weights": "m_weights" if spec.paired else "None"}
    emission = compose(
        spec.name,
        f"{spec.name}: products of up to {spec.rows} rows of experts on tensor cores, a few rows of each.\n\n"
        f"{_what(spec, [m], 'mxfp4', t.k)}",
        dict.fromkeys(spec.parameters, ""),
        f"Launch: {f.ctas} CTAs of {t.threads} threads, which take tiles of {t.ROWS} rows and {t.made} "
        f"columns in turn; {t.shared} bytes of shared memory.",
        [
            "ptx.launch_dependents()",
            "at = many_rows.enter()",
            f"s = (ptx.shared({t.shared}) + 1023) & Int32(-1024)",
            "few_rows.open_rings(SPEC.tiles, s, at.thread)",
            "ptx.wait()",
            "work = few_rows.count(SPEC, m, s, at)",
            f"if at.warp < {t.CONSUMERS // 32}:",
            "    few_rows.take_tiles(SPEC, m, s, at, work)",
            f"elif at.warp == {t.CONSUMERS // 32}:",
            "    few_rows.read_weights(SPEC, m, s, at, work)",
            "else:",
            "    few_rows.read_rows(SPEC, m, s, at, work)",
        ],
        threads=t.threads,
        grid=(f.ctas, 1, 1),
        resident=t.RESIDENT,
        spec=f,
        given=given,
    )
    return replace(emission, packing=dict.fromkeys(m.names, spec.packing))


def _formula(spec: GemmSpec) -> str:
    return "silu(min(x w1, limit)) * clamp(x w3)" if spec.paired else "x w"


def _x_text(spec: GemmSpec) -> str:
    groups = f"{spec.groups}," if spec.groups > 1 else ""
    return f"{'q[e4m3,ue8m0,1x128]' if spec.scaled else 'bf16'}[N,{groups}{spec.k}]"


# Binding ----------------------------------------------------------------------------------------------------


def takes_gemm(spec: GemvSpec, arch: Arch) -> bool:
    """Whether the products of a GEMV's spec are ones of many rows that this family covers."""
    if spec.batch < FEWEST_ROWS or arch.tensor_memory:
        return False
    wide = spec.k % 128 == 0 and (
        spec.groups == 1 or all(m.rows // spec.groups % 128 == 0 for m in spec.matrices)
    )
    return wide and all(
        (m.x.kind, m.x.prologue) in STAGED
        and (m.x.kind != "f16" or m.format == "fp8")
        and not (m.x.prologue == "normalize" and spec.k % 256)
        for m in spec.matrices
    )


STAGED = {
    ("e4m3", "copy"): True,
    ("e4m3", "quantize"): True,
    ("e4m3", "normalize"): True,
    ("bf16", "copy"): False,
    ("f16", "quantize"): False,  # FP8 weights widened to bf16
}
"""How rows come to a GEMV that has a GEMM, and whether they meet the weights as FP8."""


def gemm_launches(request: Request, spec: GemvSpec, values: Mapping[str, int]) -> list[Launchable]:
    """A GEMV's products for many rows: rows to FP8 first where the GEMV does that, then a launch for each
    kind of rows and weights. `values` are what its operands are.
    """
    launches: list[Launchable] = []
    lengths = counted(request)
    quantized: dict[Activations, dict[str, Scratch]] = {}
    for part in plan_parts(replace(spec, batch=1), request.arch):
        x = part.x
        if x.prologue in ("quantize", "normalize") and x.kind == "e4m3" and x not in quantized:
            scratch, launch = quantized_rows(request, x, spec, values, lengths)
            quantized[x] = scratch
            launches.append(launch)
        matrices = tuple(GemmMatrix((s.matrix.name,), s.matrix.rows, s.matrix.out) for s in part.slots)
        packing = f"{part.ring.product.weight}/{part.ring.tile_warps}x{part.ring.span}"
        gemm = GemmSpec(
            f"{spec.name}_{part.ring.product.weight}" if launches else spec.name,
            spec.batch,
            spec.k,
            matrices,
            packing,
            STAGED[x.kind, x.prologue],
            part.out_dtype,
            spec.groups,
            bool(lengths),
            epilogue=part.epilogue,
        )
        bound = {**values, **lengths}
        bound.pop("x", None)
        if x not in quantized:
            bound["x"] = values[x.name]
        launches.append(
            launchable(
                request,
                emit_gemm(gemm, request.arch),
                bound,
                stage=f"product{len(launches)}",
                scratch={n: replace(a, access="r") for n, a in quantized.get(x, {}).items()},
            )
        )
    return launches


def counted(request: Request) -> dict[str, int]:
    """The operand that says how many rows there are, if the request has it."""
    return {} if request.lengths is None else {"lengths": request.lengths}


def quantized_rows(
    request: Request, x: Activations, spec: GemvSpec, values: Mapping[str, int], lengths: dict[str, int]
) -> tuple[dict[str, Scratch], Launchable]:
    """Rows to FP8, under a norm where the GEMV has one: the scratch of operand x, and the launch."""
    width = spec.groups * spec.k
    arrays = scratch_for("q", QuantType(FP8_ROW, (spec.batch, width)), "w")
    forms = {}
    if x.gain:
        emission = emit_norm_quantize_fp8("norm_quantize", spec.batch, width, x.eps, counted=bool(lengths))
        forms = {"gain": "f32"}
    else:
        emission = emit_quantize_fp8("quantize", spec.batch, width, counted=bool(lengths))
    bound = {"x": values[x.name], **({"gain": values[x.gain]} if x.gain else {}), **lengths}
    launch = launchable(request, emission, bound, stage="quantize", scratch=arrays, forms=forms)
    return {f"x{name.removeprefix('q')}": array for name, array in arrays.items()}, launch
