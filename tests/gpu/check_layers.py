"""Every launch of a plan of any width against the reference, in place: python -m tests.gpu.check_layers P.

Weights are random; for every launch of every step the reference computes the graph's nodes from what the
device had before it, so errors do not pile up and a wrong launch shows itself. `--at 0:400` runs 400 steps
from an empty context; `--at 130000:50` fills the caches with random contents first. Needs torch and
cuda-bindings, no compiler.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

import dsv4c.passes.fusions  # noqa: F401, registers the fused ops
from benchmarks.layers import fill_state, random_e4m3
from dsv4c.ir.graph import Graph, Node
from dsv4c.ir.graph import Value as Variable
from dsv4c.ir.text import parse_graph
from dsv4c.reference import run
from dsv4c.runtime.codec import Quantized, Value, dequantize, view
from dsv4c.runtime.cuda import CudaExecutor, Device, check_device
from dsv4c.runtime.plan import Plan, load
from dsv4c.runtime.residence import Resident
from dsv4c.types import DType, Type

RELATIVE = 0.02  # of a result's norm: a few flips of FP8 codes, by sums in another order


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
    """The largest error of a result of one kind, and where it was."""

    error: float = 0.0
    where: str = ""
    count: int = 0
    differing: int = 0  # selections with another set of numbers, or values finite on one side only
    errors: list[float] = field(default_factory=list)


class Checker:
    """A plan on the device beside the reference on the same device."""

    def __init__(self, plan: Plan) -> None:
        check_device(plan, Device.current())
        self.graph: Graph = parse_graph(plan.graph_text())
        block = torch.zeros(-(-plan.weights_bytes // 256) * 256, dtype=torch.uint8)
        self.params: dict[str, Value] = {}
        for record in plan.weights:
            resident = Resident.from_json(record)
            name, type_ = resident.record.name, resident.record.type
            self.params[name] = random_param(name, type_, int(plan.config["n_routed_experts"]))
            resident.store(block, self.params[name])
        self.executor = CudaExecutor(plan, block)
        self.nodes = {node.name: node for node in self.graph.nodes}
        launches = self.executor.launches
        self.single = [self.executor.graph_of([i]) for i in range(len(launches))]
        grouped = groupby(range(len(launches)), lambda i: launches[i].nodes)
        self.groups = [(names, list(indices)) for names, indices in grouped]
        self.worst: dict[str, Worst] = defaultdict(Worst)

    def start(self, position: int) -> None:
        """The state before a step at `position`: empty, or random."""
        self.executor.clear()
        if position:
            fill_state(self.executor)
        at = self.executor.states["position"]
        assert isinstance(at, Tensor)
        at.fill_(position)

    def step(self, step: int, tokens: Sequence[int]) -> None:
        """One step, each launch compared."""
        self.executor.inputs["tokens"].copy_(torch.tensor(tokens, dtype=torch.int32))
        self.executor.inputs["lengths"].fill_(1)
        stream = torch.cuda.current_stream().cuda_stream
        for names, indices in self.groups:
            nodes = [self.nodes[name] for name in names]
            before = {v: clone(self.value(v)) for node in nodes for v in node.outputs if self._kept(node, v)}
            expected = self._expected(nodes)
            for i in indices:
                self.single[i].launch(stream)
            for node in nodes:
                for variable in node.outputs:
                    got, want = self.value(variable), expected[variable]
                    if variable.name.endswith("router.weights"):
                        (ids,) = (v for v in node.outputs if v.name.endswith("router.experts"))
                        got, want = _by_expert(got, self.value(ids)), _by_expert(want, expected[ids])
                    if node.op.name == "indexer":
                        got, want = self._needed_scores(got, want)
                    self._compare(step, node, variable, got, want, before.get(variable))

    def value(self, variable: Variable) -> Value:
        """What the device has of a value."""
        slot = self.executor.bucket.values[variable.name]
        if slot.space == "weights":
            return self.params[variable.name]
        offset = slot.offset
        space = slot.space
        if variable.name == self.executor.bucket.outputs["next"] and self.executor.feeds_back:
            space, offset = "input", self.executor.bucket.values["tokens"].offset
        return view(self.executor.blocks[space], slot.type, offset)

    def _kept(self, node: Node, variable: Variable) -> bool:
        return self.executor.bucket.values[variable.name].space == "state"

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

    def _needed_scores(self, got: Value, want: Value) -> tuple[Tensor, Tensor]:
        """Scores of visible entries, where there are more than are chosen: others are not written."""
        assert isinstance(got, Tensor)
        assert isinstance(want, Tensor)
        visible = want.isfinite()
        visible &= visible.sum(-1, keepdim=True) > int(self.executor.plan.config["index_topk"])
        return got.masked_fill(~visible, 0), want.masked_fill(~visible, 0)

    def _compare(
        self, step: int, node: Node, variable: Variable, got: Value, want: Value, before: Value | None
    ) -> None:
        seen = self.worst[f"{node.op.name}: {_leaf(variable.name)}"]
        seen.count += 1
        if isinstance(got, Tensor) and not got.is_floating_point() and got.ndim > 1:
            assert isinstance(want, Tensor)
            seen.differing += int((got.sort(-1).values != want.sort(-1).values).any(-1).sum())
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
    parser.add_argument("--at", action="append", default=[], help="first position:steps; may be repeated")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many seconds")
    parser.add_argument(
        "--every", type=int, default=1, help="compare every such step and those that end a window"
    )
    options = parser.parse_args()
    torch.set_default_device("cuda")
    torch.manual_seed(1)
    started = time.perf_counter()
    with torch.inference_mode():
        checker = Checker(load(options.plan))
        torch.cuda.synchronize()
        print(f"{options.plan}: random weights packed in {time.perf_counter() - started:.1f} s", flush=True)
        vocabulary, batch = int(checker.executor.plan.config["vocab_size"]), checker.executor.bucket.tokens
        for where in options.at or ["0:400"]:
            first, steps = map(int, where.split(":"))
            checker.start(first)
            done = compared = 0
            begun = time.perf_counter()
            for step in range(first, first + steps):
                if time.perf_counter() - started > options.seconds:
                    break
                tokens = torch.randint(0, vocabulary, (batch,)).tolist()
                window = step % 4 == 3 or step % 128 in (126, 127, 0, 1)  # entries completed, ring wraps
                if step % options.every == 0 or window:
                    checker.step(step, tokens)
                    compared += 1
                else:
                    checker.executor.inputs["tokens"].copy_(torch.tensor(tokens, dtype=torch.int32))
                    checker.executor.inputs["lengths"].fill_(1)
                    checker.executor.step()
                done += 1
            spent = time.perf_counter() - begun
            print(
                f"from {first}: {done} steps, {compared} compared launch by launch, {spent:.1f} s", flush=True
            )
    failed = 0
    print(f"{'op: result':62} {'results':>8} {'median':>9} {'worst':>9} {'differ':>7}")
    for name, seen in checker.worst.items():
        median = float(torch.tensor(seen.errors).median()) if seen.errors else 0.0
        wrong = seen.error > RELATIVE
        failed += wrong
        mark = f"  <-- {seen.where}" if wrong or seen.differing else ""
        print(f"{name[:62]:62} {seen.count:8} {median:9.2g} {seen.error:9.2g} {seen.differing:7}{mark}")
    print(f"{failed} kinds of results beyond {RELATIVE}" if failed else f"all results within {RELATIVE}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
