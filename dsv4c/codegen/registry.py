"""Which kernel computes a launch: candidates by op, asked in turn with the launch's ops and types.

A candidate answers with its launches, every kernel parameter bound to a value or to scratch, or with `No` and
the reason. If all say no, `choose` raises BuildError with every reason. Equal requests share one answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache, cached_property
from itertools import chain
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dsv4c.arch import Arch
from dsv4c.codegen.build import Package
from dsv4c.errors import BuildError
from dsv4c.ir.fused import Fused, operand_labels, trace
from dsv4c.ir.graph import Kind, Node, Value
from dsv4c.ir.op import Op, operand_names
from dsv4c.ir.text import print_attribute
from dsv4c.plan.records import Box
from dsv4c.types import Type

if TYPE_CHECKING:  # which imports jinja2; plans are verified without it
    from dsv4c.codegen.emit import Emission, Parameter


@dataclass(frozen=True)
class Call:
    """One op of a launch. Values go by number within their request; `results` are places among the results of
    the op's whole body, since a fused op drops those that nobody reads.
    """

    op: Op
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    names: tuple[str, ...]  # of the inputs
    results: tuple[int, ...]

    @property
    def operands(self) -> dict[str, int]:
        """Value numbers by operand name."""
        return dict(zip(self.names, self.inputs, strict=True))

    @property
    def made(self) -> dict[int, int]:
        """Value numbers by place among the results."""
        return dict(zip(self.results, self.outputs, strict=True))


@dataclass(frozen=True)
class Request:
    """A launch to find kernels for: what decides the choice and nothing else, so that equal layers are equal.

    Per value: its type, a label for readable kernels (of params: their name inside the layer), and how many
    nodes outside of the launch read what it makes. `given` are those that
    no launch writes, `plain` weights that lie in memory as their types say, since other launches want them
    in other forms. `lengths` is the last value where rows are a chunk's: how many of them there are.
    """

    calls: tuple[Call, ...]
    types: tuple[Type, ...]
    labels: tuple[str, ...]
    readers: tuple[int, ...]
    arch: Arch
    given: frozenset[int] = frozenset()
    lengths: int | None = None
    plain: frozenset[int] = frozenset()

    @property
    def call(self) -> Call:
        """The only call."""
        (call,) = self.calls
        return call

    @cached_property
    def access(self) -> tuple[str, ...]:
        """Per value "r", "w" or "rw"; an operand that a result overwrites is read and written."""
        marks = [""] * len(self.types)
        for call in self.calls:
            for number in call.inputs:
                marks[number] = marks[number] or "r"
            for number in call.outputs:
                marks[number] = "w"
        for call in self.calls:
            for result, operand in call.op.alias.items():
                marks[call.inputs[operand]] = marks[call.outputs[result]] = "rw"
        if self.lengths is not None:
            marks[self.lengths] = "r"
        return tuple(marks)

    @property
    def text(self) -> str:
        """Ops, types and architecture, for errors."""
        lines = []
        for call in self.calls:
            operands = ", ".join(f"{n}: {self.types[i]}" for n, i in call.operands.items())
            results = ", ".join(str(self.types[i]) for i in call.outputs)
            fields = ", ".join(f"{k}={print_attribute(v)}" for k, v in call.op.attributes().items())
            lines.append(f"{call.op.name}({operands}) {{{fields}}} -> {results}")
        return " + ".join(lines) + f" for {self.arch.name}"


@dataclass(frozen=True)
class Binding:
    """What a kernel parameter points to: a component of value number `value`, scratch of that name, or of
    what ranks exchange values through the block ("exchange") or the launch's own number ("site").

    access: "r", "w", "rw", or "early" for what is read before the wait, though no weight. With a `box` it
    points to a tensor map of that.
    """

    component: str
    access: str
    value: int | None = None
    scratch: str = ""
    exchange: str = ""
    box: Box | None = None


@dataclass(frozen=True)
class Scratch:
    """An array between the launches of one request that is no value of the graph, shared by name."""

    name: str
    nbytes: int
    access: str


@dataclass(frozen=True)
class Launchable:
    """One launch: a kernel and its bindings in ABI order.

    scratch: bytes by name, which the launches of one request share. forms: how a weight must lie in memory,
    by value number: a packing's name, or "f32". package: who contributed the kernel, if it is not dsv4c's.
    exchanged: bytes of words that it gives every other rank. tiled: or of tiles.
    """

    emission: Emission
    bindings: tuple[Binding, ...]
    stage: str = ""  # told apart by when a request takes several launches
    scratch: Mapping[str, int] = field(default_factory=dict)
    forms: Mapping[int, str] = field(default_factory=dict)
    package: Package | None = None
    exchanged: int = 0
    tiled: int = 0


@dataclass(frozen=True)
class No:
    """Why a candidate does not take a request."""

    reason: str


Answer = Sequence[Launchable] | No
Candidate = Callable[[Request], Answer]


@dataclass(frozen=True)
class Takes:
    """An op that a candidate takes, and what of it the candidate follows or says no to: these attributes, and
    all operands but those of `without`, which decide nothing.
    """

    op: type[Op]
    attributes: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()


def takes(op: type[Op], *attributes: str, without: Collection[str] = ()) -> Takes:
    """An op with what a candidate knows of it. Raises BuildError for an attribute that it has not."""
    known = {f.name for f in fields(op)}  # type: ignore[arg-type]  # `@primitive`, `@fused`: dataclasses
    if missing := sorted({*attributes} - known):
        raise BuildError(f"{op.name} has no attribute {', '.join(missing)} that a kernel could know")
    return Takes(op, frozenset(attributes), frozenset(without))


@dataclass(frozen=True)
class Kernel:
    """A candidate: the ops it takes, any op if none are named; whether one launch may hold several of them,
    in that order, and whether the later of them then read what the first makes. `package` contributed it, if
    it is not dsv4c's.
    """

    name: str
    takes: tuple[Takes, ...]
    several: bool
    chained: bool
    ask: Candidate
    package: Package | None = None

    @property
    def ops(self) -> tuple[type[Op], ...]:
        """The kinds of ops."""
        return tuple(taken.op for taken in self.takes)

    def ignored(self, request: Request) -> str:
        """An attribute that means what the candidate does not know, as a reason; "" for none. It knows
        nothing of one that it does not name: at its default that is as if it were not there.
        """
        known = {taken.op: taken.attributes | taken.op.geometry for taken in self.takes}
        for op in (call.op for call in request.calls if self.takes):
            for f in fields(op):  # type: ignore[arg-type]
                value = getattr(op, f.name)
                given = f.default is MISSING or value != f.default
                if given and f.name not in known[type(op)] and f.name != "keep":
                    return f"does not know {f.name} of {op.name}, which is {print_attribute(value)}"
        return ""

    def unbound(self, request: Request, answer: Sequence[Launchable]) -> str:
        """An operand or a result that an answer leaves out, as a reason; "" for none. What only the request's
        own ops read it need not make.
        """
        spared = {taken.op: taken.without for taken in self.takes}
        read = {i for call in request.calls for i in call.inputs if not request.readers[i]}
        made = {i for call in request.calls for i in call.outputs}
        bound = {b.value for launch in answer for b in launch.bindings} | (read & made)
        for call in request.calls:
            for name, number in call.operands.items():
                if number not in bound and name not in spared.get(type(call.op), ()):
                    return f"does not read {name} of {call.op.name}"
            for place, number in enumerate(call.outputs):
                if number not in bound and place not in call.op.alias:
                    return f"does not make result {call.results[place]} of {call.op.name}"
        return ""


def kernel(
    *ops: type[Op] | Takes, several: bool = False, chained: bool = False
) -> Callable[[Candidate], Kernel]:
    """Make a function a candidate for launches of these ops, of whose attributes it knows what `takes` says;
    `several` of them may be one launch, `chained` if the later ones read what the first makes.
    """
    taken = tuple(op if isinstance(op, Takes) else Takes(op) for op in ops)
    return lambda ask: Kernel(ask.__name__, taken, several or chained, chained, ask)


def kernels_in(module: ModuleType) -> tuple[Kernel, ...]:
    """The candidates that a module makes, in order."""
    found = (v for v in vars(module).values() if isinstance(v, Kernel))
    return tuple(k for k in found if k.ask.__module__ == module.__name__)


@cache
def choose(request: Request, known: tuple[Kernel, ...]) -> tuple[Launchable, ...]:
    """The first answer of the `known` candidates that is not `No`.

    Raises BuildError with the reason of every candidate when there is none.
    """
    reasons = []
    for candidate in known:
        if candidate.ops and not all(type(call.op) in candidate.ops for call in request.calls):
            continue
        if len(request.calls) > 1 and not candidate.several:
            reasons.append(f"{candidate.name}: takes one op per launch, not {len(request.calls)}")
            continue
        reason = candidate.ignored(request)
        if not reason:
            try:
                answer = candidate.ask(request)
            except BuildError as error:
                answer = No(str(error))
            reason = answer.reason if isinstance(answer, No) else candidate.unbound(request, answer)
            if not isinstance(answer, No) and not reason:
                return _in_turn(answer, candidate.package)
        reasons.append(f"{candidate.name}: {reason}")
    names = " + ".join(call.op.name for call in request.calls)
    why = reasons or [f"no kernel is registered for {names}; expected the graph's ops folded into fused ones"]
    raise BuildError(f"no kernel for {request.text}\n  " + "\n  ".join(why))


def _in_turn(answer: Sequence[Launchable], package: Package | None) -> tuple[Launchable, ...]:
    """The launches of one answer: what the first of them writes the others read."""
    written: set[int] = set()
    launches = []
    for launch in answer:
        own = {b.value for b in launch.bindings if b.value in written}
        bindings = tuple(replace(b, access="r") if b.value in own else b for b in launch.bindings)
        written |= {b.value for b in bindings if b.value is not None and b.access == "w"}
        launches.append(replace(launch, bindings=bindings, package=package))
    return tuple(launches)


def request_of(
    nodes: Sequence[Node],
    arch: Arch,
    readers: Mapping[Value, Sequence[Node]],
    labels: Mapping[Value, str],
    lengths: Value | None = None,
    plain: Collection[str] = (),
) -> tuple[Request, tuple[Value, ...]]:
    """The request of a launch of `nodes`, and the values by number; `lengths`, if given, is one of them, and
    weights named in `plain` lie as their types say.
    """
    number: dict[Value, int] = {}
    for value in chain.from_iterable((*node.inputs, *node.outputs) for node in nodes):
        number.setdefault(value, len(number))
    if lengths is not None:
        number.setdefault(lengths, len(number))
    own = set(nodes)
    outside = [sum(n not in own for n in readers.get(v, ())) if v.node in own else 0 for v in number]
    calls = tuple(_call(node, number) for node in nodes)
    request = Request(
        calls,
        tuple(v.type for v in number),
        tuple(labels.get(v, "") if v.kind is Kind.PARAM else "" for v in number),
        tuple(outside),
        arch,
        frozenset(n for v, n in number.items() if v.kind in (Kind.INPUT, Kind.PARAM)),
        None if lengths is None else number[lengths],
        frozenset(n for v, n in number.items() if v.name in plain),
    )
    return request, tuple(number)


def _call(node: Node, number: Mapping[Value, int]) -> Call:
    op = node.op
    places = tuple(range(len(node.outputs)))
    if isinstance(op, Fused):
        names = operand_labels(type(op), len(node.inputs))
        whole = range(len(trace(op, tuple(v.type for v in node.inputs)).results))
        places = op.kept(tuple(whole))
    else:
        kind: Any = type(op)
        names = list(operand_names(kind))[: len(node.inputs)]
        if more := len(node.inputs) - len(names):  # of an op that takes any number of the last
            names[-1:] = [f"{names[-1]}_{i}" for i in range(more + 1)]
    inputs = tuple(number[v] for v in node.inputs)
    return Call(op, inputs, tuple(number[v] for v in node.outputs), tuple(names), places)


def packing_for(name: str, arch: Arch) -> str:
    """The packing `name` as kernels for `arch` read it: FP4 codes in pairs where e2m1 is converted."""
    format_, _, tiles = name.partition("/")
    return f"{format_}_pairs/{tiles}" if arch.converts_e2m1 and format_ in ("mxfp4", "nvfp4") else name


def launchable(
    request: Request,
    emission: Emission,
    values: Mapping[str, int],
    *,
    stage: str = "",
    scratch: Mapping[str, Scratch] | None = None,
    forms: Mapping[str, str] | None = None,
    read: Collection[str] = (),
    exchange: Collection[Parameter] = (),
) -> Launchable:
    """A launch of `emission` with its operands bound by name: to value numbers, to scratch, or to what ranks
    exchange values through.

    `scratch` goes by operand, components other than data by operand_component. `forms` are those of weights,
    by operand, that the emission's packing does not name. `read` are operands that the request overwrites,
    though not by this launch.
    """
    scratch = scratch or {}
    bindings = []
    for p in emission.parameters:
        if p in exchange:
            bindings.append(Binding(p.component, "early" if p.early else "rw", exchange=p.operand))
        elif p.operand in values:
            value = values[p.operand]
            known = [c.name for c in request.types[value].components]
            if p.component not in known:
                raise BuildError(
                    f"{emission.symbol}: wants {p.component} of {p.operand}, which is {request.types[value]}"
                )
            access = "r" if p.operand in read else request.access[value]
            if p.early and access != "r":
                raise BuildError(
                    f"{emission.symbol}: reads {p.operand} before the wait, and the launch writes it"
                )
            bindings.append(Binding(p.component, "early" if p.early else access, value, box=p.box))
        elif (name := p.name.removeprefix("m_")) in scratch:
            array = scratch[name]
            bindings.append(Binding(p.component, array.access, scratch=array.name, box=p.box))
        else:
            raise BuildError(f"{emission.symbol}: nothing is bound to its parameter {p.name}")
    packing = {operand: packing_for(name, request.arch) for operand, name in emission.packing.items()}
    wanted = {**packing, **(forms or {})}
    return Launchable(
        emission,
        tuple(bindings),
        stage,
        {array.name: array.nbytes for array in scratch.values()},
        {values[operand]: form for operand, form in wanted.items()},
    )
