"""Runs a plan on the CPU: its launches in order, each op by its meaning, every value at its planned bytes.

Results are computed apart and copied to their offset of the arena, so a value that was given another one's
bytes too early shows here, without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dsv4c.errors import PlanError
from dsv4c.numerics.codec import Quantized, Value, nan_fill, view
from dsv4c.plan.records import Bucket, Launch, Plan, Slot

POISON = 0x7FFF  # as bf16, f16, f32 and every second fp8 and ue8m0 a NaN; as an integer far from any index


@dataclass(frozen=True)
class _Step:
    """A launch with its operands and results bound to bytes."""

    launch: Launch
    run: Callable[..., Any]
    operands: tuple[Value, ...]
    results: tuple[Value, ...]


class CpuExecutor:
    """One arena, one block of state for all sequences, one of weights, one of inputs: flat uint8 tensors."""

    def __init__(self, plan: Plan, weights: Tensor, *, poison: bool = False) -> None:
        self.plan, self.weights, self.poison = plan, weights, poison
        buckets = (*plan.buckets.values(), *plan.loads.values())
        self.arena = _block(max(bucket.arena_bytes for bucket in buckets))
        self.inputs = _block(max(bucket.input_bytes for bucket in buckets))
        self.state = _block(plan.state_bytes)
        self.states = {slot.name: view(self.state, slot.type, slot.offset) for slot in plan.state}
        self._offsets = {slot.offset: slot for slot in plan.state}
        self._programs: dict[tuple[str, int], _Program] = {}
        self.clear()
        for bucket in plan.loads.values():
            for step in _Program(self, bucket, 0).steps:
                _execute(step)

    def clear(self) -> None:
        """Fresh state: zeros, or NaN with `poison`. Positions are the caller's."""
        if self.poison:
            for value in self.states.values():
                nan_fill(value)
        else:
            self.state.zero_()

    def run(
        self,
        mode: str,
        inputs: Mapping[str, Tensor],
        sequence: int = 0,
        watch: Callable[[str, Value], None] | None = None,
    ) -> dict[str, Tensor]:
        """One call of a bucket; a one-sequence bucket works on that sequence's state. The outputs lie in the
        arena: the next call overwrites them. `watch(name, value)` sees every result as it was stored.
        """
        program = self._program(mode, sequence)
        if self.poison:
            self.arena.view(torch.int16).fill_(POISON)
        for name, value in program.inputs.items():
            value.copy_(inputs[name])
        for step in program.steps:
            _execute(step)
            if watch is not None:
                for name, result in zip(step.launch.outputs, step.results, strict=True):
                    watch(name, result)
        return program.outputs

    def _program(self, mode: str, sequence: int) -> _Program:
        bucket = self.plan.bucket(mode)
        key = mode, sequence if bucket.sequences == 1 else 0
        if key not in self._programs:
            self._programs[key] = _Program(self, bucket, key[1])
        return self._programs[key]

    def value(self, slot: Slot, sequence: int, sequences: int) -> Value:
        """The bytes of a slot as a typed value. A state is cut to one sequence for one-sequence buckets."""
        if slot.space == "state":
            whole = self.states[self._offsets[slot.offset].name]
            if sequences == whole.shape[0]:
                return whole
            return whole.map(_rows(sequence)) if isinstance(whole, Quantized) else _rows(sequence)(whole)
        block = {"arena": self.arena, "weights": self.weights, "input": self.inputs}[slot.space]
        return view(block, slot.type, slot.offset)


class _Program:
    """A bucket bound to an executor's bytes, for one sequence if it takes one."""

    def __init__(self, executor: CpuExecutor, bucket: Bucket, sequence: int) -> None:
        made: dict[tuple[str, int, str], Value] = {}  # a state and what is written to it are one object

        def value(name: str) -> Value:
            slot = bucket.values[name]
            key = slot.space, slot.offset, str(slot.type)
            if key not in made:
                made[key] = executor.value(slot, sequence, bucket.sequences)
            return made[key]

        try:
            self.inputs = {name: _plain(value(name)) for name in bucket.inputs}
            self.outputs = {label: _plain(value(name)) for label, name in bucket.outputs.items()}
            self.steps = [
                _Step(
                    launch,
                    meaning_of(executor.plan, launch),
                    tuple(map(value, launch.inputs)),
                    tuple(map(value, launch.outputs)),
                )
                for launch in bucket.launches
                if isinstance(launch, Launch)
            ]
        except (KeyError, ValueError) as error:
            raise PlanError(
                f"plan {executor.plan.name}: {bucket.graph}: a value has no place: {error}; compile it again"
            ) from None


def meaning_of(plan: Plan, launch: Launch) -> Callable[..., Any]:
    """What a launch computes, as a function of its operands."""
    from dsv4c.ir.text import make_op
    from dsv4c.reference import run

    if launch.body:
        return _body(plan.files[launch.body])
    op = make_op(launch.op, launch.attributes)
    return lambda *operands: run(op, *operands)


@cache
def _body(text: bytes) -> Callable[..., Any]:
    """A fused op, interpreted: its body's inputs are the operands, its outputs the results, in order."""
    from dsv4c.ir.text import parse_graph
    from dsv4c.reference import interpret

    graph = parse_graph(text.decode())
    names = [v.name for v in graph.inputs]
    return lambda *operands: tuple(interpret(graph, dict(zip(names, operands, strict=True)), {}, {}).values())


def _execute(step: _Step) -> None:
    """Compute, then copy to the planned bytes; an op that writes in place returns its operand and is done."""
    result = step.run(*step.operands)
    results = result if type(result) is tuple else (result,)
    for target, value in zip(step.results, results, strict=True):
        if value is not target:
            _store(step.launch, target, value)


def _store(launch: Launch, target: Value, value: Value) -> None:
    wanted = target.parts if isinstance(target, Quantized) else (target,)
    given = value.parts if isinstance(value, Quantized) else (value,)
    for to, part in zip(wanted, given, strict=True):
        if to.shape != part.shape or to.dtype != part.dtype:  # copy_ would broadcast and round
            raise PlanError(
                f"{launch.name}: {launch.op} gave {part.dtype}{list(part.shape)}, "
                f"the plan has room for {to.dtype}{list(to.shape)}; compile it again"
            )
        to.copy_(part)


def _block(size: int) -> Tensor:
    return torch.zeros(-(-size // 16) * 16, dtype=torch.uint8)


def _rows(sequence: int) -> Callable[[Tensor], Tensor]:
    return lambda part: part[sequence : sequence + 1]


def _plain(value: Value) -> Tensor:
    if isinstance(value, Quantized):
        raise ValueError(f"a quantized value {value.format} is an input or output of the plan")
    return value
