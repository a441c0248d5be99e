"""Recorded operands of single GEMMs through kernels of `build_gemv.py`: python -m tests.gpu.check_recorded.

FP8 rows as they are and quantized on the way, MXFP4 and NVFP4 weights with FP8 rows (W4A8), NVFP4 with NVFP4
rows (W4A4); every result within one bf16 unit of the last place, as the recording states, or within what
the order of a sum makes of results that cancel. Results are poisoned.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4c.numerics import codec
from dsv4c.runtime.driver import Library
from dsv4c.types import FP8_ROW, FP8_WEIGHT, MXFP4, NVFP4
from tests.goldens import recorded
from tests.gpu.check_gemv import ABSOLUTE, Operands, bind_weight, launch_of
from tests.gpu.kernels import run_once

ROWS = 8  # of 16 that were recorded, per launch


def weight(known: dict[str, Tensor], format: str) -> codec.Quantized:
    """The recorded matrix."""
    if format == "fp8":
        scale = known["fp8_gemm.w_scale"].view(torch.uint8)
        return codec.Quantized(FP8_WEIGHT, known["fp8_gemm.w"], scale)
    if format == "mxfp4":
        scale = known["fp4_gemm.w_scale"].view(torch.uint8)
        return codec.Quantized(MXFP4, known["fp4_gemm.w"].view(torch.uint8), scale)
    total = known["nvfp4.weight_scale_2"]
    return codec.Quantized(NVFP4, known["nvfp4.w"], known["nvfp4.weight_scale"], None, total)


def rows(known: dict[str, Tensor], matrix: dict[str, Any]) -> dict[str, Tensor]:
    """All recorded rows in the form that the kernel reads, by component."""
    prologue, format = matrix["x"]["prologue"], matrix["format"]
    if prologue == "unpack":
        total = known["nvfp4.input_scale"].expand(len(known["nvfp4.x"]), 1)
        return {"data": known["nvfp4.x_q"], "scale": known["nvfp4.x_scale"], "global_scale": total}
    if prologue == "quantize":
        return {"data": known["act_quant.x"]}
    if format == "nvfp4":
        codes = codec.quantize(known["nvfp4.x"], FP8_ROW)
        return {"data": codes.data, "scale": codes.scale}
    exponents = known["act_quant.scale"].log2().round().to(torch.int32) + 127
    return {"data": known["act_quant.q"], "scale": exponents.to(torch.uint8)}


def result(known: dict[str, Tensor], matrix: dict[str, Any]) -> Tensor:
    """What was recorded."""
    if matrix["format"] == "nvfp4":
        return known["nvfp4.y_w4a4" if matrix["x"]["prologue"] == "unpack" else "nvfp4.y_w4a8"]
    return known["fp8_gemm.y" if matrix["format"] == "fp8" else "fp4_gemm.y"]


def ulps(got: Tensor, want: Tensor) -> float:
    """The largest distance in bf16 numbers, but for the error of a sum; NaN is infinitely far."""
    places = []
    for x in (got, want):
        bits = x.contiguous().view(torch.int16).int()
        places.append(torch.where(bits < 0, -(bits & 0x7FFF), bits))
    if bool(got.isnan().any()):
        return math.inf
    rms = want.double().square().mean(-1, keepdim=True).sqrt()
    near = (got.double() - want.double()).abs() <= ABSOLUTE * rms
    return float((places[0] - places[1]).abs().masked_fill(near, 0).max())


def check(case: dict[str, Any], cubin: Path, known: dict[str, Tensor]) -> float:
    """The worst result of all recorded rows."""
    (matrix,) = case["spec"]["matrices"]
    kernel = Library(cubin.read_bytes(), case["symbol"]).kernel(case["symbol"], shared=case["shared"])
    operands: Operands = {}
    bind_weight(operands, matrix["name"], case["packing"][matrix["name"]], weight(known, matrix["format"]))
    x, want = rows(known, matrix), result(known, matrix)
    worst = 0.0
    for first in range(0, len(want), ROWS):
        for component, part in x.items():
            operands[matrix["x"]["name"], component] = part[first : first + ROWS].contiguous()
        part = want[first : first + ROWS]
        operands[matrix["out"], "data"] = torch.full_like(part, math.nan)
        run_once(launch_of(case, kernel, operands))
        worst = max(worst, ulps(operands[matrix["out"], "data"], part))
    return worst


def main() -> int:
    """Check every kernel that was built for the recording; status 1 if one is wrong, or none was built."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/gpu/gemv"))
    options = parser.parse_args()
    torch.zeros(1, device="cuda")  # makes the context that kernels are loaded into
    known = {name: tensor.to("cuda") for name, tensor in recorded("kernels").tensors.items()}
    cases = [
        case
        for case in json.loads((options.folder / "cases.json").read_text())
        if case["symbol"].startswith("recorded")
    ]
    worst = {c["symbol"]: check(c, options.folder / f"{c['symbol']}.cubin", known) for c in cases}
    for name, far in worst.items():
        print(f"{name:28} {far:4.0f} ulp {'' if far <= 1 else 'WRONG'}")
    print(f"{len(worst)} kernels, {sum(far > 1 for far in worst.values())} wrong")
    return int(not worst or max(worst.values()) > 1)


if __name__ == "__main__":
    sys.exit(main())
