"""What chunks of many tokens leave, on a GPU: python -m tests.gpu.check_chunks PLAN [--weights DIR].

A chunk may begin anywhere and end before its bucket does. After it a sequence goes on as one whose tokens
went in one by one: the same logits and, byte for byte, the same state. Plans whose products of many rows are
not those of few have a bound instead (--bound, relative L2 of a row of logits). Every chunk runs twice, the
second time through an arena full of NaN, and leaves the same bits.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv4c.numerics.codec import parts_of
from dsv4c.plan.folder import load
from dsv4c.runtime.executor import states_of
from dsv4c.runtime.session import Session
from tests.gpu.check_slots import session_of

STARTS = (0, 1, 127, 128, 133)
AFTER = 6  # steps that follow a chunk


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


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest relative L2 distance of a row."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


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
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    options = parser.parse_args()
    session = session_of(load(options.plan), options.weights)
    chance, failed, worst = random.Random(options.seed), 0, 0.0
    print(f"{options.plan}: {', '.join(session.plan.buckets)}; seed {options.seed}")
    cases = [(start, start + length) for start in STARTS for length in lengths(session)]
    ids = [chance.randrange(session.vocab_size) for _ in range(max(end for _, end in cases) + AFTER)]
    for start, end in cases:
        slot = chance.randrange(session.slots)
        expected = left_by(session, ids, start, end, slot, chunk=False)
        found = left_by(session, ids, start, end, slot, chunk=True)
        poisoned = left_by(session, ids, start, end, slot, chunk=True, poison=True)
        expected = Left(expected.rows[-len(found.rows) :], expected.state, expected.after)
        far = max(apart(found.rows, expected.rows), apart(found.after, expected.after))
        worst = max(worst, far)
        unlike = found.differing(expected) if not options.bound else []
        unstable = found.differing(poisoned)
        if unlike or unstable or not far <= options.bound:
            failed += 1
            print(f"FAILED tokens {start} to {end} in slot {slot}: {far:.3g} apart; differ from")
            print(f"  one by one: {', '.join(unlike[:9])}; through NaN: {', '.join(unstable[:9])}")
    print(f"{len(cases)} chunks, {failed} failed; rows of logits at most {worst:.3g} apart")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
