"""Exchanges without a device: text, launch facts, cubins, and the order in which ranks wait."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dsv4c.arch import ARCHS
from dsv4c.codegen.build import Source, build
from dsv4c.codegen.emit import Emission
from dsv4c.codegen.kernels.exchange import (
    GatherSpec,
    ReduceSpec,
    emit_all_gather,
    emit_all_reduce,
    emit_gather_of_tiles,
    emit_sum_of_tiles,
)
from dsv4c.codegen.kernels.hyper_norm import HyperNormSpec, emit_hyper_norm
from dsv4c.codegen.kernels.rows import row_program
from dsv4c.codegen.registry import No, request_of
from dsv4c.ir.graph import Builder
from dsv4c.ir.ops import all_reduce
from dsv4c.plan.declared import read_source
from dsv4c.types import BF16, parse_type
from tests.conftest import Golden

SUM = ReduceSpec(2, 1, 4096, "bf16")
JOIN = GatherSpec(4, 3, 384, "bf16")


MIXED = HyperNormSpec(1, 4096, 1e-6, 1e-6, 20, ranks=2)


def mixed() -> Emission:
    return emit_hyper_norm(MIXED, ARCHS["sm_90a"])


def tiles() -> tuple[Emission, Emission]:
    """Of a chunk: a sum of more than a tile a row, a gather."""
    total = ReduceSpec(2, 128, 7168, "bf16")
    return emit_sum_of_tiles(total), emit_gather_of_tiles(replace(JOIN, rows=128))


def test_texts(golden: Golden) -> None:
    golden(mixed().source, "kernels/hyper_norm_ranks.py.txt")
    golden(emit_all_reduce(SUM).source, "kernels/all_reduce.py.txt")
    golden(emit_all_gather(JOIN).source, "kernels/all_gather.py.txt")
    for emission in tiles():
        golden(emission.source, f"kernels/{emission.symbol.removesuffix('_0')}.py.txt")


def test_launches(tmp_path: Path) -> None:
    total, joined = emit_all_reduce(SUM), emit_all_gather(JOIN)
    assert total.grid == (16, 1, 1)
    assert joined.grid == (1, 3, 1)  # 192 words a row
    assert emit_all_gather(GatherSpec(2, 1, 64640, "f32")).grid == (32, 1, 1)
    for kernel in build([Source(e.symbol, e.source) for e in (total, joined, mixed())], "sm_90a", tmp_path):
        assert kernel.resources.stack == 0
        assert "st.relaxed.sys.global.b64" in kernel.ptx
        assert "fence.sc" not in kernel.ptx
        assert "fence.acq" not in kernel.ptx
        wait, trigger = (kernel.ptx.index(f"griddepcontrol.{w}") for w in ("wait", "launch_dependents"))
        polls = kernel.ptx.rindex("ld.relaxed.sys.global.b64 w")
        assert wait < kernel.ptx.index("st.relaxed.sys.global.b64") < polls
        assert trigger < wait if kernel.symbol.startswith("hyper_norm") else polls < trigger


def test_launches_of_tiles(tmp_path: Path) -> None:
    total, joined = tiles()
    assert total.grid == (2, 128, 1)
    assert joined.grid == (1, 128, 1)
    for kernel in build([Source(e.symbol, e.source) for e in (total, joined)], "sm_90a", tmp_path):
        assert kernel.resources.stack == 0
        made, release = kernel.ptx.rindex("st.global.v"), kernel.ptx.index("fence.acq_rel.sys; st.relaxed")
        data, flag = kernel.ptx.index("st.global.v4"), kernel.ptx.index("ld.acquire.sys")
        wait, trigger = (kernel.ptx.index(f"griddepcontrol.{w}") for w in ("wait", "launch_dependents"))
        assert wait < data < release < flag < made < trigger


EDITS = [  # what a kernel's text is changed to, and what is said of it
    ("    ptx.wait()\n", "", "exchange.push before ptx.wait()"),
    ("exchange.push(", "exchange.receive(", "or lacks one of them"),
]


@pytest.mark.parametrize(("old", "new", "said"), EDITS)
def test_a_kernel_that_would_make_ranks_wait_is_found(old: str, new: str, said: str) -> None:
    source = mixed().source
    assert read_source(source).exchange == ""
    assert old in source
    assert said in read_source(source.replace(old, new, 1)).exchange


@pytest.mark.parametrize(
    ("emission", "stage"),
    [
        (emit_all_reduce(SUM), "exchange.sum_rows"),
        (emit_all_gather(JOIN), "exchange.join_rows"),
        (tiles()[0], "exchange.sum_tiles"),
        (tiles()[1], "exchange.join_tiles"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_stage_that_exchanges_where_it_must_not_is_found(emission: Emission, stage: str) -> None:
    """It gives, takes, meets and lets the successor start."""
    source, wait, trigger = emission.source, "    ptx.wait()\n", "    ptx.launch_dependents()\n"
    assert read_source(source).exchange == ""
    behind = f"{wait}    {stage}("
    assert behind in source
    early = source.replace(behind, behind.removeprefix(wait), 1)
    assert f"{stage} that is not right behind ptx.wait()" in read_source(early).exchange
    slow = source.replace(behind, trigger + behind, 1)
    assert f"ptx.launch_dependents() beside {stage}" in read_source(slow).exchange


def test_no_generated_kernel_takes_an_exchange() -> None:
    with Builder("g") as b:
        y = all_reduce(b.input("x", parse_type("f32[2,64]")), ranks=2, out=BF16)
        b.finish({"y": y})
    request, _ = request_of([y.node], ARCHS["sm_90a"], {}, {})
    assert row_program.ask(request) == No("a row program knows no other rank")
