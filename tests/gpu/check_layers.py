"""Launches of a plan, one by one, against the reference: python -m tests.gpu.check_layers PLAN.

Errors cannot pile up from launch to launch: a wrong launch shows itself. Each result has the limit of its
kind (`limit`), selections must be equal. `--weights W` takes a checkpoint or a recorded case, not random
weights; `--at 0:400` runs 400 steps from an empty context, `--at 130000:50` fills the caches at random first.
In a batch sequence s starts s steps late. Needs torch and cuda-bindings, no compiler.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import dsv4c.passes.fusions  # noqa: F401, registers the fused ops
from dsv4c.certify.rounding import integers, limit
from dsv4c.ir.graph import Graph, Node
from dsv4c.ir.graph import Value as Variable
from dsv4c.ir.text import parse_graph
from dsv4c.numerics.codec import Quantized, Value, dequantize, view
from dsv4c.plan.folder import Plan, load
from dsv4c.reference import run
from dsv4c.runtime.checkpoint import Checkpoint
from dsv4c.runtime.cuda import CudaExecutor, Device, check_device
from dsv4c.runtime.parameter import ParamRecord
from dsv4c.runtime.random_fill import fill_state, random_e4m3
from dsv4c.runtime.residence import Resident
from dsv4c.types import DType, Type
from tests.goldens import CASES, golden_case


def random_param(name: str, type_: Type, experts: int) -> Value:
    """A parameter such that rows of 4,096 give results around 1."""
    value = view(torch.empty(type_.extent, dtype=torch.uint8), type_)
    if isinstance(value, Quantized):
        random_e4m3(value.data.view(torch.uint8).view(-1))
        if value.scale.dtype is torch.uint8:
            low = 118 if value.format.value is DType.E2M1 else 112
            value.scale.random_(low, low + 4)
        else:
            value.scale.copy_(torch.rand(value.scale.shape) + 0.5)
        if value.global_scale is not None:
            value.global_scale.fill_(2.0**-7)
    elif value.dtype is torch.int32:
        value.random_(0, experts)
    elif name.endswith(("scale", "norm")):
        value.normal_(1.0, 0.1)
    else:
        value.normal_(0.0, 1.0 if value.ndim == 1 or name.endswith("ape") else 0.02)
    return value


def clone(value: Value) -> Value:
    return value.map(torch.clone) if isinstance(value, Quantized) else value.clone()


def wide(value: Value) -> Tensor:
    return dequantize(value, torch.float64) if isinstance(value, Quantized) else value.double()


@dataclass
class Worst:
    """The largest error of a result of one kind, what is allowed, and where it was."""

    limit: float
    error: float = 0.0
    where: str = ""
    count: int = 0
    differing: int = 0  # selections with another set of numbers, or values finite on one side only
    errors: list[float] = field(default_factory=list)


class Checker:
    """A plan on the device beside the reference on the same device."""

    def __init__(self, plan: Plan, weights: str | Path | None) -> None:
        check_device(plan, Device.current())
        self.graph: Graph = parse_graph(plan.graph_text())
        block = torch.zeros(-(-plan.blocks["weights"] // 256) * 256, dtype=torch.uint8)
        residents = {r.record.name: r for r in map(Resident.from_json, plan.weights)}
        if weights is None:
            experts = int(plan.config["n_routed_experts"])
            self.params = {n: random_param(n, r.record.type, experts) for n, r in residents.items()}
        else:
            self.params = stored_params([r.record for r in residents.values()], weights, block.device)
        for name, resident in residents.items():
            resident.store(block, self.params[name])
        self.executor = CudaExecutor(plan, block)
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.bound = self.executor.programs[plan.program().shape.name]
        self.single = [self.bound.graph_of([i]) for i in range(len(self.bound.launches))]
        self.groups = groups([launch.nodes for launch in self.bound.launches])
        self.worst: dict[str, Worst] = {}

    def start(self, position: int) -> None:
        """The state before a step at `position`: empty, or random."""
        self.executor.clear()
        if position:
            for slot in self.executor.plan.state:
                fill_state(self.executor.blocks["state"], slot.type, slot.offset)
        at = self.executor.states["position"]
        assert isinstance(at, Tensor)
        at.fill_(position)

    def prepare(self, tokens: Sequence[int], steps: int) -> None:
        """Inputs of the step after `steps` steps, of a sequence in each of the first slots."""
        every = range(len(tokens))
        rows = {"tokens": tokens, "lengths": [int(steps >= s) for s in every], "slots": list(every)}
        self.bound.take({name: torch.tensor(values, dtype=torch.int32) for name, values in rows.items()})

    def step(self, step: int) -> None:
        """One step, each launch compared."""
        stream = torch.cuda.current_stream().cuda_stream
        for names, indices in self.groups:
            nodes = [self.nodes[name] for name in names]
            before = {v: clone(self.value(v)) for node in nodes for v in node.outputs if self._kept(node, v)}
            expected = self._expected(nodes)
            for i in indices:
                self.single[i].launch(stream)
            for node in nodes[1:]:
                if node.op.name in ("swiglu", "experts_down"):  # of the device's choice, of its hidden rows
                    expected |= self._expected([node])
                if node.op.name == "index_topk":  # exact, of the scores that the device has
                    (scores,) = node.inputs
                    expected[node.outputs[0]] = run(node.op, self._seen_scores(scores, expected[scores]))
            for node in nodes:
                for variable in node.outputs:
                    got, want = self.value(variable), expected[variable]
                    if node.op.name == "router" and not integers(variable.type):
                        (ids,) = (v for v in node.outputs if integers(v.type))
                        got, want = _by_expert(got, self.value(ids)), _by_expert(want, expected[ids])
                    if node.op.name == "indexer":
                        got, want = self._needed_scores(got, want)
                    self._compare(step, node, variable, got, want, before.get(variable))

    def value(self, variable: Variable) -> Value:
        """What the device has of a value."""
        if self.bound.program.values[variable.name].space == "weights":
            return self.params[variable.name]
        return self.bound.value(variable.name)

    def _kept(self, node: Node, variable: Variable) -> bool:
        return self.bound.program.values[variable.name].space == "state"

    def _expected(self, nodes: Sequence[Node]) -> dict[Variable, Value]:
        made: dict[Variable, Value] = {}
        for node in nodes:
            written = set(node.op.alias.values())
            operands = [made[v] if v in made else self.value(v) for v in node.inputs]
            operands = [clone(o) if i in written else o for i, o in enumerate(operands)]
            result = run(node.op, *operands)
            results = result if type(result) is tuple else (result,)
            made |= {v: clone(r) for v, r in zip(node.outputs, results, strict=True)}
        return made

    def _written(self, want: Tensor) -> Tensor:
        """Which scores the device writes: those of visible entries, where there are more than are chosen."""
        visible = want.isfinite()
        return visible & (visible.sum(-1, keepdim=True) > int(self.executor.plan.config["index_topk"]))

    def _seen_scores(self, variable: Variable, want: Value) -> Tensor:
        """The device's scores where it writes them, elsewhere the reference's."""
        got = self.value(variable)
        assert isinstance(got, Tensor)
        assert isinstance(want, Tensor)
        return torch.where(self._written(want), got, want)

    def _needed_scores(self, got: Value, want: Value) -> tuple[Tensor, Tensor]:
        """Scores that the device writes; zeros in the place of others."""
        assert isinstance(got, Tensor)
        assert isinstance(want, Tensor)
        others = ~self._written(want)
        return got.masked_fill(others, 0), want.masked_fill(others, 0)

    def _compare(
        self, step: int, node: Node, variable: Variable, got: Value, want: Value, before: Value | None
    ) -> None:
        key = f"{node.op.name}: {_leaf(variable.name)}"
        seen = self.worst.setdefault(key, Worst(limit(node, variable)))
        seen.count += 1
        if isinstance(got, Tensor) and not got.is_floating_point() and got.ndim > 1:
            assert isinstance(want, Tensor)
            changed = int((got.sort(-1).values != want.sort(-1).values).any(-1).sum())
            seen.differing += changed
            seen.where = f"step {step}, {variable.name}" if changed else seen.where
            return
        a, b = wide(got), wide(want)
        finite = a.isfinite() & b.isfinite()
        seen.differing += int((a.isfinite() != b.isfinite()).sum())
        if before is not None:  # of a cache, what the step wrote
            old = wide(before)
            finite &= (a != old) | (b != old)
        a, b = a.masked_fill(~finite, 0), b.masked_fill(~finite, 0)
        error = float((a - b).norm() / b.norm().clamp(min=1e-30)) if bool((a != b).any()) else 0.0
        seen.errors.append(error)
        if error > seen.error:
            seen.error, seen.where = error, f"step {step}, {variable.name}"


def groups(nodes: Sequence[Sequence[str]]) -> list[tuple[list[str], list[int]]]:
    """Launches that share nodes, with what lies between them: their nodes in order, their indices."""
    last = {name: i for i, names in enumerate(nodes) for name in names}
    found: list[tuple[list[str], list[int]]] = []
    end = -1
    for i, names in enumerate(nodes):
        if i > end:
            found.append(([], []))
        end = max(end, *(last[name] for name in names))
        found[-1][0].extend(name for name in names if name not in found[-1][0])
        found[-1][1].append(i)
    return found


def stored_params(
    records: Sequence[ParamRecord], folder: str | Path, device: torch.device
) -> dict[str, Value]:
    """Every parameter of a checkpoint, on the device."""
    params: dict[str, Value] = {}

    def keep(name: str, value: Value) -> None:
        moved = value.map(lambda part: part.to(device, copy=True)) if isinstance(value, Quantized) else value
        params[name] = moved if isinstance(moved, Quantized) else moved.to(device, copy=True)

    with torch.device("cpu"):  # where files are read
        Checkpoint.open(folder).load(records, keep)
    return params


def _by_expert(weights: Value, experts: Value) -> Tensor:
    """Routing weights in the order of the experts' numbers: a selection is a set."""
    assert isinstance(weights, Tensor)
    assert isinstance(experts, Tensor)
    return weights.gather(-1, experts.long().argsort(-1))


