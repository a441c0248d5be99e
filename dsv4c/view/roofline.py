"""The least time of a call: what every launch must move and compute, against what a GPU can.

Floors are those of a roofline: bytes over the bandwidth that the GPU reads with, or operations over its peak,
whichever takes longer. Bytes are a call's with full caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from dsv4c.arch import Arch
from dsv4c.ir.graph import Graph, Kind, Node, Value
from dsv4c.ir.totals import compulsory
from dsv4c.scope import Scope
from dsv4c.types import QuantType
from dsv4c.view.layers import Section, find_section, folds


@dataclass(frozen=True)
class Work:
    """What one launch does: operations, bytes by what they belong to, and the floor in microseconds.

    `weights` and `caches` are parameters and states, read or written; `activations` is what launches hand
    each other. `bound`: "bytes" or "operations".
    """

    name: str
    op: str
    flops: int
    weights: int
    caches: int
    activations: int
    floor_us: float
    bound: str

    @property
    def bytes(self) -> int:
        return self.weights + self.caches + self.activations


@dataclass(frozen=True)
class Part:
    """Equal layers, or what lies outside of them: `count` times these launches."""

    title: str
    count: int
    launches: tuple[Work, ...]

    @property
    def floor_us(self) -> float:
        """Of one of them."""
        return sum(work.floor_us for work in self.launches)

    @property
    def bytes(self) -> int:
        return sum(work.bytes for work in self.launches)


@dataclass(frozen=True)
class Roofline:
    """A call of `rows` tokens. `compulsory` are the bytes of parameters and states that any program must
    touch, once.
    """

    graph: str
    gpu: str
    rows: int
    parts: tuple[Part, ...]
    compulsory: int
    compulsory_us: float

    @property
    def planned(self) -> int:
        return sum(part.count * part.bytes for part in self.parts)

    @property
    def floor_us(self) -> float:
        """Launch after launch."""
        return sum(part.count * part.floor_us for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "planned": self.planned,
            "floor_us": self.floor_us,
            "parts": [asdict(p) | {"floor_us": p.floor_us, "bytes": p.bytes} for p in self.parts],
        }


def roofline(
    graph: Graph, arch: Arch, groups: Iterable[Sequence[str]] = (), layer: int | str | None = None
) -> Roofline:
    """Floors of a graph's launches, equal layers together; with `layer` those of that layer alone.

    `groups` are names of nodes that one launch computes, as a plan has them; other nodes are launches of
    their own, and what is a view is none. Raises GraphError for a layer that is not there.
    """
    together = {name: tuple(names) for names in groups for name in names}
    chosen = folds(graph) if layer is None else ()
    sections = [(fold.shown, len(fold.members)) for fold in chosen]
    if layer is not None:
        sections = [(find_section(graph, layer), 1)]
    parts = []
    for section, count in sections:
        launches = _launches(graph, section, together)
        if launches:
            works = tuple(_work(graph, nodes, section, arch) for nodes in launches)
            parts.append(Part(section.title, count, works))
    touched = compulsory(graph)
    if layer is not None:
        own = sections[0][0]
        touched = {v: n for v, n in touched.items() if any(v in _roots(graph, x) for x in own.nodes)}
    tokens = graph.by_name.get("tokens")
    rows = 1 if tokens is None else tokens.type.shape[0]
    total = sum(touched.values())
    return Roofline(graph.name, arch.gpu, rows, tuple(parts), total, arch.floor_us(total))


def _roots(graph: Graph, node: Node) -> set[Value]:
    return {graph.root_of.get(v, v) for v in node.inputs}


def _launches(graph: Graph, section: Section, together: dict[str, tuple[str, ...]]) -> list[tuple[Node, ...]]:
    """The nodes of each launch that begins in the section, in order."""
    by_name = {node.name: node for node in graph.nodes}
    found = dict.fromkeys(together.get(node.name, (node.name,)) for node in section.nodes if not node.op.view)
    own = {node.name for node in section.nodes}
    return [tuple(by_name[n] for n in names if n in by_name) for names in found if names[0] in own]


def _work(graph: Graph, nodes: tuple[Node, ...], section: Section, arch: Arch) -> Work:
    inside = {v for node in nodes for v in node.outputs}
    returned = set(graph.outputs.values())
    weights: dict[Value, int] = {}
    caches = activations = 0
    seconds = []
    for node in nodes:
        cost = node.cost
        quantized = any(isinstance(v.type, QuantType) for v in node.inputs)
        seconds.append(cost.flops / (arch.fp8_flops if quantized else arch.bf16_flops))
        for value, count in zip(node.inputs, cost.reads, strict=True):
            root = graph.root_of.get(value, value)
            if root.kind is Kind.PARAM:
                weights[root] = max(weights.get(root, 0), count)
            elif root.kind is Kind.STATE:
                caches += count
            elif value not in inside:
                activations += count
        for value, count in zip(node.outputs, cost.writes, strict=True):
            if value in graph.root_of:
                caches += count
            elif value in returned or any(user not in nodes for user in graph.users[value]):
                activations += count
    moved = sum(weights.values()) + caches + activations
    by_bytes, by_flops = arch.floor_us(moved), 1e6 * sum(seconds)
    return Work(
        name=section.relative(nodes[0].name),
        op=" + ".join(dict.fromkeys(node.op.name for node in nodes)),
        flops=sum(node.cost.flops for node in nodes),
        weights=sum(weights.values()),
        caches=caches,
        activations=activations,
        floor_us=max(by_bytes, by_flops),
        bound="bytes" if by_bytes >= by_flops else "operations",
    )


# To read ----------------------------------------------------------------------------------------------------


def text(found: Roofline) -> str:
    """A table per kind of layer, and the whole."""
    lines = [f"{found.graph}: {found.rows} token{'s' * (found.rows > 1)} a call, floors of one {found.gpu}"]
    for part in found.parts:
        times = f" x{part.count}" if part.count > 1 else ""
        lines.append(f"\n{part.title}{times}: {part.floor_us:,.1f} us, {part.bytes / 1e6:,.1f} MB")
        lines.append(f"  {'us':>8} {'MFLOP':>10} {'weights':>9} {'caches':>9} {'between':>9}  MB")
        for work in part.launches:
            sizes = " ".join(f"{n / 1e6:9,.2f}" for n in (work.weights, work.caches, work.activations))
            mark = "" if work.bound == "bytes" else "  (operations)"
            lines.append(
                f"  {work.floor_us:8,.2f} {work.flops / 1e6:10,.1f} {sizes}  {work.op} {work.name}{mark}"
            )
    whole, once = found.planned / 1e9, found.compulsory / 1e9
    lines.append("")
    lines.append(f"whole call  {found.floor_us:,.1f} us launch after launch, {whole:,.3f} GB")
    lines.append(f"compulsory  {found.compulsory_us:,.1f} us, {once:,.3f} GB of weights and caches, once")
    lines.append(f"the rest    {1e3 * (whole - once):,.1f} MB: between launches, or read by several")
    return "\n".join(lines) + "\n"


COLORS = {"weights": "#4063a3", "caches": "#c07a2c", "activations": "#8a8f98"}
ROW, LEFT, WIDTH = 18, 340, 560  # pixels


def svg(found: Roofline) -> str:
    """A bar per launch, as long as its floor, in the colors of what it moves. The longest launch of a layer
    gives the scale; what takes longer outside of layers (the head) ends in a gap.
    """
    layers = [part for part in found.parts if Scope.of(part.title).block] or found.parts
    longest = max(max(w.floor_us for w in part.launches) for part in layers)
    y, body = 54, []
    for part in found.parts:
        times = f" x{part.count}" if part.count > 1 else ""
        heading = f"{escape(part.title)}{times}, {part.floor_us:,.1f} us"
        body.append(f'<text x="8" y="{y + 13}" class="part">{heading}</text>')
        y += ROW + 4
        for work in part.launches:
            body.append(f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(work.op)}</text>')
            x, full = float(LEFT), WIDTH * min(work.floor_us / longest, 1.0)
            for kind, color in COLORS.items():
                width = full * getattr(work, kind) / max(work.bytes, 1)
                body.append(
                    f'<rect x="{x:.1f}" y="{y + 3}" width="{width:.1f}" height="{ROW - 6}" fill="{color}"/>'
                )
                x += width
            if work.floor_us > longest:
                gap = f'<rect x="{x - 24:.1f}" y="{y + 1}" width="6" height="{ROW - 2}" fill="white"/>'
                body.append(gap)
            body.append(f'<text x="{x + 6:.1f}" y="{y + 13}" class="us">{work.floor_us:,.2f}</text>')
            y += ROW
        y += 8
    legend = "".join(
        f'<rect x="{LEFT + 110 * i}" y="30" width="10" height="10" fill="{color}"/>'
        f'<text x="{LEFT + 110 * i + 15}" y="39">{kind}</text>'
        for i, (kind, color) in enumerate(COLORS.items())
    )
    title = f"{found.graph}, {found.floor_us:,.0f} us on one {found.gpu}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 70}" height="{y}" '
        'font-family="sans-serif" font-size="12">',
        "<style>.part { font-weight: bold } .us { fill: #555 }</style>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="19" class="part">{escape(title)}</text>',
        legend,
        *body,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
