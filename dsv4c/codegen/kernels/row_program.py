"""Bodies as programs of one kernel: where each value lies, and the steps that make it, op by op.

A program sees primitives, whatever op they are the body of. It runs on `rows` parts of its operands at once,
none of which needs another: row r of a value is the r-th part of its bytes. What all rows read, such as a
gain, is whole, and what is made of whole values alone every row makes for itself. Elementwise ops in a row
become one loop, all others a call of their device meaning; values that leave the kernel lie in global memory,
what is between them in shared memory, reused when nobody reads it any more. A result that the kernel reads
itself is in both.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dsv4c.errors import BuildError
from dsv4c.ir.graph import Graph, Node, Value
from dsv4c.ir.op import Op, elements
from dsv4c.ir.ops.math import Add, Cast, Clamp, Mul, Scale, Shift, Sigmoid, Silu, SqrtSoftplus
from dsv4c.ir.ops.shape import Reshape, Slice
from dsv4c.types import DType, GlobalScale, QuantFormat, QuantType, Type

ELEMENTWISE = (Add, Mul, Scale, Shift, Clamp, Silu, Sigmoid, SqrtSoftplus, Cast)
NUMBERS = {
    DType.F32: "Float32",
    DType.BF16: "BFloat16",
    DType.F16: "Float16",
    DType.I32: "Int32",
    DType.I64: "Int64",
}
SCRATCH = 272  # bytes that a CTA reduces in
MOST_HELD = 32 * 1024  # bytes of a row's result that lie in shared memory, too


class UnfitError(BuildError):
    """The body is no program on rows."""


@dataclass(frozen=True)
class Home:
    """Where a value lies: in the array that an operand or result of the kernel is (`offset` -1), or in shared
    memory. `type` is that of a row's part if the value is `by_row`.
    """

    name: str
    type: Type
    by_row: bool
    offset: int = -1


@dataclass(frozen=True)
class View:
    """A value that is part of another one's bytes, from element `first` on."""

    name: str
    type: Type
    base: Value
    first: int


@dataclass(frozen=True)
class Loop:
    """Elementwise ops over results of one shape: `kept` are read elsewhere, the others stay in registers."""

    nodes: tuple[Node, ...]
    kept: frozenset[Value]


@dataclass(frozen=True)
class Copy:
    """A result that the kernel reads itself, from shared memory to where it is given back."""

    value: Value


Step = Loop | Node | Copy


@dataclass(frozen=True)
class Program:
    """Steps in order, with a barrier of the CTA between them. `given`: where copied results go."""

    rows: int
    homes: Mapping[Value, Home]
    views: Mapping[Value, View]
    given: Mapping[Value, Home]
    steps: tuple[Step, ...]
    shared: int
    by_row: frozenset[Value]
    names: Mapping[Value, str]

    @property
    def widest(self) -> int:
        """Most elements that a row makes, or reduces, in one step."""
        values = (v for step in self.steps for n in nodes_of(step) for v in (*n.inputs[:1], *n.outputs))
        return max(elements(self.type_of(v)) for v in values)

    def type_of(self, value: Value) -> Type:
        return row_type(value.type, self.rows, value in self.by_row)


def program_of(graph: Graph, rows: int, names: Mapping[Value, str] | None = None) -> Program:
    """The program of a graph of primitives on so many rows; values have these names, or their own. Raises
    UnfitError where rows meet.
    """
    nodes = live(graph.nodes, graph.outputs.values())
    by_row = _by_row(nodes, graph, rows)
    types = {v: row_type(v.type, rows, v in by_row) for v in _values(nodes, graph)}
    results = tuple(graph.outputs.values())
    views = _views(nodes, types, results)
    roots = {v: _root(v, views) for v in types}
    aliases = {n.outputs[r]: n.inputs[o] for n in nodes for r, o in n.op.alias.items()}
    steps = _steps([n for n in nodes if n.outputs[0] not in views], types, roots, results)

    names = names_of(types) if names is None else names
    made = {v for step in steps for node in nodes_of(step) for v in node.outputs}
    read = {roots[v] for step in steps for v in _read(step)}
    copied = {v for v in results if v in made & read and _may_be_held(types[v])} - aliases.keys()
    steps = [each for step in steps for each in (step, *map(Copy, _made(step, copied)))]
    elsewhere = copied | aliases.keys()
    outside = [v for v in (*graph.inputs, *(roots[r] for r in results)) if v not in elsewhere]
    homes = {v: Home(names[v], types[v], v in by_row) for v in outside}
    given = {v: Home(f"{names[v]}_out", types[v], v in by_row) for v in results if v in copied}
    kept = {v for s in steps for v in (s.kept if isinstance(s, Loop) else _made(s, made))}
    # No barrier follows a copy: a later step reads what is copied, so its place is not taken meanwhile.
    last = {roots[v]: index for index, step in enumerate(steps) for v in _read(step)}
    free = _Shared(SCRATCH)
    for index, step in enumerate(steps):
        for value in _made(step, kept - homes.keys() - aliases.keys()):
            offset = free.take(types[value].extent, index, last.get(value, index))
            homes[value] = Home(names[value], types[value], value in by_row, offset)
    named = {v: View(names[v], types[v], *views[v]) for v in views}
    return Program(rows, homes, named, given, tuple(steps), free.size, frozenset(by_row), names)


