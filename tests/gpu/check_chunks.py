"""What chunks of many tokens leave, on a GPU: python -m tests.gpu.check_chunks PLAN [--weights DIR].

A chunk may begin anywhere and end before its bucket does. After it a sequence goes on as one whose tokens
went in one by one: the same logits and, byte for byte, the same state. Plans whose products of many rows are
not those of few have a bound instead (--bound, relative L2 of a row of logits), which one row in fifty may
pass: where two experts or two entries are nearly alike, the other one is chosen. Every chunk runs twice, the
second time through an arena full of NaN, and leaves the same bits.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv4c.numerics.codec import parts_of
from dsv4c.plan.folder import load
from dsv4c.runtime import driver
from dsv4c.runtime.cuda import BoundProgram, CudaExecutor
from dsv4c.runtime.executor import states_of
from dsv4c.runtime.session import Session
from tests.gpu.check_slots import session_of
from tests.gpu.plain import PlainGraph
from tests.gpu.run_plan import ALLOCATIONS

STARTS = (0, 1, 127, 128, 133)
AFTER = 6  # steps that follow a chunk
OTHERS = 0.02  # of all rows, may be further apart than the bound, since they chose others
OTHERWISE = 0.3  # and how far: 0.15 was met, unrelated rows are 1.2 to 1.4 apart


@dataclass(frozen=True)
class Left:
    """What a chunk left: logits of its rows, state of its slot by array, logits of the steps after it."""

    rows: Tensor
    state: dict[str, Tensor]
    after: Tensor

    def differing(self, other: Left) -> list[str]:
        """What has other bits, by name."""
        found = [name for name, part in self.state.items() if not torch.equal(part, other.state[name])]
        return [
            *found,
            *(n for n in ("rows", "after") if not torch.equal(getattr(self, n), getattr(other, n))),
        ]


def state_of(session: Session, slot: int) -> dict[str, Tensor]:
    """A copy of what a slot holds, as bytes by state and component."""
    states = states_of(session.plan, session.executor.blocks)
    return {
        f"{name}.{i}": part[slot].reshape(-1).view(torch.uint8).clone()
        for name, value in states.items()
        for i, part in enumerate(parts_of(value).values())
    }


def left_by(
    session: Session, ids: list[int], start: int, end: int, slot: int, *, chunk: bool, poison: bool = False
) -> Left:
    """Tokens up to `start` one by one, up to `end` as chunks or one by one, and some more one by one."""
    session.reset()
    for token in ids[:start]:
        session.decode({slot: token})
    session.executor.poison = poison
    if chunk:
        rows = session.prefill(ids[start:end], slot, logits="last" if session.gives_last else "all")
    else:
        rows = torch.cat([session.decode({slot: token})[slot][None] for token in ids[start:end]])
    session.executor.poison = False
    state = state_of(session, slot)
    after = torch.cat([session.decode({slot: token})[slot][None] for token in ids[end : end + AFTER]])
    session.wait()
    return Left(rows, state, after)


class CutOffError(Exception):
    """Raised between two chunks."""


def check_interrupted(session: Session, ids: list[int], slot: int) -> list[str]:
    """What is wrong after a prompt that was cut off between its chunks: the slot is reset, which the
    exception says, another has what it had, and the prompt in one go leaves what it leaves in a new session.
    """
    other = (slot + 1) % session.slots

    def read() -> Left:
        rows = session.prefill(ids, slot, logits="last" if session.gives_last else "all")
        return Left(rows, state_of(session, slot), session.decode({slot: ids[0]})[slot])

    def interrupt(done: int, whole: int) -> None:
        if done < whole:
            raise CutOffError

    session.reset()
    expected = read()
    session.reset()
    session.prefill(ids[:5], other)
    kept, wrong = state_of(session, other), []
    try:
        session.prefill(ids, slot, logits="last" if session.gives_last else "all", progress=interrupt)
        wrong.append("nothing was raised")
    except CutOffError as error:
        if not any(f"slot {slot} was reset" in note for note in getattr(error, "__notes__", ())):
            wrong.append("the exception does not say that the slot was reset")
    if session.positions[slot] != 0 or session.positions[other] != (5 if other != slot else 0):
        wrong.append(f"positions are {session.positions}")
    left = state_of(session, other)
    if other != slot:
        wrong += [
            f"{name} of slot {other} changed"
            for name, part in kept.items()
            if not torch.equal(part, left[name])
        ]
    return wrong + [f"{name} of the prompt read again" for name in read().differing(expected)]


def check_again(session: Session, ids: list[int], count: int) -> list[str]:
    """A prompt of as many tokens as each bucket has, and of all but one, `count` times: what a launch leaves
    is no matter of who came first.
    """
    wrong, logits = [], "last" if session.gives_last else "all"
    sizes = [p.shape.tokens for p in session.plan.buckets.values() if p.shape.keeps_beside]
    for length in sorted({n for size in sizes for n in (size - 1, size)}):
        expected, others = None, Counter[str]()
        for _ in range(count):
            session.reset()
            rows = session.prefill(ids[:length], 0, logits=logits)
            found = Left(rows, state_of(session, 0), rows[:0])
            session.wait()
            expected = expected or found
            others.update(found.differing(expected))
        print(f"{count} prompts of {length} tokens: {sum(others.values())} results differ from the first's")
        wrong += [f"{name}: {n} of {count} prompts of {length} tokens" for name, n in others.items()]
    return wrong


def largest(session: Session) -> BoundProgram:
    """The program of the bucket of most tokens."""
    assert isinstance(session.executor, CudaExecutor)
    bucket = max((p.shape for p in session.plan.buckets.values() if p.shape.is_main), key=lambda b: b.tokens)
    return session.executor.programs[bucket.name]


def check_quiet(session: Session, ids: list[int], count: int) -> list[str]:
    """What was allocated while `count` calls of the largest bucket were enqueued, at positions that change;
    a wait of the host raises.
    """
    step = largest(session)
    tokens = step.program.shape.tokens
    session.reset()
    session.prefill(
        ids[:tokens], 0, logits="last" if session.gives_last else "all"
    )  # leaves its inputs there
    position = step.value("position")
    assert isinstance(position, Tensor)
    session.wait()
    before, free = torch.cuda.memory_stats(), torch.cuda.mem_get_info()[0]
    torch.cuda.set_sync_debug_mode("error")
    for i in range(count):
        position.fill_(i * 37 % (session.max_context - tokens + 1))
        step.call()
    torch.cuda.set_sync_debug_mode("default")
    session.wait()
    after = torch.cuda.memory_stats()
    grown = {key: after.get(key, 0) - before.get(key, 0) for key in ALLOCATIONS}
    grown["bytes of the device"] = free - torch.cuda.mem_get_info()[0]
    session.reset()
    print(f"{count} chunks of {tokens} tokens enqueued: {grown}")
    return [f"{key}: {n} in {count} chunks" for key, n in grown.items() if n]


def time_prompt(session: Session, ids: list[int]) -> None:
    """Print what each chunk of a prompt takes on the device, the median of five prompts, and all of it for
    the host, with its waits.
    """
    marks: list[torch.cuda.Event] = []

    def mark(done: int = 0, whole: int = 0) -> None:
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()

    spent, walls = [], []
    for _ in range(6):
        session.reset()
        session.wait()
        marks.clear()
        began = time.perf_counter()
        mark()
        session.prefill(ids, 0, logits="last" if session.gives_last else "all", progress=mark)
        session.wait()
        walls.append(1e3 * (time.perf_counter() - began))
        spent.append([a.elapsed_time(b) for a, b in itertools.pairwise(marks)])
    chunks = [statistics.median(times) for times in zip(*spent[1:], strict=True)]
    layers = session.plan.config["num_layers"]
    print(
        f"{len(ids)} tokens through {layers} layers: {statistics.median(walls[1:]):.2f} ms, chunks "
        + ", ".join(f"{ms:.2f}" for ms in chunks)
    )


def apart(found: Left, expected: Left) -> list[float]:
    """The relative L2 distance of every row of logits that `found` has: a chunk's, or its last, and after."""
    rows = torch.cat((found.rows, found.after)).double()
    wanted = torch.cat((expected.rows[-len(found.rows) :], expected.after)).double()
    return ((rows - wanted).norm(dim=-1) / wanted.norm(dim=-1)).tolist()


