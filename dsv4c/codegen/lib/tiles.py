"""Shapes of a GEMM of many rows: literals that the emitter plans with and the device code unrolls by. No
device code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsv4c.codegen.lib.shapes import BYTES, COLUMNS

PIECES = {  # 16-byte pieces of packed weights that a loading thread widens of a step of 128 rows; else copies
    ("fp8", "e4m3"): 0,
    ("fp8", "bf16"): 4,
    ("bf16", "bf16"): 0,
    ("mxfp4", "e4m3"): 0,  # warps of their own expand it
    ("nvfp4", "f16"): 2,
    ("plain", "bf16"): 0,  # BF16 rows as they are: copied
}
"""The weight formats, and as what tensor cores multiply them."""


@dataclass(frozen=True)
class Tiles:
    """x[rows, k] times packed w[columns, k]^T on wgmma: tiles of `height` rows of x and 128 of w.

    Tensor cores multiply `kind` (e4m3, bf16, f16), 128 bytes of k a step. x in memory is e4m3 with a ue8m0
    scale per 128 (`scaled`) or bf16, rows `stride` bytes apart. `tiles` x `span`: how w is packed. `paired`:
    the tile's rows are `pair` times 16 of one matrix and as many of another in turn. Eight warps multiply;
    `loaders` times four lay down steps, `stages` of which shared memory holds, and each four hold `ahead` of
    their own in registers, or what scales them. Of MXFP4 eight expand weights, and of four more two copy x,
    two weights. Rows of `experts` take tiles of their own. `splits` CTAs of a cluster share a tile's k, and
    each adds up all of their sums for its part of the columns.

    What limits tiles is the 128 bytes a cycle that shared memory and L1 share. A step of 128 rows moves 48 KB
    of operands to tensor cores, which take 384 cycles of their 512, and 16 KB each of x and of w, or of w
    that is widened twice that: hence 256 rows where there are that many tiles. With copies of 16 bytes by
    threads a product of 512 rows took 1.4 times as long as with boxes (H200, 2026-11-30).
    """

    weight: str
    kind: str
    k: int
    stride: int
    height: int
    tiles: int
    span: int
    stages: int
    loaders: int
    ahead: int
    scaled: bool = True
    paired: bool = False
    experts: int = 0
    splits: int = 1

    CONSUMERS: ClassVar[int] = 256  # threads that multiply; the first
    COLUMNS: ClassVar[int] = 128  # rows of w in a tile
    STEP: ClassVar[int] = 128  # bytes of k of an operand in a step
    UNITS: ClassVar[int] = 8  # of 16 rows, in a tile
    COPIERS: ClassVar[int] = 64  # threads that copy x where warps of their own expand w
    FEEDERS: ClassVar[int] = 2  # warps that copy w there
    EXPANDERS: ClassVar[int] = 8  # warps that expand it

    @property
    def expands(self) -> bool:
        """Whether warps of their own expand w, which is copied as it is packed."""
        return self.weight == "mxfp4"

    @property
    def boxed(self) -> bool:
        """Whether x, whose rows follow each other, is copied by boxes of a tensor map."""
        return self.kind != "f16" and not self.expands and not self.experts

    @property
    def run(self) -> int:
        """Units of a tile that one copy brings: as many as follow each other, of paired ones half of those of
        a matrix where two warpgroups share a tile's columns. 0 where threads copy or widen them.
        """
        if not self.boxed or self.pieces or (8 % self.tiles and self.tiles % 8):
            return 0
        return self.pair if self.paired else self.UNITS

    @property
    def early(self) -> int:
        """Steps whose weights are on their way before the rows that a launch before makes."""
        return min(self.stages, self.steps) if self.run else 0

    @property
    def pair(self) -> int:
        """Units of one of paired matrices in a row of a tile: half of what a warpgroup has, or, of FP4, 1."""
        return 1 if self.weight in ("mxfp4", "nvfp4") else self.wide // 32

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return self.CONSUMERS + (32 * self.EXPANDERS + 128 if self.expands else 128 * self.loaders)

    @property
    def each(self) -> int:
        """Columns of k in a step."""
        return self.STEP if self.kind == "e4m3" else self.STEP // 2

    @property
    def steps(self) -> int:
        """Steps of a tile that a CTA takes."""
        return self.k // self.each // self.splits

    @property
    def halves(self) -> int:
        """Times 64 rows that a warpgroup multiplies, one after the other."""
        return max(1, self.height // 128)

    @property
    def summed(self) -> int:
        """Groups of 8 columns of a warpgroup that a CTA adds up, of each 64 rows."""
        return self.wide // 8 // self.splits

    @property
    def blocks(self) -> int:
        """Blocks of 128 columns of k."""
        return -(-self.k // 128)

    @property
    def wide(self) -> int:
        """Columns of the tile that a warpgroup has: all for half of the rows, or half for 64 of 64."""
        return 64 if self.height == 64 else 128

    @property
    def made(self) -> int:
        """Columns of results of a tile."""
        return self.COLUMNS // 2 if self.paired else self.COLUMNS

    @property
    def promotes(self) -> bool:
        """Whether each step's products are scaled on their own, and not added up by tensor cores."""
        return self.scaled

    @property
    def row_factors(self) -> int:
        """Factors of a step per row of x: of both matrices' blocks, or one."""
        return 2 if self.paired and self.weight == "fp8" else int(self.promotes)

    @property
    def factors(self) -> int:
        """Bytes of a stage's factors."""
        return 2 * self.row_bytes + 128

    @property
    def row_bytes(self) -> int:
        """Bytes of factors of the tile's rows, or of its columns."""
        return 4 * max(self.height, self.COLUMNS)

    @property
    def pieces(self) -> int:
        """16-byte pieces of weights that a loading thread widens of a step, 0 where they are copied."""
        return PIECES[self.weight, self.kind]

    @property
    def words(self) -> int:
        """Registers of a step that a loading thread holds: codes, block scales, what of x it converts."""
        scales = int(self.weight == "nvfp4")
        return self.pieces * (4 + scales) + (4 * self.own_rows if self.kind == "f16" else 0)

    @property
    def arrivals(self) -> int:
        """That fill a stage: each warp's, and each thread's when its copies have come."""
        if self.expands:
            return self.EXPANDERS + self.COPIERS // 32 + self.COPIERS
        copied = self.kind != "f16" and not (self.boxed and (self.pieces or self.run))
        return 4 + 128 * copied

    @property
    def row_step(self) -> int:
        """How far apart the rows are that a thread lays pieces of 16 bytes of."""
        if self.expands:
            return self.COPIERS // 8
        return 32 if self.kind == "f16" else 16

    @property
    def own_rows(self) -> int:
        """How many these are."""
        return self.height // self.row_step

    # Copies of weights that are expanded: of `UNITS` tiles of 16 rows, `together` units of each along k.

    @property
    def together(self) -> int:
        """Units of a tile that are copied at a time, and expanded in as many steps."""
        return 2 if self.span % 2 == 0 and self.steps % 2 == 0 else 1

    @property
    def slot(self) -> int:
        """Bytes that are copied at a time."""
        return self.UNITS * self.together * self.unit if self.expands else 0

    @property
    def slots(self) -> int:
        """How often shared memory holds these in front of those that expand them."""
        return (72 << 10) // self.slot if self.expands else 0

    @property
    def part_bytes(self) -> int:
        """From one step's columns of an NVFP4 unit to the next one's."""
        return 512

    @property
    def unit(self) -> int:
        """Bytes of a packed unit."""
        return BYTES[self.weight]

    @property
    def finish(self) -> float:
        """Power of two that sums lack in the end: NVFP4's scales carry the other half of what the bits do."""
        return 2.0**7 if self.weight == "nvfp4" else 1.0

    @property
    def per_unit(self) -> int:
        """Steps that a unit has columns for."""
        return COLUMNS[self.weight] // self.each

    @property
    def group_bytes(self) -> int:
        """Bytes of one group of `tiles` tiles of 16 rows of w."""
        return self.k // COLUMNS[self.weight] * self.tiles * self.unit

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
        """Per stage f32 by row, then by column, or by row for the second matrix, then one of the tile."""
        return self.o_w + self.stages * self.w_stage

    @property
    def o_slots(self) -> int:
        return self.o_factors + self.stages * self.factors

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
    def registers(self) -> tuple[int, ...]:
        """Of a thread that multiplies, and of one that loads, or expands, and of one that copies."""
        if self.expands:
            return 144, 64, 64
        if self.loaders == 2:
            return 160, 96
        return (216, 72) if self.halves > 1 else (192, 120)


