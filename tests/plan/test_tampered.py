"""Tampered GPU plans are refused by `load`; the same twenty on a GPU: `tests/gpu/tampered.py`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4c.errors import PlanError
from dsv4c.plan.folder import Plan, load
from tests.codegen.lowered import gpu_plan
from tests.gpu.tampered import TAMPERED, signed, tampered


@pytest.fixture(scope="module")
def plan() -> Plan:
    return gpu_plan(batch=1, verify=1, chunk=1, certify=False)


def test_there_are_twenty() -> None:
    assert len(TAMPERED) == 20


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_plan_is_refused(plan: Plan, name: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=re.escape("plan.json")) as error:
        load(tampered(plan, name, tmp_path))
    assert "was altered" not in str(error.value)


def test_what_is_only_signed_again_is_the_plan(plan: Plan, tmp_path: Path) -> None:
    import json

    folder = plan.save(tmp_path / "p")
    (folder / "plan.json").write_text(signed(json.loads(plan.text)))
    assert load(folder) == plan


def test_an_altered_cubin_is_found(plan: Plan, tmp_path: Path) -> None:
    folder = plan.save(tmp_path / "p")
    cubin = folder / next(iter(plan.kernels.values()))["cubin"]
    cubin.write_bytes(cubin.read_bytes()[:-1] + b"3")
    with pytest.raises(PlanError, match=rf"{cubin.name}: was altered"):
        load(folder)


@pytest.mark.parametrize("key", ["name", "type", "form", "offset", "components"])
@pytest.mark.parametrize("value", [-1, None, [], {"a": 1}, 1.5])
def test_a_weight_of_a_foreign_form_is_a_plan_error(plan: Plan, key: str, value: Any, tmp_path: Path) -> None:
    import json

    folder = plan.save(tmp_path / "p")
    data = json.loads(plan.text)
    data["weights"][0][key] = value
    (folder / "plan.json").write_text(signed(data))
    with pytest.raises(PlanError, match=re.escape("plan.json")):
        load(folder)


def test_loading_needs_neither_torch_nor_the_ir(plan: Plan, tmp_path: Path) -> None:
    folder = plan.save(tmp_path / "p")
    code = (
        "import sys, dsv4c.plan.folder as f; f.load(sys.argv[1]);"
        "print([m for m in ('torch', 'cuda', 'dsv4c.ir', 'dsv4c.codegen') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
