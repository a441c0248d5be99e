"""The pipeline: order, specs, options, stages, resuming, and contributions of other packages."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

from dsv4c.buckets import Bucket
from dsv4c.config import Deployment, load_config
from dsv4c.errors import GraphError
from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused, dtype_of
from dsv4c.ir.graph import Builder, Graph, Value
from dsv4c.ir.ops import scale, silu
from dsv4c.ir.text import parse_graph, print_graph
from dsv4c.models.deepseek_v4 import build
from dsv4c.passes import pipeline as pipeline_module
from dsv4c.passes.base import Context, Pass
from dsv4c.passes.fold import Rule
from dsv4c.passes.pipeline import (
    PIPELINE,
    Fold,
    Pipeline,
    Stage,
    contributions,
    installed,
    load_object,
    parse_pipeline,
)
from dsv4c.passes.recipes import RECIPES, recipe_named
from dsv4c.types import BF16, F32, TensorType


@fused
class ScaledSiluTest(Fused):
    """silu(factor * x)."""

    factor: float

    def body(self, x: Value) -> Value:
        return silu(scale(x, factor=self.factor))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class CountTest(Pass):
    """Says how many nodes there are."""

    name: ClassVar[str] = "count-test"
    loud: bool = False

    def run(self, graph: Graph, context: Context) -> Graph:
        context.warnings.append(f"{len(graph.nodes)} nodes{'!' * self.loud}")
        return graph


@dataclass(frozen=True)
class BreakTest(Pass):
    """Leaves a param that nobody reads."""

    name: ClassVar[str] = "break-test"

    def run(self, graph: Graph, context: Context) -> Graph:
        builder, values = Builder.like(graph)
        builder.param("unused", TensorType(F32, (1,)))
        for node in graph.nodes:
            builder.copy(node, values)
        return builder.finish({k: values[v] for k, v in graph.outputs.items()})


@dataclass(frozen=True)
class NothingTest(Pass):
    """Forgets to return the graph."""

    name: ClassVar[str] = "nothing-test"

    def run(self, graph: Graph, context: Context) -> Graph:
        return None  # type: ignore[return-value]


def tiny() -> Graph:
    return build(load_config("tiny"), Deployment(max_context=128), Bucket("decode"))


def small() -> Graph:
    b = Builder("small")
    x = b.input("x", TensorType(F32, (4,)))
    with b:
        return b.finish({"y": silu(scale(x, factor=2.0)), "z": silu(x)})


# --- order and specs ---


@pytest.mark.parametrize(
    "text",
    [
        "quantize{recipe=official},fold,prepack,tidy",
        "quantize{recipe=nvfp4},fold{rules=sinkhorn+head,without=head},tidy",
        "quantize{recipe=bf16},tidy",
    ],
)
def test_specs_round_trip(text: str) -> None:
    assert str(parse_pipeline(text)) == text
    assert parse_pipeline(str(parse_pipeline(text))) == parse_pipeline(text)


def test_the_default_is_the_list() -> None:
    assert Pipeline().passes == PIPELINE
    assert str(Pipeline()) == "quantize{recipe=official},fold,prepack,tidy"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fold", "fold requires 'formats', which quantize establishes"),
        ("quantize{recipe=official},schedule", "no pass is written 'schedule'; there are: quantize, fold"),
        ("quantise", "no pass is written 'quantise'; there are: quantize, fold"),
        ("quantize{recipes=official}", "quantize has no option 'recipes=official'; it has: recipe"),
        ("quantize{recipe}", "quantize has no option 'recipe'"),
    ],
)
def test_a_pipeline_that_cannot_work(text: str, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        parse_pipeline(text)


def test_a_pass_can_undo_what_another_needs() -> None:
    @dataclass(frozen=True)
    class Unquantize(Pass):
        name: ClassVar[str] = "unquantize"
        spoils: ClassVar = frozenset({"formats"})

    quantize = parse_pipeline("quantize{recipe=official}").passes
    message = (
        "fold requires 'formats', which quantize establishes and unquantize undid it; put quantize before"
    )
    with pytest.raises(GraphError, match=message):
        Pipeline((*quantize, Unquantize(), Fold()))


def test_options_read_as_their_type() -> None:
    known = {"count-test": CountTest}
    assert parse_pipeline("count-test{loud=true}", known).passes == (CountTest(loud=True),)
    with pytest.raises(GraphError, match=r"count-test\.loud: cannot read 'yes' as bool"):
        parse_pipeline("count-test{loud=yes}", known)


# --- running ---


def test_stages_are_verified_counted_and_watched() -> None:
    seen: list[Stage] = []
    context = Context(rules=contributions().rules)
    stages = Pipeline().run(tiny(), context, watch=seen.append)
    assert [s.name for s in stages] == ["quantize", "fold", "prepack", "tidy"]
    assert seen == stages
    assert len(stages[1].graph.nodes) < len(stages[0].graph.nodes) / 4
    assert all(s.seconds >= 0 for s in stages)
    assert context.fold is not None
    assert context.prepack is not None


def test_stop_edit_and_resume() -> None:
    whole = Pipeline().run(tiny(), Context(rules=contributions().rules))[-1].graph
    stopped = Pipeline().run(tiny(), Context(rules=contributions().rules), stop_after="fold")
    assert stopped[-1].name == "fold"
    resumed = Pipeline().after("fold")
    assert str(resumed) == "prepack,tidy"
    text = print_graph(stopped[-1].graph)
    assert resumed.run(parse_graph(text), Context())[-1].graph == whole
    with pytest.raises(GraphError, match=r"no pass is named 'nope' in the pipeline; there are: quantize"):
        Pipeline().run(tiny(), Context(), stop_after="nope")


def test_a_pass_that_breaks_the_graph_is_named() -> None:
    with pytest.raises(GraphError, match=r"(?s)pass break-test: .*%unused is never used"):
        Pipeline((BreakTest(),)).run(small(), Context())


def test_a_pass_that_gives_no_graph_is_told_so() -> None:
    with pytest.raises(GraphError, match="pass nothing-test: `run` returned NoneType; expected the graph"):
        Pipeline((NothingTest(),)).run(small(), Context())


def fold_small(fold: Fold = Fold(), **options: object) -> Context:  # noqa: B008  (frozen)
    context = Context(rules={"scaled_silu_test": Rule(ScaledSiluTest)}, **options)  # type: ignore[arg-type]
    Pipeline((fold,), frozenset({"formats"})).run(small(), context)
    return context


def test_expected_counts() -> None:
    assert fold_small(expected={"scaled_silu_test": 1}).warnings == []
    with pytest.raises(GraphError, match="the rule scaled_silu_test matched 1 times, expected 2"):
        fold_small(expected={"scaled_silu_test": 2})
    with pytest.raises(GraphError, match="the rule sinkhorn was not tried, expected 2"):
        fold_small(expected={"sinkhorn": 2})


def test_a_rule_that_matched_nothing_is_a_warning() -> None:
    @fused
    class TwiceSiluTest(Fused):
        """silu(silu(x))."""

        def body(self, x: Value) -> Value:
            return silu(silu(x))  # type: ignore[no-any-return]

    context = Context(rules={"twice_silu_test": Rule(TwiceSiluTest)})
    Pipeline((Fold(),), frozenset({"formats"})).run(small(), context)
    assert context.warnings == [
        "small: the rule twice_silu_test matched nothing; ask why-not twice_silu_test"
    ]


def test_where_a_body_ended_is_told_with_the_warning() -> None:
    @fused
    class MistakenTest(Fused):
        """silu(x), where its author made no mistake."""

        def body(self, x: Value) -> Value:
            if dtype_of(x) == BF16:
                raise ValueError("three of four")
            return silu(silu(x))  # type: ignore[no-any-return]

    context = Context(rules={"mistaken_test": Rule(MistakenTest)})
    Pipeline((Fold(),), frozenset({"formats"})).run(small(), context)
    (warning,) = context.warnings
    assert re.search(
        r"a way through its body ended at .*test_pipeline\.py:\d+: ValueError: three of four", warning
    )


def test_rules_are_chosen_by_name() -> None:
    context = fold_small(Fold(without=("scaled_silu_test",)))
    assert context.fold is not None
    assert context.fold.counts == {}
    left = Pipeline().with_options("fold", without=("head", "sinkhorn"))
    assert left.passes[1].spec == "fold{without=head+sinkhorn}"
    with pytest.raises(GraphError, match="fold: no rule is named 'heads'; there are: scaled_silu_test"):
        fold_small(Fold(rules=("heads",)))


def test_a_pass_goes_behind_the_one_it_follows() -> None:
    names = [p.name for p in Pipeline().with_pass(CountTest()).passes]
    assert names[:3] == ["quantize", "fold", "count-test"]


# --- contributions ---


def test_contributions_of_every_kind() -> None:
    found = contributions([("here", [ScaledSiluTest, CountTest])])
    assert found.rule("scaled_silu_test").op is ScaledSiluTest
    assert found.passes["count-test"] is CountTest
    assert found.instances == (CountTest(),)
    with pytest.raises(GraphError, match="no rule is named 'nope'"):
        found.rule("nope")


def test_a_module_contributes_what_it_defines() -> None:
    module = ModuleType("contributed")
    own = type("OwnTest", (CountTest,), {"name": "own-test", "__module__": "contributed"})
    module.own, module.foreign = own, CountTest  # type: ignore[attr-defined]
    found = contributions([("contributed", module)])
    assert "own-test" in found.passes
    assert "count-test" not in found.passes


def test_a_clash_names_both() -> None:
    @dataclass(frozen=True)
    class Other(Pass):
        name: ClassVar[str] = "count-test"

    with pytest.raises(GraphError, match="second and first both contribute 'count-test'; rename one"):
        contributions([("first", CountTest), ("second", Other)])
    with pytest.raises(GraphError, match="mine and dsv4c both contribute 'tidy'"):
        contributions([("mine", type("Mine", (CountTest,), {"name": "tidy"}))])


def test_what_is_no_contribution() -> None:
    with pytest.raises(GraphError, match="here contributes 3; expected a pass"):
        contributions([("here", 3)])
    with pytest.raises(GraphError, match="here contributes nothing; expected a pass, a rule or a fused op"):
        contributions([("here", ModuleType("empty"))])


def test_objects_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("contributed_here")
    module.count = CountTest  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "contributed_here", module)
    assert load_object("contributed_here:count") == ("--pass contributed_here:count", CountTest)
    with pytest.raises(GraphError, match="--pass contributed_here:nope"):
        load_object("contributed_here:nope")
    with pytest.raises(GraphError, match="--pass no_such_module: No module named"):
        load_object("no_such_module")


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name, value, dist = "extra", "extra.passes:all", None

        def __init__(self, found: object) -> None:
            self.found = found

        def load(self) -> object:
            if isinstance(self.found, Exception):
                raise self.found
            return self.found

    def give(found: object) -> None:
        monkeypatch.setattr(pipeline_module, "entry_points", lambda group: [Entry(found)])

    give(CountTest)
    assert installed() == [("extra (extra.passes:all)", CountTest)]
    monkeypatch.setattr(Entry, "dist", SimpleNamespace(name="dsv4c-extra"))
    known = contributions(installed())
    assert known.sources == {"count-test": "package dsv4c-extra (extra.passes:all)"}
    origin = known.origin("count-test")
    assert (origin["kind"], origin["source"]) == ("pass", known.sources["count-test"])
    assert re.fullmatch(r"passes/test_pipeline\.py:\d+", origin["at"].removeprefix("tests/"))
    give(ImportError("No module named 'extra'"))
    with pytest.raises(GraphError, match=r"the entry point extra = 'extra\.passes:all' .* cannot be loaded"):
        installed()


def test_two_packages_with_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are named, with where they come from."""

    class Entry:
        def __init__(self, name: str, found: object) -> None:
            self.name, self.value, self.found, self.dist = name, f"{name}.passes:all", found, None

        def load(self) -> object:
            return self.found

    other = type("Other", (CountTest,), {"name": "count-test"})
    entries = [Entry("theirs", other), Entry("mine", CountTest)]
    monkeypatch.setattr(pipeline_module, "entry_points", lambda group: entries)
    both = r"theirs \(theirs\.passes:all\) and mine \(mine\.passes:all\) both contribute 'count-test'"
    with pytest.raises(GraphError, match=both):
        contributions(installed())


# --- again ---


@pytest.mark.parametrize("recipe", RECIPES)
def test_any_pass_a_second_time_changes_nothing(recipe: str) -> None:
    line = Pipeline().with_options("quantize", recipe=recipe)
    context = Context(rules=contributions().rules)
    graph = build(
        load_config("tiny"), Deployment(max_context=128), Bucket("decode"), recipe_named(recipe).activation
    )
    for p in line.passes:
        graph = p.run(graph, context)
        before = replace(context, warnings=[])
        again = p.run(graph, context)
        assert again == graph
        assert print_graph(again) == print_graph(graph)
        if p.name == "prepack":
            assert context.prepack is None
            context = before
        if p.name == "fold":
            assert context.fold is not None
            assert not any(context.fold.counts.values())
