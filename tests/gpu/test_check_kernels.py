"""`check --device`, without a GPU: launches evaluate their nodes by the reference, in the memory that each
turn has of its own, and one of them gets something wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dsv4c.certify.evaluate import PATTERNS
from dsv4c.cli import app
from dsv4c.compiler import device
from dsv4c.compiler.device import Alone, Checked, check_kernels
from dsv4c.errors import ConfigError, GraphError, PlanError
from dsv4c.exchange import RANK
from dsv4c.ir.graph import Kind, Node
from dsv4c.ir.graph import Value as Variable
from dsv4c.ir.text import parse_graph
from dsv4c.numerics.codec import Value, parts_of
from dsv4c.plan.folder import Plan
from dsv4c.reference import run
from dsv4c.reference.interpret import clone
from dsv4c.runtime import driver
from dsv4c.runtime.cuda import BoundProgram
from dsv4c.runtime.ranks import words_of
from dsv4c.types import BF16, I32, TensorType
from tests.codegen.lowered import gpu_plan
from tests.gpu.test_bisect import NoLibrary, rounded
from tests.passes.test_shard import wide

Fault = Callable[[Node, list[Value]], list[Value]]


class NoGraph:
    """Takes launches; what plays them is below."""

    def add(self, launch: driver.Launch, after: object = (), *, name: str = "") -> int:
        return 0

    def instantiate(self) -> None:
        pass


class Machine:
    """Plays a turn: its nodes by the reference. `fault` changes what a node gives, `taken` what it gets of
    another rank, `given` what others get of it. Results of the ops in `kept` are not stored.
    """

    kept: frozenset[str] = frozenset()

    fault: Fault = staticmethod(lambda node, results: results)
    taken: Callable[[Value, Value], Value] = staticmethod(lambda own, value: value)
    given: Callable[[int, Value], Value] = staticmethod(lambda rank, value: value)

    def take(self, alone: Alone, own: Value) -> list[Value]:
        """The operand of all ranks, those of the others as they have given them."""
        assert isinstance(own, torch.Tensor)
        rank = int(alone.bound.blocks["exchange"][RANK])
        found: list[Value] = []
        for peer in range(alone.plan.ranks):
            words = words_of(alone.plan, alone.bound.blocks["exchange"], peer).to(torch.int32)
            theirs = words[: own.nbytes // 4].view(own.dtype).view(own.shape)
            found.append(own if peer == rank else self.taken(own, theirs))
        return found

    def give(self, alone: Alone) -> None:
        block = alone.bound.blocks["exchange"]
        rank = int(block[RANK])
        assert alone._crossing is not None
        words = device._words(self.given(rank, clone(alone.bound.value(alone._crossing.name))))
        words_of(alone.plan, block, rank)[: len(words)] = words

    def play(self, alone: Alone) -> None:
        made: dict[str, Value] = {}
        stored = {a.value for x in alone.turn.launches for a in x.arguments if "w" in a.access}
        for node in alone.turn.nodes:
            known = [made[v.name] if v.name in made else alone._params.get(v.name) for v in node.inputs]
            operands = [
                alone.bound.value(v.name) if o is None else o for v, o in zip(node.inputs, known, strict=True)
            ]
            if node.op.collective:
                operands = self.take(alone, operands[0])
            result = run(node.op, *map(clone, operands))
            results = self.fault(node, list(result) if type(result) is tuple else [result])
            made |= {v.name: clone(value) for v, value in zip(node.outputs, results, strict=True)}
            for i, v in enumerate(node.outputs):
                names = {v.name} | ({node.inputs[node.op.alias[i]].name} if i in node.op.alias else set())
                if names & stored and node.op.name not in self.kept:
                    for to, part in zip(
                        parts_of(alone.bound.value(v.name)).values(),
                        parts_of(made[v.name]).values(),
                        strict=True,
                    ):
                        to.copy_(part)
        if alone._crossing is not None:
            self.give(alone)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return gpu_plan("tiny", batch=(1, 2), verify=4, chunk=1, max_context=64, certify=False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    playing: list[Alone] = []
    check = Alone.check

    def watched(self: Alone, pattern: str) -> object:
        playing[:] = [self]
        return check(self, pattern)

    monkeypatch.setattr(Alone, "check", watched)
    monkeypatch.setattr(BoundProgram, "call", lambda self: made.play(playing[0]))
    monkeypatch.setattr(driver, "Library", NoLibrary)
    monkeypatch.setattr(driver, "Graph", NoGraph)
    monkeypatch.setattr(driver, "synchronize", lambda what: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return made


def checked(plan: Plan, *buckets: str) -> list[Checked]:
    return list(check_kernels(plan, buckets, device="cpu"))


def test_right_kernels_hold_and_each_is_run_once(plan: Plan, machine: Machine) -> None:
    machine.fault = rounded
    found = checked(plan)
    assert [each for each in found if not each.holds] == []
    assert {name for each in found for name in each.kernels} == set(plan.kernels)
    turns = sum(len({x.nodes for x in p.launches}) for p in plan.buckets.values())
    assert sum(each.count for each in found) == turns
    assert len(found) < turns / 2
    assert any(each.worst.far > 0 for each in found)


def test_a_launch_may_keep_to_itself_what_only_its_own_nodes_read(plan: Plan, machine: Machine) -> None:
    """Scores of entries, where there are no more than are chosen anyway."""
    machine.kept = frozenset({"indexer"})
    found = [each for each in checked(plan, "decode-1") if "indexer" in each.op]
    assert found
    assert all(each.op == "indexer + index_topk" and len(each.kernels) == 1 and each.holds for each in found)


def of(op: str, change: Callable[[torch.Tensor], object], result: int = 0) -> Fault:
    """A kernel that is wrong in one result of every node of an op, besides what kernels round."""

    def fault(node: Node, results: list[Value]) -> list[Value]:
        results = rounded(node, results)
        if node.op.name == op:
            change(parts_of(results[result])["data"])
        return results

    return fault


def lose_a_row(x: torch.Tensor) -> None:
    x[-1] = 0


FAULTS: dict[str, Fault] = {
    "attention": of("attention", lambda x: x.mul_(1.05)),
    "experts_down": of("experts_down", lambda x: x.neg_()),
    "kv_norm_rope_store": of("kv_norm_rope_store", lose_a_row),
    "index_topk": of("index_topk", lambda x: x.fill_(-1)),
    "indexer": of("indexer", lambda x: x.mul_(1.5)),
    "argmax": of("argmax", lambda x: x.add_(1)),
    "advance": of("advance", lambda x: x.add_(1)),
}


@pytest.mark.parametrize("op", FAULTS)
def test_a_wrong_kernel_is_named_with_its_nodes(
    plan: Plan, machine: Machine, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "PATTERNS", ("mixed",))
    machine.fault = FAULTS[op]
    wrong = [each for each in checked(plan, "decode-1") if not each.holds]
    assert wrong
    assert all(op in each.op.split(" + ") for each in wrong)
    results = {
        v.name for n in parse_graph(plan.graph_text("decode-1")).nodes for v in n.outputs if n.op.name == op
    }
    assert {each.worst.result for each in wrong} <= results


@pytest.fixture(scope="module")
def ranks() -> Plan:
    return gpu_plan(wide(), ranks=2, batch=1, verify=1, chunk=1, max_context=64, certify=False)


def exchanges(found: list[Checked]) -> list[Checked]:
    return [each for each in found if {"all_reduce", "all_gather"} & set(each.op.split(" + "))]


def test_right_ranks_hold_in_turn_on_one_gpu(ranks: Plan, machine: Machine) -> None:
    machine.fault = rounded
    found = checked(ranks)
    assert [each for each in found if not each.holds] == []
    assert {name for each in found for name in each.kernels} == set(ranks.kernels)
    ops = {op for each in exchanges(found) for op in each.op.split(" + ")}
    assert ops >= {"all_reduce", "all_gather"}


def test_a_rank_that_gives_others_something_else_is_noticed(
    ranks: Plan, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "PATTERNS", ("random",))
    machine.given = lambda rank, value: value.neg_() if rank else value  # type: ignore[method-assign, union-attr]
    found = checked(ranks)
    wrong = [each for each in found if not each.holds]
    assert wrong == exchanges(found) != []
    assert all(each.worst.result.startswith("words of ") for each in wrong)


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_gives_nothing_is_noticed(
    ranks: Plan, machine: Machine, monkeypatch: pytest.MonkeyPatch, silent: int
) -> None:
    monkeypatch.setattr(device, "PATTERNS", ("random",))
    give = machine.give

    def given(alone: Alone) -> None:
        if int(alone.bound.blocks["exchange"][RANK]) != silent:
            give(alone)

    machine.give = given  # type: ignore[method-assign]
    found = checked(ranks)
    wrong = [each for each in found if not each.holds]
    assert wrong == exchanges(found) != []


def test_a_rank_that_takes_its_own_for_another_s_is_noticed(
    ranks: Plan, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "PATTERNS", ("random",))
    machine.taken = lambda own, value: own  # type: ignore[method-assign]
    found = checked(ranks)
    assert [each for each in found if not each.holds] == exchanges(found) != []


def test_what_a_launch_does_not_write_is_noticed(
    plan: Plan, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "PATTERNS", ("edges",))
    machine.play = lambda alone: None  # type: ignore[method-assign]
    assert not any(each.holds for each in checked(plan, "decode-1"))


def test_it_takes_a_gpu_and_kernels(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan.save(tmp_path / "gpu")
    gpu_plan(target="cpu", certify=False, max_context=64).save(tmp_path / "cpu")
    for name, sentence in (("gpu", "no NVIDIA GPU"), ("cpu", "which has no kernels; compile for sm_90a")):
        result = CliRunner().invoke(app, ["check", str(tmp_path / name), "--device"])
        assert result.exit_code == PlanError.exit_code
        assert sentence in result.stderr
    result = CliRunner().invoke(app, ["check", "--device", "--inject"])
    assert (result.exit_code, "--device takes a plan" in result.stderr) == (ConfigError.exit_code, True)


def test_the_command_lists_every_kind_of_turn(
    plan: Plan, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu = partial(check_kernels, device="cpu")
    monkeypatch.setattr("dsv4c.cli.check.check_kernels", on_cpu)
    monkeypatch.setattr(device, "PATTERNS", ("random",))
    plan.save(tmp_path / "p")
    command = ["check", str(tmp_path / "p"), "--device", "--bucket", "decode-1"]
    right = CliRunner().invoke(app, command)
    assert right.exit_code == 0, right.stderr
    machine.fault = FAULTS["attention"]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == GraphError.exit_code
    rows = json.loads(result.stdout)["checked"]
    assert {row["op"] for row in rows if not row["holds"]} == {"attention"}
    assert {row["pattern"] for row in rows} <= set(PATTERNS)
    assert "different: layers.0.attn" in result.stderr


def test_rows_of_padding_are_not_compared() -> None:
    """A chunk of 64 rows, one of which is padding: results lose that row, states and others lose none."""
    rows, other = (Variable(n, TensorType(BF16, (size, 2)), Kind.RESULT) for n, size in (("y", 64), ("z", 8)))
    lengths = Variable("lengths", TensorType(I32, (1,)), Kind.INPUT)
    alone: Any = SimpleNamespace(
        program=SimpleNamespace(shape=SimpleNamespace(tokens=64)), graph=SimpleNamespace(root_of={})
    )
    given: dict[Variable, Any] = {lengths: torch.tensor([63], dtype=torch.int32)}
    assert Alone._live(alone, rows, torch.zeros(64, 2), given).shape == (63, 2)
    assert Alone._live(alone, other, torch.zeros(8, 2), given).shape == (8, 2)
    assert Alone._live(alone, rows, torch.zeros(64, 2), {}).shape == (64, 2)
    alone.graph.root_of[rows] = rows
    assert Alone._live(alone, rows, torch.zeros(64, 2), given).shape == (64, 2)
