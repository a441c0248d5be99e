"""Bisecting a GPU plan, without a GPU: its launches evaluate their nodes by the reference, in the plan's own
blocks, with roundings as of kernels, and one of them wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dsv4c
from dsv4c.compiler.bisect import Bisection, rerun
from dsv4c.compiler.job import job_of
from dsv4c.ir.graph import Node
from dsv4c.ir.text import parse_graph
from dsv4c.models.synth import synthesize
from dsv4c.numerics.codec import Quantized, Value
from dsv4c.plan.folder import Plan
from dsv4c.reference import run
from dsv4c.reference.interpret import clone
from dsv4c.runtime import driver
from dsv4c.runtime.checkpoint import Checkpoint
from dsv4c.runtime.cuda import CudaExecutor
from dsv4c.runtime.parameter import ParamRecord
from tests.codegen.lowered import gpu_plan

TOKENS = [3, 17, 5]
Fault = Callable[[Node, list[Value]], list[Value]]


class NoLibrary:
    """A cubin that nothing runs."""

    def __init__(self, cubin: bytes, name: str) -> None:
        self.name = name

    def kernel(self, symbol: str, *, shared: int = 0, cluster: int = 1) -> driver.Kernel:
        return driver.Kernel(symbol, None)


class Machine:
    """Runs launches: at the first of those that share nodes, all of these, by the reference. `fault` changes
    what a node gives, before others of its launches read it.
    """

    def __init__(self, plan: Plan, weights: Path) -> None:
        self.plan = plan
        self.nodes = {node.name: node for node in parse_graph(plan.graph_text()).nodes}
        self.params: dict[str, Value] = {}
        records = [ParamRecord.from_json(record) for record in plan.weights]
        Checkpoint.open(weights).load(records, lambda n, v: self.params.__setitem__(n, clone(v)))
        self.fault: Fault = lambda node, results: results
        self.executor: CudaExecutor | None = None  # that of the plan's launches

    def launch(self, index: int) -> None:
        launches = self.plan.program().launches
        if index and launches[index - 1].nodes == launches[index].nodes:
            return
        made: dict[str, Value] = {}
        stored = {
            a.value
            for x in launches
            if x.nodes == launches[index].nodes
            for a in x.arguments
            if "w" in a.access
        }
        for name in launches[index].nodes:
            node = self.nodes[name]
            operands = [made[v.name] if v.name in made else self.params.get(v.name) for v in node.inputs]
            known = [
                self.value(v.name) if o is None else o for v, o in zip(node.inputs, operands, strict=True)
            ]
            result = run(node.op, *map(clone, known))
            results = list(result) if type(result) is tuple else [result]
            results = [clone(value) for value in self.fault(node, results)]
            made |= {v.name: value for v, value in zip(node.outputs, results, strict=True)}
            for i, (v, value) in enumerate(zip(node.outputs, results, strict=True)):
                names = {v.name} | ({node.inputs[node.op.alias[i]].name} if i in node.op.alias else set())
                if names & stored:
                    store(self.value(v.name), value)

    def value(self, name: str) -> Value:
        assert self.executor is not None
        return self.executor.value("decode-1", name)


def store(target: Value, value: Value) -> None:
    for to, part in zip(parts(target), parts(value), strict=True):
        to.copy_(part)


def parts(value: Value) -> tuple[torch.Tensor, ...]:
    return tuple(value.parts) if isinstance(value, Quantized) else (value,)


def rounded(node: Node, results: list[Value]) -> list[Value]:
    """As a kernel may: every plain float moves by less than its neighbor's distance, and is rounded again."""
    if node.op.name in ("embed", "argmax", "advance", "positions", "index_topk"):
        return results
    made = []
    for value in results:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            step = 2.0**-22 if value.dtype is torch.float32 else 2.0**-10
            value = (value.double() * (1 + step)).to(value.dtype)
        made.append(value)
    return made


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(dsv4c.load_config("tiny"), tmp_path_factory.mktemp("bisect") / "weights", seed=1)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return gpu_plan("tiny", batch=1, verify=1, max_context=64)


