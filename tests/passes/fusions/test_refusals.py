"""Fusions refuse where an inner value is read outside, and never swallow an attribute unknown to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from dsv4c.buckets import Bucket
from dsv4c.errors import GraphError
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Builder, Graph, Node, Value
from dsv4c.ir.holes import is_hole
from dsv4c.ir.ops.attention import AttentionScores
from dsv4c.ir.ops.rope import Rope
from dsv4c.ir.verify import verify
from dsv4c.passes import match as matching
from dsv4c.passes.expand import expand
from dsv4c.passes.fold import FoldReport, Refusal, Rule, fold
from dsv4c.passes.fusions import FUSIONS
from dsv4c.passes.fusions.rmsnorm_quantize import RmsnormQuantize
from dsv4c.passes.work import Match, Work
from dsv4c.types import BF16, F32, DType
from tests.goldens import RECORDED
from tests.passes.fusions.cases import DECODE, RULES, folded, one_layer, unfolded, wiring

DRAFTS = ("features", "pick_draft")  # of DSpark
MODEL = dict.fromkeys(DRAFTS, str(RECORDED / "dspark-fp32"))
RECIPE = {"scaled_experts_down": "nvfp4-experts-w4a4"}
BUCKET = {"sampler": replace(DECODE, sampled=True), **dict.fromkeys(DRAFTS, Bucket("round", tokens=6))}
NO_INNER_VALUE = {"index_topk", "in_proj", "rmsnorm_quantize"}  # every value of the body is a result


def match_of(rule: str) -> tuple[Graph, Match]:
    """The unfolded graph of tiny's decode step, and the rule's first occurrence in it."""
    model, recipe = MODEL.get(rule, "tiny"), RECIPE.get(rule, "official")
    bucket = BUCKET.get(rule, DECODE)
    _, report = folded(model, recipe, bucket)
    return unfolded(model, recipe, bucket), next(m for m in report.matches if m.op.name == rule)


def inner_values(match: Match) -> list[Value]:
    return [v for node in match.nodes for v in node.outputs if v not in match.results]


def leaking(graph: Graph, value: Value) -> Graph:
    outputs = graph.outputs | {"leak": graph.by_name[value.name]}
    return verify(Graph(graph.name, graph.inputs, graph.states, graph.params, graph.nodes, outputs))


def refusals(report: FoldReport, rule: str) -> list[Refusal]:
    return report.rules[rule].refusals


@pytest.mark.parametrize("rule", [op.name for op in FUSIONS if op.name not in NO_INNER_VALUE])
def test_an_inner_value_that_escapes_is_a_refusal(rule: str) -> None:
    graph, match = match_of(rule)
    _, whole = folded(MODEL.get(rule, "tiny"), RECIPE.get(rule, "official"), BUCKET.get(rule, DECODE))
    before = sum(m.op.name == rule for m in whole.matches)
    value = inner_values(match)[-1]
    kept, report = fold(leaking(graph, value), RULES)
    assert verify(kept).outputs["leak"].name == value.name
    assert report.counts[rule] == before - 1
    assert [r.at for r in refusals(report, rule) if r.cause == "escape"] == [value.name]
    assert wiring(expand(kept)) == wiring(leaking(graph, value))


@pytest.mark.parametrize("rule", sorted(NO_INNER_VALUE))
def test_rules_that_return_everything_have_nothing_to_lose(rule: str) -> None:
    _, match = match_of(rule)
    assert inner_values(match) == []


def test_without_the_check_an_escaping_value_would_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, match = match_of("sinkhorn")
    monkeypatch.setattr(matching.Search, "objection", lambda *_: None)
    with pytest.raises((GraphError, KeyError)):
        verify(fold(leaking(graph, inner_values(match)[-1]), RULES)[0])


def test_without_the_check_a_cycle_would_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Work, "way_back", lambda *_: None)
    with pytest.raises(GraphError, match="cycle"):
        fold(unfolded("tiny", "nvfp4-experts-w4a4", DECODE), RULES)


def test_without_the_check_an_attribute_would_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor that differs between two steps of Sinkhorn: equal attributes are what refuses it."""
    graph = one_layer(4)
    place = next(i for i, n in enumerate(graph.nodes) if n.op.name == "normalize")
    mutant = with_attribute(graph, place, "eps", 0.5)
    assert mutant is not None
    monkeypatch.setattr(matching._Wiring, "unify", capture_only)
    monkeypatch.setattr(matching, "_same", lambda *_: True)
    monkeypatch.setattr(type(graph.nodes[place].op), "__eq__", lambda a, b: type(a) is type(b))
    monkeypatch.setattr(type(graph.nodes[place].op), "__hash__", lambda a: 0)
    kept, report = fold(mutant, [r for r in RULES if r.name == "sinkhorn"])
    assert report.counts["sinkhorn"] == 2
    monkeypatch.undo()
    assert wiring(expand(kept)) != wiring(mutant)


def capture_only(wiring: Any, wanted: Any, actual: Any, undo: list[Any]) -> None:
    """`unify` without its comparison: the first value of a field wins."""
    name = getattr(wanted, "hole_field", "") if is_hole(wanted) else ""
    if name and name not in wiring.fields:
        wiring.fields[name] = actual
        undo.append(name)


