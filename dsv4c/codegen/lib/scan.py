"""Sums over the threads of a CTA that are in front of each of them."""

import cutlass.cute as cute
from cutlass import Constexpr, Int32, range_constexpr


@cute.jit
def sums_before(own, number: Constexpr, s: Int32, thread: Int32, threads: Constexpr[int]):
    """Sums of a `number` of each thread: over the threads in front of this one, and over all.

    The order is fixed. Two barriers; `s` has room for a number of each warp.
    """
    lane, warp = thread % 32, thread // 32
    so_far = own
    for i in range_constexpr(5):
        other = cute.arch.shuffle_sync_up(so_far, offset=1 << i, mask_and_clamp=0)
        so_far = so_far + (other if lane >= (1 << i) else number(0))
    pointer = cute.make_ptr(number, s, cute.AddressSpace.smem, assumed_align=16)
    numbers = cute.make_tensor(pointer, cute.make_layout((threads // 32,)))
    if lane == 31:
        numbers[warp] = so_far
    cute.arch.sync_threads()
    before, all_ = number(0), number(0)
    for i in range_constexpr(threads // 32):
        before = before + (numbers[i] if i < warp else number(0))
        all_ = all_ + numbers[i]
    cute.arch.sync_threads()
    return before + so_far - own, all_
