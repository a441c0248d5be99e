"""Words to and from the other ranks: a value's 4 bytes and a flag in one store, so that no fence is needed.

The block's form is `dsv4c.exchange`'s. A kernel puts its words into the inboxes of all others before it waits
for any of theirs.

Boundaries let their successor start at once: what it reads of its weights meanwhile is worth more than what
that costs the words. A step of Flash at 8,192 tokens on two H200s, 2026-11-30: 2,726 us; 2,791 where it
starts behind the last word.

Of many rows tiles cross, a CTA's bytes by plain stores, and then one flag that releases them. A CTA gives its
own tile before it waits for the others' of the same number, so that the lowest numbers of all ranks, which
are resident first, wait for nobody else.
"""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4c.codegen.lib import ptx
from dsv4c.codegen.lib.slices import VECTOR, Joining, Summing, Tiles
from dsv4c.exchange import (
    EPOCH,
    GIVEN_UP,
    INBOXES,
    LIMIT,
    RANK,
    REGION,
    SITE_BITS,
    STATUS,
    TILE_FLAGS,
    TILED,
    TILES,
    WORD,
)

LOOKS = 4096  # at all words together, a millisecond or more, before each is waited for until the limit


@cute.jit
def ldg32_system(g: Int64):
    """One word that another device, or the host, may have written."""
    return cute.arch.inline_ptx(
        "ld.relaxed.sys.global.b32 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[g]
    )


@cute.jit
def ldg64_system(g: Int64):
    """Eight bytes that another device, or the host, may have written."""
    return cute.arch.inline_ptx(
        "ld.relaxed.sys.global.b64 {$w0}, [{$r0}];", write_only_types=[Int64], read_only_args=[g]
    )


@cute.jit
def open_site(
    m_exchange: cute.Pointer, m_site: cute.Pointer, ranks: Constexpr[int], tiles: Constexpr[bool] = False
):
    """This rank, the exchange's flag, where in each rank's memory this one's words, or `tiles`, go, and where
    those of each rank are in this one's. Nothing of it changes in a step, so it is asked for before the wait.
    """
    g = m_exchange.toint()
    rank = Int32(ldg32_system(g + RANK))
    epoch = ldg32_system(g + EPOCH)
    region = ldg64_system(g + const_expr(TILED if tiles else REGION))
    site = ldg32_system(m_site.toint())
    to = cute.make_rmem_tensor((ranks,), Int64)
    here = cute.make_rmem_tensor((ranks,), Int64)
    turn = (site & Uint32(1)) + (epoch & Uint32(1)) * Uint32(2)
    first = turn.to(Int64) * region * ranks
    own = Int64(0)
    for peer in range_constexpr(ranks):
        inbox = ldg64_system(g + const_expr(TILES if tiles else INBOXES) + 8 * peer) + first
        to[peer] = inbox + rank.to(Int64) * region
        if rank == peer:
            own = inbox
    for peer in range_constexpr(ranks):
        here[peer] = own + region * peer
    return rank, (epoch << Uint32(SITE_BITS)) | site, to, here


@cute.jit
def push(to: cute.Tensor, rank: Int32, flag: Uint32, number: Int64, word: Uint32, ranks: Constexpr[int]):
    """Put word `number` into the inboxes of all other ranks."""
    for peer in range_constexpr(ranks):
        if rank != peer:
            cute.arch.inline_ptx(
                "{ .reg .b64 w; mov.b64 w, {{$r1},{$r2}}; st.relaxed.sys.global.b64 [{$r0}], w; }",
                read_only_args=[to[peer] + number * WORD, word, flag],
            )


@cute.jit
def receive(m_exchange: cute.Pointer, here: cute.Tensor, flag: Uint32, number: Int64, peer: Constexpr[int]):
    """Word `number` of another rank, waited for. NaN, and the status set, beyond the time limit; NaN too once
    the status is set, so that a step ends soon that has lost a rank.
    """
    g, at = m_exchange.toint(), here[peer] + number * WORD
    word, found = poll(at, flag)
    if found == Uint32(0):
        begun = cute.arch.globaltimer()
        while found == Uint32(0):
            word, found = poll(at, flag)
            if found == Uint32(0):
                if ldg32_system(g + STATUS) != Uint32(0):
                    word = Uint32(0x7FFFFFFF)
                    found = Uint32(1)
                elif cute.arch.globaltimer() - begun > ldg64_system(g + LIMIT):
                    give_up(g + STATUS, (flag & Uint32((1 << 28) - 1)) | Uint32(GIVEN_UP | peer << 28))
    return word


