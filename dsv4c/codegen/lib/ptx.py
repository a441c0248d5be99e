"""PTX primitives that generated kernels are written in: one function per instruction, addresses and registers
only.

Contract: shared addresses are Int32 (`shared`), global addresses Int64 (`pointer.toint()`); packed pairs are
Uint32 with the first element in the low half. Everything here assembles for sm_90a and sm_100a unless its
docstring says otherwise.
"""

import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint8, Uint32, const_expr, range_constexpr
from cutlass.cutlass_dsl import CuTeDSL
from cutlass.memory import SmemAllocator

_asm = cute.arch.inline_ptx


# Memory -----------------------------------------------------------------------------------------------------


@cute.jit
def shared(nbytes: Constexpr[int]):
    """Address of the CTA's one dynamic shared allocation, 128-byte aligned. Call once per kernel."""
    return Int32(SmemAllocator().allocate_array(Uint8, nbytes, byte_alignment=128).toint())


@cute.jit
def lds32(s: Int32):
    """One 32-bit word of shared memory."""
    return _asm("ld.shared.b32 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[s])


@cute.jit
def lds64(s: Int32):
    """Two words of shared memory, 8-byte aligned."""
    return _asm("ld.shared.v2.b32 {{$w0},{$w1}}, [{$r0}];", write_only_types=[Uint32] * 2, read_only_args=[s])


@cute.jit
def lds128(s: Int32):
    """Four words of shared memory, 16-byte aligned."""
    return _asm(
        "ld.shared.v4.b32 {{$w0},{$w1},{$w2},{$w3}}, [{$r0}];",
        write_only_types=[Uint32] * 4,
        read_only_args=[s],
    )


@cute.jit
def lds_u8(s: Int32):
    """One byte of shared memory, zero-extended."""
    return _asm("ld.shared.u8 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[s])


@cute.jit
def lds_f32(s: Int32):
    """One float of shared memory."""
    return _asm("ld.shared.f32 {$w0}, [{$r0}];", write_only_types=[Float32], read_only_args=[s])


@cute.jit
def sts32(s: Int32, r: Uint32):
    """Store one word to shared memory."""
    _asm("st.shared.b32 [{$r0}], {$r1};", read_only_args=[s, r])


@cute.jit
def sts64(s: Int32, r0: Uint32, r1: Uint32):
    """Store two words to shared memory, 8-byte aligned."""
    _asm("st.shared.v2.b32 [{$r0}], {{$r1},{$r2}};", read_only_args=[s, r0, r1])


@cute.jit
def sts128(s: Int32, r0: Uint32, r1: Uint32, r2: Uint32, r3: Uint32):
    """Store four words to shared memory, 16-byte aligned."""
    _asm("st.shared.v4.b32 [{$r0}], {{$r1},{$r2},{$r3},{$r4}};", read_only_args=[s, r0, r1, r2, r3])


@cute.jit
def sts_f32(s: Int32, r: Float32):
    """Store one float to shared memory."""
    _asm("st.shared.f32 [{$r0}], {$r1};", read_only_args=[s, r])


@cute.jit
def sts_u8(s: Int32, r: Uint32):
    """Store the low byte to shared memory."""
    _asm("{ .reg .b16 l, h; mov.b32 {l, h}, {$r1}; st.shared.u8 [{$r0}], l; }", read_only_args=[s, r])


@cute.jit
def stmatrix(s: Int32, r0: Uint32, r1: Uint32, r2: Uint32, r3: Uint32):
    """Four 8x8 tiles of 16-bit numbers, in the order of MMA results, to shared memory: lane 8 i + n gives the
    address of row n of tile i, 16 bytes.
    """
    _asm(
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [{$r0}], {{$r1},{$r2},{$r3},{$r4}};",
        read_only_args=[s, r0, r1, r2, r3],
    )


@cute.jit
def sts16(s: Int32, r: Uint32):
    """Store the low half of a word to shared memory."""
    _asm("{ .reg .b16 l, h; mov.b32 {l, h}, {$r1}; st.shared.b16 [{$r0}], l; }", read_only_args=[s, r])


@cute.jit
def lds_i64(s: Int32):
    """One Int64 of shared memory."""
    return _asm("ld.shared.b64 {$w0}, [{$r0}];", write_only_types=[Int64], read_only_args=[s])


@cute.jit
def sts_i64(s: Int32, r: Int64):
    """Store one Int64 to shared memory."""
    _asm("st.shared.b64 [{$r0}], {$r1};", read_only_args=[s, r])


@cute.jit
def count_shared(s: Int32, r: Uint32):
    """Add to a word of shared memory, whoever else does."""
    _asm("red.shared.add.u32 [{$r0}], {$r1};", read_only_args=[s, r])


@cute.jit
def ldg32(g: Int64):
    """One word of global memory that a predecessor wrote: call after `wait`."""
    return _asm("ld.global.b32 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[g])


@cute.jit
def ldg64(g: Int64):
    """Two words of global memory that a predecessor wrote: call after `wait`."""
    return _asm("ld.global.v2.b32 {{$w0},{$w1}}, [{$r0}];", write_only_types=[Uint32] * 2, read_only_args=[g])


@cute.jit
def ldg128(g: Int64):
    """Four words of global memory that a predecessor wrote: call after `wait`."""
    return _asm(
        "ld.global.v4.b32 {{$w0},{$w1},{$w2},{$w3}}, [{$r0}];",
        write_only_types=[Uint32] * 4,
        read_only_args=[g],
    )


@cute.jit
def ldg_f32(g: Int64):
    """One float of global memory that a predecessor wrote: call after `wait`."""
    return _asm("ld.global.f32 {$w0}, [{$r0}];", write_only_types=[Float32], read_only_args=[g])


@cute.jit
def ldg_u8(g: Int64):
    """One byte of global memory that a predecessor wrote, zero-extended: call after `wait`."""
    return _asm("ld.global.u8 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[g])


@cute.jit
def ldg_u16(g: Int64):
    """Load two bytes from global memory, zero-extended."""
    return _asm(
        "{ .reg .b16 t; ld.global.b16 t, [{$r0}]; cvt.u32.u16 {$w0}, t; }",
        write_only_types=[Uint32],
        read_only_args=[g],
    )


@cute.jit
def ldg_early32(g: Int64):
    """One word of a weight, or of what was written before the predecessor began: before `wait`. A strong
    load: it finds no old line of L1, and the compiler does not sink it behind the wait.
    """
    return _asm("ld.relaxed.gpu.global.b32 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[g])


@cute.jit
def ldg_early64(g: Int64):
    """Two such words, 8-byte aligned."""
    return _asm(
        "ld.relaxed.gpu.global.v2.b32 {{$w0},{$w1}}, [{$r0}];",
        write_only_types=[Uint32] * 2,
        read_only_args=[g],
    )


@cute.jit
def ldg_early128(g: Int64):
    """Four such words, 16-byte aligned."""
    return _asm(
        "ld.relaxed.gpu.global.v4.b32 {{$w0},{$w1},{$w2},{$w3}}, [{$r0}];",
        write_only_types=[Uint32] * 4,
        read_only_args=[g],
    )


@cute.jit
def ldg32_constant(g: Int64):
    """One word that no launch of the graph writes (weights): may be read before `wait`."""
    return _asm("ld.global.nc.b32 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[g])


@cute.jit
def ldg_u8_constant(g: Int64):
    """One byte that no launch of the graph writes, zero-extended."""
    return _asm("ld.global.nc.u8 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[g])


@cute.jit
def ldg_f32_constant(g: Int64):
    """One float that no launch of the graph writes."""
    return _asm("ld.global.nc.f32 {$w0}, [{$r0}];", write_only_types=[Float32], read_only_args=[g])


@cute.jit
def ldg128_constant(g: Int64):
    """Four words that no launch of the graph writes, kept out of L1."""
    return _asm(
        "ld.global.nc.L1::no_allocate.v4.b32 {{$w0},{$w1},{$w2},{$w3}}, [{$r0}];",
        write_only_types=[Uint32] * 4,
        read_only_args=[g],
    )


@cute.jit
def stg_u8(g: Int64, r: Uint32):
    """Store the low byte to global memory."""
    _asm("st.global.u8 [{$r0}], {$r1};", read_only_args=[g, r])


@cute.jit
def stg16(g: Int64, r: Uint32):
    """Store the low half of a word to global memory."""
    _asm("{ .reg .b16 l, h; mov.b32 {l, h}, {$r1}; st.global.b16 [{$r0}], l; }", read_only_args=[g, r])


@cute.jit
def stg32(g: Int64, r: Uint32):
    """Store one word to global memory."""
    _asm("st.global.b32 [{$r0}], {$r1};", read_only_args=[g, r])


@cute.jit
def stg64(g: Int64, r0: Uint32, r1: Uint32):
    """Store two words to global memory, 8-byte aligned."""
    _asm("st.global.v2.b32 [{$r0}], {{$r1},{$r2}};", read_only_args=[g, r0, r1])


@cute.jit
def stg128(g: Int64, r0: Uint32, r1: Uint32, r2: Uint32, r3: Uint32):
    """Store four words to global memory, 16-byte aligned."""
    _asm("st.global.v4.b32 [{$r0}], {{$r1},{$r2},{$r3},{$r4}};", read_only_args=[g, r0, r1, r2, r3])


@cute.jit
def stg_f32(g: Int64, r: Float32):
    """Store one float to global memory."""
    _asm("st.global.f32 [{$r0}], {$r1};", read_only_args=[g, r])


# Barriers, bulk and asynchronous copies ---------------------------------------------------------------------


@cute.jit
def mbarrier_init(s: Int32, arrivals: Constexpr[int]):
    """Barrier at `s` (8 bytes) that completes a phase after `arrivals` arrivals and the bytes they expect."""
    _asm("mbarrier.init.shared::cta.b64 [{$r0}], {$r1};", read_only_args=[s, Int32(arrivals)])


@cute.jit
def open_barrier(s: Int32, thread: Int32):
    """A barrier at `s` that takes one arrival. All threads; thread 0's warp may use it at once, others behind
    a barrier of the CTA.
    """
    if thread == 0:
        mbarrier_init(s, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_warp()


@cute.jit
def mbarrier_expect(s: Int32, nbytes: Int32):
    """Arrive, and let the phase wait for `nbytes` of asynchronous copies too."""
    _asm("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{$r0}], {$r1};", read_only_args=[s, nbytes])


@cute.jit
def mbarrier_expect_alone(s: Int32, nbytes: Int32):
    """Let the phase wait for `nbytes` of asynchronous copies too, before this thread arrives."""
    _asm("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [{$r0}], {$r1};", read_only_args=[s, nbytes])


@cute.jit
def mbarrier_arrive(s: Int32):
    """Arrive."""
    _asm("mbarrier.arrive.shared::cta.b64 _, [{$r0}];", read_only_args=[s])


@cute.jit
def mbarrier_arrive_after(s: Int32, r: Float32):
    """Arrive once `r` has been computed, hence what it was computed from has been loaded: the address takes
    16 bits of the CTA's row of the grid that are always 0, masked by it. An arrival alone overtakes loads
    whose results nothing has asked for yet, and the next bulk copy then them (seen on H200s: one step in 160
    had a tile with bytes of it); a fence would wait for all loads that the thread has under way.
    """
    _, row, _ = cute.arch.block_idx()
    _asm(
        "{ .reg .b32 z; shr.u32 z, {$r2}, 16; and.b32 z, z, {$r1}; add.u32 z, z, {$r0}; "
        "mbarrier.arrive.shared::cta.b64 _, [z]; }",
        read_only_args=[s, r.bitcast(Uint32), row],
    )


@cute.jit
def fence_async() -> None:
    """What this thread wrote to shared memory, or loaded from it, comes before what bulk copies and tensor
    cores do there. Waits for all that the thread is loading, from global memory too.
    """
    _asm("fence.proxy.async.shared::cta;")


@cute.jit
def mbarrier_wait(s: Int32, phase: Int32):
    """Spin until the phase of parity `phase` has completed."""
    _asm(
        "{ .reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [{$r0}], {$r1}; "
        "@p bra DONE; bra AGAIN; DONE: }",
        read_only_args=[s, phase],
    )


@cute.jit
def bulk_load(s: Int32, g: Int64, nbytes: Int32, bar: Int32):
    """Copy `nbytes` (a multiple of 16, both sides 16-byte aligned) to shared memory; `bar` counts them. One
    thread.
    """
    _asm(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{$r0}], [{$r1}], {$r2}, [{$r3}];",
        read_only_args=[s, g, nbytes, bar],
    )


@cute.jit
def box_load(s: Int32, g_map: Int64, place: tuple, bar: Int32):
    """Copy the box of a tensor map that starts at `place`, element numbers innermost first, to shared memory;
    `bar` counts all its bytes, also of what is outside the array. One thread; to a multiple of 128, or, where
    rows are swizzled, of 1024.
    """
    rank = const_expr(len(place))
    axes = const_expr(", ".join(f"{{$r{i + 3}}}" for i in range(rank)))
    _asm(
        f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes "
        f"[{{$r0}}], [{{$r1}}, {{{axes}}}], [{{$r2}}];",
        read_only_args=[s, g_map, bar, *place],
    )


@cute.jit
def prefetch_l2(g: Int64):
    """Bring the line of 128 bytes that has this address to L2."""
    _asm("prefetch.global.L2 [{$r0}];", read_only_args=[g])


@cute.jit
def cp_async16(s: Int32, g: Int64):
    """Asynchronous copy of 16 bytes to shared memory past L1, both sides 16-byte aligned. Every calling
    thread copies.
    """
    _asm("cp.async.cg.shared.global [{$r0}], [{$r1}], 16;", read_only_args=[s, g])


@cute.jit
def cp_async_commit() -> None:
    """Close a group of `cp_async16`."""
    _asm("cp.async.commit_group;")


@cute.jit
def cp_async_wait(groups: Constexpr[int]):
    """Wait until at most `groups` of this thread's groups are in flight."""
    _asm(f"cp.async.wait_group {groups};")


@cute.jit
def cp_async_arrive(s: Int32):
    """Arrive at the barrier at `s` once this thread's copies so far are there."""
    _asm("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [{$r0}];", read_only_args=[s])


# Ordering between launches ----------------------------------------------------------------------------------


@cute.jit
def launch_dependents() -> None:
    """Let the successor's CTAs start, once all CTAs do: the first instruction of a kernel. Right behind
    `wait` in one that fills the machine anyway: its successor may then read before its own wait what is
    older than both.
    """
    cute.arch.griddepcontrol_launch_dependents()


@cute.jit
def wait() -> None:
    """Wait until every predecessor has finished and its writes are visible. Exactly once, before any
    dependent access.
    """
    cute.arch.griddepcontrol_wait()


@cute.jit
def sync_threads(threads: Constexpr[int]):
    """A barrier of the CTA's first `threads` threads, whole warps: those beside a warp that feeds them."""
    cute.arch.barrier(barrier_id=1, number_of_threads=threads)


OPEN, SCORED, CHOSEN, SUMMED, PARTS = 2, 3, 4, 5, 6
"""Barriers between the warp that reads the weights and the others: its ring is open; the router's scores are
there; it has chosen experts. Between the others: a token's products are there; from `PARTS` on one for each
part of k. Whoever does not wait may be ahead by one, so each has a number of its own.
"""


@cute.jit
def meet(barrier: Constexpr[int], threads: Constexpr[int]):
    """Wait at `barrier` for all `threads` of the CTA, whole warps that may be at other places of the code."""
    cute.arch.barrier(barrier_id=barrier, number_of_threads=threads)


@cute.jit
def arrive(barrier: Constexpr[int], threads: Constexpr[int]):
    """Let those that `meet` at `barrier` see what this warp has written, and go on."""
    cute.arch.barrier_arrive(barrier_id=barrier, number_of_threads=threads)


# Conversions ------------------------------------------------------------------------------------------------


@cute.jit
def e4m3x4_to_f16x2x2(r: Uint32):
    """Four e4m3 -> two f16x2, exact."""
    return _asm(
        "{ .reg .b16 l, h; mov.b32 {l, h}, {$r0}; "
        "cvt.rn.f16x2.e4m3x2 {$w0}, l; cvt.rn.f16x2.e4m3x2 {$w1}, h; }",
        write_only_types=[Uint32] * 2,
        read_only_args=[r],
    )


@cute.jit
def f32x2_to_e4m3x2(lo: Float32, hi: Float32):
    """Two floats -> two e4m3 codes in the low half, round to nearest even, saturating at 448."""
    return _asm(
        "{ .reg .b16 c, z; cvt.rn.satfinite.e4m3x2.f32 c, {$r1}, {$r0}; "
        "mov.b16 z, 0; mov.b32 {$w0}, {c, z}; }",
        write_only_types=[Uint32],
        read_only_args=[lo, hi],
    )


def converts_e2m1() -> bool:
    """Whether the target has conversions of e2m1, as Blackwell does; a compile-time fact."""
    return bool(CuTeDSL._get_dsl().get_arch_enum().major >= 10)


@cute.jit
def e2m1x8_to_f16x2x4(r: Uint32):
    """Eight e2m1 -> four f16x2, byte n of the word to register n, exact. Where `converts_e2m1`."""
    return _asm(
        "{ .reg .b8 b0, b1, b2, b3; mov.b32 {b0, b1, b2, b3}, {$r0}; "
        "cvt.rn.f16x2.e2m1x2 {$w0}, b0; cvt.rn.f16x2.e2m1x2 {$w1}, b1; "
        "cvt.rn.f16x2.e2m1x2 {$w2}, b2; cvt.rn.f16x2.e2m1x2 {$w3}, b3; }",
        write_only_types=[Uint32] * 4,
        read_only_args=[r],
    )


@cute.jit
def f32x2_to_e2m1x2(lo: Float32, hi: Float32):
    """Two floats -> two e2m1 in the low byte, to nearest even, clamped to +-6. Where `converts_e2m1`."""
    return _asm(
        "{ .reg .b8 b; cvt.rn.satfinite.e2m1x2.f32 b, {$r1}, {$r0}; cvt.u32.u8 {$w0}, b; }",
        write_only_types=[Uint32],
        read_only_args=[lo, hi],
    )


@cute.jit
def round_e2m1x2(lo: Float32, hi: Float32):
    """Two floats rounded to e2m1 as `f32x2_to_e2m1x2` does -> f16x2, exact. Where `converts_e2m1`."""
    return _asm(
        "{ .reg .b8 b; cvt.rn.satfinite.e2m1x2.f32 b, {$r1}, {$r0}; cvt.rn.f16x2.e2m1x2 {$w0}, b; }",
        write_only_types=[Uint32],
        read_only_args=[lo, hi],
    )


@cute.jit
def f32x2_to_bf16x2(lo: Float32, hi: Float32):
    """Two floats -> bf16x2, round to nearest even."""
    return _asm("cvt.rn.bf16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Uint32], read_only_args=[lo, hi])


@cute.jit
def f32x2_to_f16x2(lo: Float32, hi: Float32):
    """Two floats -> f16x2, round to nearest even."""
    return _asm("cvt.rn.f16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Uint32], read_only_args=[lo, hi])


@cute.jit
def f16x2_to_f32x2(r: Uint32):
    """f16x2 -> two floats, exact."""
    return _asm(
        "{ .reg .b16 l, h; mov.b32 {l, h}, {$r0}; cvt.f32.f16 {$w0}, l; cvt.f32.f16 {$w1}, h; }",
        write_only_types=[Float32] * 2,
        read_only_args=[r],
    )


@cute.jit
def bf16x2_to_f32x2(r: Uint32):
    """bf16x2 -> two floats, exact."""
    return (r << Uint32(16)).bitcast(Float32), (r & Uint32(0xFFFF0000)).bitcast(Float32)


@cute.jit
def round_bf16(r: Float32):
    """A float rounded to the nearest bf16, as a float."""
    return (f32x2_to_bf16x2(r, Float32(0.0)) << Uint32(16)).bitcast(Float32)


@cute.jit
def ue8m0_to_f32(byte: Uint32):
    """2^(byte - 127); byte 0 is the subnormal 2^-127."""
    bits = byte << Uint32(23)
    if byte == Uint32(0):
        bits = Uint32(0x00400000)
    return bits.bitcast(Float32)


# Arithmetic -------------------------------------------------------------------------------------------------


@cute.jit
def ex2(r: Float32):
    """2^r, about 2 ulp (ex2.approx.ftz)."""
    return _asm("ex2.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[r])


@cute.jit
def mul_bf16x2(a: Uint32, b: Uint32):
    """Two bf16 products, each rounded once; subnormals are kept."""
    return _asm(
        "{ .reg .b32 t; mov.b32 t, {$r1}; mul.rn.bf16x2 {$w0}, {$r0}, t; }",  # mul takes no immediate
        write_only_types=[Uint32],
        read_only_args=[a, b],
    )


@cute.jit
def mul_f16x2(a: Uint32, b: Uint32):
    """Two f16 products, each rounded once; subnormals are kept."""
    return _asm(
        "{ .reg .b32 t; mov.b32 t, {$r1}; mul.rn.f16x2 {$w0}, {$r0}, t; }",
        write_only_types=[Uint32],
        read_only_args=[a, b],
    )


@cute.jit
def permute(a: Uint32, b: Uint32, selector: Constexpr[int]):
    """Four bytes of (a, b): nibbles of `selector`, lowest byte first, count a's bytes 0..3 and b's 4..7."""
    return _asm(
        "prmt.b32 {$w0}, {$r0}, {$r1}, {$r2};",
        write_only_types=[Uint32],
        read_only_args=[a, b, Uint32(selector)],
    )


@cute.jit
def divide(a: Float32, b: Float32):
    """a / b rounded to nearest (the DSL's `/` may use an approximation under fastmath)."""
    return _asm("div.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


@cute.jit
def multiply(a: Float32, b: Float32):
    """a * b in f32, never one half of a fused multiply-add."""
    return _asm("mul.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


@cute.jit
def plus(a: Float32, b: Float32):
    """a + b in f32, never the other half."""
    return _asm("add.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


@cute.jit
def fma(a: Float32, b: Float32, c: Float32):
    """a * b + c in f32, rounded once."""
    return _asm(
        "fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Float32], read_only_args=[a, b, c]
    )


@cute.jit
def magnitude(a: Float32):
    """|a|: costs nothing where it is an operand."""
    return (a.bitcast(Uint32) & Uint32(0x7FFFFFFF)).bitcast(Float32)


@cute.jit
def nearest(a: Float32):
    """The whole number next to a, even on ties."""
    return _asm("cvt.rni.f32.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[a])


@cute.jit
def mma_f16(rC: cute.Tensor, a0: Uint32, a1: Uint32, a2: Uint32, a3: Uint32, b0: Uint32, b1: Uint32):
    """rC[4] += A[16x16] B[16x8], f16 operands, f32 accumulators, mma.sync fragment order."""
    r = _asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{$w0},{$w1},{$w2},{$w3}}, "
        "{{$r0},{$r1},{$r2},{$r3}}, {{$r4},{$r5}}, {{$r6},{$r7},{$r8},{$r9}};",
        write_only_types=[Float32] * 4,
        read_only_args=[a0, a1, a2, a3, b0, b1, rC[0], rC[1], rC[2], rC[3]],
    )
    for i in range_constexpr(4):
        rC[i] = r[i]


@cute.jit
def mma_bf16(rC: cute.Tensor, a0: Uint32, a1: Uint32, a2: Uint32, a3: Uint32, b0: Uint32, b1: Uint32):
    """rC[4] += A[16x16] B[16x8], bf16 operands, f32 accumulators, mma.sync fragment order."""
    r = _asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{$w0},{$w1},{$w2},{$w3}}, "
        "{{$r0},{$r1},{$r2},{$r3}}, {{$r4},{$r5}}, {{$r6},{$r7},{$r8},{$r9}};",
        write_only_types=[Float32] * 4,
        read_only_args=[a0, a1, a2, a3, b0, b1, rC[0], rC[1], rC[2], rC[3]],
    )
    for i in range_constexpr(4):
        rC[i] = r[i]


# Clusters ---------------------------------------------------------------------------------------------------


@cute.jit
def store_remote_f32(s: Int32, rank: Int32, r: Float32):
    """Store a float at the same shared address `s` of the cluster's CTA `rank`."""
    _asm(
        "{ .reg .b32 a; mapa.shared::cluster.u32 a, {$r0}, {$r1}; st.shared::cluster.f32 [a], {$r2}; }",
        read_only_args=[s, rank, r],
    )


@cute.jit
def load_remote_f32(s: Int32, rank: Int32):
    """The float at shared address `s` of the cluster's CTA `rank`."""
    return _asm(
        "{ .reg .b32 a; mapa.shared::cluster.u32 a, {$r0}, {$r1}; ld.shared::cluster.f32 {$w0}, [a]; }",
        write_only_types=[Float32],
        read_only_args=[s, rank],
    )


# Warp -------------------------------------------------------------------------------------------------------


@cute.jit
def lanes_max(r: Float32, lanes: Constexpr[int]):
    """Maximum over aligned groups of `lanes` lanes, in every lane."""
    for i in range_constexpr(5):
        if const_expr((1 << i) < lanes):
            r = cute.arch.fmax(r, cute.arch.shuffle_sync_bfly(r, offset=1 << i))
    return r


@cute.jit
def lanes_sum(r: Float32, lanes: Constexpr[int]):
    """Sum over aligned groups of `lanes` lanes, in every lane, in a fixed order."""
    for i in range_constexpr(5):
        if const_expr((1 << i) < lanes):
            r = r + cute.arch.shuffle_sync_bfly(r, offset=1 << i)
    return r
