"""Bisecting: a good plan has no suspect, a planted fault is found, switched off and reproduced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dsv4c
from dsv4c.certify.finding import DIFFERENT, Finding
from dsv4c.cli import app
from dsv4c.compiler.bisect import Bisection, key, rerun
from dsv4c.compiler.job import job_of
from dsv4c.errors import PlanError, SessionError
from dsv4c.models.synth import synthesize
from dsv4c.plan.records import BodyCode

REPOSITORY = Path(__file__).parents[1]
TOKENS = [3, 17, 5]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(dsv4c.load_config("tiny"), tmp_path_factory.mktemp("bisect") / "weights", seed=1)


@pytest.fixture(scope="module")
def plan() -> dsv4c.Plan:
    return dsv4c.compile("tiny", max_context=64, chunk=5, draft="mtp")  # of whose block a step needs a part


def broken(plan: dsv4c.Plan, op: str, old: str, new: str) -> dsv4c.Plan:
    """`plan` with a fault in the body of the second launch of `op`."""
    code = [x for x in plan.program("decode").launches if x.op == op][1].code
    assert isinstance(code, BodyCode)
    body, text = code.body, plan.files[code.body].decode()
    assert old in text
    return replace(plan, files={**plan.files, body: text.replace(old, new, 1).encode()})


def test_a_good_plan_has_no_suspect(plan: dsv4c.Plan, weights: Path) -> None:
    verdict = Bisection(plan, weights, TOKENS, job_of(plan)).run()
    assert verdict.right
    assert verdict.gone
    assert verdict.suspects == ()
    assert (verdict.steps, verdict.nodes) == (3, len(plan.program("decode").launches))


@pytest.mark.parametrize(
    ("op", "old", "new"),
    [
        ("attention", "inverse=true", "inverse=false"),
        ("kv_norm_rope_store", "inverse=false", "inverse=true"),
        ("q_norm_quantize", "eps=1e-06", "eps=1.0"),
    ],
)
def test_a_planted_fault_is_found_and_switched_off(
    plan: dsv4c.Plan, weights: Path, op: str, old: str, new: str
) -> None:
    bad = broken(plan, op, old, new)
    verdict = Bisection(bad, weights, TOKENS, job_of(bad)).run()
    assert not verdict.right
    assert verdict.culprit is not None
    assert {s.rule for s in verdict.suspects} == {op}
    assert verdict.culprit.allowed == "bit-exact"
    assert verdict.gone
    assert verdict.rules == [op]


def test_bounds_excuse_what_they_allow(plan: dsv4c.Plan, weights: Path) -> None:
    bad = broken(plan, "attention", "inverse=true", "inverse=false")
    search = Bisection(bad, weights, TOKENS[:2], job_of(bad))
    attentions = [node for node in search.graph.nodes if node.op.name == "attention"]
    bounds = {key(node): Finding(DIFFERENT, 9.0, "") for node in attentions}
    assert search.run(bounds).suspects == ()


def test_the_command_writes_a_reproducer(plan: dsv4c.Plan, weights: Path, tmp_path: Path) -> None:
    broken(plan, "attention", "inverse=true", "inverse=false").save(tmp_path / "bad.plan")
    args = ["bisect", tmp_path / "bad.plan", "--weights", weights, "--tokens", "3,17", "-o", tmp_path / "out"]
    result = CliRunner().invoke(app, [*map(str, args), "--json"], prog_name="dsv4c")
    assert result.exit_code == 3
    assert "attention is at fault, first at layers." in result.stderr
    assert json.loads(result.stdout)["rules"] == ["attention"]
    found, body = rerun(tmp_path / "out")
    assert body is not None
    assert (found.kind, body.kind) == ("different", "different")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["rule"], report["tokens"]) == ("attention", [3, 17])
    assert "= attention_scores(" in (tmp_path / "out" / "before.txt").read_text()
    script = [sys.executable, str(tmp_path / "out" / "reproduce.py")]
    again = subprocess.run(
        script, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False
    )
    assert again.returncode == 1, again.stderr
    assert again.stdout.startswith("the plan's results: different, worst")


def test_rules_that_are_off_leave_nodes_that_repeat_each_other(weights: Path) -> None:
    """What tidy merged goes by the name of the first, so nothing comes from further up than the operands."""
    plan = dsv4c.compile("tiny", max_context=64, chunk=5, disable=["attention"], certify=False)
    search = Bisection(plan, weights, TOKENS[:2], job_of(plan))
    for node in search.graph.nodes:
        before = search.before(node)
        assert before is not None
        assert {v.name for v in before.inputs} <= {v.name for v in node.inputs}
    verdict = search.run()
    assert verdict.right
    assert verdict.suspects == ()


def test_a_bucket_of_several_sequences(weights: Path) -> None:
    plan = dsv4c.compile("tiny", batch=(1, 2), slots=3, max_context=64, chunk=5, certify=False)
    assert Bisection(plan, weights, TOKENS[:2], job_of(plan), bucket="decode-2").run().right
    with pytest.raises(PlanError, match="bucket prefill-5 does not decode"):
        Bisection(plan, weights, TOKENS, job_of(plan), bucket="prefill-5")


def test_wrong_tokens_are_refused(plan: dsv4c.Plan, weights: Path) -> None:
    with pytest.raises(SessionError, match="token 512: give 1 to 64 tokens from 0 to 511"):
        Bisection(plan, weights, [512], job_of(plan))
    with pytest.raises(SessionError, match="0 tokens"):
        Bisection(plan, weights, [], job_of(plan))
