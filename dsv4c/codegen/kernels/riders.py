"""State writes of a step: the window's KV rows, the compressors' rows and entries.

`KvStoreSpec` and `CompressSpec` are stages of one CTA per row, which rides in another launch, on CTAs of that
launch's size. For chunks of many tokens `kernels/state.py` makes launches of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from dsv4c.codegen.emit import Parameter, call_text
from dsv4c.codegen.kernels.formats import CACHE_FORMATS, CACHES, format_name
from dsv4c.codegen.lib.geometry import Pool, Row, Window
from dsv4c.codegen.registry import Call, No, Request, takes
from dsv4c.errors import BuildError
from dsv4c.passes.fusions.compressor import Compressor
from dsv4c.passes.fusions.kv_norm_rope_store import KvNormRopeStore
from dsv4c.passes.fusions.q_norm_quantize import QNormQuantize
from dsv4c.types import KV_FP8, MXFP4

THREADS = 256


@dataclass(frozen=True)
class KvStoreSpec:
    """kv bf16[N, width] -> norm with gain, RoPE, the window's format, at its slot and position % ring.

    With a `capacity`, N is `tokens` rows of each sequence, and `beside` gets copies of the rings that have
    room for all of them. `crowded` is N where it is more than the ring has room for, or 0.
    """

    width: int
    format: str
    ring: int
    eps: float
    capacity: int = 0
    tokens: int = 1
    crowded: int = 0
    name: str = "kv_store"
    kv: str = "kv"
    gain: str = "kv_norm"
    frequencies: str = "frequencies"
    positions: str = "positions"
    slots: str = "slots"
    window: str = "window"
    beside: str = "beside"

    @property
    def kind(self) -> str:
        """Which stage it is."""
        return "kv_extend" if self.capacity else "kv_store"

    def shape(self, threads: int) -> Window:
        """What the device library writes by, on CTAs of `threads` threads."""
        return Window(self.row, self.ring, self.eps, threads, self.capacity, self.tokens, self.crowded)

    @property
    def fields(self) -> dict[str, tuple[Parameter, ...]]:
        """Operands of the device library, by name."""
        names = ("kv", "gain", "frequencies", "positions", "slots")
        caches = ("window", "beside") if self.capacity else ("window",)
        return {name: (Parameter(getattr(self, name)),) for name in names} | {
            name: tuple(Parameter(getattr(self, name), c) for c in self.row.components) for name in caches
        }

    def ctas(self, rows: int) -> int:
        """CTAs for so many rows."""
        return rows // self.tokens * self.capacity if self.capacity else rows

    @property
    def row(self) -> Row:
        """The window's row."""
        return Row(self.width, self.format)

    @property
    def shared(self) -> int:
        """Bytes of shared memory: a sum of squares per warp of the row."""
        return self.row.lanes // 8

    @property
    def text(self) -> str:
        """What the stage computes."""
        rows = f"{CACHE_FORMATS[self.format]}[S,{self.ring},{self.width}]"
        copies = f"{CACHE_FORMATS[self.format]}[B,{self.capacity},{self.width}]"
        beside = f"; {self.beside}: {copies}, what it held before and all rows" if self.capacity else ""
        return (
            f"{self.window}: {rows} at slot, position % {self.ring}{beside}\n"
            f"        <- rope(rms_norm({self.kv}: bf16[N,{self.width}], {self.gain}: bf16[{self.width}], "
            f"eps={self.eps}), position)"
        )


