"""The tcgen05 GEMM: text, instructions and descriptors, stages in memory, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsv4c.arch import SM_90A, SM_100A, Arch
from dsv4c.codegen.build import Source, build
from dsv4c.codegen.kernels import blockscaled
from dsv4c.codegen.kernels.blockscaled import BlockScaledSpec, emit_blockscaled
from dsv4c.codegen.registry import Launchable, choose, kernels_in, request_of
from dsv4c.errors import BuildError
from dsv4c.ir.graph import Builder
from dsv4c.ir.ops.linear import Linear
from dsv4c.types import BF16, F32, DType, parse_type
from tests.codegen.sass import disassemble
from tests.conftest import Golden

ROW, WEIGHT = "q[e2m1,e4m3,1x16,row]", "q[e2m1,e4m3,1x16,tensor]"
SMALL = BlockScaledSpec("small_gemm", 200, 1024, 512)


def asked(x: str, w: str, arch: Arch = SM_100A, out: DType = BF16) -> tuple[Launchable, ...]:
    """The launches of a linear layer, if the family takes it."""
    with Builder("test") as b:
        y = Linear(out=out)(b.input("x", parse_type(x)), b.param("w", parse_type(w)))
    graph = b.finish({"y": y})
    request, _ = request_of(graph.nodes, arch, graph.users, {v: v.name for v in graph.params})
    return choose(request, kernels_in(blockscaled))


def test_text(golden: Golden) -> None:
    golden(
        emit_blockscaled(BlockScaledSpec("wq_b_gemm", 64, 32768, 1024, "wq_b"), SM_100A).source,
        "kernels/blockscaled.py.txt",
    )


def test_it_assembles_into_block_scaled_instructions(tmp_path: Path) -> None:
    emission = emit_blockscaled(SMALL, SM_100A)
    (built,) = build([Source(emission.symbol, emission.source)], "sm_100a", tmp_path)
    assert built.resources.stack == 0
    assert built.resources.registers <= 128
    mma = re.findall(r"tcgen05\.mma\.\S+ \[%r\d+\], %rd\d+, %rd\d+, (\d+)", built.ptx)
    assert len(mma) == 256 // 64
    # bits 7-9 and 10-12: e2m1, 17-22: N / 8, 23: e4m3 scales, 24-28: M / 16
    assert {int(word) for word in mma} == {1 << 7 | 1 << 10 | 16 << 17 | 8 << 24}
    assert built.ptx.count("kind::mxf4nvf4.block_scale.block16") == len(mma)
    assert built.ptx.count("tcgen05.cp.cta_group::1.32x128b.warpx4") == 2 * len(mma)  # scales of both sides
    code = disassemble(built.cubin, tmp_path)
    assert code.count("UTCOMMA.4X") == len(mma)
    assert code.count("UTCCP") == 2 * len(mma)
    assert "LDTM" in code  # sums leave tensor memory
    assert "UBLKCP" in code  # weights come in bulk
    for instruction in ("tcgen05.alloc", "tcgen05.dealloc", "tcgen05.ld", "cp.async.bulk.shared::cluster"):
        assert instruction in built.ptx
    header = built.ptx.split(f".entry {emission.symbol}(")[1].split(")")[0]
    assert header.count(".param .u64") == header.count(".param") == len(emission.parameters) == 6


def test_launch_facts() -> None:
    emission = emit_blockscaled(SMALL, SM_100A)
    assert emission.grid == (8, 2, 1)
    assert emission.block == 128
    assert emission.packing == {"w": "nvfp4_mma/8x2"}
    assert SMALL.shape.bars + 4 * 16 + 16 <= emission.shared - 1023  # wherever the allocation starts
    assert emission.shared <= 227 * 1024


def test_a_linear_layer_of_many_nvfp4_rows_takes_it() -> None:
    (launch,) = asked(f"{ROW}[64,512]", f"{WEIGHT}[1024,512]")
    assert launch.emission.symbol == "w_gemm_0"
    assert [b.component for b in launch.bindings] == [
        "data",
        "scale",
        "global_scale",
        "data",
        "global_scale",
        "data",
    ]
    assert list(launch.forms.values()) == ["nvfp4_mma/8x2"]


@pytest.mark.parametrize(
    ("x", "w", "arch", "out", "why"),
    [
        (f"{ROW}[64,512]", f"{WEIGHT}[1024,512]", SM_90A, BF16, "tcgen05 instructions, which sm_90a has not"),
        (f"{ROW}[16,512]", f"{WEIGHT}[1024,512]", SM_100A, BF16, "16 rows: the GEMM is for more than 16"),
        (
            f"{ROW}[64,384]",
            f"{WEIGHT}[1024,384]",
            SM_100A,
            BF16,
            "rows of 384 elements: want a multiple of 256",
        ),
        (f"{ROW}[64,512]", f"{WEIGHT}[1024,512]", SM_100A, F32, "writes bf16, not f32"),
        (
            "bf16[64,512]",
            f"{WEIGHT}[1024,512]",
            SM_100A,
            BF16,
            "multiplies rows q[e2m1,e4m3,1x16,row][N,K]",
        ),
    ],
)
def test_refusals(x: str, w: str, arch: Arch, out: DType, why: str) -> None:
    with pytest.raises(BuildError) as error:
        asked(x, w, arch, out)
    assert why in str(error.value)
