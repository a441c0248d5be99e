"""Several tokens a step: rounds say what steps say, whatever is drafted, and leave the same behind."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from dsv4c.errors import PlanError, SessionError
from dsv4c.runtime.answer import Done
from dsv4c.runtime.sampling import Sampling
from dsv4c.runtime.session import Session
from dsv4c.types import FP8_WEIGHT, QuantType
from tests.drafting import (
    VOCABULARY,
    Head,
    begin,
    compile_for,
    complete,
    in_rounds,
    kept,
    learned,
    misleading,
    oracle,
    plainly,
    prompts,
    with_given,
)

COUNT = 3
HEADS: tuple[Head, ...] = ("mtp", "dspark")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[Head, Path]:
    root = tmp_path_factory.mktemp("learned")
    return {head: learned(root / head, head) for head in HEADS}


@pytest.fixture(scope="module")
def drafting(weights: dict[Head, Path]) -> dict[Head, Session]:
    """Two sequences that draft for themselves, in steps that sample if they are told to."""
    sizes = {"batch": (1, 2), "chunk": 64, "draft_tokens": COUNT, "sampled": True}
    return {
        head: compile_for(folder, draft=head, draft_confidence=head == "dspark", **sizes)
        for head, folder in weights.items()
    }


@pytest.fixture(scope="module")
def judging(weights: dict[Head, Path]) -> Session:
    return compile_for(weights["mtp"], chunk=24, draft="given", draft_tokens=COUNT)


@pytest.mark.parametrize("head", HEADS)
def test_rounds_say_what_steps_say(drafting: dict[Head, Session], head: Head) -> None:
    session, held = drafting[head], Counter[int]()
    for prompt in prompts(3, 7):
        said, own = in_rounds(session, prompt, 20)
        assert said == plainly(session, prompt, 20)
        held += own
    assert complete(held, COUNT), held


def test_drafts_by_a_copy_of_the_head_change_nothing_but_the_rounds(weights: dict[Head, Path]) -> None:
    session = compile_for(weights["mtp"], recipe="bf16-fp8-drafts", draft="mtp", draft_tokens=COUNT)
    heads = [record for record in session.plan.weights if record["name"].endswith("head")]
    types = {record["name"]: record["type"] for record in heads}
    copy = str(QuantType(FP8_WEIGHT, (VOCABULARY, 128)))
    assert types == {"head": f"bf16[{VOCABULARY},128]", "mtp.0.head": copy}
    said, held = zip(*(in_rounds(session, p, 6) for p in prompts(6, 3)), strict=True)
    assert list(said) == [plainly(session, p, 6) for p in prompts(6, 3)]
    assert sum(held, Counter())[COUNT] > 0


@pytest.mark.parametrize("least", [0.0, 0.3, 0.5, 1.0])
def test_however_many_drafts_are_judged_the_same_is_said(drafting: dict[Head, Session], least: float) -> None:
    """As many as their confidence says: all, none, and between them every number of both judged and held."""
    session, held, judged = drafting["dspark"], Counter[int](), Counter[int]()
    for prompt in prompts(3, 7):
        truth = plainly(session, prompt, 20)
        begin(session, prompt)
        session.trust(0, least)
        said: list[int] = []
        while len(said) < 20:
            anchor = said[-1] if said else prompt[-1]
            confidence = session.draft({0: anchor})[0].confidence
            assert confidence is not None
            most = int((confidence.double().sigmoid().cumprod(0) >= least).int().cumprod(0).sum())
            tokens = session.settle(session.say(1, {0: anchor}, rounds=True))[0]
            assert len(tokens) <= 1 + most
            held[len(tokens) - 1] += 1
            judged[most] += 1
            said += tokens
        assert said[:20] == truth
    assert set(judged) == {0.0: {3}, 1.0: {0}}.get(least, set(judged))
    if least == 0.3:
        assert set(judged) == set(held) == set(range(COUNT + 1)), (judged, held)


def test_each_slot_trusts_its_own_drafts(drafting: dict[Head, Session]) -> None:
    """Of two that draft together one judges all, one none, and neither changes what the other says."""
    session = drafting["dspark"]
    asked = list(prompts(2, 21))
    alone = [plainly(session, prompt, 16) for prompt in asked]
    session.reset()
    for slot, prompt in enumerate(asked):
        begin(session, prompt, slot)
    session.trust(1, 1.0)
    said: dict[int, list[int]] = {0: [], 1: []}
    start = {slot: prompt[-1] for slot, prompt in enumerate(asked)}
    for _ in range(16):
        found = session.settle(session.say(1, start, [] if start else [0, 1], rounds=True))
        start = {}
        for slot, tokens in found.items():
            said[slot] += tokens
    assert said[0][:16] == alone[0]
    assert said[1] == alone[1]
    assert len(said[0]) > 16
    session.reset(1)
    begin(session, asked[1], 1)
    assert len(session.settle(session.say(12, {1: asked[1][-1]}, rounds=True))[1]) > 12  # forgotten


@pytest.mark.parametrize("head", HEADS)
def test_sampled_rounds_say_what_sampled_steps_say(drafting: dict[Head, Session], head: Head) -> None:
    """The same tokens of the same seed: each is drawn by the number of its place, with drafts or without."""
    session, held = drafting[head], Counter[int]()
    for seed, prompt in enumerate(prompts(2, 11)):
        how = Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.1, seed=seed)
        said, own = in_rounds(session, prompt, 20, how)
        begin(session, prompt)
        session.choose(0, how)
        assert said == session.settle(session.say(20, {0: prompt[-1]}))[0]
        held += own
    assert 0 < held[0] < sum(held.values())


def test_given_drafts_change_nothing_but_the_steps(judging: Session) -> None:
    drafters = [oracle(0.3, COUNT, 1), oracle(0.7, COUNT, 2), oracle(1.0, COUNT, 3), misleading(COUNT, 4)]
    held = Counter[int]()
    for prompt, drafter in zip(prompts(4, 5), drafters, strict=True):
        truth = plainly(judging, prompt, 24)
        said, own = with_given(judging, prompt, truth, 16, drafter, COUNT)
        assert said == truth[:16]
        held += own
    assert complete(held, COUNT), held


@pytest.mark.parametrize("start", [3, 127])
def test_rejected_rows_leave_no_trace(judging: Session, weights: dict[Head, Path], start: int) -> None:
    """Around ends of both compressors' windows and of the ring: what later tokens look back to is bit for bit
    as if they had never run, and so are the logits behind.
    """
    made = random.Random(start)
    prompt = made.choices(range(VOCABULARY), k=start)
    truth = [*prompt[-1:], *plainly(judging, prompt, 20)]
    begin(judging, prompt)
    at = 0
    while at < 9:
        share = made.choice([0.0, 0.5, 1.0])
        drafts = oracle(share, made.randint(1, COUNT), made.randrange(99))(truth[at + 1 :])
        at += len(judging.accept({0: [truth[at], *drafts]})[0])
    found = kept(judging, 0)
    logits = judging.decode({0: truth[at]})
    begin(judging, prompt)
    for token in truth[:at]:
        judging.decode({0: token})
    for name, rows in kept(judging, 0).items():
        assert torch.equal(rows, found[name]), name
    assert torch.equal(judging.decode({0: truth[at]}), logits)


def test_two_sequences_draft_together(drafting: dict[Head, Session]) -> None:
    """Each as alone, one of them stopping on its way; and a slot that was copied drafts as its original."""
    session = drafting["dspark"]
    first, second = list(prompts(2, 21))
    alone = [plainly(session, prompt, 16) for prompt in (first, second)]
    session.reset()
    for slot, prompt in enumerate((first, second)):
        begin(session, prompt, slot)
    stop = alone[0][9]
    session.choose(0, Sampling(), [stop])
    said: dict[int, list[int]] = {0: [], 1: []}
    start = {0: first[-1], 1: second[-1]}
    for _ in range(8):
        found = session.settle(session.say(2, start, [] if start else [0, 1], rounds=True))
        start = {}
        for slot, tokens in found.items():
            said[slot] += tokens
    stopped = alone[0].index(stop) + 1
    assert said[0] == alone[0][:stopped]
    assert said[1][:16] == alone[1]
    assert session.positions == [len(first) - 1 + stopped, len(second) - 1 + len(said[1])]
    session.copy_slot(1, 0)
    anchor = said[1][-1]
    drafts = session.draft({0: anchor, 1: anchor})
    assert drafts[0].tokens == drafts[1].tokens
    assert torch.equal(drafts[0].logits, drafts[1].logits)


def test_several_answers_draft_together(drafting: dict[Head, Session]) -> None:
    """Two sequences at once: tokens are those without drafts, and both said some in rounds."""
    session = drafting["mtp"]
    asked = list(prompts(2, 31))
    how = {"sampling": Sampling(), "max_new_tokens": 18}
    drafted, plain = (
        [event for event in session.generate(asked, drafting=on, **how) if isinstance(event, Done)]
        for on in (True, False)
    )
    assert {done.sequence: done.ids for done in drafted} == {done.sequence: done.ids for done in plain}
    assert all(sum(done.accepted) > 0 for done in drafted)
    assert not any(done.accepted for done in plain)


def test_confidence_is_dsparks_alone(drafting: dict[Head, Session]) -> None:
    for head, session in drafting.items():
        session.reset()
        session.prefill([3, 17])
        (drafts,) = session.draft({0: 5}).values()
        assert len(drafts.tokens) == COUNT
        assert drafts.logits.argmax(1).tolist() == drafts.tokens
        assert (drafts.confidence is not None) == (head == "dspark")
        assert session.positions[0] == 2


def test_the_context_ends_where_a_round_no_longer_fits(drafting: dict[Head, Session]) -> None:
    session = drafting["mtp"]
    session.reset()
    session.prefill([1] * 509)
    with pytest.raises(SessionError, match="4 more exceed the context of 512"):
        session.say(1, {0: 3}, rounds=True)
    answers = session.generate([1] * 100, max_new_tokens=17, sampling=Sampling())
    (done,) = [event for event in answers if hasattr(event, "accepted")]
    plain = session.generate([1] * 100, max_new_tokens=17, sampling=Sampling(), drafting=False)
    *_, wanted = plain
    assert done.ids == wanted.ids
    assert wanted.accepted == ()
    assert sum(done.accepted) < 17


def test_what_cannot_be_asked(judging: Session, drafting: dict[Head, Session]) -> None:
    judging.reset()
    with pytest.raises(SessionError, match="no bucket of the plan drafts for 1 slots together"):
        judging.say(1, {0: 3}, rounds=True)
    with pytest.raises(PlanError, match="has no bucket 'draft'"):
        judging.draft({0: 3})
    with pytest.raises(SessionError, match="accept got 5 tokens of 1 slots; no bucket of the plan judges"):
        judging.accept({0: [1, 2, 3, 4, 5]})
    with pytest.raises(SessionError, match="its drafts come with no confidence, so that all of a round"):
        judging.trust(0, 0.5)
    with pytest.raises(SessionError, match=r"judged from 1\.5 on, expected a probability of 0 to 1"):
        drafting["dspark"].trust(0, 1.5)
    judging.trust(0, 0)
    assert judging.positions == [0]
    assert drafting["mtp"].rounds(3) == 0
