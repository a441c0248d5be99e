"""The indexer families: scores of every visible entry, and the exact top-k of them.

`emit_index_scores` transforms the queries and scores the keys in one launch; `emit_top_k` selects. Both stop
early at what the position on the device makes visible, and do nothing but list all entries while there are no
more than k.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Emission, Parameter, render
from dsv4c.codegen.kernels.formats import CACHE_FORMATS, CACHES, format_name, holds
from dsv4c.codegen.lib.geometry import Index, Row, Selection
from dsv4c.codegen.registry import Answer, No, Request, kernel, launchable
from dsv4c.errors import BuildError
from dsv4c.passes.fusions.index_topk import IndexTopk
from dsv4c.passes.fusions.indexer import Indexer
from dsv4c.types import BF16, MXFP4

KEYS = ("mxfp4", "bf16")
WIDTH = 128  # of a head


@dataclass(frozen=True)
class IndexScoresSpec:
    """q bf16[rows, heads, 128] before RoPE, keys [S, capacity, 128] in `format`, weights bf16[rows, heads] ->
    scores f32[rows, capacity] of the keys of each row's slot, written only where visible, and only if more
    than `k` entries are. Strings name operands. Queries are Hadamard-transformed, and quantized like the
    keys; weights are taken times `factor`, rounded to bf16.
    """

    name: str
    rows: int
    heads: int
    format: str
    capacity: int
    ratio: int
    k: int
    factor: float = 1.0
    q: str = "q"
    keys: str = "keys"
    weights: str = "weights"
    frequencies: str = "frequencies"
    positions: str = "positions"
    slots: str = "slots"
    scores: str = "scores"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """In ABI order."""
        keys = (Parameter(self.keys, c) for c in Row(128, self.format).components)
        rest = (self.weights, self.frequencies, self.positions, self.slots, self.scores)
        return (Parameter(self.q), *keys, *map(Parameter, rest))


def emit_index_scores(spec: IndexScoresSpec, arch: Arch) -> Emission:
    """The kernel of a spec. Raises BuildError for shapes that the family does not cover."""
    if spec.format not in KEYS:
        raise BuildError(f"{spec.name}: keys must be {' or '.join(KEYS)}, got {spec.format}")
    if spec.heads % 8:
        raise BuildError(f"{spec.name}: heads come in eights, got {spec.heads}")
    tiles = 2 if spec.format == "mxfp4" and spec.capacity > 32768 else 1  # pays once queries are reread often
    ctas = min(-(-spec.capacity // (128 * tiles)), max(1, 2 * arch.sms // spec.rows))
    x = Index(spec.heads, spec.format, spec.capacity, spec.ratio, spec.k, tiles)
    nbytes = spec.capacity * (68 if spec.format == "mxfp4" else 256) + spec.heads * 256
    source = render(
        "index_scores.py.jinja",
        spec=spec,
        x=x,
        signature=(
            f"q: bf16[N,{spec.heads},128]; keys: {CACHE_FORMATS[spec.format]}[S,{spec.capacity},128];\n"
            f"weights: bf16[N,{spec.heads}]; frequencies: f32[32]; positions: i32[N], -1 for none; "
            f"slots: i32[N]; scores: f32[N,{spec.capacity}]."
        ),
        pointers=[p.name for p in spec.parameters],
        nbytes=nbytes,
        arch=arch,
    )
    return Emission(f"{spec.name}_0", source, (ctas, spec.rows, 1), 256, x.shared, spec.parameters)


@dataclass(frozen=True)
class TopKSpec:
    """scores f32[rows, capacity] -> out i32[rows, min(k, capacity)]; `bits` is 16 for bf16 values."""

    name: str
    rows: int
    capacity: int
    k: int
    ratio: int
    bits: int = 16
    scores: str = "scores"
    positions: str = "positions"
    out: str = "out"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """In ABI order."""
        return tuple(map(Parameter, (self.scores, self.positions, self.out)))


def emit_top_k(spec: TopKSpec, arch: Arch) -> Emission:
    """The kernel of a spec. Raises BuildError for shapes that the family does not cover."""
    if spec.bits not in (16, 32):
        raise BuildError(f"{spec.name}: keys have 16 or 32 bits, got {spec.bits}")
    if spec.capacity > 1 << 20:
        raise BuildError(f"{spec.name}: at most {1 << 20} scores per row, got {spec.capacity}")
    if spec.capacity > 8192 and spec.capacity % 4:
        raise BuildError(
            f"{spec.name}: rows of more than 8192 scores must be a multiple of 4 long, got {spec.capacity}"
        )
    splits = next((n for n in (1, 2, 4, 8) if spec.capacity <= (8192 if n == 1 else 4096 * n)), 16)
    threads = min(1024, -(-spec.capacity // (4 * 32)) * 32)
    t = Selection(spec.capacity, spec.k, spec.ratio, spec.bits, splits, threads)
    nbytes = spec.capacity * 4
    source = render(
        "top_k.py.jinja",
        spec=spec,
        t=t,
        signature=f"scores: f32[N,{spec.capacity}]; positions: i32[N], -1: none; out: i32[N,{t.out}]",
        pointers=[p.name for p in spec.parameters],
        nbytes=nbytes,
        arch=arch,
    )
    return Emission(
        f"{spec.name}_0",
        source,
        (splits * spec.rows, 1, 1),
        threads,
        t.shared,
        spec.parameters,
        (splits, 1, 1),
    )


# Binding ----------------------------------------------------------------------------------------------------


@kernel(Indexer, IndexTopk, chained=True)
def indexer(request: Request) -> Answer:
    """Scores, then the best of them: the first leaves out what the second need not look at."""
    op, best = request.calls[0].op, request.calls[-1].op
    if len(request.calls) != 2 or not isinstance(op, Indexer) or not isinstance(best, IndexTopk):
        names = ", ".join(call.op.name for call in request.calls)
        return No(f"takes an indexer and the index_topk of its scores together, not {names}")
    x, (scores,) = request.calls[0].operands, request.calls[0].outputs
    if request.calls[1].inputs != (scores,) or request.readers[scores]:
        return No("leaves out scores that index_topk does not look at; somebody else reads them")
    q, keys, weights = (request.types[x[n]] for n in ("q", "keys", "weights"))
    if not holds(q, BF16) or not holds(weights, BF16):
        return No(f"takes bf16 queries and head weights, not {q} and {weights}")
    if q.shape[2] != WIDTH:
        return No(f"takes heads of {WIDTH}, not {q}")
    format_ = format_name(keys, CACHES)
    if format_ not in ("mxfp4", "bf16"):
        return No(f"takes keys of {MXFP4} or bf16, not {keys}")
    rows, heads, _ = q.shape
    capacity = keys.shape[1]
    first = IndexScoresSpec("index_scores", rows, heads, format_, capacity, op.ratio, best.k, op.factor)
    second = TopKSpec("index_topk", rows, capacity, best.k, op.ratio)  # of scores rounded to bf16
    values = {**x, "scores": scores, "out": request.calls[1].outputs[0]}
    return [
        launchable(request, emit_index_scores(first, request.arch), values, stage="scores"),
        launchable(request, emit_top_k(second, request.arch), values, stage="topk"),
    ]