@cute.jit
def receive_all(
    m_exchange: cute.Pointer,
    here: cute.Tensor,
    rank: Int32,
    flag: Uint32,
    number: Int64,
    own: Uint32,
    ranks: Constexpr[int],
):
    """Word `number` of every rank, waited for; this rank's is `own`. Looks at all of several others at once:
    one after the other, each would take a round trip.
    """
    words = cute.make_rmem_tensor((ranks,), Uint32)
    late, looks = Uint32(1), Int32(0 if const_expr(ranks > 2) else LOOKS)
    while late != Uint32(0) and looks < LOOKS:
        late = Uint32(0)
        for peer in range_constexpr(ranks):
            word, found = look(here[peer] + number * WORD)
            words[peer] = word
            if found != flag and rank != peer:
                late = Uint32(1)
        looks = looks + 1
    for peer in range_constexpr(ranks):
        if rank == peer:
            words[peer] = own
        elif late != Uint32(0):
            words[peer] = receive(m_exchange, here, flag, number, peer)
    return words


@cute.jit
def look(g: Int64):
    """A word and its flag, as they are."""
    return cute.arch.inline_ptx(
        "{ .reg .b64 w; ld.relaxed.sys.global.b64 w, [{$r0}]; mov.b64 {{$w0},{$w1}}, w; }",
        write_only_types=[Uint32] * 2,
        read_only_args=[g],
    )


@cute.jit
def receive_sum(
    m_exchange: cute.Pointer,
    here: cute.Tensor,
    rank: Int32,
    flag: Uint32,
    number: Int64,
    own: Float32,
    ranks: Constexpr[int],
):
    """The sum of word `number` of all ranks, in order of the ranks; this rank's is `own`."""
    words = receive_all(m_exchange, here, rank, flag, number, own.bitcast(Uint32), ranks)
    total = words[0].bitcast(Float32)
    for peer in range_constexpr(1, ranks):
        total = ptx.plus(total, words[peer].bitcast(Float32))
    return total


@cute.jit
def push_vector(to: cute.Tensor, rank: Int32, at: Int64, words: cute.Tensor, ranks: Constexpr[int]):
    """Store 16 bytes of a tile at byte `at` of the tiles that all other ranks get of this one."""
    for peer in range_constexpr(ranks):
        if rank != peer:
            ptx.stg128(to[peer] + TILE_FLAGS + at, words[0], words[1], words[2], words[3])


@cute.jit
def push_flag(to: cute.Tensor, rank: Int32, flag: Uint32, tile: Int32, thread: Int32, ranks: Constexpr[int]):
    """Say that a tile is there, once all threads of this CTA have stored their bytes of it."""
    cute.arch.sync_threads()
    for peer in range_constexpr(ranks):
        if thread == peer and rank != peer:
            cute.arch.inline_ptx(
                "fence.acq_rel.sys; st.relaxed.sys.global.b32 [{$r0}], {$r1};",
                read_only_args=[to[peer] + Int64(tile) * 4, flag],
            )


@cute.jit
def receive_flag(
    m_exchange: cute.Pointer,
    here: cute.Tensor,
    rank: Int32,
    flag: Uint32,
    tile: Int32,
    thread: Int32,
    ranks: Constexpr[int],
):
    """Wait for a tile of all other ranks. Beyond the time limit the status is set, and a step that has lost a
    rank ends soon, with whatever was there.
    """
    g = m_exchange.toint()
    for peer in range_constexpr(ranks):
        if thread == peer and rank != peer:
            at = here[peer] + Int64(tile) * 4
            found = poll_flag(at, flag)
            if found == Uint32(0):
                begun = cute.arch.globaltimer()
                while found == Uint32(0):
                    found = poll_flag(at, flag)
                    if found == Uint32(0):
                        if ldg32_system(g + STATUS) != Uint32(0):
                            found = Uint32(1)
                        elif cute.arch.globaltimer() - begun > ldg64_system(g + LIMIT):
                            give_up(
                                g + STATUS, (flag & Uint32((1 << 28) - 1)) | Uint32(GIVEN_UP | peer << 28)
                            )
    cute.arch.sync_threads()


@cute.jit
def receive_vector(here: cute.Tensor, peer: Constexpr[int], at: Int64):
    """16 bytes of a tile of another rank, whose flag has been received."""
    return ptx.ldg128(here[peer] + TILE_FLAGS + at)


