"""Exchanges between ranks, as launches: words put into the others' inboxes, and theirs waited for.

Every word of a step's rows is stored with its flag, so half of what crosses is flags, and nothing is waited
for twice. Chunks of many tokens cross as tiles, plain bytes with one flag for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dsv4c.codegen.emit import Emission, Parameter, render
from dsv4c.codegen.kernels.formats import holds
from dsv4c.codegen.registry import Answer, Launchable, No, Request, Scratch, kernel, launchable
from dsv4c.exchange import MOST_ROWS, MOST_TILES, PAYLOAD, WORD
from dsv4c.ir.ops.collective import AllGather, AllReduce
from dsv4c.types import BF16, F32, I32, TensorType

THREADS = 256
MOST_CTAS = 32  # for a row: all CTAs of a step's rows are on the device together
VECTOR = 16  # bytes of a tile that a thread moves at once
STEPS = 4  # of them at most, so that a tile has 16 KB

EXCHANGE = (Parameter("exchange"), Parameter("site", early=True))


@dataclass(frozen=True)
class ReduceSpec:
    """x f32[rows, width] of every rank -> the sum, `out` [rows, width]."""

    ranks: int
    rows: int
    width: int
    out: str

    @property
    def vectors(self) -> int:
        """Of a row of a tile."""
        return 4 * self.width // VECTOR


@dataclass(frozen=True)
class Piece:
    """One value of a gather: `width` columns of a row on each rank, as `words` from word `first` on."""

    x: str
    y: str
    dtype: str
    width: int
    words: int
    first: int

    @property
    def vectors(self) -> int:
        """Of a row of a tile."""
        return 4 * self.words // VECTOR

    @property
    def first_vector(self) -> int:
        return 4 * self.first // VECTOR


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


def emit_tiles(name: str, spec: ReduceSpec | GatherSpec) -> Emission:
    """The kernel of a sum or a gather of many rows, a tile for every part of a row."""
    pieces = () if isinstance(spec, ReduceSpec) else spec.pieces
    vectors = spec.vectors if isinstance(spec, ReduceSpec) else sum(p.vectors for p in pieces)
    own, made = [p.x for p in pieces] or ["x"], [p.y for p in pieces] or ["y"]
    steps = min(STEPS, -(-vectors // THREADS))
    parts = -(-vectors // (THREADS * steps))
    parameters = (*map(Parameter, own), *EXCHANGE, *map(Parameter, made))
    source = render(
        f"{name}.py.jinja",
        spec=spec,
        pieces=pieces,
        vectors=vectors,
        pointers=[p.name for p in parameters],
        parts=parts,
        threads=THREADS,
        steps=steps,
    )
    return Emission(f"{name}_0", source, (parts, spec.rows, 1), THREADS, 0, parameters)


# Binding ----------------------------------------------------------------------------------------------------


@kernel(AllReduce)
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
        return _tiled(request, emit_tiles("all_reduce_tiles", spec), values, spec.rows * spec.vectors)
    return [exchanging(request, emit_all_reduce(spec), values, x.shape[0] * x.shape[1])]


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
    if any(type_.shape[0] != rows for type_ in types):
        return No("joins values of as many rows")
    spec = GatherSpec(call.op.ranks, rows, tuple(values))
    names = {p.x: call.inputs[i] for i, p in enumerate(spec.pieces)}
    names |= {p.y: call.outputs[i] for i, p in enumerate(spec.pieces)}
    if rows > MOST_ROWS:
        odd = next((t for t, p in zip(types, spec.pieces, strict=True) if 4 * p.words % VECTOR), None)
        if odd is not None:
            return No(f"moves vectors of {VECTOR} bytes, not rows of {odd}")
        vectors = sum(p.vectors for p in spec.pieces)
        return _tiled(request, emit_tiles("all_gather_tiles", spec), names, rows * vectors)
    return [exchanging(request, emit_all_gather(spec), names, rows * sum(p.words for p in spec.pieces))]


def _tiled(request: Request, emission: Emission, values: Mapping[str, int], vectors: int) -> Answer:
    """A launch that gives every other rank so many vectors in tiles."""
    parts, rows, _ = emission.grid
    if parts * rows > MOST_TILES:
        return No(f"exchanges at most {MOST_TILES} tiles, not {parts * rows}: compile with smaller chunks")
    launch = launchable(request, emission, values, exchange=EXCHANGE)
    return [replace(launch, tiled=vectors * VECTOR)]


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
