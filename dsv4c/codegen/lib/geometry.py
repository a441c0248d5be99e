"""Shapes of the attention, cache, compressor and index kernels, and their shared memory. No device code.

Places in shared memory (`o_*`) are bytes from the CTA's allocation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

ROPE = 64  # rotated elements at the end of a row
BLOCK = 64  # elements under one ue8m0 scale of a KV row; also the dimensions that one attention warp works on
HEADS = 16  # heads of an attention CTA: the rows of one MMA tile


@dataclass(frozen=True)
class Row:
    """A cache row of `width` elements, held by `width / 4` threads, four neighbors each.

    format: "fp8" = q[e4m3,ue8m0,1x64,tail=64], "bf16", or "mxfp4" = q[e2m1,ue8m0,1x32]. `hadamard` rows (128
    wide) are transformed before they are stored.
    """

    width: int
    format: str
    hadamard: bool = False

    @property
    def lanes(self) -> int:
        """Threads that hold the row."""
        return self.width // 4

    @property
    def components(self) -> tuple[str, ...]:
        """Component arrays of the cache, in parameter order."""
        return {"fp8": ("data", "scale", "tail"), "bf16": ("data",), "mxfp4": ("data", "scale")}[self.format]


@dataclass(frozen=True)
class Window:
    """Where rows of keys go: `ring` of a slot's rows, row p % ring for position p; with a `capacity`, to
    copies beside it, of `tokens` rows of each sequence. `threads` write a row. `crowded` is the number of
    rows where a ring has no room for all of them, or 0.
    """

    row: Row
    ring: int
    eps: float
    threads: int
    capacity: int = 0
    tokens: int = 1
    crowded: int = 0


@dataclass(frozen=True)
class Pool:
    """How a compressor pools: an entry is the softmax-weighted sum of `ratio` tokens (or 2 * `ratio`).

    The rings f32 [S, ring, channels] hold token p of a slot in row p % ring; `capacity` entries of `row` per
    slot. A CTA of `threads` threads splits the pooled tokens over as many groups as it has threads for. A
    launch has `tokens` rows of each sequence, one after the other.
    """

    row: Row
    ratio: int
    overlap: bool
    ring: int
    capacity: int
    threads: int
    eps: float
    tokens: int = 1

    @property
    def channels(self) -> int:
        """Channels of the rings: both halves of the projection when windows overlap."""
        return self.row.width * (2 if self.overlap else 1)

    @property
    def pooled(self) -> int:
        """Tokens under one softmax."""
        return self.ratio * (2 if self.overlap else 1)

    @property
    def groups(self) -> int:
        """Thread groups that each pool `run` of the tokens."""
        return min(self.threads // self.row.lanes, self.pooled)

    @property
    def run(self) -> int:
        """Tokens of one group: consecutive ones, the last group's run may be shorter."""
        return -(-self.pooled // self.groups)

    @property
    def most_entries(self) -> int:
        """Entries that a sequence may complete in a launch."""
        return -(-self.tokens // self.ratio)

    @property
    def most_kept(self) -> int:
        """Tokens of a sequence that stay in its rings after a launch."""
        return min(self.tokens, self.ring)

    @property
    def chunk(self) -> int:
        """Tokens whose loads are in flight together."""
        return min(self.run, 8)

    @property
    def shared(self) -> int:
        """Bytes: sums of squares (128), then maximum, weight and weighted sum f32 [groups][3][width]."""
        return 128 + self.groups * 3 * self.row.width * 4


@dataclass(frozen=True)
class Attention:
    """One query token against `window` ring rows and up to `extra` cache entries of its slot.

    A cluster of `splits` CTAs shares the keys of 16 heads: CTA r takes tiles r, r + splits, ... of `tile`
    keys. Warps 2n and 2n + 1 work on dimensions 64n..64n+63, one scale block of an FP8 row or its BF16 tail:
    each scores every other group of 16 keys, and sums up the values of 32 dimensions. entries: "none",
    "selected" (i32[N, extra] entry numbers) or "all" (w < (t+1) // ratio). exact_norm: the per-head norm in
    bf16 steps.
    """

    heads: int
    width: int
    format: str
    window: int
    ring: int
    entries: str
    extra: int
    ratio: int
    capacity: int
    splits: int
    tile: int
    exact_norm: bool
    eps: float

    @property
    def blocks(self) -> int:
        """Blocks of 64 dimensions."""
        return self.width // BLOCK

    @property
    def warps(self) -> int:
        """Warps of a CTA."""
        return 2 * self.blocks

    @property
    def head_tiles(self) -> int:
        """CTAs (per split) that the heads of a token need."""
        return -(-self.heads // HEADS)

    @property
    def slice(self) -> int:
        """Output dimensions that each CTA of a cluster finishes."""
        return self.width // self.splits

    @property
    def tiles(self) -> int:
        """Tiles that cover every key."""
        return -(-(self.window + self.extra) // self.tile)

    @property
    def stages(self) -> int:
        """Key tiles in shared memory: two where a CTA may work on several."""
        return 2 if self.tiles > self.splits else 1

    @property
    def tile_rows(self) -> int:
        """Keys of a tile that one warp fetches."""
        return self.tile // self.warps

    @property
    def data_bytes(self) -> int:
        """Bytes of a row's data component."""
        return self.width - ROPE if self.format == "fp8" else self.width * 2

    @property
    def scales(self) -> int:
        """Scales of a row."""
        return self.blocks - 1 if self.format == "fp8" else 0

    @property
    def row_bytes(self) -> int:
        """Bytes between staged rows: rows 2i and 2i + 2 start 8 banks apart, so fragments load freely."""
        payload = self.data_bytes + (ROPE * 2 if self.format == "fp8" else 0)
        return payload + (16 - payload) % 64

    @property
    def part_stride(self) -> int:
        """Floats between two heads' partial scores: 16 banks apart (modulo 32)."""
        return self.tile if self.tile % 32 == 16 else self.tile + 16

    @property
    def p_stride(self) -> int:
        """Elements between two heads' probabilities."""
        return self.tile + 8

    @property
    def _places(self) -> dict[str, int]:
        sizes = {
            "keys": self.stages * self.tile * self.row_bytes,
            "part": self.blocks * HEADS * self.part_stride * 4,
            "inbox": self.splits * HEADS * self.slice * 2,
            "stats": self.splits * HEADS * 8,
            "p_bf16": HEADS * self.p_stride * 2,
            "p_f16": HEADS * self.p_stride * 2,
            "factor": self.blocks * self.tile * 2,
            "scale": self.blocks * self.tile,
            "bias": self.tile * 4,
            "squares": HEADS * self.blocks * 4,
            "correction": HEADS * 4,
            "turns": ROPE // 2 * 8,
            "sink": HEADS * 4,
            "barrier": 16,
        }
        places, at = {}, 0
        for name, size in sizes.items():
            places[name] = at
            at += -(-size // 16) * 16
        return {**places, "end": at}

    @property
    def o_keys(self) -> int:
        """Staged key rows [stages][tile][row_bytes]."""
        return self._places["keys"]

    @property
    def o_part(self) -> int:
        """Scores over one block of dimensions f32 [blocks][heads][part_stride]."""
        return self._places["part"]

    @property
    def o_inbox(self) -> int:
        """Every split's undivided output of this CTA's dimensions, times 2^-6, f16 [splits][heads][slice]."""
        return self._places["inbox"]

    @property
    def o_stats(self) -> int:
        """Every split's (maximum, weight) f32 [splits][heads][2]."""
        return self._places["stats"]

    @property
    def o_p_bf16(self) -> int:
        """Probabilities bf16 [heads][p_stride], for BF16 keys."""
        return self._places["p_bf16"]

    @property
    def o_p_f16(self) -> int:
        """The same, times 2^15, f16: for FP8 keys."""
        return self._places["p_f16"]

    @property
    def o_factor(self) -> int:
        """Key scales relative to the tile's largest f16 [blocks][tile]."""
        return self._places["factor"]

    @property
    def o_scale(self) -> int:
        """Key scales ue8m0 [blocks][tile]."""
        return self._places["scale"]

    @property
    def o_bias(self) -> int:
        """0 for a visible key, -inf for none, f32 [tile]."""
        return self._places["bias"]

    @property
    def o_squares(self) -> int:
        """Sums of squares of q over one block of dimensions f32 [heads][blocks]."""
        return self._places["squares"]

    @property
    def o_correction(self) -> int:
        """What earlier tiles' sums are multiplied with f32 [heads]."""
        return self._places["correction"]

    @property
    def o_turns(self) -> int:
        """Cosine and sine of each rotated pair at the query's position f32 [32][2]."""
        return self._places["turns"]

    @property
    def o_sink(self) -> int:
        """The heads' sinks f32 [heads]."""
        return self._places["sink"]

    @property
    def o_barrier(self) -> int:
        """The inbox's barrier."""
        return self._places["barrier"]

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self._places["end"]


@dataclass(frozen=True)
class Chunk:
    """Attention of many tokens, 512 wide: a CTA takes 64 heads of a token at a time. A token of 8, 16 or 32
    has them again and again, since tensor cores multiply 64 rows.

    Fields as of `Attention`; `rows` tokens are spread over `ctas` CTAs. A warpgroup gathers keys, 64 at a
    time, as bf16 rows in the layout that tensor cores read; two multiply.
    """

    rows: int
    ctas: int
    heads: int
    format: str
    window: int
    ring: int
    entries: str
    extra: int
    ratio: int
    capacity: int
    exact_norm: bool
    eps: float
    width: ClassVar[int] = 512
    stages: ClassVar[int] = 2
    tile: ClassVar[int] = 64  # keys of a stage, and heads of an item
    tile_bytes: ClassVar[int] = 64 * 1024
    o_q: ClassVar[int] = 0
    o_keys: ClassVar[int] = 64 * 1024
    o_weights: ClassVar[int] = 3 * 64 * 1024  # of a tile, bf16 [64][64]
    o_out: ClassVar[int] = o_weights + 64 * 128  # results on their way, by warp: bf16 [16][64]
    o_bias: ClassVar[int] = o_out + 8 * 16 * 128
    o_turns: ClassVar[int] = o_bias + 2 * 64 * 4
    o_rows: ClassVar[int] = o_turns + ROPE // 2 * 8  # f32 [group][64]: largest scores, or sums of weights
    o_bars: ClassVar[int] = o_rows + 2 * 64 * 4
    shared: ClassVar[int] = o_bars + 4 * 8

    @property
    def coded(self) -> int:
        """Blocks of 64 elements of a row that are e4m3; the others are bf16."""
        return 7 if self.format == "fp8" else 0

    @property
    def row_words(self) -> int:
        """Words of a thread's quarter of a row, two scales the last of them."""
        return 4 * self.coded + 8 * (8 - self.coded) + 2

    @property
    def own_heads(self) -> int:
        """Heads of an item."""
        return min(self.heads, self.tile)

    @property
    def head_tiles(self) -> int:
        """Items of a token."""
        return self.heads // self.own_heads

    @property
    def items(self) -> int:
        """Items of all tokens."""
        return self.rows * self.head_tiles


@dataclass(frozen=True)
class Index:
    """Index scores: `heads` queries of 128 against up to `capacity` keys, one per `ratio` tokens.

    A warp scores `tiles` times 16 keys at a time; CTAs of 8 warps, as many as there are, share a slot's keys.
    Nothing is scored while at most `k` keys exist. format: "mxfp4" or "bf16", of queries and keys. Weights of
    heads are taken times `factor`.
    """

    heads: int
    format: str
    capacity: int
    ratio: int
    k: int
    tiles: int
    factor: float = 1.0

    @property
    def warps(self) -> int:
        """Warps of a CTA."""
        return 8

    @property
    def words(self) -> int:
        """Words of a lane's part of a key; of FP4 its scale is one."""
        return 5 if self.format == "mxfp4" else 16

    @property
    def keys(self) -> int:
        """Keys that a CTA scores at a time."""
        return self.warps * self.tiles * 16

    @property
    def o_turns(self) -> int:
        """After queries [heads / 8][4][32 lanes][16 bytes]: each warp's cosines and sines f32 [32][2]."""
        return self.heads * 256

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.o_turns + self.warps * 256


@dataclass(frozen=True)
class IndexChunk:
    """Index scores of `rows` tokens: a CTA has the queries of `tokens` neighbors in shared memory, and
    multiplies keys in registers with one token's after the other.
    """

    index: Index
    rows: int
    tokens: int

    @property
    def query(self) -> int:
        """Bytes of a token's queries: bf16 [2][heads][64], as tensor cores read them."""
        return self.index.heads * 256

    @property
    def groups(self) -> int:
        """Groups of so many neighbors."""
        return -(-self.rows // self.tokens)

    @property
    def o_weights(self) -> int:
        """After queries [tokens]: weights bf16 [tokens][heads]."""
        return self.tokens * self.query

    @property
    def o_turns(self) -> int:
        """Each warp's cosines and sines f32 [32][2]."""
        return self.o_weights + self.tokens * self.index.heads * 2

    @property
    def o_seen(self) -> int:
        """Slots and numbers of visible keys i32 [tokens][2]."""
        return self.o_turns + self.index.warps * 256

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.o_seen + self.tokens * 8


@dataclass(frozen=True)
class Selection:
    """Exact top-k of `capacity` scores, by digits of order-preserving keys, over a cluster of `splits` CTAs.

    bits: of a score, 16 of bf16 or 32 of f32.
    """

    capacity: int
    k: int
    ratio: int
    bits: int
    splits: int
    threads: int

    @property
    def quads(self) -> int:
        """Most groups of four scores that a thread holds."""
        return -(-self.capacity // (4 * self.threads * self.splits))

    @property
    def out(self) -> int:
        """Length of the result."""
        return min(self.k, self.capacity)

    @property
    def passes(self) -> tuple[tuple[int, int], ...]:
        """(lowest bit, width) of each digit, leading digit first."""
        return ((24, 8), (16, 8)) if self.bits == 16 else ((21, 11), (10, 11), (0, 10))

    @property
    def alone(self) -> Selection:
        """The same, for as many scores as one CTA holds."""
        return replace(self, capacity=min(self.capacity, 4 * self.quads * self.threads), splits=1)

    def o_histogram(self, step: int) -> int:
        """Counts by digit u32, of pass `step`."""
        return 256 + sum(4 << width for _, width in self.passes[:step])

    @property
    def o_sums(self) -> int:
        """The cluster's counts of one pass, u32, of which there are at most 2,048."""
        return self.o_histogram(len(self.passes))

    @property
    def shared(self) -> int:
        """Bytes: warp sums (128), choice and totals (128), histograms, the cluster's counts."""
        return self.o_sums + (8192 if self.splits > 1 else 0)


@dataclass(frozen=True)
class Choice:
    """Index scores of a token and the best of them, by a cluster of `ctas` CTAs: all of them score, and send
    what they have to the first, which chooses.
    """

    index: Index
    best: Selection
    ctas: int

    @property
    def o_sent(self) -> int:
        """After what scoring takes: a warp's scores, f32 [warps][16 tiles], on their way to the first CTA."""
        return self.index.shared

    @property
    def o_scores(self) -> int:
        """The token's scores f32 [capacity], in the first CTA: whole groups of four."""
        return self.o_sent + self.index.keys * 4

    @property
    def o_counts(self) -> int:
        """What choosing takes."""
        return self.o_scores + -(-self.index.capacity // 4) * 16

    @property
    def o_bar(self) -> int:
        """The barrier that counts the bytes of scores."""
        return self.o_counts + self.best.shared

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.o_bar + 8


@dataclass(frozen=True)
class Spread:
    """A row of logits over a cluster: `each` of its `columns` in a CTA, a run of 4 * `quads` in a thread.

    Weights are added up by bins, in several copies. A CTA collects at most `MOST` candidates, all CTAs
    together `FEW`, a thread each.
    """

    BIN_BITS: ClassVar = 6  # of keys in so many bins
    BINS: ClassVar = 80  # two for every power of two from 1 to 2^-38
    STEPS: ClassVar = 8  # a bin of weights, then of keys of 32, 26, 20, 14, 8, 2 bits, and one key
    COPIES: ClassVar = 16  # 2^10 columns of 22 bits add up in 32
    MOST: ClassVar = 64
    RESULTS: ClassVar = 36  # words that candidates are added up in

    columns: int
    ctas: int
    threads: int

    @property
    def each(self) -> int:
        """Columns of a CTA, of the last one perhaps fewer."""
        return -(-self.columns // (4 * self.ctas)) * 4

    @property
    def quads(self) -> int:
        """Groups of four neighbors that a thread holds."""
        return -(-self.each // (4 * self.threads))

    def column(self, rank: Any, thread: Any, quad: Any) -> Any:
        """The first column of a thread's quad; of numbers of the host, or of the device."""
        return rank * self.each + (thread * self.quads + quad) * 4

    o_bars: ClassVar = 256  # behind a number of each warp: barriers of what is sent
    o_tops: ClassVar = 320  # the largest key of each CTA
    o_totals: ClassVar = 384  # the sum of each CTA, i64
    o_number: ClassVar = 512  # what a token is drawn by, f64
    o_ends: ClassVar = 528  # ids that end the sequence, and its length
    o_found: ClassVar = (
        576  # the CTA's candidates: their number, the largest inverse of a key, the largest key
    )
    o_heads: ClassVar = o_found + 16  # the same of each CTA
    o_sums: ClassVar = o_heads + 256  # of the cluster, by bin, i64: as many as 32 lanes read, the rest zeros
    o_bins: ClassVar = o_sums + 8 * 96  # of the CTA, by bin and copy, u32
    o_own: ClassVar = o_bins + 4 * BINS * COPIES  # the CTA's candidates: key, weight, column
    o_results: ClassVar = o_own + 16 * MOST  # what is said of candidates; then what is kept of each CTA
    o_kept: ClassVar = o_results + 16
    o_candidates: ClassVar = o_results + 4 * RESULTS  # those of each CTA

    @property
    def FEW(self) -> int:
        """Candidates that are compared one by one."""
        return min(256, self.threads)

    @property
    def o_lists(self) -> int:
        """Candidates in a row: keys, inverse columns, both parts of weights."""
        return self.o_candidates + self.ctas * self.MOST * 16

    @property
    def o_counts(self) -> int:
        """How often a token was said, u32 by column, until the logits are lowered."""
        return self.o_lists + self.FEW * 16

    @property
    def o_before(self) -> int:
        """Whether it was said before the origin, u8, by column."""
        return self.o_counts + 4 * self.each

    @property
    def counts(self) -> int:
        """Bytes of both."""
        return -(-5 * self.each // 16) * 16

    @property
    def o_inbox(self) -> int:
        """Then sums of each CTA by bin, i64."""
        return self.o_counts

    @property
    def shared(self) -> int:
        """Bytes."""
        return self.o_counts + max(self.counts, self.ctas * self.BINS * 8)


@dataclass(frozen=True)
class Sampling:
    """A token of a row, by `knobs` and up to `stops` of a slot whose history has `capacity` tokens."""

    spread: Spread
    capacity: int
    knobs: int
    stops: int


@dataclass(frozen=True)
class Gemm:
    """NVFP4 x[rows, k] times w[columns, k]^T on tcgen05: a tile of both per CTA, `stages` of k in flight."""

    TILE: ClassVar[int] = 128  # rows of x and of w per CTA, and threads
    K_TILE: ClassVar[int] = 256  # columns per stage: 128 bytes of codes per row
    CODES: ClassVar[int] = TILE * K_TILE // 2  # bytes of one side of a stage
    SCALES: ClassVar[int] = TILE * K_TILE // 16
    STAGE: ClassVar[int] = 2 * (CODES + SCALES)

    rows: int
    columns: int
    k: int
    stages: int

    @property
    def steps(self) -> int:
        """Stages along k."""
        return self.k // self.K_TILE

    @property
    def grid(self) -> tuple[int, int, int]:
        """CTAs over columns and rows."""
        return (-(-self.columns // self.TILE), -(-self.rows // self.TILE), 1)

    @property
    def bars(self) -> int:
        """Where the barriers start: per stage full and free, then done, then the tensor memory's address."""
        return self.stages * self.STAGE

    @property
    def shared(self) -> int:
        """Dynamic shared memory: the stages start at a multiple of 1024 bytes."""
        return 1024 + self.bars + self.stages * 16 + 16