def lengths(session: Session) -> list[int]:
    """Chunks of one token, of a bucket and about it, and of more than the largest."""
    sizes = sorted(p.shape.tokens for p in session.plan.buckets.values() if p.shape.keeps_beside)
    near = {n for size in sizes for n in (size - 1, size, size + 1)}
    return sorted(near | {1, 9, sizes[-1] + 9})


def main() -> int:
    """Run every case; the exit code says whether any failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--bound", type=float, default=0.0, help="of a row of logits; 0: the same bits")
    parser.add_argument("--again", type=int, default=0, help="only the same prompts, so many times")
    parser.add_argument(
        "--quiet", type=int, default=0, help="only so many chunks without an allocation or a wait"
    )
    parser.add_argument("--time", type=int, default=0, help="only a prompt of so many tokens, timed")
    parser.add_argument(
        "--smoke", action="store_true", help="a prompt of every bucket, for compute-sanitizer"
    )
    parser.add_argument("--plain", action="store_true", help="kernels launched one by one, without a graph")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    options = parser.parse_args()
    if options.plain:
        driver.Graph = PlainGraph  # type: ignore[assignment, misc]
    session = session_of(load(options.plan), options.weights)
    chance, failed, distances = random.Random(options.seed), 0, list[float]()
    print(f"{options.plan}: {', '.join(session.plan.buckets)}; seed {options.seed}")
    cases = [(start, start + length) for start in STARTS for length in lengths(session)]
    count = max(*(end + AFTER for _, end in cases), options.time)
    ids = [chance.randrange(session.vocab_size) for _ in range(count)]
    if options.smoke:
        return smoke(session, ids)
    if options.time:
        time_prompt(session, ids[: options.time])
        return 0
    if options.again:
        wrong = check_again(session, ids, options.again)
        print("\n".join(wrong) or "always the same bits")
        return int(bool(wrong))
    if options.quiet:
        wrong = check_quiet(session, ids, options.quiet)
        print("\n".join(wrong) or "nothing was allocated, nobody waited")
        return int(bool(wrong))
    for start, end in cases:
        slot = chance.randrange(session.slots)
        expected = left_by(session, ids, start, end, slot, chunk=False)
        found = left_by(session, ids, start, end, slot, chunk=True)
        poisoned = left_by(session, ids, start, end, slot, chunk=True, poison=True)
        own = apart(found, expected)
        distances += own
        expected = Left(expected.rows[-len(found.rows) :], expected.state, expected.after)
        unlike = found.differing(expected) if not options.bound else []
        unstable = found.differing(poisoned)
        if unlike or unstable or not all(far <= OTHERWISE for far in own):
            failed += 1
            print(f"FAILED tokens {start} to {end} in slot {slot}: {max(own):.3g} apart; differ from")
            print(f"  one by one: {', '.join(unlike[:9])}; through NaN: {', '.join(unstable[:9])}")
    beyond = sum(not far <= options.bound for far in distances)
    print(
        f"{len(cases)} chunks, {failed} failed; of {len(distances)} rows of logits {beyond} beyond "
        f"{options.bound}, median {statistics.median(distances):.3g}, worst {max(distances):.3g}"
    )
    wrong = check_interrupted(session, ids[: lengths(session)[-1]], chance.randrange(session.slots))
    print("\n".join(wrong) or "a prompt that was cut off left nothing")
    return int(failed > 0 or beyond > OTHERS * len(distances) or bool(wrong))


def smoke(session: Session, ids: list[int]) -> int:
    """A chunk of every bucket of more than eight tokens, padded."""
    sizes = [p.shape.tokens for p in session.plan.buckets.values() if p.shape.keeps_beside]
    for size in sizes:
        session.prefill(ids[: size - 1], 0, logits="last" if session.gives_last else "all")
        session.wait()
        session.reset()
    print(f"a prompt each of {', '.join(str(size - 1) for size in sizes)} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
