"""Shapes of a GEMV's streams: literals that the emitter plans with and the device code unrolls by. No device
code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv4c.numerics.forms import UNIT_BYTES, UNIT_COLUMNS

FORMATS = ("fp8", "bf16", "mxfp4", "nvfp4")
COLUMNS = {format: UNIT_COLUMNS[format] for format in FORMATS}
BYTES = {format: UNIT_BYTES[format] for format in FORMATS}

# Bytes of weights that a CTA has in flight. Two CTAs of 32 KB on each SM saturate the memory of an H200;
# behind more, what the next launch reads first (scales, activations) queues. A Flash step (H200, 2026-11-29)
# takes 1.010 times as long with 16 KB, 1.026 times with 48 KB.
IN_FLIGHT = 32 * 1024


def padded(experts: int) -> int:
    """Places for their scores: whole warps."""
    return -(-experts // 32) * 32


class Layout:
    """Arrays of a CTA's shared memory, bytes by name, one after the other from multiples of 16 on. Each name
    is the array's offset from the allocation, `end` where the last one ends.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> int: ...

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes
        self.end = 0
        for name, size in sizes.items():
            setattr(self, name, self.end)
            self.end += -(-size // 16) * 16


@dataclass(frozen=True)
class Product:
    """Which unit format meets which activations; `rows` is 1..8.

    `x` in shared memory is e4m3 or f16, with a power-of-two f32 scale per 128, or bf16 (for bf16 weights).
    """

    weight: str
    x: str
    rows: int
    k: int  # columns; x rows in shared memory are padded to whole units

    @property
    def units(self) -> int:
        """Units along k."""
        return -(-self.k // COLUMNS[self.weight])

    @property
    def x_stride(self) -> int:
        """Bytes between activation rows in shared memory; the pad keeps eight rows off each other's banks."""
        if self.x == "e4m3":
            return self.k + 32 * (self.rows > 1)
        pad = 16 if self.weight == "fp8" else 64  # of lanes that read 32 bytes in a row, or 16
        return 2 * self.units * COLUMNS[self.weight] + pad * (self.rows > 1)

    @property
    def x_bytes(self) -> int:
        """Shared bytes of the staged activation rows."""
        return self.rows * self.x_stride

    @property
    def fx_bytes(self) -> int:
        """Shared bytes of their scales, f32 [rows][units]."""
        return self.rows * self.units * 4 if self.x != "bf16" else 0

    @property
    def blocks(self) -> int:
        """Blocks of 128 columns of a row."""
        return -(-self.k // 128)

    def block_rounds(self, threads: int) -> int:
        """Rounds in which `threads` threads, 16 to a block, go over all blocks of 128 of the rows."""
        return -(-self.rows * self.blocks // (threads // 16))

    @property
    def finish(self) -> float:
        """Power of two that the accumulated products still lack where the bits of FP4 codes are placed."""
        if self.weight == "mxfp4":
            return 2.0**14  # e2m1 bits placed in an f16 are the value times 2^-14
        if self.weight == "nvfp4":
            return 2.0**7  # scales carry 2^7 of the 2^14, the rest would overflow f16
        return 1.0


@dataclass(frozen=True)
class Ring:
    """How the CTA's warps walk one packed weight format. The ring holds `stages` steps of all warps; one more
    warp keeps it full. `turns` is how often a CTA goes over up to `rounds` rounds, with activations of their
    own: the stream goes on meanwhile. An SM has room for `resident` such CTAs. `flight`: steps in flight at a
    time, 0 for as many as `IN_FLIGHT` says. Where two streams share the slots, one behind the other, `before`
    and `after` are steps of the other one, and `pitch` bytes a slot.
    """

    product: Product
    tile_warps: int
    k_warps: int
    span: int
    stages: int
    rounds: int = 1
    matrices: int = 1
    turns: int = 1
    resident: int = 2
    flight: int = 0
    before: int = 0
    after: int = 0
    pitch: int = 0

    @property
    def warps(self) -> int:
        """Warps of the CTA."""
        return self.matrices * self.tile_warps * self.k_warps

    @property
    def step_bytes(self) -> int:
        """Bytes of one step of one warp."""
        return self.span * BYTES[self.product.weight]

    @property
    def stride(self) -> int:
        """Bytes from one step of a warp to its next in the same tile."""
        return self.tile_warps * self.k_warps * self.step_bytes

    @property
    def steps(self) -> int:
        """Steps of one warp over one tile."""
        return self.product.units // (self.k_warps * self.span)

    @property
    def group_bytes(self) -> int:
        """Bytes of one group of `tile_warps` tiles of one matrix."""
        return self.steps * self.stride

    @property
    def sharing(self) -> int:
        """Warps that share a part of k."""
        return self.matrices * self.tile_warps

    def own_rounds(self, rows: int) -> int:
        """Rounds in which the warps of a part of k, a half-warp to a block, stage its blocks of the rows."""
        return -(-rows * (self.product.units // self.k_warps) // (2 * self.sharing))

    @property
    def depth(self) -> int:
        """Stages that the stream can use."""
        return min(self.stages, self.all_steps)

    @property
    def all_steps(self) -> int:
        """Steps that go through the slots."""
        return self.before + self.steps * self.rounds * self.turns + self.after

    @property
    def slot_bytes(self) -> int:
        """Bytes of one step of all warps."""
        return self.warps * self.step_bytes

    @property
    def ahead(self) -> int:
        """Steps in flight at a time, of what the CTAs of an SM should have so: no more, or, of a stream that
        turns make long, no less. (With 17 KB a CTA `experts_down` read 3.1 TB/s from the second turn on, with
        34 KB `experts_up` 4.3; H200, 2026-11-30.)
        """
        if self.flight:
            return min(self.flight, self.depth)
        wanted = 2 * IN_FLIGHT // self.resident
        steps = -(-wanted // self.slot_bytes) if self.turns > 1 else wanted // self.slot_bytes
        return max(1, min(steps, self.depth))

    @property
    def ring_bytes(self) -> int:
        """Shared bytes of the CTA's ring."""
        return self.depth * self.slot_pitch

    @property
    def slot_pitch(self) -> int:
        """Bytes from a slot to the next."""
        return self.pitch or self.slot_bytes

    @property
    def bars_bytes(self) -> int:
        """Shared bytes of its barriers: slot i is full, slot i is free."""
        return 2 * self.depth * 8

    @property
    def scale_bytes(self) -> int:
        """Shared bytes of the FP8 block scales of one matrix: f32 [rounds][tile warp][units]."""
        return self.rounds * self.tile_warps * self.product.units * 4 if self.product.weight == "fp8" else 0

    @property
    def part_bytes(self) -> int:
        """Shared bytes of the warps' partial sums: f32 [rounds][warps][rows][16]."""
        return self.rounds * self.warps * self.product.rows * 64


@dataclass(frozen=True)
class Seat:
    """A matrix's place in a launch: its `rows`, on `ctas` CTAs from number `first` of its part on."""

    rows: int
    first: int
    ctas: int


@dataclass(frozen=True)
class Products:
    """A part of a launch: matrices of one weight format times the same `batch` rows, of `groups` diagonal
    blocks, staged by `prologue` (`kernels.gemv.Activations` says which there are). `splits` neighboring CTAs
    share a seat: each takes `own` of the rows. `out` is the results' element type; an epilogue has its own.
    """

    ring: Ring
    prologue: str
    seats: tuple[Seat, ...]
    out: str
    batch: int
    splits: int = 1
    groups: int = 1
    eps: float = 0.0

    @property
    def consumers(self) -> int:
        """Threads that multiply; the last warp reads the weights."""
        return self.ring.warps * 32

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return self.consumers + 32

    @property
    def own(self) -> int:
        """Activation rows of a CTA."""
        return self.ring.product.rows

    @property
    def row_bytes(self) -> int:
        """Bytes of `k` columns of x in memory, without scales."""
        p = self.ring.product
        coded = self.prologue == "expand" or (self.prologue == "copy" and p.x == "e4m3")
        return p.k // 2 if self.prologue == "unpack" else p.k if coded else 2 * p.k

    @property
    def out_bytes(self) -> int:
        """Bytes of an element of a result."""
        return 2 if self.out == "bf16" else 4

    @property
    def at(self) -> Layout:
        """Shared arrays of a CTA."""
        r, p = self.ring, self.ring.product
        normed = {"squares": p.rows * p.blocks * 4, "gain": 4 * p.k} if self.prologue == "normalize" else {}
        return Layout(
            ring=r.ring_bytes,
            x=p.x_bytes,
            fx=p.fx_bytes,
            **normed,
            scale=r.scale_bytes,
            part=r.part_bytes,
            bars=r.bars_bytes,
            bar=8,
        )


@dataclass(frozen=True)
class UpPart:
    """Routed or shared half of the experts' first half. A job is a tile of w1 and the same of w3; `ctas` CTAs
    take them in turn, `jobs` of each token.

    `scores`, `sums` and `choice` are bytes of what the router keeps: before the stream, beside it, and to the
    end. Of the routed experts' jobs the first `sharing` CTAs have `fewer` each, behind one of the shared
    expert.
    """

    ring: Ring
    jobs: int
    ctas: int
    scores: int = 0
    sums: int = 0
    choice: int = 0
    sharing: int = 0
    fewer: int = 0

    @property
    def packing(self) -> str:
        """How the part's weights lie."""
        return f"{self.ring.product.weight}/{self.ring.tile_warps}x{self.ring.span}"

    @property
    def at(self) -> Layout:
        """Shared arrays of a CTA."""
        r = self.ring
        return Layout(
            ring=r.ring_bytes,
            x=r.product.x_bytes,
            fx=r.product.fx_bytes,
            scale=2 * r.scale_bytes,
            part=max(r.part_bytes, self.scores),
            sums=self.sums,
            choice=self.choice,
            bars=r.bars_bytes,
            bar=8,
        )


@dataclass(frozen=True)
class Up:
    """The experts' first half: CTAs of the `shared` expert, then `routed` ones', or both on the same
    (`joined`): the shared one's weights come while nobody knows which experts are chosen. `source` says
    whence a token's experts and their weights are, score / sum of scores * `factor`: of largest score + bias
    by logits ("scores"), or of a table, with the logits ("table") or with products of a row and their rows of
    the gate ("rows"). `limit`: of SwiGLU. `packed`: rows are NVFP4 in memory. `stored`: weights go to memory.
    `judged`: rows of position -1 have weights of 0, and no turn where rows take turns.
    """

    shared: UpPart
    routed: UpPart
    experts: int
    top_k: int
    source: str
    factor: float
    limit: float
    packed: bool = False
    stored: bool = True
    judged: bool = False

    @property
    def hidden(self) -> int:
        """Columns of x."""
        return self.routed.ring.product.k

    @property
    def tiles(self) -> int:
        """Tiles of 16 hidden columns."""
        return self.shared.jobs

    @property
    def intermediate(self) -> int:
        """Hidden columns."""
        return 16 * self.tiles

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of x in memory, without scales."""
        coded = self.hidden if self.routed.ring.product.x == "f16" else 2 * self.hidden
        return self.hidden // 2 if self.packed else coded

    @property
    def skips(self) -> bool:
        """Do rows that are not there take no turn?"""
        return self.judged and self.routed.ring.turns > 1

    @property
    def padded(self) -> int:
        """Places for scores."""
        return padded(self.experts)

    @property
    def held(self) -> int:
        """Pieces of the gate's rows that a thread reads before its wait."""
        return min(2, -(-self.hidden // (8 * self.consumers)))

    @property
    def consumers(self) -> int:
        """Threads that multiply; the last warp reads the weights."""
        return self.routed.ring.warps * 32

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return self.consumers + 32

    @property
    def joined(self) -> bool:
        """Whether CTAs have jobs of the shared expert, then of routed ones."""
        return self.routed.sharing > 0

    @property
    def both(self) -> Layout:
        """Shared arrays of such a CTA. The shared expert's ring, with its scales behind it, lies where the
        routed experts' will be.
        """
        r = self.shared.ring
        return Layout(**self.routed.at.sizes, shared_part=r.part_bytes, shared_bars=r.bars_bytes)

    @property
    def bytes(self) -> int:
        """Shared memory of a CTA."""
        return self.both.end if self.joined else max(self.shared.at.end, self.routed.at.end)


@dataclass(frozen=True)
class Down:
    """Both streams of a CTA of the experts' second half: the `shared` expert's tiles for all tokens, then for
    each token those of every `routed` expert, a round each, with its hidden `rows`, together. `by` says what
    the experts are known by before the wait: "scores", "table" or nothing; where it `skips`, rows that are
    not there take no turn. `packed`: rows are NVFP4 in memory. `out` is the result's element type.
    """

    shared: Ring
    routed: Ring
    rows: Product
    hidden: int
    experts: int
    top_k: int
    by: str = ""
    out: str = "bf16"
    packed: bool = False
    skips: bool = False

    @property
    def quantized(self) -> bool:
        """Whether rows meet the weights as FP8 or NVFP4."""
        return self.rows.x != "bf16"

    @property
    def row_bytes(self) -> int:
        """Bytes of a hidden row in memory, without scales."""
        return self.rows.k // 2 if self.packed else 2 * self.rows.k

    @property
    def tiles(self) -> int:
        """Tiles of 16 columns."""
        return self.hidden // 16

    @property
    def groups(self) -> int:
        """Groups of `tile_warps` tiles of a matrix."""
        return -(-self.hidden // (16 * self.routed.tile_warps))

    @property
    def beside(self) -> int:
        """Tiles of a CTA."""
        return self.routed.tile_warps * self.routed.matrices

    @property
    def summing(self) -> int:
        """Warps that sum up what all have left."""
        return (self.beside + 1) // 2

    @property
    def early(self) -> int:
        """Steps of the first token that are read as soon as its experts are known."""
        free = max(self.routed.depth - self.routed.before, 0)
        return min(free, self.top_k * self.routed.steps)

    @property
    def joined(self) -> bool:
        """Whether both streams take the same slots, one behind the other."""
        return self.routed.before > 0

    @property
    def padded(self) -> int:
        """Places for scores."""
        return padded(self.experts)

    @property
    def consumers(self) -> int:
        """Threads that multiply; the last warp reads the weights."""
        return self.routed.warps * 32

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return self.consumers + 32

    @property
    def window(self) -> int:
        """Rounds whose partial sums are kept: a token's, and those that a warp may be ahead of one that adds
        them up, as far as the ring is deep.
        """
        ahead = -(-self.routed.depth // self.routed.steps) if self.routed.turns > 1 else 0
        return self.routed.rounds + ahead

    @property
    def at(self) -> Layout:
        """Shared arrays of a CTA."""
        return Layout(
            ring=self.routed.ring_bytes,
            shared_ring=0 if self.joined else self.shared.ring_bytes,
            x=self.rows.x_bytes,
            fx=self.rows.fx_bytes,
            shared_x=self.shared.product.x_bytes,
            shared_fx=self.shared.product.fx_bytes,
            scale=self.routed.scale_bytes,
            shared_scale=self.shared.scale_bytes,
            part=self.window * (self.routed.part_bytes // self.routed.rounds),
            shared_part=self.shared.part_bytes,
            bars=self.routed.bars_bytes,
            shared_bars=0 if self.joined else self.shared.bars_bytes,
            bar=0 if self.rows.fx_bytes else 16,
            own=self.routed.own_rounds(self.rows.rows) * self.consumers * 16 if self.routed.turns > 1 else 0,
        )
