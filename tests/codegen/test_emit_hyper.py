"""Hyper-connection, router and head kernels without a device: text, launch facts, cubins for both targets."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4c.arch import ARCHS, SM_90A, Arch
from dsv4c.codegen.build import LIB, Source, build
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
from dsv4c.codegen.kernels.hyper_norm import LONGEST, HyperNormSpec, emit_hyper_batch, emit_hyper_norm
from dsv4c.codegen.kernels.router import RouterGateSpec, emit_router_gate
from dsv4c.codegen.lib.slices import TOGETHER
from dsv4c.errors import BuildError
from tests.codegen.sass import disassemble
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
def test_ctas_that_mix_cover_many_tokens(rows: int):
    spec = replace(FLASH, rows=rows)
    cut = spec.batch(SM_90A)
    mix, collapse = emit_hyper_batch(spec, SM_90A)
    assert mix.grid[0] == cut.blocks * cut.slices <= SM_90A.sms
    assert (cut.blocks - 1) * TOGETHER < rows <= cut.blocks * cut.turns * TOGETHER
    assert collapse.grid == (rows, 1, 1)


def test_every_width_of_many_tokens_is_cut_or_refused():
    for hidden in range(128, LONGEST + 1, 128):
        cut = replace(FLASH, rows=4096, hidden=hidden).batch(SM_90A)
        assert cut.slices * cut.width == hidden
        assert cut.shared <= SM_90A.shared_per_cta
        assert 0 <= cut.collapsers * 8 - hidden < 256
        assert cut.o_weights % 16 == cut.o_comb % 16 == 0
    for hidden in (200, LONGEST + 128):
        with pytest.raises(BuildError, match=f"40 rows of {hidden} columns"):
            replace(FLASH, rows=40, hidden=hidden).batch(SM_90A)


def test_boundaries_of_many_tokens(golden: Golden, tmp_path: Path):
    emissions = emit_hyper_batch(replace(FLASH, rows=4096), SM_90A)
    for emission in emissions:
        golden(emission.source, f"kernels/{emission.symbol.removesuffix('_0')}.py.txt")
    mix, collapse = build([Source(e.symbol, e.source) for e in emissions], "sm_90a", tmp_path)
    assert mix.resources.stack == collapse.resources.stack == 0
    assert mix.resources.registers * emissions[0].block <= 65536
    assert 3 * collapse.resources.registers * emissions[1].block <= 65536
    cut = replace(FLASH, rows=4096).batch(SM_90A)
    pieces, halves, streams = 3, 2, 4  # of fn, a thread's columns
    product = f"wgmma.mma_async.sync.aligned.m64n{pieces * 24}k16"
    assert mix.ptx.count(product) == halves * streams * cut.steps
    assert cut.shared <= SM_90A.shared_per_cta


def test_no_lane_branches_around_what_others_of_its_warp_send() -> None:
    """It would go on to wait for that, and they might never get to it: as with 5 CTAs of 4 warps, once."""
    calls = 0
    for path in LIB.glob("*.py"):
        for call, tests in sends(ast.parse(path.read_text()), ()):
            names = {node.id for test in tests for node in ast.walk(test) if isinstance(node, ast.Name)}
            assert names.isdisjoint({"lane", "thread", "tid"}), f"{path.name}:{call.lineno}"
            calls += 1
    assert calls > 10


def sends(tree: ast.AST, tests: tuple[ast.expr, ...]) -> Iterator[tuple[ast.Call, tuple[ast.expr, ...]]]:
    """Calls that send to other CTAs, with the conditions around them."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Call) and re.match(r"cluster\.send_", ast.unparse(child.func)):
            yield child, tests
        yield from sends(child, (*tests, child.test) if isinstance(child, ast.If) else tests)


def test_warps_meet_between_sending_and_waiting(tmp_path: Path) -> None:
    """Lanes that a boundary's send leaves out and the others, whatever warps send to the last CTAs."""
    emissions = [
        emit_hyper_norm(replace(FIRST, rows=1, hidden=hidden), SM_90A) for hidden in (640, 1152, 1664, 2560)
    ]
    for kernel in build([Source(e.symbol, e.source) for e in emissions], "sm_90a", tmp_path):
        _, *behind = disassemble(kernel.cubin, tmp_path).split(" STAS ")
        found = [re.search(r"BSYNC|PHASECHK", text) for text in behind]
        assert len(found) > 2
        assert all(step is not None and step[0] == "BSYNC" for step in found)
