"""Cross-compile what `check_gemv.py` and `check_experts.py` run: python -m tests.gpu.build_gemv.

Writes cubins and `cases.json` to the folder build/gpu/gemv (carry it to the machine with the GPU, which needs
no compiler).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dsv4c.arch import ARCHS
from dsv4c.codegen.build import Source, build
from dsv4c.codegen.emit import Emission
from dsv4c.codegen.kernels.experts import ExpertsSpec
from dsv4c.codegen.kernels.experts_down import emit_experts_down
from dsv4c.codegen.kernels.experts_up import Routing, emit_experts_up
from dsv4c.codegen.kernels.gemv import Activations, GemvSpec, Matrix, emit_gemv
from dsv4c.codegen.kernels.quantize import QuantizeSpec, emit_quantize

FOLDER = Path("build/gpu/gemv")
QUANTIZED = Activations("x", "e4m3")
PLAIN = Activations("x_bf16", "bf16")
UNPACK = Activations("x", "f16", "unpack")
EXPAND = Activations("x", "f16", "expand")
QUANTIZE = Activations("x_bf16", "e4m3", "quantize")
KEEP = Activations("x_bf16", "f16", "quantize")
NORMALIZE = Activations("x_bf16", "e4m3", "normalize", gain="gain", eps=1e-6)
NORMED = Activations("x_bf16", "bf16", "normalize", gain="gain", eps=1e-6)


@dataclass(frozen=True)
class Case:
    """A spec to check, and to time if `timed`."""

    spec: GemvSpec
    timed: bool = False


def dense(
    name: str,
    rows: int,
    k: int,
    format: str = "fp8",
    x: Activations = QUANTIZED,
    *,
    batch: int = 1,
    out: str = "bf16",
    groups: int = 1,
) -> GemvSpec:
    """One matrix."""
    return GemvSpec(f"{name}_b{batch}", batch, k, (Matrix("w", rows, format, x, "y", out),), groups)


def in_proj(name: str, k: int, q_lora: int, batch: int) -> GemvSpec:
    """The projections of one CSA layer's input."""
    matrices = (
        Matrix("wq_a", q_lora, "fp8", QUANTIZED, "q_a"),
        Matrix("wkv", 512, "fp8", QUANTIZED, "kv"),
        Matrix("compressor_wkv", 1024, "bf16", PLAIN, "u", "f32"),
        Matrix("compressor_wgate", 1024, "bf16", PLAIN, "s", "f32"),
        Matrix("indexer_wkv", 256, "bf16", PLAIN, "iu", "f32"),
        Matrix("indexer_wgate", 256, "bf16", PLAIN, "is_", "f32"),
        Matrix("weights_proj", 64, "bf16", PLAIN, "wi", "f32"),
    )
    return GemvSpec(f"{name}_b{batch}", batch, k, matrices)


def q_proj(name: str, k: int, rows: int, batch: int) -> GemvSpec:
    """wq_b and the indexer's, behind q_norm and quantization."""
    matrices = (
        Matrix("wq_b", rows, "fp8", NORMALIZE, "q"),
        Matrix("indexer_wq_b", 8192, "fp8", NORMALIZE, "qi"),
    )
    return GemvSpec(f"{name}_b{batch}", batch, k, matrices)


