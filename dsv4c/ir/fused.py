"""Fused ops: a name for a subgraph. Fields, and a body written in other ops.

From the body come the type rule (trace it with the operands' types), the meaning (interpret it), the undo
(expand it) and the matcher: traced with a `Hole` for everything unknown, it tells which attribute of which
node each field reaches. A decision that depends on a hole is traced both ways.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from typing import Any, ClassVar, Protocol, TypeVar

from dsv4c.errors import GraphError, contributed, told
from dsv4c.ir.graph import Builder, Graph, Kind, Node, Value
from dsv4c.ir.holes import Hole, Needs, Script, answered_by, filled, holes_in, is_hole
from dsv4c.ir.op import Cost, Op, expect
from dsv4c.types import DType, Type

C = TypeVar("C", bound=Callable[..., Any])


def _cached(function: C) -> C:
    """`functools.cache` that keeps the signature."""
    return typing.cast(C, cache(function))


OPERANDS = "operands"
"""Key of a proposal that says how many operands a variadic body has."""


class Neighborhood(Protocol):
    """What `Fused.propose` may look at: the graph around an anchor."""

    def producer(self, value: Value) -> Node | None: ...

    def users(self, value: Value) -> Sequence[Node]: ...


@dataclass(frozen=True)
class Fused(Op):
    """Base of fused ops; declare them with `@fused`. Operands with a default may be left out, from the end.

    `keep` lists the results of the body that this node returns, those that somebody reads; empty means all.

    A subclass declares fields, which a match fills in, `body`, and where they are needed:

    literals: "op.attribute" of every attribute that the body sets to a constant on purpose.
    anchor: the op of the body that a search starts from; by default the one that is rarest in the graph.
    apart: operands to which no wire of the body leads from the anchor; `propose` gives their values.
    home: the result of the body whose scope a fused node takes.
    optional: no warning where not even an anchor is found; some models have nothing to fold here.
    unless: rules in whose company this one has no place, so that nobody is warned.
    counts: how many operands an occurrence may have, where some may only be left out together.
    example: values of fields, and types of operands as text, that the check at registration needs.
    certified_as: the worst kind of difference that a certificate may find, by default "bit-exact".
    """

    literals: ClassVar[tuple[str, ...]] = ()
    """"op.attribute" of every attribute that the body sets to a constant on purpose."""
    anchor: ClassVar[type[Op] | None] = None
    """Op of the body that a search starts from; by default the one that is rarest in the graph."""
    apart: ClassVar[tuple[str, ...]] = ()
    """Operands to which no wire of the body leads from the anchor: proposals give their values, by label."""
    home: ClassVar[int] = 0
    """The result of the body whose scope a fused node takes."""
    optional: ClassVar[bool] = False
    """Some recipes or models have nothing to fold here: no warning where not even an anchor is found."""
    unless: ClassVar[tuple[str, ...]] = ()
    """Rules in whose company this one has no place: no warning where one of them applied."""
    counts: ClassVar[tuple[int, ...]] = ()
    """How many operands an occurrence may have, most first, where some may only be left out together."""
    example: ClassVar[Mapping[str, Any]] = {}
    """Values of fields, and types of operands as text, where the registration check needs them."""

    body: ClassVar[Callable[..., Any]]
    """`def body(self, x, gain=None)`: the ops this one stands for. Returns a value or a tuple of values."""

    keep: tuple[int, ...] = field(default=(), kw_only=True)

    @classmethod
    def propose(cls, anchor: Node, around: Neighborhood) -> Iterable[Mapping[str, Any]]:
        """Candidates for fields that no attribute reveals (a number of repetitions), best first.

        A proposal is only tried: a match must still agree with the whole body. The key "operands" gives the
        number of operands of a variadic body, the labels in `apart` values. Overriding it requires `anchor`.
        """
        return ({},)

    def infer(self, *operands: Type) -> tuple[Type, ...]:
        """Result types, from tracing the body. Raises GraphError when the body refuses the operands."""
        return tuple(v.type for v in self.kept(trace(self, operands).results))

    def kept(self, results: Sequence[Any]) -> tuple[Any, ...]:
        """The results of the body that this node returns."""
        wrong = [i for i in self.keep or () if not 0 <= i < len(results)]
        if wrong:
            raise GraphError(f"{self.name} keeps result {wrong[0]}, its body has {len(results)}")
        return tuple(results[i] for i in self.keep) if self.keep else tuple(results)

    @cached_property
    def alias(self) -> Mapping[int, int]:  # type: ignore[override]
        """Result index -> operand index, for the state writes in the body."""
        of_body = _alias_of(self)
        order = self.keep or tuple(range(max(of_body, default=-1) + 1))
        return {new: of_body[old] for new, old in enumerate(order) if old in of_body}

    def attributes(self) -> dict[str, Any]:
        """Fields by name; `keep` comes last, and only when a result is left out."""
        own = {f.name: getattr(self, f.name) for f in own_fields(type(self))}
        return {**own, "keep": self.keep} if self.keep else own

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        """Operands and results once, as far as the body touches them; what lies between stays on chip."""
        return _fused_cost(self, operands)


@dataclass(frozen=True)
class Body:
    """A body traced with concrete types: operands are the graph's inputs, results its outputs."""

    graph: Graph

    @property
    def results(self) -> tuple[Value, ...]:
        return tuple(self.graph.outputs.values())

    @cached_property
    def size(self) -> int:
        """How many results of primitives the body has, fused ops in it counted by their own bodies."""
        return sum(_primitive_results(node) for node in self.graph.nodes)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """For every result of the body, which of its `size` results of primitives it is."""
        place: dict[Value, int] = {}
        start = 0
        for node in self.graph.nodes:
            inner: Sequence[int] = range(len(node.outputs))
            if isinstance(node.op, Fused):
                inner = node.op.kept(trace(node.op, tuple(v.type for v in node.inputs)).places)
            place.update((v, start + i) for v, i in zip(node.outputs, inner, strict=True))
            start += _primitive_results(node)
        return tuple(place[v] for v in self.results)

    @cached_property
    def alias(self) -> dict[int, int]:
        """Result index -> operand index whose buffer it overwrites."""
        return alias_of_trace(self.graph.inputs, self.graph.nodes, self.results)

    def cost(self, op: Fused) -> Cost:
        reads = tuple(min(self._reads(v), v.type.nbytes) for v in self.graph.inputs)
        writes = tuple(self._writes(v) for v in op.kept(self.results))
        return Cost(sum(node.cost.flops for node in self.graph.nodes), reads, writes)

    def _reads(self, value: Value) -> int:
        """Bytes of `value` that the body reads; views and updates of it count with their readers."""
        whole = parts = 0
        for node in self.graph.users[value]:
            through = [r for r, o in node.op.alias.items() if node.inputs[o] is value]
            if node.op.addressed:
                parts += self._reads(node.outputs[0])
            for result in through:
                parts += self._reads(node.outputs[result])
            if not node.op.addressed:
                cost = node.cost
                whole = max(whole, *(n for v, n in zip(node.inputs, cost.reads, strict=True) if v is value))
        return max(whole, min(parts, value.type.nbytes))

    def _writes(self, value: Value) -> int:
        assert value.node is not None
        if value.index not in value.node.op.alias:
            return value.type.nbytes
        return value.node.cost.writes[value.index]


