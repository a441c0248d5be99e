"""The main job, start to end: checkpoints in the release's format become plans that give the official logits.

Compiles two tiny recorded models, runs every recorded prompt through the saved and reloaded plans (with the
arena full of NaN before each step), and compares all logits with those of the official implementation. Then
builds, verifies and dumps the full graphs of V4-Flash and V4-Pro. Exits with 1 when out of tolerance.

    python examples/demo.py [-o FOLDER]    (make demo)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the recorded models come with the tests

if TYPE_CHECKING:
    from torch import Tensor

    from dsv4c import Session

CONSOLE = Console(width=None if sys.stdout.isatty() else 120)


@dataclass(frozen=True)
class Check:
    """A recorded model under a recipe, and which logits it must give."""

    case: str
    recipe: str
    what: str
    expected: str  # suffix of the recorded tensors
    per_position: float | None = None  # bound at every position; None: bounds of the case, over all positions


CHECKS = (
    Check("fp32", "fp32", "plain model", "logits", 1e-5),
    Check("official-quant", "fp32", "official weights", "logits_weight_only", 1e-5),
    Check("official-quant", "official", "official numerics", "logits"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile, run, compare; see the top of this file.")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "demo", help="folder to write")
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    good = compare(folder)
    dump(folder)
    CONSOLE.print(f"plans and graphs are in [bold]{folder}[/bold]")
    CONSOLE.print("[green]all within tolerance[/green]" if good else "[red]out of tolerance[/red]")
    return 0 if good else 1


STATISTICS = ("median", "p95", "max", "rms")


def compare(folder: Path) -> bool:
    """Run every check and print a table: distances of logits, each with what is allowed below it."""
    title = "logits against the official implementation: relative L2 by position, rms over all"
    table = Table(title=title, title_justify="left")
    for column in ("what", "run", "tokens", *STATISTICS, "ok", "seconds"):
        table.add_column(column, justify="right" if column in ("tokens", "seconds") else "left")
    good = True
    for check in CHECKS:
        for run, tokens, found, allowed, seconds in results(check, folder):
            fits = all(found[name] <= bound for name, bound in allowed.items())  # NaN does not
            good &= fits
            bounds = [f"\n<= {allowed[name]:.1e}" if name in allowed else "" for name in STATISTICS]
            cells = [f"{found[name]:.1e}{bound}" for name, bound in zip(STATISTICS, bounds, strict=True)]
            table.add_row(check.what, run, tokens, *cells, "yes" if fits else "NO", f"{seconds:.1f}")
    CONSOLE.print(table)
    return good


Figures = dict[str, float]


def results(check: Check, folder: Path) -> Iterator[tuple[str, str, Figures, Figures, float]]:
    """Every recorded run of a case: its name, the tokens compared, figures, what is allowed, and seconds."""
    from safetensors.torch import load_file

    import dsv4c
    from tests.goldens import golden_case

    checkpoint = golden_case(check.case)
    case = json.loads((checkpoint / "case.json").read_text())
    expected = load_file(checkpoint / "expected.safetensors")
    plan = dsv4c.compile(checkpoint, recipe=check.recipe, max_context=512)
    saved = plan.save(folder / f"{check.case}-{check.recipe}.plan", force=True)
    session = dsv4c.load(saved).bind(checkpoint, poison=True)
    for run in case["runs"]:
        name = f"{run['name']}.{check.expected}"
        if name not in expected:
            continue
        probed = name in case.get("packed", {}).get("probe_rows_only", ())
        positions = case["probe_rows"] if probed else range(len(expected[name]))
        started = time.perf_counter()
        rows = logits(session, run["ids"][: positions[-1] + 1], run["prefill"])[list(positions)]
        found = distances(rows.double(), expected[name].double())
        steps = f"{run['prefill']} + {len(run['ids']) - run['prefill']}"
        tokens = f"{len(positions)} of {positions[-1] + 1}" if probed else steps
        yield run["name"], tokens, found, allowed(check, case), time.perf_counter() - started


def distances(rows: Tensor, wanted: Tensor) -> Figures:
    errors = (rows - wanted).norm(dim=1) / wanted.norm(dim=1)
    figures = (errors.median(), errors.quantile(0.95), errors.max(), (rows - wanted).norm() / wanted.norm())
    return {name: float(figure) for name, figure in zip(STATISTICS, figures, strict=True)}


def logits(session: Session, ids: list[int], prefill: int) -> Tensor:
    """Prefill, then one decode step for every token left: a row of logits for each."""
    import torch

    session.reset()
    return torch.cat([session.prefill(ids[:prefill]), *(session.decode([token]) for token in ids[prefill:])])


def allowed(check: Check, case: dict[str, Any]) -> Figures:
    """The bounds the case states for an implementation that rounds where the official one does."""
    if check.per_position is not None:
        return {"max": check.per_position}
    bounds = case["tolerance"]["logits"]["same_rounding_points"]
    return {name: bounds[name] for name in STATISTICS}


def dump(folder: Path) -> None:
    """The full models: built, verified, written out, summed up."""
    from dsv4c.compiler import graph_of, settings
    from dsv4c.ir.text import print_graph
    from dsv4c.view.text import summarize

    table = Table(title="the full models, one decode step, recipe official", title_justify="left")
    for column in ("model", "nodes", "parameters", "weights", "state per sequence", "bytes per token", "s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in ("deepseek-v4-flash", "deepseek-v4-pro"):
        started = time.perf_counter()
        config, deployment, recipe = settings(name)
        graph = graph_of(config, deployment, recipe, "decode")  # verified before and after the recipe
        (folder / f"{name}.graph.txt").write_text(print_graph(graph))
        seconds = time.perf_counter() - started
        summary = summarize(graph, config)
        (folder / f"{name}.summary.txt").write_text(summary.text())
        table.add_row(
            name,
            f"{summary.totals.nodes:,}",
            f"{summary.parameters / 1e9:,.1f} G",
            f"{summary.parameter_bytes / 1e9:,.1f} GB",
            f"{summary.state_bytes / 1e6:,.1f} MB",
            f"{sum(summary.bytes_per_token.values()) / 1e9:,.2f} GB",
            f"{seconds:.1f}",
        )
    CONSOLE.print(table)


if __name__ == "__main__":
    sys.exit(main())
