"""Code of the GPU targets: the kernels that families of `codegen.kernels` answer a launch with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property

from dsv4c.arch import Arch
from dsv4c.buckets import ROWS
from dsv4c.codegen.build import Source
from dsv4c.codegen.emit import Emission
from dsv4c.codegen.kernels import KERNELS
from dsv4c.codegen.lower import Operand, Part
from dsv4c.codegen.registry import Kernel, Launchable, choose, request_of
from dsv4c.ir.graph import Graph, Kind, Node, Value
from dsv4c.ir.op import elements
from dsv4c.passes.schedule import Group
from dsv4c.plan.declared import is_late
from dsv4c.plan.records import KernelCode


class Kernels:
    """A `Coder` for one GPU architecture. `contributed` candidates are asked first. `sources` are the kernels
    to build, and `emissions` what they were made from, by the names that launches call them.
    """

    def __init__(self, arch: Arch, contributed: Sequence[Kernel] = ()) -> None:
        self.arch = arch
        self.contributed = tuple(contributed)
        self.known = (*contributed, *KERNELS)
        self.sources: dict[str, Source] = {}
        self.emissions: dict[str, Emission] = {}

    @cached_property
    def groups(self) -> Sequence[Group]:
        """What families take in one launch."""
        return tuple(Group(tuple(op.name for op in k.ops), k.chained) for k in self.known if k.several)

    def code(
        self, graph: Graph, nodes: Sequence[Node], plain: frozenset[str] = frozenset()
    ) -> tuple[Part, ...]:
        params = {p for node in nodes for p in node.inputs if p.kind is Kind.PARAM}
        labels = {p: p.place.role.replace(".", "_") for p in params}
        request, values = request_of(nodes, self.arch, graph.users, labels, _chunk_lengths(graph), plain)
        return tuple(self._part(launch, values) for launch in choose(request, self.known))

    def keep(self, kernels: Collection[str]) -> None:
        self.sources = {name: source for name, source in self.sources.items() if name in kernels}

    def _part(self, launch: Launchable, values: Sequence[Value]) -> Part:
        emission = launch.emission
        source = Source(emission.symbol, emission.source, launch.package)
        if self.sources.setdefault(source.name, source) is source:
            self.emissions[source.name] = emission
        code = KernelCode(
            kernel=source.name,
            grid=emission.grid,
            block=emission.block,
            cluster=emission.cluster,
            shared=emission.shared,
            programmatic=emission.programmatic and emission.waits,
            waits=emission.waits,
        )
        operands = tuple(
            Operand(
                b.component,
                b.access,
                None if b.value is None else values[b.value],
                b.scratch,
                b.exchange,
                b.box,
            )
            for b in launch.bindings
        )
        forms = {values[number]: form for number, form in launch.forms.items()}
        late = is_late(emission.source)
        return Part(code, operands, launch.stage, launch.scratch, forms, launch.exchanged, launch.tiled, late)


def _chunk_lengths(graph: Graph) -> Value | None:
    """How many rows a call gives, where it gives a sequence more than a GEMV takes: what is behind them is
    padding.
    """
    inputs = {v.name: v for v in graph.inputs}
    lengths, tokens = inputs.get("lengths"), inputs.get("tokens")
    if lengths is None or tokens is None or elements(lengths.type) != 1 or elements(tokens.type) <= ROWS:
        return None
    return lengths
