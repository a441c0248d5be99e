"""The blocks of memory through which ranks exchange values: what lies where.

A header, a number for each exchange of a step (its site), then the inbox: for each of four turns a region for
every rank, of words that the rank has put there. A word is 8 bytes, 4 of them a flag that says which exchange
of which step it belongs to, so that nothing is ever cleared and no fence is needed. Steps use the turns in
pairs: a rank puts a word of exchange i + 2 only behind one that it got of i + 1, which its maker puts there
behind its reading of i.

Of more rows than a step has, half of what crosses would be flags. They cross as tiles, plain bytes with one
flag for all of them, through a block of their own (bytes there never look like a flag of a word): the same
turns and regions, each a flag for every tile and then the tiles' bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of the header.
RANK, EPOCH, STATUS = 0, 4, 8  # u32: who this is, which step it is at, what it has given up at
LIMIT = 16  # u64: nanoseconds to wait for a word
REGION = 24  # u64: bytes of a region
INBOXES = 32  # u64 each: where every rank's inbox is, this rank's too
TILED = 96  # u64: bytes of a region of the block of tiles
TILES = 104  # u64 each: where every rank's block of tiles is
SITES = 256
SITE = 16  # bytes each, a u32 of them the number

MOST_RANKS = 8
MOST_ROWS = 64  # that cross as words; tiles from there on
MOST_TILES = 1 << 15  # of an exchange, each with a flag of 4 bytes
TILE_FLAGS = 4 * MOST_TILES  # bytes before the tiles of a region
SITE_BITS = 10  # of a flag; the others are the epoch
MOST_SITES, MOST_EPOCHS = 1 << SITE_BITS, 1 << (32 - SITE_BITS)
GIVEN_UP = 1 << 31  # a status: this, the rank waited for (3 bits), and what there is room for of the flag
STATUS_EPOCHS = 1 << (28 - SITE_BITS)
TURNS = 4
WORD, PAYLOAD = 8, 4  # bytes of a word, and those of them that a value has


@dataclass(frozen=True, slots=True)
class Layout:
    """The block of a plan for so many ranks and exchanges of a step, of at most `region` bytes of words."""

    ranks: int
    sites: int
    region: int

    @property
    def inbox(self) -> int:
        """Where the inbox begins."""
        return -(-(SITES + SITE * self.sites) // 256) * 256

    @property
    def nbytes(self) -> int:
        return self.inbox + TURNS * self.ranks * self.region

    def site(self, number: int) -> int:
        """Where the number of an exchange is."""
        return SITES + SITE * number


def layout_of(ranks: int, sites: int, nbytes: int) -> Layout:
    """The layout of a block of so many bytes. Raises ValueError where there is none."""
    empty = Layout(ranks, sites, 0)
    region, rest = divmod(nbytes - empty.inbox, TURNS * ranks)
    if rest or region <= 0 or region % WORD:
        raise ValueError(f"no block for {sites} exchanges of {ranks} ranks has {nbytes} bytes")
    return Layout(ranks, sites, region)


def tiled_region(nbytes: int, ranks: int) -> int:
    """Bytes of a region of a block of tiles of so many bytes. Raises ValueError where there is none."""
    region, rest = divmod(nbytes, TURNS * ranks)
    if rest or (nbytes and region <= TILE_FLAGS):
        raise ValueError(f"no block for tiles of {ranks} ranks has {nbytes} bytes")
    return region


def given_up(status: int) -> tuple[int, int, int]:
    """(exchange, rank that it waited for, step modulo `STATUS_EPOCHS`) of a status that is not 0."""
    return status & (MOST_SITES - 1), status >> 28 & (MOST_RANKS - 1), status >> SITE_BITS & STATUS_EPOCHS - 1
