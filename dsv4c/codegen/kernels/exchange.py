"""Exchanges between ranks, as launches: words put into the others' inboxes, and theirs waited for.

For the rows of a step. Every word is stored with its flag, so half of what crosses is flags: chunks of many
tokens would want plain stores instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from dsv4c.codegen.emit import Emission, Parameter, compose
from dsv4c.codegen.kernels.formats import holds
from dsv4c.codegen.lib.slices import Joining, Summing
from dsv4c.codegen.registry import Answer, Launchable, No, Request, Scratch, kernel, launchable, takes
from dsv4c.exchange import MOST_ROWS, PAYLOAD, WORD
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
class Piece:
    """One value of a gather: `width` columns of a row on each rank, as `words` from word `first` on."""

    x: str
    y: str
    dtype: str
    width: int
    words: int
    first: int


@dataclass(frozen=True)
class GatherSpec:
    """Columns of every rank -> joined: (element type, columns on each rank) of each value."""

    ranks: int
    rows: int
    values: tuple[tuple[str, int], ...]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        found, first = [], 0
        for i, (dtype, width) in enumerate(self.values):
            words = width // 2 if dtype == "bf16" else width
            found.append(Piece(f"x{i}", f"y{i}", dtype, width, words, first))
            first += words
        return tuple(found)


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
        record="exchange.Addends",
    )


def emit_all_gather(spec: GatherSpec) -> Emission:
    """The kernel of a gather."""
    pieces = spec.pieces
    words = tuple(p.words for p in pieces)
    t = Joining(spec.ranks, words, min(MOST_CTAS, -(-sum(words) // THREADS)), THREADS)
    several = "s" if t.steps > 1 else ""
    return compose(
        "all_gather",
        f"all_gather: the columns of {spec.ranks} ranks, joined in order of the ranks.",
        {
            **{Parameter(p.x): f"{p.dtype}[N,{p.width}]" for p in pieces},
            **EXCHANGED,
            **{Parameter(p.y): f"{p.dtype}[N,{p.width * spec.ranks}]" for p in pieces},
        },
        f"Launch: {t.ctas} CTAs x {THREADS} threads per row, {t.steps} word{several} of 4 B each. Puts "
        f"{WORD * t.width} B per row into each other rank's inbox.",
        _stages(spec.ranks, "exchange.join_rows(SPEC, m, at)"),
        threads=THREADS,
        grid=(t.ctas, "rows", 1),
        sizes={"rows": spec.rows},
        spec=t,
        record="exchange.Columns",
        given={
            "x": _tuple(p.x for p in pieces),
            "exchange": "m_exchange",
            "site": "m_site",
            "y": _tuple(p.y for p in pieces),
        },
    )


def _tuple(operands: Iterable[str]) -> str:
    pointers = [f"m_{operand}" for operand in operands]
    return f"({', '.join(pointers)}{',' * (len(pointers) == 1)})"


def _stages(ranks: int, exchange: str) -> tuple[str, ...]:
    return (f"at = exchange.enter(m.exchange, m.site, {ranks})", "ptx.wait()", exchange)


# Binding ----------------------------------------------------------------------------------------------------


@kernel(takes(AllReduce, "ranks", "out"))
def all_reduce(request: Request) -> Answer:
    call = request.call
    assert isinstance(call.op, AllReduce)
    x = request.types[call.inputs[0]]
    if len(x.shape) != 2 or call.op.out not in (BF16, F32):
        return No(f"adds rows f32[N,H] up to bf16 or f32, not {x} to {call.op.out}")
    if x.shape[0] > MOST_ROWS:
        return No(_rows(x.shape[0]))
    spec = ReduceSpec(call.op.ranks, *x.shape, str(call.op.out))
    values = {"x": call.inputs[0], "y": call.outputs[0]}
    return [exchanging(request, emit_all_reduce(spec), values, x.shape[0] * x.shape[1])]


@kernel(takes(AllGather, "axis", "ranks"))
def all_gather(request: Request) -> Answer:
    call = request.call
    assert isinstance(call.op, AllGather)
    types = [request.types[i] for i in call.inputs]
    values: list[tuple[str, int]] = []
    for type_ in types:
        plain = isinstance(type_, TensorType) and type_.dtype in (BF16, F32, I32)
        if not plain or len(type_.shape) != 2 or call.op.axis % 2 == 0:
            return No(f"joins columns of bf16, f32 or i32 [N,W], not {type_} along axis {call.op.axis}")
        if holds(type_, BF16) and type_.shape[1] % 2:
            return No(f"moves words of two bf16, {type_} has an odd number of columns")
        assert isinstance(type_, TensorType)
        values.append((str(type_.dtype), type_.shape[1]))
    rows = types[0].shape[0]
    if rows > MOST_ROWS or any(type_.shape[0] != rows for type_ in types):
        return No(_rows(rows) if rows > MOST_ROWS else "joins values of as many rows")
    spec = GatherSpec(call.op.ranks, rows, tuple(values))
    names = {p.x: call.inputs[i] for i, p in enumerate(spec.pieces)}
    names |= {p.y: call.outputs[i] for i, p in enumerate(spec.pieces)}
    return [exchanging(request, emit_all_gather(spec), names, rows * sum(p.words for p in spec.pieces))]


def _rows(rows: int) -> str:
    return f"exchanges at most {MOST_ROWS} rows, not {rows}: compile with smaller chunks"


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