@dataclass(frozen=True)
class CompressSpec:
    """u, s f32[N, channels] -> rings f32[S, ring, channels]; at a window's last token its entry.

    N is `tokens` rows of each sequence, one after the other. Operand names are `name` and a suffix;
    `capacity` entries per slot, Hadamard-transformed first if `hadamard`. `threads` are those of the CTA it
    rides on. It may be half of the work alone: the "entries" that the rows complete, or what the "rings" get.
    """

    name: str
    width: int
    format: str
    ratio: int
    overlap: bool
    ring: int
    capacity: int
    eps: float
    hadamard: bool = False
    threads: int = THREADS
    tokens: int = 1
    half: Literal["", "entries", "rings"] = ""
    frequencies: str = "frequencies"
    positions: str = "positions"
    slots: str = "slots"

    @property
    def kind(self) -> str:
        """Which stage it is."""
        return f"compress_{self.half}" if self.half else "compress"

    def ctas(self, rows: int) -> int:
        """CTAs for so many rows."""
        each = {"": self.tokens, "entries": self.pool.most_entries, "rings": self.pool.most_kept}[self.half]
        return rows // self.tokens * each

    @property
    def u(self) -> str:
        """Values of the token."""
        return f"{self.name}_u"

    @property
    def s(self) -> str:
        """Scores of the token, without the position bias."""
        return f"{self.name}_s"

    @property
    def ape(self) -> str:
        """Position bias f32[ratio, channels]."""
        return f"{self.name}_ape"

    @property
    def gain(self) -> str:
        """Gain bf16[width]."""
        return f"{self.name}_norm"

    @property
    def kv_ring(self) -> str:
        """Ring of values."""
        return f"{self.name}_kv"

    @property
    def score_ring(self) -> str:
        """Ring of scores, bias included."""
        return f"{self.name}_score"

    @property
    def entries(self) -> str:
        """The cache of entries."""
        return f"{self.name}_entries"

    @property
    def row(self) -> Row:
        """A row of the cache of entries."""
        return Row(self.width, self.format, self.hadamard)

    def shape(self, threads: int) -> Pool:
        """What the device library pools by, on CTAs of `threads` threads."""
        row, ring, capacity = self.row, self.ring, self.capacity
        return Pool(row, self.ratio, self.overlap, ring, capacity, threads, self.eps, self.tokens)

    @property
    def pool(self) -> Pool:
        """The same, on those that it has."""
        return self.shape(self.threads)

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.pool.shared

    @property
    def fields(self) -> dict[str, tuple[Parameter, ...]]:
        """Operands of the device library, by name."""
        constants = ("gain", "frequencies") if self.half != "rings" else ()
        names = ("u", "s", "ape", *constants, "positions", "slots", "kv_ring", "score_ring")
        entries = tuple(Parameter(self.entries, c) for c in self.row.components)
        return {
            **{name.removesuffix("_ring"): (Parameter(getattr(self, name)),) for name in names},
            **({"entries": entries} if self.half != "rings" else {}),
        }

    @property
    def text(self) -> str:
        """What the stage computes."""
        c, width = self.pool.channels, self.width
        rings = f"{self.kv_ring}, {self.score_ring}: f32[S,{self.ring},{c}]"
        rows = f"{self.u}, {self.s}: f32[N,{c}] + {self.ape}: f32[{self.ratio},{c}]"
        entry = f"rope(rms_norm(bf16(pooled), {self.gain}: bf16[{width}], eps={self.eps}), w * {self.ratio})"
        if self.hadamard:
            entry = f"hadamard({entry})"
        kept = f"{rings} at slot, position % {self.ring}\n        <- {rows}"
        made = (
            f"{self.entries}: {CACHE_FORMATS[self.format]}[S,{self.capacity},{width}] at slot, w, "
            f"when (position + 1) % {self.ratio} == 0\n"
            f"        <- {entry}, softmax pooling over {self.pool.pooled} tokens"
        )
        if self.half == "entries":
            return f"{made}:\n           {rows}, before them {rings}"
        return kept if self.half == "rings" else f"{kept}\n    {made}"


Rider = KvStoreSpec | CompressSpec


def parameters_of(rider: Rider) -> tuple[Parameter, ...]:
    """Its parameters, in ABI order."""
    return tuple(p for parameters in rider.fields.values() for p in parameters)


def stage_of(rider: Rider, place: str) -> str:
    """The call that does its work on CTA `place` of its own, whose threads are `tid`."""
    module = "cache" if isinstance(rider, KvStoreSpec) else "compress"
    operands = [f"{name}={_pointers(name, parameters)}" for name, parameters in rider.fields.items()]
    given = [rider.name.upper(), call_text(f"{module}.Operands", operands), "s", place, "tid"]
    return call_text(f"{module}.{rider.kind}", given)


def _pointers(name: str, parameters: tuple[Parameter, ...]) -> str:
    """A pointer, or those of a cache's components."""
    names = ", ".join(p.name for p in parameters)
    return (
        names if name not in ("window", "beside", "entries") else f"({names}{',' * (len(parameters) == 1)})"
    )


def lanes(riders: Iterable[Rider]) -> int:
    """Threads that the widest row of the riders takes."""
    return max((rider.row.lanes for rider in riders), default=0)


def seated(name: str, riders: Iterable[Rider], threads: int) -> tuple[Rider, ...]:
    """The riders on CTAs of `threads` threads. Raises BuildError for what such a CTA cannot do."""
    placed: list[Rider] = []
    for rider in riders:
        check_row(name, rider.row, threads)
        if isinstance(rider, KvStoreSpec):
            placed.append(rider)
            continue
        needed = rider.pool.pooled + rider.tokens - 1
        if not rider.half and rider.ring < needed:
            raise BuildError(
                f"{name}: {rider.name} pools {rider.pool.pooled} tokens, with {rider.tokens} of a sequence "
                f"per launch: want a ring of {needed} rows, got {rider.ring}"
            )
        placed.append(replace(rider, threads=threads))
    return tuple(placed)


