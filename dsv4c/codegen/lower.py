"""Folded graphs, one per bucket, as programs of launches over shared blocks: the same way for every target.

What decides: a target's `Coder` says which nodes may share a launch and what code computes them. What it does
not take is unfolded, and its parts are asked again. Then every value gets its place. Launches form one chain,
each behind its predecessor, on a GPU by a programmatic edge where the kernel waits: it touches what others
write only after its wait, the wait returns when the predecessor has completed, and the predecessor could not
complete before its own wait had returned. What a kernel reads before its wait has to be older: written by
launches that have completed when it begins, as those have that a late predecessor waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from dsv4c.buckets import Bucket
from dsv4c.errors import BuildError, GraphError
from dsv4c.exchange import MOST_SITES, SITE, SITES, TILE_FLAGS, TURNS, WORD, Layout
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Builder, Graph, Kind, Node, Value
from dsv4c.ir.text import print_graph
from dsv4c.ir.totals import totals
from dsv4c.numerics.resident import PLAIN, component_bytes
from dsv4c.passes.memory import MemoryPlan, aligned, lay_out, plan_memory
from dsv4c.passes.schedule import Group, Schedule, schedule
from dsv4c.plan.records import Argument, BodyCode, Box, KernelCode, Launch, Place, Program, StateSlot
from dsv4c.types import ALIGN as COMPONENT_ALIGN
from dsv4c.types import Type

"""The form of a weight that lies in memory as its type says."""


@dataclass(frozen=True)
class Operand:
    """An array that code reads or writes: a component of a value, scratch of that name, or of what ranks
    exchange values through the block ("exchange") or the launch's own number ("site").

    access: "r", "w", "rw", or "early" for what is read before the wait, though no weight. With a `box` code
    gets a tensor map of it.
    """

    component: str
    access: str
    value: Value | None = None
    scratch: str = ""
    exchange: str = ""
    box: Box | None = None


@dataclass(frozen=True)
class Part:
    """One launch before its bytes have places. `stage` tells the parts of one answer apart.

    scratch: bytes by name, which the parts of one answer share. forms: how a weight must lie in memory.
    exchanged: bytes of words that it gives every other rank. tiled: or of tiles. late: its successor begins
    only when its wait has returned.
    """

    code: BodyCode | KernelCode
    operands: tuple[Operand, ...]
    stage: str = ""
    scratch: Mapping[str, int] = field(default_factory=dict)
    forms: Mapping[Value, str] = field(default_factory=dict)
    exchanged: int = 0
    tiled: int = 0
    late: bool = False

    @property
    def exchanges(self) -> bool:
        return bool(self.exchanged or self.tiled)


class Coder(Protocol):
    """What a target can compute."""

    @property
    def groups(self) -> Sequence[Group]:
        """Ops that may share a launch."""
        ...

    def code(
        self, graph: Graph, nodes: Sequence[Node], plain: frozenset[str] = frozenset()
    ) -> tuple[Part, ...]:
        """The launches that compute `nodes`, while weights named in `plain` lie in memory as their types say.
        Raises BuildError, with every reason, where there are none.
        """
        ...

    def keep(self, kernels: Collection[str]) -> None:
        """Forget all kernels but these: what was unfolded later took others with it."""
        ...


Unfold = Callable[[Graph, Sequence[Node], frozenset[str]], Graph]
"""A graph with some fused nodes given back to their parts, folded again without the ops of those names."""


@dataclass(frozen=True)
class Folded:
    """A bucket to lower: its folded graph, what it computes once at load, and how to unfold."""

    bucket: Bucket
    graph: Graph
    load: Graph | None
    unfold: Unfold


@dataclass(frozen=True)
class Unfolded:
    """Fused nodes of one op that no code takes, given back to their parts: `launches` and `bytes` more.

    `reason` is why not, for the first of them.
    """

    bucket: str
    op: str
    nodes: int
    launches: int
    bytes: int
    reason: str


@dataclass(frozen=True)
class Weight:
    """A parameter in the weights' block: `components` are (name, offset in the block, bytes)."""

    name: str
    type: Type
    form: str
    components: tuple[tuple[str, int, int], ...]

    @property
    def record(self) -> dict[str, object]:
        """Plan data beside the parameter's sources."""
        parts = [{"name": name, "offset": at, "nbytes": size} for name, at, size in self.components]
        return {"offset": self.components[0][1], "form": self.form, "components": parts}


