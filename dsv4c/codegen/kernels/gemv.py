"""The decode GEMV family: y[M, N] = x[M, K] w[N, K]^T for up to 8 rows, one or several matrices per launch.

`GemvSpec` says what to compute, `emit_gemv` plans tiles, warps, stages and rows, and puts the stages of
`lib/gemv.py` in order. Matrices that share a weight format and activations form a part; a CTA works on one
part, and on some of the rows where all do not fit.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from textwrap import indent

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Emission, Parameter, branches, call_text, compose, place_of
from dsv4c.codegen.kernels.formats import WEIGHT_FORMATS
from dsv4c.codegen.kernels.riders import Rider, lanes, parameters_of, seated, stage_of
from dsv4c.codegen.lib.shapes import BYTES, COLUMNS, Product, Products, Ring, Seat
from dsv4c.codegen.tuning import tuned
from dsv4c.cuts import PLANNED, Cut
from dsv4c.errors import BuildError

CTA_BYTES = 32 << 10  # what a CTA could have read in the time that it takes to start and to end
MOST_ROUNDS = 10  # the partial sums of eight rows take 4 KB of shared memory per round
STAGES = 5  # and one more for a single row: a Flash step takes 0.985 so, a Pro step 0.995 (H200, 2026-11-30)
WARPS = 8
BOUNDARY = 7 * 1024
"""Shared memory of a CTA of the boundary that follows, with what the system takes. Where there is room it
begins early, and has fetched its weights when it is needed. Half of an SM's registers are its, too: whoever
leaves them has 48 a thread, five warps on a quarter of the SM.
"""
PAIRED = 3  # rows from which on (measured) the tiles of two CTAs are one's
MMA_ROWS = 8  # columns of an MMA, which the activation rows are
STAGINGS = {
    ("e4m3", "copy"),
    ("bf16", "copy"),
    ("e4m3", "quantize"),
    ("f16", "quantize"),
    ("f16", "expand"),
    ("f16", "unpack"),
    ("e4m3", "normalize"),
    ("bf16", "normalize"),
}
BITS = {"fp8": 8, "bf16": 16, "mxfp4": 4.25, "nvfp4": 4.5}


@dataclass(frozen=True)
class Activations:
    """The rows a part multiplies with: operand `name`, staged by `prologue`.

    copy: e4m3 rows with ue8m0 scales per 128 (kind "e4m3"), or bf16 rows (kind "bf16"), as a producer left
    them. expand: e4m3 rows with scales, held as f16 (kind "f16"): cheaper per weight, twice the shared
    memory. unpack: NVFP4 rows with a global scale each, held as f16, exactly. quantize: bf16 rows,
    FP8-quantized here (kind "e4m3"), or kept, as f16 under a power of two (kind "f16"). normalize: RMSNorm
    with f32 operand `gain` first, rounded to bf16, then FP8 (or not: kind "bf16").
    """

    name: str
    kind: str
    prologue: str = "copy"
    gain: str | None = None
    eps: float = 0.0

    @property
    def scaled(self) -> bool:
        """Whether the operand is quantized in memory, so that it has scales there."""
        return self.prologue in ("expand", "unpack") or (self.prologue == "copy" and self.kind == "e4m3")

    def text(self, batch: int, k: int) -> str:
        """What is multiplied with weights."""
        rows = f"{self.name}: bf16[{batch},{k}]"
        if self.prologue == "normalize":
            rows = f"rms_norm({rows}, {self.gain}: f32[{k}], eps={self.eps})"
        elif self.scaled:
            packed = "q[e2m1,e4m3,1x16,row]" if self.prologue == "unpack" else "q[e4m3,ue8m0,1x128]"
            return f"{self.name}: {packed}[{batch},{k}]"
        return f"fp8({rows})" if self.prologue in ("normalize", "quantize") and self.kind == "e4m3" else rows


@dataclass(frozen=True)
class Epilogue:
    """What a CTA makes of an element of a product, instead of storing it: `lines` over the number `value` and
    its place `i` in [M, rows]. `parameters` are operands and results, `numbers` their element types; `text`
    says what comes out.
    """

    parameters: tuple[Parameter, ...]
    numbers: tuple[str, ...]
    lines: tuple[str, ...]
    text: str

    @property
    def elements(self) -> dict[str, str]:
        """What the parameters' pointers lead to."""
        return {p.name: n for p, n in zip(self.parameters, self.numbers, strict=True)}

    def function(self, name: str, out: str) -> str:
        """The function of that name, of products `out`."""
        signature = "".join(f"    {p.name}: cute.Pointer,\n" for p in self.parameters)
        return (
            f"@cute.jit\ndef {name}_epilogue(\n    value: Float32,\n    i: Int32,\n{signature}):\n"
            f'    """What becomes of element `i` of {out}."""\n' + indent("\n".join(self.lines), "    ")
        )


