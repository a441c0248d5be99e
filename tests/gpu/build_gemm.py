"""Cross-compile what `check_gemm.py` runs: python -m tests.gpu.build_gemm.

Writes cubins, `cases.json` (products of many rows), `experts.json` (both products of a MoE layer and what
lists its rows) and `rows.json` (rows to FP8) to the folder build/gpu/gemm.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from dsv4c.arch import ARCHS
from dsv4c.codegen.build import Source, build
from dsv4c.codegen.emit import Emission
from dsv4c.codegen.kernels.chunk_rows import (
    emit_list_rows,
    emit_norm_quantize_fp8,
    emit_quantize_fp8,
    emit_sum_experts,
)
from dsv4c.codegen.kernels.gemm import GemmMatrix, GemmSpec, emit_gemm

FOLDER = Path("build/gpu/gemm")
BUCKETS = (64, 512, 4096)


def matrix(rows: int, *names: str, out: str = "y") -> GemmMatrix:
    return GemmMatrix(names or ("w",), rows, out)


def dense() -> Iterator[tuple[GemmSpec, bool]]:
    """Flash's products, by bucket, and shapes of every kind; whether each is timed."""
    for rows in BUCKETS:
        for name, columns, k, packing in (
            ("wq_b", 32768, 1024, "fp8/2x1"),
            ("wo_b", 4096, 8192, "fp8/1x1"),
            ("w13", 4096, 4096, "fp8/1x1"),
            ("qa", 1536, 4096, "fp8/8x1"),
        ):
            yield GemmSpec(f"{name}_{rows}", rows, k, (matrix(columns),), packing, True, counted=True), True
        wo_a = GemmSpec(f"wo_a_{rows}", rows, 4096, (matrix(8192),), "fp8/8x1", False, groups=8, counted=True)
        yield wo_a, True
        several = (matrix(1024), matrix(512, "v", out="z"), matrix(64, "u", out="t"))
        for packing, scaled in (("bf16/1x2", False), ("nvfp4/2x2", True), ("mxfp4/1x4", True)):
            name = f"{packing.partition('/')[0]}_{rows}"
            spec = GemmSpec(name, rows, 4096, several, packing, scaled, "f32", counted=True)
            yield spec, False
            one = replace(spec, name=f"{name}_one", matrices=(matrix(4096),), out_dtype="bf16")
            yield one, True
        gate = GemmSpec(f"gate_{rows}", rows, 4096, (matrix(256),), "plain", False, "f32", counted=True)
        yield gate, True
        shared = matrix(2048, "w1", "w3", out="h")
        yield (
            GemmSpec(f"shared_{rows}", rows, 4096, (shared,), "fp8/1x1", True, counted=True, limit=10.0),
            True,
        )
    for k in (128, 256, 384, 640):  # steps that do not split evenly
        for packing, scaled in (
            ("fp8/1x1", True),
            ("bf16/1x1", False),
            ("mxfp4/1x1", True),
            ("nvfp4/1x1", True),
        ):
            name = f"odd_{packing.partition('/')[0]}_{k}"
            yield GemmSpec(name, 150, k, (matrix(136),), packing, scaled, "f32", counted=True), False


def experts() -> Iterator[tuple[str, list[Emission], list[GemmSpec], int, bool]]:
    """(name, [list rows, up, down, sum], specs of both products, rows, timed)."""
    for rows, count, k, wide, top_k, format in (
        *((rows, 256, 4096, 2048, 6, "mxfp4") for rows in BUCKETS),
        (512, 16, 4096, 2048, 6, "nvfp4"),
        (150, 16, 512, 256, 2, "mxfp4"),
        (60, 32, 512, 256, 4, "mxfp4"),
        (150, 16, 512, 256, 2, "fp8"),
    ):
        name = f"{format}_{count}_{rows}"
        packing = f"{format}/1x{1 if format == 'fp8' else 2}"
        every = rows * top_k
        pair = (matrix(wide, "w1", "w3", out="h"),)
        up = GemmSpec(f"up_{name}", every, k, pair, packing, True, limit=10.0, experts=count, divide=top_k)
        down = GemmSpec(f"down_{name}", every, wide, (matrix(k, "w2"),), packing, True, experts=count)
        arch = ARCHS["sm_90a"]
        emissions = [
            emit_list_rows(f"list_{name}", rows, top_k, count, counted=True),
            emit_gemm(up, arch),
            emit_gemm(down, arch),
            emit_sum_experts(f"sum_{name}", rows, top_k, k, counted=True),
        ]
        yield name, emissions, [up, down], rows, count == 256


def quantizers() -> Iterator[tuple[dict[str, object], Emission]]:
    """Rows to FP8, with what the check needs to know."""
    for rows, k, each in ((512, 2048, 6), (512, 8192, 1), (150, 128, 1)):
        yield {"rows": rows, "k": k, "each": each}, emit_quantize_fp8(f"fp8_{k}", rows * each, k, each, True)
    for rows, k in ((512, 1024), (150, 256)):
        name = f"norm_{k}"
        yield {"rows": rows, "k": k, "eps": 1e-6}, emit_norm_quantize_fp8(name, rows, k, 1e-6, counted=True)


def describe(emission: Emission) -> dict[str, object]:
    return {
        "symbol": emission.symbol,
        "grid": emission.grid,
        "block": emission.block,
        "shared": emission.shared,
        "cluster": emission.cluster,
        "parameters": [[p.operand, p.component, p.box and asdict(p.box)] for p in emission.parameters],
    }


def main() -> None:
    """Emit, build, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="sm_90a", choices=("sm_90a",))
    parser.add_argument("--store", type=Path, default=Path("build/store"))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    arch = ARCHS[options.target]
    cases = [(spec, timed, emit_gemm(spec, arch)) for spec, timed in dense()]
    layers = list(experts())
    rows = list(quantizers())
    emissions = [e for *_, e in cases] + [e for _, es, *_ in layers for e in es] + [e for _, e in rows]
    built = build([Source(e.symbol, e.source) for e in emissions], options.target, options.store)
    for emission, kernel in zip(emissions, built, strict=True):
        (folder / f"{emission.symbol}.cubin").write_bytes(kernel.cubin)
        r = kernel.resources
        print(
            f"{emission.symbol:26} grid {emission.grid[0]:5} {emission.shared:6} B {r.registers:3} {r.stack}"
        )
    described = [{**describe(e), "spec": asdict(spec), "timed": timed} for spec, timed, e in cases]
    (folder / "cases.json").write_text(json.dumps(described, indent=1))
    described = [
        {
            "name": name,
            "rows": count,
            "top_k": specs[0].divide,
            "timed": timed,
            "specs": [asdict(s) for s in specs],
            "kernels": [describe(e) for e in es],
        }
        for name, es, specs, count, timed in layers
    ]
    (folder / "experts.json").write_text(json.dumps(described, indent=1))
    (folder / "rows.json").write_text(json.dumps([{**describe(e), **facts} for facts, e in rows], indent=1))


if __name__ == "__main__":
    main()
