"""Hyper-connection, router and head kernels without a device: text, launch facts, cubins for both targets."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4c.arch import ARCHS, SM_90A, Arch
from dsv4c.codegen.build import Source, build
from dsv4c.codegen.emit import Emission
from dsv4c.codegen.kernels.ends import (
    AdvanceSpec,
    ArgmaxSpec,
    EmbedSpec,
    LastRowsSpec,
    PositionsSpec,
    cut_logits,
    emit_advance,
    emit_argmax,
    emit_embed,
    emit_last_rows,
    emit_positions,
)
from dsv4c.codegen.kernels.hyper_norm import HyperNormSpec, emit_hyper_norm
from dsv4c.codegen.kernels.router import RouterGateSpec, emit_router_gate
from dsv4c.codegen.lib.slices import TOGETHER
from dsv4c.errors import BuildError
from tests.conftest import Golden

BOUNDARY = HyperNormSpec(rows=2, hidden=256, norm_eps=1e-6, hc_eps=1e-6, iterations=20)
FIRST = replace(BOUNDARY, mix=False, keep=False)
HEAD = replace(BOUNDARY, head=True, keep=False, fp8=False)
FLASH = replace(BOUNDARY, rows=1, hidden=4096)
PRO = replace(BOUNDARY, rows=1, hidden=7168)


def emissions(arch: Arch) -> list[Emission]:
    return [
        *(emit_hyper_norm(spec, arch) for spec in (BOUNDARY, FIRST, HEAD, PRO)),
        emit_router_gate(RouterGateSpec(rows=3, hidden=256, experts=8), arch),
        emit_argmax(ArgmaxSpec(rows=2, vocabulary=250), arch),
        emit_embed(EmbedSpec(rows=2, hidden=256)),
        emit_advance(AdvanceSpec(sequences=2)),
        emit_positions(PositionsSpec(sequences=2, tokens=4)),
        emit_last_rows(LastRowsSpec(sequences=2, tokens=4, hidden=256)),
    ]


def operands(emission: Emission) -> list[str]:
    return [parameter.name for parameter in emission.parameters]


def test_boundary_text(golden):
    golden(emit_hyper_norm(BOUNDARY, SM_90A).source, "kernels/hyper_norm.py.txt")


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_every_kernel_assembles_without_spills(arch: Arch, tmp_path: Path):
    every = emissions(arch)
    built = build([Source(e.symbol, e.source) for e in every], arch.name, tmp_path, workers=1)
    for emission, kernel in zip(every, built, strict=True):
        assert kernel.resources.stack == 0, f"{emission.symbol} spills or indexes registers dynamically"
        assert kernel.resources.registers * emission.block <= 65536
        assert kernel.ptx.count("griddepcontrol.launch_dependents") == 1
        assert kernel.ptx.count("griddepcontrol.wait") == 1
        parameters = kernel.ptx.split(".entry", 1)[1].split(")", 1)[0].count(".param")
        assert parameters == len(emission.parameters)
        # A cluster's wait pairs with one arrival, and nothing is sent before.
        clustered = int(emission.cluster != (1, 1, 1))
        assert kernel.ptx.count("barrier.cluster.arrive") == clustered
        assert kernel.ptx.count("barrier.cluster.wait") == clustered
        assert "st.async" not in kernel.ptx.split("barrier.cluster.wait")[0] or not clustered


def test_kernels_are_the_same_for_any_rows():
    for spec in (BOUNDARY, FIRST, HEAD, FLASH, PRO):
        assert emit_hyper_norm(replace(spec, rows=8), SM_90A).source == emit_hyper_norm(spec, SM_90A).source
    assert emit_argmax(ArgmaxSpec(1, 250), SM_90A).source == emit_argmax(ArgmaxSpec(8, 250), SM_90A).source
    assert emit_embed(EmbedSpec(1, 256)).source == emit_embed(EmbedSpec(8, 256)).source
    assert emit_advance(AdvanceSpec(1)).source == emit_advance(AdvanceSpec(8)).source
    assert emit_last_rows(LastRowsSpec(1, 4, 256)).source == emit_last_rows(LastRowsSpec(8, 4, 256)).source
    assert emit_positions(PositionsSpec(1, 4)).source == emit_positions(PositionsSpec(8, 4)).source


def test_weights_are_read_before_the_wait(tmp_path: Path):
    emission = emit_hyper_norm(FLASH, SM_90A)
    (kernel,) = build([Source(emission.symbol, emission.source)], "sm_90a", tmp_path, workers=1)
    before, after = kernel.ptx.split("griddepcontrol.wait")
    assert before.count("ld.relaxed.gpu.global.v4.b32") == 24  # strong loads: the assembler keeps them there
    assert before.count("ld.relaxed.gpu.global.v2.b32") == 4  # the streams
    assert before.count("ex2.approx") == 16  # Sinkhorn
    assert "ld.relaxed" not in after


def test_flags_decide_the_operands():
    weights = ["m_fn", "m_base", "m_scale", "m_gain"]
    mixed = ["m_x", "m_f", "m_post", "m_logits", *weights]
    row = ["m_normed", "m_q", "m_q_scale"]
    assert operands(emit_hyper_norm(BOUNDARY, SM_90A)) == [
        *mixed,
        "m_x_out",
        "m_post_out",
        "m_logits_out",
        *row,
    ]
    assert operands(emit_hyper_norm(FIRST, SM_90A)) == ["m_x", *weights, "m_post_out", "m_logits_out", *row]
    assert operands(emit_hyper_norm(HEAD, SM_90A)) == [*mixed, "m_normed"]


@pytest.mark.parametrize(("spec", "ctas", "threads"), [(BOUNDARY, 2, 128), (FLASH, 16, 256), (PRO, 14, 512)])
def test_a_cluster_per_token_takes_whole_groups(spec: HyperNormSpec, ctas: int, threads: int):
    emission = emit_hyper_norm(spec, SM_90A)
    assert (emission.grid, emission.cluster) == ((spec.rows * ctas, 1, 1), (ctas, 1, 1))
    assert emission.block == threads
    assert emission.shared <= SM_90A.shared_per_cta


def test_flash_leaves_shared_memory_to_its_predecessor():
    assert emit_hyper_norm(FLASH, SM_90A).shared <= 8 * 1024


@pytest.mark.parametrize("hidden", [96, 128, 128 * 17, 16384])
def test_rows_that_no_cluster_cuts_are_refused(hidden: int):
    with pytest.raises(BuildError, match=f"hyper_norm of {hidden} columns: no cluster"):
        emit_hyper_norm(replace(BOUNDARY, hidden=hidden), SM_90A)


def test_router_refusals_say_what_they_want():
    with pytest.raises(BuildError, match="want columns"):
        emit_router_gate(RouterGateSpec(rows=1, hidden=100, experts=8), SM_90A)
    with pytest.raises(BuildError, match="multiple of 8"):
        emit_embed(EmbedSpec(rows=1, hidden=100))
    with pytest.raises(BuildError, match="multiple of 8"):
        emit_last_rows(LastRowsSpec(sequences=1, tokens=8, hidden=100))


def test_a_gate_covers_every_expert_once():
    for experts, hidden in ((256, 4096), (384, 7168), (8, 256), (131, 512)):
        spec = RouterGateSpec(rows=1, hidden=hidden, experts=experts)
        gate = spec.gate(SM_90A)
        assert emit_router_gate(spec, SM_90A).grid[0] * gate.rows == experts
        assert gate.pieces * gate.threads * 8 == hidden


def test_an_argmax_covers_every_column_once():
    for vocabulary in (129280, 512, 250, 7):
        emission = emit_argmax(ArgmaxSpec(rows=1, vocabulary=vocabulary), SM_90A)
        cut = cut_logits(vocabulary)
        assert emission.cluster[0] == cut.ctas
        assert (cut.ctas - 1) * cut.width < vocabulary <= cut.ctas * cut.width


@pytest.mark.parametrize("rows", [17, 500, 4096])
def test_clusters_that_take_many_tokens_cover_them(rows: int):
    spec = replace(FLASH, rows=rows)
    cut = spec.batch(spec.slice(SM_90A), SM_90A)
    assert cut.tokens % TOGETHER == 0
    clusters = emit_hyper_norm(spec, SM_90A).grid[0] // cut.ctas
    assert (clusters - 1) * cut.tokens < rows <= clusters * cut.tokens
    assert cut.owned * cut.ctas >= TOGETHER


def test_ctas_have_room_for_all_of_fn_wherever_a_row_has_clusters():
    found = []
    for hidden in range(256, 16384 + 1, 128):
        spec = replace(FLASH, rows=4096, hidden=hidden)
        with contextlib.suppress(BuildError):
            found.append(spec.batch(spec.slice(SM_90A), SM_90A).shared)
    assert len(found) > 30
    assert max(found) <= SM_90A.shared_per_cta


def test_boundaries_of_many_tokens_fit_an_sm_twice(golden: Golden, tmp_path: Path):
    emission = emit_hyper_norm(replace(FLASH, rows=100), SM_90A)
    golden(emission.source, "kernels/hyper_norm_batch.py.txt")
    (kernel,) = build([Source(emission.symbol, emission.source)], "sm_90a", tmp_path)
    assert kernel.resources.stack == 0
    assert 2 * kernel.resources.registers * emission.block <= 65536
    assert emission.shared <= SM_90A.shared_of(2)
    # Once: owners answer when all have sent, so no inbox is written before what was there has been read.
    assert kernel.ptx.count("barrier.cluster.arrive") == kernel.ptx.count("barrier.cluster.wait") == 1
    pieces, tiles, halves, streams = 3, 24 // 8, 2, 4  # of fn, its rows, a thread's columns
    assert kernel.ptx.count("mma.sync.aligned.m16n8k16") == pieces * tiles * halves * streams


def test_clusters_that_never_ended_are_not_made() -> None:
    """As an H200 showed for boundaries of 2 to 16 CTAs of 128 and of 256 columns."""
    hang = {(5, 128), (9, 128), (13, 128), (10, 256)}
    for width in (128, 256):
        for ctas in range(2, 17):
            spec = replace(FIRST, rows=1, hidden=width * ctas, ctas=ctas)
            if (ctas, width) in hang:
                with pytest.raises(BuildError, match=f"of {spec.hidden} columns: no cluster .* never to end"):
                    emit_hyper_norm(spec, SM_90A)
            else:
                assert emit_hyper_norm(spec, SM_90A).cluster == (ctas, 1, 1)
    assert emit_hyper_norm(replace(BOUNDARY, hidden=2560), SM_90A).cluster == (5, 1, 1)  # of 512 columns