@dataclass(frozen=True)
class Matrix:
    """One weight matrix [rows, k] and its output, bf16 or f32 [M, rows], or what an epilogue makes of it."""

    name: str
    rows: int
    format: str
    x: Activations
    out: str
    out_dtype: str = "bf16"
    epilogue: Epilogue | None = None

    @property
    def results(self) -> tuple[Parameter, ...]:
        """Parameters of what follows the product."""
        return (Parameter(self.out),) if self.epilogue is None else self.epilogue.parameters


@dataclass(frozen=True)
class GemvSpec:
    """`batch` activation rows times `matrices` of `k` columns. With `groups` g > 1 (block-diagonal weights)
    the rows are [M, g, k] and matrix rows r * (rows / g) .. belong to group r. `riders` take a CTA each per
    row, the first of the launch; CTAs have at least `lanes` threads that multiply, as if riders took
    them: those of other buckets may ride, and weights are packed alike. `late`: the successor begins behind
    the wait, for what it reads before its own; it would find no room sooner, and has not much to load.
    """

    name: str
    batch: int
    k: int
    matrices: tuple[Matrix, ...]
    groups: int = 1
    tile_warps: int = 0  # 0: planned
    rounds: int = 0
    lanes: int = 0
    riders: tuple[Rider, ...] = ()
    late: bool = False


@dataclass(frozen=True)
class Slot:
    """A matrix's place in a launch: `ctas` CTAs from number `first` of its part on."""

    matrix: Matrix
    first: int
    ctas: int


