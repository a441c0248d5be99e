"""What no kernel takes is given back to its parts, which are asked again; nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4c.arch import SM_90A
from dsv4c.codegen.select import Kernels
from dsv4c.compiler.job import rules_of
from dsv4c.compiler.verify import check
from dsv4c.errors import BuildError
from dsv4c.ir.graph import Builder
from dsv4c.ir.ops import concat
from dsv4c.passes.pipeline import Contributions
from dsv4c.plan.folder import Plan
from dsv4c.types import parse_type
from tests.codegen.lowered import gpu_plan, no_compiler
from tests.commands import command

EXAMPLE = Path(__file__).parents[2] / "examples" / "greedy_head" / "src"
SIZES = {"batch": (1, 2), "verify": 1, "chunk": 1, "max_context": 256}


@pytest.fixture
def greedy_head(monkeypatch: pytest.MonkeyPatch) -> Contributions:
    """The built-in rules and one from outside, whose op has no kernel."""
    monkeypatch.syspath_prepend(EXAMPLE)
    return rules_of(["dsv4c_greedy_head"])


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


@pytest.mark.parametrize("rule", ["in_proj"])
def test_a_rule_may_be_left_out(rule: str) -> None:
    """Its parts have kernels of their own."""
    plan = gpu_plan(disable=[rule], certify=False, **SIZES)
    assert check(plan) == []
    assert not any(rule in launch.op.split(" + ") for launch in plan.program().launches)


def test_a_primitive_without_a_kernel_is_refused_by_name() -> None:
    with pytest.raises(
        BuildError, match=r"^at layers\.5\.hc_ffn\.spread_streams: no kernel for spread_streams\("
    ):
        gpu_plan(disable=["head"], certify=False, **SIZES)


def test_a_primitive_of_any_number_of_operands_is_refused_by_name() -> None:
    with Builder("joined") as builder:
        parts = [builder.input(name, parse_type("f32[1,4]")) for name in ("a", "b", "c")]
        graph = builder.finish({"out": concat(*parts, axis=0)})
    with pytest.raises(
        BuildError, match=r"no kernel for concat\(parts_0: f32\[1,4\], parts_1: .*, parts_2: "
    ):
        Kernels(SM_90A).code(graph, graph.nodes)


def test_why_a_fusion_was_unfolded_is_told_where_its_parts_have_no_kernel() -> None:
    with pytest.raises(BuildError, match=r"^at embedding: no kernel for embedding\(") as error:
        gpu_plan(recipe="fp32", certify=False, **SIZES)
    assert "\nembed was unfolded: no kernel for embed(" in str(error.value)
    assert "embed: copies rows of bf16" in str(error.value)
