"""Catalogued mistakes, put into fused bodies on purpose: a certificate that notices none is worthless.

A defect changes one primitive of the expanded body: its attributes, its operands, or what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from math import frexp
from typing import Any

import torch
from torch import Tensor

from dsv4c.certify.application import Application, applications, reduce_sizes
from dsv4c.certify.evaluate import PATTERNS, allowed, both_sides
from dsv4c.certify.finding import ORDER
from dsv4c.errors import GraphError
from dsv4c.ir.fused import trace
from dsv4c.ir.graph import Graph, Node
from dsv4c.ir.op import Op
from dsv4c.numerics.codec import Quantized, dequantize, nan_fill
from dsv4c.passes.expand import expand
from dsv4c.passes.work import Match
from dsv4c.reference import run
from dsv4c.reference.interpret import clone
from dsv4c.types import BF16, E2M1, E4M3, F32, TensorType

Meaning = Callable[..., Any]  # operands of the node -> its result or results


@dataclass(frozen=True)
class Kill:
    """One defect in one rule: where it was put, and which pattern gave it away (none: it survived)."""

    rule: str
    defect: str
    at: str
    caught_by: str
    reason: str

    @property
    def caught(self) -> bool:
        return bool(self.caught_by)


def inject(matches: Iterable[Match]) -> list[Kill]:
    """Every catalogued defect put into the body of every rule, and whether a certificate noticed.

    A rule that applied in several ways is judged by all of its certificates: one that turns red is enough.
    """
    by_rule: dict[str, list[Application]] = {}
    for applied in applications(matches):
        by_rule.setdefault(applied.rule, []).append(applied)
    found: list[Kill] = []
    for ways in by_rule.values():
        best: dict[str, Kill] = {}
        for applied in map(reduce_sizes, ways):
            for kill in kills(applied, {name for name, k in best.items() if k.caught}):
                best[kill.defect] = kill
        found += best.values()
    return found


def totals(kills: list[Kill]) -> dict[str, Any]:
    """injected, caught, and the survivors by name."""
    survivors = [f"{k.rule}: {k.defect} at {k.at}" for k in kills if not k.caught]
    return {"injected": len(kills), "caught": len(kills) - len(survivors), "survivors": survivors}


def kills(applied: Application, known: Collection[str] = ()) -> Iterator[Kill]:
    """Try every defect, but those `known`, that has a place in the body of this application."""
    body = trace(applied.op, applied.types).graph
    kept = {str(i): v for i, v in enumerate(applied.op.kept(tuple(body.outputs.values())))}
    plain = expand(Graph(body.name, body.inputs, (), (), body.nodes, kept))
    for name, find in DEFECTS.items():
        for node in plain.nodes if name not in known else ():
            meaning = find(node)
            if meaning is not None and not (find is wrong_type and _rounded_anyway(plain, node)):
                yield _tried(applied, plain, name, f"{node.op.name} {node.name}", {node: meaning})
                break
    for a, b in _interchangeable(plain) if "swap operands" not in known else ():
        if applied.operands[a] == applied.operands[b]:
            continue  # one value for both
        order = list(range(len(plain.inputs)))
        order[a], order[b] = b, a
        at = f"{plain.inputs[a].name} and {plain.inputs[b].name}"
        yield _tried(applied, plain, "swap operands", at, {}, order)
        break


def _tried(
    applied: Application,
    body: Graph,
    defect: str,
    at: str,
    changed: dict[Node, Meaning],
    order: list[int] | None = None,
) -> Kill:
    for seed, pattern in enumerate(PATTERNS):

        def right(operands: list[Any]) -> tuple[Any, ...]:
            return run_changed(body, [operands[i] for i in order] if order else operands, changed)

        try:
            finding = both_sides(applied, pattern, seed, right)
        except (GraphError, RuntimeError, ValueError, IndexError) as error:
            return Kill(applied.rule, defect, at, pattern, f"refused: {str(error).splitlines()[0]}")
        if ORDER.index(finding.kind) > ORDER.index(allowed(applied.op)):
            return Kill(applied.rule, defect, at, pattern, finding.reason)
    return Kill(applied.rule, defect, at, "", "")


def run_changed(body: Graph, operands: list[Any], changed: dict[Node, Meaning]) -> tuple[Any, ...]:
    """Interpret a body of primitives with other meanings for some of its nodes."""
    values = dict(zip(body.inputs, operands, strict=True))
    for node in body.nodes:
        given = [values[v] for v in node.inputs]
        made = changed[node](*given) if node in changed else run(node.op, *given)
        results = made if type(made) is tuple else (made,)
        values.update(zip(node.outputs, results, strict=True))
    return tuple(values[v] for v in body.outputs.values())


def _rounded_anyway(body: Graph, node: Node) -> bool:
    """Every reader rounds to bf16 first, or behind a power of two: a detour through bf16 changes nothing."""
    readers = body.users[node.outputs[0]]

    def rounds(reader: Node) -> bool:
        given = reader.op.attributes()
        if reader.op.name == "scale" and frexp(given["factor"])[0] == 0.5:
            return _rounded_anyway(body, reader)
        return reader.op.name == "cast" and given["to"] is BF16

    return bool(readers) and all(map(rounds, readers)) and node.outputs[0] not in body.outputs.values()


def _interchangeable(body: Graph) -> Iterator[tuple[int, int]]:
    """Pairs of operands of one type that are not just the two sides of a sum or product."""
    for (a, x), (b, y) in combinations(enumerate(body.inputs), 2):
        readers = {*body.users[x], *body.users[y]}
        if x.type == y.type and not (len(readers) == 1 and next(iter(readers)).op.commutative):
            yield a, b


# --- the catalogue: node -> what it computes with the defect, or None where it has no place ---

Find = Callable[[Node], Meaning | None]


def _other(op: Op) -> Meaning:
    return lambda *operands: run(op, *operands)


def _after(node: Node, change: Callable[[Any], Any]) -> Meaning:
    """The node's own meaning, its first result changed."""

    def meaning(*operands: Any) -> Any:
        made = run(node.op, *operands)
        return (change(made[0]), *made[1:]) if type(made) is tuple else change(made)

    return meaning


