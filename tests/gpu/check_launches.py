"""Every launch of a plan against the reference, on the operands that the device itself made: python -m
tests.gpu.check_launches PLAN WEIGHTS [--positions 0,5,130].

Errors cannot grow from launch to launch, and no choice of experts or entries can differ, so this works on any
weights. Prints the worst relative error of every op's results; selections must be equal unless scores tie.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

import dsv4c.passes.fusions
import dsv4c.reference  # noqa: F401  (these two register fused ops and meanings)
from dsv4c.ir.graph import Node
from dsv4c.ir.ops.shape import Reshape
from dsv4c.ir.text import parse_graph
from dsv4c.reference.interpret import clone
from dsv4c.reference.registry import run
from dsv4c.runtime.checkpoint import Checkpoint, ParamRecord
from dsv4c.runtime.codec import Quantized, Value, dequantize, view
from dsv4c.runtime.cuda import CudaExecutor, CudaSession
from dsv4c.runtime.plan import KernelLaunch, Plan, load

LIMIT = 2e-2  # relative error of one launch: a missing FP8 step costs 2.5e-2 and more


def plain(value: Value) -> Tensor:
    """As f64 on the CPU; what was never written is 0."""
    tensor = dequantize(value) if isinstance(value, Quantized) else value
    return tensor.double().cpu().nan_to_num(0, 0, 0)


def error(got: Value, want: Value) -> float:
    """|got - want| / |want|, for integers the share that differs."""
    if isinstance(want, Tensor) and not want.is_floating_point():
        return float((got.cpu() != want).double().mean())  # type: ignore[union-attr]
    wanted = plain(want)
    return float((plain(got) - wanted).norm() / wanted.norm().clamp_min(1e-30))


def by_expert(choice: Sequence[Value]) -> list[Tensor]:
    """Experts and their weights, by expert number."""
    experts, weights = choice
    assert isinstance(experts, Tensor)
    assert isinstance(weights, Tensor)
    order = experts.argsort(dim=-1)
    return [experts.gather(-1, order), weights.gather(-1, order)]


class Follower:
    """Values of one step by name, taken from the device behind each launch, and the errors by op."""

    def __init__(self, plan: Plan, executor: CudaExecutor, params: dict[str, Value]) -> None:
        self.executor, self.params = executor, params
        self.bucket = plan.bucket("decode")
        self.graph = parse_graph(plan.graph_text())
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.views = {n.outputs[0].name: n for n in self.graph.nodes if isinstance(n.op, Reshape)}
        last = {launch.nodes: i for i, launch in enumerate(executor.launches)}
        self.due = {i: nodes for nodes, i in last.items()}
        self.worst: dict[str, tuple[float, str]] = {}
        self.values: dict[str, Value] = {}

    def fetch(self, name: str) -> Value:
        """The device's bytes, copied to the CPU."""
        slot = self.bucket.values[name]
        space, offset = slot.space, slot.offset
        if self.executor.feeds_back and name == self.bucket.outputs["next"]:
            space, offset = "input", self.bucket.values["tokens"].offset
        return view(self.executor.blocks[space].cpu(), slot.type, offset)

    def begin(self) -> None:
        self.values = {v.name: self.fetch(v.name) for v in (*self.graph.states, *self.graph.inputs)}

    def operand(self, name: str) -> Value:
        if name in self.views:
            (source,) = self.views[name].inputs
            value = self.operand(source.name)
            assert isinstance(value, Tensor)
            return value.reshape(self.bucket.values[name].type.shape)
        return clone(self.params[name] if name in self.params else self.values[name])

    def after(self, index: int, launch: KernelLaunch) -> None:
        """Compare what the launch's nodes made, once their last launch is through."""
        for name in self.due.get(index, ()):
            self.compare(self.nodes[name])

    def compare(self, node: Node) -> None:
        made = run(node.op, *(self.operand(v.name) for v in node.inputs))
        wanted = made if type(made) is tuple else (made,)
        results = [self.fetch(v.name) for v in node.outputs]
        self.values.update(zip((v.name for v in node.outputs), results, strict=True))
        if node.op.name == "indexer":  # only scores that top-k looks at are written: it stands for both
            self.values[node.name] = wanted[0]
            return
        if node.op.name == "router":  # any order will do
            results, wanted = by_expert(results), by_expert(wanted)
        for variable, got, want in zip(node.outputs, results, wanted, strict=True):
            size = error(got, want)
            key = f"{node.op.name}.{variable.index}"
            if size >= self.worst.get(key, (-1.0, ""))[0]:
                self.worst[key] = size, variable.name


def follow(session: CudaSession, params: dict[str, Value], ids: Sequence[int], at: set[int]) -> Follower:
    """Run `ids` through every sequence, sequence s starting s tokens late; compare at positions `at`."""
    follower = Follower(session.plan, session.executor, params)
    executor = session.executor
    session.reset()
    for step, token in enumerate(ids):
        lengths = [int(step >= s) for s in range(session.batch)]
        executor.inputs["tokens"].fill_(token)
        executor.inputs["lengths"].copy_(torch.tensor(lengths, dtype=torch.int32))
        if step in at:
            follower.begin()
            executor.step_by_step(follower.after)
        else:
            executor.step()
    return follower


def main() -> int:
    """Compare and print. Status 1 if any op is further off than LIMIT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--positions", default="0,1,3,5,127,128,140")
    options = parser.parse_args()
    plan = load(options.plan)
    at = {int(position) for position in options.positions.split(",")}
    session: Any = plan.bind(options.weights)
    params: dict[str, Value] = dict(load_safetensors(plan.files[plan.constants["file"]]))
    Checkpoint.open(options.weights).load(
        [ParamRecord.from_json(record) for record in plan.weights],
        lambda name, value: params.__setitem__(name, clone(value)),
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(session.vocab_size, (max(at) + 1,), generator=generator).tolist()
    follower = follow(session, params, ids, at)
    for key, (size, name) in sorted(follower.worst.items()):
        print(f"{key:28} {size:10.3g} {'' if size <= LIMIT else 'FAILS'} {name}")
    return int(any(size > LIMIT for size, _ in follower.worst.values()))


if __name__ == "__main__":
    sys.exit(main())
