"""Cross-compile what `check_attention.py` runs: python -m tests.gpu.build_attention.

Writes cubins and `cases.json` to the folder build/gpu/attention (carry it to the machine with the GPU, which
needs no compiler).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dsv4c.arch import ARCHS, Arch
from dsv4c.codegen.build import Source, build
from dsv4c.codegen.emit import Emission
from dsv4c.codegen.kernels.attention import AttentionSpec, emit_attention, emit_chunk_attention, takes_chunk
from dsv4c.codegen.kernels.gemv import Activations, GemvSpec, Matrix, emit_gemv
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
from dsv4c.codegen.kernels.riders import CompressSpec, KvStoreSpec

FOLDER = Path("build/gpu/attention")
Spec = AttentionSpec | GemvSpec | IndexScoresSpec | TopKSpec


@dataclass(frozen=True)
class Case:
    """A spec to check with `tokens` rows of each sequence, and to time at position `timed_at` if given."""

    spec: Spec
    timed_at: int | None = None
    tokens: int = 1

    @property
    def rows(self) -> int:
        """Rows of the launch."""
        return self.spec.batch if isinstance(self.spec, GemvSpec) else self.spec.rows


def emit(spec: Spec, arch: Arch) -> Emission:
    """The spec's kernel."""
    if isinstance(spec, AttentionSpec):
        return emit_chunk_attention(spec, arch) if takes_chunk(spec, arch) else emit_attention(spec, arch)
    if isinstance(spec, GemvSpec):
        return emit_gemv(spec, arch)
    if isinstance(spec, IndexChoiceSpec):
        return emit_index_choice(spec, arch)
    if isinstance(spec, IndexScoresSpec):
        return (
            emit_chunk_scores(spec, arch) if takes_chunk_scores(spec, arch) else emit_index_scores(spec, arch)
        )
    return emit_top_k(spec, arch)


def attention(name: str, heads: int, rows: int = 1, **changes: object) -> AttentionSpec:
    """A release-width case: window 128 in a ring of 144, FP8 keys."""
    spec = AttentionSpec(name, rows, heads, 512, "fp8", 128, 144, 1e-6)
    return replace(spec, **changes)  # type: ignore[arg-type]


def csa(name: str, heads: int, k: int, rows: int = 1, **changes: object) -> AttentionSpec:
    """Selected entries of an 8 k context."""
    return attention(
        name, heads, rows, entries="selected", selected_count=k, ratio=4, capacity=2048, **changes
    )