@dataclass(frozen=True)
class Columns:
    """A matrix of `rows` rows, or two that are paired, in a launch: from column tile `first` on."""

    rows: int
    first: int


@dataclass(frozen=True)
class Gemm:
    """A launch: tiles of up to `rows` rows of x, `counted` on the device, and of all matrices that have
    `seats`, which `ctas` CTAs or clusters take in turn. Results have `size` bytes, 2 for bf16 or 4 for f32.
    Of `groups` of rows [M, groups, k] matrix rows of as many parts have one each. Row n of experts' results
    is that of row n / `divide` of x. `limit`: of SwiGLU of paired results.
    """

    tiles: Tiles
    seats: tuple[Columns, ...]
    rows: int
    ctas: int
    size: int = 2
    groups: int = 1
    divide: int = 1
    counted: bool = False
    limit: float = 0.0

    @property
    def column_tiles(self) -> int:
        """Tiles of columns of all matrices."""
        return self.seats[-1].first + -(-self.seats[-1].rows // self.tiles.made)

    @property
    def expert_bytes(self) -> int:
        """From one expert's weights of a matrix to the next one's."""
        return -(-self.seats[0].rows // (16 * self.tiles.tiles)) * self.tiles.group_bytes

    @property
    def expert_scales(self) -> int:
        """From one expert's FP8 block scales to the next one's."""
        return -(-self.seats[0].rows // 128) * self.tiles.blocks


@dataclass(frozen=True)
class Few:
    """Rows of experts who have few: tiles of 128 rows of MXFP4 w and of 16 rows of x, e4m3 with a ue8m0 scale
    per 128, rows `stride` bytes apart. Both are multiplied as f16.

    Eight warps multiply, another copies weights, the last one rows of x. `tiles` x `span`: how w is packed; a
    step is two units along k that lie together. `paired`: of the tile's rows 64 are of one matrix and 64 of
    another.
    """

    k: int
    stride: int
    tiles: int
    span: int
    experts: int
    paired: bool = False

    CONSUMERS: ClassVar[int] = 256  # threads that multiply; the first
    PLACES: ClassVar[int] = 4  # of 32 rows of w
    TOGETHER: ClassVar[int] = 2  # units along k in a step, each for another warp
    STAGES: ClassVar[int] = 4  # steps of weights in shared memory, 70 KB in each of an SM's CTAs
    X_STAGES: ClassVar[int] = 2  # of rows of x, 16 KB
    AHEAD: ClassVar[int] = 2  # steps of rows on their way to registers
    RESIDENT: ClassVar[int] = 2  # CTAs that fit an SM
    COLUMNS: ClassVar[int] = 128  # rows of w in a tile
    UNIT: ClassVar[int] = BYTES["mxfp4"]
    PITCH: ClassVar[int] = 4 * (128 + 4)  # bytes between rows of sums: padded off each other's banks
    ROWS: ClassVar[int] = 16  # of x in a tile; 24 took 1.06 to 1.07 times as long on an H200
    X_CHUNK: ClassVar[int] = ROWS * 32 * 2  # bytes of 32 columns of rows of x
    X_UNIT: ClassVar[int] = 4 * X_CHUNK  # of a unit's columns
    F_STAGE: ClassVar[int] = TOGETHER * ROWS * 4  # bytes of a step's scales of x
    NUMBERS: ClassVar[int] = 4 * (1 + ROWS)  # bytes that say how many rows a tile has, and which
    FINISH: ClassVar[float] = 2.0**14  # what sums lack in the end

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return self.CONSUMERS + 64

    @property
    def height(self) -> int:
        """Rows of x in a tile."""
        return self.ROWS

    @property
    def blocks(self) -> int:
        """Blocks of 128 columns of k."""
        return self.k // 128

    @property
    def covered(self) -> bool:
        """Whether k is whole steps of units that lie together, and whole groups of the packing."""
        lying = self.blocks if self.tiles == 1 else self.span
        return self.blocks % self.span == 0 and lying % self.TOGETHER == 0 and self.steps % self.AHEAD == 0

    @property
    def steps(self) -> int:
        """Steps of a tile."""
        return self.blocks // self.TOGETHER

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
        return self.TOGETHER * self.UNIT

    @property
    def w_stage(self) -> int:
        return 8 * self.w_tile

    @property
    def x_stage(self) -> int:
        return self.TOGETHER * self.X_UNIT

    @property
    def o_w(self) -> int:
        return self.X_STAGES * self.x_stage

    @property
    def o_factors(self) -> int:
        """Per stage of rows and unit f32 [height]: scales of rows of x."""
        return self.o_w + self.STAGES * self.w_stage

    @property
    def o_sums(self) -> int:
        """f32 [height][128], what results are made of."""
        return self.o_factors + self.X_STAGES * self.F_STAGE

    @property
    def o_bars(self) -> int:
        """Stage i of weights is full, then it is free, then the next one."""
        return self.o_sums + self.ROWS * self.PITCH

    @property
    def o_x_bars(self) -> int:
        """The same of rows of x."""
        return self.o_bars + 16 * self.STAGES

    @property
    def o_numbers(self) -> int:
        """Of this tile and of the next one, what its rows are."""
        return self.o_x_bars + 16 * self.X_STAGES

    @property
    def o_tiles(self) -> int:
        """Per expert how many tiles of rows it and those before it have."""
        return self.o_numbers + 2 * self.NUMBERS

    @property
    def shared(self) -> int:
        """Bytes; the stages start at a multiple of 1024."""
        return 1024 + self.o_tiles + 4 * self.experts


@dataclass(frozen=True)
class FewRows:
    """A launch: `columns` rows of w of each expert by up to `rows` rows in all, whose tiles `ctas` CTAs take
    in turn. Row n of results is that of row n / `divide` of x. `limit`: of SwiGLU of paired results.
    """

    tiles: Few
    columns: int
    rows: int
    ctas: int
    divide: int = 1
    limit: float = 0.0

    @property
    def column_tiles(self) -> int:
        """Tiles of columns of results."""
        return -(-self.columns // self.tiles.made)

    @property
    def expert_bytes(self) -> int:
        """From one expert's weights to the next one's."""
        return -(-self.columns // (16 * self.tiles.tiles)) * self.tiles.group_bytes
