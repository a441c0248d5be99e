"""Answers event by event, of a session that says what it is told to: texts, reasoning, calls, every end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv4c.buckets import ROWS
from dsv4c.errors import PromptError, SessionError
from dsv4c.models.encoding.marks import DSML, END, THOUGHT
from dsv4c.models.encoding.rules import PREVIEW
from dsv4c.models.encoding.tokenizer import Tokenizer
from dsv4c.runtime.answer import (
    Answers,
    Done,
    Event,
    Memory,
    Reasoning,
    StopTexts,
    Token,
    ToolCalled,
    asks_of,
    check_tokenizer,
    generation_defaults,
)
from dsv4c.runtime.sampling import Sampling
from tests.words import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("words")
    write_tokenizer(folder)
    return Tokenizer.open(folder)


class Scripted:
    """Stands in for a session: says given ids, one step at a time, until a stop; counts what it reads."""

    device = torch.device("cpu")
    max_context, vocab_size, launches, gives_last = 400, 512, 84, True
    plan = SimpleNamespace(config={"bos_token_id": 0, "eos_token_id": 1})

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.memories = [Memory() for _ in range(3)]
        self.positions = [0] * 3
        self.read: list[int] = []
        self.script: dict[int, Iterator[int]] = {}
        self.stops: dict[int, Sequence[int]] = {}

    def tell(self, *texts: str) -> None:
        """What the sequences of the next call say, up to their last token."""
        self.script = {slot: iter(self.tokenizer.encode(text)) for slot, text in enumerate(texts)}

    def check_tokens(self, tokens: Sequence[int]) -> list[int]:
        return list(tokens)

    def keep(self, count: int, slot: int) -> int:
        held = self.positions[slot]
        self.positions[slot] = count if count <= held <= count + 8 else 0
        return self.positions[slot]

    def prefill(self, ids: Sequence[int], slot: int, *, logits: str) -> None:
        self.positions[slot] += len(ids)
        self.read += ids

    def choose(self, slot: int, sampling: Sampling, stops: Sequence[int]) -> None:
        self.stops[slot] = stops

    def trust(self, slot: int, least: float) -> None:
        assert least == 0.0

    def say(
        self, count: int, tokens: Mapping[int, int], slots: Sequence[int], *, best: int | None, rounds: bool
    ) -> SimpleNamespace:
        assert count == 1
        assert not rounds
        return SimpleNamespace(slots=[*tokens, *slots], chances=[], each=1)

    def rounds(self, slots: int) -> int:
        return 0

    def settle(self, said: SimpleNamespace) -> dict[int, list[int]]:
        for slot in said.slots:
            self.positions[slot] += 1
        return {slot: [next(self.script[slot])] for slot in said.slots}


@pytest.fixture
def session(tokenizer: Tokenizer) -> Scripted:
    return Scripted(tokenizer)


def answers(session: Scripted, given: Any, limit: int | None = None, stop: Sequence[str] = ()) -> Answers:
    """As `Session.generate` makes them; a leading space asks for thinking."""
    thinking = isinstance(given, str) and given.startswith(" ")
    asks = asks_of(given, thinking, Sampling(), limit, stop)
    return Answers(session, asks, session.tokenizer, PREVIEW, range(len(asks)))  # type: ignore[arg-type]


def text_of(events: Sequence[Event], kind: type[Token]) -> str:
    return "".join(e.text for e in events if type(e) is kind)


def done_of(events: Sequence[Event]) -> Done:
    (done,) = [e for e in events if isinstance(e, Done)]
    assert events[-1] is done
    return done


def test_a_token_is_an_event_and_the_last_one_is_not_shown(session: Scripted) -> None:
    session.tell(f"Hi there.{END}")
    events = list(answers(session, "Hello"))
    assert text_of(events, Token) == "Hi there."
    done = done_of(events)
    assert (done.reason, done.malformed, done.launches) == ("stop", "", 84)
    assert done.message is not None
    assert done.message.content == "Hi there."
    assert [i for e in events if isinstance(e, Token) for i in e.ids] == list(done.ids[:-1])
    assert done.ids[-1] == session.tokenizer.id_of(END)
    assert done.prompt_tokens == done.read == len(session.read) + 1


def test_a_character_split_over_tokens_comes_whole(session: Scripted) -> None:
    session.tell(f"a€é{END}")
    events = list(answers(session, "Hello"))
    texts = [e.text for e in events if isinstance(e, Token)]
    assert texts == ["a", "", "", "€", "", "é"]


def test_reasoning_then_an_answer_then_a_call(session: Scripted) -> None:
    call = f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n<{DSML}parameter name="n" string="false">3'
    close = f"</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>"
    session.tell(f"Hm.{THOUGHT}Look.{call}{close}{END}")
    events = list(answers(session, " Think"))
    assert text_of(events, Reasoning) == "Hm."
    assert text_of(events, Token) == "Look."
    assert [e for e in events if isinstance(e, ToolCalled)] == [ToolCalled(0, "f", '{"n": 3}')]
    assert done_of(events).malformed == ""


def test_reasoning_without_an_end_is_kept_and_said_to_be_malformed(session: Scripted) -> None:
    session.tell(f"Hm.{END}")
    done = done_of(list(answers(session, " Think")))
    assert done.message is not None
    assert (done.message.reasoning_content, done.message.content) == ("Hm.", "")
    assert f"the reasoning ends without {THOUGHT}" in done.malformed


def test_a_text_that_stops_is_found_across_tokens_and_not_shown(session: Scripted) -> None:
    session.tell(f"One. Two. Three.{END}")
    events = list(answers(session, "Count", stop=["o. T", "zzz"]))
    assert text_of(events, Token) == "One. Tw"
    assert done_of(events).reason == "stop_string"


def test_what_may_become_a_stop_is_shown_when_it_does_not() -> None:
    stops = StopTexts(["abcd"])
    assert [stops.feed(part) for part in ("xab", "c", "abc")] == [("x", False), ("", False), ("abc", False)]
    assert stops.feed("d!") == ("", True)
    assert StopTexts([]).feed("abc") == ("abc", False)


def test_an_answer_is_cut_off_and_an_interrupt_keeps_what_was_said(session: Scripted) -> None:
    session.tell(f"abcdef{END}")
    done = done_of(list(answers(session, "Go", limit=3)))
    assert (done.reason, len(done.ids)) == ("length", 3)
    assert done.message is not None
    assert done.message.content == "abc"
    session.tell(f"abcdef{END}")
    going = answers(session, "Go")
    events = [next(going), next(going)]
    going.stop()
    events += going
    done = done_of(events)
    assert done.reason == "interrupted"
    assert done.message is not None
    assert done.message.content == text_of(events, Token) == "ab"


def test_sequences_end_on_their_own(session: Scripted) -> None:
    session.tell(f"a{END}", f"bcd{END}", f"ef{END}")
    events = list(answers(session, ["One", "Two", "Three"], limit=3))
    by_sequence = {e.sequence: e for e in events if isinstance(e, Done)}
    assert [by_sequence[n].reason for n in range(3)] == ["stop", "length", "stop"]
    assert [e.sequence for e in events if isinstance(e, Done)] == [0, 1, 2]
    texts = ["".join(e.text for e in events if isinstance(e, Token) and e.sequence == n) for n in range(3)]
    assert texts == ["a", "bcd", "ef"]


def test_a_conversation_goes_on_on_the_ids_that_were_sampled(session: Scripted) -> None:
    """The model says `there` in letters, for which the tokenizer has pairs."""
    letters = [i for letter in "there" for i in session.tokenizer.encode(letter)]
    assert letters != session.tokenizer.encode("there")
    end = session.tokenizer.id_of(END)
    assert end is not None
    session.script = {0: iter([*letters, end])}
    messages = [{"role": "user", "content": "Where?"}]
    first = done_of(list(answers(session, messages)))
    assert first.message is not None
    session.read.clear()
    session.tell(f"Yes.{END}")
    messages = [*messages, first.message.to_json(), {"role": "user", "content": "Sure?"}]
    second = done_of(list(answers(session, messages)))
    assert session.memories[0].ids[first.prompt_tokens :][: len(first.ids)] == list(first.ids)
    assert second.prompt_tokens - second.read == first.prompt_tokens + len(first.ids) - 1
    assert len(session.read) == second.read - 1


class Ahead(Scripted):
    """The same on a GPU: steps in portions, whose order with what is read of them it keeps."""

    device = torch.device("cuda")

    def say(
        self, count: int, tokens: Mapping[int, int], slots: Sequence[int], *, best: int | None, rounds: bool
    ) -> SimpleNamespace:
        self.order = [*getattr(self, "order", []), f"say {count}"]
        self.said = getattr(self, "said", 0) + count
        self.ahead = max(getattr(self, "ahead", 0), self.said)
        return SimpleNamespace(slots=[*tokens, *slots], chances=[], each=1, count=count)

    def settle(self, said: SimpleNamespace) -> dict[int, list[int]]:
        self.order.append("read")
        self.said -= said.count
        self.positions[0] += said.count
        return {0: list(islice(self.script[0], said.count))}


def test_on_a_gpu_a_portion_is_enqueued_before_the_one_ahead_is_read(tokenizer: Tokenizer) -> None:
    session = Ahead(tokenizer)
    session.tell(f"{'abcdefgh' * 3}{END}")
    events = list(answers(session, "Go", limit=18))
    assert len(done_of(events).ids) == 18
    assert session.order == ["say 4", *["say 4", "read"] * 3, "say 2", "read", "read"]
    assert session.ahead <= ROWS


def test_another_conversation_is_read_from_its_start(session: Scripted) -> None:
    session.tell(f"Yes.{END}")
    list(answers(session, "Where?"))
    session.tell(f"No.{END}")
    assert done_of(list(answers(session, "There?"))).read > 4


def test_prompts_that_cannot_be() -> None:
    for given, error, message in (
        ("", PromptError, "the prompt is empty"),
        (7, PromptError, "found 7, expected a text, messages"),
        ([{"role": "bot"}], PromptError, "messages.0..role is 'bot'"),
    ):
        with pytest.raises(error, match=message):
            asks_of(given, False, Sampling(), None, ())
    with pytest.raises(SessionError, match="max_new_tokens is 0"):
        asks_of("Hi", False, Sampling(), 0, ())
    with pytest.raises(SessionError, match="2 ways to sample for 1 sequences"):
        asks_of("Hi", False, [Sampling()] * 2, None, ())


def test_a_prompt_that_leaves_no_room_is_refused_before_it_is_read(session: Scripted) -> None:
    with pytest.raises(SessionError, match=r"the prompt has 1,\d+ tokens, the context room for 400"):
        answers(session, "x" * 1000)
    assert session.read == []


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"has no tokenizer\.json"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(PromptError, match="is no tokenizer"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(PromptError, match="a pointer of Git LFS"):
        Tokenizer.open(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(PromptError, match=r"has ids up to .*, the model only to 299"):
        check_tokenizer(Tokenizer.open(tmp_path), {"vocab_size": 300})
    with pytest.raises(PromptError, match="is 1 there, 2 in the model's config"):
        check_tokenizer(Tokenizer.open(tmp_path), {"vocab_size": 512, "eos_token_id": 2})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, {"temperature": 1.0}),
        ('{"do_sample": true, "temperature": 0.6, "top_p": 0.95}', {"temperature": 0.6, "top_p": 0.95}),
        ('{"do_sample": false, "temperature": 0.6}', {"temperature": 0.0}),
        ('{"eos_token_id": 1}', {"temperature": 1.0}),
    ],
)
def test_defaults_are_the_checkpoints(text: str | None, found: dict[str, float], tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text)
    assert generation_defaults(tmp_path) == found
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(PromptError, match=r"generation_config\.json: cannot be read"):
        generation_defaults(tmp_path)
