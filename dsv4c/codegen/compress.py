"""State writes of a decode step: the window's KV row, the compressors' rows and entries.

`KvStoreSpec` and `CompressSpec` are stages of one CTA per sequence, which rides in another launch: a skeleton
gives them CTAs of its own size (`templates/state_stages.py.jinja` holds the calls).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from dsv4c.codegen.emit import Parameter
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

    @property
    def row(self) -> Row:
        """The window's row."""
        return Row(self.width, self.format)

    @property
    def shared(self) -> int:
        """Bytes of shared memory: a sum of squares per warp of the row."""
        return self.row.lanes // 8

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


@dataclass(frozen=True)
class CompressSpec:
    """u, s f32[B, channels] -> rings f32[B, ring, channels]; at a window's last token its entry.

    Operand names are `name` and a suffix; `capacity` entries per sequence, Hadamard-transformed first if
    `hadamard`. `threads` are those of the CTA it rides on.
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
    def row(self) -> Row:
        """A row of the cache of entries."""
        return Row(self.width, self.format, self.hadamard)

    @property
    def pool(self) -> Pool:
        """The device library's view."""
        return Pool(self.row, self.ratio, self.overlap, self.ring, self.capacity, self.threads)

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
        return (*map(Parameter, names), *(Parameter(self.entries, c) for c in self.row.components))

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


Rider = KvStoreSpec | CompressSpec


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
        if rider.ring < rider.pool.tokens:
            raise BuildError(
                f"{name}: {rider.name} pools {rider.pool.tokens} tokens, its ring holds {rider.ring}"
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
