"""All primitives, by family. Importing this package declares them; the functions here apply them."""

from dsv4c.ir.ops.attention import (
    attention_scores,
    attention_values,
    gather,
    sink_softmax,
    visible_entries,
    window_index,
)
from dsv4c.ir.ops.collective import all_gather, all_reduce
from dsv4c.ir.ops.compress import add_position_bias, completed_entries, compress_pool
from dsv4c.ir.ops.draft import accept, candidates, draft_rows, preceding, stop, trusted
from dsv4c.ir.ops.hyper import collapse_streams, expand_streams, mix_streams, spread_streams
from dsv4c.ir.ops.index import index_scores, top_k
from dsv4c.ir.ops.linear import expert_linear, grouped_linear, linear
from dsv4c.ir.ops.math import add, cast, clamp, mul, scale, shift, sigmoid, silu, sqrt_softplus, sum_
from dsv4c.ir.ops.moe import embedding, present, take_along
from dsv4c.ir.ops.norm import normalize, rms_norm, rsqrt_mean_square, softmax
from dsv4c.ir.ops.quant import dequantize, hadamard, quantize
from dsv4c.ir.ops.rope import rope, rope_frequencies
from dsv4c.ir.ops.sample import argmax, draw, emit, last_rows, penalize, token_probabilities
from dsv4c.ir.ops.shape import concat, reshape, slice_
from dsv4c.ir.ops.state import advance, cache_extend, cache_write, owners, positions

__all__ = [
    "accept",
    "add",
    "add_position_bias",
    "advance",
    "all_gather",
    "all_reduce",
    "argmax",
    "attention_scores",
    "attention_values",
    "cache_extend",
    "cache_write",
    "candidates",
    "cast",
    "clamp",
    "collapse_streams",
    "completed_entries",
    "compress_pool",
    "concat",
    "dequantize",
    "draft_rows",
    "draw",
    "embedding",
    "emit",
    "expand_streams",
    "expert_linear",
    "gather",
    "grouped_linear",
    "hadamard",
    "index_scores",
    "last_rows",
    "linear",
    "mix_streams",
    "mul",
    "normalize",
    "owners",
    "penalize",
    "positions",
    "preceding",
    "present",
    "quantize",
    "reshape",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rsqrt_mean_square",
    "scale",
    "shift",
    "sigmoid",
    "silu",
    "sink_softmax",
    "slice_",
    "softmax",
    "spread_streams",
    "sqrt_softplus",
    "stop",
    "sum_",
    "take_along",
    "token_probabilities",
    "top_k",
    "trusted",
    "visible_entries",
    "window_index",
]