def check_row(name: str, row: Row, threads: int) -> None:
    """Raise BuildError unless a CTA of `threads` threads can hold the row."""
    if (row.format == "mxfp4" or row.hadamard) and row.width != 128:
        raise BuildError(
            f"{name}: MXFP4 and Hadamard rows must be 128 wide (one warp holds them), got {row.width}"
        )
    if row.width % 128 or not 128 <= row.width <= threads * 4:
        raise BuildError(
            f"{name}: {threads} threads hold rows that are a multiple of 128 up to {threads * 4} wide, "
            f"got {row.width}"
        )


# Binding ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Riding:
    """State writes that go with a launch of products: their specs, and the values of their operands."""

    riders: tuple[Rider, ...] = ()
    values: Mapping[str, int] = field(default_factory=dict)
    lanes: int = 0  # threads that CTAs have at least, as if riders took them

    @property
    def apart(self) -> bool:
        """Whether they are a chunk's, which are launches of their own."""
        return any(rider.kind not in ("kv_store", "compress") for rider in self.riders)


NOBODY = Riding()

# Compressors pool a chunk's rows where they are, so that neither the copies that others pool from nor the
# sequences of their rows matter: a chunk has one.
WRITTEN = (
    takes(KvNormRopeStore, "eps", "beside", "tokens"),
    takes(Compressor, "ratio", "overlap", "tokens", "eps", "rotated", "beside", without=("owners",)),
)


def riding_of(request: Request, rows: int) -> Riding | No:
    """The state writes of a request, for the `rows` rows of its launch."""
    riders: list[Rider] = []
    values: dict[str, int] = {}
    for call in request.calls:
        if isinstance(call.op, QNormQuantize):
            continue
        bind = _window if isinstance(call.op, KvNormRopeStore) else _compressor
        rider = bind(request, call, rows, values)
        if isinstance(rider, No):
            return rider
        riders.append(rider)
    if len({rider.name for rider in riders}) < len(riders):
        return No("takes one window, one compressor of entries and one of index keys per launch")
    return Riding(tuple(riders), values)


def _shared(call: Call, operand: str, values: dict[str, int]) -> str:
    """A name among `values` for an operand that several riders may share."""
    number = call.operands[operand]
    taken = {v: n for n, v in values.items()}
    name = taken.get(number) or (operand if operand not in values else f"{operand}_{number}")
    values[name] = number
    return name


def _window(request: Request, call: Call, rows: int, values: dict[str, int]) -> Rider | No:
    op, x = call.op, call.operands
    assert isinstance(op, KvNormRopeStore)
    window, tokens = request.types[x["window"]], request.types[x["kv"]].shape[0]
    if tokens != rows:
        return No(f"stores a row of keys for each of the launch's {rows} rows, not {tokens}")
    if not format_name(window, CACHES):
        return No(f"stores {KV_FP8} or bf16, not {window}")
    spec = KvStoreSpec(
        window.shape[2],
        format_name(window, CACHES),
        window.shape[1],
        op.eps,
        op.beside or 0,
        op.tokens if op.beside else 1,
        0 if op.beside or rows <= window.shape[1] else rows,
        frequencies=_shared(call, "frequencies", values),
        positions=_shared(call, "positions", values),
        slots=_shared(call, "slots", values),
    )
    values |= {spec.kv: x["kv"], spec.gain: x["gain"], spec.window: x["window"]}
    if spec.capacity:
        values[spec.beside] = call.made[1]
    return spec


def _compressor(request: Request, call: Call, rows: int, values: dict[str, int]) -> Rider | No:
    op, x = call.op, call.operands
    assert isinstance(op, Compressor)
    entries, ring = request.types[x["entries"]], request.types[x["kv_ring"]]
    if not format_name(entries, CACHES):
        return No(f"stores {KV_FP8}, {MXFP4} or bf16, not {entries}")
    tokens = request.types[x["kv"]].shape[0]
    if tokens != rows:
        return No(f"compresses each of the launch's {rows} rows, not {tokens}")
    spec = CompressSpec(
        "index" if op.rotated else "compress",
        entries.shape[2],
        format_name(entries, CACHES),
        op.ratio,
        op.overlap,
        ring.shape[1],
        entries.shape[1],
        op.eps,
        hadamard=op.rotated,
        tokens=op.tokens,
        half="entries" if "owners" in x else "",
        frequencies=_shared(call, "frequencies", values),
        positions=_shared(call, "positions", values),
        slots=_shared(call, "slots", values),
    )
    values |= {spec.u: x["kv"], spec.s: x["gate"], spec.ape: x["bias"], spec.gain: x["gain"]}
    values |= {spec.kv_ring: x["kv_ring"], spec.score_ring: x["score_ring"], spec.entries: x["entries"]}
    return spec
