"""How rows are cut over CTAs and warps, and their shared memory. No device code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dsv4c.codegen.lib.shapes import padded

STREAMS = 4
PIECES = 3  # bf16 that an f32 is the sum of
TOGETHER = 64  # tokens that a CTA takes at a time where there are many


@dataclass(frozen=True)
class Slice:
    """How a hidden row of `hidden` columns is cut: over `ctas` CTAs; `rows` of `fn` are projected (24, or 4
    in the head), and what is mixed in is a sum over `ranks`. comb is of so many `iterations`.

    A thread keeps its four columns of `held` rows of fn in registers; the other rows wait in shared memory.
    """

    hidden: int
    ctas: int
    rows: int
    norm_eps: float
    hc_eps: float
    iterations: int
    held: int = 0
    ranks: int = 1

    @property
    def width(self) -> int:
        """Columns of a CTA, and its threads: `width / 4` column quads for each of the four streams."""
        return self.hidden // self.ctas

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return self.width

    @property
    def warps(self) -> int:
        """Warps of a CTA."""
        return self.width // 32

    @property
    def groups(self) -> int:
        """Groups of 128 columns of a CTA: as many warps collapse and normalize."""
        return self.width // 128

    @property
    def sums(self) -> int:
        """What the first reduction adds up: the projections, then the sum of squares."""
        return self.rows + 1

    @property
    def stride(self) -> int:
        """Floats between two origins of partial sums: `sums` rounded up to a power of two."""
        return 1 << self.rows.bit_length()

    # Shared memory, in bytes from the CTA's allocation.

    @property
    def o_gain(self) -> int:
        """After fn f32 [rows - held][4][width]: gain bf16 [width]."""
        return (self.rows - self.held) * STREAMS * self.width * 4

    @property
    def o_affine(self) -> int:
        """base f32 [32], then scale f32 [32], one of each per projection."""
        return self.o_gain + self.width * 2

    @property
    def o_x(self) -> int:
        """The mixed streams bf16 [4][width]."""
        return self.o_affine + 256

    @property
    def o_part(self) -> int:
        """The warps' partial sums f32 [warps][stride]."""
        return self.o_x + STREAMS * self.width * 2

    @property
    def o_sums(self) -> int:
        """Inbox of the first reduction f32 [ctas][stride]."""
        return self.o_part + self.warps * self.stride * 4

    @property
    def o_squares(self) -> int:
        """Inbox of the second reduction f32 [hidden / 128]."""
        return self.o_sums + self.ctas * self.stride * 4

    @property
    def o_bars(self) -> int:
        """Barriers of the two inboxes."""
        return self.o_squares + -(-self.hidden // 1024) * 32

    @property
    def o_comb(self) -> int:
        """By what a token's streams are mixed f32 [tokens][4][4]."""
        return self.o_bars + 16

    @property
    def o_f(self) -> int:
        """The sum over ranks bf16 [width]."""
        return self.o_comb + STREAMS * STREAMS * 4

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory."""
        return self.o_f + (self.width * 2 if self.ranks > 1 else 0)


@dataclass(frozen=True)
class Batch:
    """How the boundary of `count` tokens is cut into two launches. One mixes and projects: a CTA has `width`
    columns of every stream and takes `TOGETHER` tokens at a time, at most `turns` times. A warpgroup, of
    which there are `GROUPS`, has all of them, the rows of its products, and 32 columns a step.
    The other adds up what CTAs made of a token and collapses its streams: a CTA for each, 8 columns a thread.

    `rows` of `fn` are projected (24, or 4 in the head). comb is of so many `iterations`.
    """

    hidden: int
    rows: int
    norm_eps: float
    hc_eps: float
    iterations: int
    count: int
    width: int
    turns: int

    GROUPS: ClassVar[int] = 2  # warpgroups, which mix 128 bytes of a row
    STAGES: ClassVar[int] = 3  # steps whose streams lie in shared memory, or are on their way

    @property
    def slices(self) -> int:
        """CTAs for the same tokens."""
        return self.hidden // self.width

    @property
    def lots(self) -> int:
        """Lots of `TOGETHER` tokens."""
        return -(-self.count // TOGETHER)

    @property
    def blocks(self) -> int:
        """CTAs for the same columns: lot n is the turn of number n % blocks."""
        return -(-self.lots // self.turns)

    @property
    def threads(self) -> int:
        """Threads of a CTA that mixes."""
        return self.GROUPS * TOGETHER * 2

    @property
    def steps(self) -> int:
        """Times that a warp takes 32 columns of its tokens."""
        return self.width // (32 * self.GROUPS)

    @property
    def tiles(self) -> int:
        """Eights of rows of fn."""
        return -(-self.rows // 8)

    @property
    def projected(self) -> int:
        """Rows that tensor cores project on: those of every piece of fn."""
        return PIECES * 8 * self.tiles

    @property
    def sums(self) -> int:
        """Floats that a CTA makes of a token."""
        return 8 * self.tiles

    @property
    def combs(self) -> int:
        """Tokens whose mixing is made at a time, a thread each."""
        return min(self.turns * TOGETHER, self.threads)

    # Shared memory of a CTA that mixes, in bytes from its allocation: fn in pieces, bf16 [width / 32][2]
    # [projected][64], rows of 128 bytes whose eight 16-byte pieces are swizzled: 32 columns of two streams.

    @property
    def o_part(self) -> int:
        """Behind fn: sums of each warpgroup f32 [group][token][sums]."""
        return self.width * STREAMS * 2 * self.projected

    @property
    def o_comb(self) -> int:
        """By what the tokens' streams are mixed f32 [combs][to][from]."""
        return self.o_part + self.GROUPS * TOGETHER * self.sums * 4

    @property
    def o_post(self) -> int:
        """By what f is mixed in f32 [combs][4]."""
        return self.o_comb + self.combs * STREAMS * STREAMS * 4

    @property
    def stage(self) -> int:
        """Bytes of a step: of each thread's two tokens 8 columns of every stream and of f."""
        return self.threads * 2 * (STREAMS + 1) * 16

    @property
    def o_ring(self) -> int:
        """Stages [token][stream or f][thread]."""
        return self.o_post + self.combs * STREAMS * 4

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory where nothing is mixed, and there is no comb, too."""
        return self.o_ring + self.STAGES * self.stage

    # Of a CTA that collapses.

    @property
    def collapsers(self) -> int:
        """Its threads, whole warps."""
        return -(-self.hidden // 256) * 32

    @property
    def o_squares(self) -> int:
        """Behind what CTAs made of the token, f32 [slices][sums]: sums of squares of each warp, f32."""
        return self.slices * self.sums * 4

    @property
    def o_collapsed(self) -> int:
        """The same of the collapsed row."""
        return self.o_squares + -(-self.collapsers // 128) * 16

    @property
    def o_weights(self) -> int:
        """By what its streams are collapsed, f32 [4]."""
        return self.o_collapsed + -(-self.collapsers // 128) * 16

    @property
    def collapse_shared(self) -> int:
        """Bytes of dynamic shared memory."""
        return self.o_weights + STREAMS * 4


@dataclass(frozen=True)
class RowGate:
    """Products of a token's row with the gate's rows of the `k` experts that a table names, on a CTA of as
    many threads as multiply in one of the experts' kernel, where a lone token's are summed: to the same
    bits. `held` pieces of each thread's are read before the wait.
    """

    hidden: int
    experts: int
    k: int
    threads: int
    held: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory: a sum of every warp and expert."""
        return self.threads // 32 * self.k * 4


@dataclass(frozen=True)
class Gate:
    """How the router's [experts, hidden] meets `count` rows, `tokens` at a time: `rows` experts per CTA."""

    count: int
    tokens: int
    hidden: int
    experts: int
    rows: int
    threads: int

    @property
    def blocks(self) -> int:
        """CTAs for the same experts."""
        return -(-self.count // self.tokens)

    @property
    def pieces(self) -> int:
        """Pieces of 16 bytes that a thread holds of each row."""
        return self.hidden // (8 * self.threads)

    @property
    def sums(self) -> int:
        """Dot products of a CTA."""
        return self.rows * self.tokens

    @property
    def stride(self) -> int:
        """`sums` rounded up to a power of two."""
        return 1 << (self.sums - 1).bit_length()

    @property
    def o_part(self) -> int:
        """After the weights bf16 [rows][hidden]: the warps' partial sums f32 [warps][stride]."""
        return self.rows * self.hidden * 2

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory."""
        return self.o_part + self.threads // 32 * self.stride * 4


@dataclass(frozen=True)
class Embedding:
    """How a row of `hidden` columns is copied to `streams`: 8 columns a thread."""

    hidden: int
    streams: int
    threads: int


@dataclass(frozen=True)
class LastRow:
    """How a row of `hidden` bf16 columns is copied, the last of up to `tokens`: 8 columns a thread."""

    tokens: int
    hidden: int
    threads: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return 2 * self.hidden


@dataclass(frozen=True)
class Run:
    """How a run of `tokens` of a sequence is cut: a thread each, of `ctas` CTAs."""

    tokens: int
    threads: int

    @property
    def ctas(self) -> int:
        """CTAs of a sequence."""
        return -(-self.tokens // self.threads)


@dataclass(frozen=True)
class Largest:
    """How the largest of a row of `columns` logits is found: by a cluster of `ctas` CTAs."""

    columns: int
    ctas: int
    threads: int

    @property
    def vector(self) -> int:
        """Columns that a thread reads at once: 16 bytes where rows are aligned."""
        return 1 if self.columns % 4 else 4

    @property
    def pieces(self) -> int:
        """Vectors of a CTA."""
        return -(-self.columns // self.vector // self.ctas)

    @property
    def width(self) -> int:
        """Columns of a CTA."""
        return self.pieces * self.vector

    @property
    def steps(self) -> int:
        """Vectors of a thread."""
        return -(-self.pieces // self.threads)

    @property
    def warps(self) -> int:
        """Warps of a CTA."""
        return self.threads // 32

    @property
    def o_inbox(self) -> int:
        """Behind the best key of each warp: that of each CTA u64 [ctas]."""
        return self.warps * 8

    @property
    def o_bar(self) -> int:
        """The inbox's barrier."""
        return self.o_inbox + self.ctas * 8

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory."""
        return self.o_bar + 8


@dataclass(frozen=True)
class Draft:
    """The choice of a draft from row `step` of a sequence's `block`, under a bias; `width` columns are known
    of the token, if any.
    """

    cut: Largest
    block: int
    step: int
    width: int = 0


@dataclass(frozen=True)
class Nvfp4Row:
    """How a row of `k` is quantized to NVFP4 by a CTA, blocks of 16 by each thread; under an RMSNorm if there
    is an `eps`.
    """

    k: int
    threads: int
    eps: float | None = None

    @property
    def held(self) -> int:
        """Elements of a thread."""
        return -(-self.k // (16 * self.threads)) * 16


@dataclass(frozen=True)
class Codes:
    """How `rows` of `k` become FP8: half a warp to a block of 128. `each` rows go to a counted one."""

    rows: int
    k: int
    each: int
    threads: int

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return self.k // 128

    @property
    def together(self) -> int:
        """Blocks of a CTA."""
        return self.threads // 16

    @property
    def ctas(self) -> int:
        """CTAs of all rows."""
        return -(-self.rows * self.blocks // self.together)


@dataclass(frozen=True)
class NormedCodes:
    """How one of `rows` of `k` becomes FP8 under an RMSNorm: by a CTA."""

    rows: int
    k: int
    eps: float

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return self.k // 8

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory: a sum of each block's squares."""
        return self.k // 128 * 4


@dataclass(frozen=True)
class Listing:
    """How the numbers n < rows * top_k are listed by the experts that they chose: a CTA for an expert."""

    rows: int
    top_k: int
    threads: int

    @property
    def numbers(self) -> int:
        """All of them, for which an expert has room: a table may name it twice in a row."""
        return self.rows * self.top_k

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory: a count of each warp."""
        return self.threads // 32 * 4


@dataclass(frozen=True)
class Sum:
    """How one of `rows` of `hidden` is summed over `top_k` experts and the shared one, to numbers of `size`
    bytes, 2 for bf16 or 4 for f32: 8 columns a thread.
    """

    rows: int
    hidden: int
    top_k: int
    size: int
    threads: int

    @property
    def ctas(self) -> int:
        """CTAs of a row."""
        return -(-self.hidden // 8 // self.threads)


@dataclass(frozen=True)
class Choice:
    """How `top_k` of `experts` are chosen for one of `rows`, by a CTA; weights add up to `factor`."""

    rows: int
    experts: int
    top_k: int
    factor: float
    threads: int

    @property
    def padded(self) -> int:
        """Experts that a warp's lanes look at."""
        return padded(self.experts)

    @property
    def o_kept(self) -> int:
        """Behind scores f32 [padded] and keys i32 [padded]: experts i32 [top_k], weights f32 [top_k]."""
        return 8 * self.padded

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory."""
        return self.o_kept + 8 * self.top_k


@dataclass(frozen=True)
class Summing:
    """How rows of `width` f32 are summed over `ranks`, to numbers of `size` bytes, 2 for bf16 or 4 for f32: a
    column a thread.
    """

    ranks: int
    width: int
    size: int
    threads: int

    @property
    def ctas(self) -> int:
        """CTAs of a row."""
        return -(-self.width // self.threads)


@dataclass(frozen=True)
class Joining:
    """How columns of `ranks` are joined: a rank has `width` words of 4 bytes in a row."""

    ranks: int
    width: int
    ctas: int
    threads: int

    @property
    def steps(self) -> int:
        """Words of a thread."""
        return -(-self.width // (self.threads * self.ctas))


VECTOR = 16  # bytes of a tile that a thread moves at once
MOST_STEPS = 4  # of them, so that a tile has 16 KB


@dataclass(frozen=True)
class Tiles:
    """How many rows cross between `ranks`, a CTA for each tile of a row: a rank has `width` vectors of 16
    bytes in a row. A sum's are of f32, and it makes numbers of `size` bytes, 2 for bf16 or 4.
    """

    ranks: int
    width: int
    threads: int
    size: int = 0

    @property
    def steps(self) -> int:
        """Vectors of a thread."""
        return min(MOST_STEPS, -(-self.width // self.threads))

    @property
    def parts(self) -> int:
        """Tiles of a row."""
        return -(-self.width // (self.threads * self.steps))
