"""Products of many rows without a device: text, cubins, plans that cover every tile, what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv4c.arch import SM_90A, SM_100A
from dsv4c.codegen.build import Source, build
from dsv4c.codegen.emit import Emission
from dsv4c.codegen.kernels.chunk_rows import (
    emit_choose_experts,
    emit_list_rows,
    emit_norm_quantize_fp8,
    emit_quantize_fp8,
    emit_sum_experts,
)
from dsv4c.codegen.kernels.gemm import GemmMatrix, GemmSpec, emit_gemm, few_of, tiles_of
from dsv4c.compiler.verify import check
from dsv4c.errors import BuildError
from dsv4c.numerics.forms import parse_packing
from dsv4c.numerics.packing import pack
from dsv4c.plan.check import check as check_plan
from dsv4c.plan.folder import load
from tests.codegen.lowered import gpu_plan
from tests.codegen.sass import disassemble
from tests.conftest import Golden

DENSE = GemmSpec("wq_b", 4096, 1024, (GemmMatrix(("w",), 32768, "y"),), "fp8/2x1", True, counted=True)
FEW = replace(DENSE, name="qa", rows=64, k=4096, matrices=(GemmMatrix(("w",), 1536, "y"),))
UP = GemmSpec(
    "up",
    4096 * 6,
    4096,
    (GemmMatrix(("w1", "w3"), 2048, "h"),),
    "mxfp4/1x4",
    True,
    limit=10.0,
    experts=256,
    divide=6,
)
UP_FEW = replace(UP, name="up_few", rows=64 * 6)
KINDS = (
    DENSE,
    FEW,
    UP,
    UP_FEW,
    replace(
        UP_FEW, name="down_few", matrices=(GemmMatrix(("w2",), 4096, "y"),), k=2048, limit=None, divide=1
    ),
    replace(DENSE, name="wo_a", packing="fp8/8x1", scaled=False, k=4096, groups=8),
    replace(DENSE, name="kv", packing="bf16/1x2", scaled=False, out_dtype="f32"),
    replace(DENSE, name="gate", packing="plain", scaled=False, out_dtype="f32"),
    replace(UP, name="nvfp4", packing="nvfp4/1x2", rows=64),
)
ROWS = (
    emit_quantize_fp8("quantize", 3072, 2048, 6, counted=True),
    emit_norm_quantize_fp8("norm_quantize_fp8", 512, 1024, 1e-6, counted=True),
    emit_list_rows("list_rows", 512, 6, 256, counted=True),
    emit_sum_experts("sum_experts", 512, 6, 4096, counted=True),
    emit_sum_experts("sum_addends", 512, 6, 4096, counted=True, out="f32"),
    emit_choose_experts("choose", 512, 6, 256, 1.5, False, counted=True),
    emit_choose_experts("choose_table", 512, 6, 256, 1.5, True),
)


def test_texts(golden: Golden) -> None:
    golden(emit_gemm(UP, SM_90A).source, "kernels/gemm_experts.py.txt")
    golden(emit_gemm(UP_FEW, SM_90A).source, "kernels/gemm_few_rows.py.txt")
    golden(emit_gemm(FEW, SM_90A).source, "kernels/gemm_splits.py.txt")
    golden(ROWS[5].source, "kernels/choose_experts.py.txt")


def test_they_assemble_and_multiply_without_waits_between(tmp_path: Path) -> None:
    """A step is four products in flight together, or eight of 256 rows whose sums need no scales; registers
    hold what the loading warps have in flight. Descriptors are uniform: no lane's own branch is in the loop.
    Few rows meet 16 x 16 weights at a time, two units of them for 8 or 16 rows.
    """
    emissions = [*(emit_gemm(spec, SM_90A) for spec in KINDS), *ROWS]
    built = build([Source(e.symbol, e.source) for e in emissions], "sm_90a", tmp_path)
    expected = [(0, 0, 0)] * len(emissions)
    for i, spec in enumerate(KINDS):
        t = tiles_of(spec, SM_90A.sms)
        expected[i] = (0, 0, 48) if few_of(spec) else (4 * t.halves, t.halves if t.promotes else 2, 0)
    for emission, kernel, products in zip(emissions, built, expected, strict=True):
        assert kernel.resources.stack <= 96, (emission.symbol, kernel.resources)
        code = disassemble(kernel.cubin, tmp_path)
        found = list(re.finditer(r"[HQ]GMMA\.64x", code))
        counts = (len(found), code.count("WARPGROUP.DEPBAR"), code.count("HMMA.16816"))
        assert counts == products, emission.symbol
        if found:
            assert "R2UR" not in code[found[0].start() : found[-1].end()], emission.symbol


def covered(spec: GemmSpec) -> list[int]:
    """How many clusters have each tile of a bucket that is full."""
    t, emission = tiles_of(spec, SM_90A.sms), emit_gemm(spec, SM_90A)
    tiles = -(-spec.rows // t.height) * sum(-(-m.rows // t.made) for m in spec.matrices)
    clusters = emission.grid[0] // t.splits
    taken = [0] * tiles
    for cluster in range(clusters):
        for tile in range(cluster, tiles, clusters):
            taken[tile] += 1
    return taken


@pytest.mark.parametrize("rows", [9, 64, 65, 512, 4096])
@pytest.mark.parametrize("columns", [8, 512, 1536, 32768])
def test_every_tile_is_taken_once(rows: int, columns: int) -> None:
    spec = replace(DENSE, rows=rows, k=4096, matrices=(GemmMatrix(("w",), columns, "y"),))
    assert set(covered(spec)) == {1}
    t = tiles_of(spec, SM_90A.sms)
    assert t.steps * t.splits * t.each == spec.k
    assert t.steps % (t.ahead * t.loaders) == 0
    assert t.stages > t.loaders  # a team fills a stage while others are multiplied
    assert t.shared <= SM_90A.shared_per_cta


def test_what_they_do_not_take_is_said() -> None:
    with pytest.raises(BuildError, match="wgmma, which sm_100a has not"):
        emit_gemm(DENSE, SM_100A)
    with pytest.raises(BuildError, match="does not multiply bf16 rows with mxfp4"):
        emit_gemm(replace(DENSE, packing="mxfp4/1x1", scaled=False), SM_90A)
    with pytest.raises(BuildError, match="want a multiple of 128"):
        emit_gemm(replace(DENSE, k=1000), SM_90A)


@pytest.mark.parametrize(("rows", "each"), [(64, True), (512, True), (4096, False)])
def test_experts_with_few_rows_have_tiles_of_their_own(rows: int, each: bool) -> None:
    spec = replace(UP, rows=rows * 6)
    few = few_of(spec)
    assert (few is not None) == each
    if few is not None:
        assert few.steps * few.TOGETHER * 128 == spec.k
        assert few.shared <= SM_90A.shared_of(few.RESIDENT)
        assert emit_gemm(spec, SM_90A).grid == (few.RESIDENT * SM_90A.sms, 1, 1)
    others = ("nvfp4/1x2", "mxfp4/2x1", "mxfp4/2x3")
    for other in (
        *(replace(spec, packing=p) for p in others),
        replace(spec, k=384),
        replace(spec, experts=0),
    ):
        assert few_of(other) is None


@pytest.mark.parametrize("packing", ["mxfp4/1x4", "mxfp4/1x2", "mxfp4/2x1"])
@pytest.mark.parametrize("rows", [64, 4096])
def test_expanded_weights_have_slots_of_their_own(rows: int, packing: str) -> None:
    t = tiles_of(replace(UP, rows=rows, experts=0, packing=packing), SM_90A.sms)
    assert t.expands
    assert t.steps % t.together == 0
    assert t.span % t.together == 0
    assert t.slots > 1
    assert t.shared <= SM_90A.shared_per_cta


def test_a_product_ahead_of_what_its_rows_come_from_is_found() -> None:
    """A chunk's launches in order pass; without its edge each product races with the rows made for it."""
    plan = gpu_plan(batch=1, verify=1, chunk=64, max_context=128)
    assert check(plan) == []
    name = "prefill-64.last"
    every = list(plan.buckets[name].launches)
    stages = [launch.name.rpartition(".")[2] for launch in every]
    for first, product in (("quantize", "product1"), ("list_rows", "up"), ("quantize_h", "down")):
        index = stages.index(product)
        assert first in stages[:index]
        broken = [replace(x, after=()) if i == index else x for i, x in enumerate(every)]
        program = replace(plan.buckets[name], launches=tuple(broken))
        races = check(replace(plan, buckets={**plan.buckets, name: program}))
        assert ("order", every[index].name) in {(v.kind, v.launch) for v in races}


