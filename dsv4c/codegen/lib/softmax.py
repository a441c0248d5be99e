"""Softmax pieces in powers of two: scores are multiplied by log2(e) once, then exp is ex2."""

import cutlass.cute as cute
from cutlass import Float32

from dsv4c.codegen.lib import ptx

LOG2_E = 1.4426950408889634


@cute.jit
def reference(maximum: Float32):
    """What to subtract: the maximum, or 0 while nothing was seen, so that 2^(-inf - 0) is 0, not NaN."""
    r = maximum
    if maximum == -Float32.inf:
        r = Float32(0.0)
    return r


@cute.jit
def weight(value: Float32, maximum: Float32):
    """2^(value - maximum), 0 for value -inf."""
    return ptx.ex2(value - reference(maximum))
