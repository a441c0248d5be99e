"""All checks on a GPU: python -m tests.gpu FOLDER --out RESULTS, where `tests.gpu.build` made FOLDER.

Every check runs in a process of its own with a time limit and a log in RESULTS: first side by side, as memory
allows, then alone what measures. A table of verdicts comes last (also RESULTS/summary.txt); status 1 if any
check failed. `--sanitize` runs compute-sanitizer's tools on a recorded plan instead. Needs no compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from tests.goldens import golden_case

REPOSITORY = Path(__file__).parents[2]
FOUND = 9  # compute-sanitizer's status when it found something
BOUNDS = {"fp32": 0.0, "nvfp4": 0.3, "bf16": 0.05, "official": 0.25, "nvfp4-experts": 0.25}
"""How far a row of logits of chunks may be from those of tokens one by one, by recipe: rows of many products
round elsewhere, and every flipped code of e4m3 or e2m1 is a step of 2^-4 or 2^-2.
"""
CONTEXT = 2.0  # GiB that a process takes beside its tensors


@dataclass(frozen=True)
class Job:
    """One check. `alone`: nothing else may use the GPU meanwhile. `status`: what it must end with."""

    name: str
    command: tuple[str, ...]
    gibibytes: float = 2.0
    seconds: float = 240.0
    alone: bool = False
    status: int = 0


@dataclass
class Running:
    """A check under way."""

    job: Job
    process: subprocess.Popen[bytes]
    log: TextIO
    began: float


@dataclass(frozen=True)
class Verdict:
    """How a check ended."""

    name: str
    status: str
    seconds: float
    last: str

    def __str__(self) -> str:
        return f"{self.name:34} {self.status:9} {self.seconds:6.1f} s  {self.last[:90]}"


def module(name: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *map(str, arguments))


def jobs(folder: Path, out: Path) -> Iterator[Job]:
    """Every check of what `folder` holds, long ones first."""
    plans = json.loads((folder / "plans.json").read_text())
    recorded = [plan for plan in plans if plan["use"] == "recorded"]
    for plan in plans:
        if plan["use"] in ("layers", "recorded"):
            yield layers_job(folder, plan)
        if plan["use"] in ("slots", "chunks"):
            random = plan["weights"] == "random"
            weights = () if random else ("--weights", golden_case(plan["model"]))
            command = module(f"tests.gpu.check_{plan['use']}", folder / plan["name"], *weights)
            if plan["use"] == "chunks":
                yield Job(f"again {plan['name']}", (*command, "--again", "24"), plan["gibibytes"] + CONTEXT)
                yield Job(f"quiet {plan['name']}", (*command, "--quiet", "1000"), alone=True)
                command += ("--bound", str(BOUNDS[plan["recipe"]]))
            yield Job(f"{plan['use']} {plan['name']}", command, plan["gibibytes"] + CONTEXT)
    for name, only in (
        ("attention", "swa,csa,hca,tiny,chunk"),
        ("state", "state"),
        ("index", "index,choice,top"),
    ):
        cases = ("--folder", folder / "attention", "--only", only, "--no-time")
        yield Job(f"kernels {name}", module("tests.gpu.check_attention", *cases))
    for name, kernels in (("gemv", "gemv"), ("gemm", "gemm"), ("experts", "gemv"), ("hyper", "hyper")):
        command = module(f"tests.gpu.check_{name}", "--folder", folder / kernels, "--no-time")
        yield Job(f"kernels {name}", command, gibibytes=6.0)
    yield Job("kernels rows", module("tests.gpu.check_rows", "--folder", folder / "rows"), 4.0)
    for plan in json.loads((folder / "rows" / "plans.json").read_text()):
        command = module("tests.gpu.check_rows", plan["name"], "--folder", folder / "rows")
        yield Job(f"rows {plan['name']}", command, CONTEXT)
    yield Job("kernels recorded", module("tests.gpu.check_recorded", "--folder", folder / "gemv"))
    yield Job("rounds", module("tests.gpu.check_rounds", folder / "rounds"))
    for plan in recorded:
        path, case, small = folder / plan["name"], plan["model"], plan["gibibytes"] + CONTEXT
        command = module("tests.gpu.run_plan", path, case, "--quick", "--logits", plan["logits"])
        yield Job(f"runs {plan['name']}", command, small)
        if plan["batch"] > 1:
            continue
        yield Job(f"tampered {plan['name']}", module("tests.gpu.tampered", path), 1.0)
        yield Job(f"bisect {plan['name']}", module("tests.gpu.check_bisect", path, case), small)
        yield Job(f"sublayers {plan['name']}", module("tests.gpu.check_sublayers", path, case), small)
        for named in ("launch", "step"):
            command = module("tests.gpu.run_plan", path, case, "--fault", named)
            yield Job(f"fault {named} {plan['name']}", command, small)
    for plan in recorded:
        if plan["batch"] == 1:
            case = (folder / plan["name"], plan["model"])
            command = module("tests.gpu.run_plan", *case, "--json", out / f"{plan['name']}.json")
            yield Job(f"trace {plan['name']}", command, alone=True)
    timed, loaded = ([folder / p["name"] for p in plans if p["use"] == use] for use in ("times", "loaded"))
    alone = ("--folder", folder / "gemv", "--timed")
    times = {name: module(f"tests.gpu.check_{name}", *alone) for name in ("gemv", "experts")}
    times["gemm"] = module("tests.gpu.check_gemm", "--folder", folder / "gemm")
    times["rows"] = module("tests.gpu.check_rows", "--folder", folder / "rows", "--time")
    times |= {plan.name: module("dsv4c", "bench", plan, "--random-weights") for plan in timed}
    if loaded:
        times["load"] = module("benchmarks.load", *loaded)
    for name, command in times.items():
        yield Job(f"times {name}", command, alone=True)


def layers_job(folder: Path, plan: Mapping[str, Any]) -> Job:
    """Launch by launch; the reference holds every weight a second time."""
    command = ["tests.gpu.check_layers", folder / plan["name"], *(f"--at={at}" for at in plan["at"])]
    command += ["--every", plan["every"]]
    if plan["weights"] != "random":
        command += ["--weights", plan["weights"]]
    return Job(f"layers {plan['name']}", module(*command), 3.1 * plan["gibibytes"] + 2 * CONTEXT, 560.0)


def sanitizer_jobs(folder: Path, sanitizer: str) -> Iterator[Job]:
    """Few steps of a recorded plan, without torch's own kernels. For tools that keep track of every access
    its kernels run one by one, without a graph: memory for tracking is held until a launch is waited for.
    """
    plans = json.loads((folder / "plans.json").read_text())
    plan = next(p for p in plans if p["use"] == "recorded" and p["batch"] == 1)
    own = ("--kernel-name-exclude", "kns=native", "--error-exitcode", str(FOUND))
    quiet = ("--report-api-errors", "no")  # bindings ask for entry points that the driver may not have
    memcheck = (sanitizer, "--tool", "memcheck", "--print-limit", "4", *quiet, *own)
    run = module("tests.gpu.run_plan", folder / plan["name"], plan["model"])
    smoke = (*run, "--smoke")
    yield Job("memcheck", (*memcheck, *smoke), 16.0, 300.0)
    yield Job("memcheck of a fault", (*memcheck, *run, "--fault", "launch"), 16.0, 300.0, status=FOUND)
    chunks = next(p for p in plans if p["use"] == "chunks" and p["recipe"] == "official")
    options = ("--weights", golden_case(chunks["model"]), "--smoke")
    chunk = module("tests.gpu.check_chunks", folder / chunks["name"], *options)
    yield Job("memcheck of chunks", (*memcheck, *chunk), 16.0, 300.0)
    yield Job(
        "racecheck of chunks",
        (sanitizer, "--tool", "racecheck", "--force-blocking-launches", *own, *chunk, "--plain"),
        32.0,
        500.0,
    )
    for tool in ("racecheck", "synccheck"):
        command = (sanitizer, "--tool", tool, "--force-blocking-launches", *own, *smoke, "--plain")
        yield Job(tool, command, 32.0, 500.0)


def run(job: Job, out: Path, threads: int) -> Running:
    """Start it."""
    log = (out / f"{job.name.replace(' ', '-')}.txt").open("w")
    log.write(f"$ {' '.join(job.command[1:] if job.command[0] == sys.executable else job.command)}\n")
    log.flush()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        job.command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT
    )
    return Running(job, process, log, time.monotonic())


def ended(running: Running, deadline: float) -> Verdict | None:
    """What came of it, or None while it runs. Past its time it is killed."""
    seconds = time.monotonic() - running.began
    status = running.process.poll()
    late = seconds > running.job.seconds or time.monotonic() > deadline
    if status is None and not late:
        return None
    if status is None:
        running.process.kill()
        running.process.wait()
    running.log.close()
    lines = [line for line in Path(running.log.name).read_text(errors="replace").splitlines() if line.strip()]
    word = "too slow" if status is None else "ok" if status == running.job.status else f"FAILS {status}"
    return Verdict(running.job.name, word, seconds, lines[-1].strip())


def together(wanted: Sequence[Job], out: Path, limit: float, gibibytes: float, at_once: int) -> list[Verdict]:
    """Run jobs side by side, as many as fit; those marked `alone` one by one after the others."""
    deadline = time.monotonic() + limit
    waiting = sorted(wanted, key=lambda job: job.alone)
    under_way: list[Running] = []
    verdicts: list[Verdict] = []
    while waiting or under_way:
        used = sum(r.job.gibibytes for r in under_way)
        for job in list(waiting):
            fits = used + job.gibibytes <= gibibytes and len(under_way) < at_once
            if under_way and (job.alone or any(r.job.alone for r in under_way) or not fits):
                continue
            if job.alone and any(not other.alone for other in waiting):
                continue
            waiting.remove(job)
            if time.monotonic() > deadline:
                verdicts.append(Verdict(job.name, "not run", 0.0, "no time left"))
                continue
            under_way.append(run(job, out, max(1, (os.cpu_count() or 1) // (1 if job.alone else at_once))))
            used += job.gibibytes
        time.sleep(0.05)
        for running in list(under_way):
            verdict = ended(running, deadline)
            if verdict is not None:
                under_way.remove(running)
                verdicts.append(verdict)
                print(verdict, flush=True)
    return verdicts


def device() -> str:
    """Name, driver and memory of the GPU, as nvidia-smi says."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return "no nvidia-smi"
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def main() -> int:
    """Run what is asked for, print the table, keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="checks whose names contain one of these words, a,b,...")
    parser.add_argument(
        "--sanitize", nargs="?", const="compute-sanitizer", help="run the tools of this compute-sanitizer"
    )
    parser.add_argument("--seconds", type=float, default=3600.0, help="for everything; the rest is not run")
    parser.add_argument("--gibibytes", type=float, default=130.0, help="of the GPU's memory")
    parser.add_argument("--at-once", type=int, default=8, help="processes side by side")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    options = parser.parse_args()
    folder, out = options.folder.resolve(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.sanitize and shutil.which(options.sanitize) is None:
        parser.error(f"no {options.sanitize} on this machine; give its path to --sanitize")
    known = sanitizer_jobs(folder, options.sanitize) if options.sanitize else jobs(folder, out)
    words = [word for word in options.only.split(",") if word] or [""]
    wanted = [job for job in known if any(word in job.name for word in words)]
    if options.list:
        print("\n".join(f"{job.name:34} {' '.join(job.command)}" for job in wanted))
        return 0
    began = datetime.now(UTC)
    verdicts = together(wanted, out, options.seconds, options.gibibytes, options.at_once)
    failed = [v for v in verdicts if v.status != "ok"]
    spent = (datetime.now(UTC) - began).total_seconds()
    total = f"{len(verdicts)} checks in {spent:.0f} s, {len(failed)} failed"
    lines = [f"{began:%Y-%m-%d %H:%M} UTC, {device()}: {total}"]
    lines += [str(verdict) for verdict in sorted(verdicts, key=lambda v: v.name)]
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join([lines[0], *map(str, failed)]))
    return int(bool(failed) or not verdicts)


if __name__ == "__main__":
    sys.exit(main())
