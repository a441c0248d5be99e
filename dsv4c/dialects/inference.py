"""The official inference code's `config.json`: dim, n_layers, moe_inter_dim, route_scale, window_size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dsv4c.dialects.reading import Reading, alternatives, copy_fields, shown
from dsv4c.dialects.release import EXPERT_FORMATS, RELEASE, schedule

INFERENCE = {
    **{name: name for name in RELEASE},
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "qk_rope_head_dim": "rope_head_dim",
    "num_experts_per_tok": "n_activated_experts",
    "moe_intermediate_size": "moe_inter_dim",
    "routed_scaling_factor": "route_scale",
    "num_hash_layers": "n_hash_layers",
    "sliding_window": "window_size",
    "rms_norm_eps": "norm_eps",
    "mtp_layers": "n_mtp_layers",
    "rope_factor": "rope_factor",
    "rope_original_max_position": "original_seq_len",
    "rope_beta_fast": "beta_fast",
    "rope_beta_slow": "beta_slow",
}
# What the official code fills in itself: ModelArgs in inference/model.py, and the tokenizer beside it.
INFERENCE_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "hc_eps": 1e-6,
    "mtp_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def read_inference(raw: Mapping[str, Any]) -> Reading:
    reading = Reading(raw, dict(INFERENCE))
    copy_fields(reading)
    filled = {name: value for name, value in INFERENCE_DEFAULTS.items() if name not in reading.fields}
    reading.fields |= filled
    if filled:
        values = ", ".join(f"{reading.spelling[name]}={value}" for name, value in filled.items())
        reading.notes.append(f"the inference code's defaults were taken for {values}")
    _position_limit(reading)
    schedule(reading)
    _formats(reading)
    return reading


def _position_limit(reading: Reading) -> None:
    """ModelArgs.max_seq_len only sizes its buffers; the model's own limit is what YaRN extends to."""
    original, factor = reading.count("rope_original_max_position"), reading.fields.get("rope_factor")
    if "max_position_embeddings" in reading.fields or original is None:
        return
    if isinstance(factor, (int, float)) and math.isfinite(factor):
        reading.fields["max_position_embeddings"] = int(original * factor)


def _formats(reading: Reading) -> None:
    """`dtype` (by default fp8) for the linears, `expert_dtype` (by default the same) for routed experts."""
    dtype, experts = reading.get("dtype") or "fp8", reading.get("expert_dtype")
    scale = reading.get("scale_fmt")
    if dtype not in ("fp8", "bf16"):
        reading.refuse("dtype", shown(dtype), "'fp8' or 'bf16'", "linear_format", "expert_format")
        return
    if dtype == "fp8" and scale not in (None, "ue8m0"):
        reading.refuse("scale_fmt", shown(scale), "'ue8m0'")
    if experts is None:
        reading.fields |= {"linear_format": dtype, "expert_format": dtype}
        reading.open["expert_format"] = ""
        return
    if dtype == "bf16" or not isinstance(experts, str) or experts not in EXPERT_FORMATS:
        expected = "no expert_dtype, as dtype is 'bf16'" if dtype == "bf16" else alternatives(EXPERT_FORMATS)
        reading.refuse("expert_dtype", shown(experts), expected, "linear_format", "expert_format")
        return
    reading.fields |= {"linear_format": dtype, "expert_format": EXPERT_FORMATS[experts]}
    if experts == "fp4":
        reading.open["expert_format"] = ""