@dataclass(frozen=True)
class Lowered:
    """All buckets as programs over common blocks. lower_bounds: the smallest arena of any plan, by bucket."""

    programs: Mapping[str, Program]
    load: Program | None
    graphs: Mapping[str, Graph]
    blocks: Mapping[str, int]
    state: tuple[StateSlot, ...]
    weights: tuple[Weight, ...]
    lower_bounds: Mapping[str, int]
    unfolded: tuple[Unfolded, ...]

    @property
    def files(self) -> dict[str, bytes]:
        """The graphs as text, by the names that programs call them."""
        return {graph_file(name): print_graph(graph).encode() for name, graph in self.graphs.items()}


@dataclass(frozen=True)
class _Coded:
    """A bucket with code for every launch."""

    graph: Graph
    schedule: Schedule
    memory: MemoryPlan
    steps: tuple[tuple[Part, ...], ...]

    @property
    def parts(self) -> Iterator[Part]:
        return (part for step in self.steps for part in step)


def lower(
    buckets: Sequence[Folded],
    coder: Coder,
    bodies: Coder,
    require_fused: frozenset[str] = frozenset(),
    ranks: int = 1,
) -> Lowered:
    """Programs of all buckets by `coder`, for each of so many ranks; what runs once at load is the CPU's, by
    `bodies`.

    Raises BuildError naming the node that no code takes, with every reason, or a rule of `require_fused` that
    would be unfolded; GraphError where buckets disagree on a type.
    """
    unfolded, coded = _code_all(buckets, coder, require_fused)
    codes = [part.code for c in coded.values() for part in c.parts]
    coder.keep({code.kernel for code in codes if isinstance(code, KernelCode)})
    load = merged([f.load for f in buckets if f.load is not None])
    constants = {v.name for v in load.outputs.values()} if load is not None else set()
    once = None if load is None else _code_alone(load, bodies)

    graphs = [c.graph for c in coded.values()]
    everything = graphs if load is None else [*graphs, load]
    states = _agreed((g, v) for g in graphs for v in g.states)
    params = _agreed((g, v) for g in everything for v in g.params if v.name not in constants)
    weights, weights_bytes = lay_out_weights(
        params, _forms([*coded.values(), *([once] if once else [])], constants)
    )
    state_offsets, state_bytes = lay_out(states)
    made = {} if load is None else {v.name: v.type for v in load.outputs.values()}
    constant_offsets, constants_bytes = lay_out(made)

    places = {n: Place(t, "state", state_offsets[n]) for n, t in states.items()}
    places |= {w.name: Place(w.type, "weights", w.components[0][1]) for w in weights}
    places |= {n: Place(t, "constants", constant_offsets[n]) for n, t in made.items()}
    parts = {w.name: {name: (at, size) for name, at, size in w.components} for w in weights}
    exchange = _exchange(coded.values(), ranks)
    programs, input_bytes = {}, 0
    for folded in buckets:
        c = coded[folded.bucket.name]
        inputs, size = lay_out({v.name: v.type for v in c.graph.inputs})
        input_bytes = max(input_bytes, size)
        fixed = places | {v.name: Place(v.type, "input", inputs[v.name]) for v in c.graph.inputs}
        programs[folded.bucket.name] = _program(folded.bucket, c, fixed, parts, exchange)
    runs_once = None if once is None else _program(None, once, places, parts)
    arena = max(p.arena_bytes for p in (*programs.values(), *([runs_once] if runs_once else [])))
    return Lowered(
        programs=programs,
        load=runs_once,
        graphs={name: c.graph for name, c in coded.items()} | ({"load": load} if load is not None else {}),
        blocks={
            "weights": weights_bytes,
            "state": state_bytes,
            "constants": constants_bytes,
            "arena": arena,
            "input": input_bytes,
            "exchange": 0 if exchange is None else aligned(exchange.nbytes),
            "tiles": _tiles(coded.values(), ranks),
        },
        state=tuple(StateSlot(n, t, state_offsets[n]) for n, t in states.items()),
        weights=weights,
        lower_bounds={name: c.memory.lower_bound for name, c in coded.items()},
        unfolded=tuple(unfolded),
    )


def graph_file(name: str) -> str:
    return f"graph.{name}.txt"


# --- code for every launch ---


