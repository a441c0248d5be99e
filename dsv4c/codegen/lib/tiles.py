"""Shapes of a GEMM of many rows: literals that the emitter plans with and the device code unrolls by. No
device code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsv4c.codegen.lib.shapes import BYTES, COLUMNS

WIDENED = {  # whether weights are widened before tensor cores multiply them
    ("fp8", True): False,
    ("fp8", False): True,
    ("bf16", False): False,
    ("mxfp4", True): True,
    ("nvfp4", True): True,
    ("plain", False): False,  # rows as they are
}
"""The weight formats, and whether rows of x are e4m3 with scales, else bf16."""


@dataclass(frozen=True)
class Tiles:
    """x[rows, k] times packed w[columns, k]^T on wgmma, both as they are: tiles of `height` rows of x and 128
    of w, 128 bytes of k a step.

    x in memory is e4m3 with a ue8m0 scale per 128 (`scaled`) or bf16, rows `stride` bytes apart. `tiles`: how
    w is packed. `paired`: the tile's rows are 16 of one matrix and 16 of another in turn. Eight warps
    multiply, two copy x, two weights; shared memory holds `stages` steps. Rows of `experts` take tiles of
    their own. `splits` CTAs of a cluster share a tile's k, and each adds up all of their sums for its part of
    the columns.
    """

    weight: str
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
    COPIERS: ClassVar[int] = 64  # threads that copy x; two warps that copy weights are the last
    COLUMNS: ClassVar[int] = 128  # rows of w in a tile
    STEP: ClassVar[int] = 128  # bytes of k of an operand in a step
    FACTORS: ClassVar[int] = 1024  # bytes of a stage's factors
    UNITS: ClassVar[int] = 8  # of 16 rows, in a tile

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return self.CONSUMERS + 128

    @property
    def each(self) -> int:
        """Columns of k in a step."""
        return self.STEP if self.scaled else self.STEP // 2

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
    def flight(self) -> int:
        """Steps whose products are in flight together."""
        return 1 if self.steps % 2 else 2

    @property
    def apart(self) -> int:
        """Sums that these have: FP8's of each step are scaled on their own."""
        return self.flight if self.scaled else 1

    @property
    def row_factors(self) -> int:
        """Factors of a step per row of x: of both matrices' blocks, or one."""
        return int(self.scaled) * (2 if self.paired else 1)

    @property
    def unit(self) -> int:
        """Bytes of a packed unit: what a step has of 16 rows."""
        return BYTES[self.weight]

    @property
    def run(self) -> int:
        """Tiles of 16 rows whose units lie one behind the other."""
        return min(self.tiles, self.UNITS) if self.span == 1 and not self.paired else 1

    @property
    def group_bytes(self) -> int:
        """Bytes of one group of `tiles` tiles of 16 rows of w."""
        return self.k // COLUMNS[self.weight] * self.tiles * self.unit

    @property
    def feeders(self) -> int:
        """Warps that copy weights."""
        return 0 if self.weight == "plain" else min(2, self.UNITS // self.run)

    @property
    def arrivals(self) -> int:
        """That fill a stage: of warps, and of threads whose copies of x have come."""
        return self.COPIERS // 32 + self.feeders + self.COPIERS

    @property
    def x_rows(self) -> int:
        """Rows of x that a thread copies 16 bytes of."""
        return self.height * 8 // self.COPIERS

    # Shared memory: x, w, factors, then what results go through, then barriers.

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
        """Per stage f32 [128] by row, for one matrix or two."""
        return self.o_w + self.stages * self.w_stage

    @property
    def pitch(self) -> int:
        """Bytes between rows of results on their way out: the pad keeps eight rows off each other's banks."""
        return 128 + 16

    @property
    def o_out(self) -> int:
        return self.o_factors + self.stages * self.FACTORS

    @property
    def o_bars(self) -> int:
        """Stage i is full, then stage i is free."""
        return self.o_out + 8 * 16 * self.pitch

    @property
    def o_tiles(self) -> int:
        """Per expert how many tiles of rows it and those before it have."""
        return self.o_bars + 16 * self.stages

    @property
    def shared(self) -> int:
        """Bytes; the stages start at a multiple of 1024."""
        return 1024 + self.o_tiles + 4 * self.experts

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that multiplies, and of one that copies."""
        return (224, 56) if self.scaled else (168, 168)


@dataclass(frozen=True)
class Widened:
    """x[rows, k] times packed w[columns, k]^T on wgmma where weights have to be widened: tiles of 128 rows of
    w, out of registers, and of up to `rows` rows of x, 16 or 128, of which an instruction takes as many as
    there are, by one of `widths`.

    x in memory is e4m3 with a ue8m0 scale per 128 (`scaled`), and becomes f16, or bf16, rows `stride` bytes
    apart. `tiles` x `span`: how w is packed. `paired`: of the tile's rows 64 are of one matrix and 64 of
    another. Eight warps widen and multiply, `copiers` warps copy. Rows of `experts` take tiles of their own.
    """

    weight: str
    k: int
    stride: int
    rows: int
    tiles: int
    span: int
    scaled: bool = True
    paired: bool = False
    experts: int = 0

    CONSUMERS: ClassVar[int] = 256  # threads that multiply; the first
    COLUMNS: ClassVar[int] = 128  # rows of w in a tile

    @property
    def few(self) -> bool:
        """Whether what a tile takes is to read its weights."""
        return self.rows == 16

    @property
    def resident(self) -> int:
        """CTAs that fit an SM."""
        return 2 if self.few else 1

    @property
    def copiers(self) -> int:
        """Warps that copy."""
        return 2 if self.few else 4

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return self.CONSUMERS + 32 * self.copiers

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that multiplies, and of one that copies, where they have not equally many."""
        return 200, 104

    @property
    def widths(self) -> tuple[int, ...]:
        """Rows of x of an instruction: the least of them that a tile's rows fit."""
        return (16,) if self.few else (32, 64, 96, 112, 128)

    @property
    def height(self) -> int:
        """Rows of x in a tile."""
        return self.rows

    @property
    def own_rows(self) -> int:
        """Rows of x that a lane copies parts of."""
        return self.rows // (8 * self.copiers)

    @property
    def part(self) -> int:
        """Bytes of 32 columns of a row of x in memory."""
        return 32 if self.scaled else 64

    @property
    def blocks(self) -> int:
        """Blocks of 128 columns of k, which a unit has."""
        return self.k // 128

    @property
    def together(self) -> int:
        """Units along k in a step: where weights are most of it, as many as lie together, two at most."""
        return min(self.span, 2) if self.few else 1

    @property
    def steps(self) -> int:
        """Steps of a tile."""
        return self.blocks // self.together

    @property
    def stages(self) -> int:
        """Steps in shared memory: what leaves room for two CTAs on an SM, or four."""
        return 104_000 // (self.x_stage + self.w_stage + self.together * self.rows * 4) if self.few else 4

    @property
    def made(self) -> int:
        """Columns of results of a tile."""
        return self.COLUMNS // 2 if self.paired else self.COLUMNS

    @property
    def unit(self) -> int:
        """Bytes of a packed unit."""
        return BYTES[self.weight]

    @property
    def finish(self) -> float:
        """Power of two that sums lack in the end: NVFP4's scales carry the other half of what the bits do."""
        return 2.0**7 if self.weight == "nvfp4" else 1.0

    @property
    def group_bytes(self) -> int:
        """Bytes of one group of `tiles` tiles of 16 rows of w."""
        return self.blocks * self.tiles * self.unit

    @property
    def w_tile(self) -> int:
        """Bytes of a step of a tile of 16 rows."""
        return self.together * self.unit

    @property
    def w_stage(self) -> int:
        return 8 * self.w_tile

    @property
    def x_stage(self) -> int:
        """Two times 64 columns for each unit."""
        return self.together * 2 * self.rows * 128

    @property
    def o_w(self) -> int:
        return self.stages * self.x_stage

    @property
    def o_factors(self) -> int:
        """Per stage and unit f32 [rows]: scales of rows of x."""
        return self.o_w + self.stages * self.w_stage

    @property
    def o_sums(self) -> int:
        """f32 [16][128], what results are made of."""
        return self.o_factors + self.stages * self.together * self.rows * 4

    @property
    def o_bars(self) -> int:
        """Stage i is full, then stage i is free."""
        return self.o_sums + 16 * 4 * (128 + 4)

    @property
    def o_tiles(self) -> int:
        """Per expert how many tiles of rows it and those before it have."""
        return self.o_bars + 16 * self.stages

    @property
    def shared(self) -> int:
        """Bytes; the stages start at a multiple of 1024."""
        return 1024 + self.o_tiles + 4 * self.experts
