"""The experts' activation: clamped SwiGLU with the routing weight, and FP8 quantization of 128 outputs over a cluster."""

import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, range_constexpr

from dsv4c.codegen.lib import ptx, quantize

_LOG2E = 1.4426950408889634


@cute.jit
def swiglu(gate: Float32, up: Float32, limit: Constexpr[float], weight: Float32):
    """silu(min(gate, limit)) * clamp(up, -limit, limit) * weight, rounded to bf16."""
    gate = cute.arch.fmin(gate, Float32(limit))
    up = cute.arch.fmax(cute.arch.fmin(up, Float32(limit)), Float32(-limit))
    silu = ptx.divide(gate, Float32(1.0) + ptx.ex2(gate * Float32(-_LOG2E)))
    return ptx.round_bf16(silu * up * weight)


@cute.jit
def cluster_max(r: Float32, s_maxima: Int32, ctas: Constexpr[int], warp: Int32, lane: Int32):
    """Maximum of warp 0's `r` over all lanes and CTAs of the cluster, in warp 0. Every thread of the cluster calls.

    `s_maxima` is scratch, f32 [ctas]; the cluster must have arrived once before (`cluster_arrive_relaxed`).
    """
    rank = cute.arch.block_idx_in_cluster()
    cute.arch.cluster_wait()  # every CTA runs: its shared memory may be written
    if warp == 0:
        r = ptx.lanes_max(r, 32)
        if lane < ctas:
            ptx.store_remote_f32(s_maxima + rank * 4, lane, r)
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()
    for i in range_constexpr(ctas):
        r = cute.arch.fmax(r, ptx.lds_f32(s_maxima + i * 4))
    return r


@cute.jit
def store_e4m3(r: Float32, amax: Float32, g_codes: Int64, g_scale: Int64, lane: Int32, first: Int32):
    """One value per lane as e4m3 under the scale of `amax`: 32 codes at `g_codes`; lane 0 of CTA 0 stores the scale."""
    byte = quantize.fp8_exponent(amax)
    ptx.stg_u8(g_codes + lane, ptx.f32x2_to_e4m3x2(r * quantize.reciprocal(byte), Float32(0.0)))
    if lane == 0 and first == 0:
        ptx.stg_u8(g_scale, Uint32(byte))
