"""Run a compiled plan on a GPU and check it from end to end: python -m tests.gpu.run_plan PLAN CASE.

Recorded runs (prompt token by token, then every forced step) against their `any` bounds; equal bits in two
replays and with a poisoned arena; a thousand steps without an allocation, a wait or anything on the stream
but graph launches.
Needs torch and cuda-bindings, no compiler. Prints a table; --json FILE keeps the numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from dsv4c.errors import Dsv4cError
from dsv4c.plan.folder import Plan, load
from dsv4c.runtime import driver
from dsv4c.runtime.cuda import BoundProgram, CudaExecutor
from dsv4c.runtime.session import Session
from tests.goldens import Recorded, Run, recorded
from tests.gpu.plain import PlainGraph

# Of logits with exact weights and nothing rounded: one and a half times what the CPU's plan in bf16 leaves.
ROUNDED = {"median": 0.0085, "p95": 0.012, "rms": 0.0096, "max": 0.057}
WAITS = ("Synchronize", "Sync", "Malloc", "Free", "MemAlloc", "EventQuery")
ALLOCATIONS = ("allocation.all.allocated", "segment.all.allocated", "num_device_alloc")


class Table:
    """Lines of name, value, bound and verdict."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, value: float, bound: float | None = None) -> None:
        """A number, which must be at most `bound` if there is one."""
        self.rows.append(
            {"name": name, "value": value, "bound": bound, "ok": bound is None or value <= bound}
        )
        print(self._line(self.rows[-1]), flush=True)

    @property
    def failures(self) -> list[str]:
        return [self._line(row) for row in self.rows if not row["ok"]]

    @staticmethod
    def _line(row: Mapping[str, Any]) -> str:
        bound = "" if row["bound"] is None else f"<= {row['bound']:<10.4g}"
        return f"{row['name']:58} {row['value']:12.5g} {bound:14} {'' if row['ok'] else 'FAILS'}"


# --- recorded runs ---


def step_of(session: Session) -> BoundProgram:
    """The smallest decode step."""
    assert isinstance(session.executor, CudaExecutor)
    return session.executor.programs[session.plan.program().shape.name]


def alone(session: Session) -> BoundProgram:
    """The smallest decode step, its inputs such that slot 0 moves on and no other."""
    step = step_of(session)
    idle = step.program.shape.sequences - 1
    rows = {"tokens": [17] + [0] * idle, "lengths": [1] + [0] * idle, "slots": [0] + [-1] * idle}
    step.take({name: torch.tensor(values, dtype=torch.int32) for name, values in rows.items()})
    return step


def run_logits(session: Session, run: Run) -> Tensor:
    """Logits of a whole run from a fresh state, on the host."""
    session.reset()
    rows = [session.prefill(run.ids[: run.prefill])]
    rows += [session.decode({0: token})[:1] for token in run.ids[run.prefill :]]
    session.wait()
    return torch.cat(rows).cpu()


def run_together(session: Session, runs: Sequence[Run]) -> list[Tensor]:
    """Logits of several runs, a slot each: prompts one after the other, then all decode together until
    each has ended.
    """
    session.reset()
    rows = [[session.prefill(run.ids[: run.prefill], slot=s)] for s, run in enumerate(runs)]
    for step in range(max(len(run.ids) - run.prefill for run in runs)):
        places = [run.prefill + step for run in runs]
        pairs = enumerate(zip(runs, places, strict=True))
        given = {s: run.ids[p] for s, (run, p) in pairs if p < len(run.ids)}
        logits = session.decode(given)
        for s in given:
            rows[s].append(logits[s : s + 1].clone())
    session.wait()
    return [torch.cat(own).cpu() for own in rows]


def check_runs(session: Session, case: Recorded, table: Table, which: str) -> None:
    """Every recorded run that fits the context, within the bound for any rounding points: one after the
    other, and in a batch also side by side at their different positions.
    """
    names = [described["name"] for described in case.description["runs"]]
    names = [name for name in names if f"{name}.{which}" in case.tensors]
    runs = [run for run in map(case.run, names) if len(run.ids) <= session.max_context]
    for run in runs:
        _check_logits(case, f"{run.name}.{which}", run_logits(session, run), table, "")
    for start in range(0, len(runs) if session.slots > 1 else 0, session.slots):
        some = runs[start : start + session.slots]
        for run, logits in zip(some, run_together(session, some), strict=True):
            _check_logits(case, f"{run.name}.{which}", logits, table, f" side by side ({len(some)})")