def cases() -> list[Case]:
    """Flash at every batch that matters, Pro at 1, and small shapes that stress padding."""
    timed, checked = [], []
    timed += [
        dense("wq_b", 32768, 1024),
        dense("wo_b", 4096, 8192),
        dense("w13", 4096, 4096),
        dense("in_fp8", 1536, 4096),
        dense("wq_b_norm", 32768, 1024, x=NORMALIZE),
        dense("wo_b_quantize", 4096, 8192, x=QUANTIZE),
        q_proj("q_proj", 1024, 32768, 1),
        in_proj("in_proj", 4096, 1024, 1),
        dense("wo_a", 8192, 4096, "fp8", KEEP, groups=8),
        dense("lm_head", 129280, 4096, "bf16", PLAIN, out="f32"),
        dense("w13_x", 4096, 4096, x=EXPAND),
        dense("mxfp4_x", 12288, 4096, "mxfp4", x=EXPAND),
        dense("nvfp4_x", 12288, 4096, "nvfp4", x=EXPAND),
        dense("mxfp4", 12288, 4096, "mxfp4"),
        dense("nvfp4", 12288, 4096, "nvfp4"),
        dense("wo_b", 4096, 8192, batch=8),
        in_proj("in_proj_pro", 7168, 1536, 1),
        q_proj("q_proj_pro", 1536, 65536, 1),
        dense("wo_a_pro", 16384, 4096, "fp8", KEEP, groups=16),
        dense("wo_b_pro", 7168, 16384, x=QUANTIZE),
        dense("wq_b", 32768, 1024, batch=8),
        dense("wo_b_quantize", 4096, 8192, x=QUANTIZE, batch=8),
        in_proj("in_proj", 4096, 1024, 8),
        dense("wo_a", 8192, 4096, "fp8", KEEP, groups=8, batch=8),
        dense("split_bf16", 7168, 16384, "bf16", PLAIN, batch=8),
        dense("split_w4a4", 7168, 16384, "nvfp4", UNPACK, batch=8),
    ]
    for batch in (2, 3):
        checked += [
            in_proj("in_proj", 4096, 1024, batch),
            dense("wq_b_norm", 32768, 1024, x=NORMALIZE, batch=batch),
            dense("wo_b_quantize", 4096, 8192, x=QUANTIZE, batch=batch),
        ]
    for batch in (1, 3, 8):
        checked += [
            dense("tiny_bf16", 48, 96, "bf16", PLAIN, batch=batch),
            dense("tiny_fp8", 256, 128, batch=batch),
            dense("tiny_norm", 2048, 128, x=NORMALIZE, batch=batch),
            dense("tiny_wo_a", 256, 1024, "fp8", KEEP, groups=2, batch=batch),
            dense("tiny_expand", 256, 384, x=EXPAND, batch=batch),
            dense("keep_mxfp4", 256, 256, "mxfp4", KEEP, batch=batch, out="f32"),
            dense("keep_nvfp4", 256, 256, "nvfp4", KEEP, batch=batch, out="f32"),
            dense("small_mxfp4", 256, 256, "mxfp4", batch=batch, out="f32"),
            dense("small_nvfp4", 256, 384, "nvfp4", batch=batch, out="f32"),
            dense("small_fp8", 208, 1536, "fp8", batch=batch, out="f32"),
            dense("head", 256, 96, "bf16", PLAIN, batch=batch, out="f32"),
        ]
        checked += [
            dense("w4a4", 4096, 4096, "nvfp4", UNPACK, batch=batch, out="f32"),
            dense("w4a4_gate", 8, 256, "nvfp4", UNPACK, batch=batch, out="f32"),
            dense("w4a4_odd", 1032, 384, "nvfp4", UNPACK, batch=batch),
            dense("w4a4_wo_a", 8192, 4096, "nvfp4", UNPACK, batch=batch, groups=8, out="f32"),
        ]
    checked += [  # for `check_recorded.py`
        dense("recorded_fp8", 256, 384, batch=8),
        dense("recorded_fp8_quantize", 256, 384, x=QUANTIZE, batch=8),
        dense("recorded_mxfp4", 256, 384, "mxfp4", EXPAND, batch=8),
        dense("recorded_nvfp4", 256, 384, "nvfp4", EXPAND, batch=8),
        dense("recorded_w4a4", 256, 384, "nvfp4", UNPACK, batch=8),
    ]
    checked += [dense("mxfp4", 12288, 4096, "mxfp4", batch=8), dense("nvfp4", 12288, 4096, "nvfp4", batch=8)]
    checked += [  # rows split over CTAs, some of them computed twice
        dense("split_bf16", 7168, 16384, "bf16", PLAIN, batch=7, out="f32"),
        dense("split_norm", 256, 10240, "bf16", NORMED, batch=7, out="f32"),
        dense("split_quantize", 256, 32768, x=QUANTIZE, batch=7, out="f32"),
        dense("split_expand", 256, 16384, "mxfp4", EXPAND, batch=7, out="f32"),
        dense("split_keep", 512, 16384, "fp8", KEEP, groups=2, batch=7),
        dense("split_codes", 256, 32768, batch=7, out="f32"),
        in_proj("split_in_proj", 16384, 1024, 7),
    ]
    checked += [dense("split_w4a4", 7168, 16384, "nvfp4", UNPACK, batch=b, out="f32") for b in (5, 7)]
    checked.append(dense("split_w4a4_wo_a", 512, 16384, "nvfp4", UNPACK, batch=7, groups=2, out="f32"))
    return [Case(s, True) for s in timed] + [Case(s) for s in checked]


def quantizers() -> list[QuantizeSpec]:
    """Rows to NVFP4, plain and behind a norm."""
    plain = [
        QuantizeSpec(f"q_{n}x{k}", n, k) for n, k in ((1, 128), (1, 4096), (8, 8192), (48, 2048), (3, 16384))
    ]
    return [*plain, QuantizeSpec("qn_1x1024", 1, 1024, 1e-6), QuantizeSpec("qn_8x1536", 8, 1536, 1e-6)]


