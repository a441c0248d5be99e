"""The release's `config.json`: compress_ratios, num_hash_layers, rope_scaling, quantization_config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4c.dialects.reading import (
    DSPARK,
    Reading,
    alternatives,
    copy_fields,
    drafts_with_dspark,
    is_list_of,
    shown,
)

# Field of ModelConfig -> key of the file. The schedule, YaRN and formats are read by functions of their own.
RELEASE = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "head_dim": "head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "q_lora_rank": "q_lora_rank",
    "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "moe_intermediate_size": "moe_intermediate_size",
    "routed_scaling_factor": "routed_scaling_factor",
    "swiglu_limit": "swiglu_limit",
    "num_hash_layers": "num_hash_layers",
    "index_n_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "index_topk": "index_topk",
    "sliding_window": "sliding_window",
    "hc_mult": "hc_mult",
    "hc_sinkhorn_iters": "hc_sinkhorn_iters",
    "hc_eps": "hc_eps",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "compress_rope_theta": "compress_rope_theta",
    "max_position_embeddings": "max_position_embeddings",
    "mtp_layers": "num_nextn_predict_layers",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
YARN = {
    "rope_factor": "factor",
    "rope_original_max_position": "original_max_position_embeddings",
    "rope_beta_fast": "beta_fast",
    "rope_beta_slow": "beta_slow",
}
PLAIN_ROPE = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor"})
QUANTIZATION: dict[str, object] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
# expert_dtype -> ModelConfig.expert_format
EXPERT_FORMATS = {"fp4": "mxfp4", "fp8": "fp8"}
NVFP4_EXPERTS: dict[str, object] = {
    "quant_algo": "MIXED_PRECISION",
    "moe_quant_algo": "NVFP4",
    "group_size": 16,
}
# What NVIDIA's tools write for it, now and before.
NVFP4_KEYS = ("moe_quant_algo", "quant_algo", "quantized_layers", "group_size", "awq_block_size")


def release_dict(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` for ModelConfig's fields: reading it back gives an equal config."""
    raw: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}
    raw |= {key: fields[name] for name, key in RELEASE.items()}
    raw["rope_scaling"] = {"type": "yarn", **{key: fields[name] for name, key in YARN.items()}}
    raw["compress_ratios"] = [
        *fields["compress_ratios"],
        *[0] * (fields["mtp_layers"] + fields["dspark_stages"]),
    ]
    if fields["dspark_stages"]:
        raw |= {key: fields[name] for name, key in DSPARK.items()}
    if fields["linear_format"] == "fp8":
        nvfp4 = NVFP4_EXPERTS if fields["expert_format"] == "nvfp4" else {}
        raw["quantization_config"] = QUANTIZATION | nvfp4
        raw["expert_dtype"] = "fp8" if fields["expert_format"] == "fp8" else "fp4"
    return raw


def read_release(raw: Mapping[str, Any]) -> Reading:
    reading = Reading(raw, dict(RELEASE))
    copy_fields(reading)
    rope_scaling(reading, "rope_scaling", reading.get("rope_scaling"))
    schedule(reading)
    formats(reading)
    return reading


def schedule(reading: Reading) -> None:
    """compress_ratios: one entry per layer, then one zero per MTP block; or per DSpark stage, whose number
    nothing else says.
    """
    ratios = reading.get("compress_ratios")
    dspark = drafts_with_dspark(reading)
    layers, mtp = reading.count("num_layers"), reading.count("mtp_layers")
    layers_key, mtp_key = reading.spelling["num_layers"], reading.spelling["mtp_layers"]
    if ratios is None:
        expected = "one ratio per layer, as there is no default schedule"
        reading.refuse("compress_ratios", "is missing", expected, "compress_ratios")
        return
    if not is_list_of(ratios, int):
        reading.refuse("compress_ratios", shown(ratios), "a list of integers", "compress_ratios")
        return
    if layers is None or mtp is None:
        reading.refused.add("compress_ratios")
        return
    extra, extra_key = (mtp, mtp_key)
    if dspark:
        extra, extra_key = max(1, len(ratios) - layers), "DSpark stages, at least"
        reading.fields["dspark_stages"] = extra if "dspark_block_size" in reading.fields else 0
    if len(ratios) != layers + extra:
        expected = f"{layers + extra}: {layers} ({layers_key}) + {extra} ({extra_key})"
        reading.refuse("compress_ratios", f"has {len(ratios)} entries", expected, "compress_ratios")
        return
    for index, ratio in enumerate(ratios[layers:], start=layers):
        if ratio != 0:
            reading.refuse(f"compress_ratios[{index}]", shown(ratio), "0, as no layer has it")
    reading.fields["compress_ratios"] = ratios[:layers]