@pytest.fixture
def machine(plan: Plan, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(plan, weights)

    class Graph:
        """Plays the launches that were added, by their numbers."""

        def __init__(self) -> None:
            self.indices: list[int] = []

        def add(self, launch: driver.Launch, after: object = (), *, name: str = "") -> int:
            self.indices.append(int(name.partition(",")[0]))
            return len(self.indices) - 1

        def instantiate(self) -> None:
            pass

        def launch(self, stream: int) -> None:
            for index in self.indices:
                made.launch(index)

    monkeypatch.setattr(driver, "Library", NoLibrary)
    monkeypatch.setattr(driver, "Graph", Graph)
    monkeypatch.setattr(driver, "synchronize", lambda what: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    block = torch.zeros(plan.blocks["weights"], dtype=torch.uint8)
    made.executor = CudaExecutor(plan, block, device="cpu")
    return made


def bisection(machine: Machine, weights: Path) -> Bisection:
    plan = machine.plan
    return Bisection(plan, weights, TOKENS, job_of(plan), executor=machine.executor)


def test_right_kernels_give_no_suspect(machine: Machine, weights: Path) -> None:
    search = bisection(machine, weights)
    verdict = search.run()
    assert verdict.right
    assert verdict.suspects == ()
    assert search.exact
    assert verdict.nodes == sum(len(set(x)) for x in {x.nodes for x in machine.plan.program().launches})


def test_roundings_of_kernels_are_no_fault(machine: Machine, weights: Path) -> None:
    machine.fault = rounded
    search = bisection(machine, weights)
    verdict = search.run()
    assert verdict.suspects == ()
    assert not search.exact
    assert verdict.right


def in_another_order(node: Node, results: list[Value]) -> list[Value]:
    """A selection is a set: a kernel may leave it, and what goes with it, in any order."""
    if node.op.name not in ("router", "index_topk"):
        return rounded(node, results)
    return [value.flip(-1) if isinstance(value, torch.Tensor) else value for value in results]


def test_a_selection_in_another_order_is_no_fault(machine: Machine, weights: Path) -> None:
    machine.fault = in_another_order
    search = bisection(machine, weights)
    verdict = search.run()
    assert verdict.suspects == ()
    assert verdict.right


def wrong(name: str, result: int, row: Callable[[torch.Tensor], None]) -> Fault:
    """A kernel that is wrong in one node's result, besides what kernels round."""

    def fault(node: Node, results: list[Value]) -> list[Value]:
        results = rounded(node, results)
        if node.name == name:
            target = parts(results[result])[0]
            row(target)
        return results

    return fault


def node_of(plan: Plan, op: str, layer: int) -> Node:
    found = [n for n in parse_graph(plan.graph_text()).nodes if n.op.name == op]
    return next(n for n in found if n.scope.startswith(f"layers.{layer}"))


@pytest.mark.parametrize(
    ("op", "layer", "shown"),
    [
        ("attention", 1, "attention"),
        ("q_norm_quantize", 2, "q_norm_quantize"),
        ("swiglu", 4, "experts_down"),
        ("experts_down", 3, "experts_down"),
    ],
)
def test_a_wrong_kernel_is_found_and_switched_off(
    machine: Machine, weights: Path, tmp_path: Path, op: str, layer: int, shown: str
) -> None:
    node = node_of(machine.plan, op, layer)
    machine.fault = wrong(node.name, 0, lambda x: x.mul_(-1.5))
    search = bisection(machine, weights)
    verdict = search.run()
    assert verdict.culprit is not None
    seen = node_of(machine.plan, shown, layer)  # experts are one turn: what is stored last is seen
    assert [s.node for s in verdict.suspects] == [seen.name]
    assert (verdict.culprit.rule, verdict.culprit.step) == (shown, 0)
    assert op in verdict.rules
    assert "of rounding" in verdict.culprit.reason
    assert not verdict.right
    assert verdict.gone
    assert verdict.switched_off == (seen.name,)

    search.reproduce(verdict, tmp_path / "out")
    found, body = rerun(tmp_path / "out")
    assert body is not None
    assert found.kind == "different"
    assert body.kind == "bit-exact"  # the rule is right, its kernel is not
