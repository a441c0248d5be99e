"""Logits of one plan on the CPU and of another on a GPU, for the same weights and tokens.

    python -m tests.gpu.compare_logits record CASE RECIPE FILE   (anywhere; --tokens 60)
    python -m tests.gpu.compare_logits compare PLAN CASE FILE    (on the device)

`record` also stores other right answers, to see how far they lie apart once roundings fall the other way:
"exact", every quantized product exact instead of summed in f32 as the reference does; "jittered", products of
experts and values of attention moved by up to 2^-8 of themselves, so that about a quarter are the next bf16:
kernels do not round those in the reference's places.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4c.ir.ops.attention import AttentionValues
from dsv4c.ir.ops.linear import ExpertLinear
from dsv4c.reference import linear
from dsv4c.reference.registry import MEANINGS
from dsv4c.runtime.plan import load
from tests.goldens import recorded

OTHERS = ("exact", "jittered")


def distances(a: Tensor, b: Tensor) -> str:
    """|a - b| / |b| over the rows."""
    rows = (a.double() - b.double()).norm(dim=1) / b.double().norm(dim=1)
    same = (a.argmax(1) == b.argmax(1)).double().mean()
    return (
        f"median {rows.median():.4g}  p95 {rows.quantile(0.95):.4g}  max {rows.max():.4g}  "
        f"first {rows[0]:.4g}  same best token {same:.0%}"
    )


def jittered(meaning: Callable[..., Tensor], generator: torch.Generator) -> Callable[..., Tensor]:
    """An op's meaning, its result off by up to 2^-8 of itself, rounded again."""

    def moved(*operands: object) -> Tensor:
        result = meaning(*operands)
        share = torch.rand(result.shape, generator=generator) * 2 - 1
        return (result.float() * (1 + share * 2**-8)).to(result.dtype)

    return moved


def record(case_name: str, recipe: str, file: Path, tokens: int) -> None:
    """The CPU plan's logits, twice."""
    from dsv4c.compiler import compile

    torch.set_num_threads(1)
    case = recorded(case_name)
    plan = compile(case.folder, target="cpu", recipe=recipe, max_context=256, chunk=1)
    ids = list(case.run().ids[:tokens])
    results = {"ids": torch.tensor(ids)}

    def run(name: str) -> None:
        results[name] = plan.bind(case.folder).prefill(ids)

    run("logits")
    with mock.patch.object(linear, "_block_product", lambda x, w: linear.exact(x) @ linear.exact(w).mT):
        run("exact")
    generator = torch.Generator().manual_seed(0)
    moved = {op: jittered(MEANINGS[op], generator) for op in (ExpertLinear, AttentionValues)}
    with mock.patch.dict(MEANINGS, moved):
        run("jittered")
    save_file(results, file)
    for name in OTHERS:
        print(f"{name} to logits: {distances(results[name], results['logits'])}")


def compare(plan: Path, case_name: str, file: Path) -> None:
    """The GPU plan's logits against both."""
    known = load_file(file)
    session = load(plan).bind(recorded(case_name).folder)
    logits = session.prefill(known["ids"].tolist()).cpu()
    print(f"{torch.cuda.get_device_name()}, {len(logits)} tokens")
    print(f"GPU to logits: {distances(logits, known['logits'])}")
    for name in OTHERS:
        print(f"{name} to logits: {distances(known[name], known['logits'])}")


def main() -> None:
    """Record or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", type=int, default=60)
    options = parser.parse_args()
    if options.what == "record":
        record(options.first, options.second, options.file, options.tokens)
    else:
        compare(Path(options.first), options.second, options.file)


if __name__ == "__main__":
    main()
