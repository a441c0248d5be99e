"""Exchanges between ranks, as launches: words put into the others' inboxes, and theirs waited for.

Every word of a step's rows is stored with its flag, so half of what crosses is flags, and nothing is waited
for twice. Chunks of many tokens cross as tiles, plain bytes with one flag for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dsv4c.codegen.emit import Emission, Parameter, compose
from dsv4c.codegen.kernels.formats import holds
from dsv4c.codegen.lib.slices import VECTOR, Joining, Summing, Tiles
from dsv4c.codegen.registry import Answer, Launchable, No, Request, Scratch, kernel, launchable, takes
from dsv4c.exchange import MOST_ROWS, MOST_TILES, PAYLOAD, WORD
from dsv4c.ir.ops.collective import AllGather, AllReduce
from dsv4c.types import BF16, F32, I32, TensorType

THREADS = 256
MOST_CTAS = 32  # for a row: all CTAs of a step's rows are on the device together

EXCHANGE = (Parameter("exchange"), Parameter("site", early=True))
EXCHANGED = dict(zip(EXCHANGE, ("the block of exchanges", "u32, the number of this one"), strict=True))


@dataclass(frozen=True)
class ReduceSpec:
    """x f32[rows, width] of every rank -> the sum, `out` [rows, width]."""

    ranks: int
    rows: int
    width: int
    out: str


@dataclass(frozen=True)
class GatherSpec:
    """`width` columns of every rank -> joined, [rows, ranks * width]."""

    ranks: int
    rows: int
    width: int
    dtype: str

    @property
    def words(self) -> int:
        """Words of 4 bytes of a rank's row."""
        return self.width // 2 if self.dtype == "bf16" else self.width

    @property
    def operands(self) -> dict[Parameter, str | None]:
        """Types by parameter."""
        return {
            Parameter("x"): f"{self.dtype}[N,{self.width}]",
            **EXCHANGED,
            Parameter("y"): f"{self.dtype}[N,{self.width * self.ranks}]",
        }


def emit_all_reduce(spec: ReduceSpec) -> Emission:
    """The kernel of a sum."""
    t = Summing(spec.ranks, spec.width, 4 if spec.out == "f32" else 2, THREADS)
    return compose(
        "all_reduce",
        f"all_reduce: the sum of {spec.ranks} ranks' rows, in f32 and in order of the ranks.",
        {
            Parameter("x"): f"f32[N,{spec.width}], this rank's addends",
            **EXCHANGED,
            Parameter("y"): f"{spec.out}[N,{spec.width}] = the sum, the same bits on every rank",
        },
        f"Launch: {t.ctas} CTAs x {THREADS} threads per row. Puts {WORD * spec.width} B per row into each "
        "other rank's inbox.",
        _stages(spec.ranks, "exchange.sum_rows(SPEC, m, at)"),
        threads=THREADS,
        grid=(t.ctas, "rows", 1),
        sizes={"rows": spec.rows},
        spec=t,
    )


