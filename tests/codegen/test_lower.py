"""Plans for GPU targets: launches bound, weights in the forms that kernels want, exact constants."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.plans import first_layers
from dsv4c.arch import SM_90A
from dsv4c.codegen.select import Kernels
from dsv4c.compiler.verify import check
from dsv4c.errors import BuildError
from dsv4c.ir.ops.rope import RopeFrequencies
from dsv4c.numerics.codec import view
from dsv4c.numerics.forms import parse_packing
from dsv4c.numerics.packing import pack
from dsv4c.numerics.resident import component_bytes
from dsv4c.passes.schedule import Group
from dsv4c.plan.folder import Plan, load
from dsv4c.plan.records import Launch
from dsv4c.reference import run
from dsv4c.runtime.cpu import constants_of
from dsv4c.types import parse_type
from tests.codegen.lowered import gpu_plan, tuned_families


def launches(plan: Plan) -> tuple[Launch, ...]:
    """Of a decode step of one sequence."""
    return plan.program().launches


@pytest.fixture(scope="module")
def tiny() -> Plan:
    return gpu_plan()


@pytest.mark.parametrize("recipe", ["official", "bf16", "nvfp4-experts", "nvfp4"])
def test_every_node_of_a_tiny_model_has_a_kernel(recipe: str) -> None:
    plan = gpu_plan(recipe=recipe, batch=(1, 3, 8), slots=9, verify=3, chunk=8)
    assert check(plan) == []
    assert list(plan.buckets) == ["decode-1", "decode-3", "decode-8", "verify-1x3", "prefill-8"]
    assert plan.report["unfolded"] == []
    for launch in (launch for program in plan.buckets.values() for launch in program.launches):
        pointers = plan.files[plan.kernels[launch.kernel.kernel]["source"]].decode().count(": cute.Pointer,")
        assert pointers >= len(launch.arguments)  # of the host function; the kernel may take a record of them


@pytest.mark.parametrize("model", ["deepseek-v4-flash", "deepseek-v4-pro"])
@pytest.mark.parametrize("recipe", ["official", "bf16", "nvfp4-experts", "nvfp4"])
def test_every_node_of_a_release_model_has_a_kernel(model: str, recipe: str) -> None:
    config = first_layers(model, 6)
    for target, batch, max_context in (
        ("sm_90a", 1, config.max_position_embeddings),
        ("sm_90a", (2, 5), 131072),
        ("sm_100a", 8, config.max_position_embeddings),
    ):
        plan = gpu_plan(config, recipe=recipe, target=target, batch=batch, max_context=max_context)
        assert check(plan) == []
        assert plan.report["unfolded"] == []


def test_release_models_share_kernels_between_equal_layers() -> None:
    flash = gpu_plan("deepseek-v4-flash", max_context=131072, batch=1, verify=1, chunk=1)
    assert check(flash) == []
    assert len(flash.kernels) < 35
    assert len(launches(flash)) > 10 * 43
    used = {launch.kernel.kernel for launch in launches(flash)}
    assert used == set(flash.kernels)
    text = sum(len(content) for content in flash.files.values()) + len(flash.text)
    assert text < 8 << 20  # without cubins and PTX


def test_launches_are_a_chain_of_programmatic_edges(tiny: Plan) -> None:
    for program in tiny.buckets.values():
        for index, launch in enumerate(program.launches):
            assert launch.kernel.waits
            assert launch.after == ((index - 1,) if index else ())
            assert launch.kernel.programmatic == (index > 0)


def test_the_step_begins_with_positions_and_ends_by_advancing_them(tiny: Plan) -> None:
    ops = [launch.op for launch in launches(tiny)]
    assert ops[:2] == ["positions", "embed"]
    assert ops[-3:] == ["linear", "argmax", "advance"]
    assert ops.count("in_proj + in_proj") == 4  # of the layers with a compressor
    state = ["q_norm_quantize + kv_norm_rope_store" + " + compressor" * n for n in range(3)]
    assert [ops.count(op) for op in state] == [2, 2, 2]  # SWA, HCA, CSA
    assert ops.count("indexer + index_topk") == 2


def test_a_plan_reads_back_as_it_was_written(tiny: Plan, tmp_path: Path) -> None:
    tiny.save(tmp_path / "plan")
    again = load(tmp_path / "plan")
    assert again == tiny
    assert again.digest == tiny.digest
    written = json.loads((tmp_path / "plan" / "plan.json").read_text())
    record = next(iter(written["kernels"].values()))
    assert {"symbol", "source", "cubin", "ptx", "registers", "stack", "not_run_here"} <= record.keys()


def test_a_second_compile_gives_the_same_bytes(tiny: Plan) -> None:
    assert gpu_plan().text == tiny.text


def test_weights_lie_in_the_forms_that_kernels_want(tiny: Plan) -> None:
    records = {record["name"]: record for record in tiny.weights}
    forms = {name: record["form"] for name, record in records.items()}
    assert forms["layers.0.attn.wq_a"].startswith("fp8/")
    assert forms["layers.0.ffn.experts.w2"].startswith("mxfp4/")
    assert forms["layers.2.attn.compressor.wkv"].startswith("bf16/")
    assert forms["layers.0.attn.q_norm"] == "f32"
    assert forms["embed"] == forms["layers.0.attn_norm"] == forms["layers.0.ffn.gate"] == "plain"
    assert [c["name"] for c in records["layers.0.attn.wo_a"]["components"]] == ["data", "scale"]
    assert [c["name"] for c in records["layers.0.ffn.experts.w1"]["components"]] == ["data"]
    assert "frequencies" not in records  # a constant


def test_component_bytes_are_those_that_pack_makes() -> None:
    data = torch.zeros(3, 80, 256, dtype=torch.float8_e4m3fn)
    sizes = component_bytes(parse_type("q[e4m3,ue8m0,128x128][3,80,256]"), "fp8/2x1")
    assert sizes == {"data": pack(parse_packing("fp8/2x1"), data).numel(), "scale": 3 * 1 * 2}
    sizes = component_bytes(parse_type("q[e2m1,e4m3,1x16,tensor][3,80,256]"), "nvfp4/1x2")
    assert sizes == {"data": 3 * parse_packing("nvfp4/1x2").nbytes(80, 256), "global_scale": 12}
    assert component_bytes(parse_type("bf16[7]"), "f32") == {"data": 28}
    with pytest.raises(ValueError, match="f32 is a form of bf16 weights"):
        component_bytes(parse_type("i32[7]"), "f32")


def test_constants_are_the_references_to_the_last_bit(tiny: Plan) -> None:
    """Computed once at load, on the host, from nothing."""
    assert tiny.load is not None
    assert set(tiny.load.outputs.values()) == {"frequencies", "compress_frequencies"}
    block = constants_of(tiny, torch.empty(0, dtype=torch.uint8))
    assert block.numel() == tiny.blocks["constants"] == 512
    place = tiny.load.values["frequencies"]
    wanted = run(RopeFrequencies(10000.0, 64, 1.0, 65536, 32.0, 1.0))
    assert torch.equal(view(block, place.type, place.offset), wanted)
    for program in tiny.buckets.values():
        assert program.values["frequencies"] == place


def test_what_is_made_of_weights_alone_is_made_once_at_load() -> None:
    """Weights that are read there lie as their types say."""
    plan = gpu_plan(disable=["hyper_norm", "hyper_norm_first"], certify=False)
    assert plan.load is not None
    read = {a.value for launch in plan.load.launches for a in launch.arguments if a.space == "weights"}
    assert {name.rpartition(".")[2] for name in read} >= {"hc_attn_scale", "hc_attn_base"}
    forms = {record["name"]: record["form"] for record in plan.weights}
    assert {forms[name] for name in read} == {"plain"}
    assert check(plan) == []


def test_a_primitive_without_a_kernel_is_named_with_its_place() -> None:
    with (
        tuned_families(),
        pytest.raises(
            BuildError, match=r"at layers\.0\.attn\.attn_out.*no kernel for|no kernel is registered"
        ),
    ):
        gpu_plan(disable=["quantize_linear"])


def test_what_cannot_share_a_launch_gets_its_own(tiny: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target's groups are a wish: kernels decide."""
    with_more = (*Kernels(SM_90A).groups, Group(("swiglu", "experts_down")), Group(("attention", "in_proj")))
    monkeypatch.setattr(Kernels, "groups", with_more)
    assert gpu_plan().buckets == tiny.buckets


def test_nodes_that_need_company_are_refused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernels, "groups", ())
    with tuned_families(), pytest.raises(BuildError, match=r"at layers\.2\.attn\.indexer\."):
        gpu_plan()