@_cached
def _fused_cost(op: Fused, operands: tuple[Type, ...]) -> Cost:
    return trace(op, operands).cost(op)


def _primitive_results(node: Node) -> int:
    if isinstance(node.op, Fused):
        return trace(node.op, tuple(v.type for v in node.inputs)).size
    return len(node.outputs)


def alias_of_trace(
    operands: Sequence[Value], nodes: Sequence[Node], results: Sequence[Value]
) -> dict[int, int]:
    """Result index -> operand index for results that live in an operand's buffer.

    Raises GraphError when a write is not returned: the state it makes would be lost.
    """
    root: dict[Value, Value] = {}
    stale: set[Value] = set()
    for node in nodes:
        for result, operand in node.op.alias.items():
            target = node.inputs[operand]
            root[node.outputs[result]] = root.get(target, target)
            stale.add(target)
    for value in root:
        expect(value in results or value in stale, f"the write %{value.name} is not among the body's results")
    index = {v: i for i, v in enumerate(operands)}
    final = {v: index[r] for v, r in root.items() if v not in stale and r in index}
    return {i: final[v] for i, v in enumerate(results) if v in final}


_ALIASES: dict[Fused, dict[int, int]] = {}


def _alias_of(op: Fused) -> dict[int, int]:
    """The alias of a whole body: that of all its shapes if they agree, else found by drawing this one."""
    seen = SEEN[type(op)].aliases
    if len(seen) == 1:
        return dict(seen[0])
    known = _known_fields(op)
    whole = replace(op, keep=()) if len(known) == len(own_fields(type(op))) else None
    if whole is not None and whole in _ALIASES:
        return _ALIASES[whole]
    pattern = sketches(type(op), max(operand_counts(type(op)), default=0), known)[0]
    return alias_of_trace(pattern.operands, pattern.nodes, pattern.results)