def _check_logits(case: Recorded, name: str, logits: Tensor, table: Table, how: str) -> None:
    run, which = name.split(".")
    bounds = ROUNDED if which == "logits_weight_only" else case.tolerance[which]["any"]
    rows = case.distances(name, logits)
    found = {
        "median": rows.median(),
        "p95": rows.quantile(0.95),
        "rms": case.distance(name, logits),
        "max": rows.max(),
    }
    for key, value in found.items():
        bound = bounds[key] if run == "main" else bounds["max"]
        table.add(f"{name} {key}{how}", float(torch.as_tensor(value)), bound)


# --- the same bits ---


def check_replays(session: Session, case: Recorded, table: Table) -> None:
    """Two replays from one state, and a prompt through a poisoned arena, leave the same bits."""
    ids = case.run().ids
    half = min(len(ids) // 2, session.max_context - 8)
    session.reset()
    session.prefill(ids[:half])
    left = []
    with tempfile.TemporaryDirectory() as folder:
        state = session.save_state(Path(folder) / "state")
        for _ in range(2):
            session.load_state(state)
            logits = [session.decode({0: token})[0] for token in ids[half : half + 4]]
            left.append(torch.stack([*logits]).view(torch.int32).clone())
            left.append(session.executor.blocks["state"].clone())
    table.add("changed words of logits in a second replay", int((left[0] != left[2]).sum()), 0)
    table.add("changed bytes of state in a second replay", int((left[1] != left[3]).sum()), 0)
    plain = run_logits(session, Run("", tuple(ids[:half]), half))
    session.executor.poison = True
    poisoned = run_logits(session, Run("", tuple(ids[:half]), half))
    session.executor.poison = False
    wrong = int((plain.view(torch.int32) != poisoned.view(torch.int32)).sum())
    table.add("changed words of logits with a poisoned arena", wrong, 0)


def check_greedy(session: Session, case: Recorded, table: Table) -> None:
    """Tokens fed back on the device are those that the host would have chosen from the logits."""
    ids = case.run().ids[:16]
    count = min(40, session.max_context - len(ids))
    session.reset()
    session.prefill(ids)
    enqueued = session.steps(count, [0]).cpu()[:, 0].tolist()
    session.reset()
    logits, chosen = session.prefill(ids)[-1], []
    for _ in range(count):
        token = int(logits.argmax())
        logits = session.decode({0: token})[0]
        chosen.append(int(logits.argmax()))
    wrong = sum(a != b for a, b in zip(enqueued, chosen, strict=True))
    table.add(f"tokens of {count} that differ when fed back on the device", wrong, 0)


# --- nothing else ---


def check_quiet(session: Session, case: Recorded, table: Table, steps: int) -> None:
    """Steps enqueued ahead: what was allocated, what ran on the device, and what the host waited for."""
    launches, ids = len(step_of(session).launches), case.run().ids[:4]
    chunk = min(steps, session.max_context - len(ids))
    allocated = done = 0
    while done < steps:
        count = min(chunk, steps - done)
        session.reset()
        session.prefill(ids)
        step = alone(session)
        session.wait()
        before, free = torch.cuda.memory_stats(), torch.cuda.mem_get_info()[0]
        torch.cuda.set_sync_debug_mode("error")
        _steps_only(step, count)
        torch.cuda.set_sync_debug_mode("default")
        session.wait()
        after = torch.cuda.memory_stats()
        allocated += sum(after.get(key, 0) - before.get(key, 0) for key in ALLOCATIONS)
        allocated += int(torch.cuda.mem_get_info()[0] != free)
        done += count
    table.add(f"allocations in {done} steps", allocated, 0)
    kinds: Counter[str] = Counter()
    graphs: Counter[int] = Counter()
    names: Counter[str] = Counter()
    done = 0
    while done < steps:
        count = min(chunk, steps - done)
        session.reset()
        session.prefill(ids)
        step = alone(session)
        session.wait()
        for event in _traced(lambda count=count, step=step: _steps_only(step, count)):
            kinds[event["cat"]] += 1
            if event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset"):
                graphs[event["args"]["correlation"] + (done << 32)] += 1
                names[event["name"]] += 1
            elif event["cat"] in ("cuda_runtime", "cuda_driver", "cuda_sync"):
                names[event["name"]] += 1
        done += count
    print("trace:", dict(kinds), dict(names))
    table.add(f"graph launches beside one per step, {done} steps", abs(len(graphs) - done), 0)
    table.add(
        "launches that do not run exactly the plan's kernels", sum(n != launches for n in graphs.values()), 0
    )
    table.add("copies and fills on the device", kinds["gpu_memcpy"] + kinds["gpu_memset"], 0)
    seen = {name: n for name, n in names.items() if any(w in name for w in WAITS)}
    traces = -(-steps // chunk)
    ends = {"Context Sync": traces, "cudaDeviceSynchronize": traces}  # the profiler's own, two per trace
    others = sum(abs(seen.get(name, 0) - ends.get(name, 0)) for name in seen.keys() | ends.keys())
    table.add("waits and allocations seen, beside the two that end a trace", others, 0)


def _traced(work: Callable[[], None]) -> list[dict[str, Any]]:
    """The profiler's events around `work`, those of the device and of the CUDA calls."""
    detailed = _ExperimentalConfig(enable_cuda_sync_events=True)
    both = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=both, experimental_config=detailed) as trace:
            work()
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [
        e for e in events if e.get("cat", "").startswith(("kernel", "gpu_mem", "cuda_")) and e["ph"] == "X"
    ]


def _steps_only(step: BoundProgram, count: int) -> None:
    """The steps of `enqueue`, without what goes before and after them."""
    for _ in range(count):
        step.call()


def step_microseconds(session: Session, ids: tuple[int, ...], steps: int = 100) -> float:
    """Device time of a step in a row of steps, median of five rows."""
    times = []
    for _ in range(5):
        session.reset()
        session.prefill(ids[:4])
        count = min(steps, session.max_context - 4)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        session.enqueue(count, [0])
        stop.record()
        session.wait()
        times.append(1e3 * start.elapsed_time(stop) / count)
    return statistics.median(times)


# --- for tools that watch ---


def smoke(session: Session, ids: Sequence[int]) -> int:
    """A few steps: the first ones, ends of windows, more entries than are chosen."""
    session.prefill(ids[:2])
    step = alone(session)
    at = step.value("position")
    assert isinstance(at, Tensor)
    for position in (3, 63, 127):
        at.fill_(position)
        step.call()
        session.wait()
    print(f"{len(step.launches)} launches, 3 steps after a prompt of 2")
    return 0


# --- faults ---


def fault(plan: Plan, weights: Path, poison: bool) -> int:
    """Break one launch's first pointer; the error must name the launch, or without `poison` the plan and how
    to learn the launch. Runs in a process of its own.
    """
    session = plan.bind(weights, poison=poison)
    step = step_of(session)
    victim = len(step.launches) // 2
    broken = step._bound[victim]
    step._bound[victim] = replace(broken, arguments=(0x10, *broken.arguments[1:]))
    if not poison:
        step.graph = step.graph_of(range(len(step.launches)))
    wanted = step.launches[victim].name if poison else f"a step of plan {plan.name} failed: "
    try:
        session.decode(dict.fromkeys(range(step.program.shape.sequences), 0))
        session.wait()
    except Dsv4cError as error:
        print(f"named: {error}")
        return int(wanted not in str(error))
    print("no error was raised")
    return 1


def main() -> int:
    """Load, run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("case")
    parser.add_argument("--logits", default="logits", help="recorded logits of the plan's recipe")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--fault", choices=["launch", "step"], help="break a pointer, want this named")
    parser.add_argument("--smoke", action="store_true", help="a few steps, for compute-sanitizer")
    parser.add_argument("--plain", action="store_true", help="kernels launched one by one, without a graph")
    parser.add_argument("--quick", action="store_true", help="neither trace nor times: others use the GPU")
    options = parser.parse_args()
    started = time.perf_counter()
    plan, case = load(options.plan), recorded(options.case)
    if options.plain:
        driver.Graph = PlainGraph  # type: ignore[assignment, misc]
    if options.fault:
        return fault(plan, case.folder, poison=options.fault == "launch")
    torch.cuda.init()
    loaded = time.perf_counter()
    session = plan.bind(case.folder)
    session.wait()
    bound = time.perf_counter()
    print(
        f"{torch.cuda.get_device_name()}: {plan.name}, {len(step_of(session).launches)} launches, "
        f"{len(plan.kernels)} kernels, {sum(plan.blocks.values()) / 2**20:.1f} MiB; plan read in "
        f"{loaded - started:.2f} s, bound in {bound - loaded:.2f} s"
    )
    table = Table()
    if options.smoke:
        return smoke(session, case.run().ids)
    check_runs(session, case, table, options.logits)
    check_replays(session, case, table)
    check_greedy(session, case, table)
    if not (options.quick or options.plain):
        table.add("microseconds per step", step_microseconds(session, case.run().ids))
        check_quiet(session, case, table, options.steps)
    if options.json:
        options.json.write_text(json.dumps(table.rows, indent=1))
    print("\n".join(table.failures) or "all checks pass")
    return bool(table.failures)


if __name__ == "__main__":
    sys.exit(main())
