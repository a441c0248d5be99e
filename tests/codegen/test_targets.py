"""Every kernel of a tiny model, compiled for both targets; what the FP4 conversions become there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsv4c.codegen.build import TARGETS
from dsv4c.compiler.compile import compile
from dsv4c.plan.folder import Plan
from tests.codegen.sass import disassemble

ONE_ROW = {"batch": 1, "verify": 1, "chunk": 1}
RECIPES = ("official", "bf16", "nvfp4-experts", "nvfp4")
TO_E2M1 = "cvt.rn.satfinite.e2m1x2.f32"
FROM_E2M1 = "cvt.rn.f16x2.e2m1x2"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all, so that kernels which plans share are compiled once."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def plans(store: Path) -> dict[tuple[str, str], Plan]:
    """Plans by target and recipe; those of the official one with the most rows and with several of a
    sequence.
    """
    buckets = dict.fromkeys(RECIPES, ONE_ROW) | {"official": {"batch": (1, 8), "chunk": 8}}
    return {
        (target, recipe): compile(
            "tiny",
            target=target,
            max_context=256,
            recipe=recipe,
            cache=store,
            certify=False,
            **buckets[recipe],
        )
        for target in TARGETS
        for recipe in RECIPES
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_assembles_without_a_stack(
    plans: dict[tuple[str, str], Plan], target: str, recipe: str
) -> None:
    plan = plans[target, recipe]
    assert len(plan.kernels) > 20
    for record in plan.kernels.values():
        assert record["stack"] == 0, record["symbol"]
        assert record["not_run_here"] == (target == "sm_100a")
        assert plan.files[record["cubin"]].startswith(b"\x7fELF")
        ptx = plan.files[record["ptx"]].decode()
        assert f".target {target}" in ptx
        assert f".entry {record['symbol']}(" in ptx


def test_progress_counts_stages_and_kernels_to_the_end(plans: object, store: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    plan = compile(
        "tiny",
        target="sm_90a",
        max_context=256,
        cache=store,
        progress=lambda *call: calls.append(call),
        **ONE_ROW,
    )
    assert calls[-1][1] == calls[-1][2]
    assert ("build", len(plan.kernels), len(plan.kernels)) in calls


def test_a_second_compile_finds_every_kernel(plans: dict[tuple[str, str], Plan], store: Path) -> None:
    first = plans["sm_90a", "nvfp4"]
    options = {"max_context": 256, "recipe": "nvfp4", "cache": store, "certify": False, **ONE_ROW}
    again = compile("tiny", target="sm_90a", **options)
    assert again.cache_hits == len(first.kernels)
    assert again.text == first.text


def test_a_plan_says_that_sm_100a_has_not_been_run(plans: dict[tuple[str, str], Plan]) -> None:
    text = {target: plans[target, "official"].text for target in TARGETS}
    assert "have not been run on that hardware" in text["sm_100a"]
    assert "have not been run on that hardware" not in text["sm_90a"]


def conversions(plan: Plan) -> dict[str, set[str]]:
    """Symbols of the kernels with each conversion of e2m1."""
    found: dict[str, set[str]] = {}
    for record in plan.kernels.values():
        for name in re.findall(r"cvt\.\S*e2m1\S*", plan.files[record["ptx"]].decode()):
            found.setdefault(name, set()).add(record["symbol"])
    return found


def test_only_sm_100a_converts_fp4_in_hardware(plans: dict[tuple[str, str], Plan]) -> None:
    for recipe in RECIPES:
        assert conversions(plans["sm_90a", recipe]) == {}
    assert conversions(plans["sm_100a", "bf16"]) == {}
    for recipe in ("official", "nvfp4-experts"):
        found = conversions(plans["sm_100a", recipe])
        assert found.keys() == {TO_E2M1, FROM_E2M1}
        assert {"index_choice_0", "q_proj_0"} <= found[TO_E2M1]  # queries, keys
        assert {"experts_up_0", "experts_down_0"} <= found[FROM_E2M1]  # weights
    found = conversions(plans["sm_100a", "nvfp4"])
    assert {"quantize_0", "norm_quantize_0"} <= found[TO_E2M1]  # rows
    assert {"q_proj_0", "experts_up_0"} <= found[FROM_E2M1]  # rows and weights


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_has_the_conversions(
    plans: dict[tuple[str, str], Plan], target: str, tmp_path: Path
) -> None:
    plan = plans[target, "official"]
    code: dict[str, str] = {}  # several layer types have a kernel of one name
    converting = ("experts_up_0", "experts_down_0", "index_choice_0", "q_proj_0")
    for record in plan.kernels.values():
        if record["symbol"] not in converting:
            continue
        text = disassemble(plan.files[record["cubin"]], tmp_path)
        assert "EXIT" in text
        code[record["symbol"]] = code.get(record["symbol"], "") + text
    for symbol in ("experts_up_0", "experts_down_0"):
        assert ("F2FP.F16.E2M1.UNPACK_B" in code[symbol]) == (target == "sm_100a")
    for symbol in ("index_choice_0", "q_proj_0"):
        assert ("F2FP.SATFINITE.E2M1.F32" in code[symbol]) == (target == "sm_100a")


def test_fp4_weights_lie_as_their_target_reads_them(plans: dict[tuple[str, str], Plan]) -> None:
    def forms(target: str) -> set[str]:
        return {r["form"].partition("/")[0] for r in plans[target, "official"].weights if "fp4" in r["form"]}

    assert forms("sm_90a") == {"mxfp4"}
    assert forms("sm_100a") == {"mxfp4_pairs"}
