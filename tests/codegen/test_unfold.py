"""What no kernel takes is given back to its parts, which are asked again; nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv4c.arch import SM_90A
from dsv4c.codegen.select import Kernels
from dsv4c.compiler.job import rules_of
from dsv4c.compiler.verify import check
from dsv4c.config import load_config
from dsv4c.errors import BuildError
from dsv4c.ir.graph import Builder
from dsv4c.ir.ops import concat, quantize
from dsv4c.passes.fusions import FUSIONS
from dsv4c.passes.pipeline import Contributions
from dsv4c.plan.folder import Plan
from dsv4c.types import FP8_WEIGHT, parse_type
from tests.codegen import products
from tests.codegen.lowered import gpu_plan, no_compiler, tuned_families, whole_bodies
from tests.commands import command

EXAMPLE = Path(__file__).parents[2] / "examples" / "greedy_head" / "src"
SIZES = {"batch": (1, 2), "verify": 1, "chunk": 1, "max_context": 256}


@pytest.fixture
def greedy_head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Contributions]:
    """The built-in rules and one from outside, whose op has no kernel."""
    monkeypatch.syspath_prepend(EXAMPLE)
    with whole_bodies():
        yield rules_of(["dsv4c_greedy_head"])


@pytest.fixture(scope="module")
def plain() -> Plan:
    return gpu_plan(rules=rules_of(), certify=False, **SIZES)


def test_an_op_without_a_kernel_is_unfolded_and_reported(greedy_head: Contributions, plain: Plan) -> None:
    plan = gpu_plan(rules=greedy_head, certify=False, **SIZES)
    assert check(plan, greedy_head) == []
    assert [(u["bucket"], u["op"], u["nodes"], u["launches"]) for u in plan.report["unfolded"]] == [
        ("decode-1", "greedy_head", 1, 1),
        ("decode-2", "greedy_head", 1, 1),
    ]
    for rows, unfolded in enumerate(plan.report["unfolded"], start=1):
        assert unfolded["bytes"] == rows * 512 * 4  # the logits, read again
        assert "no kernel for greedy_head(" in unfolded["reason"]
    assert plan.report["rules"]["greedy_head"] == 1


def test_a_fusion_that_is_unfolded_changes_no_launch(greedy_head: Contributions, plain: Plan) -> None:
    plan = gpu_plan(rules=greedy_head, certify=False, **SIZES)
    assert plan.kernels == plain.kernels
    assert plan.blocks == plain.blocks
    assert plan.weights == plain.weights
    for name, program in plan.buckets.items():
        assert [x.code for x in program.launches] == [x.code for x in plain.buckets[name].launches]
        assert [[(a.space, a.offset, a.nbytes) for a in x.arguments] for x in program.launches] == [
            [(a.space, a.offset, a.nbytes) for a in x.arguments] for x in plain.buckets[name].launches
        ]


def test_a_fusion_that_must_stay_is_an_error_with_node_and_reason(greedy_head: Contributions) -> None:
    wanted = (
        r"bucket decode-1: greedy_head is required to stay fused, but at \S+: no kernel for greedy_head\("
    )
    with pytest.raises(BuildError, match=wanted):
        gpu_plan(rules=greedy_head, require_fused=["greedy_head"], certify=False, **SIZES)


def test_fusions_that_have_kernels_may_be_required(plain: Plan) -> None:
    rules = [name for name, count in plain.report["rules"].items() if count]
    assert gpu_plan(require_fused=rules, certify=False, **SIZES).report["unfolded"] == []


def test_a_fusion_on_rows_gets_a_kernel_without_one_being_written() -> None:
    rules = rules_of(["tests.codegen.gated_up:GatedUp"])
    others = ["swiglu", "hash_swiglu"]
    plan = gpu_plan(rules=rules, disable=others, require_fused=["gated_up"], certify=False, **SIZES)
    assert check(plan, rules) == []
    launches = [launch for launch in plan.program().launches if launch.op == "gated_up"]
    assert len(launches) == plan.report["rules"]["gated_up"] == 6
    (key,) = {launch.kernel.kernel for launch in launches}
    text = plan.files[plan.kernels[key]["source"]].decode()
    assert "        silu = math.silu(clamp)\n" in text


def test_a_fusion_with_products_gets_kernels_without_one_being_written() -> None:
    """Row programs before and behind the products, one inside of a product's launch, norms inside."""
    rules = rules_of(products.RULES)
    plan = gpu_plan(
        replace(load_config("tiny"), **products.WIDE),
        rules=rules,
        disable=[fusion.name for fusion in FUSIONS],
        require_fused=products.NAMES,
        certify=False,
        **SIZES | {"batch": 1, "chunk": 12},
    )
    assert check(plan, rules) == []
    assert plan.report["unfolded"] == []

    def stages(bucket: str) -> dict[str, list[str]]:
        """Those of the last layer, and of the head."""
        found: dict[str, list[str]] = {name: [] for name in products.NAMES}
        for launch in plan.buckets[bucket].launches:
            if launch.op in found and launch.scope.split(".")[:2] in (["output"], ["layers", "5"]):
                found[launch.op].append(launch.name.rpartition(".")[2])
        return found

    assert stages("decode-1") == {
        "routed_scores": ["scores"],
        "shared_hidden": ["before", "product", "behind"],
        "shared_sum": ["ffn_out"],
        "normed_head": ["before", "product", "behind"],  # the chunk's norm reads the gain as it is stored
    }
    assert stages("prefill-12.last") == {
        "routed_scores": ["product0"],
        "shared_hidden": ["before", "product0", "behind"],
        "shared_sum": ["product0"],
        "normed_head": [],
    }


