"""Compile what `tests.gpu.check_rounds` runs: python -m tests.gpu.build_rounds --folder FOLDER --store STORE.

A small checkpoint per head in the release's formats, and three plans of each: one that drafts, one that
samples, one whose drafts are given. With `--ranks N` for so many GPUs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dsv4c.compiler.compile import compile
from tests.drafting import COUNTS, learned


def main() -> None:
    """Write checkpoints and plans."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--store", type=Path, help="where compiled kernels are kept")
    parser.add_argument("--target", default="sm_90a")
    parser.add_argument(
        "--recipe", default="official", help="official-fp8-drafts: drafts by a copy of the head"
    )
    parser.add_argument("--ranks", type=int, default=1)
    asked = parser.parse_args()
    for head, count in COUNTS.items():
        weights = learned(asked.folder / f"{head}-weights", head, quantized=True, ranks=asked.ranks)
        options = {
            "target": asked.target,
            "recipe": asked.recipe,
            "cache": asked.store,
            "max_context": 512,
            "certify": False,
            "draft_tokens": count,
            "ranks": asked.ranks,
        }
        for name, more in {
            "rounds": {"draft": head, "batch": (1, 2), "draft_confidence": head == "dspark"},
            "sampled": {"draft": head, "batch": (1, 2), "sampled": True},
            "given": {"draft": "given", "batch": 1},
        }.items():
            plan = compile(weights, **options, **more)
            print(plan.save(asked.folder / f"{head}-{name}", overwrite=True), flush=True)


if __name__ == "__main__":
    main()
