"""Fused ops: a name for a subgraph. Fields, and a body written in other ops.

From the body come the type rule (trace it with the operands' types), the meaning (interpret it), the undo
(expand it) and the matcher: traced with a `Hole` for everything unknown, it tells which attribute of which
node each field reaches. A decision that depends on a hole is traced both ways.
"""

from __future__ import annotations

import inspect
import operator
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from itertools import product
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar

from dsv4c.errors import GraphError
from dsv4c.ir.graph import Builder, Graph, Kind, Node, Value
from dsv4c.ir.op import Cost, Op, expect, register, snake_case
from dsv4c.types import BF16, F32, DType, QuantType, TensorType, Type, parse_type

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
        return Cost(sum(_cost(node).flops for node in self.graph.nodes), reads, writes)

    def _reads(self, value: Value) -> int:
        """Bytes of `value` that the body reads; views and updates of it count with their readers."""
        whole = parts = 0
        for node in self.graph.users[value]:
            through = [r for r, o in node.op.alias.items() if node.inputs[o] is value]
            if node.op.name in ("reshape", "slice"):
                parts += self._reads(node.outputs[0])
            for result in through:
                parts += self._reads(node.outputs[result])
            if node.op.name not in ("reshape", "slice"):
                cost = _cost(node)
                whole = max(whole, *(n for v, n in zip(node.inputs, cost.reads, strict=True) if v is value))
        return max(whole, min(parts, value.type.nbytes))

    def _writes(self, value: Value) -> int:
        assert value.node is not None
        if value.index not in value.node.op.alias:
            return value.type.nbytes
        return _cost(value.node).writes[value.index]


def _cost(node: Node) -> Cost:
    return node.op.cost(tuple(v.type for v in node.inputs), tuple(v.type for v in node.outputs))


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
    seen = _SEEN[type(op)].aliases
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
    with builder:
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
def _parameters(op: type[Fused]) -> tuple[inspect.Parameter, ...]:
    return tuple(p for p in inspect.signature(op.body).parameters.values() if p.name != "self")


def operand_labels(op: type[Fused], count: int) -> list[str]:
    """Names of `count` operands, from the body's signature."""
    labels: list[str] = []
    for p in _parameters(op):
        if p.kind is p.VAR_POSITIONAL:
            labels += [f"{p.name}_{i}" for i in range(count - len(labels))]
        else:
            labels.append(p.name)
    return labels[:count]


def operand_counts(op: type[Fused]) -> tuple[int, ...]:
    """How many operands an occurrence may have, most first; empty for a variadic body, which proposes it."""
    parameters = _parameters(op)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return ()
    least = sum(p.default is p.empty for p in parameters)
    return tuple(range(len(parameters), least - 1, -1))


@_cached
def own_fields(op: type[Fused]) -> tuple[Any, ...]:
    """The declared fields: all but `keep`."""
    return tuple(f for f in fields(op) if f.name != "keep")


# --- tracing with holes ---


class Needs(Exception):  # noqa: N818  (a signal of the tracer, not an error)
    """The trace cannot go on without the value of a hole."""

    def __init__(self, hole: Hole) -> None:
        super().__init__(hole.hole_text)
        self.hole = hole


class _Script:
    """The decisions of one trace: answers given before, then the first alternative of each new question."""

    def __init__(self, answers: Sequence[tuple[Any, ...]], plain: bool) -> None:
        self.given = list(answers)  # per question: the answer, then the alternatives not tried yet
        self.plain = plain  # hand out bare element types, rather than holes that know them
        self.asked: dict[str, Any] = {}

    def ask(self, question: str, alternatives: tuple[Any, ...]) -> Any:
        if question not in self.asked:
            place = len(self.asked)
            if place == len(self.given):
                self.given.append(alternatives)
            self.asked[question] = self.given[place][0]
        return self.asked[question]

    def next(self) -> list[tuple[Any, ...]] | None:
        """The answers of the following trace, or None after the last."""
        rest = self.given[: len(self.asked)]
        while rest and len(rest[-1]) == 1:
            rest.pop()
        return [*rest[:-1], rest[-1][1:]] if rest else None


_script: ContextVar[_Script] = ContextVar("script")
_UNKNOWN = object()


