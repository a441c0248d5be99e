"""A process for each rank, on several GPUs of one host: python -m tests.gpu.check_processes PLAN CHECKPOINT.

Starts them itself, as torchrun would. On random weights, after a prompt and many steps, all have the tokens,
logits and state that one process with all ranks has, bit for bit, however their hosts sleep; when one is
killed, the others name it within the limit. Then both ways to run a plan, `dsv4c run` with and without
torchrun, say the same of a checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dsv4c.numerics.codec import parts_of
from dsv4c.plan.folder import load
from dsv4c.runtime.bench import random_executor
from dsv4c.runtime.driver import DriverError
from dsv4c.runtime.processes import world_of
from dsv4c.runtime.ranks import CudaRanks
from dsv4c.runtime.session import Session
from tests.gpu.check_ranks import answer, prompt_of

MARK = "told: "
LIMIT = 2.0  # seconds that a rank waits for another
ASLEEP = 0.003  # seconds that a host sleeps now and then
ASLEEP_STEPS = 20  # before each of which one host sleeps


def told(path: Path, steps: int, length: int, killed: int | None) -> dict[str, object]:
    """What a process finds: run in each of them, or in one for all ranks."""
    plan = load(path)
    world = world_of(plan)
    ranks = random_executor(plan, limit=LIMIT, world=world)
    assert isinstance(ranks, CudaRanks), "a plan for several ranks"
    session = Session(plan, ranks)
    prompt = prompt_of(length, session.vocab_size)
    steps = min(steps, (session.max_context - length - ASLEEP_STEPS) // 3)  # compared, timed, with one killed
    said = answer(session, prompt, steps)
    found: dict[str, object] = {"tokens": said, "bits": bits(session)}
    for i in range(ASLEEP_STEPS):
        if world is not None and i % world.size == world.rank:
            time.sleep(ASLEEP)
        said += [int(token) for token in session.steps(1, [0])[:, 0]]
    found |= {"after sleeping": bits(session)}
    session.wait()
    if world is not None:
        world.gather("timed")  # those that begin earlier would wait, and count that
    began = time.perf_counter()
    session.steps(steps, [0])
    session.wait()
    found["us"] = round(1e6 * (time.perf_counter() - began) / steps, 1)
    if world is not None and killed is not None:
        world.gather("ready")
        if world.rank == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.perf_counter()
        try:
            session.steps(steps, [0])
            session.wait()
            found["lost"] = "nobody"
        except DriverError as error:
            found["lost"] = f"after {time.perf_counter() - began:.2f} s: {error}"
    return found


def bits(session: Session) -> str:
    """Of the logits of the last step, and of all that is kept."""
    session.wait()
    held = hashlib.sha256()
    bucket = session.plan.program("decode").shape.name
    ranks = session.executor
    assert isinstance(ranks, CudaRanks)
    for rank in ranks.ranks[:1]:
        values = [rank.programs[bucket].outputs["logits"]]
        values += [part for value in rank.states.values() for part in parts_of(value).values()]
        for value in values:
            held.update(value.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return held.hexdigest()[:16]


def started(command: Sequence[str], count: int) -> list[subprocess.Popen[str]]:
    """A process for each rank."""
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    return [
        subprocess.Popen(
            command,
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def results(processes: Sequence[subprocess.Popen[str]]) -> list[dict[str, object]]:
    """What those tell that come to an end by themselves."""
    found = []
    for process in processes:
        out, _ = process.communicate(timeout=120)
        found += [json.loads(line.removeprefix(MARK)) for line in out.splitlines() if line.startswith(MARK)]
    return found


def main() -> int:
    """Start, compare, tell; the exit code counts what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--prompt", type=int, default=8, help="tokens")
    parser.add_argument("--tell", action="store_true", help="be one of the processes")
    parser.add_argument("--killed", type=int, default=1, help="the rank that is killed at the end")
    asked = parser.parse_args()
    if asked.tell:
        print(MARK + json.dumps(told(asked.plan, asked.steps, asked.prompt, asked.killed)), flush=True)
        return 0
    failed = 0

    def verdict(right: bool, what: str) -> None:
        nonlocal failed
        failed += not right
        print(f"  {'ok' if right else 'WRONG':6} {what}", flush=True)

    count = load(asked.plan).ranks
    command = [sys.executable, "-m", "tests.gpu.check_processes", str(asked.plan), "--tell"]
    command += ["--steps", str(asked.steps), "--prompt", str(asked.prompt), "--killed", str(asked.killed)]
    apart = results(started(command, count))
    lost = [str(process.pop("lost", "")) for process in apart]
    alone = told(asked.plan, asked.steps, asked.prompt, None)
    took = [process.pop("us") for process in (*apart, alone)]
    right = len(apart) == count - 1 and all(process == alone for process in apart)
    verdict(right, f"{count} processes have the tokens, logits and state of one with all ranks")
    verdict(bool(lost) and all(f"for rank {asked.killed}" in text for text in lost), f"killed: {lost}")
    print(f"         a step takes {took[:-1]} us in processes, {took[-1]} in one", flush=True)
    if asked.checkpoint is not None:
        run = [
            "-m",
            "dsv4c",
            "run",
            str(asked.plan),
            "--weights",
            str(asked.checkpoint),
            "--tokens",
            "3,17,5",
        ]
        run += ["--max-new-tokens", "24"]
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        said = [
            subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, timeout=120).stdout
            for words in (run, [*start, *run])
        ]
        verdict(
            bool(said[0]) and said[0] == said[1], f"dsv4c run by torchrun says the same: {said[1][:60]!r}"
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
