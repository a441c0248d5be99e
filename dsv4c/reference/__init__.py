"""What each primitive means, in PyTorch, one function each: the CPU backend, and the oracle of every kernel.

Sums and products accumulate in float64 and round once to the result's type, so a meaning does not depend on a
summation order; where the model's own rounding points lie inside an op, the op's meaning has them.
"""

from dsv4c.reference import (
    attention,
    collective,
    compress,
    draft,
    hyper,
    index,
    linear,
    math,
    moe,
    norm,
    quant,
    rope,
    sample,
    shape,
    state,
)
from dsv4c.reference.interpret import interpret, run
from dsv4c.reference.registry import MEANINGS, meaning

__all__ = [
    "MEANINGS",
    "attention",
    "collective",
    "compress",
    "draft",
    "hyper",
    "index",
    "interpret",
    "linear",
    "math",
    "meaning",
    "moe",
    "norm",
    "quant",
    "rope",
    "run",
    "sample",
    "shape",
    "state",
]
