"""Gives every result its bytes in one arena. Two results share bytes only if all launches that touch one
of them are known to come before the launch that makes the other.

States, params and inputs live in blocks of their own; `lay_out` places them one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from dsv4c.ir.graph import Graph, Value
from dsv4c.passes.schedule import Schedule, lifetimes
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


def plan_memory(graph: Graph, schedule: Schedule, *, parallel: bool = False) -> MemoryPlan:
    """Offsets for the results of `graph`.

    Launches run one after the other, or, with `parallel`, are ordered by `schedule.after` alone.
    """
    spans = lifetimes(graph, schedule.nodes, schedule.views)
    values = list(spans)
    sizes = [aligned(v.type.extent) for v in values]
    clashes = _unordered(graph, schedule, values) if parallel else _overlapping(list(spans.values()))
    bound = _most_alive(list(spans.values()), sizes)
    offsets, end = _place(values, sizes, clashes, list(spans.values()), bound)
    placed = dict(zip(values, offsets, strict=True))
    placed.update((view, placed[owner]) for view, owner in schedule.views.items() if owner in placed)
    return MemoryPlan(placed, end, bound)


# --- who may not share ---

Clashes = list[list[int]]  # for every value, the values it may not share bytes with


def _overlapping(spans: list[tuple[int, int]]) -> Clashes:
    """Values alive at the same launch, when launches run in order. `spans` ascend by their first launch."""
    clashes: Clashes = [[] for _ in spans]
    alive: list[int] = []
    for index, (first, _) in enumerate(spans):
        alive = [other for other in alive if spans[other][1] >= first]
        for other in alive:
            clashes[other].append(index)
        clashes[index] += alive
        alive.append(index)
    return clashes


def _unordered(graph: Graph, schedule: Schedule, values: list[Value]) -> Clashes:
    """Values not all of whose readers are known to come before the maker of the other. Bits are launches."""
    later = _descendants(schedule.after)
    made: list[list[int]] = [[] for _ in schedule.nodes]  # values by the launch that makes them
    index_of = {value: i for i, value in enumerate(values)}
    free_from = [0] * len(values)  # launches that come after every toucher of the value
    for launch, node in enumerate(schedule.nodes):
        for value in node.outputs:
            if value in index_of:
                made[launch].append(index_of[value])
                free_from[index_of[value]] = later[launch]
        for value in node.inputs:
            owner = index_of.get(schedule.owner(value))
            if owner is not None:
                free_from[owner] &= later[launch]
    for value in graph.outputs.values():
        if (owner := index_of.get(schedule.owner(value))) is not None:
            free_from[owner] = 0
    everything = (1 << len(schedule.nodes)) - 1
    clashes: Clashes = [[] for _ in values]
    for launch, own in enumerate(made):
        for index in own:
            not_before = everything >> launch << launch  # a later launch cannot come before this one
            for other_launch in _bits(not_before & ~free_from[index]):
                for other in made[other_launch]:
                    if other_launch > launch or other > index:
                        clashes[index].append(other)
                        clashes[other].append(index)
    return clashes


def _descendants(after: Iterable[tuple[int, ...]]) -> list[int]:
    """For every launch, as bits, the launches that come after it."""
    waits = list(after)
    later = [0] * len(waits)
    for launch in range(len(waits) - 1, -1, -1):
        mine = later[launch] | 1 << launch
        for wait in waits[launch]:
            later[wait] |= mine
    return later


def _bits(number: int) -> Iterator[int]:
    """Positions of the set bits, ascending."""
    text = bin(number)[:1:-1]
    position = text.find("1")
    while position >= 0:
        yield position
        position = text.find("1", position + 1)


# --- where they go ---


def _most_alive(spans: list[tuple[int, int]], sizes: list[int]) -> int:
    change: dict[int, int] = {}
    for (first, last), size in zip(spans, sizes, strict=True):
        change[first] = change.get(first, 0) + size
        change[last + 1] = change.get(last + 1, 0) - size
    peak = alive = 0
    for launch in sorted(change):
        alive += change[launch]
        peak = max(peak, alive)
    return peak


def _place(
    values: list[Value], sizes: list[int], clashes: Clashes, spans: list[tuple[int, int]], bound: int
) -> tuple[list[int], int]:
    """The best of three greedy orders: large first, large for long first, as they come."""
    indices = range(len(values))
    span = [last - first + 1 for first, last in spans]
    orders = (
        sorted(indices, key=lambda i: (-sizes[i], -span[i], i)),
        sorted(indices, key=lambda i: (-sizes[i] * span[i], i)),
        list(indices),
    )
    best: tuple[list[int], int] | None = None
    for order in orders:
        offsets, end = _fill(order, sizes, clashes)
        if best is None or end < best[1]:
            best = offsets, end
        if best[1] == bound:
            break
    assert best is not None
    return best


def _fill(order: Iterable[int], sizes: list[int], clashes: Clashes) -> tuple[list[int], int]:
    """Each value goes into the smallest gap between its clashing neighbors that holds it, else above them."""
    offsets = [-1] * len(sizes)
    end = 0
    for index in order:
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
