"""The table of rules, and why a rule did not fire."""

from __future__ import annotations

import pytest

from dsv4c.errors import GraphError
from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Builder, Graph, Value
from dsv4c.ir.ops import clamp, mul, sigmoid, silu
from dsv4c.passes.explain import table, why_not
from dsv4c.passes.fold import FoldReport, Rule, fold
from dsv4c.types import F32, TensorType


@fused
class ExplainedTest(Fused):
    """silu(clamp(a)) * b."""

    literals = ("clamp.low",)
    limit: float

    def body(self, a: Value, b: Value) -> Value:
        return mul(silu(clamp(a, low=None, high=self.limit)), b)  # type: ignore[no-any-return]


def layers() -> Graph:
    """Layer 0 fuses; 1 and 2 have another clamp; in 3 an inner value escapes."""
    b = Builder("g")
    x, y = b.input("x", TensorType(F32, (4, 8))), b.input("y", TensorType(F32, (4, 8)))
    outputs: dict[str, Value] = {}
    with b:
        for i in range(4):
            with b.scope(f"layers.{i}"):
                gate = silu(clamp(x, low=-1.0 if i in (1, 2) else None, high=7.0 + i))
                outputs[f"{i}"] = x = mul(gate, y)
                if i == 3:
                    outputs["escaped"] = sigmoid(gate)
    return b.finish(outputs)


@pytest.fixture
def report() -> FoldReport:
    return fold(layers(), [Rule(ExplainedTest)])[1]


def test_table(report: FoldReport) -> None:
    (row,) = table(report)
    assert (row.rule, row.tried, row.matched, row.launches_saved) == ("explained_test", 4, 1, 2)
    assert row.bytes_saved == 4 * 4 * 8 * 4  # two inner values, each written once and read once
    assert row.ms > 0


def test_causes_are_grouped_over_layers_furthest_first(report: FoldReport) -> None:
    answer = why_not("explained_test", report)
    assert (answer.tried, answer.matched) == (4, 1)
    escape, attribute = answer.causes
    assert (escape.cause, escape.matched, escape.of, len(escape.refusals)) == ("escape", 3, 3, 1)
    assert escape.example.found == "inner value %layers.3.silu escapes to sigmoid layers.3.sigmoid"
    assert (escape.launches, escape.bytes) == (2, 4 * 4 * 8 * 4)
    assert (attribute.cause, attribute.expected, attribute.found) == ("attribute", "none", "-1.0")
    assert [r.scope for r in attribute.refusals] == ["layers.1", "layers.2"]


def test_one_node(report: FoldReport) -> None:
    answer = why_not("explained_test", report, "layers.2")
    assert [r.scope for c in answer.causes for r in c.refusals] == ["layers.2"]


def test_questions_without_an_answer(report: FoldReport) -> None:
    with pytest.raises(GraphError, match="the rule 'nope' was not tried; these were: explained_test"):
        why_not("nope", report)
    with pytest.raises(GraphError, match=r"explained_test did fire at layers\.0\.silu: it is part of"):
        why_not("explained_test", report, "layers.0.silu")
    with pytest.raises(GraphError, match=r"was not tried at 'layers\.9'; it was refused at: layers"):
        why_not("explained_test", report, "layers.9")
