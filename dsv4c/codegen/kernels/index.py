"""The indexer families: scores of every visible entry, and the exact top-k of them.

`emit_index_scores` transforms the queries and scores the keys in one launch; `emit_top_k` selects;
`emit_index_choice` does both at once where a cluster is enough. All stop early at what the position on the
device makes visible, and do nothing but list all entries while there are no more than k.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Emission, Parameter, compose, floor_text
from dsv4c.codegen.kernels.formats import CACHE_FORMATS, CACHES, format_name, holds
from dsv4c.codegen.lib.geometry import Choice, Index, IndexChunk, Selection
from dsv4c.codegen.registry import Answer, No, Request, kernel, launchable, takes
from dsv4c.errors import BuildError
from dsv4c.passes.fusions.index_topk import IndexTopk
from dsv4c.passes.fusions.indexer import Indexer
from dsv4c.types import BF16, MXFP4

KEYS = ("mxfp4", "bf16")
WIDTH = 128  # of a head
HEADS = 64  # whose queries the eight warps of a CTA prepare, eight each


@dataclass(frozen=True)
class IndexScoresSpec:
    """q bf16[rows, heads, 128] before RoPE, keys [S, capacity, 128] in `format`, weights bf16[rows, heads] ->
    scores bf16[rows, capacity] of the keys of each row's slot, written only where visible, and only if more
    than `k` entries are. Queries are Hadamard-transformed, and quantized like the
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


