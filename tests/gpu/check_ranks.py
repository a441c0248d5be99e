"""What ranks promise, on several GPUs of one host: python -m tests.gpu.check_ranks PLAN [PLAN ...].

On random weights: after a prompt and many steps every rank has the same logits and the same state, bit for
bit, the same again beside work that loads the memory of all GPUs, while the host sleeps between launches, and
after a rank that starts late; each rank by itself, launch by launch against the words that the others gave,
has these bits, too. One that never comes is named within the limit, and `reset` starts anew. Further plans of
the same model must give the first one's logits bit for bit. Ends with what steps, prompts, calls of every
bucket and rounds whose drafts are an oracle's take.

`--smoke` runs a few steps instead, for compute-sanitizer: of all ranks, or with `--alone R` of one, whose
exchanges are answered at once, and with `--plain` its kernels one by one, without a graph.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dsv4c.numerics.codec import parts_of
from dsv4c.plan.folder import Plan, load
from dsv4c.plan.records import Launch
from dsv4c.runtime import driver
from dsv4c.runtime.bench import random_executor
from dsv4c.runtime.ranks import CudaRanks
from dsv4c.runtime.session import Session
from tests.gpu.plain import PlainGraph

LATE = 0.3  # seconds, of the limit of one
ASLEEP = 0.0015  # seconds before each launch, of a step of two or three milliseconds
LOAD = 256 << 20  # bytes that are copied beside, far beyond an L2
AHEAD = 64  # copies that are enqueued before the last is waited for
TIMED = 500  # steps, at most
CALLS, TURNS = 100, 3  # of a bucket, one behind the other, and how often
FAR = (0, 8192, 131072)  # tokens before a call that is timed
ROUNDS, HELD = 40, 2  # rounds that an oracle drafts for, and how many of its drafts hold in each
PATIENCE = 20.0  # seconds that a rank waits for another which a tool slows down


def prompt_of(length: int, vocabulary: int) -> list[int]:
    """Tokens that come again only after a while."""
    return [(7 * i * i + 3 * i + 3) % vocabulary for i in range(length)]


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
    """Copies on every GPU, beside what runs within."""
    over = threading.Event()

    def copy(device: torch.device) -> None:
        with torch.cuda.device(device):
            source = torch.empty(LOAD, dtype=torch.uint8, device=device)
            stream = torch.cuda.Stream(device)
            with torch.cuda.stream(stream):
                while not over.is_set():
                    for _ in range(AHEAD):
                        source[: LOAD // 2].copy_(source[LOAD // 2 :], non_blocking=True)
                    stream.synchronize()

    threads = [threading.Thread(target=copy, args=(device,)) for device in devices]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def by_itself(ranks: CudaRanks, session: Session, bucket: str, prompt: Sequence[int]) -> bool:
    """Whether each rank alone, one after the other, has the bits of all together: a step launch by launch,
    what its exchanges received being put there before each.
    """
    begin(session, prompt)
    received: list[list[Tensor]] = []

    def keep(launch: Launch) -> None:
        blocks = [rank.blocks["exchange"].clone() for rank in ranks.ranks]
        received.append(blocks if launch.exchanges else [])

    inputs = {"tokens": [5], "lengths": [1], "slots": [0]}
    given = {name: torch.tensor(values, dtype=torch.int32) for name, values in inputs.items()}
    ranks.run(bucket, given, watch=keep)
    together = outputs(ranks, bucket)
    begin(session, prompt)
    session.wait()
    for number, step in enumerate(ranks.bound(bucket)):
        step.take(given)
        for i, blocks in enumerate(received):
            if blocks:
                step.blocks["exchange"].copy_(blocks[number])
            step.start(i)
            step.finish(i)
    return all(map(torch.equal, together, outputs(ranks, bucket)))


def begin(session: Session, prompt: Sequence[int]) -> None:
    """A prompt, and nothing before it."""
    session.reset()
    session.prefill(prompt, 0, logits="last")


def answer(session: Session, prompt: Sequence[int], steps: int) -> list[int]:
    """A prompt, and so many greedy tokens after it, fed back on the devices."""
    begin(session, prompt)
    session.decode({0: 5})
    said = [int(token) for token in session.steps(steps, [0]).flatten()]
    session.wait()
    return said


def check(ranks: CudaRanks, length: int, steps: int, beside: int) -> tuple[int, Tensor]:
    """What failed, and the logits of the first step after a prompt of that length; `beside` steps run while
    other work loads the memory.
    """
    plan = ranks.plan
    session = Session(plan, ranks)
    prompt = prompt_of(length, session.vocab_size)
    bucket = plan.program("decode").shape.name
    taken = " and ".join(f"{held_bytes(device) / 2**30:.2f}" for device in ranks.devices)
    print(
        f"{plan.name}: {plan.ranks} ranks, {len(plan.buckets[bucket].launches)} launches a step", flush=True
    )
    print(f"         {taken} GiB of the GPUs' memory are taken", flush=True)
    verdicts: dict[str, bool] = {}

    def told(what: str, right: bool) -> None:
        verdicts[what] = right
        print(f"  {'ok' if right else 'WRONG':6} {what}", flush=True)

    session.prefill(prompt, 0, logits="last")
    logits = session.decode({0: 5})[:1].cpu()
    told("the prompt's end: ranks alike", alike(ranks, bucket))
    quiet = answer(session, prompt, steps)
    told(f"{steps} steps: ranks alike", alike(ranks, bucket))
    told(f"{steps} steps again: the same tokens", answer(session, prompt, steps) == quiet)
    with loaded(ranks.devices):
        told(
            f"{beside} steps, memory loaded beside: the same tokens",
            answer(session, prompt, beside)[:steps] == quiet[:beside],
        )
    told("memory loaded beside: ranks alike", alike(ranks, bucket))

    told("each rank by itself: the same bits", by_itself(ranks, session, bucket, prompt))

    answer(session, prompt, 1)
    asleep = []
    for _ in range(min(steps - 1, 40)):
        ranks.begin(bucket)
        for bound in ranks.bound(bucket):
            time.sleep(ASLEEP)
            bound.call()
        asleep.append(int(ranks.ranks[0].programs[bucket].outputs["next"][0]))
    told("the host asleep between launches: the same tokens", asleep == quiet[1 : 1 + len(asleep)])

    begin(session, prompt)
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
    except driver.LostRankError as error:
        print(f"         after {time.perf_counter() - began:.2f} s: {error}", flush=True)
        told("a rank that never comes is named", f"for rank {plan.ranks - 1}" in str(error) or plan.ranks > 2)
    begin(session, prompt)
    told("after reset: the same logits", torch.equal(session.decode({0: 5})[:1].cpu(), logits))

    first, took = [], []
    for _ in range(TURNS):
        session.reset()
        began = time.perf_counter()
        session.prefill(prompt, 0, logits="last")
        session.wait()
        first.append(1e3 * (time.perf_counter() - began))
        began = time.perf_counter()
        session.steps(min(steps, TIMED), [0])
        session.wait()
        took.append(1e6 * (time.perf_counter() - began) / min(steps, TIMED))
    for what, found, unit in ((f"a prompt of {length}", first, "ms"), ("a step after it", took, "us")):
        middle = statistics.median(found)
        print(f"         {what} takes {middle:.1f} {unit} ({min(found):.1f} to {max(found):.1f})", flush=True)
    for name, program in plan.buckets.items():
        chunk = program.shape.kind == "prefill"
        for position in FAR[:1] if chunk else FAR:
            if chunk or position + program.shape.rows * (CALLS + 1) <= session.max_context:
                took = calls(ranks, name, position)
                print(
                    f"         a call of {name} at {position} takes {statistics.median(took):.1f} us "
                    f"({min(took):.1f} to {max(took):.1f})",
                    flush=True,
                )
    for bucket_of in plan.buckets.values():
        if bucket_of.shape.kind == "accept":
            told("rounds of an oracle: what steps say", oracle(session, prompt, bucket_of.shape.tokens))
    return sum(not right for right in verdicts.values()), logits


def held_bytes(device: torch.device) -> int:
    """What is taken of a GPU's memory."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def calls(ranks: CudaRanks, name: str, position: int) -> list[float]:
    """Microseconds of a call of a bucket, whose rows are valid, one behind the other; several times."""
    shape = ranks.plan.buckets[name].shape
    tokens = torch.arange(shape.given, dtype=torch.int32) * 7919 % int(ranks.plan.config["vocab_size"])
    lengths = torch.full((shape.sequences,), shape.given // shape.sequences, dtype=torch.int32)
    slots = torch.arange(shape.sequences, dtype=torch.int32)
    chunk = shape.kind == "prefill"
    took, count = [], 1 if chunk else CALLS
    for _ in range(TURNS):
        for step in ranks.bound(name):
            at = step.value("position")
            assert isinstance(at, Tensor)
            at.fill_(position)
            step.take({"tokens": tokens, "lengths": lengths, "slots": slots})
        if not chunk:
            ranks.call(name)
        ranks.wait()
        began = time.perf_counter()
        for _ in range(count):
            ranks.call(name)
        ranks.wait()
        took.append(1e6 * (time.perf_counter() - began) / count)
    return took


def oracle(session: Session, prompt: Sequence[int], rows: int) -> bool:
    """Whether rounds that judge an oracle's drafts, of which `HELD` hold, say what steps say. Prints what a
    token takes: with a host that waits for every round and then gives the next one's drafts, and with one
    that gives all drafts ahead.
    """
    bucket = next(name for name, p in session.plan.buckets.items() if p.shape.kind == "accept")
    begin(session, prompt)
    session.decode({0: 5})
    truth = [5, session.next_tokens[0]]
    truth += session.steps(ROUNDS * (1 + HELD) + rows, [0]).flatten().tolist()
    given = []
    for at in range(0, ROUNDS * (1 + HELD), 1 + HELD):
        wrong = [(token + 1) % session.vocab_size for token in truth[at + 1 + HELD : at + rows]]
        given.append([*truth[at : at + 1 + HELD], *wrong])
    wanted = truth[1 : 1 + ROUNDS * (1 + HELD)]

    begin(session, prompt)
    said, took = [], []
    for tokens in given:
        began = time.perf_counter()
        said += session.accept({0: tokens})[0]
        took.append(1e6 * (time.perf_counter() - began) / (1 + HELD))
    waiting = statistics.median(took)

    begin(session, prompt)
    session.wait()
    inputs = [{"tokens": tokens, "lengths": [rows], "slots": [0]} for tokens in given]
    ready = [{n: torch.tensor(v, dtype=torch.int32) for n, v in each.items()} for each in inputs]
    kept = []
    began = time.perf_counter()
    for each in ready:
        kept.append(session.executor.run(bucket, each)["said"].clone())
    session.wait()
    ahead = 1e6 * (time.perf_counter() - began) / len(wanted)
    print(
        f"         {ROUNDS} rounds of {1 + HELD} tokens; a token takes {ahead:.1f} us, drafts given ahead, "
        f"and {waiting:.1f} us with a host that waits for each round",
        flush=True,
    )
    return said == wanted and [t for row in kept for t in row.tolist() if t >= 0] == wanted


def smoke(plan: Plan, length: int, rank: int | None) -> int:
    """A few steps: the first ones, ends of windows, more entries than are chosen."""
    executor = random_executor(plan, rank, limit=PATIENCE)
    session = Session(plan, executor)
    prompt = prompt_of(length, session.vocab_size)
    session.prefill(prompt, 0, logits="last")
    session.wait()
    bucket = plan.program("decode").shape.name
    for position in (3, 63, 127):
        for step in executor.bound(bucket):
            at = step.value("position")
            assert isinstance(at, Tensor)
            at.fill_(position)
        executor.begin(bucket)
        for step in executor.bound(bucket):
            step.call()
        session.wait()
    print(f"{len(plan.buckets[bucket].launches)} launches, 3 steps after a prompt of {length}")
    return 0


def main() -> int:
    """Every check; the exit code counts what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plans", type=Path, nargs="+")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--beside", type=int, help="steps beside other work [default: --steps]")
    parser.add_argument("--prompt", type=int, default=8, help="tokens")
    parser.add_argument("--smoke", action="store_true", help="a few steps, for compute-sanitizer")
    parser.add_argument("--alone", type=int, help="with --smoke, one rank on one GPU")
    parser.add_argument("--plain", action="store_true", help="with --alone, kernels launched one by one")
    asked = parser.parse_args()
    if asked.plain:
        driver.Graph = PlainGraph  # type: ignore[assignment, misc]
    if asked.smoke:
        return sum(smoke(load(path), asked.prompt, asked.alone) for path in asked.plans)
    failed, first = 0, None
    for path in asked.plans:
        ranks = random_executor(load(path))
        assert isinstance(ranks, CudaRanks), "a plan for several ranks"
        wrong, logits = check(ranks, asked.prompt, asked.steps, asked.beside or asked.steps)
        del ranks
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