@pytest.mark.parametrize("packing", ["fp8/1x1", "fp8/2x1", "fp8/8x1", "fp8/16x2", "bf16/1x2"])
@pytest.mark.parametrize("paired", [False, True])
def test_boxes_bring_what_a_step_of_a_tile_has(packing: str, paired: bool) -> None:
    form = parse_packing(packing)
    data = torch.arange(384 * 512).mul(2654435761).view(384, 512)
    data = (
        data.to(torch.bfloat16) if form.format == "bf16" else data.to(torch.uint8).view(torch.float8_e4m3fn)
    )
    names, limit = (("w", "v"), 10.0) if paired else (("w",), None)
    matrix = GemmMatrix(names, 384, "y")
    spec = replace(
        DENSE, k=512, matrices=(matrix,), packing=packing, scaled=form.format == "fp8", limit=limit
    )
    t = tiles_of(spec, SM_90A.sms)
    box = next(p.box for p in emit_gemm(spec, SM_90A).parameters if p.operand == "w" and p.box)
    sizes = (box.sizes[0] * box.element, *box.sizes[1:])
    array = pack(form, data).as_strided(sizes[::-1], (*box.strides[::-1], 1))
    alone = pack(replace(form, tiles=1, span=1), data).view(24, -1, t.unit)
    assert t.run == (4 if paired else 8)
    for tile in range(0, 24, t.run):
        for step in range(512 // t.each):
            place = (0, step % t.span, tile % t.tiles, step // t.span, tile // t.tiles)
            part = array
            for axis, (at, size) in enumerate(zip(reversed(place), reversed(box.box), strict=True)):
                part = part.narrow(axis, at, size if axis < 4 else sizes[0])
            assert torch.equal(part.reshape(-1, t.unit), alone[tile : tile + t.run, step])


def test_boxes_are_in_the_plan(tmp_path: Path) -> None:
    plan = gpu_plan(batch=1, verify=1, chunk=64, max_context=128)
    boxes = [a.box for x in plan.buckets["prefill-64.last"].launches for a in x.arguments]
    assert any(boxes)
    assert load(plan.save(tmp_path / "plan")).buckets == plan.buckets
    program = plan.buckets["prefill-64.last"]
    at = next(i for i, x in enumerate(program.launches) if any(a.box for a in x.arguments))
    launch = program.launches[at]
    for change in ({"sizes": (1 << 40, 1)}, {"strides": (8,)}, {"box": (512, 64)}, {"element": 4}):
        spoiled = [
            replace(a, box=replace(a.box, **change)) if a.box and len(a.box.sizes) == 2 else a
            for a in launch.arguments
        ]
        launches = (
            *program.launches[:at],
            replace(launch, arguments=tuple(spoiled)),
            *program.launches[at + 1 :],
        )
        buckets = {**plan.buckets, "prefill-64.last": replace(program, launches=launches)}
        violations = check_plan(replace(plan, buckets=buckets))
        assert [(v.kind, v.launch) for v in violations] == [("launch", launch.name)], change


def operands(emission: Emission) -> list[str]:
    return [p.name for p in emission.parameters]


def test_operands() -> None:
    assert operands(emit_gemm(DENSE, SM_90A)) == ["m_x", "m_x_scale", "m_w", "m_w_scale", "m_y", "m_lengths"]
    experts = ["m_x", "m_x_scale", "m_w1", "m_w3", "m_h", "m_order", "m_counts", "m_weights"]
    assert operands(emit_gemm(UP, SM_90A)) == experts