def rope_scaling(reading: Reading, key: str, scaling: Any) -> None:
    """YaRN for the compressed layers, or none. No `mscale`: DeepSeek-V4 never rescales cos and sin."""
    reading.spelling |= {name: f"{key}.{part}" for name, part in YARN.items()}
    if scaling is None or (isinstance(scaling, Mapping) and rope_type(scaling) == "default"):
        reading.judge_keys(key, scaling or (), PLAIN_ROPE)
        reading.fields |= {"rope_factor": 1.0, "rope_beta_fast": 32.0, "rope_beta_slow": 1.0}
        if "max_position_embeddings" in reading.fields:
            reading.fields["rope_original_max_position"] = reading.fields["max_position_embeddings"]
        else:  # missing, which is said of max_position_embeddings
            reading.refused.add("rope_original_max_position")
        return
    if not isinstance(scaling, Mapping) or rope_type(scaling) != "yarn":
        found = shown(scaling) if not isinstance(scaling, Mapping) else f"has type {rope_type(scaling)!r}"
        reading.refuse(key, found, "an object of type 'yarn' or 'default'", *YARN)
        return
    known = {*PLAIN_ROPE, "attention_factor", *YARN.values()}
    for extra in sorted(set(scaling) - known):
        expected = "no such key, as DeepSeek-V4's YaRN does not have it"
        reading.refuse(f"{key}.{extra}", shown(scaling[extra]), expected)
    if scaling.get("attention_factor", 1.0) != 1.0:
        found = shown(scaling["attention_factor"])
        reading.refuse(f"{key}.attention_factor", found, "1.0, as cos and sin are not rescaled")
    reading.fields |= {name: scaling[part] for name, part in YARN.items() if part in scaling}


def rope_type(scaling: Mapping[str, Any]) -> Any:
    return scaling.get("rope_type", scaling.get("type", "default"))


def formats(reading: Reading) -> None:
    """What the checkpoint stores, from quantization_config and expert_dtype."""
    quantization, top = reading.get("quantization_config"), reading.get("expert_dtype")
    if quantization is None:
        reading.fields |= {"linear_format": "bf16", "expert_format": "bf16"}
        if top not in (None, "bf16"):
            expected = "no expert_dtype, as there is no quantization_config"
            reading.refuse("expert_dtype", shown(top), expected)
        else:
            reading.open |= dict.fromkeys(("linear_format", "expert_format"), "")
        return
    if not isinstance(quantization, Mapping):
        reading.refuse(
            "quantization_config", shown(quantization), "an object", "linear_format", "expert_format"
        )
        return
    known = {*QUANTIZATION, *NVFP4_KEYS, "expert_dtype", "ignore"}
    reading.judge_keys("quantization_config", quantization, known)
    for key, value in QUANTIZATION.items():
        if quantization.get(key) != value:
            found = shown(quantization[key]) if key in quantization else "is missing"
            reading.refuse(f"quantization_config.{key}", found, repr(value))
    inner = quantization.get("expert_dtype")
    if top is not None and inner is not None and top != inner:
        reading.refuse("expert_dtype", shown(top), f"{inner!r}, as quantization_config.expert_dtype says")
    stored = top if top is not None else inner
    reading.fields["linear_format"] = "fp8"
    if any(quantization.get(key) is not None for key in NVFP4_KEYS):
        _nvfp4_experts(reading, stored, quantization)
    else:
        _experts(reading, stored)


def _experts(reading: Reading, stored: Any) -> None:
    """Routed experts of a config that says nothing of NVFP4; whose checkpoint may be that all the same."""
    if stored is not None and (not isinstance(stored, str) or stored not in EXPERT_FORMATS):
        reading.refuse("expert_dtype", shown(stored), alternatives(EXPERT_FORMATS), "expert_format")
        return
    reading.fields["expert_format"] = "mxfp4" if stored is None else EXPERT_FORMATS[stored]
    if stored is None:
        absent = "expert_dtype is absent, as in the first release: routed experts are MXFP4"
        reading.open["expert_format"] = absent
    elif stored == "fp4":
        reading.open["expert_format"] = ""


def _nvfp4_experts(reading: Reading, stored: Any, quantization: Mapping[str, Any]) -> None:
    """Routed experts of a config with keys of NVIDIA's tools: which algorithm, and what must go with it."""
    key, algorithm = _algorithm(reading, quantization)
    if algorithm not in (None, "NVFP4"):
        reading.refuse(f"quantization_config.{key}", shown(algorithm), "'NVFP4' or nothing", "expert_format")
        return
    for block in ("group_size", "awq_block_size"):
        if quantization.get(block, 16) != 16:
            found = shown(quantization[block])
            reading.refuse(f"quantization_config.{block}", found, "16, NVFP4's block")
    if stored not in (None, "fp4"):
        expected = f"'fp4', as quantization_config.{key} is 'NVFP4'"
        reading.refuse("expert_dtype", shown(stored), expected)
    if algorithm is None:
        reading.open["expert_format"] = (
            "quantization_config.moe_quant_algo is missing; expected 'NVFP4' if routed experts are that, or "
            f"no {key}, if they are not, or the checkpoint beside the config"
        )
    else:
        reading.fields["expert_format"] = "nvfp4"


def _algorithm(reading: Reading, quantization: Mapping[str, Any]) -> tuple[str, Any]:
    """The algorithm of routed experts and the key that names it; None where none does.

    Newer configs have moe_quant_algo. Older ones say quant_algo for all that is quantized, or list every
    layer of it with an algorithm of its own.
    """
    for key in ("moe_quant_algo", "quant_algo"):
        if quantization.get(key) not in (None, "MIXED_PRECISION"):
            return key, quantization[key]
    layers = quantization.get("quantized_layers")
    if not isinstance(layers, Mapping):
        return next(key for key in NVFP4_KEYS if quantization.get(key) is not None), None
    for layer, entry in layers.items():
        if ".experts" not in layer:
            expected = "layers of routed experts, the only ones that this release quantizes so"
            reading.refuse("quantization_config.quantized_layers", f"has {layer}", expected)
        named = entry.get("quant_algo") if isinstance(entry, Mapping) else entry
        if named is not None:
            return "quantized_layers", named
    return "quantized_layers", None
