"""The program: values, nodes, graphs, and the builder that makes them.

A graph is a list of nodes in execution order over four kinds of values: inputs, states, params, node results.
Graphs are frozen once built; a pass makes a new one with `Builder.like` and `Builder.copy`.
State is a value: a node that overwrites a buffer returns the new value; `Op.alias` says which operand it was.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property

from dsv4c.errors import GraphError
from dsv4c.ir.op import Cost, Op
from dsv4c.scope import Scope
from dsv4c.types import Type


class Kind(enum.Enum):
    """Where a value comes from."""

    INPUT = "input"  # given at every call
    STATE = "state"  # kept between calls
    PARAM = "param"  # a weight, constant for the life of a session
    RESULT = "result"  # made by a node


class Value:
    """One typed value. Identity is the object; `name` is unique within its graph.

    type: `TensorType` or `QuantType` (`dsv4c.types`): `x.type.shape` is a tuple of ints, `x.type.nbytes` the
    bytes it takes; a plain tensor has `x.type.dtype`, a quantized one its `format`. kind: input, state,
    param or result. node: the node that makes a result, of whose outputs it is number `index`; else None.

    In the body of a fused op, `x.type` may not be known yet: compare shapes and dtypes with ==, and the trace
    follows both ways. Add operations by calling ops (`dsv4c.ir.ops`) with values.
    """

    __slots__ = ("index", "kind", "name", "node", "type")

    def __init__(self, name: str, type_: Type, kind: Kind, node: Node | None = None, index: int = 0) -> None:
        self.name, self.type, self.kind, self.node, self.index = name, type_, kind, node, index

    @property
    def place(self) -> Scope:
        """Where it stands in the model, by its name."""
        return Scope.of(self.name)

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"


class Node:
    """One op applied to values. `origin` names the unfused results it stands for (its own when empty)."""

    __slots__ = ("inputs", "op", "origin", "outputs", "scope")

    def __init__(self, op: Op, inputs: tuple[Value, ...], scope: str, origin: tuple[str, ...] = ()) -> None:
        self.op, self.inputs, self.scope, self.origin = op, inputs, scope, origin
        self.outputs: tuple[Value, ...] = ()

    @property
    def name(self) -> str:
        """A node goes by the name of its first result."""
        return self.outputs[0].name

    @property
    def place(self) -> Scope:
        """Where it stands in the model, by its scope."""
        return Scope.of(self.scope)

    @property
    def weight(self) -> Value | None:
        """The operand that is the op's weight; None without one."""
        place = self.op.weight
        return self.inputs[place] if place is not None and place < len(self.inputs) else None

    @property
    def provenance(self) -> tuple[str, ...]:
        """Names of the results of the unfused graph that this node computes."""
        return self.origin or tuple(v.name for v in self.outputs)

    @property
    def cost(self) -> Cost:
        """What its op costs on values of these types."""
        return self.op.cost(tuple(v.type for v in self.inputs), tuple(v.type for v in self.outputs))

    def __repr__(self) -> str:
        return f"{', '.join('%' + v.name for v in self.outputs)} = {self.op.name}(...)"


