"""Sums over the CTAs of a cluster: partial results are sent into every CTA's shared memory and counted by its
barrier.

An inbox is [CTA of origin][values] f32 at the same shared address in every CTA, with one mbarrier that counts
its bytes. Nobody leaves before its own inboxes are full, so no CTA writes into one that has exited.
"""

import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Int32, Int64, Uint32, range_constexpr

from dsv4c.codegen.lib import ptx


def _send(kind: str, words: str, s: Int32, s_bar: Int32, rank: Int32, when: Boolean, *given) -> None:
    """`words` of type `kind` to shared address `s` of CTA `rank`, counted by the barrier at `s_bar` there.

    Nothing unless `when` holds. No lane branches: one that had nothing to send would go on to the wait for
    what is sent, and look again and again while the others, which that wait is for, never got to their part.
    ptxas joins such branches with those behind them, even over `bar.warp.sync`.
    """
    cute.arch.inline_ptx(
        "{ .reg .pred p; .reg .b32 a, b; setp.ne.u32 p, {$r3}, 0; "
        "@p mapa.shared::cluster.u32 a, {$r0}, {$r2}; @p mapa.shared::cluster.u32 b, {$r1}, {$r2}; "
        f"@p st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.{kind} [a], {words}, [b]; }}",
        read_only_args=[s, s_bar, rank, Uint32(when), *given],
    )


@cute.jit
def send_f32(s: Int32, s_bar: Int32, rank: Int32, r: Float32, when: Boolean = True) -> None:
    """Store a float at shared address `s` of CTA `rank`, counted by the barrier at `s_bar` there; in lanes
    for which `when` holds. Whole warps.
    """
    _send("f32", "{$r4}", s, s_bar, rank, when, r)


@cute.jit
def send_i64(s: Int32, s_bar: Int32, rank: Int32, r: Int64, when: Boolean = True) -> None:
    """The same for an integer of 64 bits."""
    _send("b64", "{$r4}", s, s_bar, rank, when, r)


@cute.jit
def send_64(s: Int32, s_bar: Int32, rank: Int32, r0: Float32, r1: Float32, when: Boolean = True) -> None:
    """The same for two floats, 8-byte aligned."""
    _send("v2.f32", "{{$r4},{$r5}}", s, s_bar, rank, when, r0, r1)


@cute.jit
def send_128(
    s: Int32,
    s_bar: Int32,
    rank: Int32,
    r0: Uint32,
    r1: Uint32,
    r2: Uint32,
    r3: Uint32,
    when: Boolean = True,
) -> None:
    """The same for four words, 16-byte aligned."""
    _send("v4.b32", "{{$r4},{$r5},{$r6},{$r7}}", s, s_bar, rank, when, r0, r1, r2, r3)


@cute.jit
def open_inbox(s_bar: Int32, nbytes: Constexpr[int], thread: Int32):
    """Initialize the barrier of an inbox that takes `nbytes`. All threads, before `arrive`."""
    ptx.open_barrier(s_bar, thread)
    if thread == 0:
        ptx.mbarrier_expect(s_bar, Int32(nbytes))
    cute.arch.sync_warp()


@cute.jit
def arrive() -> None:
    """Say that this CTA's inboxes are open. All threads, converged."""
    cute.arch.cluster_arrive_relaxed()  # the barriers' initialization has its own fence


@cute.jit
def meet() -> None:
    """Wait until every CTA of the cluster has arrived. All threads, before anything is sent."""
    cute.arch.cluster_wait()


@cute.jit
def inbox_sum(s_inbox: Int32, values: Constexpr[int], ranks: Constexpr[int], index: Int32):
    """Sum of value `index` over the CTAs of origin, in rank order (two interleaved chains)."""
    even = ptx.lds_f32(s_inbox + index * 4)
    odd = Float32(0.0)
    for i in range_constexpr(1, ranks):
        value = ptx.lds_f32(s_inbox + (i * values + index) * 4)
        if i % 2:
            odd = odd + value
        else:
            even = even + value
    return even + odd
