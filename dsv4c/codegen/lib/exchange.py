"""Words to and from the other ranks: a value's 4 bytes and a flag in one store, so that no fence is needed.

The block's form is `dsv4c.exchange`'s. A kernel puts its words into the inboxes of all others before it waits
for any of theirs, and lets its successor start only behind the last of them: what that would load meanwhile
slows the waiting down.
"""

import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, Uint32, range_constexpr

from dsv4c.exchange import EPOCH, GIVEN_UP, INBOXES, LIMIT, RANK, REGION, SITE_BITS, STATUS, WORD


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
def open_site(m_exchange: cute.Pointer, m_site: cute.Pointer, ranks: Constexpr[int]):
    """This rank, the exchange's flag, where in each rank's memory this one's words go, and where those of
    each rank are in this one's. Nothing of it changes in a step, so it is asked for before the wait.
    """
    g = m_exchange.toint()
    rank = Int32(ldg32_system(g + RANK))
    epoch = ldg32_system(g + EPOCH)
    region = ldg64_system(g + REGION)
    site = ldg32_system(m_site.toint())
    to = cute.make_rmem_tensor((ranks,), Int64)
    here = cute.make_rmem_tensor((ranks,), Int64)
    turn = (site & Uint32(1)) + (epoch & Uint32(1)) * Uint32(2)
    first = turn.to(Int64) * region * ranks
    own = Int64(0)
    for peer in range_constexpr(ranks):
        inbox = ldg64_system(g + INBOXES + 8 * peer) + first
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