@pytest.mark.usefixtures("greedy_head")
def test_on_the_cpu_every_fusion_stays(tmp_path: Path) -> None:
    args = ("compile", "tiny", "-o", tmp_path / "p", "--max-context", 64, "--no-certify", "--json")
    made = command(*args, "--pass", "dsv4c_greedy_head", "--require-fused", "greedy_head").json
    assert made["unfolded"] == []
    assert made["rules"]["greedy_head"] == 1


@pytest.mark.usefixtures("greedy_head")
def test_the_command_says_what_was_unfolded_and_what_must_not_be(tmp_path: Path) -> None:
    sizes = ("--target", "sm_90a", "--batch", 1, "--verify", 1, "--chunk", 1, "--no-certify")
    args = ("compile", "tiny", "--max-context", 256, *sizes, "--pass", "dsv4c_greedy_head")
    with no_compiler():
        told = command(*args, "-o", tmp_path / "p").out
        refused = command(*args, "-o", tmp_path / "q", "--require-fused", "greedy_head")
    assert "decode-1: no kernel for 1 × greedy_head, unfolded: +1 launches, 2.05 kB more" in told
    assert refused.code == BuildError.exit_code
    assert "greedy_head is required to stay fused" in refused.err
    assert not (tmp_path / "q").exists()


def test_a_primitive_without_a_kernel_is_refused_by_name() -> None:
    with Builder("weights") as builder:
        x = builder.input("x", parse_type("bf16[256,256]"))
        graph = builder.finish({"out": quantize(x, format=FP8_WEIGHT)})
    wanted = (
        r"no kernel for quantize\(x: bf16\[256,256\]\).*\n  row_program: quantizes rows one by one, which q"
    )
    with pytest.raises(BuildError, match=wanted):
        Kernels(SM_90A).code(graph, graph.nodes)


def test_a_primitive_of_any_number_of_operands_is_told_by_name() -> None:
    with Builder("joined") as builder:
        parts = [builder.input(name, parse_type("f32[1,4]")) for name in ("a", "b", "c")]
        graph = builder.finish({"out": concat(*parts, axis=0)})
    (part,) = Kernels(SM_90A).code(graph, graph.nodes)
    assert [operand.value for operand in part.operands] == [*parts, graph.outputs["out"]]
    with (
        tuned_families(),
        pytest.raises(BuildError, match=r"no kernel for concat\(parts_0: f32\[1,4\], parts_1: .*, parts_2: "),
    ):
        Kernels(SM_90A).code(graph, graph.nodes)


def test_why_a_fusion_was_unfolded_is_told_where_its_parts_have_no_kernel() -> None:
    with (
        tuned_families(),
        pytest.raises(BuildError, match=r"^at embedding: no kernel for embedding\(") as error,
    ):
        gpu_plan(recipe="fp32", certify=False, **SIZES)
    assert "\nembed was unfolded: no kernel for embed(" in str(error.value)
    assert "embed: copies rows of bf16" in str(error.value)


@pytest.mark.parametrize("recipe", ["fp32", "bf16", "official", "nvfp4-experts-w4a4", "nvfp4"])
def test_every_graph_has_kernels(recipe: str) -> None:
    """Without any fusion, and whatever the recipe, with rounds."""
    for disable in ([], ["all"]):
        plan = gpu_plan(recipe=recipe, disable=disable, draft="mtp", certify=False, **SIZES)
        assert check(plan, rules_of()) == []
        rounds = {"draft-1", "round-1x2", "round-2x2"}
        assert rounds | {"decode-1", "decode-2"} == set(plan.buckets)


@pytest.mark.parametrize(
    ("disable", "last"),
    [([], ["sampler"]), (["sampler"], ["penalize", "token_probabilities", "draw", "emit"])],
)
def test_steps_that_sample_have_kernels(disable: list[str], last: list[str]) -> None:
    plan = gpu_plan(sampled=True, disable=disable, certify=False, **SIZES)
    assert check(plan) == []
    launches = [launch.op for launch in plan.buckets["decode-1.sampled"].launches]
    assert launches[-1 - len(last) :] == [*last, "advance"]


@pytest.mark.parametrize("rule", [fusion.name for fusion in FUSIONS])
def test_any_rule_may_be_left_out(rule: str) -> None:
    plan = gpu_plan(disable=[rule], certify=False, **SIZES)
    assert check(plan) == []
    assert not any(rule in launch.op.split(" + ") for launch in plan.program().launches)


ODD = {
    "hidden": {"hidden_size": 384},
    "heads": {"num_attention_heads": 6, "head_dim": 192, "o_groups": 3, "num_experts_per_tok": 3},
    "groups": {"o_lora_rank": 64},
    "narrow": {
        "hidden_size": 200,
        "moe_intermediate_size": 88,
        "q_lora_rank": 72,
        "o_lora_rank": 40,
        "linear_format": "bf16",
        "expert_format": "bf16",
    },
}


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
def test_any_shape_has_kernels(changes: dict[str, Any]) -> None:
    recipe = "bf16" if "linear_format" in changes else "official"
    plan = gpu_plan(replace(load_config("tiny"), **changes), recipe=recipe, certify=False, **SIZES)
    assert check(plan) == []
