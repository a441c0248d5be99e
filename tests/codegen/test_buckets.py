"""Plans of several buckets: every node has a kernel in each, and kernels that no row decides are shared."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from benchmarks.plans import first_layers
from dsv4c.compiler.verify import check
from dsv4c.plan.folder import Plan
from dsv4c.plan.records import KernelCode, Program
from dsv4c.scope import Scope
from tests.codegen.lowered import gpu_plan

OF_ROWS = {
    *("in_proj_0", "q_proj_0", "wo_a_0", "wo_b_0", "head_0", "router_gate_0"),
    *("experts_up_0", "experts_down_0", "router_rows_0"),
    *("attention_swa_0", "attention_csa_0", "attention_hca_0"),
}
"""Kernels of any number of rows of their own: a weight meets all rows at once, or they take turns on it; and
attention of two or three, which have SMs to themselves.
"""


def kernels(plan: Plan, program: Program) -> set[tuple[str, str]]:
    """(symbol, key) of what a bucket launches."""
    keys = {launch.code.kernel for launch in program.launches if isinstance(launch.code, KernelCode)}
    return {(plan.kernels[key]["symbol"], key) for key in keys}


@pytest.fixture(scope="module", params=["official", "nvfp4"])
def flash(request: pytest.FixtureRequest) -> Plan:
    """Three kinds of layers in full width, with every bucket that GPUs have kernels for."""
    config = first_layers("deepseek-v4-flash", 6)
    return gpu_plan(
        config, recipe=request.param, max_context=8192, batch=(1, 2, 8), verify=4, chunk=8, slots=9
    )


def test_every_bucket_has_kernels_for_what_is_fused(flash: Plan) -> None:
    assert list(flash.buckets) == ["decode-1", "decode-2", "decode-8", "verify-1x4", "prefill-8"]
    turns = flash.recipe == "official"  # several rows' experts; logits of hash layers are made once then
    for name, program in flash.buckets.items():
        symbols = [flash.kernels[launch.kernel.kernel]["symbol"] for launch in program.launches]
        assert symbols.count("router_rows_0") == (3 if turns and name != "decode-1" else 0)
        others = zip(program.launches, symbols, strict=True)
        ops = [launch.op for launch, symbol in others if symbol != "router_rows_0"]
        assert ops == [launch.op for launch in flash.buckets["decode-1"].launches]


def test_launches_of_a_large_chunk() -> None:
    """By layer: SWA with its experts chosen by hash, CSA too, HCA, CSA; as many as of a small one, none for
    some of the rows.
    """
    config = first_layers("deepseek-v4-flash", 6)
    plan = gpu_plan(config, max_context=131072, batch=1, verify=1, chunk=(64, 4096))
    small, large = (plan.buckets[f"prefill-{n}.last"].launches for n in (64, 4096))
    layers = Counter(layer for launch in large if (layer := Scope.of(launch.scope).layer))
    assert list(layers.values()) == [23, 23, 28, 25, 28, 25]
    assert [launch.op for launch in small] == [launch.op for launch in large]
    # Of these, 0.2e9 are what experts make of 6 x 4,096 rows, before their sum.
    assert plan.report["buckets"]["prefill-4096.last"]["arena_bytes"] < 1.2e9
    assert plan.report["unfolded"] == []


def test_kernels_that_rows_do_not_decide_are_shared(flash: Plan) -> None:
    first = kernels(flash, flash.buckets["decode-1"])
    for name, program in flash.buckets.items():
        own = {symbol for symbol, _ in kernels(flash, program) - first}
        tokens = program.bucket.tokens if program.bucket else 0
        # Tokens of one sequence per launch decide how a window is pooled, which rides in q_proj.
        assert own <= OF_ROWS | ({"positions_0"} if tokens > 1 else set()), (name, own)
    assert len(flash.kernels) < 3 * len(first)


def test_logits_of_last_rows_alone_take_one_launch_more() -> None:
    options = {"max_context": 256, "batch": 1, "verify": 1, "chunk": 8}
    every, last = (gpu_plan("tiny", logits=logits, **options).buckets for logits in ("all", "last"))
    ops = [launch.op for launch in last["prefill-8.last"].launches]
    assert ops.count("last_rows") == 1
    ops.remove("last_rows")
    assert ops == [launch.op for launch in every["prefill-8"].launches]


@pytest.mark.parametrize("recipe", ["official", "bf16", "nvfp4-experts", "nvfp4", "fp32"])
def test_buckets_of_many_rows_lower_in_every_recipe(recipe: str) -> None:
    """No launch is repeated for some of the rows; what a sequence keeps is the same for all buckets."""
    plan = gpu_plan(recipe=recipe, batch=(1, 64), chunk=(63, 256), verify=1)
    assert check(plan) == []
    assert list(plan.buckets) == ["decode-1", "decode-64", "prefill-63.last", "prefill-256.last"]
    counts = {name: len(program.launches) for name, program in plan.buckets.items()}
    assert counts["decode-64"] < 2 * counts["decode-1"] + 16  # rows listed by expert, encoded, boundaries
    assert counts["prefill-63.last"] == counts["prefill-256.last"]
    if recipe != "fp32":
        assert plan.report["unfolded"] == []


@pytest.mark.parametrize("recipe", ["bf16", "nvfp4"])
def test_a_compressor_pools_in_one_order_in_every_bucket(recipe: str) -> None:
    """Where it rides beside a product, and in a chunk's launch of its own."""
    plan = gpu_plan(recipe=recipe, batch=(1, 64), chunk=(63, 256), verify=4)
    threads = dict[str, set[str]]()
    for name, text in plan.files.items():
        if name.endswith(".py"):
            found = re.finditer(r"^(\w+) = Pool\(.*?threads=(\d+),", text.decode(), re.MULTILINE | re.DOTALL)
            for pool in found:
                threads.setdefault(pool[1], set()).add(pool[2])
    assert len(threads) == 2
    assert {len(counts) for counts in threads.values()} == {1}, threads


def test_slots_are_bound_wherever_state_is(flash: Plan) -> None:
    for program in flash.buckets.values():
        for launch in program.launches:
            names = {argument.value for argument in launch.arguments}
            spaces = {argument.space for argument in launch.arguments}
            if "state" in spaces:
                assert names & {"slots", "row_slots"}, launch.name
