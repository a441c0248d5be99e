"""What a plan takes of memory, and that what is said to fit does."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4c.cli.memory import STEP, figures, state_sizes
from dsv4c.compiler.compile import compile
from dsv4c.compiler.request import Request
from dsv4c.plan.folder import Plan
from tests.commands import command


@pytest.fixture(scope="module")
def plan() -> Plan:
    return compile("tiny", batch=(1, 2), max_context=512, certify=False, sampled=True)


def test_state_grows_with_context_as_it_is_said_to(plan: Plan) -> None:
    job = Request("tiny", batch=(1, 2), max_context=512, sampled=True).job()
    fixed, per_token = state_sizes(job)
    held = sum(state.type.extent for state in plan.state) / 2
    assert fixed + per_token * 512 == pytest.approx(held, rel=1e-3)


def test_what_fits_fits_and_no_more(plan: Plan) -> None:
    job = Request("tiny", batch=(1, 2), max_context=512, sampled=True).job()
    have = 16_000_000
    fits = {row["batch"]: row["max_context"] for row in figures(plan, job, have)["fits"]}
    assert fits[1] > fits[2] > fits[4]

    def taken(context: int) -> int:
        made = compile("tiny", batch=(1, 2), max_context=context, certify=False, sampled=True)
        return sum(made.blocks.values()) - made.blocks["arena"] + plan.blocks["arena"]

    assert taken(fits[2]) <= have < taken(fits[2] + 2 * STEP)


def test_the_command_says_it(plan: Plan, tmp_path: Path) -> None:
    folder = plan.save(tmp_path / "tiny.plan")
    shown = command("memory", folder, "--memory", 0.016)
    assert "of 16.00 MB" in shown.out
    assert "2 × " in shown.out
    data = command("memory", folder, "--json").json
    assert data["weights"] == plan.blocks["weights"]
    assert list(data["buckets"]) == list(plan.buckets)
    assert command("memory", tmp_path / "none").code == 5
