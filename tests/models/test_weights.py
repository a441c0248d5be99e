"""Names, shapes and dtypes of checkpoints: against published totals, recorded checkpoints and
transformers.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import pytest

from dsv4c.config import ModelConfig, load_config
from dsv4c.errors import CheckpointError
from dsv4c.models.layout import layout
from dsv4c.models.weights import TABLES, describe, detect_table, inventory, records, sources
from dsv4c.types import BF16, F32, FP8_WEIGHT, MXFP4, NVFP4, QuantType, TensorType
from tests.goldens import CASES, golden_case


def header(path):
    raw = path.read_bytes()
    entries = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return {name: (e["dtype"], tuple(e["shape"])) for name, e in entries.items() if name != "__metadata__"}


def specs(config, table="release", **options):
    return {spec.name: (spec.dtype, spec.shape) for spec in inventory(config, table, **options)}


@pytest.mark.parametrize(
    ("name", "layers", "rank", "stages", "nbytes", "tensors"),
    [
        ("deepseek-v4-flash", [40, 41, 42], 256, (1_568, 1_565, 1_572), 166_878_536_440, 72_317),
        ("deepseek-v4-pro", [58, 59, 60], 512, (2_336, 2_333, 2_340), 892_727_580_904, 149_782),
    ],
)
def test_the_inventory_of_a_release_with_dspark(name, layers, rank, stages, nbytes, tensors):
    """What V4-Flash-0731 holds, and by the same table what V4-Pro-0813 does."""
    config = replace(
        load_config(name),
        mtp_layers=0,
        dspark_stages=3,
        dspark_block_size=5,
        dspark_noise_token_id=128799,
        dspark_target_layers=tuple(layers),
        dspark_markov_rank=rank,
    )
    found = inventory(config)
    assert (len(found), sum(spec.nbytes for spec in found)) == (tensors, nbytes)
    drafts = [spec for spec in found if spec.name.startswith("mtp.")]
    assert tuple(sum(s.name.startswith(f"mtp.{i}.") for s in drafts) for i in range(3)) == stages
    if rank == 256:
        assert (len(drafts), sum(spec.nbytes for spec in drafts)) == (4_705, 10_862_838_300)
        kinds = Counter(spec.dtype for spec in drafts)
        assert kinds == {"I8": 2304, "F8_E8M0": 2329, "F8_E4M3": 25, "BF16": 20, "F32": 27}
    assert {"mtp.2.ffn.shared_experts.w1.weight", "mtp.2.markov_head.markov_w1.weight"} <= {
        spec.name for spec in drafts
    }


@pytest.fixture(scope="module")
def tiny() -> ModelConfig:
    return load_config("tiny")


# Totals of the published checkpoints (safetensors payload, headers not counted).
@pytest.mark.parametrize(
    ("name", "table", "mtp", "tensors", "nbytes"),
    [
        ("deepseek-v4-flash", "release", True, 69_187, 159_609_485_896),
        ("deepseek-v4-flash", "release", False, 67_612, 156_015_698_140),
        ("deepseek-v4-flash", "nvfp4", False, 133_660, 164_673_005_788),
        ("deepseek-v4-pro", "release", True, 145_116, 864_704_792_696),
        ("deepseek-v4-pro", "release", False, 142_773, 850_748_205_004),
        ("deepseek-v4-pro", "nvfp4", False, 283_317, 899_104_897_996),
    ],
)
def test_the_inventory_has_the_size_of_the_published_checkpoint(name, table, mtp, tensors, nbytes):
    found = inventory(load_config(name), table, mtp=mtp)
    assert (len(found), sum(spec.nbytes for spec in found)) == (tensors, nbytes)
    assert len({spec.name for spec in found}) == tensors


@pytest.mark.parametrize(("name", "billions"), [("deepseek-v4-flash", 284.33), ("deepseek-v4-pro", 1573.0)])
def test_parameters_without_mtp_are_as_published(name, billions):
    sizes = (
        p.size for p in layout(load_config(name)) if p.storage != "i64" and not p.name.startswith("mtp.")
    )
    assert sum(sizes) / 1e9 == pytest.approx(billions, rel=5e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_inventory_is_exactly_what_a_recorded_checkpoint_holds(case):
    folder = golden_case(case)
    table = "nvfp4" if case == "nvfp4-experts" else "release"
    found = header(folder / "model.safetensors")
    assert specs(load_config(folder), table) == found
    assert detect_table(found, "here") == table


def test_mtp_experts_stay_mxfp4_in_the_nvfp4_release(tiny):
    names = specs(replace(tiny, expert_format="nvfp4"), "nvfp4")
    assert names["mtp.0.ffn.experts.0.w1.scale"][0] == "F8_E8M0"
    assert names["layers.0.ffn.experts.0.w1.weight_scale"][0] == "F8_E4M3"
    assert "layers.0.ffn.experts.0.w1.scale" not in names


def test_a_model_in_nvfp4_is_mxfp4_in_release_names(tiny):
    assert specs(replace(tiny, expert_format="nvfp4"), "release") == specs(tiny, "release")


def test_canonical_types_say_how_the_checkpoint_stores_a_parameter(tiny):
    release, nvfp4 = sources(tiny, "release"), sources(tiny, "nvfp4")
    E, W, H = tiny.n_routed_experts, tiny.moe_intermediate_size, tiny.hidden_size
    assert release["layers.3.ffn.experts.w1"].stored == QuantType(MXFP4, (E, W, H))
    assert nvfp4["layers.3.ffn.experts.w2"].stored == QuantType(NVFP4, (E, H, W))
    assert nvfp4["layers.3.ffn.experts.w1.input_scale"].stored == TensorType(F32, (E,))
    assert release["layers.3.attn.wo_a"].stored == QuantType(FP8_WEIGHT, (2, 128, 256))
    assert release["layers.3.attn.wo_a"].parts["data"].shape == (256, 256)
    plain = sources(replace(tiny, linear_format="bf16", expert_format="bf16"), "release")
    assert plain["layers.3.ffn.experts.w1"].stored == TensorType(BF16, (E, W, H))
    assert list(plain["layers.3.attn.wq_a"].parts) == ["data"]


def test_w1_and_w3_are_the_two_halves_of_the_merged_stack(tiny):
    merged = sources(tiny, "transformers")
    w1, w3 = merged["layers.0.ffn.experts.w1"], merged["layers.0.ffn.experts.w3"]
    W = tiny.moe_intermediate_size
    assert (w1.rows, w3.rows) == ((0, W), (W, 2 * W))
    assert w1.parts == w3.parts
    assert w1.parts["data"].tensor == "model.layers.0.mlp.experts.gate_up_proj"
    assert w1.parts["scale"].tensor == "model.layers.0.mlp.experts.gate_up_proj_scale_inv"


def test_every_table_covers_the_same_parameters(tiny):
    main = {p.name for p in layout(tiny) if not p.name.startswith("mtp.")}
    for table in TABLES:
        names = {n for n in sources(tiny, table) if not n.startswith("mtp.") and "input_scale" not in n}
        assert names == main, table


def test_payload_bytes_of_a_source_are_those_of_its_type(tiny):
    for table in TABLES:
        for name, source in sources(tiny, table).items():
            data = source.parts["data"]
            elements = math.prod(data.shape) * (source.stack or 1) // (2 if source.rows else 1)
            packed = 2 if isinstance(source.stored, QuantType) and "F8_E4M3" not in data.dtypes else 1
            assert elements * packed == math.prod(source.stored.shape), (table, name)


# What transformers 5.23 writes for tests/models/data-less tiny models, both ways of saving.
@pytest.mark.parametrize(("table", "original"), [("transformers", False), ("transformers-split", True)])
def test_names_are_those_that_transformers_saves(tmp_path, table, original):
    transformers = pytest.importorskip("transformers")
    folder = golden_case("fp32")
    raw = json.loads((folder / "config.json").read_text())
    config = transformers.DeepseekV4Config(
        **{k: v for k, v in raw.items() if k not in ("architectures", "torch_dtype")}
    )
    model = transformers.DeepseekV4ForCausalLM(config)
    model.save_pretrained(tmp_path, save_original_format=original)
    found = header(tmp_path / "model.safetensors")
    assert detect_table(found, "here") == table
    wanted = sources(load_config(folder), table)
    parts = {n: part for s in wanted.values() for part in s.parts.values() for n in part.names(s.stack)}
    assert parts.keys() == found.keys()
    for name, (dtype, shape) in found.items():
        assert shape == parts[name].shape, name
        assert dtype in parts[name].dtypes, name


# Names and types of the FP8 + MXFP4 model as transformers 5.23 saves it (it needs a GPU to make one, so by
# hand).
def test_names_of_a_quantized_transformers_checkpoint():
    config = load_config(golden_case("official-quant"))
    merged, split = specs(config, "transformers"), specs(config, "transformers-split")
    assert merged["model.layers.1.mlp.experts.gate_up_proj"] == ("I8", (8, 256, 128))
    assert merged["model.layers.1.mlp.experts.gate_up_proj_scale_inv"] == ("F8_E8M0", (8, 256, 8))
    assert merged["model.layers.1.mlp.experts.down_proj_scale_inv"] == ("F8_E8M0", (8, 256, 4))
    assert merged["model.layers.1.self_attn.o_a_proj.weight_scale_inv"] == ("F8_E8M0", (2, 8))
    assert merged["model.layers.1.self_attn.compressor.indexer.q_b_proj.weight"] == ("F8_E4M3", (4096, 128))
    assert len(merged) == 120
    assert split["model.layers.0.ffn.experts.1.w1.scale"] == ("F8_E8M0", (128, 8))
    assert split["model.layers.1.attn.indexer.wq_b.scale"] == ("F8_E8M0", (32, 1))
    assert split["model.layers.1.attn.norm.weight"][1] == (512,)
    assert len(split) == 252


def test_a_foreign_checkpoint_is_refused_with_examples():
    with pytest.raises(
        CheckpointError,
        match=r"here: these.*: bert\.a, bert\.b; expected names like",
    ):
        detect_table(["bert.b", "bert.a"], "here")
    with pytest.raises(CheckpointError, match="no tensors at all"):
        detect_table([], "here")


def test_mixed_spellings_are_refused_with_an_example_of_each(tiny):
    names = [*specs(tiny), *specs(tiny, "transformers")]
    message = r"here: .* mix 2 spellings: layers\.0\.ffn\S+ \(release\); model\.layers\.0\.\S+ \(trans"
    with pytest.raises(CheckpointError, match=message):
        detect_table(names, "here")
    both = [*specs(tiny), *specs(replace(tiny, expert_format="nvfp4"), "nvfp4")]
    with pytest.raises(CheckpointError, match=r"nvfp4.*release"):
        detect_table(both, "here")


def test_records_are_plain_data_and_name_every_table(tiny):
    wanted = [("layers.2.ffn.experts.w1", QuantType(MXFP4, (8, 128, 256)), False)]
    (record,) = records(tiny, wanted)
    assert json.loads(json.dumps(record)) == record
    assert set(record["sources"]) == set(TABLES)
    assert record["sources"]["release"] == {
        "stored": "q[e2m1,ue8m0,1x32][8,128,256]",
        "parts": {
            "data": ["layers.2.ffn.experts.{e}.w1.weight", "I8|U8", [128, 128]],
            "scale": ["layers.2.ffn.experts.{e}.w1.scale", "F8_E8M0|F32|U8", [128, 8]],
        },
        "stack": 8,
    }
    with pytest.raises(CheckpointError, match=r"has a parameter layers\.99\.attn\.wq_a"):
        records(tiny, [("layers.99.attn.wq_a", TensorType(F32, (1,)), False)])


def test_describe_counts_bytes_and_compares_with_the_model():
    from dsv4c.runtime.checkpoint import Checkpoint

    folder = golden_case("fp32")
    config = load_config(folder)
    found = describe(Checkpoint.open(folder), config)
    assert json.loads(json.dumps(found)) == found
    assert (found["table"], found["tensors"], found["complete"]) == ("release", 233, True)
    assert found["bytes"] == sum(found["bytes_by_dtype"].values())
    assert found["drafts"] == {"model": "mtp", "checkpoint": True}
    other = describe(Checkpoint.open(folder), replace(config, hidden_size=64, swiglu_limit=1.0))
    assert not other["complete"]
    assert any(
        line.startswith("embed.weight in model.safetensors is [256, 96]") for line in other["misshapen"]
    )
