"""Plans on disk: they come back equal, never half-written, and nothing wrong with one goes unnoticed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import dsv4c
from dsv4c import publish
from dsv4c.buckets import Bucket
from dsv4c.errors import PlanError
from dsv4c.ir.text import make_op, parse_graph
from dsv4c.ir.verify import verify
from dsv4c.plan import folder as plans
from dsv4c.plan.folder import PLAN_FILE, TIMINGS_FILE, Plan, check_target, load
from dsv4c.plan.records import SPACES, BodyCode
from dsv4c.runtime.cpu import operands_of, results_of
from dsv4c.types import parse_type
from tests.runtime.conftest import BATCH, CHUNK, CONTEXT


@pytest.fixture
def saved(plan: Plan, tmp_path: Path) -> Path:
    return plan.save(tmp_path / "tiny.plan")


def test_a_saved_plan_comes_back_equal(plan: Plan, saved: Path) -> None:
    again = load(saved)
    assert again == plan
    assert again.files == plan.files
    assert again.digest == plan.digest
    assert again.timings == plan.timings


def test_the_same_input_gives_the_same_bytes(plan: Plan, checkpoint: Path) -> None:
    again = dsv4c.compile(checkpoint, batch=BATCH, max_context=CONTEXT, chunk=CHUNK, draft="mtp")
    assert again.text == plan.text
    assert again.files == plan.files


def test_a_plan_is_plain_data_without_absolute_paths(plan: Plan, saved: Path, checkpoint: Path) -> None:
    for file in saved.rglob("*"):
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            assert str(checkpoint) not in text
            assert str(saved.parent) not in text
    data = json.loads((saved / PLAN_FILE).read_text())
    assert data["schema"] == plans.SCHEMA
    assert data["deployment"]["target"] == "cpu"
    assert set(data["files"]) >= {f"graph.{bucket}.txt" for bucket in (*plan.buckets, "load")}
    written = {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()}
    assert written == {*data["files"], PLAN_FILE, TIMINGS_FILE}


def test_the_graphs_of_a_plan_parse_and_its_launches_are_theirs(plan: Plan) -> None:
    assert plan.load is not None
    for program in (*plan.buckets.values(), plan.load):
        graph = verify(parse_graph(plan.files[program.graph].decode()))
        assert set(program.values) == set(graph.by_name)
        for index, launch in enumerate(program.launches):
            node = next(n for n in graph.nodes if n.name == launch.name)
            assert isinstance(launch.code, BodyCode)
            assert make_op(launch.op, launch.code.attributes) == node.op
            assert operands_of(launch) == [v.name for v in node.inputs]
            assert results_of(launch) == [v.name for v in node.outputs]
            assert launch.after == ((index - 1,) if index else ())


def test_launches_and_values_agree_on_places(plan: Plan) -> None:
    """Whoever reads arguments and whoever reads places finds the same bytes."""
    records = {w["name"]: {c["name"]: c["offset"] for c in w["components"]} for w in plan.weights}
    for program in plan.buckets.values():
        for argument in (a for launch in program.launches for a in launch.arguments):
            place = program.values[argument.value]
            part = next(c for c in place.type.components if c.name == argument.component)
            assert (argument.space, argument.offset) == (place.space, place.offset + part.offset)
            if place.space == "weights":
                assert argument.offset == records[argument.value][argument.component]


def test_a_bucket_is_found_by_name_or_as_the_smallest_of_its_kind(plan: Plan) -> None:
    assert list(plan.buckets) == ["decode-3", "verify-1x4", "prefill-24", "draft-1", "round-3x2"]
    for name, program in plan.buckets.items():
        assert program.shape.name == name
        assert plan.program(name) is plan.program(program.shape.kind) is program
    larger = replace(plan.program("decode"), bucket=Bucket("decode", sequences=8))
    assert replace(plan, buckets={"decode-8": larger, **plan.buckets}).program() is plan.program("decode-3")


def test_blocks_of_a_plan_do_not_overlap(plan: Plan) -> None:
    for records, size in (
        ([(s.offset, s.type.extent) for s in plan.state], plan.blocks["state"]),
        ([(w["offset"], parse_type(w["type"]).extent) for w in plan.weights], plan.blocks["weights"]),
    ):
        end = 0
        for offset, extent in sorted(records):
            assert offset >= end
            end = offset + extent
        assert end <= size
    assert set(plan.blocks) == set(SPACES)


def test_a_plan_may_be_moved_but_not_renamed_inside(saved: Path, plan: Plan) -> None:
    moved = saved.rename(saved.with_name("elsewhere"))
    assert load(moved) == plan
    (moved / TIMINGS_FILE).unlink()
    assert load(moved).timings == {}


def altered(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a graph edited": (
        lambda p: altered(p / "graph.decode-3.txt", lambda t: t.replace("eps=1e-06", "eps=1e-05", 1)),
        r"graph\.decode-3\.txt: was altered after it was compiled",
    ),
    "an offset edited": (
        lambda p: altered(p / PLAN_FILE, lambda t: t.replace('"offset": 256', '"offset": 512', 1)),
        r"plan\.json: was altered after it was compiled",
    ),
    "a file gone": (
        lambda p: (p / "graph.draft-1.txt").unlink(),
        r"graph\.draft-1\.txt: is missing from the plan",
    ),
    "cut short": (
        lambda p: altered(p / PLAN_FILE, lambda t: t[: len(t) // 2]),
        r"plan\.json: is damaged: .*compile the plan again",
    ),
    "another schema": (
        lambda p: altered(p / PLAN_FILE, lambda t: t.replace('"schema": 6', '"schema": 99', 1)),
        r"has schema 99, this version of dsv4c reads 6; compile the plan again",
    ),
    "another program's": (
        lambda p: (p / PLAN_FILE).write_text('{"steps": []}'),
        r"plan\.json: is no plan of dsv4c",
    ),
    "a list": (lambda p: (p / PLAN_FILE).write_text("[]"), r"holds a JSON list"),
    "not text": (
        lambda p: (p / PLAN_FILE).write_bytes(b"\xff\xfe\x00"),
        r"plan\.json: is damaged: no text at byte 0; compile the plan again",
    ),
    "a well": (lambda p: (p / PLAN_FILE).write_text("[" * 100_000), r"plan\.json: is damaged: is nested too"),
    "no seconds": (lambda p: (p / TIMINGS_FILE).write_text('{"fold": "x"}'), r"timings\.json: is damaged"),
    "no plan.json": (lambda p: (p / PLAN_FILE).unlink(), r"no plan\.json here; expected a folder"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_plan_is_refused(saved: Path, damage: str) -> None:
    harm, message = DAMAGE[damage]
    harm(saved)
    with pytest.raises(PlanError, match=message):
        load(saved)


def signed(data: dict[str, object]) -> str:
    """A plan.json whose digest is right: made by hand, not by accident."""
    _, *rest = json.dumps(data, indent=0).split("\n")
    body = "\n".join([*rest, ""])
    return plans._first_lines(body) + body


def test_a_file_outside_of_the_plan_is_refused(saved: Path) -> None:
    data = json.loads((saved / PLAN_FILE).read_text())
    del data["digest"]
    data["files"]["../outside.txt"] = "0" * 64
    (saved / PLAN_FILE).write_text(signed(data))
    with pytest.raises(PlanError, match=r"names the file '\.\./outside\.txt'; expected files inside"):
        load(saved)


def test_a_record_that_lacks_a_field_is_refused(saved: Path) -> None:
    data = json.loads((saved / PLAN_FILE).read_text())
    del data["digest"]
    del data["buckets"]["decode-3"]["launches"][3]["after"]
    (saved / PLAN_FILE).write_text(signed(data))
    with pytest.raises(PlanError, match=r"a record cannot be read: .*fields after are missing"):
        load(saved)


def test_what_is_no_plan_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(PlanError, match=r"no such folder; compile a plan with `dsv4c compile"):
        load(tmp_path / "nothing")
    with pytest.raises(PlanError, match="holds a model, not a compiled plan"):
        load(checkpoint)
    with pytest.raises(PlanError, match=r"no plan\.json here"):
        load(tmp_path)


def test_a_bucket_that_is_none_is_refused(saved: Path) -> None:
    data = json.loads((saved / PLAN_FILE).read_text())
    del data["digest"]
    data["buckets"]["decode-1x3"] = data["buckets"].pop("decode-3")
    (saved / PLAN_FILE).write_text(signed(data))
    with pytest.raises(
        PlanError, match=r"a record cannot be read: .*'decode-1x3' names no bucket; decode-3 is"
    ):
        load(saved)


def test_an_unknown_bucket_is_named(plan: Plan) -> None:
    without = replace(plan, buckets={k: v for k, v in plan.buckets.items() if k != "draft-1"})
    known = "only decode-3, verify-1x4, prefill-24, round-3x2"
    with pytest.raises(PlanError, match=rf"has no bucket 'draft', {known}; compile with --draft auto$"):
        without.program("draft")
    with pytest.raises(PlanError, match=rf"has no bucket 'decode-8', {known}; did you mean 'decode-3'\?$"):
        without.program("decode-8")


# --- writing ---


def test_a_plan_replaces_another_only_if_told(plan: Plan, saved: Path) -> None:
    with pytest.raises(PlanError, match="holds a plan; give another folder, or --overwrite"):
        plan.save(saved)
    other = replace(plan, name="other")
    other.save(saved, overwrite=True)
    assert load(saved).name == "other"
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_plan_that_came_meanwhile_is_left_alone(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, write = tmp_path / "a.plan", Path.write_bytes

    def meanwhile(path: Path, content: bytes) -> int:
        if not target.exists():
            target.mkdir()
            (target / PLAN_FILE).write_text("another process wrote me")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", meanwhile)
    with pytest.raises(PlanError, match=r"a\.plan: another process wrote it just now; it was left alone"):
        plan.save(target)
    assert [p.name for p in tmp_path.iterdir()] == ["a.plan"]
    assert (target / PLAN_FILE).read_text() == "another process wrote me"


def test_folders_that_are_no_plans_are_never_replaced(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("words")
    with pytest.raises(PlanError, match="is not empty and holds no plan"):
        plan.save(tmp_path / "full", overwrite=True)
    (tmp_path / "file").write_text("words")
    with pytest.raises(PlanError, match="exists and is no folder"):
        plan.save(tmp_path / "file", overwrite=True)
    with pytest.raises(PlanError, match=r"cannot be written: .*file is no folder"):
        check_target(tmp_path / "file" / "plan")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]


def test_a_folder_that_cannot_be_written_is_named(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    target = tmp_path / "a.plan"
    with pytest.raises(PlanError, match=rf"{re.escape(str(target))}: cannot be written: Permission denied"):
        plan.save(target)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_save_leaves_nothing(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    write, written = Path.write_bytes, []

    def stop(path: Path, content: bytes) -> int:
        if len(written) == 2:
            raise failure
        written.append(path)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", stop)
    with pytest.raises((KeyboardInterrupt, PlanError)) as caught:
        plan.save(tmp_path / "a.plan")
    assert len(written) == 2
    assert list(tmp_path.iterdir()) == []
    if isinstance(failure, OSError):
        assert "cannot be written: No space left on device" in str(caught.value)


def test_an_interrupted_replacement_keeps_the_old_plan(
    plan: Plan, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(made: Path, place: Path) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(publish, "_exchange", stop)
    with pytest.raises(KeyboardInterrupt):
        replace(plan, name="other").save(saved, overwrite=True)
    monkeypatch.undo()
    assert load(saved) == plan
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
