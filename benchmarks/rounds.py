"""What drafting and judging take on a GPU, beside their bytes: python -m benchmarks.rounds PLAN.

    python -m benchmarks.rounds PLAN --build [--model deepseek-v4-flash] [--layers 8] [--recipe official]

compiles PLAN where there is no GPU: a model's first layers in full width, with DSpark's three stages, steps
that judge 2, 3, 4 and 6 rows, drafts of 3 and 5, and rounds of both. Times are medians of replays of a whole
call from a flushed L2, on random weights; floors are bytes over the bandwidth that the same run reads with,
every row with experts of its own. A call of several rows should take at most 1.05 times its floor and what a
step takes above its own. Calls that judge given drafts also run with fewer of them than they have rows,
as rounds do that end at their confidence. `--launches BUCKET` says what each launch of a bucket adds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dsv4c.buckets import Bucket, Kind
from dsv4c.models.drafting import with_dspark
from dsv4c.plan.folder import load

CONTEXT, POSITION = 8448, 8192
KINDS: tuple[Kind, ...] = ("round", "accept")
BUCKETS = (
    Bucket("decode"),
    *(Bucket("verify", tokens=rows) for rows in (2, 3, 4, 6)),
    *(Bucket("draft", tokens=count) for count in (3, 5)),
    *(Bucket("round", tokens=rows) for rows in (4, 6)),
    *(Bucket(kind, tokens=rows, trusts=True) for kind in KINDS for rows in (4, 6)),
)


def build(path: Path, model: str, layers: int, target: str, recipe: str) -> None:
    """Compile and save the plan."""
    from benchmarks.plans import first_layers
    from dsv4c.compiler.compile import compile
    from dsv4c.compiler.request import Request

    config = with_dspark(first_layers(model, layers))
    job = Request(config, target=target, recipe=recipe, batch=1, max_context=CONTEXT).job()
    job = replace(job, deployment=replace(job.deployment, buckets=BUCKETS))
    print(compile(job, certify=False).save(path, overwrite=True))


def given(bucket: Bucket) -> range:
    """How many tokens its sequence is given: all, or where it takes fewer, any number."""
    return range(1 if bucket.kind == "accept" else bucket.tokens, bucket.tokens + 1)


def measure(path: Path, replays: int, opened: Sequence[str]) -> None:
    """Print a line per bucket, and a line per launch of those that are opened."""
    from dsv4c.runtime.bench import Clock, bandwidths, moved_bytes, random_executor

    plan = load(path)
    executor = random_executor(plan)
    _, read = bandwidths()
    print(f"{plan.name}: reads {read / 1e12:.2f} TB/s", flush=True)
    above = 0.0  # what a step takes above its floor
    for name, rows in [(name, n) for name, p in plan.buckets.items() for n in given(p.shape)]:
        program = replace(plan.buckets[name], bucket=replace(plan.buckets[name].shape, tokens=rows))
        launches = program.launches
        sizes = [moved_bytes(plan, program, launch, POSITION) / 1e6 for launch in launches]
        ends = range(len(launches) + 1) if name in opened else [len(launches)]
        times = Clock(executor, name, POSITION, replays, rows).prefixes(ends)
        spent, size = times[len(launches)], sum(sizes)
        floor = 1e12 * size / read
        above = above or spent - floor
        print(
            f"{name:12} {rows} rows {len(launches):4} launches {spent:8.1f} us, {size:9.1f} MB, "
            f"floor {floor:7.1f} us, "
            f"{spent / floor:.3f} times it, {spent / (floor + above):.3f} times it and what a step adds",
            flush=True,
        )
        for i in range(len(launches) if name in opened else 0):
            own = times[i + 1] - times[i]
            print(
                f"  {launches[i].name:44} {launches[i].kernel.kernel:28} {own:7.1f} us {sizes[i]:8.2f} MB, "
                f"floor {1e12 * sizes[i] / read:6.1f}",
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
    parser.add_argument("--recipe", default="official")
    parser.add_argument("--replays", type=int, default=31)
    parser.add_argument("--launches", action="append", default=[], metavar="BUCKET")
    asked = parser.parse_args()
    if asked.build:
        build(asked.plan, asked.model, asked.layers, asked.target, asked.recipe)
    else:
        measure(asked.plan, asked.replays, asked.launches)


if __name__ == "__main__":
    main()
