"""Rounds, op by op, on small numbers; what no row may read is out of range or NaN."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsv4c.ir.ops.draft import Accept, Candidates, DraftRows, Preceding, Stop, Trusted
from dsv4c.ir.ops.moe import Present
from dsv4c.ir.ops.sample import Draw
from dsv4c.reference import run


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def lists(*values: Tensor) -> list[list[int]]:
    return [value.tolist() for value in values]


def test_the_row_before_is_the_calls_or_the_rings() -> None:
    """A chunk of slot 1 from position 5 on, its padding, the first tokens of slot 0, and slot 2 alone."""
    cache = torch.full((3, 4, 1), torch.nan)
    cache[1, 4 % 4], cache[2, 9 % 4] = 104, 209
    rows = torch.tensor([[105.0], [106], [0], [0], [1], [210]])
    positions, slots = i32(5, 6, -1, 0, 1, 10), i32(1, 1, 0, 0, 0, 2)
    earlier, before = run(Preceding(), cache, rows, positions, slots)
    assert earlier[:, 0].tolist() == [104, 105, 0, 0, 0, 209]
    assert before.tolist() == [4, 5, -1, -1, 0, 9]


def test_rows_that_draft() -> None:
    given = i32(7, 8, 9), i32(1, 0, 1), i32(2, -1, 0), i32(0, 99, 50)
    assert lists(*run(DraftRows(3, 0, 5), *given)) == [
        [7, 5, 5, 8, 5, 5, 9, 5, 5],
        [50, 51, 52, -1, -1, -1, 0, 1, 2],
        [2, 2, 2, 0, 0, 0, 0, 0, 0],
        [52, 52, 52, -1, -1, -1, 2, 2, 2],
    ]
    assert lists(*run(DraftRows(1, -1, 0), *given)) == [[7, 8, 9], [49, -1, -1], [2, 0, 0], [49, -1, -1]]


def test_candidates_are_an_anchor_and_its_drafts() -> None:
    rows, lengths = run(Candidates(), i32(7, 8), i32(1, 2, 3, 4), i32(1, 0))
    assert lists(rows, lengths) == [[7, 1, 2, 8, 3, 4], [3, 0]]


def test_drafts_are_judged_as_long_as_all_of_them_are_likely_to_hold() -> None:
    """Sequences of confidence 0.9, 0.5, 0.9 each; one that is idle in no slot."""
    likely, even = math.log(9), 0.0
    confidence = torch.tensor([likely, even, likely] * 4)[:, None]
    least = torch.tensor([0.0, 0.44, 0.46, 0.91])
    given = i32(4, 4, 4, 0), confidence, i32(3, 2, 1, -1), least
    assert run(Trusted(), *given).tolist() == [1, 2, 3, 0]
    assert run(Trusted(), i32(4, 4, 2, 0), confidence, i32(0, 0, 0, -1), least).tolist() == [4, 4, 2, 0]


def test_a_confidence_behind_a_draft_does_not_decide_about_it() -> None:
    """Nor does one that is likely go on behind one that is not, or one that is no number."""
    least = torch.tensor([0.3])
    for confidence, rows in {(-9.0, 9.0, 9.0): 1, (9.0, -9.0, 9.0): 2, (9.0, math.nan, 9.0): 2}.items():
        drafts = torch.tensor(confidence)[:, None]
        assert run(Trusted(), i32(4), drafts, i32(0), least).tolist() == [rows]
    certain = torch.tensor([[math.inf], [99.0], [-math.inf]])
    assert run(Trusted(), i32(4), certain, i32(0), torch.ones(1)).tolist() == [3]


def test_rows_that_are_not_there_have_no_experts() -> None:
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0], [math.nan, 5.0]])
    assert run(Present(), weights, i32(0, 7, -1)).tolist() == [[1, 2], [3, 4], [0, 0]]


def test_drafts_hold_up_to_the_first_wrong_one() -> None:
    """All, none, one with a right one behind the wrong one; an idle sequence; one of fewer rows."""
    tokens = i32(9, 1, 2, 9, 0, 3, 9, 5, 7, 9, 1, 1, 9, 4, 4)
    chosen = i32(1, 2, 3, 2, 3, 4, 5, 6, 7, 1, 1, 1, 4, 4, 4)
    said, counts, following = run(Accept(), chosen, tokens, i32(3, 3, 3, 0, 2))
    assert said.reshape(5, 3).tolist() == [[1, 2, 3], [2, -1, -1], [5, 6, -1], [-1, -1, -1], [4, 4, -1]]
    assert lists(counts, following) == [[3, 1, 2, 0, 2], [3, 2, 6, 9, 4]]


@pytest.mark.parametrize("drafts", [(0, 1, 2), (4, 4, 4), (6, 0, 6)])
def test_drafts_do_not_change_what_is_drawn(drafts: tuple[int, ...]) -> None:
    """200,000 draws, four rows a round: whatever is drafted, likely tokens or not, what is said at each place
    has the probabilities of its row, and a draft holds as often as its own probability says.
    """
    rounds, each = 50_000, 1 + len(drafts)
    p = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05])
    rows = torch.stack([p.roll(i) for i in range(each)])
    slots = torch.arange(rounds, dtype=torch.int32).repeat_interleave(each)
    seeds = torch.stack([torch.arange(rounds, dtype=torch.int32), torch.zeros(rounds, dtype=torch.int32)], 1)
    positions = torch.arange(each, dtype=torch.int32).repeat(rounds)
    origin = torch.zeros(rounds, dtype=torch.int32)
    chosen = run(Draw(), rows.repeat(rounds, 1), positions, slots, origin, seeds)
    tokens = i32(3, *drafts).repeat(rounds)
    said, counts, _ = run(Accept(), chosen, tokens, torch.full((rounds,), each, dtype=torch.int32))
    by_place = said.reshape(rounds, each)
    holding = 1.0
    for place in range(each):
        found = by_place[:, place][by_place[:, place] >= 0]
        seen = torch.bincount(found, minlength=7).double()
        expected = rows[place].double() * len(found)
        assert ((seen - expected) ** 2 / expected).sum() < 22.5  # 1 of 1,000 for six degrees of freedom
        assert abs(len(found) / rounds - holding) < 0.02
        holding *= float(rows[place][drafts[place]]) if place < len(drafts) else 1.0
    assert counts.sum() == (said >= 0).sum()


def test_nothing_is_said_behind_a_stop() -> None:
    """In the middle, at the end, in no sequence but its slot's, and where nothing was said."""
    said = i32(1, 2, 3, 4, 5, -1, 1, 2, 3, -1, -1, -1)
    slots = i32(1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0)
    stops = torch.full((2, 8), -1, dtype=torch.int32)
    stops[1, :2] = i32(5, 2)
    kept, counts, following, going = run(Stop(), said, slots, i32(3, 2, 3, 0), i32(3, 5, 3, 9), stops)
    assert kept.reshape(4, 3).tolist() == [[1, 2, -1], [4, 5, -1], [1, 2, 3], [-1, -1, -1]]
    assert lists(counts, following, going) == [[2, 2, 3, 0], [2, 5, 3, 9], [0, 0, 1, 0]]
