"""Proves that the launches of a plan do what its graphs say, from the plan's data alone.

What needs no graph is proved whenever a plan is loaded (`dsv4c.plan.check`). Here the graphs join: they are
well-formed, they are lowered once more, and launches are followed in order over every byte of arena, states,
inputs and constants: what it holds, who wrote it, who has read it since. A launch may touch it only behind
all of those, and must find what the graph says it reads.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dsv4c.compiler.again import differences
from dsv4c.compiler.job import rules_of
from dsv4c.errors import GraphError
from dsv4c.ir.graph import Graph, Node
from dsv4c.ir.text import parse_graph
from dsv4c.ir.verify import verify
from dsv4c.passes.pipeline import Contributions
from dsv4c.plan import check as data
from dsv4c.plan.check import Violation, programs
from dsv4c.plan.folder import Plan
from dsv4c.plan.records import Argument, KernelCode, Launch, Program
from dsv4c.types import Type

FOLLOWED = ("arena", "state", "input", "constants")  # blocks whose bytes change


def check(plan: Plan, rules: Contributions | None = None) -> list[Violation]:
    """All violations of a plan, with those that need no graph first; empty when it is sound.

    `rules` must hold what the plan was given by `--pass`.
    """
    known = rules_of() if rules is None else rules  # before graphs are read: their text names fused ops
    found = data.check(plan)
    outside = {v.bucket for v in found if v.launch and v.kind in ("outside", "order")}
    kernels, _ = data.read_kernels(plan)
    late = {key for key, (_, declared) in kernels.items() if declared.late}
    for name, program in programs(plan).items():
        found += [replace(v, bucket=name) for v in _check(plan, program, late, follow=name not in outside)]
    return [*found, *differences(plan, known)]


def _check(plan: Plan, program: Program, late: Collection[str], *, follow: bool) -> Iterator[Violation]:
    """Violations of one program against its graph; its bytes are followed only where they lie in blocks."""
    try:
        graph = verify(parse_graph(plan.files[program.graph].decode()))
    except (KeyError, UnicodeDecodeError, GraphError) as error:
        yield Violation("missing", "", f"its graph cannot be read: {error}")
        return
    yield from _coverage(graph, program)
    types = {v.name: v.type for v in graph.values()}
    if types != {name: place.type for name, place in program.values.items()}:
        differ = sorted(n for n in types.keys() | program.values.keys() if _type(program, n) != types.get(n))
        yield Violation("missing", "", f"values differ from its graph's: {', '.join(differ)[:200]}")
        return
    yield from _aliases(graph, program)
    roots = {v.name: root.name for v, root in graph.root_of.items()}
    for launch in program.launches:
        yield from _beside(launch, roots)
    if follow:
        yield from _follow(graph, program, late)


def _type(program: Program, name: str) -> Type | None:
    place = program.values.get(name)
    return None if place is None else place.type


# What each launch says --------------------------------------------------------------------------------------


def _coverage(graph: Graph, program: Program) -> Iterator[Violation]:
    """Every node that does work is in a launch, and every launch has nodes of the graph."""
    names = {node.name for node in graph.nodes}
    launched = {name for launch in program.launches for name in launch.nodes}
    for node in graph.nodes:
        if node.name not in launched and not node.op.view:
            yield Violation("missing", "", f"no launch computes {node.name} ({node.op.name})")
    for launch in program.launches:
        for name in launch.nodes:
            if name not in names:
                yield Violation("missing", launch.name, f"is for node {name}, which the graph has not")


def _beside(launch: Launch, roots: Mapping[str, str]) -> Iterator[Violation]:
    """What a launch writes shares no byte with another of its arguments: its CTAs run in any order. What it
    overwrites, under another name, is the same argument.
    """
    for made in launch.arguments:
        if "w" not in made.access:
            continue
        for a in launch.arguments:
            apart = a.offset + a.nbytes <= made.offset or made.offset + made.nbytes <= a.offset
            names = {roots.get(x.value, x.value) for x in (a, made)}
            same = len(names) == 1 and a.component == made.component
            if a.space == made.space and not same and not apart:
                yield Violation(
                    "overlap",
                    launch.name,
                    f"writes {made.value}.{made.component} where its {a.value}.{a.component} lies",
                )


def _aliases(graph: Graph, program: Program) -> Iterator[Violation]:
    """What overwrites an operand has the operand's place."""
    for node in graph.nodes:
        for result, operand in node.op.alias.items():
            made, old = node.outputs[result].name, node.inputs[operand].name
            places = [(program.values[n].space, program.values[n].offset) for n in (made, old)]
            if places[0] != places[1]:
                yield Violation(
                    "alias",
                    "",
                    f"{made} overwrites {old}, but is at {places[0][1]} of {places[0][0]}, not at "
                    f"{places[1][1]} of {places[1][0]}",
                )


# What launches do to each other -----------------------------------------------------------------------------


