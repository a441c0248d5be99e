"""`compile --kernels`: files that a person edited take the place of generated kernels, and are only built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dsv4c
from dsv4c.cli import app
from dsv4c.codegen.build import Source, source_key
from dsv4c.compiler.again import rebuild
from dsv4c.compiler.verify import check
from dsv4c.errors import BuildError
from dsv4c.plan.folder import Plan
from tests.codegen.lowered import gpu_plan, no_compiler

ONE_ROW = {"batch": 1, "verify": 1, "chunk": 1, "max_context": 256}


@pytest.fixture(scope="module")
def generated() -> Plan:
    return gpu_plan(certify=False, **ONE_ROW)


@pytest.fixture
def argmax(generated: Plan, tmp_path: Path) -> Path:
    """The file of one kernel as it was generated."""
    (name,) = (n for n, record in generated.kernels.items() if record["symbol"] == "argmax_0")
    path = tmp_path / "mine" / f"{name}.py"
    path.parent.mkdir()
    path.write_bytes(generated.files[f"kernels/{name}.py"])
    return path


def test_an_edited_kernel_is_in_the_plan_and_listed(generated: Plan, argmax: Path, tmp_path: Path) -> None:
    argmax.write_text(argmax.read_text().replace('"""', '"""Tuned by hand. ', 1))
    plan = gpu_plan(certify=False, kernels=argmax.parent, **ONE_ROW)
    assert [name for name, record in plan.kernels.items() if record["edited"]] == [argmax.stem]
    assert plan.kernels[argmax.stem]["origin"] == "dsv4c"
    assert plan.files[f"kernels/{argmax.stem}.py"] == argmax.read_bytes()
    assert plan.buckets == generated.buckets  # only the kernel is another
    assert check(plan) == []
    with no_compiler():
        again = rebuild(plan)
    assert (again.built, again.differing, again.not_built) == (len(plan.kernels) - 1, (), (argmax.stem,))
    plan.save(tmp_path / "p")
    for command in ("show", "verify"):
        assert argmax.stem in CliRunner().invoke(app, [command, str(tmp_path / "p")]).stdout


def test_files_as_they_were_generated_change_nothing(generated: Plan, tmp_path: Path) -> None:
    generated.save(tmp_path / "p")
    assert gpu_plan(certify=False, kernels=tmp_path / "p" / "kernels", **ONE_ROW).digest == generated.digest


def test_reading_a_plan_runs_none_of_its_kernels(argmax: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    argmax.write_text(
        argmax.read_text().replace("\nimport", f"\nopen({str(mark)!r}, 'w').close()\nimport", 1)
    )
    plan = gpu_plan(certify=False, kernels=argmax.parent, **ONE_ROW)
    plan.save(tmp_path / "p")
    check(dsv4c.load(tmp_path / "p"))
    with no_compiler():
        rebuild(plan)
    assert not mark.exists()


def replaced(old: str, new: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return edit


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "another operand": (
        lambda p: p.write_text(p.read_text().replace("m_token: cute", "m_tokens: cute")),
        r"has parameters m_logits, m_tokens; its launches were made for parameters m_logits, m_token",
    ),
    "another block": (replaced("THREADS = ", "THREADS = 2"), r"has block 2\d+; its launches .* block \d+"),
    "another grid": (replaced("grid=[rows", "grid=[sequences"), r"a grid of 'sequences \* 2'; expected"),
    "a larger grid": (
        replaced("grid=[rows * ", "grid=[rows * 1"),
        r"has grid \[rows \* 12, 1, 1\]; .* grid \[rows \* 2,",
    ),
    "more shared memory": (replaced("ptx.shared(", "ptx.shared(9"), r"has shared 9\d+; .* shared \d+"),
    "no wait": (replaced("ptx.wait()", "pass"), r"has waits False; .* waits True"),
    "no Python": (replaced("ptx.wait()", "ptx.wait(("), r"line \d+: .*never closed"),
    "no kernel": (lambda p: p.write_text("x = 1\n"), r"has no host function"),
    "a name of nothing": (
        lambda p: p.rename(p.with_stem("argmax_0123abcd")),
        r"is no kernel of this plan, whose kernels are .*argmax_",
    ),
    "a name of no text": (lambda p: p.write_bytes(b"\xff"), r"is not text at byte 0"),
    "a folder of none": (lambda p: p.unlink() or p.parent.rmdir(), r"is no folder; give one of kernel files"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_an_edit_that_does_not_fit_is_refused(argmax: Path, mistake: str) -> None:
    spoil, sentence = WRONG[mistake]
    spoil(argmax)
    with pytest.raises(BuildError, match=sentence):
        gpu_plan(certify=False, kernels=argmax.parent, **ONE_ROW)


def test_the_cpu_has_no_kernels(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="the cpu has no kernels to edit"):
        gpu_plan(target="cpu", certify=False, kernels=tmp_path)


def test_the_store_keeps_an_edited_kernel_apart() -> None:
    keys = {source_key(Source("k_0", text), "sm_90a") for text in ("a", "b")}
    assert len(keys) == 2
    assert Source("k_0", "a").name != Source("k_0", "b").name
