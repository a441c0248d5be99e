"""The experts' activation (DeepSeek-V4 inference/model.py): clamped SwiGLU with the routing weight."""

import cutlass.cute as cute
from cutlass import Constexpr, Float32

from dsv4c.codegen.lib import ptx

_LOG2E = 1.4426950408889634


@cute.jit
def swiglu(gate: Float32, up: Float32, limit: Constexpr[float], weight: Float32):
    """silu(min(gate, limit)) * clamp(up, -limit, limit) * weight, in f32."""
    gate = cute.arch.fmin(gate, Float32(limit))
    up = cute.arch.fmax(cute.arch.fmin(up, Float32(limit)), Float32(-limit))
    silu = gate * cute.arch.rcp_approx(Float32(1.0) + ptx.ex2(gate * Float32(-_LOG2E)))  # without a branch
    return silu * up * weight
