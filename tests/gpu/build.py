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
from typing import Any

from benchmarks.plans import PLANS, first_layers
from dsv4c.compiler.compile import compile
from dsv4c.plan.folder import Plan
from tests.goldens import golden_case

KERNELS = ("gemv", "gemm", "hyper", "attention", "rows", "rounds")  # of build_*.py
LAYERS, TIMES, LOADED, RECORDED, SLOTS = "layers", "times", "loaded", "recorded", "slots"
CHUNKS = "chunks"


@dataclass(frozen=True)
class Wanted:
    """A plan to compile and what it is run for: a recorded case or, with `layers`, a model's first layers."""

    name: str
    use: str
    model: str
    recipe: str = "official"
    layers: int = 0
    batch: int | tuple[int, ...] = 1
    chunk: int | tuple[int, ...] = 8
    context: int = 512
    at: tuple[str, ...] = ()  # positions that `check_layers` starts from
    every: int = 4  # steps of which it compares one
    logits: str = "logits"  # the recorded ones, of the recipe


def recorded(case: str, recipe: str, batch: int, **changes: Any) -> Wanted:
    """A recorded case, which crosses the windows of all kinds of layers within 140 steps."""
    name = f"{case}-{recipe}-b{batch}"
    return Wanted(name, RECORDED, case, recipe, batch=batch, at=("0:140",), every=8, **changes)


def wide(name: str, recipe: str, layers: int, batch: int, *at: str) -> Wanted:
    """First layers of Flash or Pro in full width, at the start of a sequence, around a window, further on."""
    short = f"{name}{layers}-{recipe}-b{batch}"
    return Wanted(short, LAYERS, f"deepseek-v4-{name}", recipe, layers, batch, 2560, at=at)


FLASH = "deepseek-v4-flash"
WANTED = (
    *(recorded("official-quant", "official", batch) for batch in (1, 3, 8)),
    recorded("official-quant", "bf16", 2, logits="logits_weight_only"),
    recorded("nvfp4-experts", "nvfp4-experts", 1),
    Wanted("nvfp4-experts-nvfp4-b1", LAYERS, "nvfp4-experts", "nvfp4", at=("0:140",), every=8),
    Wanted("flash6", LAYERS, FLASH, layers=6, context=8448, at=("0:400",), every=1),
    Wanted("flash6-1m", LAYERS, FLASH, layers=6, context=1000448, at=("130000:50", "1000000:50"), every=1),
    *(wide("flash", "official", 4, batch, "126:4", "2400:4") for batch in (2, 3, 8)),
    *(wide("pro", "official", 3, batch, "126:4", "2400:4") for batch in (1, 2, 3, 8)),
    *(wide("flash", recipe, 3, 1, "0:4", "2400:4") for recipe in ("bf16", "nvfp4")),
    wide("flash", "nvfp4-experts", 4, 1, "0:4", "2400:4"),
    *(Wanted(n, TIMES, model, layers=layers, context=8448) for n, (model, layers) in PLANS.items()),
    Wanted("tiny-slots", SLOTS, "official-quant", batch=(1, 2, 4, 8)),
    Wanted("flash6-slots", SLOTS, FLASH, layers=6, batch=(1, 2, 4, 8), context=2560),
    *(
        Wanted(f"{case}-{recipe}-chunks", CHUNKS, case, recipe, batch=(1, 16), chunk=(64, 150))
        for case, recipes in (
            ("fp32", ("fp32",)),
            ("official-quant", ("official", "bf16")),
            ("nvfp4-experts", ("nvfp4-experts", "nvfp4")),
        )
        for recipe in recipes
    ),
    Wanted("flash43", LOADED, FLASH, layers=43, context=131072),
    Wanted("pro61", LOADED, "deepseek-v4-pro", layers=61, context=131072),
)


def compiled(wanted: Wanted, target: str) -> Plan:
    """The plan: all kinds of buckets for recorded runs and those of slots, for others the decode step."""
    model = first_layers(wanted.model, wanted.layers) if wanted.layers else golden_case(wanted.model)
    all_kinds = wanted.use in (RECORDED, SLOTS, CHUNKS)
    others = {"chunk": wanted.chunk, "logits": "all"} if all_kinds else {"verify": 1, "chunk": 1}
    options = {"recipe": wanted.recipe, "batch": wanted.batch, "max_context": wanted.context, **others}
    return compile(model, target=target, certify=False, **options)  # what runs on a GPU needs none


def gibibytes(plan: Plan) -> float:
    """What its blocks take on the device."""
    return sum(plan.blocks.values()) / 2**30


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
        print(plan.save(options.folder / wanted.name, overwrite=True), flush=True)
        described[wanted.name] = {
            "name": wanted.name,
            "use": wanted.use,
            "model": wanted.model,
            "weights": "random" if wanted.layers else wanted.model,
            "recipe": wanted.recipe,
            "batch": wanted.batch,
            "at": wanted.at,
            "every": wanted.every,
            "logits": wanted.logits,
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
