"""The launch-graph verifier: sound plans pass, every planted fault is found where it is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dsv4c.cli import app
from dsv4c.compiler.verify import Violation, check
from dsv4c.errors import PlanError
from dsv4c.plan.declared import is_late
from dsv4c.plan.folder import Plan
from dsv4c.plan.records import Argument, Launch
from tests.codegen.lowered import gpu_plan


@pytest.fixture(scope="module")
def plan() -> Plan:
    return gpu_plan(batch=1, verify=1, chunk=1)


def launches(plan: Plan) -> list[Launch]:
    return list(plan.program().launches)


def rebuilt(plan: Plan, changed: list[Launch], **changes: Any) -> Plan:
    """Other launches of the decode step; `arena` is the bytes of the arena's block."""
    arena = changes.pop("arena", plan.blocks["arena"])
    decode = replace(plan.program(), launches=tuple(changed), **changes)
    return replace(plan, buckets={"decode-1": decode}, blocks={**plan.blocks, "arena": arena})


def with_launch(plan: Plan, name: str, change: Callable[[Launch], Launch]) -> Plan:
    every = launches(plan)
    assert name in [launch.name for launch in every]
    return rebuilt(plan, [change(launch) if launch.name == name else launch for launch in every])


def with_code(plan: Plan, name: str, **fields: Any) -> Plan:
    return with_launch(plan, name, lambda x: replace(x, code=replace(x.kernel, **fields)))


def with_argument(plan: Plan, name: str, value: str, **fields: Any) -> Plan:
    def change(launch: Launch) -> Launch:
        assert value in [a.value for a in launch.arguments]
        return replace(
            launch,
            arguments=tuple(replace(a, **fields) if a.value == value else a for a in launch.arguments),
        )

    return with_launch(plan, name, change)


def kinds(found: list[Violation]) -> set[tuple[str, str]]:
    return {(v.kind, v.launch) for v in found}


def followed(plan: Plan) -> list[Violation]:
    """What is found without lowering the graphs again, which finds any change."""
    found = check(plan)
    assert any(v.kind == "lowered" for v in found)
    return [v for v in found if v.kind != "lowered"]


def argument(plan: Plan, name: str, value: str) -> Argument:
    (launch,) = (launch for launch in launches(plan) if launch.name == name)
    return next(a for a in launch.arguments if a.value == value)


def test_a_compiled_plan_is_sound(plan: Plan) -> None:
    assert check(plan) == []


def test_a_launch_without_its_edge_races_with_what_it_reads(plan: Plan) -> None:
    found = followed(with_launch(plan, "layers.0.attn.qa", lambda x: replace(x, after=())))
    assert ("order", "layers.0.attn.qa") in kinds(found)
    assert any("layers.0.attn_in_quantized" in v.text and "hc_attn.post" in v.text for v in found)


def test_an_edge_around_the_reader_lets_the_writer_overtake_it(plan: Plan) -> None:
    """Write after read: the bytes of what attention still reads are written by a later launch."""
    every = launches(plan)
    index = next(i for i, launch in enumerate(every) if launch.name == "layers.0.attn.attn_out")
    every[index] = replace(every[index], after=(index - 3,))
    found = followed(rebuilt(plan, every))
    assert ("order", "layers.0.attn.attn_out") in kinds(found)


def test_a_programmatic_edge_needs_a_kernel_that_waits(plan: Plan) -> None:
    found = followed(with_code(plan, "layers.1.x_attn", waits=False))
    assert ("wait", "layers.1.x_attn") in kinds(found)
    assert ("order", "layers.1.x_attn") in kinds(found)  # and nothing orders it


def test_a_full_edge_orders_a_kernel_that_does_not_wait(plan: Plan) -> None:
    sound = with_code(plan, "layers.1.x_attn", waits=False, programmatic=False)
    assert followed(sound) == []


def test_an_edge_to_a_later_launch_is_found(plan: Plan) -> None:
    found = followed(with_launch(plan, "streams", lambda x: replace(x, after=(7,))))
    assert ("order", "streams") in kinds(found)


def test_a_read_without_a_writer_is_found(plan: Plan) -> None:
    every = [launch for launch in launches(plan) if launch.name != "layers.3.ffn.router.experts.gate"]
    every = [replace(launch, after=(i - 1,) if i else ()) for i, launch in enumerate(every)]
    found = followed(rebuilt(plan, every))
    assert any(v.kind in ("unwritten", "stale") and "router.experts.logits" in v.text for v in found)
    assert {v.kind for v in found} <= {"unwritten", "stale"}


def test_scratch_under_two_names_is_found(plan: Plan) -> None:
    """The gate's logits, read from another place than where they were written."""
    place = argument(plan, "layers.3.ffn.router.experts.up", "layers.3.ffn.router.experts.logits")
    found = followed(
        with_argument(
            rebuilt(plan, launches(plan), arena=plan.blocks["arena"] + 256),
            "layers.3.ffn.router.experts.up",
            place.value,
            offset=plan.blocks["arena"],
        )
    )
    assert kinds(found) == {("unwritten", "layers.3.ffn.router.experts.up"), ("outside", "")}


