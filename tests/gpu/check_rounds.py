"""Rounds on a GPU against its own steps: python -m tests.gpu.check_rounds FOLDER [--prompts N] [--head HEAD].

`tests.gpu.build_rounds` made FOLDER. Token for token: drafts of both heads, of an oracle, misleading ones;
sampled rounds under the seeds of sampled steps; and around the ends of windows what is kept, bit for bit, as
if rejected rows had never run. Histograms of how many drafts held are printed; together those of a head must
have every number.
Needs torch and cuda-bindings, no compiler.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from pathlib import Path

import torch

from dsv4c.plan.folder import load
from dsv4c.runtime.sampling import Sampling
from dsv4c.runtime.session import Session
from tests.drafting import COUNTS, VOCABULARY, Head, begin, compare, in_rounds, kept, oracle, plainly, prompts


def sampled(session: Session, count: int) -> int:
    """Prompts whose sampled rounds say something else than sampled steps."""
    wrong, held = 0, Counter[int]()
    for seed, prompt in enumerate(prompts(count, 11)):
        how = Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.1, seed=seed)
        said, own = in_rounds(session, prompt, 24, how)
        begin(session, prompt)
        session.choose(0, how)
        wrong += said != session.settle(session.say(24, {0: prompt[-1]}))[0]
        held += own
    print(f"sampled: {wrong} of {count} prompts differ, held {dict(sorted(held.items()))}", flush=True)
    return wrong


def traces(judging: Session, count: int) -> int:
    """Starts around ends of windows after which something is left that plain steps do not leave."""
    wrong = 0
    starts = (2, 3, 4, 7, 8, 124, 125, 126, 127, 128, 129, 252, 255, 256)
    for start in starts:
        made = random.Random(start)
        prompt = made.choices(range(VOCABULARY), k=start)
        truth = [*prompt[-1:], *plainly(judging, prompt, 40)]
        begin(judging, prompt)
        at = 0
        while at < 24:
            drafts = oracle(made.choice([0.0, 0.5, 1.0]), made.randint(1, count), made.randrange(99))
            at += len(judging.accept({0: [truth[at], *drafts(truth[at + 1 :])]})[0])
        found, logits = kept(judging, 0), judging.decode({0: truth[at]})
        begin(judging, prompt)
        for token in truth[:at]:
            judging.decode({0: token})
        wanted = kept(judging, 0)
        same = [torch.equal(rows, found[name]) for name, rows in wanted.items()]
        wrong += not (all(same) and torch.equal(judging.decode({0: truth[at]}), logits))
    print(f"traces: {wrong} of {len(starts)} starts leave some", flush=True)
    return wrong


def main() -> int:
    """Check what the folder has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--head", choices=COUNTS, help="only that one")
    asked = parser.parse_args()
    wrong = 0
    heads: tuple[Head, ...] = (asked.head,) if asked.head else tuple(COUNTS)
    for head in heads:
        drafting, drawing, judging = (
            load(asked.folder / f"{head}-{name}").bind(asked.folder / f"{head}-weights")
            for name in ("rounds", "sampled", "given")
        )
        wrong += compare(drafting, judging, head, asked.prompts, 24)
        wrong += sampled(drawing, asked.prompts // 4)
        wrong += traces(judging, COUNTS[head])
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
