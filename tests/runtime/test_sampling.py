"""Sequences that are sampled: seeds, stops and penalties belong to the sequence, whatever runs beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4c.compiler.compile import compile
from dsv4c.errors import SessionError
from dsv4c.runtime.sampling import Sampling
from dsv4c.runtime.session import Session

WARM = Sampling(temperature=1.0, seed=7)


@pytest.fixture(scope="module")
def bound(checkpoint: Path) -> Session:
    plan = compile(checkpoint, max_context=96, batch=(1, 4), chunk=8, sampled=True, certify=False)
    return plan.bind(checkpoint, poison=True)


@pytest.fixture
def session(bound: Session) -> Session:
    bound.reset()
    return bound


def say(session: Session, prompt: list[int], count: int, how: Sampling, slot: int = 0) -> list[int]:
    if prompt[:-1]:
        session.prefill(prompt[:-1], slot)
    session.choose(slot, how)
    return session.settle(session.say(count, {slot: prompt[-1]}))[slot]


def test_a_slot_that_asks_for_nothing_takes_the_likeliest(session: Session) -> None:
    greedy = say(session, [3, 17, 5], 4, Sampling())
    session.reset()
    logits = session.prefill([3, 17, 5])
    assert greedy == [int(logits[-1].argmax()), *session.steps(3, [0])[:, 0].tolist()]
    assert say(session, [3, 17, 5], 4, WARM, slot=1) != greedy


def test_a_seed_reproduces_in_any_slot_company_and_portions(session: Session) -> None:
    alone = say(session, [3, 17, 5], 9, WARM)
    session.reset()
    session.prefill([9, 9, 9, 9], 0)
    session.prefill([3, 17], 3)
    session.choose(0, Sampling(temperature=2.0, top_k=5, seed=1))
    session.choose(3, WARM)
    first = session.say(4, {0: 1, 3: 5})
    rest = session.say(5, slots=[3, 0])
    assert session.settle(first)[3] + session.settle(rest)[3] == alone
    assert say(session, [3, 17, 5], 9, Sampling(temperature=1.0, seed=8), slot=1) != alone


def test_nothing_is_said_after_a_stop_and_others_go_on(session: Session) -> None:
    whole = say(session, [3, 17, 5], 9, WARM)
    stop = next(i for i, token in enumerate(whole) if i > 2 and token not in whole[:i])
    session.reset()
    session.prefill([3, 17], 2)
    session.choose(2, WARM, [whole[stop]])
    session.choose(1, WARM, [])
    found = session.settle(session.say(9, {2: 5, 1: 8}))
    assert found[2] == whole[: stop + 1]
    assert len(found[1]) == 9
    assert session.positions == [0, 9, 3 + stop, 0]
    assert session.settle(session.say(3, slots=[2])) == {2: []}
    session.reset(0)
    session.choose(0, WARM)  # the others' rows are untouched by what waits
    assert session.positions[2] == 3 + stop


def test_rows_that_are_taken_back_leave_no_trace(session: Session) -> None:
    lowering = Sampling(temperature=0.8, presence_penalty=3.0, frequency_penalty=1.0, seed=3)
    alone = say(session, [3, 17, 5], 8, lowering)
    session.reset()
    session.prefill([3, 17, 5], 0)
    session.verify({0: [11, 12, 13]})
    session.take_back(4)
    session.choose(0, lowering)
    assert session.settle(session.say(8, {0: 5}))[0] == alone


def test_what_was_said_is_lowered(session: Session) -> None:
    once = Sampling(presence_penalty=100.0)
    said = say(session, [3, 17, 5], 12, once)
    assert len(set(said)) == 12
    repeated = Sampling(frequency_penalty=-100.0)
    session.reset()
    assert len(set(say(session, [3, 17, 5], 12, repeated))) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_k", 2.5),
        ("top_p", 0),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("seed", 1 << 64),
        ("seed", True),
    ],
)
def test_what_cannot_be_asked_for(name: str, value: float) -> None:
    with pytest.raises(SessionError, match=f"{name} is .*, expected a "):
        Sampling(**{name: value})  # type: ignore[arg-type]


def test_a_greedy_plan_refuses_to_sample(checkpoint: Path) -> None:
    plain = compile(checkpoint, max_context=16, chunk=8, verify=1, certify=False).bind(checkpoint)
    plain.choose(0, Sampling())
    with pytest.raises(SessionError, match=r"always takes the likeliest token; .*compile with --sampled"):
        plain.choose(0, WARM)
    assert len(plain.settle(plain.say(3, {0: 5}))[0]) == 3


def test_a_context_is_not_exceeded(session: Session) -> None:
    session.choose(0, WARM)
    with pytest.raises(SessionError, match="97 more exceed the context of 96"):
        session.say(97, {0: 3})
    with pytest.raises(SessionError, match="slot 1 has no next token yet"):
        session.say(1, slots=[1])
    with pytest.raises(SessionError, match="9 tokens that stop, expected at most 8"):
        session.choose(0, WARM, range(9))


def test_log_probabilities_are_the_models_own(session: Session) -> None:
    session.prefill([3, 17])
    session.choose(0, Sampling(temperature=0.5, top_k=1, presence_penalty=50.0))
    said = session.say(1, {0: 5}, best=3)
    (token,) = session.settle(said)[0]
    session.reset()
    known = session.prefill([3, 17, 5])[-1].log_softmax(0)
    (chances,) = said.chances
    assert chances.chosen == pytest.approx(float(known[token]), abs=1e-5)
    assert [i for i, _ in chances.best] == known.topk(3).indices.tolist()
    assert [p for _, p in chances.best] == pytest.approx(known.topk(3).values.tolist(), abs=1e-5)
    with pytest.raises(SessionError, match=r"the 3 best of 2 steps; expected .* of one step"):
        session.say(2, {0: 5}, best=3)