def test_what_is_read_before_the_wait_is_older_than_the_predecessor(plan: Plan) -> None:
    """A hash layer's token: sound as an input of the step, and as what a launch leaves there that others have
    waited for; not as what the predecessor does.
    """
    place = argument(plan, "layers.1.ffn.router.experts.up", "tokens")
    assert (place.space, place.access) == ("input", "early")
    every = launches(plan)
    near = next(i for i, launch in enumerate(every) if launch.name == "layers.1.x_attn")
    late = ("wait", "layers.1.ffn.router.experts.up")
    for index, access, found in ((near, "r", set()), (0, "w", set()), (near, "w", {late})):
        touching = replace(every[index], arguments=(*every[index].arguments, replace(place, access=access)))
        changed = [touching if i == index else launch for i, launch in enumerate(every)]
        assert {pair for pair in kinds(followed(rebuilt(plan, changed))) if pair[0] == "wait"} == found


def test_a_boundary_waits_for_what_its_predecessor_writes(plan: Plan) -> None:
    found = followed(with_argument(plan, "layers.1.x_attn", "layers.1.attn.attn_out", access="early"))
    assert kinds(found) == {("wait", "layers.1.x_attn")}


def test_a_boundary_reads_nothing_early_behind_a_kernel_that_lets_it_begin_at_once(plan: Plan) -> None:
    """`wo_b` with its trigger where other kernels have it: sublayers of attention are in flight together, but
    for those whose index scores let nobody begin before all that is older is complete.
    """
    kernel = next(x.kernel.kernel for x in launches(plan) if x.name == "layers.1.attn.attn_out")
    path = plan.kernels[kernel]["source"]
    text = plan.files[path].decode()
    trigger = re.compile(r"^ +ptx\.launch_dependents\(\)\n", re.MULTILINE)
    assert len(trigger.findall(text)) == 1
    hasty = trigger.sub("", text).replace("    smem = ", "    ptx.launch_dependents()\n    smem = ", 1)
    assert is_late(text)
    assert not is_late(hasty)
    found = check(replace(plan, files={**plan.files, path: hasty.encode()}))
    racing = {v.launch for v in found if v.kind == "wait"}
    assert racing == {f"layers.{i}.x_attn" for i in (0, 1, 3, 5)}


def test_overwritten_bytes_are_found(plan: Plan) -> None:
    """Two values at one place while both are alive."""
    decode = plan.program()
    qa, q = decode.values["layers.0.attn.qa"], decode.values["layers.0.attn.kv_out"]
    moved = rebuilt(
        plan, launches(plan), values={**decode.values, "layers.0.attn.kv_out": replace(q, offset=qa.offset)}
    )
    for launch in launches(plan):
        if "layers.0.attn.kv_out" in [a.value for a in launch.arguments]:
            moved = with_argument(moved, launch.name, "layers.0.attn.kv_out", offset=qa.offset)
    found = followed(moved)
    assert ("stale", "layers.0.attn.qb") in kinds(found)


def test_a_launch_may_not_write_what_its_other_nodes_read(plan: Plan) -> None:
    """The queries in the bytes of the KV row that a rider of the same launch stores."""
    decode, name = plan.program(), "layers.0.attn.qb"
    kv, qb = decode.values["layers.0.attn.kv_out"], decode.values[name]
    values = {**decode.values, name: replace(qb, offset=kv.offset)}
    moved = rebuilt(plan, launches(plan), values=values, arena=plan.blocks["arena"] + qb.type.extent)
    for launch in launches(plan):
        if name in [a.value for a in launch.arguments]:
            moved = with_argument(moved, launch.name, name, offset=kv.offset)
    assert ("overlap", name) in kinds(followed(moved))


def test_a_state_read_after_its_write_must_be_the_new_value(plan: Plan) -> None:
    """Attention before the row of its own token is stored: it finds the old window."""
    every = launches(plan)
    names = [launch.name for launch in every]
    store, attention = names.index("layers.0.attn.qb"), names.index("layers.0.attn.reshape_2")
    every[store], every[attention] = every[attention], every[store]
    every = [replace(launch, after=(i - 1,) if i else ()) for i, launch in enumerate(every)]
    found = followed(rebuilt(plan, every))
    assert any(v.kind == "stale" and "window" in v.text for v in found)


def test_a_write_that_is_not_in_place_is_found(plan: Plan) -> None:
    decode = plan.program()
    slot = decode.values["layers.0.attn.window_written"]
    values = {**decode.values, "layers.0.attn.window_written": replace(slot, offset=slot.offset + 256)}
    found = followed(rebuilt(plan, launches(plan), values=values))
    assert any(v.kind == "alias" and "layers.0.attn.window_written overwrites" in v.text for v in found)


