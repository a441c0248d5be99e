"""Attention and indexer kernels without a device: texts, launch facts, cubins of both targets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dsv4c.arch import ARCHS, SM_90A, SM_100A, Arch
from dsv4c.codegen.build import Source, build
from dsv4c.codegen.emit import Emission
from dsv4c.codegen.kernels.attention import (
    AttentionSpec,
    emit_attention,
    emit_chunk_attention,
    plan_attention,
    takes_chunk,
)
from dsv4c.codegen.kernels.index import (
    IndexChoiceSpec,
    IndexScoresSpec,
    TopKSpec,
    emit_chunk_scores,
    emit_index_choice,
    emit_index_scores,
    emit_top_k,
    takes_chunk_scores,
)
from dsv4c.codegen.lib.geometry import Attention, Selection
from dsv4c.errors import BuildError
from tests.codegen.sass import disassemble
from tests.conftest import Golden

CSA = AttentionSpec("attention_csa", 2, 4, 128, "fp8", 16, 19, 1e-6, "selected", 6, 4, 64)
HCA = replace(
    CSA, name="attention_hca", entries="all", selected_count=0, ratio=128, capacity=3, splits=2, tile=16
)
BF16 = replace(CSA, name="attention_bf16", format="bf16", exact_norm=False, entries="none", capacity=0)
CHUNK = AttentionSpec(
    *("attention_chunk", 70, 128, 512, "fp8", 128, 208, 1e-6, "selected", 40, 4, 64), ring_slots="ring_slots"
)
SCORES = IndexScoresSpec("index_scores", 2, 32, "mxfp4", 50, 4, 6)
SCORES_BF16 = replace(SCORES, name="index_scores_bf16", format="bf16")
CHOICE = IndexChoiceSpec("index_choice", 2, 32, "mxfp4", 210, 4, 6)
CHOICE_BF16 = replace(CHOICE, name="index_choice_bf16", format="bf16", capacity=50)
TOP_K = TopKSpec("top_k", 2, 50, 6, 4)
TOP_K_CLUSTER = TopKSpec("top_k_cluster", 1, 20000, 512, 4, bits=32)


def emissions(arch: Arch) -> list[Emission]:
    return [
        *(emit_attention(spec, arch) for spec in (CSA, HCA, BF16)),
        *(emit_index_scores(spec, arch) for spec in (SCORES, SCORES_BF16)),
        *(emit_index_choice(spec, arch) for spec in (CHOICE, CHOICE_BF16)),
        *(emit_top_k(spec, arch) for spec in (TOP_K, TOP_K_CLUSTER)),
    ]


def test_attention_text(golden):
    golden(emit_attention(CSA, SM_90A).source, "kernels/attention_csa.py.txt")


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_every_family_assembles_without_spills(arch: Arch, tmp_path: Path):
    every = emissions(arch)
    built = build([Source(e.symbol, e.source) for e in every], arch.name, tmp_path, workers=1)
    for emission, kernel in zip(every, built, strict=True):
        assert kernel.resources.stack == 0, f"{emission.symbol} spills or indexes registers dynamically"
        assert kernel.resources.registers * emission.block <= 65536
        assert kernel.ptx.count("griddepcontrol.launch_dependents") == 1
        assert kernel.ptx.count("griddepcontrol.wait") == 1


def test_attention_of_many_tokens_keeps_its_products_in_flight(golden: Golden, tmp_path: Path):
    """A wait of tensor cores after the scores and one after the values, none in between."""
    emission = emit_chunk_attention(CHUNK, SM_90A)
    golden(emission.source, "kernels/chunk_attention.py.txt")
    plain = emit_chunk_attention(replace(CHUNK, format="bf16"), SM_90A)
    coded, other = build([Source(e.symbol, e.source) for e in (emission, plain)], "sm_90a", tmp_path)
    assert coded.resources.stack == 0
    assert other.resources.stack <= 16  # four registers, once per item
    for kernel in (coded, other):
        code = disassemble(kernel.cubin, tmp_path)
        assert code.count("HGMMA") == 512 // 2 // 16 + 64 // 16
        assert code.count("WARPGROUP.DEPBAR") == 2
    assert emission.grid == (SM_90A.sms, 1, 1)
    assert emission.shared <= SM_90A.shared_per_cta


@pytest.mark.parametrize("heads", [32, 16, 8])
def test_attention_of_many_tokens_takes_the_heads_of_a_rank(heads: int, tmp_path: Path):
    """As many products as of 64 heads, no registers spilled, and each head's results once."""
    emission = emit_chunk_attention(replace(CHUNK, heads=heads), SM_90A)
    assert f"take {heads} heads of a token at a time" in emission.source
    (kernel,) = build([Source(emission.symbol, emission.source)], "sm_90a", tmp_path)
    assert kernel.resources.stack == 0
    code = disassemble(kernel.cubin, tmp_path)
    assert code.count("HGMMA") == 512 // 2 // 16 + 64 // 16
    assert code.count("STG") == 4 * min(heads, 16) // 4