def drop_eps(node: Node) -> Meaning | None:
    eps = node.op.attributes().get("eps", 0.0)
    if node.op.name == "shift" and 0 < node.op.attributes()["offset"] < 1e-3:
        return _other(replace(node.op, offset=0.0))  # type: ignore[type-var]
    return _other(replace(node.op, eps=0.0)) if eps else None  # type: ignore[type-var]


def swap_scale_axes(node: Node) -> Meaning | None:
    """The scales of a block go to the wrong blocks: their order along a row is reversed."""
    if not _has_blocks(node):
        return None
    return _after(node, lambda q: q._replace(scale=q.scale.flip(-1)))


def _has_blocks(node: Node) -> bool:
    """Does it encode rows of several blocks? One block that begins late is the same block."""
    return node.op.name == "quantize" and node.outputs[0].type.components[1].shape[-1] > 1


def skip_clamp(node: Node) -> Meaning | None:
    return (lambda x: x) if node.op.name == "clamp" else None


def off_by_one_block(node: Node) -> Meaning | None:
    """Blocks begin one element late."""
    if not _has_blocks(node):
        return None

    def shifted(x: Tensor, *scales: Any) -> Any:
        q = run(node.op, x, *scales)
        late = run(node.op, x.roll(-1, -1), *scales)
        return q._replace(scale=late.scale)  # type: ignore[union-attr]

    return shifted


def truncate(node: Node) -> Meaning | None:
    """Toward zero instead of to nearest."""
    if node.op.name == "quantize":

        def quantized(x: Tensor, *scales: Any) -> Any:
            return _toward_zero(x, run(node.op, x, *scales))  # type: ignore[arg-type]

        return quantized
    result, first = node.outputs[0].type, node.inputs[0].type if node.inputs else None
    if (
        isinstance(result, TensorType)
        and result.dtype is BF16
        and node.op.name == "cast"
        and first is not None
    ):
        return lambda x: _cut(x)
    return None


