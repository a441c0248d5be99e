"""State writes of a decode step in one launch: the window's KV row, the compressors' rows and entries.

`KvStoreSpec` and `CompressSpec` are stages of one CTA per sequence; a skeleton may give them CTAs of another
launch (`templates/state_stages.py.jinja` holds the calls). `emit_state_update` launches them by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dsv4c.codegen.emit import Emission, Parameter, floor_us, render
from dsv4c.codegen.lib.geometry import Pool, Row
from dsv4c.errors import BuildError

THREADS = 256
FORMATS = {"fp8": "q[e4m3,ue8m0,1x64,tail=64]", "bf16": "bf16", "mxfp4": "q[e2m1,ue8m0,1x32]"}


@dataclass(frozen=True)
class KvStoreSpec:
    """kv bf16[B, width] -> norm with gain, RoPE, the window's format, slot position % ring."""

    width: int
    format: str
    ring: int
    eps: float
    name: str = "kv_store"
    kv: str = "kv"
    gain: str = "kv_norm"
    frequencies: str = "frequencies"
    positions: str = "positions"
    window: str = "window"
    kind: ClassVar[str] = "kv_store"
    shared: ClassVar[int] = 16

    @property
    def row(self) -> Row:
        """The window's row."""
        return Row(self.width, self.format)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """In ABI order."""
        names = (self.kv, self.gain, self.frequencies, self.positions)
        return (*map(Parameter, names), *(Parameter(self.window, c) for c in self.row.components))

    @property
    def text(self) -> str:
        """What the stage computes."""
        return (
            f"{self.window}: {FORMATS[self.format]}[B,{self.ring},{self.width}] at position % {self.ring}\n"
            f"        <- rope(rms_norm({self.kv}: bf16[B,{self.width}], {self.gain}: bf16[{self.width}], "
            f"eps={self.eps}), position)"
        )

    @property
    def nbytes(self) -> int:
        """Bytes read and written per sequence."""
        return self.width * 4


@dataclass(frozen=True)
class CompressSpec:
    """u, s f32[B, channels] -> rings f32[B, ring, channels]; at a window's last token its entry.

    Operand names are `name` and a suffix; `capacity` entries per sequence, Hadamard-transformed first if
    `hadamard`.
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
    frequencies: str = "frequencies"
    positions: str = "positions"
    kind: ClassVar[str] = "compress"

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
    def pool(self) -> Pool:
        """The device library's view."""
        row = Row(self.width, self.format, self.hadamard)
        return Pool(row, self.ratio, self.overlap, self.ring, self.capacity, self.threads)

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.pool.shared

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """In ABI order."""
        names = (
            self.u,
            self.s,
            self.ape,
            self.gain,
            self.frequencies,
            self.positions,
            self.kv_ring,
            self.score_ring,
        )
        return (*map(Parameter, names), *(Parameter(self.entries, c) for c in self.pool.row.components))

    @property
    def text(self) -> str:
        """What the stage computes."""
        c, width = self.pool.channels, self.width
        entry = f"rope(rms_norm(bf16(pooled), {self.gain}: bf16[{width}], eps={self.eps}), w * {self.ratio})"
        if self.hadamard:
            entry = f"hadamard({entry})"
        return (
            f"{self.kv_ring}, {self.score_ring}: f32[B,{self.ring},{c}] at row position % {self.ring}\n"
            f"        <- {self.u}, {self.s}: f32[B,{c}] + {self.ape}: f32[{self.ratio},{c}]\n"
            f"    {self.entries}: {FORMATS[self.format]}[B,{self.capacity},{width}] at w, "
            f"when (position + 1) % {self.ratio} == 0\n"
            f"        <- {entry}, softmax pooling over {self.pool.tokens} tokens"
        )

    @property
    def nbytes(self) -> int:
        """Bytes read and written per sequence when the window closes."""
        return self.pool.channels * 16 + self.pool.tokens * self.width * 8


@dataclass(frozen=True)
class StateUpdateSpec:
    """One launch: the window's row and any number of compressors, for `batch` sequences."""

    name: str
    batch: int
    kv_store: KvStoreSpec
    compressors: tuple[CompressSpec, ...] = ()


def emit_state_update(spec: StateUpdateSpec) -> Emission:
    """The kernel of a spec: CTA p * batch + b does stage p for sequence b. Raises BuildError."""
    parts: Sequence[KvStoreSpec | CompressSpec] = (spec.kv_store, *spec.compressors)
    for part in parts:
        check_row(spec.name, part.row if isinstance(part, KvStoreSpec) else part.pool.row)
        if isinstance(part, CompressSpec) and part.ring < part.pool.tokens:
            raise BuildError(
                f"{spec.name}: {part.name} pools {part.pool.tokens} tokens, its ring holds {part.ring}"
            )
    parameters = tuple(dict.fromkeys(p for part in parts for p in part.parameters))
    shared = max(part.shared for part in parts)
    grid = spec.batch * len(parts)
    nbytes = spec.batch * sum(part.nbytes for part in parts)
    source = render(
        "state_update.py.jinja",
        spec=spec,
        parts=parts,
        pointers=[p.name for p in parameters],
        signature=f"B = {spec.batch}; positions: i32[B], -1 for none (writes nothing); frequencies: f32[32].",
        grid=grid,
        threads=THREADS,
        shared=shared,
        nbytes=nbytes,
        floor=floor_us(nbytes),
    )
    return Emission(f"{spec.name}_0", source, (grid, 1, 1), THREADS, shared, parameters)


def check_row(name: str, row: Row) -> None:
    """Raise BuildError unless the device library can hold the row."""
    if (row.format == "mxfp4" or row.hadamard) and row.width != 128:
        raise BuildError(
            f"{name}: MXFP4 and Hadamard rows must be 128 wide (one warp holds them), got {row.width}"
        )
    if row.width % 128 or not 128 <= row.width <= THREADS * 4:
        raise BuildError(f"{name}: rows must be a multiple of 128 up to {THREADS * 4} wide, got {row.width}")
