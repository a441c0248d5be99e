"""Choosing the next token: against recorded probabilities, known random numbers, and what frequencies say."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dsv4c.ir.ops.sample import KNOBS, STOPS, Draw, Emit, Penalize, TokenProbabilities
from dsv4c.reference import run
from dsv4c.reference.sample import philox
from dsv4c.runtime.sampling import Sampling
from tests.goldens import golden_case

CASE = json.loads((golden_case("sampling") / "case.json").read_text())
EXPECTED = load_file(golden_case("sampling") / "expected.safetensors")


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def probabilities(logits: Tensor, said: list[list[int]], knobs: list[Sampling], origin: int = 0) -> Tensor:
    """What each row is drawn from: in slot n after the tokens `said[n]`, those from `origin` on its own."""
    rows = len(logits)
    history = torch.zeros(rows, max(1, *map(len, said)), dtype=torch.int32)
    for n, ids in enumerate(said):
        history[n, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    slots, table = i32(*range(rows)), torch.tensor([k.knobs for k in knobs])
    at, first = i32(*(len(ids) - 1 for ids in said)), torch.full((rows,), origin, dtype=torch.int32)
    lowered = run(Penalize(), logits, history, at, slots, first, table)
    made = run(TokenProbabilities(), lowered, slots, table)
    assert isinstance(made, Tensor)
    return made


@pytest.mark.parametrize("given", CASE["parameter_sets"], ids=lambda given: given["name"])
def test_recorded_probabilities(given: dict[str, Any]) -> None:
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    knobs = [Sampling(**{n: given[n][row] for n in names}) for row in range(4)]
    found = probabilities(EXPECTED["logits"], CASE["previous_ids"], knobs)
    expected = EXPECTED[f"probs.{given['name']}"]
    assert (found.double() - expected).abs().max() <= CASE["tolerance"]["probs_abs"]
    assert (found > 0).sum(1).tolist() == EXPECTED[f"kept.{given['name']}"].tolist()


def test_penalties_of_the_sequences_own_tokens() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.0]])
    knobs = [Sampling(temperature=1, repetition_penalty=2, presence_penalty=0.25, frequency_penalty=0.5)]
    found = probabilities(logits, [[2, 0, 1, 1]], knobs, origin=2)
    lowered = torch.tensor([[1.0, -2.0 - 0.25 - 2 * 0.5, 0.25, 0.0]])  # 0 and 2 are of the prompt
    assert torch.allclose(found, lowered.softmax(1))


def test_min_p_goes_by_the_largest() -> None:
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    found = probabilities(p.log(), [[]], [Sampling(temperature=1, min_p=0.4)])
    assert torch.allclose(found, torch.tensor([[0.625, 0.375, 0.0, 0.0]]))


def test_equals_stay_together_and_the_lowest_is_the_likeliest() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    assert probabilities(logits, [[]], [Sampling(temperature=1, top_k=1)]).tolist() == [[0, 0.5, 0.5, 0]]
    assert probabilities(logits, [[]], [Sampling()]).tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize(
    ("seed", "index", "word"), [(0, 0, 0x6627E8D5), (0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF, None), (7, 1, None)]
)
def test_random_numbers(seed: int, index: int, word: int | None) -> None:
    """The first is published with the generator; others are computed here with whole numbers."""
    expected = plain_philox(seed, index)
    assert word in (None, expected)
    halves = [(seed >> shift & 0xFFFFFFFF) for shift in (0, 32)]
    seeds = torch.tensor([[h - (h >> 31 << 32) for h in halves]], dtype=torch.int32)
    assert philox(seeds, torch.tensor([index])).tolist() == [expected]


def plain_philox(seed: int, index: int) -> int:
    counter, key = [index, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        one, two = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            two >> 32 ^ counter[1] ^ key[0],
            two & 0xFFFFFFFF,
            one >> 32 ^ counter[3] ^ key[1],
            one & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter[0]


def test_200_000_draws_are_as_frequent_as_they_should_be() -> None:
    p = torch.tensor([0.25, 0.0, 0.2, 0.001, 0.149, 0.1, 0.3])
    count = 200_000
    at, zeros = torch.arange(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
    for seed in (1, 2):
        drawn = run(Draw(), p.expand(count, -1), at, zeros, i32(0), i32(seed, 5)[None])
        assert isinstance(drawn, Tensor)
        counts = torch.bincount(drawn.long(), minlength=len(p)).double()
        assert counts[1] == 0
        kept = p > 0
        chi_square = ((counts - p * count) ** 2 / (p * count))[kept].sum()
        assert chi_square < 22.46  # 5 degrees of freedom: exceeded once in 2,300 seeds


def test_a_row_draws_the_same_in_any_slot() -> None:
    p = torch.rand(3, 50, generator=torch.Generator().manual_seed(1))
    seeds = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int32)
    at, origin = i32(9, 4, 30), i32(2, 3, 30)
    together = run(Draw(), p, at, i32(0, 1, 2), origin, seeds)
    assert isinstance(together, Tensor)
    for n in range(3):
        alone = run(Draw(), p[n : n + 1], at[n : n + 1] + 7, i32(0), origin[n : n + 1] + 7, seeds[n : n + 1])
        assert isinstance(alone, Tensor)
        assert int(alone) == int(together[n])


def test_a_stop_ends_a_sequence_and_what_is_over_says_nothing() -> None:
    stops = torch.full((2, STOPS), -1, dtype=torch.int32)
    stops[1, :2] = i32(7, 3)
    said, going = run(Emit(), i32(7, 3, 4, 9), i32(1, 1, 1, 0), i32(0, 1, 1, 0), stops)
    assert isinstance(said, Tensor)
    assert isinstance(going, Tensor)
    assert (said.tolist(), going.tolist()) == ([7, 3, 4, -1], [1, 0, 1, 0])


def test_knobs_of_what_is_asked_for() -> None:
    assert dict(zip(KNOBS, Sampling().knobs, strict=True)) == dict.fromkeys(KNOBS, 0)
    asked = Sampling(temperature=0.6, top_p=0.95, repetition_penalty=1.1)
    assert asked.knobs == [0.6, 0, 0.95, 0, 1.1, 0, 0]
