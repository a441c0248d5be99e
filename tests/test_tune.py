"""`dsv4c tune`: other cuts of heavy kernels, the folder that carries them, the table that compile reads."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.plans import first_layers
from dsv4c.arch import SM_90A
from dsv4c.cli.tune import finalists, winners
from dsv4c.codegen.targets import TUNED
from dsv4c.compiler.again import lowered_again
from dsv4c.compiler.tune import variants
from dsv4c.compiler.verify import check as verify
from dsv4c.cuts import Cut, Row, cuts_for, read_rows, rows_text
from dsv4c.errors import ConfigError, PlanError
from dsv4c.plan.check import check
from dsv4c.plan.folder import Plan, load
from dsv4c.plan.variants import INDEX, read_variants
from dsv4c.runtime.tune import Timed
from tests.codegen.lowered import gpu_plan, no_compiler
from tests.commands import command

DECODE = {"batch": 1, "verify": 1, "chunk": 1, "certify": False}


@pytest.fixture(scope="module")
def flash() -> Plan:
    """A layer of each kind in full width."""
    return gpu_plan(first_layers("deepseek-v4-flash", 4), max_context=8448, **DECODE)


@pytest.fixture(scope="module")
def tiny() -> Plan:
    return gpu_plan(**DECODE)


def keys(plan: Plan) -> dict[str, str]:
    """What tables know the kernels by."""
    _, target = lowered_again(plan)
    made = target.coder.emissions
    return {name: e.tuned.key for name, e in made.items() if e.tuned is not None}


def test_the_heaviest_kernels_can_be_cut_in_twenty_ways(flash: Plan) -> None:
    with no_compiler():
        found = variants(flash, kernels=4, each=20)
    counts = {
        name: [v for v in found.variants if v.kernel == name]
        for name in dict.fromkeys(v.kernel for v in found.variants)
    }
    assert [len(of) for of in counts.values()] == [20] * 4
    assert {name.rpartition("_")[0] for name in counts} >= {"experts_up", "experts_down"}
    for of in counts.values():
        assert len({v.files[f"kernels/{v.name}.py"] for v in of}) == 20
        assert len({v.key for v in of}) == 1
    for variant in islice(found.variants, 0, None, 7):
        assert check(found.with_variant(variant)) == [], variant.cut


def test_a_folder_of_variants_is_read_whole_or_refused(tiny: Plan, tmp_path: Path) -> None:
    with no_compiler():
        made = variants(tiny, kernels=2, each=2)
    folder = made.save(tmp_path / "variants")
    again = read_variants(folder)
    assert again.variants == made.variants
    assert again.plan.digest == tiny.digest
    with pytest.raises(PlanError, match="exists; give another folder"):
        made.save(folder)
    with pytest.raises(PlanError, match=r"has no variants\.json; make it with `dsv4c tune PLAN --build"):
        read_variants(folder / "plan")
    index = folder / INDEX
    data = json.loads(index.read_text())
    cubin = folder / data["variants"][0]["record"]["cubin"]
    content = cubin.read_bytes()
    cubin.write_bytes(content[:-1])
    with pytest.raises(PlanError, match="is damaged; build the folder again"):
        read_variants(folder)
    cubin.write_bytes(content)
    for change, message in (
        ({"block": 7}, "threads"),
        ({"cut": {"rounds": -1}}, "expected numbers from 0 to 64"),
        ({"files": {"../plan/plan.json": ""}}, "is no file of a kernel"),
        ({"kernel": "another"}, "the plan has no kernel another"),
        ({"grid": [1, 2]}, "expected a list of 3"),
    ):
        index.write_text(json.dumps(data | {"variants": [data["variants"][0] | change]}))
        with pytest.raises(PlanError, match=message):
            read_variants(folder)
    index.write_text(json.dumps(data)[:-9])
    with pytest.raises(PlanError, match="cannot be read"):
        read_variants(folder)


def test_compile_takes_a_table_and_verify_knows_it(tiny: Plan, tmp_path: Path) -> None:
    name, key = next((n, k) for n, k in keys(tiny).items() if n.startswith("experts_down"))
    row = Row("H200", name, key, Cut(ahead=1), 0.98, "2026-11-30")
    table = tmp_path / "h200.json"
    table.write_text(rows_text([row, replace(row, gpu="H100", cut=Cut(stages=2))]))
    assert read_rows(table)[0] == row
    tuned = gpu_plan(tuned=table, **DECODE)
    stopped = tmp_path / "stopped.ir"
    options = ("--target", "sm_90a", "--batch", 1, "--verify", 1, "--chunk", 1, "--max-context", 256)
    assert command("compile", "tiny", *options, "--stop-after", "fold", "-o", stopped).code == 0
    with no_compiler():
        resumed = tmp_path / "resumed.plan"
        assert command("compile", "--resume", stopped, "--tuned", table, "-o", resumed).code == 0
    assert load(resumed).report["cuts"] == {key: {"ahead": 1}}
    assert tuned.report["cuts"] == {key: {"ahead": 1}}
    assert tiny.kernels.keys() - tuned.kernels.keys() == {name}
    assert tuned.weights == tiny.weights
    with no_compiler():
        assert verify(tuned) == []
        broken = replace(tuned, report=tuned.report | {"cuts": {}})
        assert "is not what this version of dsv4c writes" in str(verify(broken)[0])
        strange = replace(tuned, report=tuned.report | {"cuts": {key: {"tiles": 1}}})
        assert "expected numbers named ahead" in str(verify(strange)[0])


def test_tables_that_are_none_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    for text, message in (
        ("[", "is no JSON"),
        ("{}", "is no list of rows"),
        ('[{"gpu": "H200"}]', "row 0 has not the fields cut, date, gpu, kernel, key, ratio"),
    ):
        table.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_rows(table)
    refused = command("compile", "tiny", "--tuned", table)
    assert (refused.code, "is for a GPU's kernels, the target is cpu" in refused.err) == (2, True)


def test_options_of_the_other_call_are_refused(tmp_path: Path) -> None:
    building = command("tune", tmp_path, "--build", tmp_path / "variants", "-o", tmp_path / "table.json")
    assert "--output is for the call that times, this one builds variants" in building.err
    timing = command("tune", tmp_path, "--each", 4)
    assert "--each is for the call that builds, this one times variants" in timing.err
    assert (building.code, timing.code) == (2, 2)


def test_a_winner_is_faster_in_most_rounds_and_gives_the_same_bits(tiny: Plan) -> None:
    with no_compiler():
        first, second = variants(tiny, kernels=1, each=2).variants
    timed = Timed(first, 98.0, 100.0, 0.98, (0.979, 0.985), True)
    slower = replace(timed, variant=second, ratio=0.99)
    (row,) = winners([slower, timed], "H200")
    assert (row.key, row.cut, row.ratio) == (first.key, first.cut, 0.98)
    unlike = replace(timed, same=False)
    wavering = replace(timed, quartiles=(0.97, 1.001))
    assert winners([unlike, wavering, replace(timed, ratio=0.999)], "H200") == []
    slow = replace(slower, ratio=1.01)
    assert finalists([slow, slower, unlike, timed], count=2) == [timed, slower]


def test_our_own_rows_are_of_kernels_that_the_releases_have(flash: Plan) -> None:
    """A kernel that changes has another key, and its row is measured again or goes."""
    pro = gpu_plan(first_layers("deepseek-v4-pro", 4), max_context=8448, **DECODE)
    known = {*keys(flash).values(), *keys(pro).values()}
    assert {row.key for row in read_rows(TUNED)} <= known
    assert cuts_for(SM_90A.gpu, read_rows(TUNED)).keys() <= known
