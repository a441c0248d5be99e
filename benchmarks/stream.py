"""Weights of Flash's first layers from disk to their place: python -m benchmarks.stream FOLDER [--layers 6].

Writes a random checkpoint into FOLDER, unless one is there, then reads it into a block that is a file beside
it, so that it need not fit this machine's memory: as much disk as twice the checkpoint. Prints bytes, seconds
and the most host memory on the way. Needs no GPU.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.plans import first_layers
from dsv4c.compiler.compile import compile
from dsv4c.models.synth import synthesize
from dsv4c.runtime.checkpoint import Checkpoint
from dsv4c.runtime.residence import Resident, load_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    config = first_layers("deepseek-v4-flash", options.layers)
    weights, block = options.folder / "weights", options.folder / "block"
    if not weights.exists():
        started, own = time.perf_counter(), time.process_time()
        synthesize(config, weights, 1)
        seconds, own = time.perf_counter() - started, time.process_time() - own
        nbytes = sum(file.stat().st_size for file in weights.glob("*.safetensors"))
        print(f"written: {nbytes / 1e9:.2f} GB in {seconds:.1f} s, {nbytes / own / 1e6:.0f} MB/s per core")
    plan = compile(config, batch=1, verify=1, chunk=8, max_context=64, certify=False)
    residents = [Resident.from_json(record) for record in plan.weights]
    place = torch.from_file(str(block), shared=True, size=plan.blocks["weights"], dtype=torch.uint8)
    try:
        print(f"read: {load_weights(Checkpoint.open(weights), residents, [place])}")
    finally:
        block.unlink()


if __name__ == "__main__":
    main()