@pytest.mark.parametrize("change", [{"rows": 33}, {"width": 256}, {"heads": 96}], ids=lambda c: next(iter(c)))
def test_what_the_kernel_for_many_tokens_leaves_to_the_other(change: dict[str, object]):
    spec = replace(CHUNK, **change)  # type: ignore[arg-type]
    assert not takes_chunk(spec, SM_90A)
    assert not takes_chunk(CHUNK, SM_100A)
    with pytest.raises(BuildError, match="takes many rows of 8, 16, 32 or 64 heads x 512, on wgmma"):
        emit_chunk_attention(spec, SM_90A)
    emit_attention(spec, SM_90A)


@pytest.mark.parametrize("rows", [9, 512, 4096])
@pytest.mark.parametrize("format", ["mxfp4", "bf16"])
def test_index_scores_of_many_tokens_fit_an_sm_twice(rows: int, format: str, tmp_path: Path):
    """Keys are expanded once for a CTA's tokens: one loop has all products, and one wait for them."""
    spec = replace(SCORES, rows=rows, heads=64, capacity=4096, k=512, format=format)
    assert takes_chunk_scores(spec, SM_90A)
    assert not takes_chunk_scores(spec, SM_100A)
    assert not takes_chunk_scores(SCORES, SM_90A)
    emission = emit_chunk_scores(spec, SM_90A)
    (kernel,) = build([Source(emission.symbol, emission.source)], "sm_90a", tmp_path)
    assert kernel.resources.stack == 0
    assert kernel.resources.registers * emission.block * 2 <= 65536
    assert emission.shared <= SM_90A.shared_of(2)
    code = disassemble(kernel.cubin, tmp_path)
    assert code.count("HGMMA") == 128 // 16
    assert code.count("WARPGROUP.DEPBAR") == 1


def test_parameters_follow_the_components_of_the_caches():
    names = [(p.operand, p.component) for p in emit_attention(CSA, SM_90A).parameters]
    assert names[:7] == [
        ("q", "data"),
        *(("window", c) for c in ("data", "scale", "tail")),
        *(("entries", c) for c in ("data", "scale", "tail")),
    ]
    assert [p.operand for p in emit_attention(BF16, SM_90A).parameters] == [
        "q",
        "window",
        "sink",
        "frequencies",
        "positions",
        "slots",
        "out",
    ]


@pytest.mark.parametrize("capacity", [64, 40000])
def test_kernels_are_the_same_for_any_rows(capacity: int):
    """Many entries are spread wider, which must not depend on the rows either."""
    attention = replace(HCA, heads=64, width=512, capacity=capacity, splits=None, tile=None)
    specs = (
        (emit_attention, attention),
        (emit_attention, replace(CSA, capacity=capacity)),
        (emit_index_scores, replace(SCORES, capacity=capacity)),
        (emit_index_choice, replace(CHOICE, capacity=min(capacity, 8192))),
        (emit_top_k, replace(TOP_K, capacity=capacity)),
    )
    for emit, spec in specs:
        one, eight = emit(replace(spec, rows=1), SM_90A), emit(replace(spec, rows=8), SM_90A)
        assert one.source == eight.source
        assert (one.block, one.shared, one.cluster) == (eight.block, eight.shared, eight.cluster)
    assert plan_attention(attention).splits == (16 if capacity > 2304 else 8)