def _cut(x: Tensor) -> Tensor:
    return (x.to(torch.float32).view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


def _toward_zero(x: Tensor, q: Quantized) -> Quantized:
    body = q.shape[-1] - q.format.tail
    rows = x if x.shape == q.shape else x.unsqueeze(-2).expand(q.shape)
    up = (dequantize(q).abs() > rows.to(torch.float32).abs())[..., :body]
    if q.format.value is E4M3:
        codes = q.data.view(torch.uint8)
        less = codes - ((codes & 127) > 0).to(torch.uint8) * up.to(torch.uint8)
        return q._replace(data=less.view(q.data.dtype))
    assert q.format.value is E2M1
    low, high = q.data & 15, q.data >> 4
    low = low - ((low & 7) > 0).to(torch.uint8) * up[..., 0::2].to(torch.uint8)
    high = high - ((high & 7) > 0).to(torch.uint8) * up[..., 1::2].to(torch.uint8)
    return q._replace(data=low | high << 4)


def drop_residual(node: Node) -> Meaning | None:
    """What is added to the new contribution is forgotten."""
    if node.op.name == "mix_streams":
        return _after(node, lambda x: x * 0)
    if node.op.name == "add" and len(node.inputs) == 2:
        same = [i for i, v in enumerate(node.inputs) if v.type == node.outputs[0].type]
        return (lambda *ab: ab[same[-1]].clone()) if same else None
    return None


def flip_rotation(node: Node) -> Meaning | None:
    if node.op.name != "rope":
        return None
    inverse = not node.op.attributes()["inverse"]
    return _other(replace(node.op, inverse=inverse))  # type: ignore[type-var]


def forget_sink(node: Node) -> Meaning | None:
    if node.op.name != "sink_softmax":
        return None
    return lambda scores, sink: run(node.op, scores, sink * 0 - float("inf"))


def wrong_axis(node: Node) -> Meaning | None:
    axis = node.op.attributes().get("axis")
    if node.op.name not in ("normalize", "softmax") or axis is None or len(node.inputs[0].type.shape) < 2:
        return None
    rank = len(node.inputs[0].type.shape)
    other = -2 if axis % rank == rank - 1 else -1
    return _other(replace(node.op, axis=other))  # type: ignore[type-var]


def wrong_type(node: Node) -> Meaning | None:
    """An f32 inner value takes a detour through bf16."""
    type_ = node.outputs[0].type
    computed = node.op.name in (
        "linear",
        "cast",
        "mul",
        "compress_pool",
        "sum",
        "attention_scores",
        "softmax",
    )
    if not computed or not isinstance(type_, TensorType) or type_.dtype is not F32:
        return None
    if node.op.name == "cast" and node.inputs[0].type.dtype is BF16:  # type: ignore[union-attr]
        return None  # nothing to lose
    return _after(node, lambda x: x.to(torch.bfloat16).to(torch.float32))


def wrong_place(node: Node) -> Meaning | None:
    """Rows go one place too far."""
    if node.op.name != "cache_write" or node.inputs[0].type.shape[1] < 2:
        return None
    return lambda cache, rows, index, slots: run(node.op, cache, rows, index + (index >= 0).int(), slots)


def wrong_slot(node: Node) -> Meaning | None:
    """The state of the next sequence."""
    return _next_one(node) if node.op.by_slot else None


def _next_one(node: Node) -> Meaning | None:
    """What the node picks, the last if it is several things, is taken from one place further."""
    place, (table, dimension) = list(node.op.picks.items())[-1]
    count = node.inputs[table].type.shape[dimension]
    if count < 2:
        return None

    def moved(*operands: Any) -> Any:
        return run(node.op, *operands[:place], (operands[place] + 1) % count, *operands[place + 1 :])

    return moved


def forget_ring(node: Node) -> Meaning | None:
    """A copy beside a ring begins with the call's own rows."""
    if node.op.name != "cache_extend":
        return None

    def empty(cache: Any, *rest: Any) -> Any:
        forgotten = clone(cache)
        nan_fill(forgotten)
        return run(node.op, forgotten, *rest)

    return empty


def short_window(node: Node) -> Meaning | None:
    """One index fewer than asked for."""
    if node.op.name not in ("window_index", "top_k", "visible_entries"):
        return None

    def short(index: Tensor) -> Tensor:
        out = index.clone()
        out.scatter_(-1, out.argmax(-1, keepdim=True), -1)
        return out

    return _after(node, short)


def drop_factor(node: Node) -> Meaning | None:
    name = {"scale": "factor", "attention_scores": "scale"}.get(node.op.name)
    if name is None or node.op.attributes()[name] == 1.0:
        return None
    return _other(replace(node.op, **{name: 1.0}))  # type: ignore[type-var]


def skip_hadamard(node: Node) -> Meaning | None:
    return (lambda x: x.clone()) if node.op.name == "hadamard" else None


def drop_gain(node: Node) -> Meaning | None:
    if node.op.name != "rms_norm" or len(node.inputs) < 2:
        return None
    return lambda x, gain: _other(node.op)(x)


def wrong_ratio(node: Node) -> Meaning | None:
    ratio = node.op.attributes().get("ratio")
    if node.op.name not in ("completed_entries", "index_scores") or not ratio:
        return None
    return _other(replace(node.op, ratio=2 * ratio))  # type: ignore[type-var]


def wrong_row(node: Node) -> Meaning | None:
    """A table is read one row off."""
    return _next_one(node) if node.op.name == "embedding" else None


def perturb(node: Node) -> Meaning | None:
    """One expert's product is left out."""
    if node.op.name != "expert_linear":
        return None

    def lose(x: Tensor) -> Tensor:
        out = x.clone()
        out[:, -1] = 0
        return out

    return _after(node, lose)


DEFECTS: dict[str, Find] = {
    "drop eps": drop_eps,
    "swap scale axes": swap_scale_axes,
    "skip clamp": skip_clamp,
    "off-by-one block": off_by_one_block,
    "wrong rounding": truncate,
    "drop residual": drop_residual,
    "rotate the other way": flip_rotation,
    "forget sink": forget_sink,
    "wrong axis": wrong_axis,
    "wrong type": wrong_type,
    "wrong place": wrong_place,
    "wrong slot": wrong_slot,
    "forget the ring": forget_ring,
    "short window": short_window,
    "drop factor": drop_factor,
    "skip Hadamard": skip_hadamard,
    "drop gain": drop_gain,
    "wrong ratio": wrong_ratio,
    "wrong row": wrong_row,
    "lose an expert": perturb,
}