@dataclass
class _Segment:
    """Bytes with one history. holds: the value; writer and readers are launches by index."""

    holds: str | None
    writer: int | None = None
    readers: list[int] = field(default_factory=list)


class _Block:
    """A block of bytes as segments, split where arguments begin and end."""

    def __init__(self) -> None:
        self.starts = [0]
        self.segments: dict[int, _Segment] = {0: _Segment(None)}

    def over(self, start: int, stop: int) -> Iterator[_Segment]:
        self._split(start)
        self._split(stop)
        for at in self.starts[bisect_left(self.starts, start) : bisect_left(self.starts, stop)]:
            yield self.segments[at]

    def _split(self, at: int) -> None:
        if at not in self.segments:
            old = self.segments[self.starts[bisect_right(self.starts, at) - 1]]
            self.segments[at] = _Segment(old.holds, old.writer, list(old.readers))
            insort(self.starts, at)


def _follow(graph: Graph, program: Program, late: Collection[str]) -> Iterator[Violation]:
    """`late` are the kernels whose successors begin only when their own waits have returned."""
    launches, same = program.launches, _same_bytes(graph)
    nodes = {node.name: node for node in graph.nodes}
    blocks = {space: _Block() for space in FOLLOWED}
    for value in (*graph.states, *graph.inputs, *graph.params):
        slot = program.values[value.name]
        if slot.space not in blocks:
            continue
        for segment in blocks[slot.space].over(slot.offset, slot.offset + slot.type.extent):
            segment.holds = value.name
    before: list[int] = []  # per launch, as bits: those that have completed when it touches memory
    begun: list[int] = []  # and when it begins
    for index, launch in enumerate(launches):
        run = launch.code
        holds = not isinstance(run, KernelCode) or not run.programmatic or run.waits
        mask = begin = 0
        for i in launch.after:
            if holds:
                mask |= before[i] | 1 << i
            begin |= before[i] if _is_late(launches[i], late) else begun[i]
        before.append(mask)
        begun.append(begin if isinstance(run, KernelCode) and run.programmatic else mask)
        made = _results(launch, nodes)
        touched = [a for a in launch.arguments if a.space in blocks]
        for a in touched:
            known = begun[index] if a.access == "early" else mask
            yield from _touch(blocks[a.space], a, index, launch, launches, known, same)
        for a in touched:  # a launch's own results are not what it reads
            for segment in blocks[a.space].over(a.offset, a.offset + a.nbytes):
                if "w" in a.access:
                    segment.holds = same.get(made.get(a.value, a.value), made.get(a.value, a.value))
                    segment.writer, segment.readers = index, []
                else:
                    segment.readers.append(index)


def _is_late(launch: Launch, late: Collection[str]) -> bool:
    return isinstance(launch.code, KernelCode) and launch.code.kernel in late


def _touch(
    block: _Block,
    a: Argument,
    index: int,
    launch: Launch,
    launches: Sequence[Launch],
    before: int,
    same: Mapping[str, str],
) -> Iterator[Violation]:
    """What is wrong with one argument, each thing once."""
    said: set[str] = set()
    name = f"{a.value}.{a.component}"
    for segment in block.over(a.offset, a.offset + a.nbytes):
        others = [segment.writer] if segment.writer is not None else []
        others += segment.readers if "w" in a.access else []
        for other in others:
            kind = "wait" if a.access == "early" else "order"
            if other != index and not before >> other & 1 and kind not in said:
                said.add(kind)
                writer = launches[other].name
                yield Violation(
                    kind,
                    launch.name,
                    f"reads {name} before it waits for {writer}, which writes it and may not have ended"
                    if kind == "wait"
                    else f"touches the bytes of {name} with no order to launch {writer}",
                )
        if a.access == "w" or said & {"unwritten", "stale"}:
            continue
        wanted = same.get(a.value, a.value)
        if segment.holds is None:
            said.add("unwritten")
            yield Violation("unwritten", launch.name, f"reads {name}, which no launch before it writes")
        elif segment.holds != wanted:
            said.add("stale")
            yield Violation("stale", launch.name, f"reads {name} where {segment.holds} has overwritten it")


def _same_bytes(graph: Graph) -> dict[str, str]:
    """A reshaped result is its operand's bytes."""
    same: dict[str, str] = {}
    for node in graph.nodes:
        if node.op.view and node.inputs[0] not in graph.root_of:
            source = node.inputs[0].name
            same[node.outputs[0].name] = same.get(source, source)
    return same


def _results(launch: Launch, nodes: Mapping[str, Node]) -> dict[str, str]:
    """What an overwritten operand's bytes hold after the launch, by the operand's name."""
    made = {}
    for node in _known(launch.nodes, nodes):
        for result, operand in node.op.alias.items():
            made[node.inputs[operand].name] = node.outputs[result].name
    return made


def _known(names: Iterable[str], nodes: Mapping[str, Node]) -> Iterator[Node]:
    return (nodes[name] for name in names if name in nodes)
