"""What buckets and slots promise, on a GPU: python -m tests.gpu.check_slots PLAN [--weights DIR].

Up to eight rows per call, a sequence's logits are bit for bit the same whenever it runs, whatever the bucket,
the slot and the neighbors; and tokens that are taken back leave no trace. Without --weights the plan's are
random, in the forms that kernels read, which is enough for both.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dsv4c.plan.folder import Plan, load
from dsv4c.runtime.cuda import CudaExecutor
from dsv4c.runtime.random_fill import fill_weight
from dsv4c.runtime.residence import Resident
from dsv4c.runtime.session import Session


def session_of(plan: Plan, weights: Path | None) -> Session:
    """The plan bound to a checkpoint, or to random weights."""
    if weights is not None:
        return plan.bind(weights)
    block = torch.empty(plan.blocks["weights"], dtype=torch.uint8, device="cuda")
    for record in plan.weights:
        fill_weight(block, Resident.from_json(record), int(plan.config["n_routed_experts"]))
    return Session(plan, CudaExecutor(plan, block))


class DifferenceError(AssertionError):
    """Two results that were to be the same bits."""


def same(found: Tensor, expected: Tensor, what: str) -> None:
    """Raise DifferenceError unless both hold the same bits, and numbers."""
    if not bool(expected.isfinite().all()):
        raise DifferenceError(f"{what}: the expected logits are not finite")
    if not torch.equal(found, expected):
        apart = (found != expected).any(-1).nonzero().flatten().tolist()
        worst = float((found - expected).abs().max())
        raise DifferenceError(f"{what}: rows {apart[:8]} differ, by {worst:g} at most")


def alone(session: Session, ids: list[int]) -> Tensor:
    """Logits of a sequence that goes in token by token, in slot 0."""
    session.reset()
    return torch.cat([session.decode({0: token})[:1] for token in ids])


def again(session: Session, chance: random.Random, length: int) -> None:
    """The same sequence twenty times: what a launch leaves is no matter of who came first."""
    ids = [chance.randrange(session.vocab_size) for _ in range(length)]
    expected = alone(session, ids)
    for i in range(2, 21):
        same(alone(session, ids), expected, f"token by token, turn {i}")


def in_any_bucket(session: Session, chance: random.Random, length: int) -> None:
    """One sequence cut into calls of one to eight rows at random, in every slot."""
    ids = [chance.randrange(session.vocab_size) for _ in range(length)]
    expected = alone(session, ids)
    for slot in range(session.slots):
        session.reset()
        rows, at = [], 0
        while at < len(ids):
            count = min(chance.randint(1, 8), len(ids) - at)
            rows.append(session.prefill(ids[at : at + count], slot))
            at += count
        same(torch.cat(rows), expected, f"calls of 1 to 8 tokens in slot {slot}")


def partly_judged(session: Session, chance: random.Random, length: int) -> None:
    """Calls that judge fewer tokens than they have rows for: logits are those of steps, and of no row NaN."""
    buckets = [p.shape for p in session.plan.buckets.values() if p.shape.kind == "accept"]
    most = max((bucket.tokens for bucket in buckets), default=0)
    ids = [chance.randrange(session.vocab_size) for _ in range(length + most)]
    expected = alone(session, ids)
    for bucket in buckets:
        for count in range(1, bucket.tokens + 1):
            alone(session, ids[:length])
            made = session._outputs(bucket, {0: ids[length : length + count]})["logits"]
            same(made[:count], expected[length : length + count], f"{count} of {bucket.name}")
            if not bool(made[: bucket.tokens].isfinite().all()):
                raise DifferenceError(f"{count} of {bucket.name}: rows that are not there are not finite")


def among_neighbors(session: Session, chance: random.Random, length: int) -> None:
    """As many sequences as there are slots, which come and go at different lengths."""
    count = session.slots
    sequences = [
        [chance.randrange(session.vocab_size) for _ in range(chance.randint(length // 2, length))]
        for _ in range(count)
    ]
    expected = [alone(session, ids) for ids in sequences]
    session.reset()
    slots = chance.sample(range(session.slots), count)
    starts = [chance.randrange(length // 2) for _ in sequences]
    rows: list[list[Tensor]] = [[] for _ in sequences]
    for step in range(2 * length):
        active = {
            slots[i]: ids[len(rows[i])]
            for i, ids in enumerate(sequences)
            if step >= starts[i] and len(rows[i]) < len(ids)
        }
        if not active:
            continue
        logits = session.decode(active)
        for i in range(count):
            if slots[i] in active:
                rows[i].append(logits[slots[i]][None])
    for i, found in enumerate(rows):
        same(torch.cat(found), expected[i], f"sequence {i} in slot {slots[i]} among {count}")


def taken_back(session: Session, chance: random.Random, length: int) -> None:
    """Tokens that were not to be kept: after them, the sequence goes on as if they had never been."""
    ids = [chance.randrange(session.vocab_size) for _ in range(length)]
    expected = alone(session, ids)
    session.reset()
    rows, at = [], 0
    while at < len(ids):
        right = min(chance.randint(0, 4), len(ids) - at)
        wrong = chance.randint(0, 4)
        tried = ids[at : at + right] + [chance.randrange(session.vocab_size) for _ in range(wrong)]
        if not tried:
            continue
        if session.positions[0] + len(tried) > session.max_context:
            break
        logits = session.prefill(tried)
        session.take_back(wrong)
        rows.append(logits[:right])
        at += right
    found = torch.cat(rows)
    same(found, expected[: len(found)], "a sequence between tokens that were taken back")


CHECKS: tuple[Callable[[Session, random.Random, int], None], ...] = (
    again,
    in_any_bucket,
    among_neighbors,
    taken_back,
)


def main() -> int:
    """Run every check; the exit code counts those that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--length", type=int, default=160, help="tokens of a sequence")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    session = session_of(load(options.plan), options.weights)
    print(f"{options.plan}: {', '.join(session.plan.buckets)}; {session.slots} slots; seed {options.seed}")
    failed = 0
    judges = any(program.shape.kind == "accept" for program in session.plan.buckets.values())
    for check in (*CHECKS, partly_judged) if judges else CHECKS:
        try:
            check(session, random.Random(options.seed), options.length)
        except DifferenceError as problem:
            failed += 1
            print(f"FAILED {check.__name__}: {problem}")
        else:
            print(f"passed {check.__name__}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