def _leaf(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[2:]) if parts[0] == "layers" else name


def main() -> int:
    """Run the steps asked for, print the worst of every result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--weights", help="a checkpoint's folder, or a recorded case; random without")
    parser.add_argument("--at", action="append", default=[], help="first position:steps; may be repeated")
    parser.add_argument(
        "--every", type=int, default=1, help="compare every such step and those that end a window"
    )
    options = parser.parse_args()
    torch.set_default_device("cuda")
    torch.manual_seed(1)
    started = time.perf_counter()
    weights = golden_case(options.weights) if options.weights in CASES else options.weights
    with torch.inference_mode():
        checker = Checker(load(options.plan), weights)
        torch.cuda.synchronize()
        print(f"{options.plan}: weights packed in {time.perf_counter() - started:.1f} s", flush=True)
        vocabulary = int(checker.executor.plan.config["vocab_size"])
        batch = checker.bound.program.shape.sequences
        for where in options.at or ["0:400"]:
            first, steps = map(int, where.split(":"))
            checker.start(first)
            compared = 0
            begun = time.perf_counter()
            for step in range(first, first + steps):
                checker.prepare(torch.randint(0, vocabulary, (batch,)).tolist(), step - first)
                window = step % 4 == 3 or step % 128 in (126, 127, 0, 1)  # entries completed, ring wraps
                if step % options.every == 0 or window:
                    checker.step(step)
                    compared += 1
                else:
                    checker.bound.call()
            spent = time.perf_counter() - begun
            print(f"from {first}: {steps} steps, {compared} compared, {spent:.1f} s", flush=True)
            if not compared:
                parser.error(f"--at {where} compares no step")
    failed = 0
    print(f"{'op: result':62} {'results':>8} {'median':>9} {'worst':>9} {'limit':>9} {'differ':>7}")
    for name, seen in checker.worst.items():
        median = float(torch.tensor(seen.errors).median()) if seen.errors else 0.0
        wrong = not seen.error <= seen.limit or seen.differing > 0
        failed += wrong
        print(
            f"{name[:62]:62} {seen.count:8} {median:9.2g} {seen.error:9.2g} {seen.limit:9.2g} "
            f"{seen.differing:7}{f'  <-- {seen.where}' if wrong else ''}"
        )
    print(f"{failed} kinds of results beyond their limits" if failed else "all results within their limits")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
