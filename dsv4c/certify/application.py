"""The ways in which rules applied: the replaced nodes, as a graph of their own, beside the fused op.

What is evaluated has sizes cut down where ops allow it, and goes by a digest of all that decides the result.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from platform import machine
from typing import Any

from dsv4c.errors import GraphError
from dsv4c.ir.fused import Fused, trace
from dsv4c.ir.graph import Builder, Graph, Kind, Value
from dsv4c.ir.op import Op
from dsv4c.ir.text import print_graph
from dsv4c.passes.expand import expand
from dsv4c.passes.work import Match
from dsv4c.types import Type

VERSION = 2  # of the procedure and of a certificate's fields; part of every digest


@dataclass(frozen=True)
class Application:
    """One way a rule applied: the op, the nodes it replaced as a graph over its operands, how often."""

    op: Fused
    nodes: Graph  # the operands as inputs, in the order in which the fused op takes them
    operands: tuple[int, ...]  # input of `nodes` that is each operand of the op
    rows: tuple[
        int, ...
    ] = ()  # inputs with a row per token, as far as their kind tells: neither weight nor state
    count: int = 1

    @property
    def rule(self) -> str:
        return self.op.name

    @property
    def types(self) -> tuple[Type, ...]:
        return tuple(self.nodes.inputs[i].type for i in self.operands)

    @property
    def digest(self) -> str:
        text = f"{VERSION} {sources()} {_declaration(self.op.__class__.__module__)} {self.op!r} "
        text += f"{self.operands} {print_graph(self.nodes)}"
        text += print_graph(trace(self.op, self.types).graph)
        return sha256(text.encode()).hexdigest()


def applications(matches: Iterable[Match]) -> list[Application]:
    """The distinct ways the rules applied, in order of first appearance."""
    found: dict[Any, Application] = {}
    for match in matches:
        key = _key(match)
        old = found.get(key)
        found[key] = application(match) if old is None else replace(old, count=old.count + 1)
    return list(found.values())


def _key(match: Match) -> tuple[Any, ...]:
    """Equal for matches with the same op, nodes, wiring and types."""
    number = {v: i for i, v in enumerate(match.operands)}
    wiring = []
    for node in match.nodes:
        wiring.append((node.op, tuple(number.setdefault(v, len(number)) for v in node.inputs)))
        for v in node.outputs:
            number[v] = len(number)
    types = tuple(v.type for v in match.operands)
    return match.op, types, tuple(number[v] for v in match.operands), tuple(wiring)


def application(match: Match) -> Application:
    """The matched nodes as a graph of their own, wired as the nodes themselves say.

    Raises GraphError when the op does not read exactly what its nodes read.
    """
    made = {v for node in match.nodes for v in node.outputs}
    external = list(dict.fromkeys(v for node in match.nodes for v in node.inputs if v not in made))
    if set(external) != set(match.operands):
        odd = sorted(v.name for v in set(external) ^ set(match.operands))
        raise GraphError(f"{match.op.name} {match.name}: operand {', '.join(odd)} is not read by both sides")
    order = list(dict.fromkeys(match.operands))
    builder = Builder(match.op.name)
    values = {v: builder.input(f"x{i}", v.type) for i, v in enumerate(order)}
    for i, node in enumerate(match.nodes):
        names = [f"v{i}" if j == 0 else f"v{i}.{j}" for j in range(len(node.outputs))]
        outputs = builder.emit(node.op, tuple(values[v] for v in node.inputs), names=names, scope="")
        values.update(zip(node.outputs, outputs, strict=True))
    kept = match.op.kept(match.results)
    graph = builder.finish({str(i): values[v] for i, v in enumerate(kept)})
    rows = tuple(i for i, v in enumerate(order) if v.kind in (Kind.INPUT, Kind.RESULT))
    return Application(match.op, graph, tuple(order.index(v) for v in match.operands), rows)


# --- cutting sizes down ---

SMALL = 512  # dimensions up to this stay


@cache
def _smaller(size: int) -> tuple[int, ...]:
    return tuple(n for n in (8, 256, 384, 512, 640, 1024) if n < size and (n > 8 or size <= 1024))


def reduce_sizes(applied: Application) -> Application:
    """The same application with fewer rows, dimensions up to 512 or so, 8 experts, where ops accept it."""
    applied = _fewer_rows(applied)
    experts = {
        n.inputs[table].type.shape[dimension]
        for n in _primitives(applied.nodes).nodes
        if n.op.product
        for table, dimension in n.op.picks.values()
    }
    sizes = {n for v in applied.nodes.inputs for n in v.type.shape if n > SMALL or n in experts}
    taken: set[int] = set()
    for size in sorted(sizes):
        candidates = (8,) if size in experts else [n for n in _smaller(size) if n > 8 and n not in taken]
        for multiples in (False,) if size in experts else (True, False):
            new = next(filter(None, (_resized(applied, size, n, multiples) for n in candidates)), None)
            if new is not None:
                applied, done = new
                taken.add(done)
                break
    return applied


def _primitives(graph: Graph) -> Graph:
    return expand(graph) if any(isinstance(n.op, Fused) for n in graph.nodes) else graph


ROWS = 5


def _fewer_rows(applied: Application) -> Application:
    """With 5 tokens where there are more; their count is the leading dimension that most operands share."""
    leading = [
        applied.nodes.inputs[i].type.shape[0] for i in applied.rows if applied.nodes.inputs[i].type.shape
    ]
    count = max(leading, key=leading.count, default=0)
    if count <= ROWS:
        return applied
    shapes = [v.type.shape for v in applied.nodes.inputs]
    for i in applied.rows:
        if shapes[i][:1] == (count,):
            shapes[i] = (ROWS, *shapes[i][1:])
    return _reshaped(applied, shapes) or applied


def _resized(applied: Application, size: int, new: int, multiples: bool) -> tuple[Application, int] | None:
    """`applied` with dimension `size` (and its multiples) as `new`, or None where an op refuses."""

    def resize(n: int) -> int:
        if n == size:
            return new
        return n // size * new if multiples and n % size == 0 else n

    resized = _reshaped(applied, [tuple(map(resize, v.type.shape)) for v in applied.nodes.inputs])
    return None if resized is None else (resized, new)


def _reshaped(applied: Application, shapes: Sequence[tuple[int, ...]]) -> Application | None:
    """`applied` with operands of these shapes, or None where an op refuses."""
    try:
        types = [v.type.with_shape(shape) for v, shape in zip(applied.nodes.inputs, shapes, strict=True)]
        body = trace(applied.op, tuple(types[i] for i in applied.operands)).graph
        builder = Builder(applied.nodes.name)
        values: dict[Value, Value] = {
            v: builder.input(v.name, t) for v, t in zip(applied.nodes.inputs, types, strict=True)
        }
        for node, traced in zip(applied.nodes.nodes, body.nodes, strict=True):
            op = _regrown(node.op, traced.op)
            outputs = builder.emit(
                op, tuple(values[v] for v in node.inputs), names=[v.name for v in node.outputs]
            )
            values.update(zip(node.outputs, outputs, strict=True))
    except (GraphError, ValueError):
        return None
    graph = builder.finish({k: values[v] for k, v in applied.nodes.outputs.items()})
    return replace(applied, nodes=graph)


def _regrown(op: Op, traced: Op) -> Op:
    """`op` with the geometry that the traced body has at the smaller size; every other attribute its own."""
    if type(op) is not type(traced):
        return op
    changed = {k: v for k, v in traced.attributes().items() if k in op.geometry}
    return replace(op, **changed) if changed else op  # type: ignore[type-var]


# --- the digest ---


@cache
def sources() -> str:
    """Digest of what decides a certificate besides its op and nodes: the meanings and this procedure, by
    their sources, and the library that computes.
    """
    package = Path(__file__).parents[1]
    files = [f for room in ("ir", "numerics", "reference") for f in sorted((package / room).rglob("*.py"))]
    files += sorted((package / "certify").rglob("*.py"))
    files += [package / "passes" / "expand.py"]
    h = sha256(f"torch {version('torch')} on {machine()}".encode())
    for path in (package / "types.py", *files):
        h.update(path.read_bytes())
    return h.hexdigest()


@cache
def _declaration(module: str) -> str:
    """Digest of the module that declares a fused op, where it may have a meaning of its own."""
    file = getattr(sys.modules[module], "__file__", None)
    return sha256(Path(file).read_bytes()).hexdigest() if file else ""
