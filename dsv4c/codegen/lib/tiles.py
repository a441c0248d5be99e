"""Shapes of a GEMM of many rows: literals that the emitter plans with and the device code unrolls by. No
device code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsv4c.codegen.lib.shapes import BYTES, COLUMNS

EXPANDED = {  # whether a warpgroup makes of packed weights what tensor cores multiply
    ("fp8", "e4m3"): False,
    ("fp8", "bf16"): True,
    ("bf16", "bf16"): False,
    ("mxfp4", "e4m3"): True,
    ("nvfp4", "f16"): True,
    ("plain", "bf16"): False,  # rows as they are
}
"""The weight formats, and as what tensor cores multiply them."""


@dataclass(frozen=True)
class Tiles:
    """x[rows, k] times packed w[columns, k]^T on wgmma: tiles of `height` rows of x and 128 of w.

    Tensor cores multiply `kind` (e4m3, bf16, f16), 128 bytes of k a step. x in memory is e4m3 with a ue8m0
    scale per 128 (`scaled`) or bf16, rows `stride` bytes apart. `tiles` x `span`: how w is packed. `paired`:
    the tile's rows are 16 of one matrix and 16 of another in turn. Eight warps multiply; four more expand
    weights, where that is to be done; of the last four two copy x, two weights. Shared memory holds `stages`
    steps. Rows of `experts` take tiles of their own. `splits` CTAs of a cluster share a tile's k, and each
    adds up all of their sums for its part of the columns.
    """

    weight: str
    kind: str
    k: int
    stride: int
    height: int
    tiles: int
    span: int
    stages: int
    scaled: bool = True
    paired: bool = False
    experts: int = 0
    splits: int = 1

    CONSUMERS: ClassVar[int] = 256  # threads that multiply; the first
    COPIERS: ClassVar[int] = 64  # threads that copy x
    COLUMNS: ClassVar[int] = 128  # rows of w in a tile
    STEP: ClassVar[int] = 128  # bytes of k of an operand in a step
    FACTORS: ClassVar[int] = 1152  # bytes of a stage's factors
    UNITS: ClassVar[int] = 8  # of 16 rows, in a tile

    @property
    def expands(self) -> bool:
        """Whether weights are expanded."""
        return EXPANDED[self.weight, self.kind]

    @property
    def copiers(self) -> int:
        """The first thread that copies x; behind them are two warps that copy weights."""
        return self.CONSUMERS + 128 * self.expands

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return self.copiers + 128

    @property
    def each(self) -> int:
        """Columns of k in a step."""
        return self.STEP if self.kind == "e4m3" else self.STEP // 2

    @property
    def steps(self) -> int:
        """Steps of a tile that a CTA takes."""
        return self.k // self.each // self.splits

    @property
    def summed(self) -> int:
        """Groups of 8 columns of a warpgroup that a CTA adds up."""
        return self.wide // 8 // self.splits

    @property
    def blocks(self) -> int:
        """Blocks of 128 columns of k."""
        return -(-self.k // 128)

    @property
    def wide(self) -> int:
        """Columns of the tile that a warpgroup has: all for 64 of 128 rows, or half for 64 of 64."""
        return 128 if self.height == 128 else 64

    @property
    def made(self) -> int:
        """Columns of results of a tile."""
        return self.COLUMNS // 2 if self.paired else self.COLUMNS

    @property
    def promotes(self) -> bool:
        """Whether products of 128 columns are scaled on their own."""
        return self.weight not in ("bf16", "plain")

    @property
    def flight(self) -> int:
        """Steps whose products are in flight together: two where registers hold their sums, or where they
        have the same ones.
        """
        alone = self.kind == "e4m3" and self.expands
        return 1 if alone or self.steps % 2 else 2

    @property
    def apart(self) -> int:
        """Sums that the products in flight have: FP8's of each step are scaled on their own."""
        return self.flight if self.kind == "e4m3" else 1

    @property
    def row_factors(self) -> int:
        """Factors of a step per row of x: of both matrices' blocks, or one."""
        return 2 if self.paired and self.weight == "fp8" else int(self.promotes)

    @property
    def finish(self) -> float:
        """Power of two that sums lack in the end: NVFP4's scales carry the other half of what the bits do."""
        return 2.0**7 if self.weight == "nvfp4" else 1.0

    # Copies of weights: of `UNITS` tiles of 16 rows, `together` units of each along k.

    @property
    def unit(self) -> int:
        """Bytes of a packed unit."""
        return BYTES[self.weight]

    @property
    def per_unit(self) -> int:
        """Steps that a unit has columns for."""
        return COLUMNS[self.weight] // self.each

    @property
    def together(self) -> int:
        """Units of a tile that are copied at a time."""
        if not self.expands:
            return 1
        units = self.steps // self.per_unit
        return 2 if self.span % 2 == 0 and units % 2 == 0 else 1

    @property
    def run(self) -> int:
        """Tiles whose units lie one behind the other."""
        return min(self.tiles, self.UNITS) if self.span == self.together and not self.paired else 1

    @property
    def group_bytes(self) -> int:
        """Bytes of one group of `tiles` tiles of 16 rows of w."""
        return self.k // COLUMNS[self.weight] * self.tiles * self.unit

    @property
    def feeders(self) -> int:
        """Warps that copy weights."""
        return 0 if self.weight == "plain" else min(2, self.UNITS // self.run)

    @property
    def slot(self) -> int:
        """Bytes of units that are copied to be expanded at a time."""
        return self.UNITS * self.together * self.unit if self.expands else 0

    @property
    def slot_steps(self) -> int:
        """Steps that these are for."""
        return self.together * self.per_unit

    @property
    def slots(self) -> int:
        """How often shared memory holds these in front of those that expand them."""
        return (72 << 10) // self.slot if self.expands else 0

    @property
    def arrivals(self) -> int:
        """That fill a stage: of warps, and of threads whose copies of x have come."""
        warps = self.COPIERS // 32 + (4 if self.expands else self.feeders)
        return warps + (0 if self.kind == "f16" else self.COPIERS)

    @property
    def x_threads(self) -> int:
        """Threads that copy a row of x, 16 bytes each."""
        return 4 if self.kind == "f16" else 8

    @property
    def x_rows(self) -> int:
        """Rows of x that a thread copies parts of."""
        return self.height * self.x_threads // self.COPIERS

    # Shared memory: x, w, factors, units to expand, then what results go through, then barriers.

    @property
    def x_stage(self) -> int:
        return self.height * self.STEP

    @property
    def w_stage(self) -> int:
        return self.COLUMNS * self.STEP

    @property
    def o_w(self) -> int:
        return self.stages * self.x_stage

    @property
    def o_factors(self) -> int:
        """Per stage f32 [128] by row, then [128] by column, or by row for the second matrix, then one of the
        tile.
        """
        return self.o_w + self.stages * self.w_stage

    @property
    def o_slots(self) -> int:
        return self.o_factors + self.stages * self.FACTORS

    @property
    def pitch(self) -> int:
        """Bytes between rows of results on their way out: the pad keeps eight rows off each other's banks."""
        return 128 + 16

    @property
    def o_out(self) -> int:
        return self.o_slots + self.slots * self.slot

    @property
    def o_bars(self) -> int:
        """Stage i is full, then stage i is free, then slot i is full, then slot i is free."""
        return self.o_out + 8 * 16 * self.pitch

    @property
    def o_tiles(self) -> int:
        """Per expert how many tiles of rows it and those before it have."""
        return self.o_bars + 16 * (self.stages + self.slots)

    @property
    def shared(self) -> int:
        """Bytes; the stages start at a multiple of 1024."""
        return 1024 + self.o_tiles + 4 * self.experts

    @property
    def registers(self) -> tuple[int, int, int]:
        """Of a thread that multiplies, of one that expands, of one that copies."""
        if self.expands:
            return (160, 96, 96) if self.kind == "f16" else (168, 104, 72)
        return (224, 0, 56) if self.promotes else (168, 0, 168)


@dataclass(frozen=True)
class Few:
    """Rows of experts who have few: tiles of 128 rows of MXFP4 w, which tensor cores multiply out of
    registers, and of 16 rows of x, e4m3 with a ue8m0 scale per 128, rows `stride` bytes apart.

    Eight warps multiply, a warp copies weights, two copy x. `tiles` x `span`: how w is packed; a step is as
    many units along k as lie together, four at most. `paired`: of the tile's rows 64 are of one matrix and 64
    of another.
    """

    k: int
    stride: int
    tiles: int
    span: int
    experts: int
    paired: bool = False

    CONSUMERS: ClassVar[int] = 256  # threads that multiply; the first
    COPIERS: ClassVar[int] = 64  # threads that copy x; the last
    RESIDENT: ClassVar[int] = 2  # CTAs that fit an SM
    COLUMNS: ClassVar[int] = 128  # rows of w in a tile
    UNIT: ClassVar[int] = BYTES["mxfp4"]
    PITCH: ClassVar[int] = 4 * (128 + 4)  # bytes between rows of sums: padded off each other's banks
    ROWS: ClassVar[int] = 16  # of x in a tile
    FINISH: ClassVar[float] = 2.0**6  # what sums lack in the end

    @property
    def threads(self) -> int:
        """Of a CTA: a warp between those that multiply and those that copy x copies weights."""
        return self.CONSUMERS + 32 + self.COPIERS

    @property
    def height(self) -> int:
        """Rows of x in a tile."""
        return self.ROWS

    @property
    def blocks(self) -> int:
        """Blocks of 128 columns of k."""
        return self.k // 128

    @property
    def together(self) -> int:
        """Units along k in a step."""
        return min(self.span, 4)

    @property
    def steps(self) -> int:
        """Steps of a tile."""
        return self.blocks // self.together

    @property
    def stages(self) -> int:
        """Steps in shared memory: 87 KB of weights and rows in each of an SM's CTAs."""
        return 8 // self.together

    @property
    def made(self) -> int:
        """Columns of results of a tile."""
        return self.COLUMNS // 2 if self.paired else self.COLUMNS

    @property
    def group_bytes(self) -> int:
        """Bytes of one group of `tiles` tiles of 16 rows of w."""
        return self.blocks * self.tiles * self.UNIT

    @property
    def w_tile(self) -> int:
        """Bytes of a step of a tile of 16 rows."""
        return self.together * self.UNIT

    @property
    def w_stage(self) -> int:
        return 8 * self.w_tile

    @property
    def x_stage(self) -> int:
        return self.together * self.ROWS * 128

    @property
    def o_w(self) -> int:
        return self.stages * self.x_stage

    @property
    def o_factors(self) -> int:
        """Per stage and unit f32 [16]: scales of rows of x."""
        return self.o_w + self.stages * self.w_stage

    @property
    def o_sums(self) -> int:
        """f32 [16][128], what results are made of."""
        return self.o_factors + self.stages * self.together * self.ROWS * 4

    @property
    def o_bars(self) -> int:
        """Stage i is full, then stage i is free."""
        return self.o_sums + self.ROWS * self.PITCH

    @property
    def o_tiles(self) -> int:
        """Per expert how many tiles of rows it and those before it have."""
        return self.o_bars + 16 * self.stages

    @property
    def shared(self) -> int:
        """Bytes; the stages start at a multiple of 1024."""
        return 1024 + self.o_tiles + 4 * self.experts
