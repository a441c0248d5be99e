"""What timing needs besides a GPU: layers cut out of a plan, bytes of launches, the command's refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4c.errors import ConfigError, PlanError
from dsv4c.plan.folder import Plan
from dsv4c.runtime.bench import given, layer_of, layers_alone, moved_bytes
from tests.codegen.lowered import gpu_plan
from tests.commands import command


@pytest.fixture(scope="module")
def plan() -> Plan:
    return gpu_plan("tiny", batch=2, verify=1, max_context=64)


def test_layers_cut_out_of_a_plan_keep_their_launches_and_their_weights(plan: Plan) -> None:
    whole = plan.program("decode")
    cut = layers_alone(plan, "decode", 1, 2)
    (program,) = cut.buckets.values()
    own = [x for x in whole.launches if layer_of(x.scope, x.name) in (1, 2) or x.name == "positions"]
    assert [x.name for x in program.launches] == [x.name for x in own]
    assert own[0].name == "positions"  # without it, rows were nowhere, and layers had little to look at
    assert [x.code for x in program.launches] == [x.code for x in own]
    read = {a.value for x in own for a in x.arguments if a.space == "weights"}
    assert {record["name"] for record in cut.weights} == read
    assert cut.blocks["weights"] < plan.blocks["weights"]
    before = {r["name"]: r["components"] for r in plan.weights}
    shifts = {
        old["offset"] - new["offset"]
        for record in cut.weights
        for old, new in zip(before[record["name"]], record["components"], strict=True)
    }
    shifts |= {
        old.offset - new.offset
        for a, b in zip(own, program.launches, strict=True)
        for old, new in zip(a.arguments, b.arguments, strict=True)
        if old.space == "weights"
    }
    assert len(shifts) == 1  # all by the same
    for launch in program.launches:
        for a in launch.arguments:
            assert 0 <= a.offset <= a.offset + a.nbytes <= cut.blocks[a.space]


def test_launches_of_a_cut_are_behind_what_they_were_behind(plan: Plan) -> None:
    whole = plan.program("decode").launches
    (program,) = layers_alone(plan, "decode", 1, 2).buckets.values()
    names = {x.name for x in program.launches}
    by_name = {x.name: x for x in whole}
    for launch in program.launches:
        expected = {whole[i].name for i in by_name[launch.name].after} & names
        assert {program.launches[i].name for i in launch.after} == expected


def test_layers_alone_are_given_what_others_make(plan: Plan) -> None:
    assert given(plan.program("decode")) == []
    (program,) = layers_alone(plan, "decode", 1, 2).buckets.values()
    assert "layers.0.ffn.ffn_out" in given(program)
    assert all(name.startswith("layers.0.") or "." not in name for name in given(program))
    assert "positions" not in given(program)


def test_layers_that_are_not_there(plan: Plan) -> None:
    with pytest.raises(PlanError, match="has no layers 9 to 12; it has 0 to 5"):
        layers_alone(plan, "decode", 9, 12)


def test_a_launch_moves_the_experts_that_its_tokens_choose(plan: Plan) -> None:
    program = plan.program("decode-2")
    config = plan.config
    (launch,) = [
        x
        for x in program.launches
        if any(a.value == "layers.2.ffn.experts.w2" for a in x.arguments) and layer_of(x.scope, x.name) == 2
    ]
    stacked = [a for a in launch.arguments if a.value == "layers.2.ffn.experts.w2"]
    others = sum(a.nbytes for a in launch.arguments if a not in stacked)
    chosen = min(2 * config["num_experts_per_tok"], config["n_routed_experts"])
    expected = others + sum(a.nbytes for a in stacked) * chosen / config["n_routed_experts"]
    assert moved_bytes(plan, program, launch, 32) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give either --weights DIR or --random-weights"),
        (("--weights", "w", "--random-weights"), "give either --weights DIR or --random-weights"),
        (
            ("--random-weights", "--layers", "3"),
            "'3' is no range of layers, expected the first and last: 0:11",
        ),
        (("--random-weights", "--layers", "3:2"), "'3:2' is no range of layers"),
        (("--weights", "w", "--layers", "0:2"), "--layers takes --random-weights"),
    ],
)
def test_contradictions_are_said_before_anything_is_read(options: tuple[str, ...], message: str) -> None:
    done = command("bench", "no.plan", *options)
    assert done.code == ConfigError.exit_code
    assert message in done.err


def test_a_plan_for_the_cpu_is_refused(tmp_path: Path) -> None:
    assert command("compile", "tiny", "-o", tmp_path / "p", "--max-context", "64", "--no-certify").code == 0
    done = command("bench", tmp_path / "p", "--random-weights")
    assert done.code == PlanError.exit_code
    assert "is compiled for the CPU; bench times GPU plans" in done.err
