"""The ways a `config.json` spells DeepSeek-V4, each read into the same field names; one file per dialect.

Nothing is guessed: a schedule that is not written down, a setting DeepSeek-V4 does not have, or two keys that
contradict each other become problems, which `dsv4c.config` raises with whatever is wrong with single values.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any

from dsv4c.dialects.inference import read_inference
from dsv4c.dialects.reading import Reading, problem, shown, token_ids
from dsv4c.dialects.release import read_release, release_dict
from dsv4c.dialects.stored import settle
from dsv4c.dialects.transformers import read_transformers

__all__ = ["Reading", "problem", "read", "release_dict", "settle", "shown"]

# Settings that other models vary and DeepSeek-V4 does not. Absent is fine; another value is a problem.
FIXED: dict[str, object] = {
    "scoring_func": "sqrtsoftplus",
    "score_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "num_key_value_heads": 1,
}
TRANSFORMERS_ONLY = ("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters")
V41_MARKS = ("engram_", "vision_", "kv_source_layer", "index_source_layer", "candidate_")
# Keys that say nothing about the graph. Any other unread key is reported in the notes.
IRRELEVANT = frozenset(
    {
        *("architectures", "model_type", "torch_dtype", "dtype", "scale_dtype", "scale_fmt"),
        *("transformers_version", "use_cache", "initializer_range", "attention_dropout", "pad_token_id"),
        *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
        *("max_batch_size", "max_seq_len", "temperature"),
    }
)


NAMED = 20  # unread keys that are named


def read(raw: Mapping[str, Any]) -> Reading:
    """Recognize the dialect of a parsed `config.json` and read it."""
    unsupported = _v41_marks(raw)
    if unsupported:
        return _unknown(
            raw,
            f"DeepSeek-V4.1 is unsupported ({', '.join(unsupported)}): its compressed KV shared across "
            "layers, compress ratios 1 and 2, Engram memory and vision tower are not part of DeepSeek-V4",
        )
    model_type = raw.get("model_type", "deepseek_v4")
    if model_type != "deepseek_v4":
        return _unknown(raw, problem("model_type", shown(model_type), "'deepseek_v4'"))
    if any(key in raw for key in TRANSFORMERS_ONLY):
        reading = read_transformers(raw)
    elif "hidden_size" in raw or "num_hidden_layers" in raw:
        reading = read_release(raw)
    elif "dim" in raw or "n_layers" in raw:
        reading = read_inference(raw)
    else:
        keys = reprlib.repr(sorted(raw))
        return _unknown(
            raw,
            f"unknown dialect: the keys are {keys}; expected the release's (hidden_size, num_hidden_layers), "
            "transformers' (layer_types, ...) or the inference code's (dim, n_layers)",
        )
    if 4 not in reading.fields.get("compress_ratios", ()):  # no CSA layer, so there may be no indexer
        reading.fields = dict.fromkeys(("index_n_heads", "index_head_dim", "index_topk"), 0) | reading.fields
    token_ids(reading)
    _fixed_settings(reading)
    _unread_keys(reading)
    return reading


def _v41_marks(raw: Mapping[str, Any]) -> list[str]:
    for key in ("model_type", "architectures"):
        if re.search(r"deepseek_?v4[._]?1", str(raw.get(key)), re.IGNORECASE):
            return [f"{key} {raw[key]!r}"]
    return [key for key in sorted(raw) if key.startswith(V41_MARKS)][:3]


def _unknown(raw: Mapping[str, Any], text: str) -> Reading:
    reading = Reading(raw, {})
    reading.problems.append(text)
    return reading


def _fixed_settings(reading: Reading) -> None:
    for key, expected in FIXED.items():
        value = reading.get(key)
        if value is not None and (type(value) is not type(expected) or value != expected):
            reading.refuse(key, shown(value), f"{expected!r}, the only one DeepSeek-V4 uses")


def _unread_keys(reading: Reading) -> None:
    reading.judge_keys("", reading.raw.keys() - IRRELEVANT, reading.used)
    if reading.unread:
        unread = sorted(reading.unread)
        named = [key[:80] for key in unread[:NAMED]]
        more = f" and {len(unread) - NAMED} more" if len(unread) > NAMED else ""
        reading.notes.append(f"keys without a meaning here were ignored: {', '.join(named)}{more}")
