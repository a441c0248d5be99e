"""Every check has a test that fails without it: each is switched off alone, and its test must notice."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dsv4c.certify import adversarial, compare, finding
from dsv4c.certify import application as application_module
from dsv4c.certify import evaluate as evaluate_module
from dsv4c.certify.application import Application, applications
from dsv4c.certify.certificates import Certificates
from dsv4c.certify.evaluate import PATTERNS, evaluate
from dsv4c.cli import check as check_command
from dsv4c.ir import declare as declare_module
from dsv4c.ir import fused as fused_module
from dsv4c.ir import holes as holes_module
from dsv4c.ir import verify as verify_module
from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Value
from dsv4c.ir.ops import quantize, rms_norm, scale, silu, sqrt_softplus
from dsv4c.ir.ops.math import SqrtSoftplus
from dsv4c.ir.ops.norm import RmsNorm
from dsv4c.numerics import codec
from dsv4c.passes import expand as expand_module
from dsv4c.passes import fold as fold_module
from dsv4c.passes import match as match_module
from dsv4c.passes import pipeline
from dsv4c.passes import work as work_module
from dsv4c.reference import run
from dsv4c.reference.registry import MEANINGS
from dsv4c.types import FP8_ROW, QuantFormat
from tests import test_cli_passes as commanding
from tests.certify import test_certificates as certifying
from tests.checking import checks, notices, without
from tests.ir import test_verify as verifying
from tests.passes import test_fold as folding
from tests.passes import test_pipeline as ordering
from tests.passes.fusions import test_refusals as refusing

Test = Callable[..., Any]


def case(test: Test, text: str) -> Test:
    """The one case of a parametrized test in whose parameters `text` stands."""
    (mark,) = (m for m in test.pytestmark if m.name == "parametrize")  # type: ignore[attr-defined]
    (found,) = (p for p in mark.args[1] if text in repr(p))
    return partial(test, *(found if isinstance(found, tuple) else (found,)))


def body(text: str) -> Test:
    return case(folding.test_a_body_that_cannot_be_registered, text)


def broken(make: Callable[[], Any]) -> Test:
    return partial(verifying.test_broken, make)


NOTICED_BY: dict[ModuleType, dict[str, Test]] = {
    fold_module: {
        "fold: rule.name in report.rules": folding.test_two_rules_of_one_name,
    },
    expand_module: {
        "expand: unknown": folding.test_expand_gives_names_back_and_takes_a_choice,
    },
    work_module: {
        "Work.after: writer is not None and writer is not node": (
            folding.test_a_read_that_must_come_before_the_write_closes_a_cycle
        ),
        "Work._waiting_for_others: len(ordered) != len(self.low)": (
            refusing.test_without_the_check_a_cycle_would_close
        ),
    },
    match_module: {
        "Search.objection: work.producer(value) in inside": folding.test_an_inner_value_as_an_operand,
        "Search.objection: value not in results and (readers or value in work.outputs)": (
            folding.test_an_inner_value_that_is_read_outside
        ),
        "Search.objection: self.keep(match, inside) is None": folding.test_results_that_nobody_reads,
        "Search.objection: match.operands.count(match.operands[operand]) > 1": (
            folding.test_an_overwritten_operand_that_is_also_another
        ),
        "Search.objection: refused": folding.test_a_guard_refuses_with_its_reason,
        "Search.objection: detour is not None": folding.test_a_cycle_through_the_outside,
        "_Wiring.step: self.search.steps > BUDGET": folding.test_a_search_ends,
        "_Wiring.candidates: made": folding.test_a_maker_that_is_another_op,
        "_Wiring.candidates: not any((n not in self.assigned.values() for n in fitting))": (
            folding.test_the_furthest_partial_match_is_reported
        ),
        "_Wiring.bind: len(inputs) != len(wanted.inputs) or len(node.outputs) != len(wanted.outputs)": (
            folding.test_an_operand_too_many
        ),
        "_Wiring.bind: known is not ours": folding.test_a_disagreement_ends_a_partial_match,
        "_Wiring.bind: wrong is not None": folding.test_a_disagreement_ends_a_partial_match,
        "_Wiring.matched: missing": folding.test_a_field_that_this_shape_of_the_body_does_not_use,
        "_Wiring.matched: [type(n.op) for n in body.graph.nodes] != [type(n.op) for n in nodes]": (
            folding.test_what_only_the_real_types_tell
        ),
        "_Wiring.matched: not _same(attribute, found)": folding.test_what_only_the_real_types_tell,
        "_Wiring.matched: wanted.op != node.op or inputs not in _orders(node)": (
            folding.test_what_only_the_real_types_tell
        ),
    },
    application_module: {
        "application: set(external) != set(match.operands)": certifying.test_a_dropped_operand_is_noticed,
    },
    evaluate_module: {
        "allowed: kind not in ORDER[:-1]": certifying.test_an_unknown_class_is_refused,
    },
    compare: {
        "compare: len(expected) != len(found)": certifying.test_classes_of_difference,
        "compare: type_of(a) != type_of(b)": certifying.test_a_meaning_of_the_wrong_type_is_different,
        "_numbers: not a.is_floating_point()": certifying.test_classes_of_difference,
    },
    verify_module: {
        "names_are_unique: value.name in seen": broken(verifying.twice),
        "operands_are_defined_before_use: value not in defined": broken(verifying.undefined),
        "operands_are_defined_before_use: value not in defined #2": broken(verifying.undefined_output),
        "ops_are_declared: OPS.get(node.op.name) is not type(node.op)": broken(verifying.undeclared),
        "types_follow_the_rules: wanted != found": broken(verifying.wrong_type),
        "writes_go_to_state: target not in graph.root_of": broken(verifying.write_to_input),
        "overwritten_values_are_not_read: value in writer": broken(verifying.read_after_write),
        "overwritten_values_are_not_read: value in writer #2": broken(verifying.returned_after_write),
        "an_aliased_operand_is_read_once: node.inputs.count(node.inputs[operand]) > 1": (
            broken(verifying.write_and_read_twice)
        ),
        "aliases_keep_their_type: node.outputs[result].type != node.inputs[operand].type": (
            verifying.test_an_alias_that_changes_its_type
        ),
        "declared_values_are_used: value not in used": broken(verifying.unused),
        "kinds_match_their_lists: value.kind is not kind or value.node is not None": (
            broken(verifying.wrong_list)
        ),
        "verify: broken": broken(verifying.twice),
    },
    fused_module: {
        "Fused.kept: wrong": folding.test_a_fused_op_keeps_results_that_its_body_has,
        "alias_of_trace: value in results or value in stale": body("the write %cache_write"),
        "_trace: known == body.alias": folding.test_what_is_overwritten_must_not_depend_on_types,
        "_checked_results: isinstance(value, Value)": body("which is no value"),
        "_checked_results: value not in operands": body("returns its operand x unchanged"),
        "_checked_results: len(set(results)) == len(results)": body("returns a value twice"),
        "draw: not drawn": body("cannot be traced"),
    },
    holes_module: {},
    declare_module: {
        "check: hasattr(op, 'body')": body("declares no body"),
        "check: not proposes(op) or op.anchor is not None": body("say at which op in `anchor`"),
        "check: bool(counts) or proposes(op)": body("propose the number of operands"),
        "check: f.name in reached or proposes(op) or f.type in (bool, 'bool')": body("reaches no attribute"),
        "_check_connected: bool(pattern.nodes)": body("has an empty body"),
        "_check_connected: not unread": body("never reads y"),
        "_check_connected: len({find(v) for v in group}) == 1": body("falls into parts"),
    },
    pipeline: {
        "Fold.chosen: name not in known": ordering.test_rules_are_chosen_by_name,
        "Fold.run: found != count": ordering.test_expected_counts,
        "Pipeline.__post_init__: missing": case(ordering.test_a_pipeline_that_cannot_work, "fold requires"),
        "_graph: not isinstance(made, Graph)": ordering.test_a_pass_that_gives_no_graph_is_told_so,
        "Contributions.rule: name not in self.rules": ordering.test_contributions_of_every_kind,
        "contributions: other is not None and other[1] != kept": ordering.test_a_clash_names_both,
        "_flatten: not kinds and (not rules)": ordering.test_what_is_no_contribution,
    },
}
MECHANICS = ("Hole.", "holes_in")  # of the tracer: they signal, and refuse nothing

CASES = [(module, check) for module, table in NOTICED_BY.items() for check in table]


@pytest.mark.parametrize("module", NOTICED_BY, ids=lambda m: m.__name__)
def test_every_check_is_in_the_table(module: ModuleType) -> None:
    found = {name for name in checks(module) if not name.startswith(MECHANICS)}
    assert found - NOTICED_BY[module].keys() == set(), "checks without a test that fails when they are off"
    assert NOTICED_BY[module].keys() - found == set(), "checks that are gone"


@pytest.mark.parametrize(("module", "check"), CASES, ids=lambda p: p if isinstance(p, str) else "")
def test_a_check_switched_off_is_noticed(module: ModuleType, check: str, monkeypatch: Any) -> None:
    test = NOTICED_BY[module][check]
    arguments = [monkeypatch] if "monkeypatch" in getattr(test, "__annotations__", ()) else []
    assert not notices(test, *arguments)
    with without(module, check):
        assert notices(test, *arguments), f"{test} does not notice"
    monkeypatch.undo()


WHOLE: list[tuple[Any, str, Any, Test]] = [
    (declare_module, "_check_literals", lambda *_: None, body("eps is 1e-06")),
    (work_module.Work, "way_back", lambda *_: None, folding.test_a_cycle_through_the_outside),
    (match_module._Wiring, "unify", lambda *_: None, folding.test_one_field_that_would_need_two_values),
    (compare, "_same_bits", lambda a, b: a.shape == b.shape, certifying.test_classes_of_difference),
    (
        compare,
        "_codes",
        lambda *_: finding.Finding(finding.BIT_EXACT, 0.0, ""),
        certifying.test_one_code_is_a_requantization,
    ),
    (check_command, "_changed", lambda *_: [], commanding.test_a_certificate_that_changed_fails_the_check),
    (Certificates, "failed", property(lambda _: []), commanding.test_a_rule_that_is_wrong_is_no_plan),
    (pipeline, "surprising", lambda *_: False, ordering.test_a_rule_that_matched_nothing_is_a_warning),
    (pipeline, "verify", lambda graph: graph, ordering.test_a_pass_that_breaks_the_graph_is_named),
]
"""Checks that are whole functions, with what stands in for them."""


@pytest.mark.parametrize(("owner", "name", "blind", "test"), WHOLE, ids=[name for _, name, _, _ in WHOLE])
def test_a_whole_check_switched_off_is_noticed(
    owner: Any, name: str, blind: Any, test: Test, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noticed(folder: Path) -> bool:
        folder.mkdir()
        (folder / "mine_for_cli.py").write_text(commanding.MINE)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            given = {"tmp_path": folder, "monkeypatch": patch}
            return notices(test, *(given[p] for p in inspect.signature(test).parameters if p in given))

    assert not noticed(tmp_path / "on")
    monkeypatch.setattr(owner, name, blind)
    assert noticed(tmp_path / "off"), f"{test} does not notice"


# --- bounds and budgets ---


def test_what_a_class_allows_is_held_to(monkeypatch: pytest.MonkeyPatch) -> None:
    test = certifying.test_a_declared_class_is_held_to
    assert not notices(test)
    monkeypatch.setattr(finding.Certificate, "holds", property(lambda _: True))
    assert notices(test)


@pytest.mark.parametrize(("bound", "loose"), [("ULPS", 1 << 40), ("BOUND", 1e9)])
def test_bounds_of_the_classes_matter(bound: str, loose: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not notices(certifying.test_classes_of_difference)
    monkeypatch.setattr(compare, bound, loose)
    assert notices(certifying.test_classes_of_difference)


def test_operands_are_compared_after_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    test, real = certifying.test_an_operand_that_is_overwritten_is_noticed, compare.compare
    assert not notices(test)
    monkeypatch.setattr(evaluate_module, "compare", lambda a, b, where: real(a[:-2], b[:-2], where))
    assert notices(test)


# --- inputs: every pattern finds a mistake that no other does ---


@fused
class ScaleCheckTest(Fused):
    """factor * x."""

    factor: float

    def body(self, x: Value) -> Value:
        return scale(x, factor=self.factor)  # type: ignore[no-any-return]


@fused
class SiluCheckTest(Fused):
    """silu(x), which may be approximated."""

    certified_as = "approximate"

    def body(self, x: Value) -> Value:
        return silu(x)  # type: ignore[no-any-return]


@fused
class SoftplusCheckTest(Fused):
    """sqrt(softplus(x)), give or take an ulp."""

    certified_as = "reassociation"

    def body(self, x: Value) -> Value:
        return sqrt_softplus(x)  # type: ignore[no-any-return]


@fused
class NormCheckTest(Fused):
    """A norm without a gain."""

    literals = ("rms_norm.precision",)
    eps: float

    def body(self, x: Value) -> Value:
        return rms_norm(x, eps=self.eps)  # type: ignore[no-any-return]


@fused
class QuantizeCheckTest(Fused):
    """An encoding."""

    format: QuantFormat

    def body(self, x: Value) -> Value:
        return quantize(x, format=self.format)  # type: ignore[no-any-return]


def flushing(op: ScaleCheckTest, x: Any) -> Any:
    """Subnormal numbers become zero."""
    return torch.where(x.abs() < 2.0**-126, torch.zeros_like(x), x) * op.factor


def late_block(op: QuantizeCheckTest, x: Any) -> Any:
    """A scale comes from the block that begins one element late."""
    return codec.quantize(x, op.format)._replace(scale=codec.quantize(x.roll(-1, -1), op.format).scale)


def norm_with(eps: float) -> Any:
    return lambda op, x: run(RmsNorm(eps=eps), x)


def hard_silu(op: SiluCheckTest, x: Any) -> Any:
    """Right where x is large or next to nothing."""
    return x * (x / 6 + 0.5).clamp(0, 1)


def early_softplus(op: SoftplusCheckTest, x: Any) -> Any:
    """Linear above 10 instead of 20."""
    return torch.where(x > 10, x.sqrt(), run(SqrtSoftplus(), x))


Planted = tuple[type[Fused], Any, str, Any]  # a rule, its nodes, the type of their operand, a wrong meaning

PLANTED: dict[str, Planted] = {
    "mixed": (ScaleCheckTest, lambda x: scale(x, factor=0.5), "f32[1,256]", flushing),
    "edges": (QuantizeCheckTest, lambda x: quantize(x, format=FP8_ROW), "f32[1,256]", late_block),
    "zeros": (NormCheckTest, lambda x: rms_norm(x, eps=1e-20), "bf16[1,256]", norm_with(0.0)),
    "random": (SiluCheckTest, silu, "f32[4,256]", hard_silu),
    "tiny": (NormCheckTest, lambda x: rms_norm(x, eps=1e-10), "bf16[1,256]", norm_with(1e-12)),
    "large": (SoftplusCheckTest, sqrt_softplus, "f32[4,256]", early_softplus),
}


def planted(pattern: str) -> tuple[Application, Any]:
    op, build, type_, wrong = PLANTED[pattern]
    (applied,) = applications(certifying.matches_of(op, build, x=type_))
    return applied, wrong


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_finds_what_no_other_does(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    applied, wrong = planted(pattern)
    assert evaluate(applied).holds
    monkeypatch.setitem(MEANINGS, type(applied.op), wrong)
    assert not evaluate(applied).holds
    monkeypatch.setattr(evaluate_module, "PATTERNS", tuple(p for p in PATTERNS if p != pattern))
    assert evaluate(applied).holds


def test_every_profile_of_mixed_inputs_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    test = certifying.test_mixed_inputs_hold_every_profile
    assert not notices(test)
    for place, profile in enumerate(adversarial._PROFILES):
        if profile is adversarial._plain:
            continue
        others = list(adversarial._PROFILES)
        others[place] = adversarial._plain
        with monkeypatch.context() as patch:
            patch.setattr(adversarial, "_PROFILES", tuple(others))
            assert notices(test), profile
