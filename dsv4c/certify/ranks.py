"""Certificates of a sharded graph: what each exchange gives is what the whole model has there.

An exchange's part of the graph is what ranks hold apart, back to values that all of them have. Left, these
nodes on whole weights; right, the nodes of every rank on its parts, and the exchange. Gathers are bit-exact.
Sums have their addends in f32 and are rounded once: in another order, and where the whole model rounds every
expert's product by itself, without that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch

from dsv4c.cache import Store, cache_folder
from dsv4c.certify.adversarial import operands_for
from dsv4c.certify.application import VERSION, sources
from dsv4c.certify.compare import compare
from dsv4c.certify.evaluate import PATTERNS
from dsv4c.certify.finding import (
    APPROXIMATE,
    BIT_EXACT,
    DIFFERENT,
    Certificate,
    Finding,
    from_dict,
    to_dict,
    worse,
)
from dsv4c.errors import GraphError
from dsv4c.ir.graph import Builder, Graph, Node, Value
from dsv4c.ir.ops.collective import AllGather
from dsv4c.ir.text import print_op
from dsv4c.numerics import codec
from dsv4c.numerics.codec import part_of, parts_of
from dsv4c.passes.placement import REPLICATED, Placement, cut, placements
from dsv4c.reference.interpret import clone, interpret
from dsv4c.reference.ranks import interpret_ranks
from dsv4c.threads import threads

Given = list[dict[str, codec.Value]]
"""What every rank has of an exchange's operands, by name."""


@dataclass(frozen=True)
class Region:
    """An exchange's part of a graph: of the whole model, with its operands as inputs; and a rank's, with its
    own as params. `axes` are the dimensions along which operands are cut.
    """

    name: str
    whole: Graph
    local: Graph
    axes: Mapping[str, int]
    ranks: int
    count: int = 1

    @property
    def digest(self) -> str:
        """Of all that decides its certificate."""
        text = f"{VERSION} {sources()} {self.whole.digest} {self.local.digest} {sorted(self.axes.items())}"
        return sha256(text.encode()).hexdigest()

    @property
    def exchange(self) -> Node:
        return self.local.nodes[-1]


def slices_of(graph: Graph, sharded: Graph) -> dict[str, Placement]:
    """How the params of a sharded graph are placed, by what is left of their shapes."""
    found = {}
    for param in sharded.params:
        shape = graph.by_name[param.name].type.shape
        axes = [i for i, (n, m) in enumerate(zip(shape, param.type.shape, strict=True)) if n != m]
        if len(axes) > 1:
            raise GraphError(f"%{param.name}: {param.type} is cut twice, of {list(shape)}")
        if axes:
            found[param.name] = cut(axes[0])
    return found


def regions(graph: Graph, sharded: Graph, ranks: int) -> list[Region]:
    """The distinct ones, in order of first appearance. Raises GraphError for a graph that is ill placed."""
    cuts = slices_of(graph, sharded)
    placed = placements(sharded, cuts)
    found: dict[tuple[str, str], Region] = {}
    for node in sharded.nodes:
        if node.op.collective:
            made = _region(graph, sharded, node, placed, ranks)
            key = made.whole.digest, made.local.digest
            known = found.get(key)
            found[key] = made if known is None else replace(known, count=known.count + 1)
    return list(found.values())


def _region(
    graph: Graph, sharded: Graph, exchange: Node, placed: Mapping[Value, Placement], ranks: int
) -> Region:
    nodes = _apart(sharded, exchange, placed)
    inside = {v for n in nodes for v in n.outputs}
    given = list(dict.fromkeys(v for n in (*nodes, exchange) for v in n.inputs if v not in inside))
    names = {v: f"x{i}" for i, v in enumerate(given)}
    before = {  # what an exchange made, by its name in the whole model
        made: (made.name if made.name in graph.by_name else operand.name)
        for n in sharded.nodes
        if n.op.collective
        for made, operand in zip(n.outputs, n.inputs, strict=True)
    }
    local, whole = Builder("rank"), Builder("whole")
    ours: dict[Value, Value] = {v: local.param(names[v], v.type) for v in given}
    theirs: dict[str, Value] = {}
    for v in given:
        name = before.get(v, v.name)
        theirs[name] = whole.input(names[v], graph.by_name[name].type)
    results = [before[v] for v in exchange.outputs]
    last = [made for name in results if (made := graph.by_name[name].node) is not None]
    for n in (*nodes, exchange):
        outputs = local.emit(n.op, tuple(ours[v] for v in n.inputs), scope="")
        ours.update(zip(n.outputs, outputs, strict=True))
    for n in dict.fromkeys((*(_counterpart(graph, n) for n in nodes), *last)):
        outputs = whole.emit(n.op, tuple(theirs[v.name] for v in n.inputs), scope="")
        theirs.update(zip((v.name for v in n.outputs), outputs, strict=True))
    return Region(
        exchange.name,
        whole.finish({str(i): theirs[name] for i, name in enumerate(results)}),
        local.finish({str(i): ours[v] for i, v in enumerate(exchange.outputs)}),
        {names[v]: placed[v].axis for v in given if placed[v].kind == "cut"},
        ranks,
    )


