"""The GEMV and experts' kernels as text: goldens, plans that cover every tile, cubins for both targets."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv4c.arch import ARCHS, SM_90A, Arch
from dsv4c.codegen.build import TARGETS, Source, build
from dsv4c.codegen.emit import Emission
from dsv4c.codegen.kernels.experts import ExpertsSpec
from dsv4c.codegen.kernels.experts_down import emit_experts_down
from dsv4c.codegen.kernels.experts_up import Routing, emit_experts_up
from dsv4c.codegen.kernels.gemv import BOUNDARY, Activations, GemvSpec, Matrix, emit_gemv, plan_parts
from dsv4c.codegen.kernels.quantize import QuantizeSpec, emit_quantize
from dsv4c.codegen.kernels.riders import CompressSpec, KvStoreSpec, Rider, seated
from dsv4c.codegen.lib.gemv import first_row
from dsv4c.codegen.lib.shapes import Down, Product, Ring, Up, UpPart
from dsv4c.errors import BuildError
from dsv4c.numerics.forms import parse_packing
from dsv4c.plan.declared import is_late
from tests.conftest import Golden

CODES = Activations("x", "e4m3")
EXPANDED = Activations("x", "f16", "expand")
ROWS = Activations("x_bf16", "bf16")
UNPACKED = Activations("x", "f16", "unpack")
KEPT = Activations("x_bf16", "f16", "quantize")
QUANTIZED = Activations("x_bf16", "e4m3", "quantize")
NORMALIZED = Activations("x_bf16", "e4m3", "normalize", gain="gain", eps=1e-6)


WINDOW = KvStoreSpec(512, "fp8", 128, 1e-6)
ENTRIES = CompressSpec("compress", 512, "fp8", 4, True, 8, 2048, 1e-6)
LONG = replace(ENTRIES, ratio=128, overlap=False, ring=128, capacity=64)
KEYS = CompressSpec("index", 128, "mxfp4", 4, True, 8, 2048, 1e-6, hadamard=True)


def dense(name: str, rows: int, k: int, format: str, x: Activations, batch: int = 1, **spec: int) -> GemvSpec:
    return GemvSpec(name, batch, k, (Matrix("w", rows, format, x, "y"),), **spec)


def in_proj(batch: int, k: int = 4096) -> GemvSpec:
    matrices = (
        Matrix("wq_a", 1024, "fp8", CODES, "q_a"),
        Matrix("wkv", 512, "fp8", CODES, "kv"),
        Matrix("compressor_wkv", 1024, "bf16", ROWS, "u", "f32"),
        Matrix("compressor_wgate", 1024, "bf16", ROWS, "s", "f32"),
        Matrix("weights_proj", 64, "bf16", ROWS, "wi"),
    )
    return GemvSpec("in_proj", batch, k, matrices)


def experts(routed: str, shared: str, batch: int = 1) -> ExpertsSpec:
    return ExpertsSpec(f"{routed}_{shared}", batch, 256, 128, 8, 2, routed, shared, 10.0)


def q_proj(name: str, batch: int, *riders: Rider, k: int = 1024, rows: int = 32768) -> GemvSpec:
    """wq_b, with a window's index queries beside it, and the state writes."""
    spec = dense(name, rows, k, "fp8", NORMALIZED, batch)
    index = Matrix("index_w", rows // 4, "fp8", NORMALIZED, "index_y")
    return replace(spec, matrices=(*spec.matrices, *([index] if KEYS in riders else [])), riders=riders)


FLASH = [
    in_proj(1),
    in_proj(8),
    dense("wq_b", 32768, 1024, "fp8", NORMALIZED),
    dense("wo_a", 8192, 4096, "fp8", KEPT, groups=8),
    dense("wo_b", 4096, 8192, "fp8", QUANTIZED, 3),
    dense("lm_head", 129280, 4096, "bf16", ROWS),
    dense("pro_q_proj", 73728, 1536, "fp8", NORMALIZED),
    q_proj("q_proj_swa", 1, WINDOW),
    q_proj("q_proj_csa", 1, WINDOW, ENTRIES, KEYS),
    q_proj("q_proj_hca", 8, WINDOW, LONG),
]
SMALL = [
    dense("codes", 208, 384, "fp8", CODES, 3),
    dense("expanded", 48, 256, "fp8", EXPANDED),
    dense("kept", 256, 256, "fp8", KEPT, 2, groups=2),
    dense("quantized", 64, 128, "mxfp4", QUANTIZED, 8),
    dense("normalized", 4608, 256, "fp8", NORMALIZED),
    dense("odd_bf16", 48, 96, "bf16", ROWS, 2),
    dense("nvfp4", 64, 384, "nvfp4", CODES),
    dense("w4a4", 136, 384, "nvfp4", UNPACKED, 3),
    dense("w4a4_groups", 256, 256, "nvfp4", UNPACKED, 2, groups=2),
    in_proj(1, 256),
    q_proj("q_proj_one_warp", 3, replace(WINDOW, width=128), KEYS, k=128, rows=512),
    q_proj("q_proj_wide_row", 2, WINDOW, ENTRIES, KEYS, k=128, rows=2048),
    q_proj(
        "q_proj_four", 8, WINDOW, replace(ENTRIES, ring=11, tokens=4), replace(KEYS, ring=11, tokens=4), k=256
    ),
    q_proj("q_proj_long", 8, replace(WINDOW, format="bf16"), replace(LONG, format="bf16"), k=256, rows=512),
]
SPLIT = [  # eight rows do not fit beside two stages of weights
    dense("split_bf16", 48, 16384, "bf16", ROWS, 7),
    dense("split_w4a4", 256, 16384, "nvfp4", UNPACKED, 5, groups=2),
    dense("split_codes", 256, 32768, "fp8", CODES, 8),
    in_proj(8, 16384),
]


BY_SCORE, BY_TABLE = Routing("scores", 1.5), Routing("table", 1.5)
BY_ROWS = Routing("rows", 1.5, stored=False)


def small_kernels(arch: Arch) -> list[Emission]:
    late = replace(dense("late", 64, 256, "fp8", QUANTIZED), late=True)
    kernels = [emit_gemv(spec, arch) for spec in (*SMALL, *SPLIT, late)]
    for routed, shared in (("mxfp4", "fp8"), ("nvfp4", "nvfp4"), ("fp8", "fp8"), ("bf16", "bf16")):
        spec = experts(routed, shared)
        for n, routing in enumerate((BY_SCORE, BY_TABLE, BY_ROWS)):
            kernels.append(emit_experts_up(replace(spec, name=f"up{n}_{spec.name}"), routing, arch))
        kernels.append(emit_experts_down(replace(spec, name=f"down_{spec.name}"), arch))
    packed = replace(experts("nvfp4", "nvfp4"), packed=True)
    kernels.append(emit_experts_up(replace(packed, name="up_w4a4"), BY_SCORE, arch))
    kernels.append(emit_experts_up(replace(packed, name="up_hash_w4a4"), BY_TABLE, arch))
    kernels.append(emit_experts_down(replace(packed, name="down_w4a4"), arch))
    return kernels


@pytest.mark.parametrize("k", [8, 64, 136, 160, 192, 320, 448, 1024, 4096, 7168])
@pytest.mark.parametrize("rounds", [1, 3])
def test_every_column_is_some_warps(k: int, rounds: int) -> None:
    (part,) = plan_parts(dense("odd", 64, k, "bf16", ROWS, rounds=rounds), SM_90A)
    ring = part.ring
    assert ring.k_warps * ring.steps * ring.span == ring.product.units == -(-k // 64)


def test_goldens(golden: Golden) -> None:
    golden(emit_gemv(in_proj(1), SM_90A).source, "kernels/gemv_in_proj.py.txt")
    golden(
        emit_gemv(dense("wq_b", 32768, 1024, "fp8", NORMALIZED), SM_90A).source, "kernels/gemv_wq_b.py.txt"
    )
    golden(emit_gemv(q_proj("q_proj", 2, WINDOW, ENTRIES, KEYS), SM_90A).source, "kernels/gemv_q_proj.py.txt")
    golden(emit_gemv(dense("wo_b", 4096, 8192, "nvfp4", UNPACKED), SM_90A).source, "kernels/gemv_w4a4.py.txt")
    golden(emit_gemv(SPLIT[1], SM_90A).source, "kernels/gemv_split.py.txt")
    golden(emit_quantize(QuantizeSpec("norm_quantize", 3, 1536, 1e-6)).source, "kernels/norm_quantize.py.txt")
    flash = ExpertsSpec("experts", 1, 4096, 2048, 256, 6, "mxfp4", "fp8", 10.0)
    golden(emit_experts_up(flash, BY_SCORE, SM_90A).source, "kernels/experts_up.py.txt")
    golden(emit_experts_up(flash, BY_ROWS, SM_90A).source, "kernels/experts_up_hash.py.txt")
    golden(emit_experts_down(flash, SM_90A).source, "kernels/experts_down.py.txt")


@pytest.mark.parametrize("spec", FLASH + SMALL + SPLIT, ids=lambda s: f"{s.name}-{s.batch}")
def test_a_plan_covers_every_tile_once(spec: GemvSpec) -> None:
    parts = plan_parts(spec, SM_90A)
    riders = len(spec.riders) * spec.batch
    assert [p.first for p in parts] == [riders + sum(q.ctas for q in parts[:i]) for i in range(len(parts))]
    assert riders + sum(p.ctas for p in parts) == emit_gemv(spec, SM_90A).grid[0]
    covered: Counter[tuple[str, int]] = Counter()
    for part in parts:
        r = part.ring
        assert part.ctas == part.splits * sum(slot.ctas for slot in part.slots)
        assert part.splits == math.ceil(spec.batch / r.product.rows)
        assert r.steps * r.k_warps * r.span == r.product.units  # a warp's steps cover k without a rest
        for slot in part.slots:
            for local in range(slot.ctas):
                for turn in range(r.rounds * r.matrices):
                    group = local + turn * slot.ctas if r.matrices == 1 else local * r.matrices + turn
                    for tile in range(group * r.tile_warps, (group + 1) * r.tile_warps):
                        if tile < -(-slot.matrix.rows // 16):
                            covered[slot.matrix.name, tile] += 1
    assert covered == {(m.name, tile): 1 for m in spec.matrices for tile in range(-(-m.rows // 16))}


@pytest.mark.parametrize("spec", FLASH, ids=lambda s: f"{s.name}-{s.batch}")
def test_two_ctas_fit_an_sm(spec: GemvSpec) -> None:
    """Or one that has the tiles of both, and a boundary's beside it."""
    (matrices,) = {part.ring.matrices for part in plan_parts(spec, SM_90A)}
    shared = emit_gemv(spec, SM_90A).shared + 1024
    assert 2 * shared <= SM_90A.shared_per_sm if matrices == 1 else shared + BOUNDARY <= SM_90A.shared_per_sm


def test_one_cta_quantizes_many_rows_for_the_tiles_of_two() -> None:
    wo_b = dense("wo_b", 4096, 8192, "fp8", QUANTIZED)
    for rows in range(1, 9):
        emission = emit_gemv(replace(wo_b, batch=rows), SM_90A)
        wanted = (256, 288) if rows == 1 else (256, 320) if rows == 2 else (128, 640)
        assert (emission.grid[0], emission.block) == wanted
    for spec in (q_proj("q_proj", 8, WINDOW), dense("wo_a", 8192, 4096, "fp8", KEPT, 8, groups=8)):
        assert {part.ring.matrices for part in plan_parts(spec, SM_90A)} == {1}


def test_rows_are_split_only_where_they_do_not_fit() -> None:
    splits = {spec.name: [part.splits for part in plan_parts(spec, SM_90A)] for spec in FLASH + SMALL}
    assert set(itertools.chain(*splits.values())) == {1}
    for spec, wanted in zip(SPLIT, ([2], [2], [2], [1, 2, 2]), strict=True):
        assert [part.splits for part in plan_parts(spec, SM_90A)] == wanted
        assert {part.splits for part in plan_parts(replace(spec, batch=1), SM_90A)} == {1}


@pytest.mark.parametrize("batch", range(1, 9))
@pytest.mark.parametrize("k", [16384, 49152])
def test_the_splits_of_a_row_make_all_rows(batch: int, k: int) -> None:
    """By the kernel's own arithmetic; two may share some."""
    (part,) = plan_parts(dense("rows", 48, k, "bf16", ROWS, batch), SM_90A)
    p = part.products
    starts = [first_row(p, block) for block in range(p.splits)]
    assert sorted({row for first in starts for row in range(first, first + p.own)}) == list(range(batch))


def test_packing_does_not_depend_on_the_batch() -> None:
    """One copy of the weights serves the plans of all batch sizes."""
    for spec in FLASH + SPLIT:
        packings = {tuple(emit_gemv(replace(spec, batch=b), SM_90A).packing.items()) for b in (1, 2, 3, 5, 8)}
        assert len(packings) == 1
        for name in dict(packings.pop()).values():
            assert str(parse_packing(name)) == name


def test_sums_do_not_depend_on_the_batch() -> None:
    """Tiles, rounds and how warps share columns decide the order in which a row's products are added."""

    def order(spec: GemvSpec) -> list[tuple[int, ...]]:
        rings = [part.ring for part in plan_parts(spec, SM_90A)]
        return [(r.tile_warps, r.k_warps, r.span, r.steps, r.rounds) for r in rings]

    for spec in FLASH + SMALL + SPLIT:
        assert all(order(replace(spec, batch=b)) == order(spec) for b in range(1, 9))


def test_experts_of_many_rows_or_formats_are_one_kernel_for_any_batch() -> None:
    for formats, batches in ((("mxfp4", "fp8"), (1, 9, 64)), (("fp8", "fp8"), (1, 2, 8))):
        spec = replace(experts(*formats), batch=batches[0])
        for b in batches:
            other = replace(spec, batch=b)
            up, down = emit_experts_up(other, BY_SCORE, SM_90A), emit_experts_down(other, SM_90A)
            assert up.source == emit_experts_up(spec, BY_SCORE, SM_90A).source
            assert down.source == emit_experts_down(spec, SM_90A).source
            assert up.grid[1] == down.grid[1] == b


def test_the_rows_of_a_step_take_turns_on_the_same_ctas() -> None:
    """At most two CTAs an SM in all, one of `down` with the tiles of two, and the shared expert's weights are
    read once for all rows.
    """
    for rows in range(2, 9):
        spec = replace(experts("mxfp4", "fp8"), batch=rows, hidden=4096, intermediate=2048)
        up, down = emit_experts_up(spec, BY_SCORE, SM_90A), emit_experts_down(spec, SM_90A)
        assert up.grid[1] == down.grid[1] == 1
        assert up.grid[0] <= 2 * SM_90A.sms
        assert up.shared <= SM_90A.shared_of(2)
        assert down.grid[0] <= SM_90A.sms
        assert down.shared <= SM_90A.shared_of(1)
        ring = spec_of(down.source).routed
        assert (ring.matrices, ring.product.x) == (2, "f16")
        assert ring.stages >= 3
        for emission in (up, down):
            assert f"rows={rows}, k=" in emission.source
            assert f"    turns={rows},\n" in emission.source


def test_shared_arrays_do_not_overlap() -> None:
    for part in plan_parts(in_proj(3), SM_90A):
        at = part.products.at
        assert at.x - at.ring >= part.ring.ring_bytes
        assert at.fx - at.x >= part.ring.product.x_bytes
        assert at.bars - at.part >= part.ring.part_bytes
        assert at.end - at.bars >= part.ring.bars_bytes + 8
        assert all(getattr(at, name) % 16 == 0 for name in (*at.sizes, "end"))


def test_those_that_multiply_wait_once_before_they_read_rows() -> None:
    parts = 0
    for emission in small_kernels(SM_90A):
        assert emission.source.count("ptx.launch_dependents()") == 1 or is_late(emission.source)
        for part in re.findall(r"gemv\.enter\(.*?gemv\.multiply\(", emission.source, re.DOTALL):
            assert part.count("ptx.wait()") == 1
            assert part.index("ptx.wait()") < re.search(r"gemv\.(copy|stage)_rows\(", part).start()  # type: ignore[union-attr]
            parts += 1
    assert parts > 20


def test_an_sm_has_at_most_64_kb_in_flight_and_uses_what_it_can() -> None:
    for spec in FLASH + SMALL + SPLIT:
        for part in plan_parts(spec, SM_90A):
            ring, most = part.ring, 64 * 1024 // part.ring.resident
            assert part.products.at.end <= SM_90A.shared_of(ring.resident)
            assert 1 <= ring.ahead <= ring.depth
            assert ring.ahead == 1 or ring.ahead * ring.slot_bytes <= most
            assert ring.ahead == ring.depth or (ring.ahead + 1) * ring.slot_bytes > most


@pytest.mark.parametrize("rows", range(2, 9))
def test_ctas_whose_rows_take_turns_have_enough_in_flight_and_as_much_to_do(rows: int) -> None:
    """At least 32 KB each; the longest CTA of the first half reads at most a twentieth more than if all read
    the same.
    """
    spec = ExpertsSpec("experts", rows, 4096, 2048, 256, 6, "mxfp4", "fp8", 10.0)
    up, down = emit_experts_up(spec, BY_SCORE, SM_90A), emit_experts_down(spec, SM_90A)
    halves = spec_of(up.source)
    shared, first, second = halves.shared.ring, halves.routed.ring, spec_of(down.source).routed
    for ring in (first, second):
        assert 32 * 1024 <= ring.ahead * ring.slot_bytes <= ring.ring_bytes
    tiles = spec.intermediate // 16
    job, of_shared = 2 * first.group_bytes, 2 * shared.group_bytes
    ctas = up.grid[0] - -(-tiles // shared.rounds)
    longest = max(-(-tiles * spec.top_k * rows // ctas) * job, shared.rounds * of_shared)
    everything = tiles * (spec.top_k * rows * job + of_shared)
    assert longest <= 1.05 * everything / (2 * SM_90A.sms)


def spec_of(source: str) -> Any:
    """How a kernel is cut, as its text says."""
    known = {each.__name__: each for each in (Down, Product, Ring, Up, UpPart)}
    text = re.search(r"^SPEC = (\w+\(.*?^\))", source, re.MULTILINE | re.DOTALL)
    assert text is not None
    return eval(text[1], known)


def test_riders_take_the_first_ctas_and_change_no_weight() -> None:
    riders = (WINDOW, ENTRIES, KEYS)
    spec = q_proj("q_proj", 2, *riders)
    emission, bare = emit_gemv(spec, SM_90A), emit_gemv(replace(spec, riders=()), SM_90A)
    assert emission.packing == bare.packing
    assert emission.shared == bare.shared
    assert emission.grid[0] == bare.grid[0] + 6
    assert emission.parameters[: len(bare.parameters)] == bare.parameters
    names = [p.name for p in emission.parameters]
    assert len(set(names)) == len(names)  # riders share positions, slots and frequencies
    bounds = re.findall(r"\b(?:if|elif) block < (\d+):", emission.source.split("@cute.kernel")[1])
    assert bounds == ["2", "4", "6"]
    assert re.search(
        r"else:\n        if warp < \d:\n            at = gemv\.enter\(\w+, \w+, s, block - 6\)",
        emission.source,
    )


def test_a_launch_has_the_threads_that_its_riders_rows_take() -> None:
    spec = q_proj("q_proj", 1, WINDOW, ENTRIES, KEYS, k=128, rows=512)
    assert emit_gemv(replace(spec, riders=()), SM_90A).block < 128 <= emit_gemv(spec, SM_90A).block
    for threads in (128, 192, 256):
        window, entries, keys = seated("launch", spec.riders, threads)
        assert window == WINDOW
        assert isinstance(entries, CompressSpec)
        assert isinstance(keys, CompressSpec)
        assert (entries.pool.groups, keys.pool.groups) == (threads // 128, threads // 32)
        assert entries.pool.groups * entries.pool.run >= entries.pool.pooled


@pytest.mark.parametrize(
    ("rider", "message"),
    [
        (replace(ENTRIES, ring=7), "compress pools 8 tokens, with 1 of .*: want a ring of 8 rows, got 7"),
        (replace(ENTRIES, ring=14, tokens=8), "with 8 of a sequence per launch: want a ring of 15 rows"),
        (replace(KEYS, width=256), "must be 128 wide"),
        (replace(WINDOW, width=192), "multiple of 128 up to 1024 wide, got 192"),
        (replace(WINDOW, width=1152), "256 threads hold rows .* up to 1024 wide, got 1152"),
    ],
)
def test_riders_are_refused(rider: Rider, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        seated("launch", (rider,), 256)


@pytest.mark.parametrize("target", TARGETS)
def test_rows_are_quantized_to_nvfp4_without_spills(store: Path, target: str) -> None:
    specs = [QuantizeSpec("plain", 2, 8192), QuantizeSpec("normed", 1, 96, 1e-6)]
    kernels = [emit_quantize(spec) for spec in specs]
    assert [len(k.parameters) for k in kernels] == [4, 5]
    assert [k.block for k in kernels] == [512, 32]
    for result in build([Source(k.symbol, k.source) for k in kernels], target, store):
        assert result.resources.stack == 0
        assert result.resources.registers <= 128


@pytest.mark.parametrize("k", [72, 65536])
def test_rows_that_blocks_do_not_cut_are_refused(k: int) -> None:
    with pytest.raises(BuildError, match=f"rows of {k}: want blocks of 16"):
        emit_quantize(QuantizeSpec("q", 1, k))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.mark.parametrize("arch", [SM_90A, pytest.param(ARCHS["sm_100a"], marks=pytest.mark.slow)], ids=ARCHS)
def test_every_small_kernel_assembles(store: Path, arch: Arch) -> None:
    kernels = small_kernels(arch)
    built = build([Source(k.symbol, k.source) for k in kernels], arch.name, store)
    refilled = False
    for kernel, result in zip(kernels, built, strict=True):
        lines = result.ptx.splitlines()
        assert result.resources.stack == 0, kernel.symbol
        allotted = -(-result.resources.registers // 8) * 8  # to a thread
        assert 2 * kernel.block * allotted <= 64 * 1024, kernel.symbol  # for two CTAs per SM
        header = result.ptx.split(f".entry {kernel.symbol}(")[1].split(")")[0]
        assert header.count(".param .u64") == len(kernel.parameters)
        assert header.count(".param") == len(kernel.parameters)
        first, *rest = re.findall(r"griddepcontrol\.(\w+)", result.ptx)
        if is_late(kernel.source):
            assert [first, *rest] == ["wait", "launch_dependents"] * (len(rest) // 2 + 1), kernel.symbol
        else:
            assert first == "launch_dependents"
            assert set(rest) == {"wait"}
        # Whom the warp that reads the weights meets, without waiting: all the others but those that are
        # there for nothing, of 320.
        arrivals = re.findall(r"\bbar\.arrive\s+(\d+), (\d+);", result.ptx)
        assert {int(threads) for _, threads in arrivals} == {288 if kernel.block == 320 else kernel.block}
        assert {*arrivals} <= {*re.findall(r"\bbar\.sync\s+(\d+), (\d+);", result.ptx)}
        # What frees a slot of the ring stands behind a fence for its loads, or needs what they became.
        frees = [i for i, line in enumerate(lines) if "mbarrier.arrive.shared" in line]
        assert all(
            "_, [z]" in lines[i] or any("fence.proxy.async" in line for line in lines[i - 25 : i])
            for i in frees
        ), kernel.symbol
        refilled |= bool(frees)
        assert "cp.async.bulk.shared::cluster.global" in result.ptx
    assert refilled


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dense("cast", 64, 128, "bf16", CODES), "bf16 weights take bf16 activations, not e4m3"),
        (dense("cast", 64, 128, "mxfp4", ROWS), "mxfp4 weights take e4m3 or f16 activations, not bf16"),
        (dense("odd", 64, 96, "fp8", CODES), "fp8 weights of 96 columns: want a multiple of 128"),
        (dense("odd", 36, 128, "fp8", CODES), "36 rows in 1 groups: want multiples of 8"),
        (dense("odd", 48, 128, "fp8", KEPT, groups=2), "48 rows in 2 groups: want multiples of 16"),
        (dense("odd", 48, 100, "bf16", ROWS), "rows of 100 are not a multiple of 16 bytes"),
        (dense("what", 48, 128, "int8", CODES), "'int8': known are fp8, bf16, mxfp4, nvfp4"),
        (
            dense("stage", 48, 128, "fp8", Activations("x", "f16", "normalize")),
            "no prologue normalize for f16",
        ),
        (dense("large", 4096, 131072, "fp8", KEPT, 8), "a row of 131072 leaves no shared memory for two"),
    ],
    ids=lambda value: value.name if isinstance(value, GemvSpec) else "",
)
def test_refusals(spec: GemvSpec, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        emit_gemv(spec, SM_90A)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 320}, "hidden 320, intermediate 128: mxfp4 experts want multiples of 128"),
        ({"shared": "bf16"}, "mxfp4 routed and bf16 shared experts do not share activations"),
        ({"routed": "int4"}, "'int4': known are fp8, bf16, mxfp4, nvfp4"),
        ({"top_k": 40}, "40 experts per token: a warp holds the addresses of 32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_expert_refusals(change: dict[str, object], message: str) -> None:
    spec = replace(experts("mxfp4", "fp8"), **change)  # type: ignore[arg-type]
    for emit in (lambda: emit_experts_up(spec, BY_SCORE, SM_90A), lambda: emit_experts_down(spec, SM_90A)):
        with pytest.raises(BuildError, match=message):
            emit()


def test_experts_are_chosen_among_those_there_are() -> None:
    for change in ({"top_k": 9}, {"experts": 1025}):
        with pytest.raises(BuildError, match="want some of at most 1024"):
            emit_experts_up(replace(experts("mxfp4", "fp8"), **change), BY_SCORE, SM_90A)


@pytest.mark.parametrize(("hidden", "intermediate", "count"), [(4096, 2048, 256), (7168, 3072, 384)])
@pytest.mark.parametrize("routing", [BY_SCORE, BY_TABLE, BY_ROWS], ids=lambda r: r.source)
def test_routing_leaves_two_ctas_to_an_sm(
    hidden: int, intermediate: int, count: int, routing: Routing
) -> None:
    for routed in ("mxfp4", "nvfp4"):
        spec = ExpertsSpec("up", 1, hidden, intermediate, count, 6, routed, "fp8", 10.0)
        assert 2 * (emit_experts_up(spec, routing, SM_90A).shared + 1024) <= SM_90A.shared_per_sm


def test_what_the_router_keeps_lies_apart_from_what_lives_beside_it() -> None:
    for routing in (BY_SCORE, BY_TABLE, BY_ROWS):
        at = spec_of(emit_experts_up(experts("fp8", "fp8"), routing, SM_90A).source).routed.at
        assert at.sums - at.part >= max(4 * 64, 8 * 32)  # sums f32 [warps][16]; scores and keys
        assert at.choice - at.sums >= (4 * 4 * 2 if routing is BY_ROWS else 0)
        assert at.bars - at.choice >= 2 * 8


def test_a_token_is_read_before_the_wait_and_its_experts_weights_with_it() -> None:
    for routing in (BY_TABLE, BY_ROWS):
        emission = emit_experts_up(experts("mxfp4", "fp8"), routing, SM_90A)
        early = [p.operand for p in emission.parameters if p.early]
        assert early == ["tokens"]
        kernel = emission.source.split("@cute.kernel")[1]
        multiply, weights = kernel.split("experts_up.enter(")[1].split("else:")
        assert multiply.index("experts_up.look_up(") < multiply.index("ptx.wait()")
        assert "experts_up.read_weights(" in weights
        assert "ptx.wait()" not in weights