def _code_all(
    buckets: Sequence[Folded], coder: Coder, require_fused: frozenset[str]
) -> tuple[list[Unfolded], dict[str, _Coded]]:
    """Code for all buckets. A weight that launches want in several forms lies in memory as its type says;
    who can not read it so is unfolded.
    """
    plain = frozenset[str]()
    while True:
        unfolded: list[Unfolded] = []
        coded = {f.bucket.name: _code(f, coder, require_fused, unfolded, plain) for f in buckets}
        forms: dict[str, set[str]] = {}
        for part in (part for c in coded.values() for part in c.parts):
            for value, form in _wanted(part).items():
                forms.setdefault(value.name, set()).add(form)
        disagreeing = frozenset(name for name, wanted in forms.items() if len(wanted) > 1)
        if disagreeing <= plain:
            return unfolded, coded
        plain |= disagreeing


def _wanted(part: Part) -> dict[Value, str]:
    """The form in which a launch wants each value."""
    return {o.value: PLAIN for o in part.operands if o.value is not None} | dict(part.forms)


def _code(
    folded: Folded,
    coder: Coder,
    require_fused: frozenset[str],
    unfolded: list[Unfolded],
    plain: frozenset[str],
) -> _Coded:
    """Code for a bucket."""
    graph, order, steps, refused = _settle(folded, coder, require_fused, unfolded, plain)
    for node, reason in refused.items():
        own = [f"{u.op} was unfolded: {u.reason}" for u in unfolded if u.bucket == folded.bucket.name]
        raise BuildError("\n".join([f"at {node.name}: {reason}", *own]))
    return _Coded(graph, order, plan_memory(graph, order), steps)


def refusals(folded: Folded, coder: Coder) -> dict[Node, str]:
    """Every node that no code takes once fused ones are unfolded, and why; `lower` stops at the first."""
    return _settle(folded, coder, frozenset(), [], frozenset())[-1]


Steps = tuple[tuple[Part, ...], ...]


def _settle(
    folded: Folded,
    coder: Coder,
    require_fused: frozenset[str],
    unfolded: list[Unfolded],
    plain: frozenset[str],
) -> tuple[Graph, Schedule, Steps, dict[Node, str]]:
    """A bucket's graph with its code; op by op, what none takes is unfolded, until only primitives are
    refused. Weights named in `plain` lie in memory as their types say.
    """
    graph, given_back = folded.graph, frozenset[str]()
    while True:
        order, steps, refused = _ask(graph, schedule(graph, coder.groups), coder, plain)
        fused = [(node, reason) for node, reason in refused.items() if isinstance(node.op, Fused)]
        if not fused:
            return graph, order, steps, refused
        node, reason = fused[0]
        name = node.op.name
        if name in require_fused:
            raise BuildError(
                f"bucket {folded.bucket.name}: {name} is required to stay fused, but at {node.name}: {reason}"
            )
        given_back |= {name}
        nodes = [n for n in refused if n.op.name == name]
        before, graph = totals(graph), folded.unfold(graph, nodes, given_back)
        after = totals(graph)
        more = after.launches - before.launches, after.bytes - before.bytes
        unfolded.append(Unfolded(folded.bucket.name, name, len(nodes), *more, reason))


def _code_alone(graph: Graph, coder: Coder) -> _Coded:
    """Code for a graph none of whose nodes can be unfolded."""
    order = schedule(graph)
    steps = tuple(coder.code(graph, nodes) for nodes in order.launches)
    return _Coded(graph, order, plan_memory(graph, order), steps)


def _ask(
    graph: Graph, order: Schedule, coder: Coder, plain: frozenset[str]
) -> tuple[Schedule, Steps, dict[Node, str]]:
    """Launches with their code, and the nodes that none takes, with the reasons. Where none takes a launch of
    several nodes, as many of the first as one takes become a launch, and so on.
    """
    launches: list[tuple[Node, ...]] = []
    steps: list[tuple[Part, ...]] = []
    refused: dict[Node, str] = {}

    def ask(nodes: tuple[Node, ...]) -> str:
        """The reason why not, or nothing."""
        try:
            parts = coder.code(graph, nodes, plain)
        except BuildError as error:
            return str(error)
        for value, form in (item for part in parts for item in part.forms.items()):
            if value.name in plain and form != PLAIN:
                return f"wants %{value.name} as {form}, which other launches read as its type says"
        launches.append(nodes)
        steps.append(parts)
        return ""

    for nodes in order.launches:
        while nodes:
            size, reason = len(nodes), ask(nodes)
            while reason and size > 1:
                size -= 1
                reason = ask(nodes[:size])
            if reason:
                refused[nodes[0]] = reason
            nodes = nodes[size:]
    return Schedule(tuple(launches), order.views), tuple(steps), refused


