"""What ranks promise, on several GPUs of one host: python -m tests.gpu.check_ranks PLAN [PLAN ...].

On random weights: after a prompt and many steps every rank has the same logits and the same state, bit for
bit, the same again beside work that loads the memory of all GPUs, and after a rank that starts late; one that
never comes is named within the limit, and `reset` starts anew. Further plans of the same model must give the
first one's logits bit for bit. Ends with what a step takes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dsv4c.numerics.codec import parts_of
from dsv4c.plan.folder import Plan, load
from dsv4c.runtime.bench import random_executor
from dsv4c.runtime.driver import LostRankError
from dsv4c.runtime.ranks import CudaRanks
from dsv4c.runtime.session import Session

PROMPT = [3, 17, 5, 9, 250, 11, 42, 7]
LATE = 0.3  # seconds, of the limit of one
LOAD = 256 << 20  # bytes that are copied beside, far beyond an L2


def outputs(ranks: CudaRanks, bucket: str) -> list[Tensor]:
    """The logits that each rank has, on the CPU."""
    return [rank.programs[bucket].outputs["logits"].cpu() for rank in ranks.ranks]


def alike(ranks: CudaRanks, bucket: str) -> bool:
    """Whether all ranks have the same logits, which are numbers, and the same state."""
    first, *others = outputs(ranks, bucket)
    same = all(torch.equal(first, other) for other in others) and bool(first.isfinite().all())
    for name, value in ranks.states.items():
        for part, wanted in parts_of(value).items():
            held = [parts_of(rank.states[name])[part] for rank in ranks.ranks[1:]]
            bits = wanted.cpu().view(torch.uint8)
            same = same and all(torch.equal(each.cpu().view(torch.uint8), bits) for each in held)
    return same


@contextmanager
def loaded(devices: Sequence[torch.device]) -> Iterator[None]:
    """Copies on every GPU, beside what runs within: some seconds of them are enqueued."""
    streams = []
    for device in devices:
        with torch.cuda.device(device):
            source = torch.empty(LOAD, dtype=torch.uint8, device=device)
            stream = torch.cuda.Stream(device)
            with torch.cuda.stream(stream):
                for _ in range(20_000):
                    source[: LOAD // 2].copy_(source[LOAD // 2 :], non_blocking=True)
            streams.append(stream)
    yield
    for stream in streams:
        stream.synchronize()


def answer(session: Session, steps: int) -> list[int]:
    """A prompt, and so many greedy tokens after it, fed back on the devices."""
    session.reset()
    session.prefill(PROMPT, 0)
    session.decode({0: 5})
    said = [int(token) for token in session.steps(steps, [0]).flatten()]
    session.wait()
    return said


def check(plan: Plan, steps: int) -> tuple[int, Tensor]:
    """What failed, and the logits of the first step after the prompt."""
    ranks = random_executor(plan)
    assert isinstance(ranks, CudaRanks), "a plan for several ranks"
    session = Session(plan, ranks)
    bucket = plan.program("decode").shape.name
    print(
        f"{plan.name}: {plan.ranks} ranks, {len(plan.buckets[bucket].launches)} launches a step", flush=True
    )
    verdicts: dict[str, bool] = {}

    def told(what: str, right: bool) -> None:
        verdicts[what] = right
        print(f"  {'ok' if right else 'WRONG':6} {what}", flush=True)

    session.prefill(PROMPT, 0)
    logits = session.decode({0: 5})[:1].cpu()
    told("the prompt's end: ranks alike", alike(ranks, bucket))
    quiet = answer(session, steps)
    told(f"{steps} steps: ranks alike", alike(ranks, bucket))
    told(f"{steps} steps again: the same tokens", answer(session, steps) == quiet)
    with loaded(ranks.devices):
        told("memory loaded beside: the same tokens", answer(session, steps) == quiet)
    told("memory loaded beside: ranks alike", alike(ranks, bucket))

    session.reset()
    session.prefill(PROMPT, 0)
    session.wait()
    with torch.cuda.device(ranks.devices[-1]):
        torch.cuda._sleep(int(LATE * 1.7e9))  # cycles
    told(f"a rank {LATE} s late: the same logits", torch.equal(session.decode({0: 5})[:1].cpu(), logits))

    ranks.begin(bucket)
    next(ranks.bound(bucket)).call()
    began = time.perf_counter()
    try:
        session.wait()
        told("a rank that never comes is named", False)
    except LostRankError as error:
        print(f"         after {time.perf_counter() - began:.2f} s: {error}", flush=True)
        told("a rank that never comes is named", f"for rank {plan.ranks - 1}" in str(error) or plan.ranks > 2)
    session.reset()
    session.prefill(PROMPT, 0)
    told("after reset: the same logits", torch.equal(session.decode({0: 5})[:1].cpu(), logits))

    took = []
    for _ in range(7):
        session.reset()
        session.prefill(PROMPT, 0)
        session.wait()
        began = time.perf_counter()
        session.steps(steps, [0])
        session.wait()
        took.append(1e6 * (time.perf_counter() - began) / steps)
    print(
        f"         a step takes {statistics.median(took):.1f} us ({min(took):.1f} to {max(took):.1f})",
        flush=True,
    )
    return sum(not right for right in verdicts.values()), logits


def main() -> int:
    """Every check; the exit code counts what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plans", type=Path, nargs="+")
    parser.add_argument("--steps", type=int, default=2000)
    asked = parser.parse_args()
    failed, first = 0, None
    for path in asked.plans:
        plan = load(path)
        wrong, logits = check(plan, asked.steps)
        if first is not None and not torch.equal(first, logits):
            print(
                f"{path}: logits differ from {asked.plans[0]}'s, by {float((first - logits).abs().max()):.3g}"
            )
            wrong += 1
        first = logits if first is None else first
        failed += wrong
        torch.cuda.empty_cache()
    return failed


if __name__ == "__main__":
    sys.exit(main())
