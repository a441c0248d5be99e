"""Configs: three dialects, one model; and every way to get one wrong, with the message a user reads."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dsv4c.buckets import Bucket
from dsv4c.config import (
    BUILTIN,
    BUILTIN_FOLDER,
    Deployment,
    ModelConfig,
    check_deployment,
    load_config,
    save_config,
)
from dsv4c.errors import ConfigError

Raw = dict[str, Any]
CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
LAYER_TYPES = {0: "sliding_attention", 4: CSA, 128: HCA}


def release(name: str = "tiny") -> Raw:
    raw: Raw = json.loads((BUILTIN_FOLDER / f"{name}.json").read_text())
    return raw


def transformers(raw: Mapping[str, Any]) -> Raw:
    """The same model as `PreTrainedConfig.save_pretrained` writes it (transformers 5.23)."""
    gone = ("compress_ratios", "num_hash_layers", "rope_scaling", "torch_dtype")
    layers, hashed = raw["num_hidden_layers"], raw["num_hash_layers"]
    share = raw["qk_rope_head_dim"] / raw["head_dim"]
    scaling = raw["rope_scaling"]
    compress = {"rope_theta": raw["compress_rope_theta"], "attention_factor": 1.0, "rope_type": "yarn"}
    return {key: value for key, value in raw.items() if key not in gone} | {
        "dtype": "bfloat16",
        "layer_types": [LAYER_TYPES[ratio] for ratio in raw["compress_ratios"][:layers]],
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (layers - hashed),
        "compress_rates": {CSA: 4, HCA: 128},
        "mlp_bias": False,
        "partial_rotary_factor": share,
        "rope_parameters": {
            "compress": {**scaling, **compress, "partial_rotary_factor": share},
            "main": {"rope_type": "default", "rope_theta": raw["rope_theta"], "partial_rotary_factor": share},
        },
        "quantization_config": raw["quantization_config"] | {"expert_dtype": raw["expert_dtype"]},
    }


INFERENCE_SAME = (
    *(
        "vocab_size",
        "n_routed_experts",
        "n_shared_experts",
        "swiglu_limit",
        "q_lora_rank",
        "head_dim",
        "o_groups",
    ),
    *("o_lora_rank", "rope_theta", "compress_rope_theta", "index_n_heads", "index_head_dim", "index_topk"),
    *("hc_mult", "hc_sinkhorn_iters", "compress_ratios"),
)


def inference(raw: Mapping[str, Any]) -> Raw:
    """The same model as the official inference/config.json has it: no norm_eps, no hc_eps, no token ids."""
    renamed = {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_hash_layers": "num_hash_layers",
        "n_heads": "num_attention_heads",
        "moe_inter_dim": "moe_intermediate_size",
        "n_activated_experts": "num_experts_per_tok",
        "route_scale": "routed_scaling_factor",
        "score_func": "scoring_func",
        "rope_head_dim": "qk_rope_head_dim",
        "window_size": "sliding_window",
    }
    scaling = raw["rope_scaling"]
    return (
        {key: raw[key] for key in INFERENCE_SAME}
        | {key: raw[source] for key, source in renamed.items()}
        | {"original_seq_len": scaling["original_max_position_embeddings"], "rope_factor": scaling["factor"]}
        | {"beta_fast": scaling["beta_fast"], "beta_slow": scaling["beta_slow"]}
        | {"dtype": "fp8", "scale_fmt": "ue8m0", "expert_dtype": "fp4"}
    )


@pytest.fixture
def load(tmp_path: Path) -> Callable[[Raw], ModelConfig]:
    def write_and_load(raw: Raw) -> ModelConfig:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(raw))
        return load_config(path)

    return write_and_load


@pytest.fixture
def refusal(load: Callable[[Raw], ModelConfig]) -> Callable[[Raw], str]:
    """The message a config is refused with, without the path in front."""

    def message(raw: Raw) -> str:
        with pytest.raises(ConfigError) as error:
            load(raw)
        return str(error.value).partition("config.json: ")[2]

    return message


# What loads


def test_flash_is_read_as_released() -> None:
    config = load_config("deepseek-v4-flash")
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (43, 4096, 129280)
    assert (config.n_routed_experts, config.num_experts_per_tok, config.index_topk) == (256, 6, 512)
    assert len(config.compress_ratios) == 43
    assert config.compress_ratios[:5] == (0, 0, 4, 128, 4)
    assert (config.mtp_layers, config.num_hash_layers) == (1, 3)
    assert (config.rope_theta, config.compress_rope_theta, config.rope_factor) == (10000.0, 160000.0, 16.0)
    assert (config.linear_format, config.expert_format) == ("fp8", "mxfp4")
    assert config.notes == ()


def test_pro_is_read_as_released() -> None:
    config = load_config("deepseek-v4-pro")
    assert (config.num_layers, config.hidden_size, config.num_attention_heads) == (61, 7168, 128)
    assert (config.o_groups, config.index_topk, config.routed_scaling_factor) == (16, 1024, 2.5)
    assert config.compress_ratios[:4] == (128, 128, 4, 128)


def test_builtin_names_are_the_files() -> None:
    assert sorted(path.stem for path in BUILTIN_FOLDER.glob("*.json")) == sorted(BUILTIN)
    assert [load_config(name).name for name in BUILTIN] == list(BUILTIN)


@pytest.mark.parametrize("name", BUILTIN)
def test_three_dialects_are_one_model(name: str, load: Callable[[Raw], ModelConfig]) -> None:
    expected = load_config(name)
    for dialect in (transformers, inference):
        config = load(dialect(release(name)))
        assert config == expected
        assert config.digest == expected.digest


def test_what_transformers_itself_writes(tmp_path: Path) -> None:
    transformers_config = pytest.importorskip("transformers").DeepseekV4Config(**release())
    transformers_config.save_pretrained(tmp_path)
    assert load_config(tmp_path) == load_config("tiny")


def test_transformers_may_leave_out_what_it_can_derive(load: Callable[[Raw], ModelConfig]) -> None:
    raw = transformers(release())
    del raw["qk_rope_head_dim"]
    flat = {key: value for key, value in raw.items() if key != "rope_parameters"}
    scaling = release()["rope_scaling"]
    for config in (
        load(raw),
        load(flat | {"rope_parameters": scaling}),
        load(flat | {"rope_scaling": scaling}),
    ):
        assert config == load_config("tiny")


def test_transformers_is_told_apart_from_mtp(load: Callable[[Raw], ModelConfig]) -> None:
    (note,) = load(transformers(release())).notes
    assert (
        note
        == "transformers saves no mtp.* tensors; for a checkpoint it wrote set num_nextn_predict_layers to 0"
    )
    config = load(transformers(release()) | {"num_nextn_predict_layers": 0})
    assert (config.mtp_layers, config.notes) == (0, ())


def test_the_inference_limit_may_be_given(load: Callable[[Raw], ModelConfig]) -> None:
    assert load(inference(release()) | {"max_position_embeddings": 4096}).max_position_embeddings == 4096


def test_plain_rope_is_a_factor_of_one(load: Callable[[Raw], ModelConfig]) -> None:
    for scaling in (None, {"rope_type": "default"}):
        config = load(release() | {"rope_scaling": scaling})
        assert (config.rope_factor, config.rope_original_max_position) == (1.0, 1048576)


def test_a_model_without_csa_needs_no_indexer(load: Callable[[Raw], ModelConfig]) -> None:
    raw = {key: value for key, value in release().items() if not key.startswith("index_")}
    config = load(raw | {"compress_ratios": [0, 0, 128, 128, 128, 128, 0]})
    assert (config.index_n_heads, config.index_head_dim, config.index_topk) == (0, 0, 0)


def test_the_inference_defaults_are_noted(load: Callable[[Raw], ModelConfig]) -> None:
    (note,) = load(inference(release())).notes
    assert "norm_eps=1e-06" in note
    assert "hc_eps=1e-06" in note


@pytest.mark.parametrize(
    ("change", "formats"),
    [
        ({}, ("fp8", "mxfp4")),
        ({"expert_dtype": "fp8"}, ("fp8", "fp8")),
        ({"expert_dtype": None}, ("fp8", "mxfp4")),
        ({"expert_dtype": None, "quantization_config": None}, ("bf16", "bf16")),
    ],
)
def test_release_formats(change: Raw, formats: tuple[str, str], load: Callable[[Raw], ModelConfig]) -> None:
    config = load(release() | change)
    assert (config.linear_format, config.expert_format) == formats


@pytest.mark.parametrize(
    ("change", "formats"),
    [
        ({"expert_dtype": None}, ("fp8", "fp8")),
        ({"dtype": None}, ("fp8", "mxfp4")),
        ({"dtype": "bf16", "expert_dtype": None}, ("bf16", "bf16")),
    ],
)
def test_inference_formats(change: Raw, formats: tuple[str, str], load: Callable[[Raw], ModelConfig]) -> None:
    config = load(inference(release()) | change)
    assert (config.linear_format, config.expert_format) == formats


def test_nvfp4_experts(load: Callable[[Raw], ModelConfig]) -> None:
    raw = release()
    raw["quantization_config"] |= {
        "quant_algo": "MIXED_PRECISION",
        "moe_quant_algo": "NVFP4",
        "group_size": 16,
    }
    assert load(raw).expert_format == "nvfp4"


DSPARK = {
    "dspark_block_size": 5,
    "dspark_noise_token_id": 128799,
    "dspark_markov_rank": 256,
    "dspark_target_layer_ids": [40, 41, 42],
}


def test_dspark_takes_the_place_of_mtp(load: Callable[[Raw], ModelConfig], tmp_path: Path) -> None:
    """Its stages are those that compress_ratios has behind the layers, whatever else counts."""
    flash = release("deepseek-v4-flash")
    raw = flash | DSPARK | {"compress_ratios": [*flash["compress_ratios"], 0, 0]}
    config = load(raw)
    assert config == dataclasses.replace(
        load_config("deepseek-v4-flash"),
        mtp_layers=0,
        dspark_stages=3,
        dspark_block_size=5,
        dspark_noise_token_id=128799,
        dspark_markov_rank=256,
        dspark_target_layers=(40, 41, 42),
    )
    assert config.drafts_with == "dspark"
    assert config.notes == (
        "num_nextn_predict_layers 1 counts for nothing: the mtp.* tensors are DSpark's stages",
    )
    save_config(config, tmp_path)
    assert load_config(tmp_path) == config == ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert load(raw | {"compress_ratios": flash["compress_ratios"]}).dspark_stages == 1


def test_dspark_described_in_part_is_left_out(load: Callable[[Raw], ModelConfig]) -> None:
    flash = release("deepseek-v4-flash")
    stages = {"compress_ratios": [*flash["compress_ratios"], 0, 0]}
    config = load(flash | DSPARK | stages | {"dspark_markov_rank": None})
    assert config == dataclasses.replace(load_config("deepseek-v4-flash"), mtp_layers=0)
    assert config.drafts_with == ""
    assert config.notes[0] == "DSpark's stages are left out: dspark_markov_rank is missing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dspark_markov_rank": 0}, "dspark_markov_rank is 0; expected a positive integer"),
        ({"dspark_block_size": 0}, "dspark_block_size is 0; expected a positive integer"),
        ({"dspark_noise_token_id": 129280}, "dspark_noise_token_id is 129280; expected a token id below"),
        ({"dspark_target_layer_ids": [42, 41]}, "dspark_target_layer_ids is [42, 41]; expected ascending"),
        ({"dspark_target_layer_ids": [43]}, "dspark_target_layer_ids is [43]; expected ascending numbers"),
        ({"dspark_target_layer_ids": []}, "dspark_target_layer_ids is []; expected ascending numbers of"),
        ({"dspark_target_layer_ids": "40"}, "dspark_target_layer_ids is '40'; expected a list of layer"),
    ],
)
def test_wrong_dspark_fields(load: Callable[[Raw], ModelConfig], change: Raw, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(release("deepseek-v4-flash") | DSPARK | change)
    assert message in str(error.value)


def test_unread_keys_are_noted(load: Callable[[Raw], ModelConfig]) -> None:
    config = load(release() | {"window_shape": "round"})
    assert config.notes == ("keys without a meaning here were ignored: window_shape",)


def test_a_key_like_a_known_one_is_noted_with_what_it_may_mean(load: Callable[[Raw], ModelConfig]) -> None:
    config = load(release() | {"v_head_dim": 128})
    assert config.notes == ("keys without a meaning here were ignored: v_head_dim (is it head_dim?)",)


@pytest.mark.parametrize("given", ["hidden_sise", "hiden_size"])
def test_a_misspelled_key_is_said_alone(given: str, refusal: Callable[[Raw], str]) -> None:
    raw = release()
    raw[given] = raw.pop("hidden_size")
    assert refusal(raw) == f"{given} is unknown; expected hidden_size, or no such key"


def test_unread_keys_of_inner_objects_are_noted(load: Callable[[Raw], ModelConfig]) -> None:
    raw = release()
    raw["quantization_config"] |= {"kv_cache_bits": 8}
    assert load(raw).notes == ("keys without a meaning here were ignored: quantization_config.kv_cache_bits",)
    raw = transformers(release()) | {"num_nextn_predict_layers": 0}
    raw["rope_parameters"]["main"]["wave"] = 1
    raw["rope_parameters"]["index"] = {}
    raw["compress_rates"]["lightly_compressed"] = 2
    (note,) = load(raw).notes
    assert note == (
        "keys without a meaning here were ignored: compress_rates.lightly_compressed, rope_parameters.index, "
        "rope_parameters.main.wave"
    )
    flat = release() | {"rope_scaling": {"type": "default", "factor": 16}}
    assert load(flat).notes == ("keys without a meaning here were ignored: rope_scaling.factor",)


def test_a_misspelled_inner_key_is_refused(refusal: Callable[[Raw], str]) -> None:
    raw = release()
    raw["quantization_config"]["moe_quant_algos"] = "NVFP4"
    expected = "quantization_config.moe_quant_algos is unknown; expected moe_quant_algo, or no such key"
    assert refusal(raw) == expected


@pytest.mark.parametrize(
    ("change", "ids"),
    [
        ({"eos_token_id": [1, 5]}, (0, 1)),
        ({"eos_token_id": [7]}, (0, 7)),
        ({"bos_token_id": None}, (None, 1)),
        ({"bos_token_id": None, "eos_token_id": None}, (None, None)),
    ],
)
def test_token_ids_may_be_several_or_none(
    change: Raw, ids: tuple[int | None, int | None], load: Callable[[Raw], ModelConfig], tmp_path: Path
) -> None:
    config = load(release() | change)
    assert (config.bos_token_id, config.eos_token_id) == ids
    assert bool(config.notes) == (change.get("eos_token_id") is not None)
    save_config(config, tmp_path)
    assert load_config(tmp_path) == ModelConfig.from_dict(config.to_dict()) == config


# What the tensors beside a config decide


def beside(folder: Path, raw: Raw, tensors: Mapping[str, str], index: bool = False) -> Path:
    """A checkpoint folder whose tensors have these element types, one element each."""
    size = {"BF16": 2}
    entries, at = {}, 0
    for name, dtype in tensors.items():
        end = at + size.get(dtype, 1)
        entries[name] = {"dtype": dtype, "shape": [1], "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries).encode()
    file = "model-00001-of-00001.safetensors" if index else "model.safetensors"
    (folder / file).write_bytes(len(header).to_bytes(8, "little") + header + bytes(at))
    if index:
        listing = json.dumps({"weight_map": dict.fromkeys(tensors, file)})
        (folder / "model.safetensors.index.json").write_text(listing)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


WQ_A, W1 = "layers.0.attn.wq_a.weight", "layers.0.ffn.experts.0.w1.weight"
MERGED = "model.layers.0.mlp.experts.gate_up_proj"
TAKEN = "{} {} was taken, as the config leaves it open and {} is {}"


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize(
    ("change", "tensors", "formats", "notes"),
    [
        (
            {"expert_dtype": None},
            {W1: "F8_E4M3"},
            ("fp8", "fp8"),
            [TAKEN.format("expert_format", "fp8", W1, "F8_E4M3")],
        ),
        ({"expert_dtype": None}, {W1: "I8"}, ("fp8", "mxfp4"), []),
        (
            {"expert_dtype": None},
            {MERGED: "F8_E4M3"},
            ("fp8", "fp8"),
            [TAKEN.format("expert_format", "fp8", MERGED, "F8_E4M3")],
        ),
        (
            {},
            {W1: "U8", f"{W1}_scale": "F8_E4M3"},
            ("fp8", "nvfp4"),
            [TAKEN.format("expert_format", "nvfp4", f"{W1}_scale", "F8_E4M3")],
        ),
        (
            {"expert_dtype": None, "quantization_config": None},
            {WQ_A: "F8_E4M3", W1: "I8"},
            ("fp8", "mxfp4"),
            [
                TAKEN.format("linear_format", "fp8", WQ_A, "F8_E4M3"),
                TAKEN.format("expert_format", "mxfp4", W1, "I8"),
            ],
        ),
        (
            {"expert_dtype": None, "quantization_config": None},
            {WQ_A: "BF16", W1: "BF16"},
            ("bf16", "bf16"),
            [],
        ),
        ({"expert_dtype": "fp8"}, {W1: "I8"}, ("fp8", "fp8"), []),  # decided: who reads the weights objects
    ],
)
def test_what_a_config_leaves_open_is_taken_from_the_tensors(
    change: Raw,
    tensors: dict[str, str],
    formats: tuple[str, str],
    notes: list[str],
    index: bool,
    tmp_path: Path,
) -> None:
    config = load_config(beside(tmp_path, release() | change, tensors, index))
    assert (config.linear_format, config.expert_format) == formats
    assert list(config.notes) == notes


def test_a_checkpoint_that_cannot_be_read_decides_nothing(tmp_path: Path) -> None:
    beside(tmp_path, release() | {"expert_dtype": None}, {W1: "F8_E4M3"})
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    config = load_config(tmp_path)
    assert config.expert_format == "mxfp4"
    assert config.notes == ("expert_dtype is absent, as in the first release: routed experts are MXFP4",)


QUANT_ALGO = {"quant_algo": "NVFP4", "group_size": 16}
LISTED = {"quantized_layers": {"layers.0.ffn.experts.0.w1": {"quant_algo": "NVFP4"}}, "awq_block_size": 16}
UNSAID = {"quant_algo": None, "quantized_layers": {"layers.0.ffn.experts.0.w1": {"awq_block_size": 16}}}


@pytest.mark.parametrize("keys", [QUANT_ALGO, LISTED])
def test_older_spellings_of_nvfp4(keys: Raw, load: Callable[[Raw], ModelConfig]) -> None:
    raw = release()
    raw["quantization_config"] |= keys
    config = load(raw)
    assert (config.expert_format, config.notes) == ("nvfp4", ())


def test_an_nvfp4_config_without_an_algorithm_asks_for_it(
    refusal: Callable[[Raw], str], tmp_path: Path
) -> None:
    raw = release()
    raw["quantization_config"] |= UNSAID
    assert refusal(raw).startswith(
        "quantization_config.moe_quant_algo is missing; expected 'NVFP4' if routed"
    )
    assert load_config(beside(tmp_path, raw, {f"{W1}_scale": "F8_E4M3"})).expert_format == "nvfp4"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"quant_algo": "W4A8"}, "quantization_config.quant_algo is 'W4A8'; expected 'NVFP4' or nothing"),
        (QUANT_ALGO | {"group_size": 32}, "quantization_config.group_size is 32; expected 16"),
        (LISTED | {"awq_block_size": 64}, "quantization_config.awq_block_size is 64; expected 16"),
        (
            {"quantized_layers": {"layers.0.attn.wq_a": {"quant_algo": "NVFP4"}}},
            "quantization_config.quantized_layers has layers.0.attn.wq_a; expected layers of routed experts",
        ),
    ],
)
def test_wrong_older_nvfp4(keys: Raw, message: str, refusal: Callable[[Raw], str]) -> None:
    raw = release()
    raw["quantization_config"] |= keys
    assert refusal(raw).startswith(message)


def test_digest_ignores_the_name_and_nothing_else() -> None:
    config = load_config("tiny")
    assert dataclasses.replace(config, name="other", notes=("x",)).digest == config.digest
    digests = {dataclasses.replace(config, **{name: value}).digest for name, value in CHANGES.items()}
    assert len(digests | {config.digest}) == len(CHANGES) + 1
    counted = {item.name for item in dataclasses.fields(ModelConfig)} - {"name", "notes", *DSPARK_FIELDS}
    assert set(CHANGES) | {"num_layers", "compress_ratios", "n_shared_experts", "linear_format"} == counted


def test_the_digest_counts_dspark_where_there_is_any() -> None:
    """A model without it is what it was before its fields were known."""
    config = dataclasses.replace(load_config("tiny"), mtp_layers=0, **DSPARK_FIELDS)
    more = {"dspark_target_layers": (1, 2)}
    changed = [{n: v + 1 if isinstance(v, int) else more[n]} for n, v in DSPARK_FIELDS.items()]
    assert len({config.digest, *(dataclasses.replace(config, **change).digest for change in changed)}) == 6
    plain = load_config("tiny").to_dict()
    old = {key: value for key, value in plain.items() if not key.startswith("dspark_")}
    assert ModelConfig.from_dict(old).digest == load_config("tiny").digest


DSPARK_FIELDS: dict[str, Any] = {
    "dspark_stages": 3,
    "dspark_block_size": 5,
    "dspark_noise_token_id": 7,
    "dspark_target_layers": (0, 1),
    "dspark_markov_rank": 32,
}
CHANGES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "head_dim": 256,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 256,
    "o_groups": 4,
    "o_lora_rank": 256,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 256,
    "routed_scaling_factor": 2.5,
    "swiglu_limit": 7.0,
    "num_hash_layers": 1,
    "index_n_heads": 64,
    "index_head_dim": 64,
    "index_topk": 4,
    "sliding_window": 64,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 10,
    "hc_eps": 1e-5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "compress_rope_theta": 5000.0,
    "rope_factor": 4.0,
    "rope_original_max_position": 4096,
    "rope_beta_fast": 16.0,
    "rope_beta_slow": 2.0,
    "max_position_embeddings": 4096,
    "mtp_layers": 0,
    "expert_format": "nvfp4",
    "bos_token_id": 2,
    "eos_token_id": 2,
}


@pytest.mark.parametrize("name", BUILTIN)
def test_dict_and_file_round_trips(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    restored = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert restored == config
    assert restored.name == config.name
    save_config(config, tmp_path)
    assert load_config(tmp_path) == config
    assert load_config(tmp_path).name == tmp_path.name


@pytest.mark.parametrize("formats", [("bf16", "bf16"), ("fp8", "fp8"), ("fp8", "mxfp4"), ("fp8", "nvfp4")])
def test_saved_configs_keep_their_formats(formats: tuple[str, str], tmp_path: Path) -> None:
    config = dataclasses.replace(
        load_config("tiny"), linear_format=formats[0], expert_format=formats[1], rope_factor=1, mtp_layers=0
    )
    save_config(config, tmp_path)
    assert load_config(tmp_path) == config


def test_importing_the_config_loads_only_the_standard_library() -> None:
    script = "import sys; before = set(sys.modules); import dsv4c.config; print(*set(sys.modules) - before)"
    command = [sys.executable, "-c", script]
    loaded = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    packages = {name.partition(".")[0] for name in loaded.stdout.split()}
    assert packages - sys.stdlib_module_names == {"dsv4c"}


# What is refused: one field


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0; expected a positive integer"),
        ({"hidden_size": -256}, "hidden_size is -256; expected a positive integer"),
        ({"hidden_size": 256.0}, "hidden_size is 256.0; expected a positive integer"),
        ({"hidden_size": "256"}, "hidden_size is '256'; expected a positive integer"),
        ({"hc_mult": True}, "hc_mult is True; expected a positive integer"),
        ({"vocab_size": None}, "vocab_size is missing; expected a positive integer"),
        ({"num_hash_layers": -1}, "num_hash_layers is -1; expected an integer of at least 0"),
        ({"hc_eps": 0}, "hc_eps is 0; expected a positive number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; expected a positive number"),
        ({"swiglu_limit": None}, "swiglu_limit is missing; expected a positive number"),
        (
            {"num_nextn_predict_layers": None},
            "num_nextn_predict_layers is missing; expected an integer of at least 0",
        ),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; expected a token id or null"),
        ({"bos_token_id": []}, "bos_token_id is []; expected a token id or null"),
        ({"hidden_sise": 256}, "hidden_sise is unknown; expected hidden_size, or no such key"),
        ({"swiglu_limt": 10, "swiglu_limit": None}, "swiglu_limt is unknown; expected swiglu_limit, or no"),
        ({"expert_dtypes": "fp8"}, "expert_dtypes is unknown; expected expert_dtype, or no such key"),
        ({"rope_theta": 1}, "rope_theta is 1; expected more than 1, the base of falling frequencies"),
        ({"compress_rope_theta": 0.5}, "compress_rope_theta is 0.5; expected more than 1"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; expected 'sqrtsoftplus', the only one"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'; expected 'noaux_tc', the only one"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False; expected True, the only one"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu', the only one DeepSeek-V4 uses"),
        ({"attention_bias": True}, "attention_bias is True; expected False, the only one DeepSeek-V4 uses"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; expected False, the only one"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4; expected 1, the only one DeepSeek-V4 uses"),
        ({"expert_dtype": "int4"}, "expert_dtype is 'int4'; expected 'fp4' or 'fp8'"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8'; expected an object"),
        ({"rope_scaling": 16}, "rope_scaling is 16; expected an object of type 'yarn' or 'default'"),
        (
            {"rope_scaling": {"type": "linear"}},
            "rope_scaling has type 'linear'; expected an object of type 'yarn'",
        ),
        ({"model_type": "llama"}, "model_type is 'llama'; expected 'deepseek_v4'"),
    ],
)
def test_wrong_fields(change: Raw, message: str, refusal: Callable[[Raw], str]) -> None:
    assert refusal(release() | change).startswith(message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quant_method", "gptq", "quantization_config.quant_method is 'gptq'; expected 'fp8'"),
        (
            "weight_block_size",
            [32, 32],
            "quantization_config.weight_block_size is [32, 32]; expected [128, 128]",
        ),
        ("scale_fmt", None, "quantization_config.scale_fmt is None; expected 'ue8m0'"),
        (
            "moe_quant_algo",
            "INT4",
            "quantization_config.moe_quant_algo is 'INT4'; expected 'NVFP4' or nothing",
        ),
        (
            "expert_dtype",
            "fp8",
            "expert_dtype is 'fp4'; expected 'fp8', as quantization_config.expert_dtype says",
        ),
    ],
)
def test_wrong_quantization(key: str, value: Any, message: str, refusal: Callable[[Raw], str]) -> None:
    raw = release()
    raw["quantization_config"][key] = value
    assert refusal(raw) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"expert_dtype": "fp8"},
            "expert_dtype is 'fp8'; expected 'fp4', as quantization_config.moe_quant_algo",
        ),
        ({}, "quantization_config.group_size is 32; expected 16, NVFP4's block"),
    ],
)
def test_wrong_nvfp4(change: Raw, message: str, refusal: Callable[[Raw], str]) -> None:
    raw = release() | change
    raw["quantization_config"] |= {"moe_quant_algo": "NVFP4", "group_size": 16 if change else 32}
    assert refusal(raw).startswith(message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("factor", None, "rope_scaling.factor is None; expected a positive number"),
        ("factor", 0.5, "rope_scaling.factor is 0.5; expected at least 1"),
        ("beta_fast", -1, "rope_scaling.beta_fast is -1; expected a positive number"),
        (
            "beta_slow",
            64,
            "rope_scaling.beta_fast is 32; expected at least rope_scaling.beta_slow, 64: fast pairs turn "
            "more often",
        ),
        (
            "mscale",
            1.0,
            "rope_scaling.mscale is 1.0; expected no such key, as DeepSeek-V4's YaRN does not have it",
        ),
        (
            "attention_factor",
            1.3,
            "rope_scaling.attention_factor is 1.3; expected 1.0, as cos and sin are not rescaled",
        ),
    ],
)
def test_wrong_yarn(key: str, value: Any, message: str, refusal: Callable[[Raw], str]) -> None:
    raw = release()
    raw["rope_scaling"][key] = value
    assert refusal(raw) == message


def test_yarn_without_a_factor(refusal: Callable[[Raw], str]) -> None:
    raw = release()
    del raw["rope_scaling"]["factor"]
    assert refusal(raw) == "rope_scaling.factor is missing; expected a positive number"


# What is refused: the schedule


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"compress_ratios": None},
            "compress_ratios is missing; expected one ratio per layer, as there is no default schedule",
        ),
        (
            {"compress_ratios": [0, 0, 4, 128, 4, 128]},
            "compress_ratios has 6 entries; expected 7: 6 (num_hidden_layers) + 1 (num_nextn_predict_layers)",
        ),
        (
            {"num_nextn_predict_layers": 0},
            "compress_ratios has 7 entries; expected 6: 6 (num_hidden_layers) + 0 (num_nextn_predict_layers)",
        ),
        (
            DSPARK | {"compress_ratios": [0, 0, 4, 128, 4, 128]},
            "compress_ratios has 6 entries; expected 7: 6 (num_hidden_layers) + 1 (DSpark stages, at least)",
        ),
        (
            {"compress_ratios": [0, 0, 4, 128, 4, 64, 0]},
            "compress_ratios[5] is 64; expected 0 (SWA) or 4 (CSA) or 128 (HCA)",
        ),
        (
            {"compress_ratios": [0, 0, 4, 128, 4, 128, 4]},
            "compress_ratios[6] is 4; expected 0, as no layer has it",
        ),
        ({"compress_ratios": "0,0,4"}, "compress_ratios is '0,0,4'; expected a list of integers"),
        (
            {"compress_ratios": [0, 0, 4.0, 128, 4, 128, 0]},
            "compress_ratios is [0, 0, 4.0, 128, 4, 128, ...]; expected a",
        ),
        (
            {"index_n_heads": None},
            "index_n_heads is missing; expected an integer of at least 0, as CSA layers (ratio 4) have an",
        ),
        (
            {"index_topk": 0},
            "index_topk is 0; expected a positive integer, as CSA layers (ratio 4) have an indexer",
        ),
    ],
)
def test_wrong_schedules(change: Raw, message: str, refusal: Callable[[Raw], str]) -> None:
    assert refusal(release() | change).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layer_types": None},
            "layer_types is missing; expected one type per layer, as transformers' default schedule fits",
        ),
        ({"layer_types": [CSA] * 5}, "layer_types has 5 entries; expected 6 (num_hidden_layers)"),
        (
            {"layer_types": ["full_attention"] * 6},
            "layer_types holds ['full_attention']; expected a list of 'sliding",
        ),
        ({"layer_types": CSA}, f"layer_types holds {CSA!r}; expected a list of 'sliding_attention' or"),
        ({"compress_rates": {CSA: 4}}, f"compress_rates.{HCA} is missing; expected 128"),
        ({"compress_rates": {CSA: 8, HCA: 128}}, f"compress_rates.{CSA} is 8; expected 4"),
        (
            {"compress_ratios": [0, 0, 4, 128, 4, 0, 0]},
            "compress_ratios is [0, 0, 4, 128, 4, 0, ...]; expected [0, 0, 4, 128, 4, 128], as layer_types",
        ),
        (
            {"mlp_layer_types": None},
            "mlp_layer_types is missing; expected one of hash_moe, moe per layer, as there is no",
        ),
        ({"mlp_layer_types": ["moe"] * 5}, "mlp_layer_types has 5 entries; expected 6 (num_hidden_layers)"),
        (
            {"mlp_layer_types": ["dense"] * 6},
            "mlp_layer_types is ['dense', 'dense', 'dense', 'dense', 'dense', 'dense']",
        ),
        (
            {"mlp_layer_types": ["hash_moe", "moe", "hash_moe", "moe", "moe", "moe"]},
            "mlp_layer_types[1] is 'moe'; expected 'hash_moe', as hash-routed layers come first",
        ),
        (
            {"num_hash_layers": 3},
            "num_hash_layers is 3; expected 2, the number of 'hash_moe' in mlp_layer_types",
        ),
        ({"rope_theta": 500}, "rope_parameters.main.rope_theta is 10000; expected 500, as rope_theta says"),
        (
            {"compress_rope_theta": 500},
            "rope_parameters.compress.rope_theta is 160000; expected 500, as compress_rope",
        ),
        (
            {"partial_rotary_factor": 0.25},
            "partial_rotary_factor is 0.25; expected 0.5 (qk_rope_head_dim 64 of head_dim 128)",
        ),
        (
            {"rope_parameters": {"main": 1, "compress": {}}},
            "rope_parameters.main is 1; expected an object with rope_th",
        ),
        (
            {"qk_rope_head_dim": None, "partial_rotary_factor": 2.0},
            "qk_rope_head_dim is missing; expected a positive integer",
        ),
        ({"mlp_bias": True}, "mlp_bias is True; expected False, the only one DeepSeek-V4 uses"),
    ],
)
def test_wrong_transformers_configs(change: Raw, message: str, refusal: Callable[[Raw], str]) -> None:
    assert refusal(transformers(release()) | change).startswith(message)


def test_yarn_without_an_attention_factor_is_noted(load: Callable[[Raw], ModelConfig]) -> None:
    """transformers derives 0.1 ln(factor) + 1 from a nested entry without one; the model has 1.0."""
    raw = transformers(release())
    assert load(raw).notes == load(transformers(release())).notes
    del raw["rope_parameters"]["compress"]["attention_factor"]
    config = load(raw)
    assert config == load(release())
    (note,) = set(config.notes) - set(load(transformers(release())).notes)
    assert note.startswith("rope_parameters.compress has no attention_factor: 1.0 was taken")


def test_yarn_on_the_sliding_window_layers(refusal: Callable[[Raw], str]) -> None:
    raw = transformers(release())
    raw["rope_parameters"]["main"]["rope_type"] = "yarn"
    expected = (
        "rope_parameters.main.rope_type is 'yarn'; expected 'default', as sliding-window layers have no YaRN"
    )
    assert refusal(raw) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": -1}, "dim is -1; expected a positive integer"),
        ({"moe_inter_dim": None}, "moe_inter_dim is missing; expected a positive integer"),
        ({"n_hash_layers": None}, "n_hash_layers is missing; expected an integer of at least 0"),
        ({"n_mtp_layers": 2}, "compress_ratios has 7 entries; expected 8: 6 (n_layers) + 2 (n_mtp_layers)"),
        ({"n_activated_experts": 9}, "n_activated_experts is 9; expected at most n_routed_experts, 8"),
        (
            {"score_func": "softmax"},
            "score_func is 'softmax'; expected 'sqrtsoftplus', the only one DeepSeek-V4 uses",
        ),
        ({"dtype": "fp16"}, "dtype is 'fp16'; expected 'fp8' or 'bf16'"),
        ({"dtype": "bf16"}, "expert_dtype is 'fp4'; expected no expert_dtype, as dtype is 'bf16'"),
        ({"expert_dtype": ["fp4"]}, "expert_dtype is ['fp4']; expected 'fp4' or 'fp8'"),
        (
            {"rope_factor": "x"},
            "2 problems\n  rope_factor is 'x'; expected a positive number\n  max_position_embeddings"
            " is missing; expected a positive integer",
        ),
        ({"scale_fmt": "f32"}, "scale_fmt is 'f32'; expected 'ue8m0'"),
    ],
)
def test_wrong_inference_configs(change: Raw, message: str, refusal: Callable[[Raw], str]) -> None:
    assert refusal(inference(release()) | change) == message


# What is refused: fields that contradict each other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"o_groups": 3}, "num_attention_heads is 4; expected a multiple of o_groups, 3"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9; expected at most n_routed_experts, 8"),
        ({"num_hash_layers": 7}, "num_hash_layers is 7; expected at most num_hidden_layers, 6"),
        ({"n_shared_experts": 2}, "n_shared_experts is 2; expected 1, the only number DeepSeek-V4 uses"),
        (
            {"index_head_dim": 96},
            "index_head_dim is 96; expected a power of two (Hadamard) of at least qk_rope_head_dim",
        ),
        (
            {"index_head_dim": 32},
            "index_head_dim is 32; expected a power of two (Hadamard) of at least qk_rope_head_dim",
        ),
        (
            {"qk_rope_head_dim": 63},
            "qk_rope_head_dim is 63; expected an even number of at most head_dim, 128",
        ),
        (
            {"qk_rope_head_dim": 256},
            "qk_rope_head_dim is 256; expected an even number of at most head_dim, 128",
        ),
        ({"eos_token_id": 512}, "eos_token_id is 512; expected a token id below vocab_size, 512"),
        (
            {"q_lora_rank": 96},
            "q_lora_rank is 96; expected a multiple of 128, the block of the checkpoint's FP8 scales",
        ),
        ({"o_lora_rank": 96}, "o_groups * o_lora_rank is 192; expected a multiple of 128"),
        (
            {"quantization_config": None},
            "expert_dtype is 'fp4'; expected no expert_dtype, as there is no quantization",
        ),
    ],
)
def test_contradictions(change: Raw, message: str, refusal: Callable[[Raw], str]) -> None:
    assert message in refusal(release() | change)


def test_all_problems_are_told_at_once(refusal: Callable[[Raw], str]) -> None:
    raw = release() | {"hidden_size": 0, "hidden_act": "gelu", "compress_ratios": [0], "vocab_size": None}
    assert refusal(raw).splitlines() == [
        "4 problems",
        "  compress_ratios has 1 entries; expected 7: 6 (num_hidden_layers) + 1 (num_nextn_predict_layers)",
        "  hidden_act is 'gelu'; expected 'silu', the only one DeepSeek-V4 uses",
        "  vocab_size is missing; expected a positive integer",
        "  hidden_size is 0; expected a positive integer",
    ]


# What is refused: the file


@pytest.mark.parametrize(
    "marks",
    [
        {"model_type": "deepseek_v41"},
        {"model_type": "deepseek_v4_1"},
        {"architectures": ["DeepseekV41ForCausalLM"]},
        {"engram_layer_ids": [1, 14]},
        {"kv_source_layer_ids": [2, 8]},
        {"vision_dim": 1024},
    ],
)
def test_v41_is_refused_in_a_sentence(marks: Raw, refusal: Callable[[Raw], str]) -> None:
    message = refusal(release() | {"compress_ratios": [0, 0, 2, 2, 1, 1, 0]} | marks)
    assert message.startswith(f"DeepSeek-V4.1 is unsupported ({next(iter(marks))}")
    assert message.endswith(
        "its compressed KV shared across layers, compress ratios 1 and 2, Engram memory and vision tower "
        "are not part of DeepSeek-V4"
    )
    assert "\n" not in message


def test_unknown_dialect(refusal: Callable[[Raw], str]) -> None:
    message = refusal({"n_embd": 256, "n_head": 4})
    assert message.startswith(
        "unknown dialect: the keys are ['n_embd', 'n_head']; expected the release's (hidden_size"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "dim": 4096,\n  "n_layers" 43\n}', ":3:14: malformed JSON: Expecting ':' delimiter"),
        ('{"dim": 1', ":1:10: malformed JSON: Expecting ',' delimiter"),
        ("", ":1:1: malformed JSON: Expecting value"),
        ("[1, 2]", ": holds a JSON list; expected an object"),
        ('{"dim": 1, "dim": 2}', ": dim is given twice; expected each key once"),
        ('{"dim": NaN}', ": malformed JSON: NaN is not a JSON number"),
    ],
)
def test_malformed_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value) == f"{path}{message}"


def test_a_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match=r"config\.json: is not UTF-8 text at byte 7; expected a JSON file"):
        load_config(path)


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read: Is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("deepseek-v4-flush", "; did you mean 'deepseek-v4-flash'?"),
        (Path("tiny"), "; did you mean 'tiny'?"),
        ("llama", ""),
    ],
)
def test_no_such_config(
    source: str | Path, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_config(source)
    assert str(error.value) == (
        f"{source}: no such file; expected a config.json, a checkpoint folder or one of "
        f"deepseek-v4-flash, deepseek-v4-pro, tiny{meant}"
    )
    assert error.value.exit_code == 2


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"config\.json: no such file; expected a config\.json, a checkpoint folder"
    ):
        load_config(tmp_path)


def test_a_plan_is_not_a_config(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"is a compiled plan; expected a config\.json, a checkpoint folder or one of"
    ):
        load_config(tmp_path)


# What is refused: objects built by hand


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 5}, "tiny: compress_ratios has 6 entries; expected 5, one per layer"),
        ({"hidden_size": 0}, "tiny: hidden_size is 0; expected a positive integer"),
        (
            {"compress_ratios": (0, 0, 4, 3, 4, 128)},
            "tiny: compress_ratios[3] is 3; expected 0 (SWA) or 4 (CSA)",
        ),
        (
            {"expert_format": "int8"},
            "tiny: expert_format is 'int8'; expected 'bf16' or 'fp8' or 'mxfp4' or 'nvfp4'",
        ),
        (
            {"expert_format": "bf16"},
            "tiny: expert_format is 'bf16'; expected 'fp8', 'mxfp4' or 'nvfp4', as linear_format",
        ),
        (
            {"linear_format": "bf16"},
            "tiny: expert_format is 'mxfp4'; expected 'bf16', as linear_format is 'bf16'",
        ),
    ],
)
def test_model_config_is_valid_by_construction(change: Raw, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(load_config("tiny"), **change)
    assert str(error.value).startswith(message)


def test_from_dict_wants_exactly_the_fields() -> None:
    data = load_config("tiny").to_dict()
    del data["hidden_size"]
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(data | {"hiden_size": 256})
    assert str(error.value).splitlines() == [
        "tiny: 2 problems",
        "  hiden_size is unknown; expected one of ModelConfig's fields",
        "  hidden_size is missing; expected a positive integer",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "sm_80"}, "deployment: target is 'sm_80'; expected 'cpu' or 'sm_90a' or 'sm_100a'"),
        (
            {"recipe": "Official!"},
            "deployment: recipe is 'Official!'; expected a name of lowercase words joined by '-'",
        ),
        ({"recipe": 8}, "deployment: recipe is 8; expected a name of lowercase words joined by '-'"),
        ({"slots": 0}, "deployment: slots is 0; expected a positive integer"),
        ({"max_context": 4096.0}, "deployment: max_context is 4096.0; expected a positive integer"),
        ({"max_context": 32}, "deployment: prefill-64 takes 64 tokens; expected at most 32, max_context"),
        ({"buckets": ()}, "deployment: buckets is empty; expected at least one decode bucket"),
        (
            {"buckets": (Bucket("prefill", tokens=8),)},
            "deployment: buckets is prefill-8; expected at least one decode bucket",
        ),
        (
            {"buckets": (Bucket("decode"), Bucket("decode"))},
            "deployment: buckets has decode-1 2 times; expected every bucket once",
        ),
        (
            {"buckets": (Bucket("decode", 4),)},
            "deployment: slots is 1; expected at least 4, the sequences of decode-4",
        ),
        (
            {"buckets": (Bucket("decode", 0),)},
            "deployment: decode-0 has 0 rows; expected at least 1",
        ),
        (
            {"buckets": (Bucket("decode", 1, 2),)},
            "deployment: decode-1 takes 2 tokens; expected 1 of each sequence",
        ),
        (
            {"buckets": (Bucket("decode"), Bucket("verify", 1, 9))},
            "deployment: verify-1x9 takes 9 tokens; expected 2 to 8: more could not be taken back",
        ),
    ],
)
def test_wrong_deployments(change: Raw, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Deployment(**change)
    assert str(error.value) == message


def test_deployments_fit_their_model() -> None:
    config = load_config("deepseek-v4-flash")
    decode = (Bucket("decode"),)
    check_deployment(config, Deployment("sm_100a", "nvfp4-experts-w4a4", 1048576, buckets=decode))
    with pytest.raises(ConfigError) as error:
        check_deployment(config, Deployment(max_context=1048577))
    assert str(error.value) == (
        "deployment: max_context is 1048577; "
        "expected at most 1048576, max_position_embeddings of deepseek-v4-flash"
    )
    draft = (*decode, Bucket("draft", tokens=7))
    check_deployment(config, Deployment(buckets=draft))
    with pytest.raises(ConfigError) as error:
        check_deployment(dataclasses.replace(config, mtp_layers=0), Deployment(buckets=draft))
    assert str(error.value) == (
        "deployment: buckets has draft-7; expected no draft: deepseek-v4-flash has no block that drafts"
    )
    dspark = dataclasses.replace(config, mtp_layers=0, **DSPARK_FIELDS)
    check_deployment(dspark, Deployment(buckets=(*decode, Bucket("round", tokens=6))))
    for target, changes, message in (
        ("cpu", {"dspark_block_size": 9}, "dspark_block_size is 9; expected at most 8, the rows that rings"),
        ("sm_90a", {}, "round-2x4 drafts in 10 rows; expected at most 8: sm_90a has no kernels for more"),
    ):
        changed, wide = dataclasses.replace(dspark, **changes), (*decode, Bucket("round", 2, 4))
        with pytest.raises(ConfigError, match=message):
            check_deployment(changed, Deployment(target, slots=2, buckets=wide))
    with pytest.raises(ConfigError, match=r"round-1x7 drafts 6 tokens; expected at most 5"):
        check_deployment(dspark, Deployment(buckets=(*decode, Bucket("round", tokens=7))))


def test_deployments_are_plain_data() -> None:
    buckets = (Bucket("decode", 2), Bucket("verify", 1, 4), Bucket("prefill", 1, 64, "last"))
    deployment = Deployment("cpu", "official", 512, 3, buckets)
    data = json.loads(json.dumps(deployment.to_dict()))
    assert data == {
        "target": "cpu",
        "recipe": "official",
        "max_context": 512,
        "slots": 3,
        "buckets": ["decode-2", "verify-1x4", "prefill-64.last"],
        "ranks": 1,
    }
    assert Deployment.from_dict(data) == deployment
    assert deployment.batch == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 2}, "deployment: batch is unknown; expected one of Deployment's fields"),
        ({"slots": None}, "deployment: slots is None; expected a positive integer"),
        ({"buckets": "decode-1"}, "deployment: buckets is 'decode-1'; expected a list of names of buckets"),
        (
            {"buckets": ["decode"]},
            "deployment: buckets: 'decode' names no bucket; "
            "expected decode-8, verify-1x4, prefill-64 or draft-3",
        ),
        (
            {"buckets": ["verify-2"]},
            "deployment: buckets: 'verify-2' names no bucket; verify-1x2 is how it is written",
        ),
    ],
)
def test_data_that_is_no_deployment(change: Raw, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Deployment.from_dict(Deployment().to_dict() | change)
    assert str(error.value) == message
    with pytest.raises(ConfigError, match="slots is missing; expected all of Deployment's fields"):
        Deployment.from_dict({key: value for key, value in Deployment().to_dict().items() if key != "slots"})
    with pytest.raises(ConfigError, match="deployment: is 3; expected the fields of Deployment by name"):
        Deployment.from_dict(3)  # type: ignore[arg-type]