@dataclass(frozen=True)
class Part:
    """Matrices of one weight format, activation operand and output type. Of `ctas` CTAs, `splits` neighbors
    share a place in a slot: all read its weights, each for `ring.product.rows` of the activation rows.
    """

    name: str
    ring: Ring
    batch: int
    splits: int
    groups: int
    x: Activations
    out_dtype: str
    slots: tuple[Slot, ...]
    first: int
    ctas: int
    nbytes: int

    @property
    def products(self) -> Products:
        """What the device library cuts it by."""
        seats = tuple(Seat(slot.matrix.rows, slot.first, slot.ctas) for slot in self.slots)
        out = "" if self.epilogue else self.out_dtype
        x = self.x
        return Products(self.ring, x.prologue, seats, out, self.batch, self.splits, self.groups, x.eps)

    @property
    def last(self) -> int:
        """Number of the CTA after the part's last."""
        return self.first + self.ctas

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Activations, gain, then per matrix weight, scales and output."""
        x = [p for p in self._x.values() if p is not None]
        for slot in self.slots:
            x += [Parameter(slot.matrix.name), *self._scales(slot), *slot.matrix.results]
        return tuple(dict.fromkeys(x))

    @property
    def _x(self) -> dict[str, Parameter | None]:
        """Operands of the device library that all matrices share."""
        x = self.x
        return {
            "x": Parameter(x.name),
            "x_scale": Parameter(x.name, "scale") if x.scaled else None,
            "x_global": Parameter(x.name, "global_scale") if x.prologue == "unpack" else None,
            "gain": Parameter(x.gain) if x.gain else None,
        }

    def _scales(self, slot: Slot) -> list[Parameter]:
        component = {"fp8": "scale", "nvfp4": "global_scale"}.get(self.ring.product.weight)
        return [Parameter(slot.matrix.name, component)] if component else []

    @property
    def epilogue(self) -> Epilogue | None:
        """That of its matrix, which then is the only one."""
        return self.slots[0].matrix.epilogue

    @property
    def record(self) -> str:
        """Its operands, as the device library takes them."""
        given = [f"{name}={p.name}" for name, p in self._x.items() if p is not None]
        scales = [p.name for slot in self.slots for p in self._scales(slot)]
        results = (
            [p.name for slot in self.slots for p in slot.matrix.results] if self.epilogue is None else []
        )
        matrices = {
            "weights": [f"m_{slot.matrix.name}" for slot in self.slots],
            "scales": scales,
            "results": results,
        }
        given += [f"{name}={pointers(values)}" for name, values in matrices.items() if values]
        return f"{self.name} = " + call_text("gemv.Operands", given)

    @property
    def function(self) -> str:
        """Its epilogue."""
        assert self.epilogue is not None
        return self.epilogue.function(self.name, self.slots[0].matrix.out)

    def stages(self, late: bool, crowded: bool) -> str:
        """What a CTA of the part does, in order; of a `crowded` one some warps do nothing."""
        name, spec, block = self.name, self.name.upper(), place_of("block", self.first)
        wait = ["ptx.wait()", *(["ptx.launch_dependents()"] if late else [])]
        if self.x.prologue == "copy":
            copy = [*wait, f"gemv.copy_rows({spec}, at)"]
            staged = ["if at.warp == 0:", *(f"    {line}" for line in copy)]
        else:
            staged = [*wait, f"gemv.stage_rows({spec}, at)"]
        after = []
        if self.epilogue is not None:
            after = [f"{name}_epilogue", pointers([p.name for p in self.epilogue.parameters])]
        lines = [
            f"at = gemv.enter({spec}, {name}, s, {block})",
            *staged,
            call_text("gemv.multiply", [spec, "at", *after]),
        ]
        reads = f"gemv.read_weights({spec}, {name}, s, {block})"
        rest = f"elif warp == {self.ring.warps}:" if crowded else "else:"
        return f"if warp < {self.ring.warps}:\n{indent(chr(10).join(lines), '    ')}\n{rest}\n    {reads}"


def pointers(names: Sequence[str]) -> str:
    """A tuple of them."""
    return call_text("", names) if len(names) != 1 else f"({names[0]},)"


def emit_gemv(spec: GemvSpec, arch: Arch) -> Emission:
    """The kernel of a spec. Raises BuildError for shapes that the family does not cover."""
    _check(spec)
    return tuned(lambda cut: _emitted(spec, arch, cut), arch, spec.name, spec)


def _emitted(spec: GemvSpec, arch: Arch, cut: Cut) -> Emission:
    parts = plan_parts(spec, arch, cut)
    warps = parts[0].ring.warps
    riders = seated(spec.name, spec.riders, warps * 32)
    found = [part.parameters for part in parts] + [parameters_of(rider) for rider in riders]
    epilogues = [part.epilogue for part in parts if part.epilogue is not None]
    shared = max([part.products.at.end for part in parts] + [rider.shared for rider in riders])
    grid, threads = parts[-1].last, warps * 32 + 32
    # With 48 registers a thread there is room for whoever is before and behind, boundaries above all. NVFP4
    # rows take more.
    crowded = spec.batch > 1 and warps % WARPS == 0 and not riders and parts[0].x.prologue != "unpack"
    if crowded:  # as if 40 warps were on an SM: ptxas gives that many then
        threads = 40 * warps
    emission = compose(
        spec.name,
        _what(spec, parts, riders),
        {p: "" for parameters in found for p in parameters},
        f"Launch: grid {grid}, block {threads}, {shared} bytes of shared memory, programmatic edges "
        f"allowed.\n{weights_text(sum(part.nbytes for part in parts), arch)}",
        [
            *([] if spec.late else ["ptx.launch_dependents()"]),
            f"s = ptx.shared({shared})",
            "block, _, _ = cute.arch.block_idx()",
            *(["tid, _, _ = cute.arch.thread_idx()"] if riders else []),
            "warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())",
            *(part.record for part in parts),
            *([STATE_FIRST] if riders else []),
            branches(
                [*(_riding(rider, n, spec, warps) for n, rider in enumerate(riders))]
                + [part.stages(spec.late, crowded) for part in parts],
                [(n + 1) * spec.batch for n in range(len(riders))] + [part.last for part in parts],
            ),
        ],
        threads=threads,
        grid=(grid, 1, 1),
        resident=1280 // threads if crowded else 2 if riders else None,
        spec={
            **{rider.name.upper(): rider.shape(warps * 32) for rider in riders},
            **{part.name.upper(): part.products for part in parts},
        },
        record=None,
        functions=[part.function for part in parts if part.epilogue is not None],
        elements={name: number for e in epilogues for name, number in e.elements.items()},
        meanings=("math", "values") if epilogues else (),
    )
    packing = {
        slot.matrix.name: f"{slot.matrix.format}/{part.ring.tile_warps}x{part.ring.span}"
        for part in parts
        for slot in part.slots
    }
    return replace(emission, packing=packing)


STATE_FIRST = """\
# State first: low numbers are resident before the grid fills the SMs, so that what these CTAs wait for
# and read, one after the other, passes while the rest streams weights. As the last ones they would start
# when others end."""


def _riding(rider: Rider, number: int, spec: GemvSpec, warps: int) -> str:
    """What the CTAs of a rider do."""
    return f"if warp < {warps}:\n" + indent(stage_of(rider, place_of("block", number * spec.batch)), "    ")