def merged(loads: Sequence[Graph]) -> Graph | None:
    """What several buckets compute at load as one graph; equal names are equal work.

    Raises GraphError where they are not.
    """
    if not loads:
        return None
    builder = Builder("load")
    values: dict[str, Value] = {}
    outputs: dict[str, Value] = {}
    for load in loads:
        for param in load.params:
            if param.name not in values:
                values[param.name] = builder.param(param.name, param.type)
        for node in load.nodes:
            known = values.get(node.outputs[0].name)
            if known is None:
                builder.copy(node, {v: values[v.name] for v in node.inputs})
                made = builder.nodes[-1].outputs
                values |= {v.name: new for v, new in zip(node.outputs, made, strict=True)}
            elif known.node is None or known.node.op != node.op or known.type != node.outputs[0].type:
                raise GraphError(f"graph {load.name}: %{known.name} is not what it is in another bucket")
        outputs |= {label: values[v.name] for label, v in load.outputs.items()}
    return builder.finish(outputs)


# --- places ---


def _program(
    bucket: Bucket | None,
    coded: _Coded,
    fixed: Mapping[str, Place],
    parts: Mapping[str, Mapping[str, tuple[int, int]]],
    exchange: Layout | None = None,
) -> Program:
    """Launches with their bytes. Values, or what they are views of, are at `fixed` places or in the arena."""
    graph, order = coded.graph, coded.schedule

    def place(value: Value) -> Place:
        known = fixed.get(value.name) or fixed.get(order.owner(value).name)
        if known is None:
            return Place(value.type, "arena", coded.memory.offsets[value])
        return replace(known, type=value.type)

    places = {v.name: place(v) for v in graph.values()}
    scratch = max((_scratch_bytes(step) for step in coded.steps), default=0)
    return Program(
        graph=graph_file("load" if bucket is None else bucket.name),
        bucket=bucket,
        values=places,
        arena_bytes=coded.memory.bytes + scratch,
        inputs=tuple(v.name for v in graph.inputs),
        outputs={label: v.name for label, v in graph.outputs.items()},
        launches=tuple(_launches(coded, places, parts, exchange)),
    )


def _launches(
    coded: _Coded,
    places: Mapping[str, Place],
    parts: Mapping[str, Mapping[str, tuple[int, int]]],
    exchange: Layout | None,
) -> Iterator[Launch]:
    index = site = 0
    ended = -1  # the last launch that has completed when the next one begins, by a programmatic edge
    writers: dict[object, int] = {}  # the last launch that writes a value or a scratch array
    for nodes, step in zip(coded.schedule.launches, coded.steps, strict=True):
        scratch = _scratch(step, coded.memory.bytes)
        name = nodes[0].name
        for part in step:
            shared = {} if exchange is None or not part.exchanges else _exchanged(exchange, site)
            site += part.exchanges
            touched = [(_array(o, name, coded), o.access) for o in part.operands]
            early = (writers.get(array, -1) for array, access in touched if access == "early")
            apart = index > 0 and all(writer <= ended for writer in early)
            yield Launch(
                name=f"{name}.{part.stage}" if part.stage else name,
                op=" + ".join(n.op.name for n in nodes),
                nodes=tuple(n.name for n in nodes),
                scope=nodes[0].scope,
                code=part.code if apart else _whole(part.code),
                arguments=tuple(
                    shared[o.exchange] if o.exchange else _argument(o, name, part, places, parts, scratch)
                    for o in part.operands
                ),
                after=(index - 1,) if index else (),
            )
            writers |= {array: index for array, access in touched if "w" in access}
            if part.late or not apart:
                ended = index - 1
            index += 1


def _array(operand: Operand, launch: str, coded: _Coded) -> object:
    """Whose bytes an operand is: a value's, or scratch of that launch's answer."""
    return (launch, operand.scratch) if operand.value is None else coded.schedule.owner(operand.value)


def _whole(code: BodyCode | KernelCode) -> BodyCode | KernelCode:
    """Code that does not overlap with a predecessor: there is none, or its result is read before the wait."""
    return replace(code, programmatic=False) if isinstance(code, KernelCode) else code