class Graph:
    """A frozen program. Equality and hash are structural: they ignore the names of node results and the
    order of nodes that do not depend on each other.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[Value],
        states: Sequence[Value],
        params: Sequence[Value],
        nodes: Sequence[Node],
        outputs: Mapping[str, Value],
    ) -> None:
        self.name = name
        self.inputs, self.states, self.params = tuple(inputs), tuple(states), tuple(params)
        self.nodes = tuple(nodes)
        self.outputs = dict(outputs)

    @cached_property
    def users(self) -> dict[Value, list[Node]]:
        """Nodes that read each value, in order, once per node."""
        users: dict[Value, list[Node]] = {v: [] for v in self.values()}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                users[value].append(node)
        return users

    def values(self) -> Iterator[Value]:
        """Inputs, states, params, then the results of all nodes in order."""
        yield from self.inputs
        yield from self.states
        yield from self.params
        for node in self.nodes:
            yield from node.outputs

    @cached_property
    def by_name(self) -> dict[str, Value]:
        return {v.name: v for v in self.values()}

    @cached_property
    def root_of(self) -> dict[Value, Value]:
        """For every value that lives in a state's buffer (the state or a write to it), that state."""
        roots = {s: s for s in self.states}
        for node in self.nodes:
            for result, operand in node.op.alias.items():
                root = roots.get(node.inputs[operand])
                if root is not None:
                    roots[node.outputs[result]] = root
        return roots

    @cached_property
    def finals(self) -> dict[Value, Value]:
        """Each state's value at the end of a call: the last write of its alias chain, or the state itself."""
        return {root: value for value, root in self.root_of.items()}

    @cached_property
    def digest(self) -> str:
        """Structural hash: ops, wiring, types, and the names of inputs, states, params and outputs."""
        nodes = self._from_outputs()
        given = (*self.inputs, *self.states, *self.params)
        number = {v: i for i, v in enumerate((*given, *(v for node in nodes for v in node.outputs)))}
        h = hashlib.sha256()
        for values in (self.inputs, self.states, self.params):
            h.update(repr([(v.kind.value, v.name, str(v.type)) for v in values]).encode())
        for node in nodes:
            wiring = [number[v] for v in node.inputs]
            h.update(f"{node.op!r}{wiring}{[str(v.type) for v in node.outputs]}".encode())
        h.update(repr([(name, number[v]) for name, v in self.outputs.items()]).encode())
        return h.hexdigest()

    def _from_outputs(self) -> list[Node]:
        """All nodes, makers before readers, as a walk back from the outputs and the last writes meets them:
        wiring alone decides this order. What neither depends on follows in its own."""
        ends = [v.node for v in (*self.outputs.values(), *self.finals.values())]
        ordered: list[Node] = []
        seen: set[Node] = set()
        for end in (*ends, *self.nodes):
            if end is None or end in seen:
                continue
            seen.add(end)
            stack = [(end, iter(end.inputs))]
            while stack:
                node, operands = stack[-1]
                maker = next((v.node for v in operands if v.node is not None and v.node not in seen), None)
                if maker is None:
                    ordered.append(node)
                    stack.pop()
                else:
                    seen.add(maker)
                    stack.append((maker, iter(maker.inputs)))
        return ordered

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        counts = f"{len(self.nodes)} nodes, {len(self.params)} params, {len(self.states)} states"
        return f"<graph {self.name}: {counts}>"


_builders: ContextVar[tuple[Builder, ...]] = ContextVar("builders", default=())


def current_builder() -> Builder:
    """The innermost builder in a `with` block. Raises GraphError outside of one."""
    stack = _builders.get()
    if not stack:
        raise GraphError("ops are applied inside `with Builder(name):`; no graph is being built here")
    return stack[-1]


