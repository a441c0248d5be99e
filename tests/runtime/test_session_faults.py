"""What a session must not pass on: another state's results, another thread's bytes, what is no number."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dsv4c
from dsv4c.errors import SessionError
from dsv4c.models.synth import synthesize
from dsv4c.numerics.codec import view
from dsv4c.runtime.generate import generate
from dsv4c.runtime.session import Session
from dsv4c.types import BF16, TensorType

PROMPT = [(7 * i * i + 3 * i + 1) % 512 for i in range(30)]


@pytest.fixture(scope="module")
def bound(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A sliding-window layer and a CSA layer, three slots, chunks of 8 tokens."""
    layers = {"num_layers": 2, "compress_ratios": (0, 4), "num_hash_layers": 0, "mtp_layers": 0}
    model = replace(dsv4c.load_config("tiny"), **layers)  # type: ignore[arg-type]
    folder = synthesize(model, tmp_path_factory.mktemp("faults") / "weights", seed=5)
    return dsv4c.compile(folder, batch=3, max_context=96, chunk=8, certify=False).bind(folder)


@pytest.fixture
def session(bound: Session) -> Session:
    bound.reset()
    return bound


@pytest.mark.parametrize("how", ["load_state", "restore_slot", "reset", "reset(1)"])
def test_streams_and_next_tokens_are_never_those_of_another_state(
    session: Session, tmp_path: Path, how: str
) -> None:
    session.prefill(PROMPT[:4])
    kept, slot = session.save_state(tmp_path / "kept"), session.export_slot(tmp_path / "slot")
    assert len(session.next_tokens) == 4  # saving changes nothing
    session.prefill(PROMPT[5:9])
    {
        "load_state": lambda: session.load_state(kept),
        "restore_slot": lambda: session.restore_slot(slot),
        "reset": session.reset,
        "reset(1)": lambda: session.reset(1),
    }[how]()
    with pytest.raises(SessionError, match="no next tokens yet"):
        _ = session.next_tokens
    with pytest.raises(SessionError, match="no streams yet"):
        _ = session.streams


def test_a_prompt_that_is_cut_off_between_chunks_leaves_its_slot_reset(session: Session) -> None:
    expected = session.prefill(PROMPT)
    session.reset()
    session.prefill(PROMPT[:3], 1)
    seen = []

    def progress(done: int, all_: int) -> None:
        seen.append((done, all_))
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupt:
        session.prefill(PROMPT, progress=progress)
    assert interrupt.value.__notes__ == ["slot 0 was reset: 16 of 30 tokens had gone in"]
    assert session.positions == [0, 3, 0]
    assert torch.equal(session.prefill(PROMPT, progress=lambda *at: seen.append(at)), expected)
    assert seen == [(8, 30), (16, 30), (8, 30), (16, 30), (24, 30), (30, 30)]


def test_a_prompt_beyond_the_context_is_refused_before_its_first_chunk(session: Session) -> None:
    with pytest.raises(SessionError, match="slot 0 holds 0 tokens; 97 more exceed the context of 96"):
        session.prefill([1] * 97, progress=lambda *_: pytest.fail("a chunk went in"))
    assert session.positions == [0, 0, 0]


def test_threads_that_share_a_session_wait_for_each_other(session: Session) -> None:
    serial = [session.prefill(PROMPT) for _ in range(3)]
    session.reset()
    gate, found = threading.Barrier(3), []

    def work() -> None:
        gate.wait()
        found.append(session.prefill(PROMPT))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert session.positions == [90, 0, 0]
    assert all(any(torch.equal(logits, one) for one in serial) for logits in found)
    assert len(found) == 3


@pytest.fixture
def overflowing(session: Session) -> Iterator[Session]:
    """A session whose last norm overflows, with weights that are finite, every one."""
    place = next(w for w in session.plan.weights if w["name"] == "norm")
    offset = next(c["offset"] for c in place["components"] if c["name"] == "data")
    gain = view(session.executor.blocks["weights"], TensorType(BF16, (256,)), offset)
    assert isinstance(gain, Tensor)
    kept = gain.clone()
    gain.fill_(3e38)
    yield session
    gain.copy_(kept)


REQUESTS: dict[str, Callable[[Session], object]] = {
    "prefill": lambda s: s.prefill(PROMPT),
    "decode": lambda s: s.decode([PROMPT[0], None, None]),
    "verify": lambda s: s.verify({0: PROMPT[:4]}),
    "generate": lambda s: generate(s, PROMPT, [5], 4),
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_logits_that_are_no_numbers_are_no_result(
    overflowing: Session, request_: Callable[[Session], object], tmp_path: Path
) -> None:
    session = overflowing
    refused = r"the logits of slot 0 are not finite \(NaN or infinity\).* call reset\(0\)"
    with pytest.raises(SessionError, match=refused):
        request_(session)
    for action in (
        lambda: session.prefill([1]),
        lambda: session.decode({0: 1, 1: 2}),
        lambda: session.save_state(tmp_path / "state"),
        lambda: session.export_slot(tmp_path / "slot"),
        lambda: session.copy_slot(0, 1),
    ):
        with pytest.raises(SessionError, match=refused):
            action()
    with pytest.raises(SessionError, match="no next tokens"):
        _ = session.next_tokens
    assert not list(tmp_path.iterdir())
    session.export_slot(tmp_path / "other", slot=2)  # which has nothing to do with it
    session.reset(0)
    session.export_slot(tmp_path / "slot")


def test_greedy_steps_that_overflow_are_told(overflowing: Session) -> None:
    overflowing._followed[0], overflowing._following[0] = True, PROMPT[0]  # as after a call that was finite
    with pytest.raises(SessionError, match=r"the logits of slot 0 are not finite"):
        overflowing.steps(2, [0])
    with pytest.raises(SessionError, match=r"the logits of slot 0 are not finite"):
        overflowing.enqueue(1, [0])