def test_the_plain_row_of_a_norm_is_a_result_for_those_who_read_it() -> None:
    graph, match = match_of("rmsnorm_quantize")
    quantized, plain = match.results
    kept, _ = fold(graph, [Rule(RmsnormQuantize)])
    ops = {n.outputs[0].name: n.op for n in kept.nodes}
    assert ops[quantized.name].keep == (0,)
    leak, _ = fold(leaking(graph, plain), [Rule(RmsnormQuantize)])
    assert {n.outputs[0].name: n.op for n in leak.nodes}[quantized.name].keep == ()
    assert leak.outputs["leak"].node is leak.by_name[quantized.name].node


def test_a_hash_router_stays_apart_when_the_routed_input_depends_on_it() -> None:
    """Static input scales are those of the chosen experts, so swiglu cannot start before the router."""
    graph, report = folded("tiny", "nvfp4-experts-w4a4", DECODE)
    refused = refusals(report, "hash_swiglu")
    assert report.counts["hash_swiglu"] == 0
    assert {r.cause for r in refused} == {"cycle"}
    assert all("input_scale_chosen" in r.found for r in refused)
    assert sum(n.op.name == "hash_router" for n in graph.nodes) == len(refused) == 2


def test_a_guard_refuses_with_its_reason() -> None:
    rules = [replace(r, guard=lambda _: "not today") if r.name == "router" else r for r in RULES]
    _, report = fold(unfolded("tiny", "official", DECODE), rules)
    assert report.counts["router"] == 0
    assert {r.found for r in refusals(report, "router") if r.cause == "guard"} == {"not today"}


# --- attributes ---


def changed(value: Any) -> Iterator[Any]:
    """Other values of an attribute."""
    match value:
        case bool():
            yield not value
        case float():
            yield value * 1.5 + 0.25
        case int():
            yield value + 1
        case None:
            yield 0.5
        case DType():
            yield from (d for d in (BF16, F32) if d is not value)


def mutants(graph: Graph) -> Iterator[tuple[str, Graph]]:
    """The graph with one attribute of one node changed, wherever the types still fit; of many equal nodes in
    a scope (the steps of Sinkhorn), the first two."""
    seen: Counter[tuple[str, str, str]] = Counter()
    for index, node in enumerate(graph.nodes):
        for name, value in node.op.attributes().items():
            place = node.scope, node.op.name, name
            seen[place] += 1
            if seen[place] > 2:
                continue
            for other in changed(value):
                mutant = with_attribute(graph, index, name, other)
                if mutant is not None:
                    yield f"{node.name} {node.op.name}.{name}", mutant


def with_attribute(graph: Graph, index: int, name: str, value: Any) -> Graph | None:
    builder, values = Builder.like(graph)
    try:
        for i, node in enumerate(graph.nodes):
            if i == index:
                op = replace(node.op, **{name: value})  # type: ignore[type-var]
                node_ = Node(op, node.inputs, node.scope, node.origin)
                node_.outputs = node.outputs
                builder.copy(node_, values)
            else:
                builder.copy(node, values)
        return verify(builder.finish({label: values[v] for label, v in graph.outputs.items()}))
    except GraphError:
        return None


@pytest.mark.parametrize(("ratio", "hashed"), [(4, False), (128, False), (0, True)])
def test_no_attribute_is_ever_swallowed(ratio: int, hashed: bool) -> None:
    """Expanding the folded mutant gives the mutant: what a rule does not capture, it must have refused."""
    tried = 0
    for where, mutant in mutants(one_layer(ratio, hashed=hashed)):
        graph, _ = fold(mutant, RULES)
        assert wiring(expand(graph)) == wiring(mutant), where
        tried += 1
    assert tried > 40


@cache
def _plain(op: str) -> Fused:
    return next(n.op for n in fold(one_layer(4), RULES)[0].nodes if n.op.name == op)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("op", "attribute", "value", "rule"),
    [
        ("normalize", "eps", 0.5, "sinkhorn"),
        ("clamp", "low", -3.0, "swiglu"),
        ("rope", "stride", 2, "q_norm_rope"),
    ],
)
def test_a_deviating_constant_is_refused(op: str, attribute: str, value: Any, rule: str) -> None:
    graph = one_layer(4)
    place = next(i for i, n in enumerate(graph.nodes) if n.op.name == op)
    mutant = with_attribute(graph, place, attribute, value)
    assert mutant is not None
    counts = [fold(g, RULES)[1].counts[rule] for g in (graph, mutant)]
    assert counts[1] < counts[0]


def test_a_scale_is_captured_not_compared() -> None:
    graph = one_layer(4)
    (place,) = [i for i, n in enumerate(graph.nodes) if isinstance(n.op, AttentionScores)]
    mutant = with_attribute(graph, place, "scale", 0.75)
    assert mutant is not None
    (attention,) = [n.op for n in fold(mutant, RULES)[0].nodes if n.op.name == "attention"]
    assert attention.attributes()["scale"] == 0.75
    assert _plain("attention").attributes()["scale"] != 0.75


def test_rotating_forward_is_not_undoing_a_rotation() -> None:
    graph = one_layer(4)
    (place,) = [i for i, n in enumerate(graph.nodes) if isinstance(n.op, Rope) and n.op.inverse]
    mutant = with_attribute(graph, place, "inverse", False)
    assert mutant is not None
    kept, report = fold(mutant, RULES)
    assert report.counts["attention"] == report.counts["inverse_rope"] == 0
    assert any(r.cause == "attribute" for r in refusals(report, "inverse_rope"))
    assert wiring(expand(kept)) == wiring(mutant)