@pytest.mark.parametrize("keys", [128, 192, 640, 1152, 8320])
@pytest.mark.parametrize("format", ["fp8", "bf16"])
def test_planned_tiles_cover_the_keys_and_fit(keys: int, format: str):
    spec = replace(
        CSA,
        heads=64,
        width=512,
        window=128,
        ring=192,
        selected_count=keys - 128,
        format=format,
        capacity=9000,
    )
    a = plan_attention(spec)
    rounds = -(-a.tiles // a.splits)
    assert rounds * a.splits * a.tile >= keys
    assert a.tile % 16 == 0
    assert (rounds == 1) == (a.stages == 1)
    shared = {rows: emit_attention(replace(spec, rows=rows), SM_90A).shared for rows in range(1, 9)}
    ctas = a.splits * a.head_tiles
    for rows, asked in shared.items():  # an SM each, where there are surely enough
        apart = 1 < rows <= 99 // ctas and 2 * (a.shared + 1024) <= SM_90A.shared_per_sm
        assert (asked > a.shared) == apart
        assert asked <= SM_90A.shared_per_cta
        assert (2 * (asked + 1024) > SM_90A.shared_per_sm) == (apart or asked > SM_90A.shared_of(2))


@pytest.mark.parametrize(
    "a", [plan_attention(CSA), plan_attention(replace(CSA, width=512)), plan_attention(BF16)]
)
def test_staged_rows_keep_fragments_off_each_others_banks(a: Attention):
    banks = {2 * q * a.row_bytes // 4 % 32 for q in range(4)}
    assert banks == {0, 8, 16, 24}, "lanes q = 0..3 of a value fragment read rows 2q"


@pytest.mark.parametrize("capacity", [21, 2048, 32768, 262144])
def test_top_k_threads_hold_every_score(capacity: int):
    emission = emit_top_k(TopKSpec("top_k", 3, capacity, 512, 4), SM_90A)
    splits = emission.cluster[0]
    assert emission.grid == (3 * splits, 1, 1)
    t = Selection(capacity, 512, 4, 16, splits, emission.block)
    assert t.quads * 4 * t.threads * t.splits >= capacity
    assert t.quads * 4 * t.threads < 1 << 16, "counts of a CTA share a word"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (replace(CSA, width=192), "head width must be 128, 256 or 512, got 192"),
        (replace(CSA, format="mxfp4"), "keys must be fp8 or bf16, got mxfp4"),
        (replace(CSA, ring=8), "a ring of 8 rows cannot hold a window of 16"),
        (replace(CSA, splits=16), "cannot split 128 dimensions 16 ways"),
        (replace(CSA, tile=24), "tiles are multiples of 16 up to 128, got 24"),
    ],
)
def test_attention_refuses(spec: AttentionSpec, message: str):
    with pytest.raises(BuildError, match=message):
        emit_attention(spec, SM_90A)


def test_index_refuses():
    for heads in (12, 72):
        with pytest.raises(BuildError, match=f"takes 8 to 64 heads in eights, got {heads}"):
            emit_index_scores(replace(SCORES, heads=heads), SM_90A)
        with pytest.raises(BuildError, match=f"takes 8 to 64 heads in eights, got {heads}"):
            emit_chunk_scores(replace(SCORES, heads=heads, rows=9), SM_90A)
    for changed, found in (({"rows": 9}, "got 9 and 210"), ({"capacity": 8193}, "got 2 and 8193")):
        with pytest.raises(BuildError, match=f"at most 8 rows from at most 8192 keys, {found}"):
            emit_index_choice(replace(CHOICE, **changed), SM_90A)
    with pytest.raises(BuildError, match="keys have 16 or 32 bits, got 8"):
        emit_top_k(replace(TOP_K, bits=8), SM_90A)
