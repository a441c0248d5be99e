"""Compile the plans that `dsv4c bench` is shown on: python -m benchmarks.plans FOLDER.

The first layers of Flash (12) and Pro (8) in full width, `official`, batch 1, room for 8,448 tokens: as many
as fit the 141 GB of an H200. With --model and --layers only that one, as FOLDER itself; --disable all leaves
it unfused. No weights and no GPU are needed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from dsv4c.compiler.compile import compile
from dsv4c.config import ModelConfig, load_config

PLANS = {"flash": ("deepseek-v4-flash", 12), "pro": ("deepseek-v4-pro", 8)}
CONTEXT = 8448  # a step at position 8,192, and some after it


def first_layers(name: str, layers: int) -> ModelConfig:
    """A built-in model cut after some layers, without MTP block."""
    config = load_config(name)
    return replace(
        config,
        name=f"{name}-{layers}",
        num_layers=layers,
        compress_ratios=config.compress_ratios[:layers],
        num_hash_layers=min(config.num_hash_layers, layers),
        mtp_layers=0,
    )


def main() -> None:
    """Compile and save what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="sm_90a")
    parser.add_argument("--model")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--disable", action="append", default=[], help="a rule, or all of them")
    options = parser.parse_args()
    wanted = {options.folder / key: plan for key, plan in PLANS.items()}
    if options.model:
        wanted = {options.folder: (options.model, options.layers)}
    for folder, (name, layers) in wanted.items():
        plan = compile(
            first_layers(name, layers),
            target=options.target,
            batch=options.batch,
            verify=1,
            chunk=1,
            max_context=options.context,
            disable=options.disable,
        )
        print(plan.save(folder, overwrite=True))


if __name__ == "__main__":
    main()