def experts() -> list[tuple[ExpertsSpec, Routing, bool]]:
    """Layers' experts, how they are chosen, and whether to time them."""
    scores, table, rows = (Routing(source, 1.5) for source in ("scores", "table", "rows"))

    def flash(routed: str, shared: str, batch: int = 1) -> ExpertsSpec:
        return ExpertsSpec(
            f"flash_{routed}_{shared}_b{batch}", batch, 4096, 2048, 256, 6, routed, shared, 10.0
        )

    def pro_of(batch: int) -> ExpertsSpec:
        return ExpertsSpec(f"pro_mxfp4_fp8_b{batch}", batch, 7168, 3072, 384, 6, "mxfp4", "fp8", 10.0)

    pro = pro_of(1)
    timed = [flash("mxfp4", "fp8"), flash("nvfp4", "fp8"), flash("fp8", "fp8"), pro]
    timed += [flash("mxfp4", "fp8", batch) for batch in (2, 4, 5, 6, 8)] + [pro_of(6)]
    layers = [(spec, scores, True) for spec in timed]
    layers += [(spec, rows, True) for spec in (timed[0], pro)]
    layers += [(flash(*spec), scores, False) for spec in (("bf16", "bf16"), ("nvfp4", "nvfp4", 3))]
    layers += [(flash("mxfp4", "fp8", batch), table, False) for batch in (2, 8)]
    layers += [(flash("bf16", "bf16", 3), rows, False)]
    layers += [(pro_of(6), table, False), (flash("nvfp4", "fp8", 5), scores, False)]
    for batch in (1, 3):
        tiny = [
            ExpertsSpec(f"tiny_{r}_{s}_b{batch}", batch, 256, 128, 8, 2, r, s, 1.0)
            for r, s in (("mxfp4", "fp8"), ("nvfp4", "fp8"), ("fp8", "fp8"))
        ]
        tiny.append(ExpertsSpec(f"tiny_bf16_bf16_b{batch}", batch, 96, 48, 6, 2, "bf16", "bf16", 0.6))
        tiny.append(ExpertsSpec(f"odd_bf16_bf16_b{batch}", batch, 160, 16, 37, 5, "bf16", "bf16", 0.6))
        tiny.append(ExpertsSpec(f"many_fp8_fp8_b{batch}", batch, 128, 128, 300, 9, "fp8", "fp8", 1.0))
        layers += [(spec, routing, False) for spec in tiny for routing in (scores, table, rows)]
    return [layer for layer in layers if layer[1] is not rows or layer[0].turns == 1]  # else given logits


def describe(
    spec: GemvSpec | ExpertsSpec | QuantizeSpec, timed: bool, emission: Emission
) -> dict[str, object]:
    """What the device side needs to know, as JSON."""
    return {
        "symbol": emission.symbol,
        "grid": emission.grid,
        "block": emission.block,
        "shared": emission.shared,
        "cluster": emission.cluster,
        "parameters": [[p.operand, p.component, p.box and asdict(p.box)] for p in emission.parameters],
        "packing": dict(emission.packing),
        "timed": timed,
        "spec": asdict(spec),
    }


def main() -> None:
    """Emit, build, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="sm_90a", choices=ARCHS)
    parser.add_argument("--store", type=Path, default=Path("build/store"))
    parser.add_argument("--only", default="", help="cases whose names contain this; experts")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    every: list[tuple[GemvSpec | QuantizeSpec, bool, Emission]]
    arch = ARCHS[options.target]
    every = [
        (case.spec, case.timed, emit_gemv(case.spec, arch))
        for case in cases()
        if options.only in case.spec.name
    ]
    every += [
        (spec, False, emit_quantize(spec))
        for spec in quantizers()
        if options.only in spec.name or options.only == "w4a4"
    ]
    pairs = []
    for spec, routing, timed in experts() if options.only in ("", "experts") else []:
        up = emit_experts_up(replace(spec, name=f"up_{routing.source}_{spec.name}"), routing, arch)
        down = emit_experts_down(replace(spec, name=f"down_{routing.source}_{spec.name}"), arch)
        pairs.append((spec, routing, timed, up, down))
    emissions = [e for *_, e in every] + [e for *_, up, down in pairs for e in (up, down)]
    built = build([Source(e.symbol, e.source) for e in emissions], options.target, options.store)
    for emission, kernel in zip(emissions, built, strict=True):
        (folder / f"{emission.symbol}.cubin").write_bytes(kernel.cubin)
        r = kernel.resources
        print(
            f"{emission.symbol:26} grid {emission.grid[0]:5} {emission.shared:6} B {r.registers:3} registers"
        )
    (folder / "cases.json").write_text(json.dumps([describe(*case) for case in every], indent=1))
    layers = [
        [{**describe(spec, timed, e), "routing": asdict(routing)} for e in (up, down)]
        for spec, routing, timed, up, down in pairs
    ]
    (folder / "experts.json").write_text(json.dumps(layers, indent=1))


if __name__ == "__main__":
    main()