class Hole:
    """Something a trace does not know: a field, a type, or what is computed from them.

    It may be stored as an attribute and computed with. A decision by its truth, its length, its class or a
    comparison asks the script; one by its number raises Needs. Decisions about a `known` value go by that.
    """

    __slots__ = ("hole_field", "hole_known", "hole_text", "hole_type")

    def __init__(self, text: str, *, field: str = "", known: Any = _UNKNOWN, type_: bool = False) -> None:
        self.hole_text, self.hole_field, self.hole_known, self.hole_type = text, field, known, type_

    def __repr__(self) -> str:
        return f"<{self.hole_text}>"

    @property
    def hole_open(self) -> bool:
        return self.hole_known is _UNKNOWN

    def _number(self) -> Any:
        if self.hole_open:
            raise Needs(self)
        return self.hole_known

    def _derive(self, text: str, function: Callable[..., Any], *others: Any) -> Hole:
        given = [self, *others]
        if any(is_hole(v) and v.hole_open for v in given):
            return Hole(text)
        return Hole(text, known=function(*(v.hole_known if is_hole(v) else v for v in given)))

    @property
    def __class__(self) -> type:  # isinstance(x.type, QuantType) is a decision
        if not self.hole_open:
            return type(self.hole_known)
        if not self.hole_type:
            raise Needs(self)
        return _script.get().ask(f"type({self.hole_text})", (TensorType, QuantType))  # type: ignore[no-any-return]

    @__class__.setter
    def __class__(self, _: type) -> NoReturn:
        raise TypeError("a hole keeps its class")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        text = f"{self.hole_text}.{name}"
        if self.hole_type and name == "dtype" and self.hole_open:
            answer = _script.get().ask(text, (BF16, F32))
            return answer if _script.get().plain else Hole(text, known=answer)
        return self._derive(text, lambda v: getattr(v, name))

    def __getitem__(self, key: Any) -> Hole:
        return self._derive(f"{self.hole_text}[{key}]", operator.getitem, key)

    def __call__(self, *arguments: Any, **named: Any) -> Hole:
        return self._derive(f"{self.hole_text}(...)", lambda f, *a: f(*a, **named), *arguments)

    def __len__(self) -> int:
        if self.hole_open:
            return int(_script.get().ask(f"len({self.hole_text})", (3, 2, 1, 4)))
        return len(self.hole_known)

    def __iter__(self) -> Iterator[Hole]:
        return iter([self[i] for i in range(len(self))])

    def __bool__(self) -> bool:
        if self.hole_open:
            return bool(_script.get().ask(self.hole_text, (True, False)))
        return bool(self.hole_known)

    def __index__(self) -> int:
        return operator.index(self._number())

    def __int__(self) -> int:
        return int(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def __hash__(self) -> int:
        return hash(self._number())

    def __neg__(self) -> Hole:
        return self._derive(f"-{self.hole_text}", operator.neg)


def _operator(name: str, reflected: bool) -> Callable[[Hole, Any], Hole]:
    function = getattr(operator, name)

    def apply(self: Hole, other: Any) -> Hole:
        given = (lambda a, b: function(b, a)) if reflected else function
        return self._derive(f"({self.hole_text} {name} {other})", given, other)

    return apply


def _comparison(name: str) -> Callable[[Hole, object], bool]:
    function = getattr(operator, name)

    def compare(self: Hole, other: object) -> bool:
        return bool(self._derive(f"({self.hole_text} {name} {other})", function, other))

    return compare


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(Hole, f"__{_name}__", _operator(_name, False))
    setattr(Hole, f"__r{_name}__", _operator(_name, True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Hole, f"__{_name}__", _comparison(_name))


def is_hole(value: Any) -> typing.TypeGuard[Hole]:
    return type(value) is Hole


def holes_in(value: Any) -> Iterator[Hole]:
    """Holes in an attribute, inside tuples too."""
    if is_hole(value):
        yield value
    elif type(value) is tuple:
        for part in value:
            yield from holes_in(part)


def _filled(value: Any) -> Any:
    """An attribute with its holes replaced by their known values."""
    if is_hole(value):
        return value.hole_known
    return tuple(map(_filled, value)) if type(value) is tuple else value


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
            exact = type(op)(**{k: _filled(v) for k, v in attributes.items()})
            types_ = [
                Hole("", known=t, type_=True) for t in exact.results(tuple(_filled(v.type) for v in inputs))
            ]
        for i, type_ in enumerate(types_):
            label = self._claim(self.fresh(name or op.name))
            type_.hole_text = f"{label}.type"
            node.outputs += (Value(label, type_, Kind.RESULT, node, i),)
        self.nodes.append(node)
        return node.outputs


@dataclass
class _Seen:
    """What the shapes of a body had in common when it was registered."""

    results: set[int] = field(default_factory=set)
    aliases: list[dict[int, int]] = field(default_factory=list)


_SEEN: dict[type[Fused], _Seen] = {}


def result_count(op: Op, operands: int) -> int:
    """How many results an op has, types unknown: from the annotation of its type rule, or its body."""
    if isinstance(op, Fused):
        seen = _SEEN[type(op)].results
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
        script = _Script(answers, plain)
        token = _script.set(script)
        try:
            yield _draw_once(op, attributes, operands, script)
            drawn += 1
        except (GraphError, ValueError, TypeError, IndexError) as error:
            refused = (
                error  # decisions that do not go together, such as a shape of two numbers unpacked to three
            )
        finally:
            _script.reset(token)
        answers = script.next()
    if not drawn:
        raise GraphError(f"{op.name}: the body cannot be traced: {refused}") from refused


def _draw_once(
    op: type[Fused], attributes: Mapping[str, Any], operands: Mapping[str, Any], script: _Script
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


# --- registration ---

F = TypeVar("F", bound=type[Fused])


@typing.dataclass_transform(frozen_default=True)
def fused(cls: F) -> F:
    """Declare a fused op: freezes the dataclass, names it after the class, checks its body, registers it.

    Raises GraphError when an attribute of an op in the body is a constant that `literals` does not name, when
    a field reaches no attribute and nothing proposes it, or when the body falls into unconnected parts.
    """
    made: Any = dataclass(frozen=True)(cls)
    if "name" not in cls.__dict__:
        made.name = snake_case(cls.__name__)
    check(made)
    register(made)
    return made  # type: ignore[no-any-return]


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


def proposes(op: type[Fused]) -> bool:
    return op.propose.__func__ is not Fused.propose.__func__  # type: ignore[attr-defined]


def check(op: type[Fused]) -> None:
    """The registration check of `fused`, over every shape that operands and fields give the body."""
    expect(hasattr(op, "body"), f"{op.name} declares no body")
    counts = operand_counts(op)
    expect(
        not proposes(op) or op.anchor is not None, f"{op.name} proposes fields; say at which op in `anchor`"
    )
    expect(bool(counts) or proposes(op), f"{op.name} has a variadic body; propose the number of operands")
    optional = optional_fields(op)
    reached: set[str] = set()
    seen = _SEEN.setdefault(op, _Seen())
    shapes = product(counts or (_example_count(op),), product((False, True), repeat=len(optional)))
    for count, absent in shapes:
        without = {name for name, gone in zip(optional, absent, strict=True) if gone}
        for pattern in _draw_example(op, count, without):
            _check_literals(op, pattern, without)
            _check_connected(op, pattern)
            alias = alias_of_trace(pattern.operands, pattern.nodes, pattern.results)
            seen.results.add(len(pattern.results))
            seen.aliases += [alias] if alias not in seen.aliases else []
            for node in pattern.nodes:
                for attribute in node.op.attributes().values():
                    reached |= {h.hole_field for h in holes_in(attribute)}
    for f in own_fields(op):
        expect(
            f.name in reached or proposes(op) or f.type in (bool, "bool"),
            f"{op.name}: the field {f.name} reaches no attribute of the body, so no match can capture it; "
            f"pass it to an op or propose it",
        )


def _example_count(op: type[Fused]) -> int:
    least = sum(p.kind is not p.VAR_POSITIONAL for p in _parameters(op))
    return int(op.example.get(OPERANDS, least + 2))


def _draw_example(op: type[Fused], count: int, without: set[str]) -> Iterator[Pattern]:
    example = {k: parse_type(v) if isinstance(v, str) and "[" in v else v for k, v in op.example.items()}
    attributes: dict[str, Any] = {}
    for f in own_fields(op):
        unknown = 2 if f.type in (int, "int") and proposes(op) else _UNKNOWN
        known = example.get(f.name, unknown)
        attributes[f.name] = None if f.name in without else Hole(f"self.{f.name}", field=f.name, known=known)
    operands = {
        n: Hole(f"{n}.type", known=example.get(n, _UNKNOWN), type_=True) for n in operand_labels(op, count)
    }
    try:
        yield from draw(op, attributes, operands, plain=False)
    except Needs as signal:
        raise GraphError(
            f"{op.name}: the body depends on the number {signal.hole.hole_text}; give it (or the type of "
            f"the operand) in `example`, so that the body can be checked here"
        ) from None


def _check_literals(op: type[Fused], pattern: Pattern, without: set[str]) -> None:
    for node in pattern.nodes:
        for name, value in node.op.attributes().items():
            if any(True for _ in holes_in(value)) or f"{node.op.name}.{name}" in op.literals:
                continue
            if value is None and without:  # an absent field, passed on
                continue
            raise GraphError(
                f"{op.name}: {node.op.name}.{name} is {value} in the body: capture it in a field, derive it "
                f"from an operand's type, or, if no other value may match, name it in `literals` as "
                f'"{node.op.name}.{name}"'
            )


def _check_connected(op: type[Fused], pattern: Pattern) -> None:
    expect(bool(pattern.nodes), f"{op.name} has an empty body")
    group = {v: v for v in pattern.operands}

    def find(value: Value) -> Value:
        while group[value] is not value:
            value = group[value]
        return value

    for node in pattern.nodes:
        group.update({v: v for v in node.outputs})
        for value in (*node.inputs, *node.outputs):
            group[find(value)] = find(node.outputs[0])
    unread = [v.name for v in pattern.operands if not any(v in node.inputs for node in pattern.nodes)]
    expect(not unread, f"{op.name}: the body never reads {', '.join(unread)}")
    near = [v for v in pattern.operands if v.name not in op.apart]
    for value in pattern.operands:
        if value.name in op.apart:
            group[find(value)] = find(near[0])
    expect(
        len({find(v) for v in group}) == 1,
        f"{op.name}: the body falls into parts that share no value; propose one's operands, see `apart`",
    )
