"""Tampered plans on a machine with a GPU: `load` refuses every one before a driver is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsv4c.errors import PlanError
from dsv4c.plan.folder import Plan, load
from tests.gpu.tampered import TAMPERED, tampered
from tests.gpu.test_plan import REASON

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=REASON or "has a GPU")]


@pytest.fixture(scope="module")
def plan() -> Plan:
    from dsv4c.compiler.compile import compile

    return compile("tiny", target="sm_90a", batch=1, verify=1, chunk=1, max_context=256, certify=False)


def refuse_calls(*_: Any, **__: Any) -> Any:
    raise AssertionError("the driver was called")


@pytest.mark.parametrize("name", TAMPERED)
def test_nothing_reaches_the_driver(
    plan: Plan, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsv4c.runtime import driver

    monkeypatch.setattr(driver, "call", refuse_calls)
    folder = tampered(plan, name, tmp_path)
    with pytest.raises(PlanError):
        load(folder)