def _apart(graph: Graph, exchange: Node, placed: Mapping[Value, Placement]) -> list[Node]:
    """The nodes that an exchange joins the results of, in order."""
    wanted, found = set(exchange.inputs), []
    for node in reversed(graph.nodes):
        if not wanted.isdisjoint(node.outputs) and placed[node.outputs[0]] != REPLICATED:
            found.append(node)
            wanted.update(node.inputs)
    return found[::-1]


def _counterpart(graph: Graph, node: Node) -> Node:
    """The node of the whole model that makes what a rank's makes a part of."""
    found = graph.by_name[node.name].node
    assert found is not None
    return found


def evaluate(
    region: Region, pattern: str, seed: int, change: Callable[[Given], Given] | None = None
) -> Finding:
    """The two sides of a region on operands of a pattern; `change` alters what ranks are given."""
    operands = operands_for(region.whole, pattern, seed)
    whole = {v.name: value for v, value in zip(region.whole.inputs, operands, strict=True)}
    expected = list(interpret(region.whole, {n: clone(v) for n, v in whole.items()}, {}, {}).values())
    given = [
        {
            name: clone(
                part_of(value, region.axes[name], region.ranks, rank) if name in region.axes else value
            )
            for name, value in whole.items()
        }
        for rank in range(region.ranks)
    ]
    made = interpret_ranks(region.local, {}, [{}] * region.ranks, given if change is None else change(given))
    worst = Finding(BIT_EXACT, 0.0, "")
    for rank, results in enumerate(made):
        found = list(results.values())
        worst = worse(worst, compare(expected, found, f"{pattern}: rank {rank}"))
        if any(not _same(a, b) for a, b in zip(found, made[0].values(), strict=True)):
            worst = Finding(DIFFERENT, 0.0, f"{pattern}: rank {rank} has other bits than rank 0")
    return worst


def _same(a: codec.Value, b: codec.Value) -> bool:
    parts = zip(parts_of(a).values(), parts_of(b).values(), strict=True)
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in parts)


def allowed(region: Region) -> str:
    """The worst kind of difference that an exchange may show."""
    return BIT_EXACT if isinstance(region.exchange.op, AllGather) else APPROXIMATE


def certify_ranks(
    graph: Graph, sharded: Graph, ranks: int, folder: Path | None = None, *, fresh: bool = False
) -> list[Certificate]:
    """One for every distinct exchange of a sharded graph, beside the graph that it was made from; kept in
    `folder` (None: the user's cache) by all that decides it.
    """
    store = Store(cache_folder() / "certificates" if folder is None else folder)
    found = []
    for region in regions(graph, sharded, ranks):
        kept = None if fresh else store.get(region.digest)
        if kept is None:
            certificate = certified(region)
            store.put(region.digest, json.dumps(to_dict(certificate)).encode())
        else:
            certificate = from_dict(json.loads(kept))
        found.append(replace(certificate, count=region.count))
    return found


def certified(region: Region) -> Certificate:
    """Both sides of a region on every pattern; the worst of them is the certificate."""
    worst = Finding(BIT_EXACT, 0.0, "")
    with threads(1):  # many small operations
        for seed, pattern in enumerate(PATTERNS):
            worst = worse(worst, evaluate(region, pattern, seed))
    return Certificate(
        "shard",
        print_op(region.exchange.op),
        tuple(str(v.type) for v in region.whole.inputs),
        region.count,
        region.digest,
        worst.kind,
        worst.worst,
        PATTERNS,
        allowed(region),
        reason=worst.reason,
    )
