"""Kernels of other packages: found by their entry points, asked first, in the plan with their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsv4c.codegen import build as kernels
from dsv4c.codegen import contributed
from dsv4c.codegen.build import Package, Source, build, source_key
from dsv4c.codegen.contributed import installed
from dsv4c.compiler.again import rebuild
from dsv4c.compiler.job import rules_of
from dsv4c.compiler.verify import check
from dsv4c.errors import BuildError
from dsv4c.passes.pipeline import Contributions
from dsv4c.plan.folder import Plan
from tests.codegen.lowered import gpu_plan, no_compiler
from tests.codegen.test_build import ADD

EXAMPLE = Path(__file__).parents[2] / "examples" / "greedy_head" / "src"
SIZES = {"batch": (1, 2), "verify": 1, "chunk": 1, "max_context": 256, "certify": False}
KERNEL = """
from dsv4c.codegen.registry import No, kernel
from dsv4c.ir.ops.sample import Argmax


@kernel(Argmax)
def {name}(request):
    return No("not today")
"""

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    """Packages with kernels, as `module: (text, ...)`; those of the example are there already."""
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)

    def given(*names: str, **texts: str) -> None:
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(text)
        entries = [
            SimpleNamespace(
                name=name, value=name, module=name, dist=SimpleNamespace(name=f"the-{name}", version="1.2")
            )
            for name in (*names, *texts)
        ]
        loaded = [(entry, import_module(entry.module)) for entry in entries]
        monkeypatch.setattr(contributed, "loaded_entries", lambda group: iter(loaded))

    return given


@pytest.fixture
def rules(install: Install) -> Contributions:
    install("dsv4c_greedy_head_kernel")
    return rules_of(["dsv4c_greedy_head"])


def launched(plan: Plan, op: str) -> list[str]:
    return [x.kernel.kernel for p in plan.buckets.values() for x in p.launches if x.op == op]


def test_a_contributed_kernel_takes_its_op(rules: Contributions) -> None:
    plan = gpu_plan(rules=rules, require_fused=["greedy_head"], **SIZES)
    names = launched(plan, "greedy_head")
    assert len(names) == 4
    assert len(set(names)) == 3  # two numbers of rows; the choice serves both
    package = "the-dsv4c_greedy_head_kernel 1.2"
    assert {plan.kernels[name]["origin"] for name in names} == {package}
    assert [n for n, r in plan.kernels.items() if r["origin"] != "dsv4c"] == sorted(set(names))
    origin = next(o for o in plan.contributed if o["kind"] == "kernel")
    assert origin["name"] == "greedy_head"
    assert origin["source"] == f"package {package} (dsv4c_greedy_head_kernel)"
    assert origin["at"].startswith("dsv4c_greedy_head_kernel.py:")
    assert check(plan, rules) == []
    with no_compiler():
        assert rebuild(plan).built == len(plan.kernels)


def test_a_plan_whose_package_is_gone_says_what_to_install(rules: Contributions, install: Install) -> None:
    plan = gpu_plan(rules=rules, **SIZES)
    install()
    (violation,) = check(plan, rules)
    assert "greedy_head of package the-dsv4c_greedy_head_kernel 1.2 (dsv4c_greedy_head_kernel)" in str(
        violation
    )
    assert "is that installed?" in str(violation)


def test_what_says_no_changes_nothing_but_the_reasons(install: Install) -> None:
    plain = gpu_plan(**SIZES)
    install(declines=KERNEL.format(name="declines"))
    plan = gpu_plan(**SIZES)
    assert plan.digest == plain.digest


def test_two_packages_with_one_kernel_are_named(install: Install) -> None:
    install(one=KERNEL.format(name="one"), two=KERNEL.format(name="two"))
    both = r"package the-one 1.2 \(one\) and package the-two 1.2 \(two\) both contribute a kernel for argmax"
    with pytest.raises(BuildError, match=both):
        gpu_plan(**SIZES)


def test_what_contributes_no_kernel(install: Install) -> None:
    install(nothing="x = 1\n")
    with pytest.raises(
        BuildError, match=r"package the-nothing 1.2 \(nothing\) contributes <module 'nothing'"
    ):
        installed()


def altered(change: Callable[[Any], Any]) -> Callable[[Any], Sequence[Any]]:
    """The example's candidate with its emissions changed."""
    asked = import_module("dsv4c_greedy_head_kernel").greedy_head.ask

    def ask(request: Any) -> Sequence[Any]:
        return [replace(launch, emission=change(launch.emission)) for launch in asked(request)]

    return ask


WRONG_ABI = {
    "operands": (
        lambda e: {"source": e.source.replace("m_head: cute", "m_weight: cute")},
        r"greedy_logits_0: its text has parameters m_x, m_weight, m_logits, m_best, its emission parameters "
        "m_x, m_head, m_logits, m_best",
    ),
    "threads": (lambda e: {"block": 128}, r"its text has block 256, its emission block 128"),
    "shared memory": (lambda e: {"shared": 99}, r"its text has shared 64, its emission shared 99"),
    "wait": (
        lambda e: {"source": e.source.replace("ptx.wait()", "pass")},
        r"its text has waits False, its emission waits True",
    ),
    "no text": (lambda e: {"source": "x = 1\n"}, r"kernel greedy_logits_0: has no host function"),
    "grid": (lambda e: {"grid": (3, 1, 1)}, r"has a grid of \(3, 1, 1\), which its kernel has not"),
}


@pytest.mark.parametrize("mistake", WRONG_ABI)
def test_a_wrong_abi_is_a_sentence_that_names_the_package(rules: Contributions, mistake: str) -> None:
    change, sentence = WRONG_ABI[mistake]
    right = import_module("dsv4c_greedy_head_kernel").greedy_head
    wrong = replace(right, ask=altered(lambda e: replace(e, **change(e))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contributed, "kernels_in", lambda given: (wrong,))
        with pytest.raises(BuildError, match=sentence) as error:
            gpu_plan(rules=rules, **SIZES)
    assert mistake == "grid" or "package the-dsv4c_greedy_head_kernel 1.2" in str(error.value)


def test_the_store_goes_by_the_packages_files(install: Install, tmp_path: Path) -> None:
    install(mine=KERNEL.format(name="mine"))
    (one,) = installed()
    (tmp_path / "mine.py").write_text(KERNEL.format(name="mine") + "# changed\n")
    (two,) = installed()
    assert (one.package, two.package) != (None, None)
    keys = {source_key(Source("k_0", "text", each.package), "sm_90a") for each in (one, two)}
    assert len(keys | {source_key(Source("k_0", "text"), "sm_90a")}) == 3


def test_a_contributed_text_may_import_its_package(tmp_path: Path) -> None:
    """In the compiler's process, which finds nothing else of the caller's."""
    (tmp_path / "beside.py").write_text("ADDEND = 3\n")
    text = ADD.format(addend="beside.ADDEND").replace(
        "import cutlass\n", "import beside\nimport cutlass\n", 1
    )
    package = Package("p", "1", "beside", str(tmp_path), kernels.lib_digest())
    (made,) = build([Source("add_0", text, package)], "sm_90a", tmp_path / "store", workers=1)
    assert made.cubin.startswith(b"\x7fELF")
    with pytest.raises(BuildError, match="No module named 'beside'"):
        build([Source("add_0", text)], "sm_90a", tmp_path / "store", workers=1)
