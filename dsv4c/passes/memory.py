"""Gives every result its bytes in one arena. Two results share bytes only if the last launch that touches one
of them comes before the launch that makes the other.

States, params and inputs live in blocks of their own; `lay_out` places them one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsv4c.ir.graph import Graph, Value
from dsv4c.passes.schedule import Schedule
from dsv4c.types import Type

ALIGN = 256  # bytes: what a bulk copy and a cache line ask for, with room


@dataclass(frozen=True)
class MemoryPlan:
    """Byte offsets of all results outside of states (views included) and the size of the arena.

    lower_bound: the most bytes alive at once in launch order; no plan for that order can be smaller.
    """

    offsets: Mapping[Value, int]
    bytes: int
    lower_bound: int


def aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def lay_out(types: Mapping[str, Type]) -> tuple[dict[str, int], int]:
    """Offsets of named values one after the other, and the bytes of all."""
    offsets, end = {}, 0
    for name, type_ in types.items():
        offsets[name] = end
        end += aligned(type_.extent)
    return offsets, end


def plan_memory(graph: Graph, schedule: Schedule) -> MemoryPlan:
    """Offsets for the results of `graph`, whose launches run one after the other; what one launch touches is
    alive at once.
    """
    lives = lifetimes(graph, schedule)
    values, spans = list(lives), list(lives.values())
    sizes = [aligned(v.type.extent) for v in values]
    offsets, end = _fill(sizes, spans)
    placed = dict(zip(values, offsets, strict=True))
    placed.update((view, placed[owner]) for view, owner in schedule.views.items() if owner in placed)
    return MemoryPlan(placed, end, _most_alive(spans, sizes))


def lifetimes(graph: Graph, schedule: Schedule) -> dict[Value, tuple[int, int]]:
    """For every result that owns bytes outside of states: the launch that makes it and the last that reads it
    or a view of it. Outputs of the graph live to the end.
    """
    spans: dict[Value, tuple[int, int]] = {}
    for index, nodes in enumerate(schedule.launches):
        for node in nodes:
            for value in node.inputs:
                owner = schedule.owner(value)
                if owner in spans:
                    spans[owner] = (spans[owner][0], index)
            for value in node.outputs:
                if value not in schedule.views:
                    spans[value] = (index, index)
    for value in graph.outputs.values():
        owner = schedule.owner(value)
        if owner in spans:
            spans[owner] = (spans[owner][0], len(schedule.launches) - 1)
    return spans


def _most_alive(spans: Sequence[tuple[int, int]], sizes: Sequence[int]) -> int:
    change: dict[int, int] = {}
    for (first, last), size in zip(spans, sizes, strict=True):
        change[first] = change.get(first, 0) + size
        change[last + 1] = change.get(last + 1, 0) - size
    peak = alive = 0
    for launch in sorted(change):
        alive += change[launch]
        peak = max(peak, alive)
    return peak


def _fill(sizes: Sequence[int], spans: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Large values first, of equals the long-lived: each goes into the smallest gap between those alive with
    it that holds it, else above them.
    """
    clashes = _overlapping(spans)
    offsets = [-1] * len(sizes)
    end = 0
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], spans[i][0] - spans[i][1], i)):
        size = sizes[index]
        taken = sorted((offsets[c], offsets[c] + sizes[c]) for c in clashes[index] if offsets[c] >= 0)
        position, best, smallest = 0, -1, 0
        for start, stop in taken:
            gap = start - position
            if gap >= size and (best < 0 or gap < smallest):
                best, smallest = position, gap
            position = max(position, stop)
        offsets[index] = best if best >= 0 else position
        end = max(end, offsets[index] + size)
    return offsets, end


def _overlapping(spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """For every value, those alive at one launch with it. `spans` ascend by their first launch."""
    clashes: list[list[int]] = [[] for _ in spans]
    alive: list[int] = []
    for index, (first, _) in enumerate(spans):
        alive = [other for other in alive if spans[other][1] >= first]
        for other in alive:
            clashes[other].append(index)
        clashes[index] += alive
        alive.append(index)
    return clashes