def emit_all_gather(spec: GatherSpec) -> Emission:
    """The kernel of a gather."""
    t = Joining(spec.ranks, spec.words, min(MOST_CTAS, -(-spec.words // THREADS)), THREADS)
    several = "s" if t.steps > 1 else ""
    return compose(
        "all_gather",
        f"all_gather: the columns of {spec.ranks} ranks, joined in order of the ranks.",
        spec.operands,
        f"Launch: {t.ctas} CTAs x {THREADS} threads per row, {t.steps} word{several} of 4 B each. Puts "
        f"{WORD * t.width} B per row into each other rank's inbox.",
        _stages(spec.ranks, "exchange.join_rows(SPEC, m, at)"),
        threads=THREADS,
        grid=(t.ctas, "rows", 1),
        sizes={"rows": spec.rows},
        spec=t,
    )


def _stages(ranks: int, exchange: str, *, tiles: bool = False) -> tuple[str, ...]:
    whose = f"{ranks}, tiles=True" if tiles else f"{ranks}"
    return (f"at = exchange.enter(m.exchange, m.site, {whose})", "ptx.wait()", exchange)


def emit_sum_of_tiles(spec: ReduceSpec) -> Emission:
    """The kernel of a sum of many rows."""
    t = Tiles(spec.ranks, 4 * spec.width // VECTOR, THREADS, 4 if spec.out == "f32" else 2)
    return compose(
        "all_reduce_tiles",
        f"all_reduce_tiles: the sum of {spec.ranks} ranks' many rows, in f32 and in order of the ranks.",
        {
            Parameter("x"): f"f32[N,{spec.width}], this rank's addends",
            **EXCHANGED,
            Parameter("y"): f"{spec.out}[N,{spec.width}] = the sum, the same bits on every rank",
        },
        _launch_of(t),
        _stages(spec.ranks, "exchange.sum_tiles(SPEC, m, at)", tiles=True),
        threads=THREADS,
        grid=(t.parts, "rows", 1),
        sizes={"rows": spec.rows},
        spec=t,
    )


def emit_gather_of_tiles(spec: GatherSpec) -> Emission:
    """The kernel of a gather of many rows."""
    t = Tiles(spec.ranks, 4 * spec.words // VECTOR, THREADS)
    return compose(
        "all_gather_tiles",
        f"all_gather_tiles: the columns of {spec.ranks} ranks, of many rows, joined in order of the ranks.",
        spec.operands,
        _launch_of(t),
        _stages(spec.ranks, "exchange.join_tiles(SPEC, m, at)", tiles=True),
        threads=THREADS,
        grid=(t.parts, "rows", 1),
        sizes={"rows": spec.rows},
        spec=t,
    )


def _launch_of(t: Tiles) -> str:
    tiles = f"{t.parts} tile{'s' if t.parts > 1 else ''} of a row"
    vectors = f"{t.steps} vector{'s' if t.steps > 1 else ''} of {VECTOR} B a thread"
    return (
        f"Launch: {tiles}, a CTA of {t.threads} threads each, {vectors}. Puts {VECTOR * t.width} B per row "
        "into each other rank's tiles."
    )


# Binding ----------------------------------------------------------------------------------------------------


@kernel(takes(AllReduce, "ranks", "out"))
def all_reduce(request: Request) -> Answer:
    call = request.call
    assert isinstance(call.op, AllReduce)
    x = request.types[call.inputs[0]]
    if len(x.shape) != 2 or call.op.out not in (BF16, F32):
        return No(f"adds rows f32[N,H] up to bf16 or f32, not {x} to {call.op.out}")
    spec = ReduceSpec(call.op.ranks, *x.shape, str(call.op.out))
    values = {"x": call.inputs[0], "y": call.outputs[0]}
    if spec.rows > MOST_ROWS:
        if 4 * spec.width % VECTOR:
            return No(f"moves vectors of {VECTOR} bytes, not rows of {spec.width} f32")
        return _tiled(request, emit_sum_of_tiles(spec), values, 4 * spec.rows * spec.width)
    return [exchanging(request, emit_all_reduce(spec), values, x.shape[0] * x.shape[1])]


@kernel(takes(AllGather, "axis", "ranks"))
def all_gather(request: Request) -> Answer:
    call = request.call
    assert isinstance(call.op, AllGather)
    x = request.types[call.inputs[0]]
    plain = isinstance(x, TensorType) and x.dtype in (BF16, F32, I32)
    if not plain or len(x.shape) != 2 or call.op.axis % 2 == 0:
        return No(f"joins columns of bf16, f32 or i32 [N,W], not {x} along axis {call.op.axis}")
    if holds(x, BF16) and x.shape[1] % 2:
        return No(f"moves words of two bf16, {x} has an odd number of columns")
    assert isinstance(x, TensorType)
    spec = GatherSpec(call.op.ranks, *x.shape, str(x.dtype))
    values = {"x": call.inputs[0], "y": call.outputs[0]}
    words = spec.rows * spec.words
    if spec.rows > MOST_ROWS:
        if 4 * spec.words % VECTOR:
            return No(f"moves vectors of {VECTOR} bytes, not rows of {x}")
        return _tiled(request, emit_gather_of_tiles(spec), values, 4 * words)
    return [exchanging(request, emit_all_gather(spec), values, words)]


def _tiled(request: Request, emission: Emission, values: Mapping[str, int], nbytes: int) -> Answer:
    """A launch that gives every other rank so many bytes in tiles."""
    parts, rows, _ = emission.grid
    if parts * rows > MOST_TILES:
        return No(f"exchanges at most {MOST_TILES} tiles, not {parts * rows}: compile with smaller chunks")
    launch = launchable(request, emission, values, exchange=EXCHANGE)
    return [replace(launch, tiled=nbytes)]


def exchanging(
    request: Request,
    emission: Emission,
    values: Mapping[str, int],
    words: int,
    *,
    stage: str = "",
    scratch: Mapping[str, Scratch] | None = None,
    forms: Mapping[str, str] | None = None,
) -> Launchable:
    """A launch that gives every other rank so many words."""
    assert WORD == 2 * PAYLOAD
    launch = launchable(
        request, emission, values, stage=stage, scratch=scratch, forms=forms, exchange=EXCHANGE
    )
    return replace(launch, exchanged=words * WORD)