@cute.jit
def poll_flag(g: Int64, flag: Uint32):
    """1 once a tile has the flag, and its bytes may be read behind a barrier; 0 after 32 looks in vain."""
    return cute.arch.inline_ptx(
        "{ .reg .pred p; .reg .b32 f, n; mov.u32 n, 32; "
        "AGAIN: ld.acquire.sys.global.b32 f, [{$r0}]; "
        "setp.eq.u32 p, f, {$r1}; @p bra DONE; "
        "sub.u32 n, n, 1; setp.ne.u32 p, n, 0; @p bra AGAIN; "
        "setp.eq.u32 p, f, {$r1}; "
        "DONE: selp.u32 {$w0}, 1, 0, p; }",
        write_only_types=[Uint32],
        read_only_args=[g, flag],
    )


@cute.jit
def poll(g: Int64, flag: Uint32):
    """The value of a word, and 1, once it has the flag; after 32 looks in vain 0 is second."""
    return cute.arch.inline_ptx(
        "{ .reg .pred p; .reg .b32 v, f, n; .reg .b64 w; mov.u32 n, 32; "
        "AGAIN: ld.relaxed.sys.global.b64 w, [{$r0}]; mov.b64 {v, f}, w; "
        "setp.eq.u32 p, f, {$r1}; @p bra DONE; "
        "sub.u32 n, n, 1; setp.ne.u32 p, n, 0; @p bra AGAIN; "
        "DONE: selp.u32 {$w1}, 1, 0, p; mov.b32 {$w0}, v; }",
        write_only_types=[Uint32] * 2,
        read_only_args=[g, flag],
    )


@cute.jit
def give_up(g: Int64, status: Uint32):
    """Set the status, unless another thread has."""
    cute.arch.inline_ptx(
        "{ .reg .b32 s; atom.relaxed.sys.global.cas.b32 s, [{$r0}], 0, {$r1}; }", read_only_args=[g, status]
    )


# Launches ---------------------------------------------------------------------------------------------------


class Operands(NamedTuple):
    """x [N, width], of this rank -> y, the same bits on every rank: the sum [N, width] of f32, or all ranks'
    columns [N, ranks * width]; the block and the site.
    """

    x: cute.Pointer
    exchange: cute.Pointer
    site: cute.Pointer
    y: cute.Pointer


class Place(NamedTuple):
    """Where a thread works, of a grid of (parts, rows), and what `open_site` says."""

    thread: Int32
    part: Int32
    row: Int32
    rank: Int32
    flag: Uint32
    to: cute.Tensor
    here: cute.Tensor


@cute.jit
def enter(
    m_exchange: cute.Pointer, m_site: cute.Pointer, ranks: Constexpr[int], tiles: Constexpr[bool] = False
) -> Place:
    """Before the wait."""
    thread, _, _ = cute.arch.thread_idx()
    part, row, _ = cute.arch.block_idx()
    rank, flag, to, here = open_site(m_exchange, m_site, ranks, tiles)
    return Place(thread, part, row, rank, flag, to, here)


@cute.jit
def sum_rows(t: Constexpr[Summing], m: Operands, at: Place) -> None:
    """Give, take and add up a column, meet, let the successor start."""
    thread, part, row, rank, flag, to, here = at
    column = part * t.threads + thread
    number = Int64(row) * t.width + column
    if column < t.width:
        own = ptx.ldg_f32(m.x.toint() + number * 4)
        push(to, rank, flag, number, own.bitcast(Uint32), t.ranks)
        total = receive_sum(m.exchange, here, rank, flag, number, own, t.ranks)
        if const_expr(t.size == 4):
            ptx.stg_f32(m.y.toint() + number * 4, total)
        else:
            ptx.stg16(m.y.toint() + number * 2, ptx.f32x2_to_bf16x2(total, total))
    cute.arch.sync_threads()
    ptx.launch_dependents()