def emit_index_scores(spec: IndexScoresSpec, arch: Arch) -> Emission:
    """The kernel of a spec. Raises BuildError for shapes that the family does not cover."""
    _check(spec)
    tiles = 2 if spec.format == "mxfp4" and spec.capacity > 32768 else 1  # pays once queries are reread often
    ctas = min(-(-spec.capacity // (128 * tiles)), max(1, 2 * arch.sms // spec.rows))
    x = Index(spec.heads, spec.format, spec.capacity, spec.ratio, spec.k, tiles, spec.factor)
    return compose(
        spec.name,
        _what(spec),
        _operands(spec),
        f"Launch: per token as many CTAs as the grid is wide, {x.keys} keys at a time; 256 threads, "
        f"{x.shared} B shared each.\n{floor_text(_nbytes(spec), arch, 'token with all keys visible')}",
        (
            f"s = ptx.shared({x.shared})",
            "at = index.enter(SPEC, m)",
            "ptx.wait()",
            "ptx.launch_dependents()",
            "index.score_keys(SPEC, m, s, at)",
        ),
        threads=256,
        grid=("parts", "rows", 1),
        sizes={"parts": ctas, "rows": spec.rows},
        spec=x,
    )


def emit_chunk_scores(spec: IndexScoresSpec, arch: Arch) -> Emission:
    """The kernel of a spec for many rows, on wgmma. Raises BuildError as the other does."""
    _check(spec)
    tokens = 4 if spec.rows >= 4 * arch.sms else 2  # 4 are faster, where that leaves no SM without any
    one = Index(spec.heads, spec.format, spec.capacity, spec.ratio, spec.k, 1, spec.factor)
    x = IndexChunk(one, spec.rows, tokens)
    shared = x.shared + 1024  # queries start at a multiple of 1024
    ctas = min(-(-spec.capacity // x.index.keys), max(1, 2 * arch.sms // x.groups))
    return compose(
        spec.name,
        _what(spec),
        _operands(spec),
        f"Launch: per {x.tokens} tokens as many CTAs as the grid is wide, {x.index.keys} keys at a time; 256 "
        f"threads, {shared} B shared each.",
        (
            f"s = (ptx.shared({shared}) + 1023) & Int32(-1024)",
            "at = chunk_index.enter(SPEC, m)",
            "ptx.wait()",
            "ptx.launch_dependents()",
            "chunk_index.score_keys(SPEC, m, s, at)",
        ),
        threads=256,
        grid=(ctas, x.groups, 1),
        resident=2,
        spec=x,
        record="index.Operands",
    )


def takes_chunk_scores(spec: IndexScoresSpec, arch: Arch) -> bool:
    """Whether the kernel for many rows takes a spec."""
    return spec.rows > MOST_ROWS and not arch.tensor_memory


def _check(spec: IndexScoresSpec) -> None:
    if spec.format not in KEYS:
        raise BuildError(f"{spec.name}: keys must be {' or '.join(KEYS)}, got {spec.format}")
    if spec.heads % 8 or spec.heads > HEADS:
        raise BuildError(f"{spec.name}: takes 8 to {HEADS} heads in eights, got {spec.heads}")


def _nbytes(spec: IndexScoresSpec) -> int:
    return spec.capacity * (68 if spec.format == "mxfp4" else 256) + spec.heads * 256


def _what(spec: IndexScoresSpec) -> str:
    """What is computed, for people."""
    return (
        f"{spec.name}: index scores of each token against up to {spec.capacity} keys of its slot.\n\n"
        f"{_formulas(spec)}    While at most {spec.k} keys are visible the best {spec.k} are known "
        "without scores: nothing is written."
    )


def _formulas(spec: IndexScoresSpec) -> str:
    """What is a score."""
    turned = "hadamard(rope(q, t))"
    weight = f"    weight  = bf16(weights * {spec.factor})\n" if spec.factor != 1.0 else ""
    return (
        f"    q'      = {f'mxfp4({turned})' if spec.format == 'mxfp4' else turned}\n"
        "    score_w = bf16(sum_h bf16(relu(bf16(q'_h . key_w)) * weight_h)) for w < (t + 1) // "
        f"{spec.ratio}; others are not written\n{weight}"
    )


def _operands(spec: IndexScoresSpec, early: bool = False) -> dict[Parameter, str | None]:
    """Parameters with their types; `early`: where a token is, is read before the wait."""
    return {
        Parameter("q"): f"bf16[N,{spec.heads},128]",
        Parameter("keys"): f"{CACHE_FORMATS[spec.format]}[S,{spec.capacity},128]",
        Parameter("keys", "scale"): "their scales" if spec.format == "mxfp4" else None,
        Parameter("weights"): f"bf16[N,{spec.heads}]",
        Parameter("frequencies"): "f32[32]",
        Parameter("positions", early=early): "i32[N], -1 for none",
        Parameter("slots", early=early): "i32[N]",
        Parameter("scores"): f"bf16[N,{spec.capacity}]",
    }


@dataclass(frozen=True)
class TopKSpec:
    """scores [rows, capacity] of 16 `bits`, bf16, or of 32, f32 -> out i32[rows, min(k, capacity)]."""

    name: str
    rows: int
    capacity: int
    k: int
    ratio: int
    bits: int = 16


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
    return compose(
        spec.name,
        f"{spec.name}: the {t.k} largest of up to {t.capacity} scores of each row; ties go to the lower "
        f"index.\n\n    out = indices w < (t + 1) // {t.ratio} of the largest scores, ascending, then -1; "
        f"all of them while at most {t.k} exist",
        {
            Parameter("scores"): f"{'bf16' if t.bits == 16 else 'f32'}[N,{t.capacity}]",
            Parameter("positions"): "i32[N], -1: none",
            Parameter("out"): f"i32[N,{t.out}]",
        },
        f"Launch: a cluster of {t.splits} CTAs x {t.threads} threads per row, {t.shared} B shared each.\n"
        f"{floor_text(t.bits // 8 * t.capacity, arch, 'row of which every score exists')}",
        (
            "ptx.launch_dependents()",
            f"s = ptx.shared({t.shared})",
            "topk.open_counts(SPEC, s)",
            "ptx.wait()",
            "topk.choose(SPEC, m, s)",
        ),
        threads=t.threads,
        grid=(f"rows * {t.splits}", 1, 1),
        sizes={"rows": spec.rows},
        cluster=t.splits,
        spec=t,
    )


MOST_ROWS = 8  # a cluster each: more than fit the machine at once would take turns
MOST_CHOSEN_FROM = 8192  # scores that a CTA of so many threads as score chooses from


@dataclass(frozen=True)
class IndexChoiceSpec(IndexScoresSpec):
    """The same, and out i32[rows, min(k, capacity)], the k best of them. At most `MOST_ROWS` rows, and at
    most `MOST_CHOSEN_FROM` keys each.
    """


def emit_index_choice(spec: IndexChoiceSpec, arch: Arch) -> Emission:
    """The kernel of a spec. Raises BuildError for shapes that the family does not cover."""
    _check(spec)
    if spec.rows > MOST_ROWS or spec.capacity > MOST_CHOSEN_FROM:
        raise BuildError(
            f"{spec.name}: a cluster chooses for each of at most {MOST_ROWS} rows from at most "
            f"{MOST_CHOSEN_FROM} keys, got {spec.rows} and {spec.capacity}"
        )
    x = Index(spec.heads, spec.format, spec.capacity, spec.ratio, spec.k, 1, spec.factor)
    ctas = next(n for n in (2, 4, 8, 16) if n == 16 or spec.capacity <= n * x.keys)
    best = Selection(spec.capacity, spec.k, spec.ratio, 16, 1, 32 * x.warps)
    choice = Choice(x, best, ctas)
    return compose(
        spec.name,
        f"{spec.name}: index scores of each token against up to {x.capacity} keys of its slot, and the {x.k} "
        f"largest of them; ties go to the lower index.\n\n{_formulas(spec)}"
        f"    out     = indices w of the largest scores, ascending, then -1\n"
        f"    While at most {x.k} keys are visible those are the result, and no scores are written.",
        _operands(spec, early=True) | {Parameter("out"): f"i32[N,{best.out}]"},
        f"Launch: a cluster of {ctas} CTAs per token, {x.keys} keys each at a time; {best.threads} threads, "
        f"{choice.shared} B shared each.\n{floor_text(_nbytes(spec), arch, 'token with all keys visible')}",
        (
            f"s = ptx.shared({choice.shared})",
            "at = index_choice.enter(SPEC, m, s)",
            "ptx.wait()",
            "ptx.launch_dependents()",
            "index_choice.choose(SPEC, m, s, at)",
        ),
        threads=best.threads,
        grid=(f"rows * {ctas}", 1, 1),
        sizes={"rows": spec.rows},
        cluster=ctas,
        spec=choice,
    )


# Binding ----------------------------------------------------------------------------------------------------


@kernel(takes(Indexer, "ratio", "factor"), takes(IndexTopk, "k"), chained=True)
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
    shape = (rows, heads, format_, capacity, op.ratio, best.k, op.factor)
    first = IndexScoresSpec("index_scores", *shape)
    second = TopKSpec("index_topk", rows, capacity, best.k, op.ratio)
    values = {**x, "scores": scores, "out": request.calls[1].outputs[0]}
    if rows <= MOST_ROWS and capacity <= MOST_CHOSEN_FROM:
        both = IndexChoiceSpec("index_choice", *shape)
        return [launchable(request, emit_index_choice(both, request.arch), values)]
    emit = emit_chunk_scores if takes_chunk_scores(first, request.arch) else emit_index_scores
    return [
        launchable(request, emit(first, request.arch), values, stage="scores"),
        launchable(request, emit_top_k(second, request.arch), values, stage="topk"),
    ]
