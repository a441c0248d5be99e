"""Logits of one plan on the CPU and of another on a GPU, for the same weights and tokens.

    python -m tests.gpu.compare_logits record CASE RECIPE FILE   (anywhere; --tokens 60)
    python -m tests.gpu.compare_logits compare PLAN CASE FILE    (on the device)

`record` also stores the logits with every quantized product exact instead of summed in f32 as the reference
does: how far two right answers lie apart when a rounding falls the other way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4c.reference import linear
from dsv4c.runtime.plan import load
from tests.goldens import recorded


def distances(a: Tensor, b: Tensor) -> str:
    """|a - b| / |b| over the rows."""
    rows = (a.double() - b.double()).norm(dim=1) / b.double().norm(dim=1)
    same = (a.argmax(1) == b.argmax(1)).double().mean()
    return (
        f"median {rows.median():.4g}  p95 {rows.quantile(0.95):.4g}  max {rows.max():.4g}  "
        f"first {rows[0]:.4g}  same best token {same:.0%}"
    )


def record(case_name: str, recipe: str, file: Path, tokens: int) -> None:
    """The CPU plan's logits, twice."""
    from dsv4c.compiler import compile

    torch.set_num_threads(1)
    case = recorded(case_name)
    plan = compile(case.folder, target="cpu", recipe=recipe, max_context=256, chunk=1)
    ids = list(case.run().ids[:tokens])
    plainly = linear._block_product
    results = {"ids": torch.tensor(ids)}
    for name in ("logits", "exact"):
        if name == "exact":
            linear._block_product = lambda x, w: linear.exact(x) @ linear.exact(w).mT
        session = plan.bind(case.folder)
        results[name] = session.prefill(ids)
        linear._block_product = plainly
    save_file(results, file)
    print(f"other order of sums: {distances(results['exact'], results['logits'])}")


def compare(plan: Path, case_name: str, file: Path) -> None:
    """The GPU plan's logits against both."""
    known = load_file(file)
    session = load(plan).bind(recorded(case_name).folder)
    logits = session.prefill(known["ids"].tolist()).cpu()
    print(f"{torch.cuda.get_device_name()}, {len(logits)} tokens")
    for name in ("logits", "exact"):
        print(f"GPU to {name}: {distances(logits, known[name])}")
    print(f"exact to logits: {distances(known['exact'], known['logits'])}")


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