@pytest.mark.parametrize("space", ["arena", "state", "weights", "constants", "input"])
def test_an_argument_outside_of_its_block_is_found(plan: Plan, space: str) -> None:
    name, value = next((x.name, a.value) for x in launches(plan) for a in x.arguments if a.space == space)
    for offset in (1 << 40, -16):
        found = followed(with_argument(plan, name, value, offset=offset))
        assert ("outside", name) in kinds(found)


def test_an_unknown_block_is_found(plan: Plan) -> None:
    found = followed(with_argument(plan, "streams", "tokens", space="attic"))
    assert ("outside", "streams") in kinds(found)


def test_an_argument_beside_its_value_is_found(plan: Plan) -> None:
    place = argument(plan, "layers.0.attn.qa", "layers.0.attn.wq_a")
    found = followed(with_argument(plan, "layers.0.attn.qa", place.value, offset=place.offset + 16))
    assert ("misplaced", "layers.0.attn.qa") in kinds(found)
    found = followed(with_argument(plan, "layers.0.attn.qa", "layers.0.attn.kv_out", nbytes=2))
    assert ("misplaced", "layers.0.attn.qa") in kinds(found)


def test_a_written_weight_is_found(plan: Plan) -> None:
    found = followed(with_argument(plan, "streams", "embed", access="w"))
    assert ("misplaced", "streams") in kinds(found)


def test_overlapping_weights_and_states_are_found(plan: Plan) -> None:
    first, second, *rest = (dict(record) for record in plan.weights)
    second["components"] = [second["components"][0] | {"offset": first["components"][0]["offset"] + 16}]
    found = followed(replace(plan, weights=(first, second, *rest)))
    assert any(v.kind == "overlap" and second["name"] in v.text and first["name"] in v.text for v in found)
    states = (plan.state[0], replace(plan.state[1], offset=plan.state[0].offset), *plan.state[2:])
    assert any(v.kind == "overlap" and "state" in v.text for v in followed(replace(plan, state=states)))
    short = followed(replace(plan, blocks={**plan.blocks, "weights": plan.blocks["weights"] // 2}))
    assert any(v.kind == "outside" and not v.launch for v in short)


def test_a_missing_kernel_or_launch_is_found(plan: Plan) -> None:
    found = followed(with_code(plan, "streams", kernel="0" * 24))
    assert ("kernel", "streams") in kinds(found)
    every = [replace(x, after=(i - 1,) if i else ()) for i, x in enumerate(launches(plan)[:-1])]
    found = followed(rebuilt(plan, every))
    assert [v.kind for v in found] == ["surplus", "missing"]  # nothing runs its kernel
    assert "advance" in found[1].text
    found = followed(with_launch(plan, "streams", lambda x: replace(x, nodes=(*x.nodes, "nobody"))))
    assert ("missing", "streams") in kinds(found)


def test_the_command_prints_what_is_wrong_and_fails(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "sound")
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "sound")])
    assert result.exit_code == 0
    assert "sound\n" in result.stdout
    assert "in order and apart: decode-1 66" in result.stdout
    with_argument(plan, "streams", "embed", access="w").save(tmp_path / "wrong")
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "wrong"), "--json"])
    assert result.exit_code == PlanError.exit_code
    first, *others = json.loads(result.stdout)["violations"]
    assert (first["kind"], first["launch"]) == ("misplaced", "streams")
    assert {violation["kind"] for violation in others} == {"lowered"}


def test_the_kernels_of_a_plan_can_be_listed(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan")
    result = CliRunner().invoke(app, ["show", str(tmp_path / "plan"), "--kernels", "--json"])
    assert result.exit_code == 0
    rows = json.loads(result.stdout)["kernels"]
    assert {row["kernel"] for row in rows} == set(plan.kernels)
    assert sum(row["launches"] for row in rows) == len(launches(plan))
    assert {"registers", "shared", "spills", "code"} <= rows[0].keys()


@pytest.mark.parametrize("target", ["cpu", "sm_90a"])
def test_every_bucket_of_a_plan_is_checked_by_one_verifier(target: str) -> None:
    """The arena of another bucket is no excuse, and what runs at load is checked as well."""
    plan = gpu_plan(target=target, batch=(1, 2), chunk=8, max_context=64)
    assert check(plan) == []
    assert plan.load is not None
    for name, program in {**plan.buckets, "load": plan.load}.items():
        last = program.launches[-1]
        broken = replace(program, launches=program.launches[:-1])
        whole = {"load": broken} if name == "load" else {"buckets": {**plan.buckets, name: broken}}
        found = followed(replace(plan, **whole))
        assert {(v.kind, v.bucket) for v in found} == {("missing", name)}
        assert last.nodes[0] in found[0].text