def _what(spec: GemvSpec, parts: Sequence[Part], riders: Sequence[Rider]) -> str:
    """For people."""
    batch, k = spec.batch, spec.groups * spec.k
    diagonal = f", {spec.groups} diagonal blocks" if spec.groups > 1 else ""
    lines = [f"{spec.name}: decode GEMV, {batch} row{'s' if batch > 1 else ''}{diagonal}.", ""]
    for part in parts:
        for m in (slot.matrix for slot in part.slots):
            weight = f"{m.name}: {WEIGHT_FORMATS[m.format]}[{m.rows},{spec.k}]"
            lines.append(f"    {m.out}: {m.out_dtype}[{batch},{m.rows}] = {part.x.text(batch, k)} x {weight}")
            lines += [f"    {m.epilogue.text}"] if m.epilogue else []
    lines += [f"    {rider.text}" for rider in riders]
    if riders:
        places = "positions: i32[N], -1 for none (writes nothing); slots: i32[N], of S"
        lines += ["", f"N = {batch}; {places}; frequencies: f32[32]."]
    return "\n".join(lines)


def weights_text(nbytes: int, arch: Arch, each: str = "") -> str:
    """What reading so many bytes of weights, for `each` where that is said, takes at least: for people."""
    read = f"{nbytes / 1e6:.1f} MB of weights{f' per {each}' if each else ''}"
    return f"Reads {read}: {arch.floor_us(nbytes):.1f} us at the read bandwidth of the {arch.gpu}."


def _check(spec: GemvSpec) -> None:
    for m in spec.matrices:
        if m.format not in BYTES:
            raise BuildError(
                f"{spec.name}.{m.name}: weight format {m.format!r}: known are {', '.join(BYTES)}"
            )
        if (m.x.kind == "bf16") != (m.format == "bf16"):
            wanted = "bf16" if m.format == "bf16" else "e4m3 or f16"
            raise BuildError(
                f"{spec.name}.{m.name}: {m.format} weights take {wanted} activations, not {m.x.kind}"
            )
        if (m.x.kind, m.x.prologue) not in STAGINGS:
            raise BuildError(f"{spec.name}.{m.name}: no prologue {m.x.prologue} for {m.x.kind} activations")
        if m.format != "bf16" and spec.k % 128:
            raise BuildError(
                f"{spec.name}.{m.name}: {m.format} weights of {spec.k} columns: want a multiple of 128"
            )
        if m.x.prologue == "normalize" and spec.k % 128:
            raise BuildError(f"{spec.name}.{m.name}: a norm of {spec.k} columns: want a multiple of 128")
        if spec.k % 8:
            raise BuildError(f"{spec.name}: rows of {spec.k} are not a multiple of 16 bytes")
        multiple = 8 if spec.groups == 1 else 16  # a lone matrix may end in half a tile
        if m.rows % (multiple * spec.groups):
            raise BuildError(
                f"{spec.name}.{m.name}: {m.rows} rows in {spec.groups} groups: want multiples of {multiple}"
            )


def plan_parts(spec: GemvSpec, arch: Arch, cut: Cut = PLANNED) -> list[Part]:
    """Tiles, warps, stages and CTAs of a launch: about two CTAs per SM, weights in flight in both."""
    kinds: dict[tuple[str, Activations, str, Epilogue | None], list[Matrix]] = {}
    for matrix in spec.matrices:
        kinds.setdefault((matrix.format, matrix.x, matrix.out_dtype, matrix.epilogue), []).append(matrix)
    tile_warps, rounds = _plan_tiles(spec, arch)
    if cut.rounds and spec.groups == 1:
        rounds = cut.rounds
    parts, first = [], sum(rider.ctas(spec.batch) for rider in spec.riders)
    heaviest_first = sorted(kinds.items(), key=lambda item: -BYTES[item[0][0]])
    for (format, x, out_dtype, _), matrices in heaviest_first:
        part = _part(spec, arch, cut, format, x, out_dtype, matrices, tile_warps, rounds, first)
        parts.append(part)
        first += part.ctas
    return parts


def _ctas(spec: GemvSpec, tile_warps: int, rounds: int) -> list[int]:
    """CTAs of each matrix."""
    return [math.ceil(m.rows / (16 * tile_warps) / rounds) for m in spec.matrices]


