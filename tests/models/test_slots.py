"""Sequences come and go in any slots, in calls of any shape, and each is as if it were alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4c.buckets import ROWS, Bucket
from dsv4c.numerics import codec
from dsv4c.numerics.codec import Quantized
from dsv4c.reference.interpret import clone
from tests.goldens import Recorded, recorded
from tests.interpreted import Model, padded_all

SLOTS = 5
CASES = {"fp32": "fp32", "official": "official-quant"}  # by recipe


@pytest.fixture(scope="module")
def case() -> Recorded:
    return recorded("fp32")


def bits(value: codec.Value) -> list[Tensor]:
    parts = value.parts if isinstance(value, Quantized) else (value,)
    return [part.contiguous().view(torch.uint8) for part in parts]


def prefilled(recipe: str, ids: list[int], slot: int) -> Model:
    """A model that has taken `ids` in that slot."""
    model = Model(recorded(CASES[recipe]).folder, recipe, slots=SLOTS)
    for start in range(0, len(ids), 64):
        model.call("prefill", padded_all({slot: ids[start : start + 64]}, 1, 64))
    return model


def test_sequences_that_come_and_go(case: Recorded) -> None:
    """Prompts by chunks of every kind, decode steps together; each sequence as it was recorded alone."""
    runs = {3: case.run("p128"), 0: case.run("short"), 4: case.run("one")}
    model = Model(case.folder, "fp32", slots=SLOTS)
    untouched = {name: [bits(value)[0][1:3].clone()] for name, value in model.states.items()}
    logits: dict[int, list[Tensor]] = {slot: [] for slot in runs}
    shapes = {3: Bucket("prefill", 1, 50), 0: Bucket("prefill", 3, 2), 4: Bucket("verify", 2, ROWS)}
    for slot, bucket in shapes.items():
        prompt = runs[slot].ids[: runs[slot].prefill]
        for start in range(0, len(prompt), bucket.tokens):
            part = prompt[start : start + bucket.tokens]
            rows = model.call(bucket, padded_all({slot: part}, bucket.sequences, bucket.tokens))["logits"]
            logits[slot].append(rows[: len(part)])
    rest = {slot: list(run.ids[run.prefill :]) for slot, run in runs.items()}
    while any(rest.values()):
        step = {slot: [ids.pop(0)] for slot, ids in rest.items() if ids}
        rows = model.call(Bucket("decode", 4), padded_all(step, 4, 1))["logits"]
        for row, slot in zip(rows, step, strict=False):
            logits[slot].append(row[None])
    for slot, run in runs.items():
        distances = case.distances(f"{run.name}.logits", torch.cat(logits[slot]))
        assert distances.max() <= case.tolerance["logits_rel_l2_per_position"]
        assert model.states["position"][slot] == len(run.ids)
    for name, (before,) in untouched.items():
        assert torch.equal(bits(model.states[name])[0][1:3], before), name


@pytest.mark.parametrize("recipe", CASES)
def test_neighbors_and_slots_change_no_bit(recipe: str) -> None:
    """A decode step alone in slot 0, and among others in slot 3 of a larger bucket."""
    ids = list(recorded(CASES[recipe]).run().ids)
    alone, among = prefilled(recipe, ids[:130], 0), prefilled(recipe, ids[:130], 3)
    among.call("prefill", padded_all({1: ids[7:60]}, 1, 64))
    for token in ids[130:134]:
        expected = alone.call("decode", padded_all({0: [token]}, 1, 1))
        found = among.call(Bucket("decode", 4), padded_all({1: [5], 3: [token], 2: [9]}, 4, 1))
        assert torch.equal(found["logits"][1], expected["logits"][0])
        assert torch.equal(found["streams"][1], expected["streams"][0])


@pytest.mark.parametrize("recipe", CASES)
@pytest.mark.parametrize(
    ("taken", "kept"),
    [(0, 1), (2, 1), (125, 3), (127, 1), (143, 2), (200, 7)],
)
def test_rows_taken_back_leave_no_trace(recipe: str, taken: int, kept: int) -> None:
    """A verify step of 8 of which the first `kept` stay: `position -= 8 - kept`, and all that follows is
    bit for bit what it is where the others were never given; by one token, a few, and a chunk.
    """
    ids, wrong = list(recorded(CASES[recipe]).run().ids), [3, 1, 4, 1, 5, 9, 2, 6]
    verify, slot = Bucket("verify", 1, ROWS), 2
    clean, model = prefilled(recipe, ids[:taken], slot), prefilled(recipe, [], slot)
    model.states = {name: clone(value) for name, value in clean.states.items()}
    given = ids[taken : taken + kept]
    expected = clean.call(verify, padded_all({slot: given}, 1, ROWS))["logits"][:kept]
    found = model.call(verify, padded_all({slot: [*given, *wrong[kept:]]}, 1, ROWS))["logits"][:kept]
    assert torch.equal(found, expected)
    model.states["position"][slot] -= ROWS - kept
    place = taken + kept
    for bucket in (Bucket("decode"), verify, Bucket("prefill", tokens=20), Bucket("decode")):
        inputs = padded_all({slot: ids[place : place + bucket.tokens]}, 1, bucket.tokens)
        place += bucket.tokens
        expected, found = (each.call(bucket, inputs)["logits"] for each in (clean, model))
        assert expected.isfinite().all()
        assert torch.equal(found, expected), bucket.name


@pytest.mark.parametrize("tokens", [4, 20])
def test_the_logits_of_the_last_tokens(case: Recorded, tokens: int) -> None:
    """What the same call says of every row, at each sequence's last one; zeros for an idle sequence."""
    ids = list(case.run().ids)
    inputs = padded_all({2: ids[:tokens], 0: ids[5:8]}, 3, tokens)
    whole = Model(case.folder, "fp32", slots=SLOTS).call(Bucket("prefill", 3, tokens), inputs)
    last = Model(case.folder, "fp32", slots=SLOTS).call(Bucket("prefill", 3, tokens, "last"), inputs)
    rows = [tokens - 1, tokens + 2]
    torch.testing.assert_close(last["logits"][:2], whole["logits"][rows], rtol=1e-6, atol=1e-6)
    assert torch.equal(last["next"][:2], whole["next"][rows])
    assert not last["logits"][2].any()
    assert torch.equal(last["streams"][: tokens + 3], whole["streams"][: tokens + 3])


def test_drafts_of_two_sequences(case: Recorded) -> None:
    """Behind prompts of different lengths, in two slots at once, against what was recorded of one."""
    run, expected = case.run(), case.tensors["mtp.logits"].double()
    model = Model(case.folder, "fp32", slots=SLOTS)
    places = {1: 60, 4: 131}
    for tokens in (24, 7, 100):  # calls of both kinds
        held = model.states["position"].tolist()
        part = {s: run.ids[held[s] : min(held[s] + tokens, p)] for s, p in places.items()}
        model.call(Bucket("prefill", 2, tokens), padded_all(part, 2, tokens))
    assert [model.states["position"][s] for s in places] == list(places.values())
    inputs = padded_all({s: [run.ids[p]] for s, p in places.items()}, 2, 1)
    logits = model.call(Bucket("draft", 2, 1), inputs)["logits"].double()
    for found, place in zip(logits, places.values(), strict=True):
        wanted = expected[place - 1]
        assert (found - wanted).norm() <= case.tolerance["logits_rel_l2_per_position"] * wanted.norm()
