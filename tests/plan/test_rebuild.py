"""`dsv4c verify --rebuild`: kernels built again from the sources that a plan keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsv4c.cli import app
from dsv4c.compiler.again import rebuild
from dsv4c.errors import PlanError
from dsv4c.plan.folder import Plan
from tests.codegen.lowered import gpu_plan, no_compiler


@pytest.fixture(scope="module")
def plan() -> Plan:
    return gpu_plan(batch=1, verify=1, chunk=1, certify=False)


def altered(plan: Plan, kind: str, extra: bytes) -> tuple[Plan, str]:
    """The plan with more in one file of a kernel, and the kernel."""
    key = next(iter(plan.kernels))
    name = plan.kernels[key][kind]
    return replace(plan, files={**plan.files, name: plan.files[name] + extra}), key


def test_a_plan_as_it_was_compiled_is_rebuilt_to_the_same_bytes(plan: Plan) -> None:
    with no_compiler():
        again = rebuild(plan)
    assert (again.built, again.differing, again.not_built) == (len(plan.kernels), (), ())
    assert again.toolchain.startswith("nvidia-cutlass-dsl")


@pytest.mark.parametrize("kind", ["cubin", "ptx"])
def test_other_machine_code_is_listed(plan: Plan, kind: str) -> None:
    wrong, key = altered(plan, kind, b"\0")
    with no_compiler():
        assert rebuild(wrong).differing == (key,)


def test_a_source_that_was_not_generated_is_listed_and_not_run(plan: Plan) -> None:
    wrong, key = altered(plan, "source", b"# written by hand\n")
    with no_compiler():
        again = rebuild(wrong)
    assert (again.built, again.differing, again.not_built) == (len(plan.kernels) - 1, (), (key,))


def test_the_command_lists_what_differs_and_fails(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "sound")
    wrong, key = altered(plan, "cubin", b"\0")
    wrong.save(tmp_path / "wrong")
    with no_compiler():
        sound = CliRunner().invoke(app, ["verify", str(tmp_path / "sound"), "--rebuild"])
        result = CliRunner().invoke(app, ["verify", str(tmp_path / "wrong"), "--rebuild", "--json"])
    assert sound.exit_code == 0
    assert f"{len(plan.kernels)} cubins are what nvidia-cutlass-dsl" in sound.stdout
    assert "machine code" not in sound.stdout
    assert result.exit_code == PlanError.exit_code
    assert json.loads(result.stdout)["rebuilt"]["differing"] == [key]


def test_a_plan_for_the_cpu_has_nothing_to_build(tmp_path: Path) -> None:
    gpu_plan(target="cpu", certify=False).save(tmp_path / "p")
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "p"), "--rebuild"])
    assert result.exit_code == 0
    assert "cubins" not in result.stdout
    assert "bodies are what this version spells out" in result.stdout
