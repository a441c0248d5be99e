"""Checks of plans as tests: compile the recorded models and run them on a GPU, where there is one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
CAPABILITY = (9, 0)


def missing() -> str:
    """Why plans for sm_90a cannot run here; empty if they can."""
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU"
    if torch.cuda.get_device_capability() != CAPABILITY:
        return f"{torch.cuda.get_device_name()} is not of the architecture sm_90a"
    return ""


REASON = missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=REASON or "has a GPU")]
CASES = [
    ("official-quant", "official", 1),
    ("official-quant", "official", 3),
    ("nvfp4-experts", "nvfp4-experts", 1),
]


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


def compiled(plans: Path, case: str, recipe: str, batch: int) -> Path:
    """The plan's folder, compiled once per run of the tests."""
    from dsv4c.compiler.compile import compile
    from tests.goldens import golden_case

    folder = plans / f"{case}-{recipe}-{batch}"
    if not folder.exists():
        plan = compile(golden_case(case), target="sm_90a", recipe=recipe, batch=batch, max_context=512)
        plan.save(folder)
    return folder


def run_module(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A check in a process of its own, as a CUDA error takes its context along."""
    command = [sys.executable, "-m", f"tests.gpu.{name}", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.parametrize(("case", "recipe", "batch"), CASES)
def test_a_recorded_model_on_the_device(plans: Path, case: str, recipe: str, batch: int) -> None:
    done = run_module("run_plan", str(compiled(plans, case, recipe, batch)), case)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all checks pass" in done.stdout


@pytest.mark.parametrize(("case", "recipe"), [(c, r) for c, r, batch in CASES if batch == 1])
def test_recorded_inputs_of_sublayers(plans: Path, case: str, recipe: str) -> None:
    done = run_module("check_sublayers", str(compiled(plans, case, recipe, 1)), case)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 beyond their bounds" in done.stdout


def test_every_launch_against_the_reference(plans: Path) -> None:
    case, recipe, batch = CASES[1]
    plan = str(compiled(plans, case, recipe, batch))
    done = run_module("check_layers", plan, "--weights", case, "--at", "0:140", "--every", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all results within their limits" in done.stdout


@pytest.mark.parametrize(
    ("named", "words"),
    [("launch", "named: launch "), ("step", "named: a step of plan ")],
    ids=["launch", "step"],
)
def test_a_fault_is_named(plans: Path, named: str, words: str) -> None:
    done = run_module("run_plan", str(compiled(plans, *CASES[0])), CASES[0][0], "--fault", named)
    assert done.returncode == 0, done.stdout + done.stderr
    assert words in done.stdout
