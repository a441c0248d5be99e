"""Recorded inputs fed into a GPU plan's launches, without a GPU: each launch evaluates its nodes by the
reference, in the plan's own blocks, so what is tested is where `check_sublayers` puts and finds values.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from dsv4c.ir.text import parse_graph
from dsv4c.numerics.codec import Quantized, Value
from dsv4c.plan.folder import Plan
from dsv4c.reference import run
from dsv4c.reference.interpret import clone
from dsv4c.runtime import driver
from dsv4c.runtime.checkpoint import Checkpoint
from dsv4c.runtime.cuda import CudaExecutor
from dsv4c.runtime.parameter import ParamRecord
from tests.codegen.lowered import gpu_plan
from tests.goldens import golden_case, recorded
from tests.gpu import check_sublayers
from tests.gpu.check_sublayers import Device, plain

CASE = "nvfp4-experts"


class NoLibrary:
    """A cubin that nothing runs."""

    def __init__(self, cubin: bytes, name: str) -> None:
        self.name = name

    def kernel(self, symbol: str, *, shared: int = 0, cluster: int = 1) -> driver.Kernel:
        return driver.Kernel(symbol, None)


class NoGraph:
    """Takes launches, runs none."""

    def add(self, launch: driver.Launch, after: object = (), *, name: str = "") -> int:
        return 0

    def instantiate(self) -> None:
        pass


class Launch:
    """One launch: the nodes that it is the first to work on, evaluated by the reference."""

    def __init__(self, device: Device, params: dict[str, Value], index: int) -> None:
        self.device, self.params = device, params
        launches = device.step.launches
        before = {name for launch in launches[:index] for name in launch.nodes}
        graph = parse_graph(device.executor.plan.graph_text())
        self.nodes = [n for n in graph.nodes if n.name in set(launches[index].nodes) - before]

    def launch(self, stream: int) -> None:
        made: dict[str, Value] = {}
        for node in self.nodes:
            names = [v.name for v in node.inputs]
            operands = [made.get(n, self.params.get(n)) for n in names]
            known = [self.device.value(n) if o is None else o for n, o in zip(names, operands, strict=True)]
            result = run(node.op, *map(clone, known))
            results = result if type(result) is tuple else (result,)
            made |= {v.name: clone(r) for v, r in zip(node.outputs, results, strict=True)}
        for name, value in made.items():
            place = self.device.value(name)
            for part, new in zip(_parts(place), _parts(value), strict=True):
                part.copy_(new)


def _parts(value: Value) -> tuple[torch.Tensor, ...]:
    return tuple(value.parts) if isinstance(value, Quantized) else (value,)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return gpu_plan(golden_case(CASE), recipe=CASE, max_context=512, batch=1, verify=1, chunk=1)


@pytest.fixture
def device(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(driver, "Library", NoLibrary)
    monkeypatch.setattr(driver, "Graph", NoGraph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    block = torch.zeros(plan.blocks["weights"], dtype=torch.uint8)
    made = Device(CudaExecutor(plan, block, device="cpu"), recorded(CASE))
    params: dict[str, Value] = {}
    records = [ParamRecord.from_json(record) for record in plan.weights]
    Checkpoint.open(golden_case(CASE)).load(records, lambda n, v: params.__setitem__(n, clone(v)))
    made.single = [Launch(made, params, i) for i in range(len(made.single))]  # type: ignore[misc]
    return made


@torch.inference_mode()
def test_recorded_inputs_give_the_recorded_results(device: Device) -> None:
    found = check_sublayers.attention(device, 0) + check_sublayers.experts(device, 0)
    assert {f.name.rpartition(".")[2] for f in found} >= {"attn_out", "index_sel", "router_idx", "ffn_out"}
    assert all(f.distance <= min(f.bound, 1e-3) for f in found), found


@torch.inference_mode()
def test_a_launch_that_writes_something_else_is_seen(device: Device) -> None:
    (index,) = (i for i, w in enumerate(device.writes) if "layers.1.ffn.ffn_out" in w)
    inner = device.single[index]

    def wrong(stream: int) -> None:
        inner.launch(stream)
        out = device.value("layers.1.ffn.ffn_out")
        assert isinstance(out, torch.Tensor)
        out[:, 7] += 0.1 * plain(out).norm()

    device.single[index] = SimpleNamespace(launch=wrong)  # type: ignore[call-overload]
    found = {f.name: f for f in check_sublayers.experts(device, 1)}
    out = found["prefill.1.ffn_out"]
    assert math.isclose(out.distance, 0.1, rel_tol=0.1)
    assert out.distance > out.bound
    assert found["prefill.1.router_idx"].distance == 0
