"""The main job, start to end: checkpoints in the release's format become plans that give the official logits.

Builds, verifies and dumps the full graphs of V4-Flash and V4-Pro; compiles two tiny recorded models; runs
every recorded prompt through the saved and reloaded plans (with the arena full of NaN before each step), and
compares all logits with those of the official implementation. Exits with 1 when out of tolerance.

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

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the recorded models come with the tests

if TYPE_CHECKING:
    from torch import Tensor

    from dsv4c import Plan, Session

CONSOLE = Console(highlight=False)


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
    parser = argparse.ArgumentParser(description="Build, compile, run, compare; see the top of this file.")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "demo", help="folder to write")
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    title("1  A config becomes a typed graph", "one decode step of the full models, recipe official")
    dump(folder)
    title(
        "2  A checkpoint's graph becomes a plan", "tiny recorded models in the release's format, for the CPU"
    )
    plans = {check: plan(check, folder) for check in CHECKS}
    title("3  The plan computes DeepSeek-V4", "logits against the official implementation's own, relative L2")
    good = compare(plans)
    seconds = time.perf_counter() - started
    verdict = "[green]all within tolerance[/]" if good else "[red]out of tolerance[/]"
    CONSOLE.print(
        f"\n{verdict} after {seconds:.0f} s; plans and graphs are in [bold]{folder}[/]", soft_wrap=True
    )
    return 0 if good else 1


def title(text: str, what: str) -> None:
    CONSOLE.print(f"\n[bold]{text}[/]: {what}", soft_wrap=True)


def row(widths: tuple[int, ...], *cells: object, style: str = "") -> None:
    """A line of a table whose rows appear as they are known: the first two cells left, the others right."""
    aligned = [
        f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True))
    ]
    CONSOLE.print("   " + "  ".join(aligned).rstrip(), style=style, soft_wrap=True)


# --- 1 ---

FULL = (17, 20, 6, 10, 8, 14, 11, 3)


def dump(folder: Path) -> None:
    """The full models: built, verified, written out, summed up."""
    from dsv4c.compiler.request import Request
    from dsv4c.ir.text import print_graph
    from dsv4c.view.text import summarize

    heads = ("model", "layers", "ops", "parameters", "weights", "state/sequence", "bytes/token", "s")
    row(FULL, *heads, style="dim")
    for name in ("deepseek-v4-flash", "deepseek-v4-pro"):
        started = time.perf_counter()
        job = Request(name).job()
        config = job.config
        graph = job.compiled(job.decode, stop_after="quantize").graph  # verified before and after
        (folder / f"{name}.graph.txt").write_text(print_graph(graph))
        seconds = time.perf_counter() - started
        summary = summarize(graph, config)
        (folder / f"{name}.summary.txt").write_text(summary.text())
        row(
            FULL,
            name,
            kinds(config.compress_ratios),
            f"{summary.totals.nodes:,}",
            f"{summary.parameters / 1e9:,.1f} G",
            f"{summary.parameter_bytes / 1e9:,.1f} GB",
            f"{summary.state_bytes / 1e6:,.1f} MB",
            f"{sum(summary.bytes_per_token.values()) / 1e9:,.2f} GB",
            f"{seconds:.1f}",
        )


def kinds(ratios: tuple[int, ...]) -> str:
    """How many layers attend in which way."""
    return " ".join(f"{ratios.count(ratio)} {kind}" for ratio, kind in ((0, "SWA"), (4, "CSA"), (128, "HCA")))


# --- 2 ---

PLANS = (17, 20, 6, 10, 8, 14, 11, 3)


def plan(check: Check, folder: Path) -> Plan:
    """Compile a recorded checkpoint, save the plan and read it back."""
    import dsv4c
    from tests.goldens import golden_case

    if check is CHECKS[0]:
        heads = ("model", "layers", "ops", "launches", "weights", "state", "arena", "s")
        row(PLANS, *heads, style="dim")
    checkpoint = golden_case(check.case)
    started = time.perf_counter()
    with CONSOLE.status(f"compiling {check.what}"):
        made = dsv4c.compile(checkpoint, recipe=check.recipe, max_context=512)
        saved = made.save(folder / f"{check.case}-{check.recipe}.plan", overwrite=True)
    seconds = time.perf_counter() - started
    decode = made.program()
    row(
        PLANS,
        check.what,
        kinds(tuple(made.config["compress_ratios"])),
        f"{made.report['buckets'][decode.shape.name]['nodes']:,}",
        f"{len(decode.launches):,}",
        f"{made.blocks['weights'] / 1e6:.1f} MB",
        f"{made.blocks['state'] / 1e6:.1f} MB",
        f"{decode.arena_bytes / 1e3:.1f} kB",
        f"{seconds:.1f}",
    )
    return dsv4c.load(saved)


# --- 3 ---

STATISTICS = ("median", "p95", "max", "rms")
RUNS = (17, 9, *[9] * len(STATISTICS), 10, 5)
Figures = dict[str, float]


def compare(plans: dict[Check, Plan]) -> bool:
    """Run every check, a row for each as it ends: distances of logits, and what is allowed."""
    row(RUNS, "model", "tokens", *STATISTICS, "of allowed", "s", style="dim")
    good = True
    for check, compiled in plans.items():
        for tokens, found, limits, seconds in results(check, compiled):
            fits = all(found[name] <= bound for name, bound in limits.items())  # NaN does not
            good &= fits
            used = max(found[name] / bound for name, bound in limits.items())
            cells = [*(f"{found[name]:.1e}" for name in STATISTICS), f"{used:.0%}", f"{seconds:.1f}"]
            row(RUNS, check.what, tokens, *cells, style="" if fits else "red")
    remark = "tokens: prefill + decode steps, the arena full of NaN before each; figures are over positions"
    CONSOLE.print(f"   {remark}", style="dim", soft_wrap=True)
    return good


def results(check: Check, compiled: Plan) -> Iterator[tuple[str, Figures, Figures, float]]:
    """Every recorded run of a case: the tokens compared, figures, what is allowed, and seconds."""
    from safetensors.torch import load_file

    from tests.goldens import golden_case

    checkpoint = golden_case(check.case)
    case = json.loads((checkpoint / "case.json").read_text())
    expected = load_file(checkpoint / "expected.safetensors")
    session = compiled.bind(checkpoint, poison=True)
    for run in case["runs"]:
        name = f"{run['name']}.{check.expected}"
        if name not in expected:
            continue
        probed = name in case.get("packed", {}).get("probe_rows_only", ())
        positions = list(case["probe_rows"] if probed else range(len(expected[name])))
        started = time.perf_counter()
        rows = logits(session, run["ids"][: positions[-1] + 1], run["prefill"], check.what)[positions]
        found = distances(rows.double(), expected[name].double())
        steps = f"{run['prefill']} + {positions[-1] + 1 - run['prefill']}"
        yield steps, found, allowed(check, case), time.perf_counter() - started


def distances(rows: Tensor, wanted: Tensor) -> Figures:
    errors = (rows - wanted).norm(dim=1) / wanted.norm(dim=1)
    figures = (errors.median(), errors.quantile(0.95), errors.max(), (rows - wanted).norm() / wanted.norm())
    return {name: float(figure) for name, figure in zip(STATISTICS, figures, strict=True)}


def logits(session: Session, ids: list[int], prefill: int, what: str) -> Tensor:
    """Prefill, then one decode step for every token left: a row of logits for each."""
    import torch

    session.reset()
    with CONSOLE.status(f"{what}: prefill of {prefill} tokens") as status:
        rows = [session.prefill(ids[:prefill])]
        for done, token in enumerate(ids[prefill:], start=prefill):
            status.update(f"{what}: token {done} of {len(ids)}")
            rows.append(session.decode([token]))
    return torch.cat(rows)


def allowed(check: Check, case: dict[str, Any]) -> Figures:
    """The bounds the case states for an implementation that rounds where the official one does."""
    if check.per_position is not None:
        return {"max": check.per_position}
    bounds = case["tolerance"]["logits"]["same_rounding_points"]
    return {name: bounds[name] for name in STATISTICS}


if __name__ == "__main__":
    sys.exit(main())