def hca(name: str, heads: int, context: int, rows: int = 1, **changes: object) -> AttentionSpec:
    """All entries."""
    return attention(name, heads, rows, entries="all", ratio=128, capacity=context // 128, **changes)


def state(
    name: str,
    batch: int,
    ratio: int,
    width: int = 512,
    format: str = "fp8",
    ring: int = 144,
    k: int = 1024,
    tokens: int = 1,
    room: int = 8,
    context: int = 40000,
) -> GemvSpec:
    """The state writes of a layer, ratio 0 (window alone), 4 (with index keys) or 128, beside a small
    product of `k` columns, which decide the threads. Compressors' rings have `room` more rows than they pool.
    """
    key_format = "mxfp4" if format == "fp8" else format
    compressors = []
    if ratio:
        overlap = ratio == 4
        rows = ratio * (2 if overlap else 1) + room
        compressors.append(
            CompressSpec("kv_c", width, format, ratio, overlap, rows, context // ratio, 1e-6, tokens=tokens)
        )
        if ratio == 4:
            key = replace(compressors[0], name="index_c", width=128, format=key_format, hadamard=True)
            compressors.append(key)
    beside = Matrix("w", 1024, "bf16", Activations("x", "bf16"), "y")
    riders = (KvStoreSpec(width, format, ring, 1e-6), *compressors)
    return GemvSpec(name, batch, k, (beside,), riders=riders)


def cases() -> Iterator[Case]:
    """Flash and Pro at batch 1 timed; other batches, BF16 caches and tiny shapes checked."""
    yield Case(attention("swa", 64), 8191)
    yield Case(csa("csa", 64, 512), 8191)
    yield Case(csa("csa_pro", 128, 1024), 8191)
    yield Case(hca("hca", 64, 8192), 8191)
    yield Case(hca("hca_128k", 64, 131072), 8191)
    yield Case(hca("hca_128k_full", 64, 131072), 131071)
    yield Case(hca("hca_1m", 64, 1 << 20), (1 << 20) - 1)
    yield Case(hca("hca_pro", 128, 8192), 8191)
    yield Case(hca("hca_pro_1m", 128, 1 << 20), (1 << 20) - 1)
    yield Case(csa("csa_b8", 64, 512, 8), 8191)
    yield Case(csa("csa_pro_b8", 128, 1024, 8), 8191)
    yield Case(csa("csa_s16_t48", 64, 512, splits=16, tile=48))
    yield Case(csa("csa_s4_t48", 64, 512, splits=4, tile=48))
    yield Case(csa("csa_bf16", 64, 512, format="bf16", exact_norm=False), 8191)
    yield Case(hca("hca_bf16_1m", 64, 1 << 20, format="bf16", exact_norm=False), (1 << 20) - 1)
    yield Case(csa("csa_b3", 64, 512, 3))
    yield Case(hca("hca_b2", 64, 8192, 2))
    yield Case(hca("hca_1m_b8", 64, 1 << 20, 8), (1 << 20) - 1)
    yield Case(hca("hca_1m_b8_s8", 64, 1 << 20, 8, splits=8), (1 << 20) - 1)
    for tokens in (2, 4, 8):  # of one sequence and of several
        yield Case(csa(f"csa_1x{tokens}", 64, 512, tokens), 8000, tokens)
        yield Case(hca(f"hca_1x{tokens}", 64, 8192, tokens), 8000, tokens)
        yield Case(attention(f"swa_8_by_{tokens}", 64, 8), tokens=tokens)
        yield Case(csa(f"csa_8_by_{tokens}", 64, 512, 8), tokens=tokens)
    for rows, tokens in ((72, 1), (72, 8), (150, 150)):
        ring = -(-(127 + tokens) // 16) * 16
        name = f"chunk_{rows // tokens}x{tokens}"
        yield Case(attention(f"{name}_swa", 64, rows, ring=ring), tokens=tokens)
        yield Case(csa(f"{name}_csa", 64, 512, rows, ring=ring), tokens=tokens)
        yield Case(hca(f"{name}_hca", 64, 8192, rows, ring=ring, exact_norm=False), tokens=tokens)
    yield Case(csa("chunk_9x8_csa_bf16", 64, 512, 72, format="bf16", exact_norm=False), tokens=8)
    yield Case(csa("chunk_9x8_csa_32", 32, 512, 72, ring=144), tokens=8)  # heads of a rank of 2, 4 or 8
    yield Case(hca("chunk_1x150_hca_16", 16, 8192, 150, ring=288), tokens=150)
    yield Case(attention("chunk_1x150_swa_8", 8, 150, ring=288), tokens=150)
    yield Case(csa("chunk_1x40_csa_pro", 128, 1000, 40, ring=176), tokens=40)
    tiny = AttentionSpec("tiny", 3, 4, 128, "fp8", 16, 16, 1e-6, "selected", 6, 4, 64)
    yield Case(replace(tiny, name="tiny_8_by_4", rows=8, ring=19), tokens=4)
    yield Case(replace(tiny, name="tiny_1x8", rows=8, ring=23), tokens=8)
    yield Case(tiny)
    yield Case(replace(tiny, name="tiny512", width=512, window=128, ring=128))
    yield Case(replace(tiny, name="tiny_hca", entries="all", ratio=128, capacity=3, window=128, ring=131))
    yield Case(replace(tiny, name="tiny_bf16", format="bf16", exact_norm=False))
    yield Case(replace(tiny, name="tiny_swa", entries="none", selected_count=0, capacity=0))
    yield Case(state("state_swa", 1, 0), 8191)
    yield Case(state("state_csa", 1, 4), 8191)
    yield Case(state("state_hca", 1, 128), 8191)
    yield Case(state("state_csa_b8", 8, 4), 8191)
    yield Case(state("state_hca_b3", 3, 128))
    yield Case(state("state_csa_bf16", 3, 4, format="bf16", k=768))
    yield Case(state("state_tiny", 3, 4, 128, ring=16, k=128, room=0))
    yield Case(state("state_tiny_hca", 2, 128, 128, ring=131, k=256, room=0))
    for tokens in (2, 4, 8):  # rings with no more room than it takes
        for ratio, layer in ((0, "swa"), (4, "csa"), (128, "hca")):
            name = f"state_{layer}_8_by_{tokens}"
            spec = state(name, 8, ratio, tokens=tokens, room=tokens - 1, context=4096)
            yield Case(spec, tokens=tokens)
    yield Case(state("state_csa_1x4", 4, 4, tokens=4, context=16384), 8188, 4)
    yield Case(state("state_hca_1x4", 4, 128, tokens=4, context=16384), 8188, 4)
    yield Case(state("state_tiny_1x8", 8, 4, 128, ring=24, k=128, tokens=8, context=4096), tokens=8)
    yield Case(IndexScoresSpec("index", 1, 64, "mxfp4", 2048, 4, 512), 8191)
    yield Case(IndexScoresSpec("index_128k", 1, 64, "mxfp4", 32768, 4, 512), 131071)
    yield Case(IndexScoresSpec("index_1m", 1, 64, "mxfp4", 262144, 4, 512), (1 << 20) - 1)
    yield Case(IndexScoresSpec("index_1m_b2", 2, 64, "mxfp4", 262144, 4, 512), 8191)
    yield Case(IndexScoresSpec("index_b8", 8, 64, "mxfp4", 2048, 4, 1024), 8191)
    yield Case(IndexScoresSpec("index_bf16", 2, 64, "bf16", 2048, 4, 512))
    yield Case(IndexScoresSpec("index_tiny", 3, 32, "mxfp4", 50, 4, 6))
    yield Case(IndexScoresSpec("index_1x4", 4, 64, "mxfp4", 2048, 4, 512), 8000, 4)
    yield Case(IndexScoresSpec("index_8_by_4", 8, 64, "bf16", 2048, 4, 512), tokens=4)
    yield Case(IndexScoresSpec("index_tiny_8_by_2", 8, 32, "mxfp4", 50, 4, 6), tokens=2)
    yield Case(IndexScoresSpec("index_16", 16, 64, "mxfp4", 8192, 4, 512), 8191)
    yield Case(IndexScoresSpec("index_chunk_9x8", 72, 64, "mxfp4", 2048, 4, 512), tokens=8)
    yield Case(IndexScoresSpec("index_chunk_9x8_bf16", 72, 64, "bf16", 2048, 4, 512), tokens=8)
    yield Case(IndexScoresSpec("index_chunk_1x601", 601, 32, "mxfp4", 2048, 4, 512), tokens=601)
    yield Case(IndexScoresSpec("index_chunk_5x3_tiny", 15, 8, "mxfp4", 50, 4, 6), tokens=3)
    yield Case(IndexChoiceSpec("choice", 1, 64, "mxfp4", 2112, 4, 512), 8191)
    yield Case(IndexChoiceSpec("choice_8k", 1, 64, "mxfp4", 8192, 4, 1024), 32767)
    yield Case(IndexChoiceSpec("choice_b8", 8, 64, "mxfp4", 2048, 4, 1024), 8191)
    yield Case(IndexChoiceSpec("choice_bf16", 2, 64, "bf16", 2048, 4, 512))
    yield Case(IndexChoiceSpec("choice_tiny", 3, 32, "mxfp4", 50, 4, 6))
    yield Case(IndexChoiceSpec("choice_two", 3, 32, "bf16", 210, 4, 6))
    yield Case(IndexChoiceSpec("choice_1x4", 4, 64, "mxfp4", 2048, 4, 512), 8000, 4)
    yield Case(IndexChoiceSpec("choice_8_by_4", 8, 64, "bf16", 2048, 4, 512), tokens=4)
    yield Case(TopKSpec("topk_2k", 1, 2048, 512, 4), 8191)
    yield Case(TopKSpec("topk_8k", 1, 8192, 1024, 4), 32767)
    yield Case(TopKSpec("topk_32k", 1, 32768, 512, 4), 131071)
    yield Case(TopKSpec("topk_32k_at_8k", 1, 32768, 512, 4), 8191)
    yield Case(TopKSpec("topk_262k", 1, 262144, 512, 4), (1 << 20) - 1)
    yield Case(TopKSpec("topk_262k_f32", 2, 262144, 1024, 4, 32), (1 << 20) - 1)
    yield Case(TopKSpec("topk_b8", 8, 2048, 1024, 4), 8191)
    yield Case(TopKSpec("topk_1x8", 8, 32768, 512, 4), tokens=8)
    yield Case(TopKSpec("topk_tiny", 3, 50, 6, 4))
    yield Case(TopKSpec("topk_tiny_f32", 3, 21, 8, 4, 32))


def grid_of_one(case: Case, emission: Emission, arch: Arch) -> tuple[int, int, int] | None:
    """The grid of the same kernel for one row; None where the kernel is another for every number of rows."""
    spec = case.spec
    if isinstance(spec, GemvSpec) or (isinstance(spec, AttentionSpec) and takes_chunk(spec, arch)):
        return None
    if isinstance(spec, IndexScoresSpec) and takes_chunk_scores(spec, arch):
        return None
    one = emit(replace(spec, rows=1), arch)
    same = one.source.replace(str(one.shared), str(emission.shared))  # some rows ask for room, to spread out
    assert same == emission.source, f"{emission.symbol} is another kernel for one row"
    return one.grid


def describe(case: Case, emission: Emission, arch: Arch) -> dict[str, object]:
    """What the device side needs to know, as JSON."""
    return {
        "symbol": emission.symbol,
        "family": type(case.spec).__name__,
        "grid": emission.grid,
        "grid_of_one": grid_of_one(case, emission, arch),
        "block": emission.block,
        "shared": emission.shared,
        "cluster": emission.cluster,
        "parameters": [[p.operand, p.component] for p in emission.parameters],
        "rows": case.rows,
        "tokens": case.tokens,
        "timed_at": case.timed_at,
        "spec": asdict(case.spec) | {"packing": dict(emission.packing)},
    }


def main() -> None:
    """Emit, build, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="sm_90a", choices=ARCHS)
    parser.add_argument("--store", type=Path, default=Path("build/store"))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    every, arch = list(cases()), ARCHS[options.target]
    emissions = [emit(case.spec, arch) for case in every]
    built = build([Source(e.symbol, e.source) for e in emissions], options.target, options.store)
    for emission, kernel in zip(emissions, built, strict=True):
        (folder / f"{emission.symbol}.cubin").write_bytes(kernel.cubin)
        r = kernel.resources
        print(
            f"{emission.symbol:24} grid {emission.grid[0]:5} shared {emission.shared:6} "
            f"regs {r.registers:3} stack {r.stack}"
        )
    descriptions = [describe(c, e, arch) for c, e in zip(every, emissions, strict=True)]
    (folder / "cases.json").write_text(json.dumps(descriptions, indent=1))


if __name__ == "__main__":
    main()
