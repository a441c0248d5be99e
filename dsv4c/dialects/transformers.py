"""transformers' `config.json`: layer_types, mlp_layer_types, compress_rates, rope_parameters.

Its own defaults are not taken: the schedule they give (HCA, HCA, then HCA and CSA in turn) is no release's.
"""

from __future__ import annotations

import reprlib
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
from dsv4c.dialects.release import PLAIN_ROPE, RELEASE, YARN, formats, rope_scaling, rope_type

LAYER_TYPES = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}


def read_transformers(raw: Mapping[str, Any]) -> Reading:
    reading = Reading(raw, dict(RELEASE))
    copy_fields(reading)
    _rope_dims(reading)
    _rope_parameters(reading)
    _layer_types(reading)
    _mlp_layer_types(reading)
    formats(reading)
    if drafts_with_dspark(reading):
        for name in DSPARK:
            reading.fields.pop(name, None)
        reading.notes.append("transformers saves no mtp.* tensors: DSpark's stages are left out")
    elif reading.count("mtp_layers"):
        note = (
            "transformers saves no mtp.* tensors; for a checkpoint it wrote set num_nextn_predict_layers to 0"
        )
        reading.notes.append(note)
    return reading


def _layer_types(reading: Reading) -> None:
    """A named type per layer, and the ratio each stands for. The MTP block has no entry."""
    types, layers = reading.get("layer_types"), reading.count("num_layers")
    if types is None:
        expected = "one type per layer, as transformers' default schedule fits no release"
        reading.refuse("layer_types", "is missing", expected, "compress_ratios")
        return
    if not is_list_of(types, str) or not set(types) <= set(LAYER_TYPES):
        strange = sorted(set(types) - set(LAYER_TYPES)) if is_list_of(types, str) else types
        expected = f"a list of {alternatives(LAYER_TYPES)}"
        reading.refuse("layer_types", f"holds {reprlib.repr(strange)}", expected, "compress_ratios")
        return
    if layers is not None and len(types) != layers:
        expected = f"{layers} (num_hidden_layers)"
        reading.refuse("layer_types", f"has {len(types)} entries", expected, "compress_ratios")
        return
    _compress_rates(reading, set(types))
    ratios = [LAYER_TYPES[name] for name in types]
    given = reading.get("compress_ratios")
    if given is not None and (not isinstance(given, list) or given[: len(ratios)] != ratios):
        expected = f"{reprlib.repr(ratios)}, as layer_types says"
        reading.refuse("compress_ratios", shown(given), expected, "compress_ratios")
        return
    reading.fields["compress_ratios"] = ratios


def _compress_rates(reading: Reading, types: set[str]) -> None:
    rates = reading.get("compress_rates")
    reading.judge_keys("compress_rates", rates if isinstance(rates, Mapping) else (), LAYER_TYPES)
    for name in sorted(types - {"sliding_attention"}):
        rate = rates.get(name) if isinstance(rates, Mapping) else rates
        if type(rate) is not int or rate != LAYER_TYPES[name]:
            found = "is missing" if rate is None else shown(rate)
            reading.refuse(f"compress_rates.{name}", found, str(LAYER_TYPES[name]))


def _mlp_layer_types(reading: Reading) -> None:
    """`hash_moe` or `moe` per layer; the hash-routed layers come first."""
    types = reading.get("mlp_layer_types")
    layers, given = reading.count("num_layers"), reading.count("num_hash_layers")
    if types is None:
        if "num_hash_layers" not in reading.fields:
            expected = "one of hash_moe, moe per layer, as there is no default schedule"
            reading.refuse("mlp_layer_types", "is missing", expected, "num_hash_layers")
        return
    if not is_list_of(types, str) or not set(types) <= {"hash_moe", "moe"}:
        reading.refuse("mlp_layer_types", shown(types), "a list of 'hash_moe' or 'moe'", "num_hash_layers")
        return
    hashed = types.count("hash_moe")
    if layers is not None and len(types) != layers:
        expected = f"{layers} (num_hidden_layers)"
        reading.refuse("mlp_layer_types", f"has {len(types)} entries", expected, "num_hash_layers")
    elif "hash_moe" in types[hashed:]:
        late = types.index("moe")
        expected = "'hash_moe', as hash-routed layers come first"
        reading.refuse(f"mlp_layer_types[{late}]", "is 'moe'", expected, "num_hash_layers")
    elif given is not None and given != hashed:
        expected = f"{hashed}, the number of 'hash_moe' in mlp_layer_types"
        reading.refuse("num_hash_layers", shown(given), expected, "num_hash_layers")
    else:
        reading.fields["num_hash_layers"] = hashed
        reading.spelling["num_hash_layers"] = "mlp_layer_types"


def _rope_parameters(reading: Reading) -> None:
    """`main` (sliding-window layers) and `compress` (the others), which must agree with the top level."""
    parameters = reading.get("rope_parameters")
    if not isinstance(parameters, Mapping) or not {"main", "compress"} <= set(parameters):
        key = "rope_scaling" if parameters is None else "rope_parameters"
        rope_scaling(reading, key, reading.get(key))
        return
    reading.judge_keys("rope_parameters", parameters, ("main", "compress"))
    for part, name in (("main", "rope_theta"), ("compress", "compress_rope_theta")):
        entry, key = parameters[part], f"rope_parameters.{part}"
        if not isinstance(entry, Mapping):
            reading.refuse(key, shown(entry), "an object with rope_theta and rope_type", *YARN)
            return
        theta, given = entry.get("rope_theta"), reading.fields.get(name)
        if theta is not None and given is not None and theta != given:
            reading.refuse(f"{key}.rope_theta", shown(theta), f"{given!r}, as {name} says", name)
        elif theta is not None:
            reading.fields[name] = theta
            reading.spelling[name] = f"{key}.rope_theta"
        _agree_on_rope_dims(reading, f"{key}.partial_rotary_factor", entry.get("partial_rotary_factor"))
    reading.judge_keys("rope_parameters.main", parameters["main"], PLAIN_ROPE)
    main = rope_type(parameters["main"])
    if main != "default":
        expected = "'default', as sliding-window layers have no YaRN"
        reading.refuse("rope_parameters.main.rope_type", shown(main), expected)
    compress = parameters["compress"]
    rope_scaling(reading, "rope_parameters.compress", compress)
    if rope_type(compress) == "yarn" and "attention_factor" not in compress:
        reading.notes.append(
            "rope_parameters.compress has no attention_factor: 1.0 was taken, as DeepSeek-V4 never rescales "
            "cos and sin; transformers derives another from the factor there, so write the 1.0 down"
        )


def _rope_dims(reading: Reading) -> None:
    """The file may give the rotated share of a head instead of the number of rotated dims."""
    share, head_dim = reading.get("partial_rotary_factor"), reading.count("head_dim")
    if "qk_rope_head_dim" in reading.fields:
        _agree_on_rope_dims(reading, "partial_rotary_factor", share)
    elif _is_share(share) and head_dim is not None:
        reading.fields["qk_rope_head_dim"] = int(head_dim * share)
        reading.spelling["qk_rope_head_dim"] = "partial_rotary_factor * head_dim"


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1


def _agree_on_rope_dims(reading: Reading, key: str, share: Any) -> None:
    dims, head_dim = reading.count("qk_rope_head_dim"), reading.count("head_dim")
    if share is None or dims is None or not head_dim:
        return
    if not _is_share(share) or int(head_dim * share) != dims:
        expected = f"{dims / head_dim} (qk_rope_head_dim {dims} of head_dim {head_dim})"
        reading.refuse(key, shown(share), expected, "qk_rope_head_dim")