def _plan_tiles(spec: GemvSpec, arch: Arch) -> tuple[int, int]:
    """Tiles that a CTA works on at a time, and how many times, so that the fullest SM has the least to do."""
    per_group = min(m.rows // 16 // spec.groups for m in spec.matrices)
    nbytes = {m: BYTES[m.format] / COLUMNS[m.format] * spec.k for m in spec.matrices}  # of a tile

    def load(plan: tuple[int, int]) -> float:
        """Bytes that the busiest SM reads, CTAs taken in order, heaviest parts first, two at a time."""
        tile_warps, rounds = plan
        ctas = sorted(zip(nbytes.values(), _ctas(spec, tile_warps, rounds), strict=True), reverse=True)
        slots = [0.0] * min(2 * arch.sms, sum(count for _, count in ctas))
        for cost, count in ctas:
            for _ in range(count):
                heapq.heapreplace(slots, slots[0] + cost * tile_warps * rounds + CTA_BYTES)
        return max(slots) * (2.0 if len(slots) > arch.sms else 1.2) * (1 + 0.001 * rounds)

    least = max(spec.lanes, lanes(spec.riders))
    plans = [
        (tile_warps, rounds)
        for tile_warps in ((spec.tile_warps,) if spec.tile_warps else (1, 2, 4, 8))
        for rounds in ((spec.rounds,) if spec.rounds else range(1, MOST_ROUNDS + 1))
        if spec.groups == 1 or (per_group % tile_warps == 0 and rounds == 1)
        if spec.tile_warps or tile_warps * k_warps_of(spec.k, WARPS // tile_warps) * 32 >= least
    ]
    return min(plans, key=load)


def k_warps_of(columns: int, most: int) -> int:
    """Warps, at most so many, that share a tile's columns: as many units each, of 128 columns or of 64."""
    counts = [-(-columns // width) for width in set(COLUMNS.values())]
    return max(n for n in range(1, most + 1) if all(count % n == 0 for count in counts))


def span_of(product: Product, k_warps: int, rounds: int = 1) -> int:
    """Units per step, as measured: FP8 gains nothing from more than one, FP4 wants stages of about 4 KB, and
    so does BF16 when its stream is long (lm_head: 234 us, 257 with 2 KB).
    """
    most = {"fp8": 1, "bf16": 2 if rounds > 1 else 1, "mxfp4": 4, "nvfp4": 4}[product.weight]
    return next(n for n in range(most, 0, -1) if product.units // k_warps % n == 0)


def _part(
    spec: GemvSpec,
    arch: Arch,
    cut: Cut,
    format: str,
    x: Activations,
    out_dtype: str,
    matrices: Sequence[Matrix],
    tile_warps: int,
    rounds: int,
    first: int,
) -> Part:
    k_warps = k_warps_of(spec.k, WARPS // tile_warps)
    slots, at = [], 0
    for m in matrices:
        groups = -(-m.rows // (16 * tile_warps))
        ctas = -(-groups // rounds)
        slots.append(Slot(m, at, ctas))
        at += ctas
    nbytes = int(sum(m.rows * spec.k * BITS[m.format] / 8 for m in matrices))
    name = f"{format}_{x.name}_{out_dtype}"
    if matrices[0].epilogue is not None:
        name += f"_{matrices[0].name}"

    # Whoever quantizes rows does it for all of its tiles: one CTA on an SM once where two do it twice.
    quantizes = spec.batch >= PAIRED and x.prologue == "quantize" and x.kind == "e4m3"
    alone = rounds == 1 and len(spec.matrices) == 1 and not spec.riders
    halves = at % (2 * spec.groups) == 0 and at > arch.sms and tile_warps <= 4  # of a block's scales
    pairs = quantizes and alone and halves

    def planned(splits: int, stages: int, resident: int, beside: int) -> Part:
        product = Product(format, x.kind, -(-spec.batch // splits), spec.k)
        span = span_of(product, k_warps, rounds)
        ring = Ring(product, tile_warps, k_warps, span, stages, rounds, beside, 1, resident, cut.ahead)
        batch, groups = spec.batch, spec.groups
        seats, ctas = tuple(replace(s, ctas=s.ctas // beside) for s in slots), at // beside * splits
        return Part(name, ring, batch, splits, groups, x, out_dtype, seats, first, ctas, nbytes)

    most = STAGES + (spec.batch == 1)
    for splits in range(-(-spec.batch // MMA_ROWS), spec.batch + 1):
        for resident, beside in ((1, 2),) if pairs else ((2, 1), (1, 1)):
            for stages in (cut.stages,) if cut.stages else range(most, 1, -1):
                part = planned(splits, stages, resident, beside)
                if part.products.at.end + BOUNDARY * (beside - 1) <= arch.shared_of(resident):
                    return part
    raise BuildError(f"{spec.name}: a row of {spec.k} leaves no shared memory for two stages of weights")
