"""Sequences come and go in the slots of one plan, and each gets what it gets alone, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import dsv4c
from dsv4c.buckets import ROWS
from dsv4c.errors import SessionError
from dsv4c.numerics.codec import Quantized, Value
from dsv4c.plan.folder import Plan
from dsv4c.runtime.session import Session
from tests.runtime.conftest import CONTEXT

SLOTS, WINDOW = 8, 128  # of the tiny model; its compressors make an entry of 4 and of 128 tokens


def tokens(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(512), k=count)


@pytest.fixture(scope="module")
def shared(checkpoint: Path) -> Plan:
    """Steps of 1, 2, 4 and 8 sequences, steps that verify 4 tokens, chunks of two sizes."""
    sizes = {"batch": (1, 2, 4, 8), "verify": 4, "chunk": (8, 24)}
    return dsv4c.compile(checkpoint, max_context=CONTEXT, draft="mtp", certify=False, **sizes)


@pytest.fixture(scope="module")
def bound(shared: Plan, checkpoint: Path) -> Session:
    return shared.bind(checkpoint, poison=True)


@pytest.fixture
def session(bound: Session) -> Session:
    bound.reset()
    return bound


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> Session:
    """One slot and a chunk as large as the context: what every sequence is compared with, in one call."""
    options = {"batch": 1, "verify": 1, "chunk": CONTEXT, "max_context": CONTEXT, "certify": False}
    return dsv4c.compile(checkpoint, **options).bind(checkpoint)


def logits_of(alone: Session, ids: list[int]) -> Tensor:
    """Logits after every token of a sequence that nobody is beside."""
    alone.reset()
    return alone.prefill(ids)


def slot_bytes(session: Session, slot: int) -> dict[str, list[Tensor]]:
    return {
        name: [part[slot].contiguous().view(-1).view(torch.uint8).clone() for part in parts(value)]
        for name, value in session.executor.states.items()
    }


def parts(value: Value) -> tuple[Tensor, ...]:
    return value.parts if isinstance(value, Quantized) else (value,)


def equal(a: dict[str, list[Tensor]], b: dict[str, list[Tensor]]) -> bool:
    return all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))


# --- sequences together ---


@dataclass
class Guest:
    """A sequence that arrives before step `start`: its prompt, then `forced` tokens one by one."""

    start: int
    prompt: list[int]
    forced: list[int]
    slot: int = -1
    rows: list[Tensor] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.forced


def guests() -> list[Guest]:
    """Eight of different lengths, two more for slots that are left; windows and entries are crossed."""
    lengths = [
        (0, 3, 20),
        (0, 61, 9),
        (1, 126, 12),
        (2, 1, 30),
        (3, 17, 4),
        (4, 24, 18),
        (5, 8, 2),
        (5, 40, 8),
    ]
    lengths += [(12, 5, 10), (14, 30, 6)]
    return [Guest(s, tokens(i, p), tokens(100 + i, f)) for i, (s, p, f) in enumerate(lengths)]


def test_sequences_in_any_slots_and_buckets_get_what_they_get_alone(
    session: Session, alone: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: set[str] = set()
    run = session.executor.run

    def watched(bucket: str, *arguments: object) -> object:
        called.add(bucket)
        return run(bucket, *arguments)

    monkeypatch.setattr(session.executor, "run", watched)
    order = random.Random(5)
    waiting, there, done = guests(), [], []
    free = list(range(SLOTS))
    step = 0
    while waiting or there:
        for guest in [g for g in waiting if g.start <= step]:
            guest.slot = free.pop(order.randrange(len(free)))
            session.reset(guest.slot)
            guest.rows.append(session.prefill(guest.prompt, slot=guest.slot))
            waiting.remove(guest)
            there.append(guest)
        order.shuffle(there)
        at = {g.slot: g.forced[sum(map(len, g.rows)) - len(g.prompt)] for g in there}
        logits = session.decode(at)
        assert logits.isnan().all(1).tolist() == [slot not in at for slot in range(SLOTS)]
        for guest in there:
            guest.rows.append(logits[guest.slot : guest.slot + 1])
        for guest in [g for g in there if sum(map(len, g.rows)) == len(g.ids)]:
            assert session.positions[guest.slot] == len(guest.ids)
            there.remove(guest)
            done.append(guest)
            free.append(guest.slot)
        step += 1
    assert len(done) == 10
    assert called >= {"decode-1", "decode-2", "decode-4", "decode-8", "prefill-24"}
    for guest in done:
        assert torch.equal(torch.cat(guest.rows), logits_of(alone, guest.ids)), len(guest.prompt)


def test_greedy_tokens_together_are_those_alone(session: Session, alone: Session) -> None:
    prompts = {slot: tokens(slot, 3 + 5 * slot) for slot in (6, 1, 3)}
    for slot, prompt in prompts.items():
        session.prefill(prompt, slot=slot)
    chosen = session.steps(12, [3, 6, 1])
    waiting = [slot for slot in range(SLOTS) if slot not in prompts]
    assert (chosen[:, waiting] == -1).all()
    for slot, prompt in prompts.items():
        alone.reset()
        following = int(alone.prefill(prompt)[-1].argmax())
        for row in chosen[:, slot].tolist():
            following = int(alone.decode([following]).argmax())
            assert row == following


@pytest.mark.parametrize("before", [1, 3, 125, 126, 130])
def test_a_verify_step_gives_what_single_steps_give(session: Session, alone: Session, before: int) -> None:
    ids = tokens(9, before + 4)
    session.prefill(ids[:before], slot=5)
    found = session.verify({5: ids[before:]})
    assert list(found) == [5]
    assert torch.equal(found[5], logits_of(alone, ids)[before:])
    assert session.next_tokens == found[5].argmax(1).tolist()
    assert len(session.streams) == 4


@pytest.mark.parametrize(
    ("length", "calls"),
    [
        (1, ["decode-1"]),
        (5, ["prefill-8"]),
        (9, ["prefill-24"]),  # padded up, not 8 and 1
        (24, ["prefill-24"]),
        (25, ["prefill-24", "decode-1"]),
        (61, ["prefill-24", "prefill-24", "prefill-24"]),
    ],
)
def test_a_prompt_takes_the_largest_chunks_and_a_padded_tail(
    session: Session, monkeypatch: pytest.MonkeyPatch, length: int, calls: list[str]
) -> None:
    run, called = session.executor.run, []
    monkeypatch.setattr(session.executor, "run", lambda name, *rest: called.append(name) or run(name, *rest))
    session.prefill(tokens(8, length), slot=3)
    assert called == calls
    assert session.positions[3] == length


def test_the_logits_of_a_prompts_last_token(checkpoint: Path, session: Session) -> None:
    prompt = tokens(4, 61)
    wanted = session.prefill(prompt)[-1:]
    session.reset()
    assert torch.equal(session.prefill(prompt, logits="last"), wanted)
    only_last = dsv4c.compile(
        checkpoint, max_context=CONTEXT, chunk=24, logits="last", verify=1, certify=False
    ).bind(checkpoint)
    last = only_last.prefill(prompt, logits="last")
    assert last.shape == wanted.shape
    assert torch.equal(last, wanted)
    only_last.reset()
    assert torch.equal(only_last.prefill(prompt)[-1:], wanted)  # by other buckets


# --- tokens taken back ---


def compared(session: Session, alone: Session, ids: list[int], slot: int) -> None:
    """What follows in a slot is what follows `ids` alone: a step, a few rows and a chunk."""
    further = tokens(77, 24)
    room = CONTEXT - len(ids)
    pieces = [further[:1], further[1:5], further[5:24]]
    wanted = logits_of(alone, (ids + further)[: len(ids) + min(room, 24)])[len(ids) :]
    found = [session.decode({slot: pieces[0][0]})[slot : slot + 1]]
    found.append(session.verify({slot: pieces[1]})[slot])
    found.append(session.prefill(pieces[2], slot=slot))
    assert torch.equal(torch.cat(found), wanted)


@pytest.mark.parametrize(
    ("kept", "wrong"),
    [
        (0, 1),
        (0, 8),
        (1, 4),
        (3, 1),
        (3, 8),
        (7, 4),
        (120, 8),
        (124, 4),
        (125, 8),
        (127, 1),
        (127, 8),
        (128, 8),
    ],
)
def test_tokens_taken_back_were_never_there(session: Session, alone: Session, kept: int, wrong: int) -> None:
    """Across windows, compressors and entries of both sizes; neighbors keep theirs."""
    ids = tokens(kept, kept)
    session.prefill(tokens(1, 50), slot=4)
    neighbor = slot_bytes(session, 4)
    if ids:
        session.prefill(ids, slot=2)
    for start in range(0, wrong, 4):
        part = tokens(50 + start, min(4, wrong - start))
        session.verify({2: part})
    session.take_back(wrong, slot=2)
    assert session.positions[2] == session.executor.states["position"][2] == kept
    compared(session, alone, ids, 2)
    assert equal(slot_bytes(session, 4), neighbor)


@pytest.mark.parametrize("length", [60, 125, 130, 135])
def test_the_end_of_a_chunk_can_be_taken_back(session: Session, alone: Session, length: int) -> None:
    ids = tokens(3, length)
    session.prefill(ids, slot=0)
    session.take_back(ROWS, slot=0)
    compared(session, alone, ids[:-ROWS], 0)


def test_tokens_are_given_and_taken_back_again_and_again(session: Session, alone: Session) -> None:
    """As a speculative loop does it: each step verifies four tokens and keeps one to four of them."""
    right, taken = tokens(2, 140), 100
    session.prefill(right[:taken], slot=7)
    rows = []
    for kept in (1, 3, 2, 4, 1, 1, 2, 3, 4, 1, 2):
        given = right[taken : taken + kept] + tokens(kept, 4 - kept)
        rows.append(session.verify({7: given})[7][:kept])
        session.take_back(4 - kept, slot=7)
        taken += kept
    assert torch.equal(torch.cat(rows), logits_of(alone, right[:taken])[100:])
    compared(session, alone, right[:taken], 7)


def test_no_more_is_taken_back_than_buffers_hold(session: Session, alone: Session) -> None:
    """Counted from the furthest token that the slot was given, not from where it is."""
    ids = tokens(6, 60)
    session.prefill(ids, slot=1)
    session.take_back(5, slot=1)
    before = session.executor.blocks["state"].clone()
    with pytest.raises(SessionError, match=r"slot 1 was given 60 tokens; it can go back to 52 .*, not to 51"):
        session.take_back(4, slot=1)
    for count, message in ((56, "holds 55 tokens, 56 cannot"), (-1, "-1 cannot"), (True, "True cannot")):
        with pytest.raises(SessionError, match=message):
            session.take_back(count, slot=1)
    assert torch.equal(session.executor.blocks["state"], before)
    session.take_back(3, slot=1)
    compared(session, alone, ids[:52], 1)
    session.reset(1)
    assert session.positions[1] == 0
    with pytest.raises(SessionError, match="holds 0 tokens, 1 cannot be taken back"):
        session.take_back(1, slot=1)


# --- slots kept and copied ---


def test_a_copied_slot_goes_its_own_way(session: Session, alone: Session) -> None:
    ids = tokens(8, 126)
    session.prefill(ids, slot=6)
    session.copy_slot(6, 0)
    assert session.positions == [126, 0, 0, 0, 0, 0, 126, 0]
    assert equal(slot_bytes(session, 0), slot_bytes(session, 6))
    assert torch.equal(session.steps(2, [0])[:, 0], session.steps(2, [6])[:, 6])
    for slot in (0, 6):
        session.take_back(2, slot=slot)
    compared(session, alone, ids, 0)
    compared(session, alone, ids, 6)


def test_a_copy_can_go_back_no_further_than_what_it_is_of(session: Session) -> None:
    session.prefill(tokens(8, 30), slot=6)
    session.take_back(6, slot=6)
    session.copy_slot(6, 0)
    with pytest.raises(SessionError, match="slot 0 was given 30 tokens; it can go back to 22 at most"):
        session.take_back(3, slot=0)


def test_a_slot_moves_by_a_file(
    session: Session, alone: Session, shared: Plan, checkpoint: Path, tmp_path: Path
) -> None:
    ids = tokens(11, 70)
    session.prefill(ids, slot=3)
    wanted = slot_bytes(session, 3)
    path = session.export_slot(tmp_path / "one", slot=3)
    other = shared.bind(checkpoint)
    other.prefill(tokens(12, 90), slot=5)
    kept = slot_bytes(other, 2)
    other.restore_slot(path, slot=5)
    assert other.positions == [0, 0, 0, 0, 0, 70, 0, 0]
    assert equal(slot_bytes(other, 5), wanted)
    assert equal(slot_bytes(other, 2), kept)
    compared(other, alone, ids, 5)
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_a_restored_slot_can_go_back_no_further_than_it_could(
    session: Session, alone: Session, tmp_path: Path
) -> None:
    """Its buffers hold rows that were taken back; a file must not make one forget them."""
    ids = tokens(13, 140)
    session.prefill(ids, slot=3)
    session.take_back(6, slot=3)
    for path, restore in (
        (session.export_slot(tmp_path / "one", slot=3), lambda p: session.restore_slot(p, slot=3)),
        (session.save_state(tmp_path / "all"), session.load_state),
    ):
        restore(path)
        with pytest.raises(SessionError, match="slot 3 was given 140 tokens; it can go back to 132 at most"):
            session.take_back(3, slot=3)
    session.take_back(2, slot=3)
    compared(session, alone, ids[:132], 3)


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], object], str]] = {
    "another plan's": (
        lambda rows, meta: meta.update(plan="0" * 64),
        r"saved with another plan \(000000000000\)",
    ),
    "another form": (lambda rows, meta: meta.update(schema="1"), "is no saved state of this version"),
    "no state": (lambda rows, meta: meta.clear(), "is no saved state of this version"),
    "a bit": (
        lambda rows, meta: rows["position.0"][0].bitwise_xor_(1),
        "is damaged: its bytes are not those",
    ),
    "its reach": (
        lambda rows, meta: rows["position.reached"][0].bitwise_xor_(1),
        "is damaged: its bytes are not those",
    ),
    "an array": (lambda rows, meta: rows.pop("position.0"), r"holds 1 slots in \d+ arrays, expected 1 in"),
    "a slot more": (
        lambda rows, meta: rows.update({n: torch.cat([r, r]) for n, r in rows.items()}),
        r"holds 2 slots in (\d+) arrays, expected 1 in \1",
    ),
    "no slot": (
        lambda rows, meta: rows.update({n: r[:0].clone() for n, r in rows.items()}),
        r"holds 0 slots in (\d+) arrays, expected 1 in \1",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_no_slot_of_this_plan_changes_nothing(
    session: Session, tmp_path: Path, damage: str
) -> None:
    harm, message = DAMAGE[damage]
    session.prefill(tokens(14, 30), slot=1)
    good = session.export_slot(tmp_path / "good", slot=1)
    rows = load_file(good)
    with safe_open(good, "pt") as file:
        metadata = dict(file.metadata())
    harm(rows, metadata)
    save_file(rows, tmp_path / "bad", metadata)
    before = session.executor.blocks["state"].clone()
    with pytest.raises(SessionError, match=message):
        session.restore_slot(tmp_path / "bad", slot=1)
    assert torch.equal(session.executor.blocks["state"], before)
    assert session.positions[1] == 30
    session.restore_slot(good, slot=0)
    assert session.positions[:2] == [30, 30]


def test_the_state_of_all_slots_is_no_slot(session: Session, tmp_path: Path) -> None:
    everything = session.save_state(tmp_path / "all")
    with pytest.raises(SessionError, match=r"holds 8 slots in (\d+) arrays, expected 1 in \1"):
        session.restore_slot(everything)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda s: s.copy_slot(0, 8), "no slot 8; this plan has 0 to 7"),
        (lambda s: s.copy_slot(-1, 0), "no slot -1"),
        (lambda s: s.export_slot("never", slot=8), "no slot 8"),
        (lambda s: s.restore_slot("never", slot=True), "no slot True"),
        (lambda s: s.restore_slot("never"), "never: cannot be read as a saved state"),
        (lambda s: s.export_slot("no/such/folder"), "no/such/folder: the state cannot be written"),
    ],
)
def test_slots_that_there_are_not(
    session: Session,
    request_: Callable[[Session], object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = session.executor.blocks["state"].clone()
    with pytest.raises(SessionError, match=message):
        request_(session)
    assert torch.equal(session.executor.blocks["state"], before)
    assert list(tmp_path.iterdir()) == []
