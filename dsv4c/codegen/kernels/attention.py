"""The decode attention family: query norm, RoPE, window and compressed keys, sink softmax, inverse RoPE.

`AttentionSpec` says what to compute; `emit_attention` splits the keys over a cluster. K = V is one
head, so 16 query heads are the rows of every MMA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Emission, Parameter, branches, compose, floor_text
from dsv4c.codegen.kernels.formats import CACHE_FORMATS, CACHES, format_name, holds
from dsv4c.codegen.kernels.quantize import quantize_rows, scratch_for
from dsv4c.codegen.lib.geometry import HEADS, Attention, Chunk, Row
from dsv4c.codegen.registry import Answer, No, Request, kernel, launchable, takes
from dsv4c.errors import BuildError
from dsv4c.passes.fusions.attention import Attention as FusedAttention
from dsv4c.types import BF16, KV_FP8, NVFP4_ROW, TensorType

KEYS = ("fp8", "bf16")
CHUNK_THREADS = 384  # eight warps that multiply, four that gather keys


@dataclass(frozen=True)
class AttentionSpec:
    """q bf16[rows, heads, width] before norm and RoPE -> out bf16[rows, heads, width], of tokens anywhere.

    Keys of a slot: the `window` tokens up to `last` in a ring of `ring` rows, and of a cache of `capacity`
    entries, one per `ratio` tokens, those that `entries` says: "none", "all" complete ones, or the
    `selected_count` numbers of i32 `selected` (-1 for none; what the token may see comes first). A ring may
    hold later tokens too, of other rows; where it is a copy beside the state, its `ring_slots` are not the
    entries' `slots`. `exact_norm` rounds the per-head norm's steps to bf16, as the release does. `splits` and
    `tile` override how keys are spread over CTAs.
    """

    name: str
    rows: int
    heads: int
    width: int
    format: str
    window: int
    ring: int
    eps: float
    entries: str = "none"
    selected_count: int = 0
    ratio: int = 1
    capacity: int = 0
    exact_norm: bool = True
    splits: int | None = None
    tile: int | None = None
    q: str = "q"
    window_operand: str = "window"
    entries_operand: str = "entries"
    selected: str = "selected"
    sink: str = "sink"
    frequencies: str = "frequencies"
    positions: str = "positions"
    last: str = "positions"
    ring_slots: str = "slots"
    slots: str = "slots"
    out: str = "out"

    @property
    def extra(self) -> int:
        """Most entries that a token sees beside its window."""
        return {"none": 0, "selected": self.selected_count, "all": self.capacity}[self.entries]

    @property
    def operands(self) -> dict[Parameter, str | None]:
        """Types by parameter, in ABI order; None for what the kernel does without. Where a token is, and what
        the selection was made for, is older than the predecessor, and is read before the wait.
        """
        early, heads = self.entries == "selected", f"bf16[N,{self.heads},{self.width}]"
        return {
            Parameter(self.q, early=early): heads,
            **self._cache(self.window_operand, self.ring),
            **self._cache(self.entries_operand, self.capacity if self.entries != "none" else 0),
            Parameter(self.selected): f"i32[N,{self.selected_count}]" if early else None,
            Parameter(self.sink): f"f32[{self.heads}]",
            Parameter(self.frequencies): "f32[32]",
            Parameter(self.positions, early=True): "i32[N], -1 for none (gives zeros)",
            Parameter("last", early=True): "i32[N]" if self.last != self.positions else None,
            Parameter("ring_slots", early=True): "i32[N]" if self.ring_slots != self.slots else None,
            Parameter(self.slots, early=True): "i32[N]",
            Parameter(self.out): heads,
        }

    def _cache(self, name: str, rows: int) -> dict[Parameter, str | None]:
        """The components that formats have, of `rows` for each slot if there are any."""
        there = Row(self.width, self.format).components if rows else ()
        types = {
            "data": f"{CACHE_FORMATS[self.format]}[S,{rows},{self.width}]",
            "scale": "its scales",
            "tail": "its last 64 columns, bf16",
        }
        return {Parameter(name, c): type_ if c in there else None for c, type_ in types.items()}


def emit_attention(spec: AttentionSpec, arch: Arch) -> Emission:
    """The kernel of a spec. Raises BuildError for shapes that the family does not cover."""
    a = plan_attention(spec)
    _check(spec, a, arch)
    row = spec.width * 2 if spec.format == "bf16" else (spec.width - 64) + (spec.width - 64) // 64 + 128
    nbytes = (spec.window + spec.extra) * row + spec.heads * spec.width * 4
    shared = max(a.shared, arch.shared_of(2) + 128) if _spread(spec, a, arch) else a.shared
    stages = [
        "ptx.launch_dependents()",
        f"s = ptx.shared({shared})",
        "at = attention.enter(SPEC, m, s)",
        "ptx.wait()",
        "attention.attend(SPEC, m, s, at)",
    ]
    if spec.entries == "selected":
        stages[3:] = [
            "early = attention.prepare_early(SPEC, m, s, at)",
            "ptx.wait()",
            "attention.attend(SPEC, m, s, at, early)",
        ]
    ends = ", which ends at last" if spec.last != spec.positions else ""
    return compose(
        spec.name,
        f"{_what(spec, a)}\n    keys: {a.window} of the window{ends}{_keys_text(spec)}",
        spec.operands,
        f"Launch: clusters of {a.splits} CTAs (keys in tiles of {a.tile}), one per 16 heads and token; "
        f"{a.warps * 32} threads, {shared} B shared each.\n{floor_text(nbytes, arch, 'token')}",
        stages,
        threads=a.warps * 32,
        grid=(f"rows * {a.splits * a.head_tiles}", 1, 1),
        sizes={"rows": spec.rows},
        cluster=a.splits,
        spec=a,
    )


def emit_chunk_attention(spec: AttentionSpec, arch: Arch) -> Emission:
    """The kernel of a spec for many rows, on wgmma. Raises BuildError for what `takes_chunk` says no to."""
    if not takes_chunk(spec, arch):
        raise BuildError(f"{spec.name}: takes many rows of 8, 16, 32 or 64 heads x 512, on wgmma")
    a = Chunk(
        rows=spec.rows,
        ctas=min(spec.rows * -(-spec.heads // Chunk.tile), arch.sms),
        heads=spec.heads,
        format=spec.format,
        window=spec.window,
        ring=spec.ring,
        entries=spec.entries,
        extra=spec.extra,
        ratio=spec.ratio,
        capacity=spec.capacity,
        exact_norm=spec.exact_norm,
        eps=spec.eps,
    )
    shared = a.shared + 1024  # tiles start at a multiple of 1024
    late = {replace(p, early=False): type_ for p, type_ in spec.operands.items()}
    return compose(
        spec.name,
        f"{_what(spec, a)}\n    keys: {a.window} of the window{_keys_text(spec)}",
        late,
        f"Launch: {a.ctas} CTAs of {CHUNK_THREADS} threads, which take {a.own_heads} heads of a token at a "
        f"time; {shared} bytes of shared memory.",
        [
            "ptx.launch_dependents()",
            f"s = (ptx.shared({shared}) + 1023) & Int32(-1024)",
            "at = chunk_attention.enter(SPEC, s)",
            "ptx.wait()",
            branches(
                ["chunk_attention.attend(SPEC, m, s, at)", "chunk_attention.gather(SPEC, m, s, at)"],
                [8],
                "at.warp",
            ),
        ],
        threads=CHUNK_THREADS,
        grid=(a.ctas, 1, 1),
        spec=a,
        record="attention.Operands",
    )


def takes_chunk(spec: AttentionSpec, arch: Arch) -> bool:
    """Whether the kernel for many rows takes a spec: where a CTA for 64 heads of a token keeps SMs busy."""
    heads = spec.heads in (8, 16, 32) or spec.heads % Chunk.tile == 0
    shapes = heads and spec.width == Chunk.width and spec.last == spec.positions
    return shapes and not arch.tensor_memory and 2 * spec.rows * -(-spec.heads // Chunk.tile) > arch.sms


def plan_attention(spec: AttentionSpec) -> Attention:
    """Spread the keys over clusters of 8 CTAs, or of 16 where there are many keys and few clusters per row.

    One tile per CTA if that fits. Where positions decide how many of many entries exist, tiles are small, so
    that a few keys still occupy every CTA. The number of rows decides nothing: sums are split alike for all.
    """
    keys = spec.window + spec.extra
    tiles = -(-spec.heads // HEADS)
    wide = (keys > 2304 and tiles <= 4) or (keys > 512 and tiles <= 2)
    splits = spec.splits or min(16 if wide else 8, spec.width // 16)
    largest = 144 if spec.format == "fp8" else 80
    tile = 16 * -(-keys // (splits * 16))
    if spec.entries == "all" and tile > 48:
        wide_rows = spec.format == "bf16" and spec.width == 512  # two tiles of 80 of them do not fit
        tile = 48 if keys <= 2304 or wide_rows else 80
    if tile > largest:
        tile = 80 if spec.format == "fp8" else 48
    tile = spec.tile or tile
    return Attention(
        heads=spec.heads,
        width=spec.width,
        format=spec.format,
        window=spec.window,
        ring=spec.ring,
        entries=spec.entries,
        extra=spec.extra,
        ratio=spec.ratio,
        capacity=spec.capacity,
        splits=splits,
        tile=tile,
        exact_norm=spec.exact_norm,
        eps=spec.eps,
    )


def _check(spec: AttentionSpec, a: Attention, arch: Arch) -> None:
    def expect(condition: bool, text: str) -> None:
        if not condition:
            raise BuildError(f"{spec.name}: {text}")

    expect(spec.format in KEYS, f"keys must be {' or '.join(KEYS)}, got {spec.format}")
    expect(spec.width in (128, 256, 512), f"head width must be 128, 256 or 512, got {spec.width}")
    expect(spec.ring >= spec.window, f"a ring of {spec.ring} rows cannot hold a window of {spec.window}")
    expect(
        a.splits in (1, 2, 4, 8, 16) and a.slice >= 16,
        f"cannot split {spec.width} dimensions {a.splits} ways",
    )
    expect(
        a.tile % 16 == 0 and a.tile <= 32 * a.warps,
        f"tiles are multiples of 16 up to {32 * a.warps}, got {a.tile}",
    )
    limit = arch.shared_per_cta
    expect(a.shared <= limit, f"needs {a.shared} bytes of shared memory, a CTA has {limit}")


def _spread(spec: AttentionSpec, a: Attention, arch: Arch) -> bool:
    """Whether CTAs of several rows have an SM each, by asking for more than half of its shared memory: else
    clusters sit on top of each other while other SMs have none. Only where they surely find so many places
    (on an H200 12 clusters of 8 do, and 16 take turns).
    """
    ctas = spec.rows * a.splits * a.head_tiles
    return a.warps == 16 and spec.rows > 1 and ctas <= 3 * arch.sms // 4


def _what(spec: AttentionSpec, a: Attention | Chunk) -> str:
    """What is computed, for people."""
    steps = ", bf16 steps" if a.exact_norm else ""
    return (
        f"{spec.name}: {a.heads} heads x {a.width} of each token over one KV head (K = V) of its slot.\n\n"
        f"    q'  = rope(rms_norm(q, eps={a.eps}{steps}), t)\n"
        f"    l_j = q' . k_j * {a.width}^-0.5;  p_j = bf16(exp(l_j - m));  z = sum_j exp(l_j - m) + "
        "exp(sink - m)\n"
        "    out = rope^-1(bf16(sum_j p_j k_j / z), t)"
    )


def _keys_text(spec: AttentionSpec) -> str:
    return {
        "none": "",
        "selected": f", then {spec.selected_count} selected entries of {spec.ratio} tokens each",
        "all": f", then every complete entry of {spec.ratio} tokens",
    }[spec.entries]


# Binding ----------------------------------------------------------------------------------------------------


@kernel(takes(FusedAttention, "eps", "precision", "window", "scale", "groups", "format", "ratio"))
def attention(request: Request) -> Answer:
    call = request.call
    op, x = call.op, call.operands
    assert isinstance(op, FusedAttention)
    q, ring = request.types[x["q"]], request.types[x["ring"]]
    entries = request.types[x["entries"]] if "entries" in x else None
    rows, heads, width = q.shape
    if not holds(q, BF16):
        return No(f"takes bf16 queries, not {q}")
    if op.format not in (None, NVFP4_ROW):
        return No(f"leaves its result in bf16 or {NVFP4_ROW}, it does not quantize to {op.format}")
    if not math.isclose(op.scale, width**-0.5, rel_tol=1e-6):
        return No(f"scales scores by {width**-0.5} (head width {width}), not {op.scale}")
    form = format_name(ring, CACHES)
    if form not in ("fp8", "bf16") or (entries is not None and format_name(entries, CACHES) != form):
        return No(f"takes caches of {KV_FP8} or of bf16, not {ring} and {entries}")
    kind = "none" if entries is None else "selected" if "chosen" in x else "all"
    spec = AttentionSpec(
        {"none": "attention_swa", "selected": "attention_csa", "all": "attention_hca"}[kind],
        rows,
        heads,
        width,
        form,
        op.window,
        ring.shape[1],
        op.eps,
        entries=kind,
        selected_count=request.types[x["chosen"]].shape[1] if kind == "selected" else 0,
        ratio=max(1, op.ratio),
        capacity=entries.shape[1] if entries is not None else 0,
        exact_norm=op.precision is BF16,
        last="positions" if x["last"] == x["positions"] else "last",
        ring_slots="slots" if x.get("slots", x["ring_slots"]) == x["ring_slots"] else "ring_slots",
    )
    emit = emit_chunk_attention if takes_chunk(spec, request.arch) else emit_attention
    values = {"slots": x["ring_slots"], **x, "window": x["ring"], "out": call.outputs[0]}
    if kind == "selected":
        values["selected"] = x["chosen"]
    if op.format is None:
        return [launchable(request, emit(spec, request.arch), values)]
    q_value = values.pop("out")
    row = scratch_for("row", TensorType(BF16, q.shape), "w")
    return [
        launchable(request, emit(spec, request.arch), values, stage="attend", scratch={"out": row["row"]}),
        quantize_rows(request, {"q": q_value}, request.types[q_value].shape),
    ]
