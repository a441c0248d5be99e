"""Seconds from a plan's folder to a CUDA graph that could run: python -m benchmarks.load PLAN...

Reading the plan (every file is checked), then blocks for state and arena, kernels loaded, graph instantiated.
The weights are left out, so that a plan larger than the device's memory can be measured: nothing is launched.
Every plan in a process of its own, with a context made before the clock starts. Least of some repetitions,
and the first, which finds cold caches. On the GPU; needs no compiler.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 2.0


def once(folder: Path) -> str:
    """One plan in this process."""
    import torch

    from dsv4c.plan.folder import load
    from dsv4c.runtime.cuda import CudaExecutor

    one = torch.zeros(1, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    plan = load(folder)
    read = time.perf_counter()
    executor = CudaExecutor(plan, one.expand(plan.blocks["weights"]))  # one byte that says it is all of them
    torch.cuda.synchronize()
    ready = time.perf_counter()
    kernels = len(plan.kernels)
    launches = sum(len(bound.launches) for bound in executor.programs.values())
    return f"{ready - start:.3f} {read - start:.3f} {ready - read:.3f} {kernels} {launches} {plan.name}"


def main() -> int:
    """Measure, print a line for each plan; status 1 where one takes longer than the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plans", nargs="+", type=Path)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--once", action="store_true", help="here, without a process of its own")
    options = parser.parse_args()
    if options.once:
        print(once(options.plans[0]))
        return 0
    late = False
    for folder in options.plans:
        command = [sys.executable, "-m", "benchmarks.load", str(folder), "--once"]
        rows = [
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
            for _ in range(options.times)
        ]
        total, read, made, kernels, launches, name = min(rows)
        late |= float(max(rows)[0]) > LIMIT
        print(
            f"{name}: {kernels} kernels, {launches} launches: {total} s, of these plan {read}, kernels and "
            f"graph {made} (first time {rows[0][0]}, limit {LIMIT})"
        )
    return int(late)


if __name__ == "__main__":
    sys.exit(main())