def row_type(type_: Type, rows: int, by_row: bool) -> Type:
    """The type of one row's part."""
    return type_.with_shape((type_.shape[0] // rows, *type_.shape[1:])) if by_row else type_


# Analysis ---------------------------------------------------------------------------------------------------


def live(nodes: Sequence[Node], results: Iterable[Value]) -> list[Node]:
    """The nodes that results need."""
    wanted = set(results)
    needed = []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            wanted.update(node.inputs)
            needed.append(node)
    return needed[::-1]


def _values(nodes: Sequence[Node], graph: Graph) -> Iterator[Value]:
    yield from graph.inputs
    for node in nodes:
        yield from node.outputs


def _by_row(nodes: Sequence[Node], graph: Graph, rows: int) -> set[Value]:
    """The values that have a part for each row.

    A node keeps rows apart, and then what it reads by row and what it makes have one, or is one for all rows,
    and they are, too; what it reads whole always is. So what is whole spreads from there, through nodes, and
    from those where rows meet. A result that it comes to has no rows: that is an error where they met.
    """
    if rows == 1 and len(nodes) == 1:
        return set()
    linked: dict[Value, list[Value]] = {}
    why: dict[Value, str] = {}  # of what is whole; "" for what is read so
    for node in nodes:
        wanted = node.op.rows_of(tuple(v.type for v in node.inputs))
        together = [v for i, v in enumerate(node.inputs) if wanted and i in wanted] + [*node.outputs]
        if wanted is None:
            why |= dict.fromkeys((*node.inputs, *node.outputs), f"rows meet in {node.op.name}")
        for i, value in enumerate(node.inputs):
            if wanted is not None and i not in wanted:
                why.setdefault(value, "")
        for value in together:
            linked.setdefault(value, []).extend(together)
            if not _divides(value.type, rows):
                why.setdefault(value, f"{node.op.name} has {value.type}, which is not {rows} rows")
    spreads = list(why)
    while spreads:
        value = spreads.pop()
        for other in linked.get(value, ()):
            if other not in why:
                why[other] = why[value]
                spreads.append(other)
    for result in graph.outputs.values():
        if reason := why.get(result):
            raise UnfitError(reason)
    return {v for v in _values(nodes, graph) if v in linked and v not in why}


def _divides(type_: Type, rows: int) -> bool:
    """Whether each component has a part for each row."""
    if isinstance(type_, QuantType):
        format_ = type_.format
        if format_.block[0] != 1 or format_.global_scale is GlobalScale.TENSOR or len(type_.shape) < 2:
            return False
    return bool(type_.shape) and type_.shape[0] % rows == 0


def _views(
    nodes: Sequence[Node], types: Mapping[Value, Type], results: Sequence[Value]
) -> dict[Value, tuple[Value, int]]:
    """Reshapes, and slices that lie together: what they are part of, and from which element on. A result is
    one only if it is all of what the kernel makes anyway.
    """
    views: dict[Value, tuple[Value, int]] = {}
    taken = set(results)
    for node in nodes:
        value, source = node.outputs[0], node.inputs[0] if node.inputs else None
        if source is None or isinstance(types[source], QuantType):
            continue
        root, at = views.get(source, (source, 0))
        if isinstance(node.op, Slice):
            shape = types[source].shape
            axis = node.op.axis % len(shape)
            if math.prod(shape[:axis]) != 1 or value in results:
                continue
            views[value] = root, at + node.op.start * math.prod(shape[axis + 1 :])
        elif isinstance(node.op, Reshape):
            if value in results:
                if root.node is None or root in taken or elements(types[root]) != elements(types[value]):
                    continue
                taken.add(root)
            views[value] = root, at
    return views


def _root(value: Value, views: Mapping[Value, tuple[Value, int]]) -> Value:
    return views[value][0] if value in views else value


def _steps(
    nodes: Sequence[Node],
    types: Mapping[Value, Type],
    roots: Mapping[Value, Value],
    results: Sequence[Value],
) -> list[Step]:
    """Elementwise ops of one shape that follow each other become one loop."""
    readers: dict[Value, list[Node]] = {}
    for node in nodes:
        for value in node.inputs:
            readers.setdefault(roots[value], []).append(node)
    given = {roots[r] for r in results}
    steps: list[Step] = []
    run: list[Node] = []

    def close() -> None:
        if run:
            own = set(run)
            kept = [
                v
                for n in run
                for v in n.outputs
                if v in given or any(reader not in own for reader in readers.get(v, ()))
            ]
            steps.append(Loop(tuple(run), frozenset(kept)))
            run.clear()

    for node in nodes:
        if not isinstance(node.op, ELEMENTWISE):
            close()
            steps.append(node)
            continue
        made = {v for n in run for v in n.outputs}
        shape = types[node.outputs[0]].shape
        same = not run or types[run[0].outputs[0]].shape == shape
        across = any(roots[v] in made and (v not in made or types[v].shape != shape) for v in node.inputs)
        if not same or across:
            close()
        run.append(node)
    close()
    return steps


def nodes_of(step: Step) -> tuple[Node, ...]:
    """What a step computes."""
    if isinstance(step, Copy):
        return ()
    return step.nodes if isinstance(step, Loop) else (step,)


def _may_be_held(type_: Type) -> bool:
    return not isinstance(type_, QuantType) and type_.extent <= MOST_HELD


def _made(step: Step, among: Collection[Value]) -> list[Value]:
    return [v for node in nodes_of(step) for v in node.outputs if v in among]


def _read(step: Step) -> list[Value]:
    """What a step reads that others have made."""
    if isinstance(step, Copy):
        return [step.value]
    own = set(_made(step, [v for node in nodes_of(step) for v in node.outputs]))
    return [v for node in nodes_of(step) for v in node.inputs if v not in own]


class _Shared:
    """Places in shared memory, each taken for a few steps."""

    def __init__(self, size: int) -> None:
        self.base = self.size = size
        self.taken: list[tuple[int, int, int, int]] = []  # offset, end, first and last step

    def take(self, nbytes: int, first: int, last: int) -> int:
        """The lowest place that is free from step `first` to step `last`."""
        busy = sorted(t[:2] for t in self.taken if t[2] <= last and first <= t[3])
        offset = self.base
        for start, end in busy:
            if offset + nbytes <= start:
                break
            offset = max(offset, end)
        self.taken.append((offset, offset + nbytes, first, last))
        self.size = max(self.size, offset + nbytes)
        return offset


def names_of(values: Iterable[Value], taken: Collection[str] = ()) -> dict[Value, str]:
    """Names for a kernel's text, each once and none of those that the text has itself, or that are taken."""
    names: dict[Value, str] = {}
    used = {*RESERVED, *taken}
    for value in values:
        plain = "".join(c if c.isalnum() else "_" for c in value.name)
        name, n = plain, 1
        while name in used:
            n += 1
            name = f"{plain}_{n}"
        used.update((name, f"{name}_i", f"{name}_out"))  # as a number in a loop, as what is given back
        names[value] = name
    return names


MEANINGS = (
    "attention",
    "compress",
    "draft",
    "hyper",
    "index",
    "linear",
    "math",
    "moe",
    "norm",
    "quant",
    "rope",
    "sample",
    "shape",
    "state",
    "values",
)
RESERVED = frozenset(
    {
        *MEANINGS, *dir(builtins), "at", "cuda", "cute", "cutlass", "host", "i", "kernel", "ptx", "put",
        "row", "shared", "stream", "team", "thread", "block", "value"
    }
)  # fmt: skip


# Text -------------------------------------------------------------------------------------------------------


def meaning_of(op: Op) -> tuple[str, str]:
    """Module and name of an op's meaning, which are those of its reference."""
    name = f"{op.name}_" if hasattr(builtins, op.name) else op.name
    return type(op).__module__.rpartition(".")[2], name


def attributes_text(op: Op) -> list[str]:
    """Fields as keywords of a call; types and formats as text."""
    return [f"{name}={_literal(value)}" for name, value in op.attributes().items()]


def _literal(value: object) -> str:
    if isinstance(value, DType | QuantFormat):
        return repr(str(value)).replace("'", '"')
    return repr(value)


def place_lines(program: Program) -> list[str]:
    """Statements that name the program's arrays."""
    homes = (*program.homes.values(), *program.given.values())
    lines = [line for home in homes for line in _place(home, program.rows)]
    for view in program.views.values():
        base = program.homes[view.base].name
        lines.append(f"{view.name} = values.part({base}, {view.first}, {view.type.shape})")
    return lines


def _place(home: Home, rows: int) -> list[str]:
    arrays: list[str] = []
    for component in home.type.components:
        if home.offset < 0:
            pointer = f"m_{home.name}" if component.name == "data" else f"m_{home.name}_{component.name}"
            if home.by_row and rows > 1:
                count = math.prod(component.shape)
                pointer += f" + Int64(row) * {count}"
            arrays.append(f"values.array({pointer}, {component.shape})")
        else:
            at = f"shared + {home.offset + component.offset}"
            number = NUMBERS.get(component.dtype, "Uint8")
            arrays.append(f"values.held({number}, {at}, {component.shape})")
    if not isinstance(home.type, QuantType):
        return [f"{home.name} = {arrays[0]}"]
    named = zip(home.type.components, arrays, strict=True)
    return [
        f"{home.name} = values.Quantized(",
        f'    "{home.type.format}",',
        f"    {home.type.shape},",
        *(f"    {component.name}={array}," for component, array in named),
        ")",
    ]


def step_lines(program: Program, step: Step) -> list[str]:
    """Statements of one step."""
    if isinstance(step, Copy):
        home = program.given[step.value]
        return [f"shape.reshape(team, {_name(program, step.value)}, {home.name}, shape={home.type.shape})"]
    if isinstance(step, Loop):
        count = math.prod(program.type_of(step.nodes[0].outputs[0]).shape)
        body = element_lines(program, step, {})
        return [
            f"for i in cutlass.range(team.thread, {count}, team.threads):",
            *(f"    {line}" for line in body),
        ]
    module, name = meaning_of(step.op)
    results = [v for i, v in enumerate(step.outputs) if i not in step.op.alias]
    arguments = ["team", *(_name(program, v) for v in (*step.inputs, *results)), *attributes_text(step.op)]
    return [f"{module}.{name}({', '.join(arguments)})"]


def _name(program: Program, value: Value) -> str:
    view = program.views.get(value)
    return view.name if view is not None else program.homes[value].name


def element_lines(program: Program, loop: Loop, given: Mapping[Value, str]) -> list[str]:
    """Statements of a loop for element `i`; numbers that are `given` go by these names."""
    over = program.type_of(loop.nodes[0].outputs[0]).shape
    made = dict(given)
    body: list[str] = []
    for node in loop.nodes:
        operands = [
            made[v] if v in made else f"at({_name(program, v)}, {index_text(program.type_of(v).shape, over)})"
            for v in node.inputs
        ]
        value = node.outputs[0]
        _, meaning = meaning_of(node.op)
        call = f"math.{meaning}({', '.join((*operands, *attributes_text(node.op)))})"
        name = program.names[value]
        made[value] = f"{name}_i" if value in loop.kept else name
        body.append(f"{made[value]} = {call}")
        if value in loop.kept:
            body.append(f"put({_name(program, value)}, i, {made[value]})")
    return body


def index_text(shape: tuple[int, ...], over: tuple[int, ...]) -> str:
    """Where element i of an array of shape `over` lies in one of `shape` that is broadcast to it."""
    if math.prod(shape) == math.prod(over):
        return "i"
    if math.prod(shape) == 1:
        return "0"
    padded = (1,) * (len(over) - len(shape)) + shape
    terms = []
    for axis, n in enumerate(padded):
        if n == 1:
            continue
        behind, own = math.prod(over[axis + 1 :]), math.prod(padded[axis + 1 :])
        coordinate = f"i // {behind}" if behind > 1 else "i"
        if math.prod(over[:axis]) > 1:
            coordinate += f" % {n}"
        terms.append(f"{coordinate} * {own}" if own > 1 else coordinate)
    return " + ".join(terms)
