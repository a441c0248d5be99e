"""Exchanges without a device: text, launch facts, cubins, and the order in which ranks wait."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4c.arch import ARCHS
from dsv4c.codegen.build import Source, build
from dsv4c.codegen.emit import Emission
from dsv4c.codegen.kernels.exchange import GatherSpec, ReduceSpec, emit_all_gather, emit_all_reduce
from dsv4c.codegen.kernels.rows import row_program
from dsv4c.codegen.registry import No, request_of
from dsv4c.ir.graph import Builder
from dsv4c.ir.ops import all_reduce
from dsv4c.plan.declared import read_source
from dsv4c.types import BF16, parse_type
from tests.conftest import Golden

SUM = ReduceSpec(2, 1, 4096, "bf16")
JOIN = GatherSpec(4, 3, (("bf16", 256), ("f32", 64)))


def test_texts(golden: Golden) -> None:
    golden(emit_all_reduce(SUM).source, "kernels/all_reduce.py.txt")
    golden(emit_all_gather(JOIN).source, "kernels/all_gather.py.txt")


def test_launches(tmp_path: Path) -> None:
    total, joined = emit_all_reduce(SUM), emit_all_gather(JOIN)
    assert total.grid == (16, 1, 1)
    assert joined.grid == (1, 3, 1)  # 128 + 64 words a row
    assert emit_all_gather(GatherSpec(2, 1, (("f32", 64640),))).grid == (32, 1, 1)
    kernels = build([Source(e.symbol, e.source) for e in (total, joined)], "sm_90a", tmp_path)
    for kernel in kernels:
        assert kernel.resources.stack == 0
        assert "st.relaxed.sys.global.b64" in kernel.ptx
        assert "fence" not in kernel.ptx
        wait, trigger = (kernel.ptx.index(f"griddepcontrol.{w}") for w in ("wait", "launch_dependents"))
        assert wait < kernel.ptx.index("st.relaxed.sys.global.b64") < kernel.ptx.rindex("AGAIN:") < trigger


EARLY = "    ptx.launch_dependents()\n    thread, _, _"
EDITS = [  # what a kernel's text is changed to, and what is said of it
    ("    thread, _, _", EARLY, "ptx.launch_dependents() before sync_threads()"),
    ("    ptx.wait()\n", "", "exchange.push before ptx.wait()"),
    ("exchange.push(", "exchange.receive(", "or lacks one of them"),
    ("    cute.arch.sync_threads()\n", "", "sync_threads() before exchange.receive"),
]


@pytest.mark.parametrize(("old", "new", "said"), EDITS)
@pytest.mark.parametrize("emission", [emit_all_reduce(SUM), emit_all_gather(JOIN)], ids=lambda e: e.symbol)
def test_a_kernel_that_would_make_ranks_wait_is_found(
    emission: Emission, old: str, new: str, said: str
) -> None:
    assert read_source(emission.source).exchange == ""
    assert old in emission.source
    assert said in read_source(emission.source.replace(old, new, 1)).exchange


def test_no_generated_kernel_takes_an_exchange() -> None:
    with Builder("g") as b:
        y = all_reduce(b.input("x", parse_type("f32[2,64]")), ranks=2, out=BF16)
        b.finish({"y": y})
    request, _ = request_of([y.node], ARCHS["sm_90a"], {}, {})
    assert row_program.ask(request) == No("a row program knows no other rank")
