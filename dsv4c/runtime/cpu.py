"""Runs a plan on the CPU: its launches in order, each op by its meaning, every value at its planned bytes.

Results are computed apart and copied to their offset of the arena, so a value that was given another one's
bytes too early shows here, without a GPU. Ranks run in one process, launch by launch in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4c.errors import PlanError
from dsv4c.numerics.codec import Value, nan_fill, parts_of, view
from dsv4c.plan.folder import Plan
from dsv4c.plan.records import Launch, Program
from dsv4c.runtime.executor import Watch, handed_on, said_by, share, states_of, tensor_at
from dsv4c.threads import threads

POISON = 0x7FFF  # as bf16, f16, f32 and every second fp8 and ue8m0 a NaN; as an integer far from any index

LARGE = 2e10
"""Work of a program, about a second's, from which on its operations take all cores."""


@dataclass(frozen=True)
class _Step:
    """A launch with its operands and results bound to bytes. `joins`: it takes those of all ranks."""

    launch: Launch
    run: Callable[..., Any]
    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    joins: bool


class CpuExecutor:
    """An `Executor` whose blocks lie in host memory; `weights` are the block of weights of every rank.

    `blocks` and `states` are the first rank's.
    """

    def __init__(self, plan: Plan, *weights: Tensor, poison: bool = False) -> None:
        self.plan, self.poison = plan, poison
        own = ("arena", "state", "input")
        self.ranks = [
            {n: _block(plan.blocks[n]) for n in own} | {"weights": w, "constants": constants_of(plan, w)}
            for w in weights
        ]
        if len(weights) != plan.ranks:
            raise PlanError(f"plan {plan.name} has {plan.ranks} ranks, weights of {len(weights)} were given")
        self.blocks = self.ranks[0]
        self.by_rank = [states_of(plan, blocks) for blocks in self.ranks]
        self.states = self.by_rank[0]
        self._programs: dict[str, list[_Bound]] = {}
        self.clear()

    def clear(self) -> None:
        for blocks, states in zip(self.ranks, self.by_rank, strict=True):
            if self.poison:
                for value in states.values():
                    nan_fill(value)
            else:
                blocks["state"].zero_()

    def share(self, names: Iterable[str]) -> None:
        share(self.by_rank, names)

    def run(
        self, bucket: str, inputs: Mapping[str, Tensor], watch: Watch | None = None
    ) -> Mapping[str, Tensor]:
        bounds = self._bound(bucket)
        for bound in bounds:
            bound.take(inputs)
        return self._call(bounds, watch)

    def value(self, bucket: str, name: str) -> Value:
        return self._bound(bucket)[0].value(name)

    def repeat(
        self, bucket: str, inputs: Mapping[str, Tensor], count: int, keep: Tensor | None
    ) -> Mapping[str, Tensor]:
        bounds = self._bound(bucket)
        for bound in bounds:
            bound.take(inputs)
        for i in range(count):
            for bound in bounds if i else ():
                for label, name in handed_on(bound.outputs).items():
                    bound.inputs[name].copy_(bound.outputs[label])
            self._call(bounds, None)
            if keep is not None:
                keep[i].copy_(said_by(bounds[0].outputs))
        return bounds[0].outputs

    def wait(self) -> None:
        """Calls are through when they return."""

    def naming(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _call(self, bounds: Sequence[_Bound], watch: Watch | None) -> Mapping[str, Tensor]:
        for blocks in self.ranks if self.poison else ():
            blocks["arena"].view(torch.int16).fill_(POISON)
        execute(bounds, watch)
        return bounds[0].outputs

    def _bound(self, bucket: str) -> list[_Bound]:
        if bucket not in self._programs:
            program = self.plan.buckets[bucket]
            self._programs[bucket] = [_Bound(self.plan, program, blocks) for blocks in self.ranks]
        return self._programs[bucket]


def constants_of(plan: Plan, weights: Tensor) -> Tensor:
    """The block of constants on the host: what the plan computes once, from `weights` or from nothing."""
    constants = _block(plan.blocks["constants"])
    if plan.load is not None:
        arena = _block(plan.load.arena_bytes)
        blocks = {"weights": weights, "constants": constants, "arena": arena}
        execute([_Bound(plan, plan.load, blocks)], None)
    return constants


class _Bound:
    """A program bound to blocks."""

    def __init__(self, plan: Plan, program: Program, blocks: Mapping[str, Tensor]) -> None:
        # What a plan computes is known where it is bound: reading one loads no ops.
        from dsv4c.runtime.meaning import joins_ranks, meaning_of

        self._places, self._blocks = program.values, blocks
        self.threads = None if work(program) >= LARGE else 1
        self._made: dict[tuple[str, int, str], Value] = {}  # a state and what is written to it are one object

        def plain(name: str) -> Tensor:
            return tensor_at(plan, blocks, name, program.values[name])

        try:
            self.inputs = {name: plain(name) for name in program.inputs}
            self.outputs = {label: plain(name) for label, name in program.outputs.items()}
            self.steps = [
                _Step(
                    launch,
                    meaning_of(plan, launch),
                    tuple(map(self.value, operands_of(launch))),
                    tuple(map(self.value, results_of(launch))),
                    joins_ranks(launch),
                )
                for launch in program.launches
            ]
        except (KeyError, ValueError) as error:
            raise PlanError(
                f"plan {plan.name}: {program.graph}: a value has no place: {error}; compile it again"
            ) from None

    def value(self, name: str) -> Value:
        place = self._places[name]
        key = place.space, place.offset, str(place.type)
        if key not in self._made:
            self._made[key] = view(self._blocks[place.space], place.type, place.offset)
        return self._made[key]

    def take(self, inputs: Mapping[str, Tensor]) -> None:
        for name, value in self.inputs.items():
            value.copy_(inputs[name])


def execute(bounds: Sequence[_Bound], watch: Watch | None) -> None:
    """Run a program on every rank, each launch on all of them before the next."""
    with threads(bounds[0].threads):
        for steps in zip(*(bound.steps for bound in bounds), strict=True):
            if steps[0].joins:
                _exchange(steps)
            else:
                for step in steps:
                    _execute(step)
            if watch is not None:
                watch(steps[0].launch)


def work(program: Program) -> int:
    """Bytes that a call's launches name, for each of its rows: about its multiplications."""
    rows = 1 if program.bucket is None else program.bucket.rows
    return rows * sum(argument.nbytes for launch in program.launches for argument in launch.arguments)


def operands_of(launch: Launch) -> list[str]:
    """Names of a body's operands, in order: each begins with its data."""
    return [a.value for a in launch.arguments if a.component == "data" and a.access == "r"]


def results_of(launch: Launch) -> list[str]:
    """Names of a body's results, in order."""
    return [a.value for a in launch.arguments if a.component == "data" and a.access == "w"]


def _execute(step: _Step) -> None:
    """Compute, then copy to the planned bytes; an op that writes in place returns its operand and is done."""
    result = step.run(*step.operands)
    results = result if type(result) is tuple else (result,)
    for target, value in zip(step.results, results, strict=True):
        if value is not target:
            _store(step.launch, target, value)


def _exchange(steps: Sequence[_Step]) -> None:
    """What all ranks give together, copied to each one's planned bytes."""
    result = steps[0].run(*(operand for step in steps for operand in step.operands))
    results = result if type(result) is tuple else (result,)
    for step in steps:
        for target, value in zip(step.results, results, strict=True):
            _store(step.launch, target, value)


def _store(launch: Launch, target: Value, value: Value) -> None:
    for to, part in zip(parts_of(target).values(), parts_of(value).values(), strict=True):
        if to.shape != part.shape or to.dtype != part.dtype:  # copy_ would broadcast and round
            raise PlanError(
                f"{launch.name}: {launch.op} gave {part.dtype}{list(part.shape)}, "
                f"the plan has room for {to.dtype}{list(to.shape)}; compile it again"
            )
        to.copy_(part)


def _block(size: int) -> Tensor:
    return torch.zeros(-(-size // 16) * 16, dtype=torch.uint8)
