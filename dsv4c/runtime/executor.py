"""What runs a plan's programs: blocks of bytes, typed views of them, and one call per step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from dsv4c.errors import PlanError
from dsv4c.numerics.codec import Quantized, Value, parts_of, view
from dsv4c.plan.folder import Plan
from dsv4c.plan.records import Launch, Place

Watch = Callable[[Launch], None]
"""Is called with every launch that is through, in order."""


def handed_on(outputs: Iterable[str]) -> dict[str, str]:
    """Outputs of a decode step that are inputs of the next: the chosen tokens, and the lengths where the step
    itself finds who stops.
    """
    return {label: name for label, name in (("next", "tokens"), ("going", "lengths")) if label in outputs}


def said_by(outputs: Mapping[str, Tensor]) -> Tensor:
    """The tokens that a decode step adds to its sequences."""
    return outputs.get("said", outputs["next"])


class Executor(Protocol):
    """A plan bound to memory. `blocks` are flat uint8 tensors by name; outputs are views of them. With
    `poison` what nobody wrote is NaN. Of several ranks these are the first one's: all have the same in their
    states, and give the same.
    """

    plan: Plan
    poison: bool
    blocks: dict[str, Tensor]

    def clear(self) -> None:
        """Fresh state: zeros, or NaN where it was made to poison. Positions are the caller's."""
        ...

    def share(self, names: Iterable[str]) -> None:
        """Let all ranks have in these states what was written to the first one's."""
        ...

    def run(
        self, bucket: str, inputs: Mapping[str, Tensor], watch: Watch | None = None
    ) -> Mapping[str, Tensor]:
        """One call of a bucket on these inputs; the next call overwrites the outputs. A launch starts when
        `watch` of the one before it has returned, and reads what that has put into `value`.
        """
        ...

    def value(self, bucket: str, name: str) -> Value:
        """A view of the bytes of a graph's value; of no weight, which a target may pack. The bytes are the
        value's from the launch that makes it to the last that reads it.
        """
        ...

    def repeat(
        self, bucket: str, inputs: Mapping[str, Tensor], count: int, keep: Tensor | None
    ) -> Mapping[str, Tensor]:
        """`count` calls of a decode bucket, each but the first on what the last one left (`handed_on`).
        `keep` i32 [count, rows] gets what they say: the chosen tokens; of steps that sample -1 where a
        sequence has stopped.
        """
        ...

    def wait(self) -> None:
        """Wait until all calls are through."""
        ...

    def naming(self) -> AbstractContextManager[None]:
        """Says which plan's step failed, where the device tells of it late."""
        ...


def tensor_at(plan: Plan, blocks: Mapping[str, Tensor], name: str, place: Place) -> Tensor:
    """A plain value's bytes as a tensor. Raises PlanError for a quantized one."""
    value = view(blocks[place.space], place.type, place.offset)
    if isinstance(value, Quantized):
        raise PlanError(
            f"plan {plan.name}: {name} is {place.type}, expected a plain tensor; compile it again"
        )
    return value


def states_of(plan: Plan, blocks: Mapping[str, Tensor]) -> dict[str, Value]:
    """The plan's states by name."""
    return {s.name: view(blocks["state"], s.type, s.offset) for s in plan.state}


def share(states: Sequence[Mapping[str, Value]], names: Iterable[str]) -> None:
    """Copy these states of the first rank to all others."""
    first, *others = states
    for name in names if others else ():
        for other in others:
            for target, part in zip(
                parts_of(other[name]).values(), parts_of(first[name]).values(), strict=True
            ):
                target.copy_(part)