@cute.jit
def join_rows(t: Constexpr[Joining], m: Operands, at: Place) -> None:
    """Give words and store them, take the others' and store these, meet, let the successor start."""
    thread, part, row, rank, flag, to, here = at
    for n in range_constexpr(t.steps):
        i = (part + n * t.ctas) * t.threads + thread
        if i < t.width:
            number = Int64(row) * t.width + i
            word = ptx.ldg32(m.x.toint() + number * 4)
            push(to, rank, flag, number, word, t.ranks)
            column = Int64(row) * (t.width * t.ranks) + rank * t.width + i
            ptx.stg32(m.y.toint() + column * 4, word)
    cute.arch.sync_threads()  # lanes that give less must not wait before others of their warp have given
    for n in range_constexpr(t.steps):
        i = (part + n * t.ctas) * t.threads + thread
        for peer in range_constexpr(t.ranks):
            if rank != peer and i < t.width:
                number = Int64(row) * t.width + i
                other = receive(m.exchange, here, flag, number, peer)
                column = Int64(row) * (t.width * t.ranks) + peer * t.width + i
                ptx.stg32(m.y.toint() + column * 4, other)
    cute.arch.sync_threads()
    ptx.launch_dependents()


@cute.jit
def sum_tiles(t: Constexpr[Tiles], m: Operands, at: Place) -> None:
    """Give a tile and its flag, wait for the others' flags, add up, meet, let the successor start."""
    thread, part, row, rank, flag, to, here = at
    tile = row * t.parts + part
    own = cute.make_rmem_tensor((t.steps, 4), Uint32)
    for n in range_constexpr(t.steps):
        i = (part * t.steps + n) * t.threads + thread
        if i < t.width:
            place = (Int64(row) * t.width + i) * VECTOR
            own[n, 0], own[n, 1], own[n, 2], own[n, 3] = ptx.ldg128(m.x.toint() + place)
            push_vector(to, rank, place, own[n, None], t.ranks)
    push_flag(to, rank, flag, tile, thread, t.ranks)
    receive_flag(m.exchange, here, rank, flag, tile, thread, t.ranks)
    for n in range_constexpr(t.steps):
        i = (part * t.steps + n) * t.threads + thread
        if i < t.width:
            number = Int64(row) * t.width + i
            words = cute.make_rmem_tensor((t.ranks, 4), Uint32)
            for peer in range_constexpr(t.ranks):
                if rank == peer:
                    for j in range_constexpr(4):
                        words[peer, j] = own[n, j]
                else:
                    w0, w1, w2, w3 = receive_vector(here, peer, number * VECTOR)
                    words[peer, 0], words[peer, 1], words[peer, 2], words[peer, 3] = w0, w1, w2, w3
            total = cute.make_rmem_tensor((4,), Float32)
            for j in range_constexpr(4):
                total[j] = words[0, j].bitcast(Float32)
                for peer in range_constexpr(1, t.ranks):
                    total[j] = ptx.plus(total[j], words[peer, j].bitcast(Float32))
            if const_expr(t.size == 4):
                a, b, c, d = (total[j].bitcast(Uint32) for j in range(4))
                ptx.stg128(m.y.toint() + number * 16, a, b, c, d)
            else:
                low, high = ptx.f32x2_to_bf16x2(total[0], total[1]), ptx.f32x2_to_bf16x2(total[2], total[3])
                ptx.stg64(m.y.toint() + number * 8, low, high)
    cute.arch.sync_threads()
    ptx.launch_dependents()


@cute.jit
def join_tiles(t: Constexpr[Tiles], m: Operands, at: Place) -> None:
    """Give a tile and its flag, store it, wait for the others' flags, store theirs, meet, let the successor
    start.
    """
    thread, part, row, rank, flag, to, here = at
    tile = row * t.parts + part
    w = cute.make_rmem_tensor((4,), Uint32)
    for n in range_constexpr(t.steps):
        i = (part * t.steps + n) * t.threads + thread
        if i < t.width:
            place = (Int64(row) * t.width + i) * VECTOR
            w[0], w[1], w[2], w[3] = ptx.ldg128(m.x.toint() + place)
            push_vector(to, rank, place, w, t.ranks)
            column = Int64(row) * (t.width * t.ranks) + rank * t.width + i
            ptx.stg128(m.y.toint() + column * VECTOR, w[0], w[1], w[2], w[3])
    push_flag(to, rank, flag, tile, thread, t.ranks)
    receive_flag(m.exchange, here, rank, flag, tile, thread, t.ranks)
    for n in range_constexpr(t.steps):
        i = (part * t.steps + n) * t.threads + thread
        for peer in range_constexpr(t.ranks):
            if rank != peer and i < t.width:
                w0, w1, w2, w3 = receive_vector(here, peer, (Int64(row) * t.width + i) * VECTOR)
                column = Int64(row) * (t.width * t.ranks) + peer * t.width + i
                ptx.stg128(m.y.toint() + column * VECTOR, w0, w1, w2, w3)
    cute.arch.sync_threads()
    ptx.launch_dependents()
