"""Cross-compile what `check_hyper.py` runs: python -m tests.gpu.build_hyper.

Writes cubins and `cases.json` to the folder build/gpu/hyper (carry it to the machine with the GPU, which
needs no compiler).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsv4c.arch import ARCHS, Arch
from dsv4c.codegen.build import Source, build
from dsv4c.codegen.emit import Emission
from dsv4c.codegen.kernels import ends, gemv, hyper_norm, router

FOLDER = Path("build/gpu/hyper")
FLASH, PRO, TINY = 4096, 7168, 256
BATCHES = (1, 2, 3, 8)
MANY = (64, 512, 4096)  # rows of chunks, timed
CLUSTERS = range(2, 17)  # CTAs of a cluster: any number ends


def boundary(rows: int, hidden: int, **flags: Any) -> hyper_norm.HyperNormSpec:
    """A boundary with the release's constants."""
    return hyper_norm.HyperNormSpec(rows, hidden, 1e-6, 1e-6, flags.pop("iterations", 20), **flags)


def specs(arch: Arch) -> Iterator[tuple[str, Any, tuple[Emission, ...]]]:
    """(kind, spec, kernels) of every case."""
    boundaries = [boundary(b, h) for h in (FLASH, PRO, TINY) for b in BATCHES]
    boundaries += [boundary(b, h, mix=False, keep=False) for h, b in ((FLASH, 1), (TINY, 3))]
    boundaries += [
        boundary(b, h, head=True, keep=False, fp8=False) for h, b in ((FLASH, 1), (PRO, 2), (TINY, 8))
    ]
    boundaries += [
        boundary(1, FLASH, bf16=False),
        boundary(1, FLASH, ctas=8),
        boundary(1, FLASH, iterations=1),
    ]
    boundaries += [boundary(1, FLASH, held=held) for held in (0, 12)]
    boundaries += [boundary(1, PRO, held=held) for held in (0, 18)]
    boundaries += [boundary(1, 512), boundary(1, 2560), boundary(1, 384)]
    boundaries += [boundary(b, h) for h, b in ((FLASH, 17), (FLASH, 72), (FLASH, 300), (PRO, 40), (TINY, 99))]
    boundaries += [
        boundary(33, FLASH, mix=False, keep=False),
        boundary(40, FLASH, head=True, keep=False, fp8=False),
        *(boundary(b, FLASH) for b in MANY),
    ]
    boundaries += [boundary(1, width * n, ctas=n) for n in CLUSTERS for width in (128, 256)]
    boundaries += [boundary(40, width) for width in (128, 384, 2176)]
    boundaries += [boundary(1, 128 * n, ctas=n, head=True, keep=False, fp8=False) for n in CLUSTERS]
    for spec in boundaries:
        if spec.rows > hyper_norm.FEW_ROWS:
            yield "hyper", spec, hyper_norm.emit_hyper_batch(spec, arch)
        else:
            yield "hyper", spec, (hyper_norm.emit_hyper_norm(spec, arch),)
    for hidden, experts in ((FLASH, 256), (PRO, 384), (TINY, 8)):
        for rows in (*BATCHES, 43):
            gate = router.RouterGateSpec(rows, hidden, experts)
            yield "gate", gate, (router.emit_router_gate(gate, arch),)
    for rows, vocabulary in ((1, 129280), (8, 129280), (3, 512), (2, 250)):
        argmax = ends.ArgmaxSpec(rows, vocabulary)
        yield "argmax", argmax, (ends.emit_argmax(argmax, arch),)
    for rows, hidden in ((1, FLASH), (8, PRO), (3, TINY)):
        embed = ends.EmbedSpec(rows, hidden)
        yield "embed", embed, (ends.emit_embed(embed),)
    for sequences, tokens, hidden in ((1, 8, FLASH), (2, 4, PRO), (3, 2, TINY)):
        last = ends.LastRowsSpec(sequences, tokens, hidden)
        yield "last_rows", last, (ends.emit_last_rows(last),)
    for sequences in BATCHES:
        advance = ends.AdvanceSpec(sequences)
        yield "advance", advance, (ends.emit_advance(advance),)
        for tokens in (1, 4, 40, 700):
            positions = ends.PositionsSpec(sequences, tokens)
            yield "positions", positions, (ends.emit_positions(positions),)
    quantized, copied = gemv.Activations("x", "e4m3", "quantize"), gemv.Activations("x", "e4m3")
    neighbors = (
        ("wo_b", 4096, 8192, quantized),
        ("w13", 4096, 4096, copied),
        ("wo_b_pro", 7168, 16384, quantized),
        ("w13_pro", 6144, 7168, copied),
    )
    for name, rows, k, x in neighbors:  # in chains
        matrices = (gemv.Matrix("w", rows, "fp8", x, "y"),)
        matrix = gemv.GemvSpec(name, 1, k, matrices, late=x is quantized)
        yield "gemv", matrix, (gemv.emit_gemv(matrix, arch),)


def main() -> None:
    """Emit, build, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="sm_90a", choices=ARCHS)
    parser.add_argument("--store", type=Path, default=Path("build/store"))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    every = list(specs(ARCHS[options.target]))
    sources = [Source(e.symbol, e.source) for _, _, kernels in every for e in kernels]
    built = iter(build(sources, options.target, options.store))
    cases = []
    for kind, spec, kernels in every:
        made = []
        for emission, kernel in zip(kernels, built, strict=False):
            name = f"{emission.symbol}_{kernel.key[:12]}.cubin"
            (folder / name).write_bytes(kernel.cubin)
            assert kernel.resources.stack == 0, f"{spec} spills {kernel.resources.stack} bytes per thread"
            mixed = "x_out" if made and spec.mix else "x"
            made.append(
                {
                    "cubin": name,
                    "symbol": emission.symbol,
                    "grid": emission.grid,
                    "block": emission.block,
                    "shared": emission.shared,
                    "cluster": emission.cluster,
                    "parameters": [
                        [mixed if p.operand == "x" else p.operand, p.component] for p in emission.parameters
                    ],
                    "registers": kernel.resources.registers,
                }
            )
        described = asdict(spec)
        if len(kernels) > 1:  # rows have the same bits in kernels of one width
            described["width"] = spec.batch(ARCHS[options.target]).width
        cases.append({"kind": kind, "spec": described, "kernels": made})
    (folder / "cases.json").write_text(json.dumps(cases, indent=1))
    print(f"{len(cases)} cases in {folder}")


if __name__ == "__main__":
    main()