def _argument(
    operand: Operand,
    launch: str,
    part: Part,
    places: Mapping[str, Place],
    parts: Mapping[str, Mapping[str, tuple[int, int]]],
    scratch: Mapping[str, int],
) -> Argument:
    if operand.value is None:
        name, size = f"{launch}.{operand.scratch}", part.scratch[operand.scratch]
        at = scratch[operand.scratch]
        return Argument("arena", at, name, operand.component, size, operand.access, operand.box)
    name = operand.value.name
    place = places[name]
    if place.space == "weights":
        at, size = parts[name][operand.component]
    else:
        component = next(c for c in place.type.components if c.name == operand.component)
        at, size = place.offset + component.offset, component.nbytes
    return Argument(place.space, at, name, operand.component, size, operand.access, operand.box)


def _exchange(coded: Iterable[_Coded], ranks: int) -> Layout | None:
    """The block through which kernels exchange values, with room for the largest of them; None without any.

    Raises BuildError for more of them in a step than have numbers.
    """
    given = [[part.exchanged for part in c.parts if part.exchanges] for c in coded]
    sites = max(map(len, given), default=0)
    if not sites:
        return None
    if sites > MOST_SITES:
        raise BuildError(f"{sites} exchanges in a step, expected at most {MOST_SITES}")
    return Layout(ranks, sites, aligned(max(WORD, *map(max, filter(None, given)))))


def _tiles(coded: Iterable[_Coded], ranks: int) -> int:
    """Bytes of the block through which kernels exchange tiles."""
    largest = max((part.tiled for c in coded for part in c.parts), default=0)
    return TURNS * ranks * aligned(TILE_FLAGS + largest) if largest else 0


def _exchanged(exchange: Layout, site: int) -> dict[str, Argument]:
    """What an exchange takes beside its values: the block's header, and its own number."""
    whole = Argument("exchange", 0, "exchange", "data", SITES, "rw")
    number = Argument("exchange", exchange.site(site), "exchange.site", "data", SITE, "early")
    return {"exchange": whole, "site": number}


def _scratch(step: Sequence[Part], base: int) -> dict[str, int]:
    """Offsets of the scratch arrays of one answer, from `base` on."""
    sizes = {name: size for part in step for name, size in part.scratch.items()}
    offsets = {}
    for name, size in sizes.items():
        offsets[name] = base
        base += aligned(size)
    return offsets


def _scratch_bytes(step: Sequence[Part]) -> int:
    sizes = {name: size for part in step for name, size in part.scratch.items()}
    return sum(map(aligned, sizes.values()))


def _agreed(declared: Iterable[tuple[Graph, Value]]) -> dict[str, Type]:
    """Types by name over all buckets. Raises GraphError where one differs."""
    types: dict[str, Type] = {}
    for graph, value in declared:
        if types.setdefault(value.name, value.type) != value.type:
            raise GraphError(
                f"graph {graph.name}: %{value.name} is {value.type}, in another bucket {types[value.name]}"
            )
    return types


# --- weights ---


def _forms(coded: Iterable[_Coded], constants: set[str]) -> dict[str, str]:
    """How each weight must lie in memory, for all buckets. Raises BuildError where two launches disagree."""
    forms: dict[str, str] = {}
    for part in (part for c in coded for part in c.parts):
        for value, form in _wanted(part).items():
            if value.kind is not Kind.PARAM or value.name in constants:
                if form != PLAIN:
                    raise BuildError(f"%{value.name} is wanted as {form}: it is no weight")
            elif forms.setdefault(value.name, form) != form:
                raise BuildError(
                    f"%{value.name} is wanted as {forms[value.name]} and, elsewhere, as {form}; "
                    "all buckets of a plan share one packing of a weight"
                )
    return forms


def lay_out_weights(params: Mapping[str, Type], forms: Mapping[str, str]) -> tuple[tuple[Weight, ...], int]:
    """Offsets of the parameters in their block, one after the other, and the bytes of all."""
    weights, end = [], 0
    for name, type_ in params.items():
        form = forms.get(name, PLAIN)
        components, at = [], end
        try:
            sizes = component_bytes(type_, form)
        except ValueError as error:
            raise BuildError(f"%{name}: {error}") from None
        for component, size in sizes.items():
            components.append((component, at, size))
            at += -(-size // COMPONENT_ALIGN) * COMPONENT_ALIGN
        weights.append(Weight(name, type_, form, tuple(components)))
        end += aligned(at - end)
    return tuple(weights), end
