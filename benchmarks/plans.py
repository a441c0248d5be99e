"""Compile the plans that `benchmarks.layers` measures: python -m benchmarks.plans FOLDER.

The first layers of Flash (12) and Pro (8) in full width, `official`, batch 1, room for 8,448 tokens: as many
as fit the 141 GB of an H200. No weights and no GPU are needed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from dsv4c.compiler import compile
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
    """Compile and save both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="sm_90a")
    options = parser.parse_args()
    for key, (name, layers) in PLANS.items():
        plan = compile(first_layers(name, layers), target=options.target, max_context=CONTEXT)
        print(plan.save(options.folder / key, force=True))


if __name__ == "__main__":
    main()
