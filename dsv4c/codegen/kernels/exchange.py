"""Exchanges between ranks, each a launch: words put into the others' inboxes, and theirs waited for.

For the rows of a step. Every word is stored with its flag, so half of what crosses is flags: chunks of many
tokens would want plain stores instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsv4c.codegen.emit import Emission, Parameter, render
from dsv4c.codegen.kernels.formats import holds
from dsv4c.codegen.registry import Answer, Launchable, No, Request, kernel, launchable
from dsv4c.exchange import MOST_ROWS, PAYLOAD, WORD
from dsv4c.ir.ops.collective import AllGather, AllReduce
from dsv4c.types import BF16, F32, I32, TensorType

THREADS = 256
MOST_CTAS = 32  # for a row: all CTAs of a step's rows are on the device together

EXCHANGE = (Parameter("exchange"), Parameter("site", early=True))


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
    ctas = -(-spec.width // THREADS)
    parameters = (Parameter("x"), *EXCHANGE, Parameter("y"))
    pointers = [p.name for p in parameters]
    source = render("all_reduce.py.jinja", spec=spec, pointers=pointers, ctas=ctas, threads=THREADS)
    return Emission("all_reduce_0", source, (ctas, spec.rows, 1), THREADS, 0, parameters)


def emit_all_gather(spec: GatherSpec) -> Emission:
    """The kernel of a gather."""
    pieces = spec.pieces
    words = sum(p.words for p in pieces)
    ctas = min(MOST_CTAS, -(-words // THREADS))
    parameters = (*(Parameter(p.x) for p in pieces), *EXCHANGE, *(Parameter(p.y) for p in pieces))
    source = render(
        "all_gather.py.jinja",
        spec=spec,
        pieces=pieces,
        words=words,
        pointers=[p.name for p in parameters],
        ctas=ctas,
        threads=THREADS,
        steps=-(-words // (THREADS * ctas)),
    )
    return Emission("all_gather_0", source, (ctas, spec.rows, 1), THREADS, 0, parameters)


# Binding ----------------------------------------------------------------------------------------------------


@kernel(AllReduce)
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
    return [_exchanged(request, emit_all_reduce(spec), values, x.shape[0] * x.shape[1])]


@kernel(AllGather)
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
    return [_exchanged(request, emit_all_gather(spec), names, rows * sum(p.words for p in spec.pieces))]


def _rows(rows: int) -> str:
    return f"exchanges at most {MOST_ROWS} rows, not {rows}: compile with smaller chunks"


def _exchanged(request: Request, emission: Emission, values: dict[str, int], words: int) -> Launchable:
    assert WORD == 2 * PAYLOAD
    return replace(launchable(request, emission, values, exchange=EXCHANGE), exchanged=words * WORD)
