"""Seconds, memory and bytes of the compiler itself, beside their limits: python -m benchmarks.compiler.

Every row runs in a process of its own, several times; the least counts. No GPU. Plans for a GPU are compiled
cold, into an empty store of kernels, and warm, from a full one. Limits are for two otherwise idle cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

FLASH, PRO = "deepseek-v4-flash", "deepseek-v4-pro"
CONTEXT = 131_072
HELP_LIMIT = 0.4
PLAN_LIMIT = 40.0  # MB of a GPU plan's folder; weights are not in it

Work = Callable[[], object]

# --- what is measured: each function prepares, and returns what counts ---


def build(name: str, store: Path) -> Work:
    from dsv4c.buckets import Bucket
    from dsv4c.config import Deployment, load_config
    from dsv4c.ir.verify import verify
    from dsv4c.models.deepseek_v4 import build

    return lambda: verify(build(load_config(name), Deployment(max_context=CONTEXT), Bucket("decode")))


def text(name: str, store: Path) -> Work:
    from dsv4c.ir.text import parse_graph, print_graph

    graph = build(name, store)()
    return lambda: print_graph(parse_graph(print_graph(graph)))  # type: ignore[arg-type]


def passes(name: str, store: Path) -> Work:
    from dsv4c.compiler.compile import compile

    return lambda: compile(name, max_context=CONTEXT, certify=False)


def certificates(name: str, store: Path) -> Work:
    from dsv4c.certify.certificates import certify
    from dsv4c.compiler.request import Request

    job = Request(name, max_context=CONTEXT).job()
    fold = job.compiled(job.decode).context.fold
    assert fold is not None
    return lambda: certify(fold.matches, folder=store)


def page(name: str, store: Path) -> Work:
    from dsv4c.compiler.request import Request
    from dsv4c.view.html import html

    job = Request(name, max_context=CONTEXT).job()
    named = job.compiled(job.decode).named
    return lambda: html(named)


def kernels(name: str, store: Path) -> Work:
    from dsv4c.compiler.compile import compile

    return lambda: compile(name, target="sm_90a", max_context=CONTEXT, cache=store)


@dataclass(frozen=True)
class Row:
    """One line of the table. `store`: the folder it keeps things in is empty before each time, or full."""

    title: str
    prepare: Callable[[str, Path], Work]
    model: str
    limit: float
    store: str = "full"
    megabytes: float | None = None  # limit of the peak


ROWS = (
    Row("build, verify: Flash", build, FLASH, 3, megabytes=600),
    Row("build, verify: Pro", build, PRO, 5, megabytes=600),
    Row("print, parse, print: Flash", text, FLASH, 2.5),
    Row("print, parse, print: Pro", text, PRO, 2.5),
    Row("CPU plan, all passes: Flash", passes, FLASH, 8),
    Row("CPU plan, all passes: Pro", passes, PRO, 12),
    Row("certificates, cold: Flash", certificates, FLASH, 90, "empty"),
    Row("certificates, warm: Flash", certificates, FLASH, 1),
    Row("HTML of all stages: Pro", page, PRO, 5),
    Row("sm_90a plan, cold: Flash", kernels, FLASH, 45, "empty"),
    Row("sm_90a plan, warm: Flash", kernels, FLASH, 3),
)

# --- measuring ---


def run_here(number: int, store: Path) -> None:
    """Row `number` in this process: prints [seconds, peak bytes, bytes of the plan if it is one]."""
    from dsv4c.plan.folder import Plan

    work = ROWS[number].prepare(ROWS[number].model, store)
    start = time.perf_counter()
    made = work()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    folder = made.save(store / "plan", overwrite=True) if isinstance(made, Plan) else None
    files = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder else 0
    print(json.dumps([seconds, peak, files]))


def run_apart(*arguments: str) -> tuple[float, str]:
    """Seconds and output of a Python command. Exits with its message if it fails."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - start, done.stdout


def measured(number: int, folder: Path, times: int) -> tuple[float, int, int]:
    """Least seconds and most bytes of row `number`, and of its plan's folder."""
    row, found = ROWS[number], []
    for i in range(times):
        store = folder / (f"{number}-{i}" if row.store == "empty" else row.prepare.__name__)
        command = ("benchmarks.compiler", "--row", str(number), "--store", str(store))
        if row.store == "full" and i == 0:
            run_apart(*command)  # fills the store, and the file cache
        found.append(json.loads(run_apart(*command)[1]))
    seconds, peaks, files = zip(*found, strict=True)
    return min(seconds), max(peaks), max(files)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table. Exit code 1 if a figure is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.row is not None:
        run_here(options.row, options.store)
        return
    table = Table("", "seconds", "limit", "peak MB", "limit")
    least = min(run_apart("dsv4c", "--help")[0] for _ in range(options.times))
    table.add_row("dsv4c --help", f"{least:.2f}", f"{HELP_LIMIT}")
    over, plan = least > HELP_LIMIT, 0
    with tempfile.TemporaryDirectory() as folder:
        for number, row in enumerate(ROWS):
            seconds, peak, files = measured(number, Path(folder), options.times)
            over |= seconds > row.limit or (row.megabytes is not None and peak > 1e6 * row.megabytes)
            most = "" if row.megabytes is None else f"{row.megabytes:g}"
            table.add_row(row.title, f"{seconds:.2f}", f"{row.limit:g}", f"{peak / 1e6:.0f}", most)
            plan = files if row.prepare is kernels else plan
    Console().print(table)
    print(f"folder of the sm_90a plan: {plan / 1e6:.1f} MB, limit {PLAN_LIMIT:g}")
    over |= plan > 1e6 * PLAN_LIMIT
    sys.exit(over)


if __name__ == "__main__":
    main()