def _known_fields(op: Fused) -> tuple[tuple[str, Any], ...]:
    values = ((f.name, getattr(op, f.name)) for f in own_fields(type(op)))
    return tuple((name, value) for name, value in values if not any(True for _ in holes_in(value)))


def trace(op: Fused, operands: tuple[Type, ...]) -> Body:
    """The body of `op` over operands of these types; cached. Raises GraphError."""
    return _trace(replace(op, keep=()) if op.keep else op, tuple(operands))


@_cached
def _trace(op: Fused, operands: tuple[Type, ...]) -> Body:
    builder = Builder(op.name)
    labels = operand_labels(type(op), len(operands))
    values = [builder.input(n, t) for n, t in zip(labels, operands, strict=True)]
    with builder, contributed(f"{op.name}: the body"):
        returned = op.body(*values)
    results = _checked_results(type(op), returned, values)
    body = Body(builder.finish({str(i): v for i, v in enumerate(results)}))
    known = _ALIASES.setdefault(op, body.alias)
    expect(known == body.alias, f"{op.name}: which operands it overwrites must not depend on their types")
    return body


def _checked_results(op: type[Fused], returned: Any, operands: Sequence[Value]) -> tuple[Value, ...]:
    results = returned if isinstance(returned, tuple) else (returned,)
    for value in results:
        expect(isinstance(value, Value), f"{op.name}: the body returns {value!r}, which is no value")
        expect(value not in operands, f"{op.name}: the body returns its operand {value.name} unchanged")
    expect(len(set(results)) == len(results), f"{op.name}: the body returns a value twice")
    return results


def dtype_of(value: Value) -> DType:
    """Element type of a plain operand, for a body. Compare it with ==: the trace may not know it."""
    return value.type.dtype  # type: ignore[union-attr]


@_cached
def body_parameters(op: type[Fused]) -> tuple[inspect.Parameter, ...]:
    """The parameters of the body: its operands, in order."""
    return tuple(p for p in inspect.signature(op.body).parameters.values() if p.name != "self")


def operand_labels(op: type[Fused], count: int) -> list[str]:
    """Names of `count` operands, from the body's signature."""
    labels: list[str] = []
    for p in body_parameters(op):
        if p.kind is p.VAR_POSITIONAL:
            labels += [f"{p.name}_{i}" for i in range(count - len(labels))]
        else:
            labels.append(p.name)
    return labels[:count]


def operand_counts(op: type[Fused]) -> tuple[int, ...]:
    """How many operands an occurrence may have, most first; empty for a variadic body, which proposes it."""
    parameters = body_parameters(op)
    if op.counts or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return op.counts
    least = sum(p.default is p.empty for p in parameters)
    return tuple(range(len(parameters), least - 1, -1))


@_cached
def own_fields(op: type[Fused]) -> tuple[Any, ...]:
    """The declared fields: all but `keep`."""
    return tuple(f for f in fields(op) if f.name != "keep")


@_cached
def optional_fields(op: type[Fused]) -> tuple[str, ...]:
    """Fields that may be None: with and without them are two shapes of the body."""
    hints = typing.get_type_hints(op)
    return tuple(
        f.name
        for f in own_fields(op)
        if typing.get_origin(hints[f.name]) in (typing.Union, types.UnionType)
        and type(None) in typing.get_args(hints[f.name])
    )


@dataclass(frozen=True, eq=False)
class Pattern:
    """A body traced with holes; `fields` are those that are known, given or decided."""

    operands: tuple[Value, ...]
    nodes: tuple[Node, ...]
    results: tuple[Value, ...]
    fields: Mapping[str, Any]

    @cached_property
    def makers(self) -> dict[Value, int]:
        """Index of the node that makes each value."""
        return {v: i for i, node in enumerate(self.nodes) for v in node.outputs}

    @cached_property
    def plans(self) -> dict[int, list[tuple[int, Value | None, bool]]]:
        """Search orders by anchor, filled by the matcher."""
        return {}


