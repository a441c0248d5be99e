"""Compile everything that `python -m tests.gpu FOLDER` runs: python -m tests.gpu.build FOLDER.

Anywhere, no GPU needed; a few minutes and 40 MB. FOLDER/plans.json says what each plan is for. The recorded
models in several batches, first layers of Flash and Pro in full width, and the kernels one by one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.plans import PLANS, first_layers
from dsv4c.compiler import compile
from dsv4c.runtime.plan import Plan
from tests.goldens import golden_case

KERNELS = ("gemv", "hyper", "attention")  # of build_*.py
LAYERS, TIMES, RECORDED = "layers", "times", "recorded"


@dataclass(frozen=True)
class Wanted:
    """A plan to compile and what it is run for: a recorded case or, with `layers`, a model's first layers."""

    name: str
    use: str
    model: str
    recipe: str = "official"
    layers: int = 0
    batch: int = 1
    context: int = 512
    at: tuple[str, ...] = ()  # positions that `check_layers` starts from


def recorded(case: str, recipe: str, batch: int) -> Wanted:
    """A recorded case, which crosses the windows of all kinds of layers within 140 steps."""
    return Wanted(f"{case}-b{batch}", RECORDED, case, recipe, batch=batch, at=("0:140",))


WANTED = (
    recorded("official-quant", "official", 1),
    recorded("official-quant", "official", 3),
    recorded("official-quant", "official", 8),
    recorded("nvfp4-experts", "nvfp4-experts", 1),
    Wanted("official-quant-bf16-b2", LAYERS, "official-quant", "bf16", batch=2, context=512, at=("0:140",)),
    Wanted("nvfp4-experts-w4a4", LAYERS, "nvfp4-experts", "nvfp4", context=512, at=("0:140",)),
    Wanted("flash6", LAYERS, "deepseek-v4-flash", layers=6, context=8448, at=("0:400",)),
    Wanted(
        "flash6-1m", LAYERS, "deepseek-v4-flash", layers=6, context=1000448, at=("130000:50", "1000000:50")
    ),
    Wanted("flash3-b3", LAYERS, "deepseek-v4-flash", layers=3, batch=3, context=2560, at=("126:8", "2400:6")),
    Wanted("flash3-nvfp4", LAYERS, "deepseek-v4-flash", "nvfp4", 3, context=2560, at=("0:8", "2400:6")),
    Wanted("pro3-b2", LAYERS, "deepseek-v4-pro", layers=3, batch=2, context=8448, at=("0:6", "8000:8")),
    *(Wanted(n, TIMES, model, layers=layers, context=8448) for n, (model, layers) in PLANS.items()),
)


def compiled(wanted: Wanted, target: str) -> Plan:
    """The plan."""
    model = first_layers(wanted.model, wanted.layers) if wanted.layers else golden_case(wanted.model)
    return compile(model, target=target, recipe=wanted.recipe, batch=wanted.batch, max_context=wanted.context)


def gibibytes(plan: Plan) -> float:
    """What its blocks take on the device."""
    bucket = plan.bucket("decode")
    return (plan.weights_bytes + plan.state_bytes + bucket.arena_bytes) / 2**30


def main() -> int:
    """Compile, save, describe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="sm_90a")
    parser.add_argument("--only", default="", help="plans and kernels whose names contain this")
    options = parser.parse_args()
    index = options.folder / "plans.json"
    described = {entry["name"]: entry for entry in json.loads(index.read_text())} if index.exists() else {}
    for wanted in WANTED:
        if options.only not in wanted.name:
            continue
        plan = compiled(wanted, options.target)
        print(plan.save(options.folder / wanted.name, force=True), flush=True)
        described[wanted.name] = {
            "name": wanted.name,
            "use": wanted.use,
            "model": wanted.model,
            "weights": "random" if wanted.layers else wanted.model,
            "recipe": wanted.recipe,
            "batch": wanted.batch,
            "at": wanted.at,
            "gibibytes": round(gibibytes(plan), 2),
        }
        index.write_text(json.dumps(list(described.values()), indent=1))
    for family in KERNELS:
        if options.only in family:
            folder = options.folder / family
            store = options.folder.parent / "store"  # beside it: what is carried to the GPU stays small
            command = [sys.executable, "-m", f"tests.gpu.build_{family}", "--target", options.target]
            subprocess.run([*command, "--folder", str(folder), "--store", str(store)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
