"""What drafting and judging take on a GPU, beside their bytes: python -m benchmarks.rounds PLAN.

    python -m benchmarks.rounds PLAN --build [--model deepseek-v4-flash] [--layers 8]

compiles PLAN where there is no GPU: a model's first layers in full width, with DSpark's three stages, steps
that judge 2, 3, 4 and 6 rows, drafts of 3 and 5, and rounds of both. Times are medians of replays of a whole
call from a flushed L2, on random weights; floors are bytes over the bandwidth that the same run reads with,
every chosen expert counted once.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from dsv4c.buckets import Bucket
from dsv4c.config import ModelConfig
from dsv4c.plan.folder import load

CONTEXT, POSITION = 8448, 8192
BUCKETS = (
    Bucket("decode"),
    *(Bucket("verify", tokens=rows) for rows in (2, 3, 4, 6)),
    *(Bucket("draft", tokens=count) for count in (3, 5)),
    *(Bucket("round", tokens=rows) for rows in (4, 6)),
)


def drafting(config: ModelConfig) -> ModelConfig:
    """A model with DSpark's stages as the releases have them, behind its last three layers."""
    last = config.num_layers
    return replace(
        config,
        mtp_layers=0,
        dspark_stages=3,
        dspark_block_size=5,
        dspark_noise_token_id=config.vocab_size - 481,
        dspark_target_layers=tuple(range(last - 3, last)),
        dspark_markov_rank=256,
    )


def build(path: Path, model: str, layers: int, target: str) -> None:
    """Compile and save the plan."""
    from benchmarks.plans import first_layers
    from dsv4c.compiler.compile import compile
    from dsv4c.compiler.request import Request

    config = drafting(first_layers(model, layers))
    job = Request(config, target=target, batch=1, max_context=CONTEXT).job()
    job = replace(job, deployment=replace(job.deployment, buckets=BUCKETS))
    print(compile(job, certify=False).save(path, overwrite=True))


def measure(path: Path, replays: int) -> None:
    """Print a line per bucket."""
    from dsv4c.runtime.bench import Clock, bandwidths, moved_bytes, random_executor

    plan = load(path)
    executor = random_executor(plan)
    _, read = bandwidths()
    print(f"{plan.name}: reads {read / 1e12:.2f} TB/s", flush=True)
    for name, program in plan.buckets.items():
        ends = [len(program.launches)]
        (spent,) = (Clock(executor.programs[name], POSITION, replays).prefixes(ends)[end] for end in ends)
        size = sum(moved_bytes(plan, program, launch, POSITION) for launch in program.launches)
        floor = 1e6 * size / read
        print(
            f"{name:12} {ends[0]:4} launches {spent:8.1f} us, {size / 1e6:9.1f} MB, floor {floor:7.1f} us, "
            f"{spent / floor:.2f} times it",
            flush=True,
        )


def main() -> None:
    """Build or measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--model", default="deepseek-v4-flash")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--target", default="sm_90a")
    parser.add_argument("--replays", type=int, default=31)
    asked = parser.parse_args()
    if asked.build:
        build(asked.plan, asked.model, asked.layers, asked.target)
    else:
        measure(asked.plan, asked.replays)


if __name__ == "__main__":
    main()