class _Sketch(Builder):
    """A builder that goes on when types are unknown."""

    def emit(
        self,
        op: Op,
        inputs: tuple[Value, ...],
        *,
        name: str = "",
        names: Sequence[str] = (),
        scope: str | None = None,
        origin: Iterable[str] = (),
    ) -> tuple[Value, ...]:
        attributes = op.attributes()
        holes = [h for a in attributes.values() for h in holes_in(a)]
        holes += [v.type for v in inputs if is_hole(v.type)]
        if not holes:
            return super().emit(op, inputs, name=name, names=names, scope=scope, origin=origin)
        node = Node(op, inputs, "")
        types_: list[Any]
        if any(h.hole_open for h in holes):
            types_ = [Hole("", type_=True) for _ in range(result_count(op, len(inputs)))]
        else:
            exact = type(op)(**{k: filled(v) for k, v in attributes.items()})
            types_ = [
                Hole("", known=t, type_=True) for t in exact.results(tuple(filled(v.type) for v in inputs))
            ]
        for i, type_ in enumerate(types_):
            label = self._claim(self.fresh(name or op.name))
            type_.hole_text = f"{label}.type"
            node.outputs += (Value(label, type_, Kind.RESULT, node, i),)
        self.nodes.append(node)
        return node.outputs


@dataclass
class Seen:
    """What the shapes of a body had in common when it was registered."""

    results: set[int] = field(default_factory=set)
    aliases: list[dict[int, int]] = field(default_factory=list)


SEEN: dict[type[Fused], Seen] = {}
"""By declared op; registration fills it."""


def result_count(op: Op, operands: int) -> int:
    """How many results an op has, types unknown: from the annotation of its type rule, or its body."""
    if isinstance(op, Fused):
        seen = SEEN[type(op)].results
        if op.keep or len(seen) == 1:
            return len(op.keep) or next(iter(seen))
        return len(sketches(type(op), operands, _known_fields(op))[0].results)
    return _annotated_results(type(op))


@_cached
def _annotated_results(op: type[Op]) -> int:
    returns = typing.get_type_hints(op.infer)["return"]
    return len(typing.get_args(returns)) if typing.get_origin(returns) is tuple else 1


@_cached
def sketches(op: type[Fused], operands: int, known: tuple[tuple[str, Any], ...]) -> tuple[Pattern, ...]:
    """The body traced with so many operands and these fields, once for every way its decisions can go.

    Raises GraphError when a decision needs a number that is not known.
    """
    fields_ = dict(known)
    given = {f.name: fields_.get(f.name, Hole(f"self.{f.name}", field=f.name)) for f in own_fields(op)}
    types_ = {n: Hole(f"{n}.type", type_=True) for n in operand_labels(op, operands)}
    try:
        return tuple(draw(op, given, types_, plain=True))
    except Needs as signal:
        raise GraphError(
            f"{op.name}: the body depends on {signal.hole.hole_text}, which no attribute tells; propose it"
        ) from None


FORKS = 256  # ways a body's decisions may go


def draw(
    op: type[Fused], attributes: Mapping[str, Any], operands: Mapping[str, Any], *, plain: bool
) -> Iterator[Pattern]:
    """Trace the body with these fields and operand types, any of which may be holes; one pattern per way."""
    answers: list[tuple[Any, ...]] | None = []
    refused: Exception | None = None
    drawn = 0
    for _ in range(FORKS):
        if answers is None:
            break
        script = Script(answers, plain)
        try:
            with answered_by(script):
                yield _draw_once(op, attributes, operands, script)
            drawn += 1
        except (GraphError, ValueError, TypeError, IndexError) as error:
            # decisions that do not go together, such as a shape of two numbers unpacked to three
            refused = error
        answers = script.next()
    if not drawn:
        assert refused is not None
        raise GraphError(f"{op.name}: the body cannot be traced: {told(refused)}") from refused
    if refused is not None:
        _REFUSED[op] = refused


_REFUSED: dict[type[Fused], Exception] = {}


def refusal(op: type[Fused]) -> str:
    """Where and why a way through the body ended without a result, of those traced so far; else "".

    The ways that dsv4c's own bodies refuse are known, and not told.
    """
    error = _REFUSED.get(op)
    return "" if error is None or told(error) == str(error) else told(error)


def _draw_once(
    op: type[Fused], attributes: Mapping[str, Any], operands: Mapping[str, Any], script: Script
) -> Pattern:
    builder = _Sketch(op.name)
    self = object.__new__(op)
    for name, value in (*attributes.items(), ("keep", ())):
        object.__setattr__(self, name, value)
    values = tuple(builder.input(name, type_) for name, type_ in operands.items())
    with builder:
        results = _checked_results(op, self.body(*values), values)
    known = {name: value for name, value in attributes.items() if not is_hole(value)}
    flags = {f"self.{f.name}": f.name for f in own_fields(op) if f.type in (bool, "bool")}
    known |= {flags[question]: answer for question, answer in script.asked.items() if question in flags}
    return Pattern(values, tuple(builder.nodes), results, known)
