"""Proves that the launches of a plan do what its graphs say, from the plan's data alone.

Launches are followed in order over every byte of arena, states, inputs and constants: what it holds, who
wrote it, who has read it since. A launch may touch it only behind all of those, and must find what the graph
says it reads.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dsv4c.ir.graph import Graph, Node
from dsv4c.ir.text import parse_graph
from dsv4c.plan.folder import Plan
from dsv4c.plan.records import SPACES, Argument, KernelCode, Launch, Program

FOLLOWED = ("arena", "state", "input", "constants")  # blocks whose bytes change


@dataclass(frozen=True)
class Violation:
    """What is wrong, where: `launch` is its name, or "" for what concerns no launch alone; so is `bucket`.

    kind: order | wait | unwritten | stale | alias | outside | misplaced | overlap | kernel | missing.
    """

    kind: str
    launch: str
    text: str
    bucket: str = ""

    def __str__(self) -> str:
        places = [f"bucket {self.bucket}: "] * bool(self.bucket) + [f"launch {self.launch}: "] * bool(
            self.launch
        )
        return f"{self.kind}: {''.join(places)}{self.text}"


def check(plan: Plan) -> list[Violation]:
    """All violations of a plan, bucket by bucket in launch order; empty when it is sound."""
    found = list(_overlaps(plan))
    programs = dict(plan.buckets) | ({"load": plan.load} if plan.load is not None else {})
    for name, program in programs.items():
        found += [replace(v, bucket=name) for v in _check(plan, program)]
    return found


def _check(plan: Plan, program: Program) -> list[Violation]:
    graph = parse_graph(plan.files[program.graph].decode())
    found = [*_kernels(plan, program), *_coverage(graph, program), *_aliases(graph, program)]
    roots = {v.name: root.name for v, root in graph.root_of.items()}
    for launch in program.launches:
        found += _places(launch, program, plan)
        found += _beside(launch, roots)
    if not any(v.kind == "outside" for v in found):
        found += _follow(graph, program)
    return found


# What each launch says --------------------------------------------------------------------------------------


def _kernels(plan: Plan, program: Program) -> Iterator[Violation]:
    """A launch's code is among the plan's files."""
    for launch in program.launches:
        if not isinstance(launch.code, KernelCode):
            if launch.code.body and launch.code.body not in plan.files:
                yield Violation("kernel", launch.name, f"runs {launch.code.body}, which the plan has not")
            continue
        record = plan.kernels.get(launch.code.kernel)
        if record is None:
            yield Violation(
                "kernel", launch.name, f"runs kernel {launch.code.kernel}, which the plan has not"
            )
        elif record["cubin"] not in plan.files:
            yield Violation("kernel", launch.name, f"runs {record['cubin']}, which the plan has not")


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


def _places(launch: Launch, program: Program, plan: Plan) -> Iterator[Violation]:
    """Arguments lie inside of their block, at the place of their value."""
    weights, sizes = _weights(plan), plan.blocks
    for a in launch.arguments:
        name = f"{a.value}.{a.component}"
        if a.space not in sizes:
            yield Violation(
                "outside", launch.name, f"{name} is in block {a.space!r}: known are {', '.join(SPACES)}"
            )
        elif not 0 <= a.offset <= a.offset + a.nbytes <= sizes[a.space]:
            end = a.offset + a.nbytes
            yield Violation(
                "outside",
                launch.name,
                f"{name} is bytes {a.offset} to {end} of {a.space}, which has {sizes[a.space]}",
            )
        elif a.value in weights:
            if weights[a.value].get(a.component) != (a.offset, a.nbytes) or a.space != "weights":
                found, wanted = (a.offset, a.nbytes), weights[a.value].get(a.component)
                yield Violation(
                    "misplaced", launch.name, f"{name} is at {a.space} {found}, its record says {wanted}"
                )
            elif a.access != "r":
                yield Violation("misplaced", launch.name, f"{name} is a weight, and is written")
        elif a.value in program.values:
            slot = program.values[a.value]
            part = next((c for c in slot.type.components if c.name == a.component), None)
            if part is None or (a.space, a.offset, a.nbytes) != (
                slot.space,
                slot.offset + part.offset,
                part.nbytes,
            ):
                yield Violation(
                    "misplaced",
                    launch.name,
                    f"{name} is {a.nbytes} bytes from {a.offset} of {a.space}; its value {slot.type} is at "
                    f"{slot.offset} of {slot.space}",
                )


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


def _weights(plan: Plan) -> dict[str, dict[str, tuple[int, int]]]:
    return {
        record["name"]: {c["name"]: (c["offset"], c["nbytes"]) for c in record.get("components", ())}
        for record in plan.weights
    }


def _overlaps(plan: Plan) -> Iterator[Violation]:
    """Weights, and states, share no bytes and lie in their blocks."""
    weights = [
        (start, start + size, f"{name}.{component}")
        for name, parts in _weights(plan).items()
        for component, (start, size) in parts.items()
    ]
    states = [(s.offset, s.offset + s.type.extent, s.name) for s in plan.state]
    for block, spans in (("weights", weights), ("state", states)):
        size = plan.blocks[block]
        end, last = 0, ""
        for start, stop, name in sorted(spans):
            if start < end:
                yield Violation("overlap", "", f"{name} starts at byte {start} of {block}, inside of {last}")
            if stop > size:
                yield Violation("outside", "", f"{name} ends at byte {stop} of {block}, which has {size}")
            if stop > end:
                end, last = stop, name


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


def _follow(graph: Graph, program: Program) -> Iterator[Violation]:
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
    for index, launch in enumerate(launches):
        late = [i for i in launch.after if not 0 <= i < index]
        if late:
            yield Violation(
                "order", launch.name, f"is behind launch {late[0]}, which does not come before it"
            )
        run = launch.code
        holds = not isinstance(run, KernelCode) or not run.programmatic or run.waits
        if not holds and launch.after:
            yield Violation("wait", launch.name, "has programmatic edges, and its kernel does not wait")
        mask = 0
        for i in launch.after:
            if i not in late and holds:
                mask |= before[i] | 1 << i
        before.append(mask)
        made = _results(launch, nodes)
        touched = [a for a in launch.arguments if a.space in blocks]
        for a in touched:
            yield from _touch(blocks[a.space], a, index, launch, launches, mask, same)
        for a in touched:  # a launch's own results are not what it reads
            for segment in blocks[a.space].over(a.offset, a.offset + a.nbytes):
                if "w" in a.access:
                    segment.holds = same.get(made.get(a.value, a.value), made.get(a.value, a.value))
                    segment.writer, segment.readers = index, []
                else:
                    segment.readers.append(index)


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
            if other != index and not before >> other & 1 and "order" not in said:
                said.add("order")
                yield Violation(
                    "order",
                    launch.name,
                    f"touches the bytes of {name} with no order to launch {launches[other].name}",
                )
        if a.access == "early" and segment.writer is not None and "wait" not in said:
            said.add("wait")
            writer = launches[segment.writer].name
            yield Violation(
                "wait", launch.name, f"reads {name} before it waits for {writer}, which writes it"
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