class Builder:
    """Builds one graph; `with Builder("name") as b:` makes it the target of op calls."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: list[Value] = []
        self.states: list[Value] = []
        self.params: list[Value] = []
        self.nodes: list[Node] = []
        self._scope: str = ""
        self._names: set[str] = set()
        self._counters: dict[str, int] = {}

    @classmethod
    def like(cls, graph: Graph) -> tuple[Builder, dict[Value, Value]]:
        """A builder with the same signature as `graph`, and the map from its values to the new ones."""
        new = cls(graph.name)
        declare = {Kind.INPUT: new.input, Kind.STATE: new.state, Kind.PARAM: new.param}
        return new, {
            v: declare[v.kind](v.name, v.type) for v in (*graph.inputs, *graph.states, *graph.params)
        }

    def __enter__(self) -> Builder:
        _builders.set((*_builders.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        _builders.set(_builders.get()[:-1])

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Nodes built inside get `name` appended to their scope."""
        outer = self._scope
        self._scope = f"{outer}.{name}" if outer else name
        try:
            yield
        finally:
            self._scope = outer

    def _claim(self, name: str) -> str:
        if name in self._names:
            raise GraphError(f"the name %{name} is already taken in graph {self.name}")
        self._names.add(name)
        return name

    def fresh(self, name: str) -> str:
        """`name`, or `name_2`, `name_3`, ... when taken."""
        if name not in self._names:
            return name
        n = self._counters.get(name, 1) + 1
        while f"{name}_{n}" in self._names:
            n += 1
        self._counters[name] = n
        return f"{name}_{n}"

    def rename(self, value: Value, name: str) -> None:
        """Give a node's result another name below the current scope."""
        self._names.remove(value.name)
        value.name = self._claim(self.fresh(f"{self._scope}.{name}" if self._scope else name))

    def _declare(self, group: list[Value], name: str, type_: Type, kind: Kind) -> Value:
        value = Value(self._claim(name), type_, kind)
        group.append(value)
        return value

    def input(self, name: str, type_: Type) -> Value:
        """Declare what a call gives. Raises GraphError for a name that is taken."""
        return self._declare(self.inputs, name, type_, Kind.INPUT)

    def state(self, name: str, type_: Type) -> Value:
        """Declare a buffer that is kept between calls. Raises GraphError for a name that is taken."""
        return self._declare(self.states, name, type_, Kind.STATE)

    def param(self, name: str, type_: Type) -> Value:
        """Declare a weight. Raises GraphError for a name that is taken."""
        return self._declare(self.params, name, type_, Kind.PARAM)

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
        """Append a node. `name` is a hint below the scope; `names` are whole names of all results.

        Raises GraphError, naming the place, when the type rule refuses the operands.
        """
        scope = self._scope if scope is None else scope
        hint = f"{scope}.{name or op.name}" if scope else name or op.name
        try:
            types = op.results(tuple(v.type for v in inputs))
        except GraphError as error:
            operands = ", ".join(map(repr, inputs))
            raise GraphError(f"at {names[0] if names else hint}: {op.name}({operands}): {error}") from None
        node = Node(op, inputs, scope, tuple(origin))
        if not names:
            names = [self.fresh(hint if i == 0 else f"{hint}.{i}") for i in range(len(types))]
        if len(names) != len(types):
            raise GraphError(f"at {names[0]}: {op.name} has {len(types)} results, not {len(names)}")
        node.outputs = tuple(
            Value(self._claim(n), t, Kind.RESULT, node, i)
            for i, (n, t) in enumerate(zip(names, types, strict=True))
        )
        self.nodes.append(node)
        return node.outputs

    def copy(self, node: Node, values: dict[Value, Value]) -> None:
        """Append `node` over mapped operands, keeping names, scope and origin; extends the map."""
        inputs = tuple(values[v] for v in node.inputs)
        outputs = self.emit(
            node.op, inputs, names=[v.name for v in node.outputs], scope=node.scope, origin=node.origin
        )
        values.update(zip(node.outputs, outputs, strict=True))

    def finish(self, outputs: Mapping[str, Value]) -> Graph:
        """The graph, with these outputs by label; `dsv4c.ir.verify.verify` judges it."""
        return Graph(self.name, self.inputs, self.states, self.params, self.nodes, outputs)


def rewrite(
    graph: Graph, visit: Callable[[Builder, Node, dict[Value, Value]], bool], name: str | None = None
) -> Graph:
    """Rebuild `graph` node by node. `visit(builder, node, values)` emits a replacement and maps the node's
    outputs in `values`, returning True; or returns False to have the node copied."""
    builder, values = Builder.like(graph)
    with builder:
        for node in graph.nodes:
            if not visit(builder, node, values):
                builder.copy(node, values)
    new = builder.finish({key: values[v] for key, v in graph.outputs.items()})
    new.name = name or graph.name
    return new
