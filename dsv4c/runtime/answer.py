"""Answers as they are said: conversations in, events out, several sequences at once, each ending by itself.

A session remembers for every slot what was rendered, and which ids were read and sampled for it. Where a
conversation begins with the same text, it goes on from there, on the very ids, whatever its text would be
encoded to now.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dsv4c.errors import PromptError, SessionError
from dsv4c.models.encoding.marks import ASSISTANT, BEGIN, END, THOUGHT, USER
from dsv4c.models.encoding.messages import Conversation
from dsv4c.models.encoding.parse import Kind, Parser, Piece, Reply
from dsv4c.models.encoding.render import render
from dsv4c.models.encoding.rules import Rules
from dsv4c.models.encoding.tokenizer import Decoding, Tokenizer
from dsv4c.runtime.sampling import Chances, Said, Sampling

if TYPE_CHECKING:
    from dsv4c.runtime.session import Session

Reason = Literal["stop", "stop_string", "length", "interrupted"]


# --- events ---


@dataclass(frozen=True)
class Token:
    """What the sequence says: ids that were sampled, and the text that they add, which may be none yet.

    chances: log-probabilities of the token, if asked for.
    """

    type: ClassVar = "token"
    sequence: int
    ids: tuple[int, ...]
    text: str
    chances: Chances | None = None

    def to_json(self) -> dict[str, Any]:
        made = {"type": self.type, "sequence": self.sequence, "ids": list(self.ids), "text": self.text}
        if self.chances is not None:
            best = [[token, round(chance, 6)] for token, chance in self.chances.best]
            made |= {"logprob": round(self.chances.chosen, 6), "best": best}
        return made


@dataclass(frozen=True)
class Reasoning(Token):
    """The same, of what is thought before the answer."""

    type: ClassVar = "reasoning"


@dataclass(frozen=True)
class ToolCalled:
    """A function that is to be called. `arguments` is the text of a JSON object."""

    type: ClassVar = "tool_call"
    sequence: int
    name: str
    arguments: str

    def to_json(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "sequence": self.sequence,
            "name": self.name,
            "arguments": self.arguments,
        }


@dataclass(frozen=True)
class Done:
    """A sequence is over: why, its message, and what it took.

    ids: all that were sampled, the one that stopped it included. read: tokens of the prompt that the slot did
    not hold yet. seconds: to the first token, and to the last. launches: of a step. malformed: where the
    completion breaks the grammar of answers, if it does; rest: what was not understood of it. accepted: in
    how many rounds no draft held, one, and so on; empty without rounds.
    """

    type: ClassVar = "done"
    sequence: int
    reason: Reason
    message: Reply | None
    ids: tuple[int, ...]
    prompt_tokens: int
    read: int
    seconds_to_first: float
    seconds: float
    seed: int
    launches: int
    malformed: str = ""
    rest: str = ""
    accepted: tuple[int, ...] = ()

    @property
    def tokens_per_round(self) -> float:
        """Drafts that held, and the one token more that every round says."""
        rounds = sum(self.accepted)
        return sum(n * (held + 1) for held, n in enumerate(self.accepted)) / rounds if rounds else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Of those after the first."""
        passed = self.seconds - self.seconds_to_first
        return (len(self.ids) - 1) / passed if passed > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "sequence": self.sequence,
            "reason": self.reason,
            "message": self.message.to_json() if self.message is not None else None,
            "ids": list(self.ids),
            "prompt_tokens": self.prompt_tokens,
            "read": self.read,
            "new_tokens": len(self.ids),
            "seconds_to_first_token": round(self.seconds_to_first, 4),
            "tokens_per_second": round(self.tokens_per_second, 2),
            "launches_per_token": self.launches,
            "accepted": list(self.accepted) or None,
            "seed": self.seed,
            "malformed": self.malformed or None,
            "rest": self.rest,
        }


Event = Token | Reasoning | ToolCalled | Done


# --- what is asked ---


@dataclass(frozen=True)
class Ask:
    """One sequence to make: a conversation, or the ids of a prompt; how to choose, and when to end.

    stop: texts that end it, and are no part of the answer. max_new_tokens: None for as many as there is room.
    """

    prompt: Conversation | Sequence[int]
    sampling: Sampling
    max_new_tokens: int | None
    stop: Sequence[str]


@dataclass
class Memory:
    """What a slot has read and said: a text, and its ids as they were, of which it has consumed `held`."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    held: int = 0

    def ids_of(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """The ids of a text, those remembered where it begins with the same."""
        if self.text and text.startswith(self.text):
            return self.ids + tokenizer.encode(text[len(self.text) :])
        return tokenizer.encode(text)

    def shared(self, ids: Sequence[int]) -> int:
        """How many of the slot's tokens are the first of these."""
        pairs = zip(self.ids[: self.held], ids, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(self.held, len(ids)))


def generation_defaults(folder: Path | None) -> dict[str, Any]:
    """Fields of `Sampling` as the checkpoint's generation_config.json recommends; drawn plainly without one.

    Raises PromptError for a file that is no JSON object.
    """
    file = folder / "generation_config.json" if folder is not None else None
    if file is None or not file.is_file():
        return {"temperature": 1.0}
    try:
        given = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise PromptError(f"{file}: cannot be read: {error}") from None
    if not isinstance(given, dict):
        raise PromptError(f"{file}: is no JSON object; download it again")
    if given.get("do_sample") is False:
        return {"temperature": 0.0}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {"temperature": 1.0} | {name: given[name] for name in names if given.get(name) is not None}


# --- one sequence ---


class StopTexts:
    """Lets text through up to the first of some texts; what may become one is held back."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = [text for text in texts if text]
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """What is safe to say, and whether one of the texts was found behind it."""
        self._held += text
        places = [place for stop in self._texts if (place := self._held.find(stop)) >= 0]
        if places:
            return self._held[: min(places)], True
        sure = len(self._held)
        for length in range(1, min(len(self._held), max(map(len, self._texts), default=1) - 1) + 1):
            if any(stop.startswith(self._held[-length:]) for stop in self._texts):
                sure = len(self._held) - length
        said, self._held = self._held[:sure], self._held[sure:]
        return said, False

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


class _Sequence:
    """A sequence on its way: ids to text to pieces of a message."""

    def __init__(self, number: int, slot: int, ask: Ask, text: str, ids: Sequence[int]) -> None:
        self.number, self.slot, self.ask, self.text = number, slot, ask, text
        self.prompt, self.ids = list(ids), list[int]()
        self.enqueued = 0
        self.rounds: list[int] = []  # tokens that each has said
        self.reason: Reason | None = None
        self.first = self.last = 0.0
        self.read = 0
        self._parser: Parser | None = None
        self._decoding: Decoding | None = None
        self._stops = StopTexts(ask.stop)
        self._kind: Kind = "content"

    def speak(self, tokenizer: Tokenizer, mode: Literal["chat", "thinking"]) -> None:
        """Say texts, too, not ids alone."""
        self._parser, self._decoding = Parser(mode), Decoding(tokenizer)
        self._kind = "reasoning" if mode == "thinking" else "content"

    def take(self, token: int, stops: Sequence[int], chances: Chances | None = None) -> Iterator[Event]:
        """One token more."""
        self.ids.append(token)
        self.last = time.perf_counter()
        self.first = self.first or self.last
        ends = token in stops
        if self._decoding is None or self._parser is None:
            if not ends:
                yield Token(self.number, (token,), "", chances)
        elif ends:
            yield from self._flushed(self._decoding.finish())
            yield from self._events((), self._parser.feed(END))
        else:
            text, found = self._stops.feed(self._decoding.feed(token))
            yield from self._events((token,), self._parser.feed(text), chances)
            if found:
                self.reason = "stop_string"
        if ends:
            self.reason = "stop"

    def done(self, reason: Reason, started: float, launches: int) -> Iterator[Event]:
        """What was held back, and the end."""
        message, malformed, rest = None, "", ""
        if self._parser is not None and self._decoding is not None:
            if reason in ("length", "interrupted"):
                yield from self._flushed(self._decoding.finish())
            yield from self._events((), self._parser.finish())
            message, rest = self._parser.reply, self._parser.rest
            if self._parser.fault is not None and reason == "stop":
                malformed = str(self._parser.fault)
        first = (self.first or started) - started
        yield Done(
            self.number,
            reason,
            message,
            tuple(self.ids),
            len(self.prompt),
            self.read,
            first,
            (self.last or started) - started,
            self.ask.sampling.seed,
            launches,
            malformed,
            rest,
            tuple(self.rounds.count(said) for said in range(1, max(self.rounds, default=0) + 1)),
        )

    def _flushed(self, text: str) -> Iterator[Event]:
        assert self._parser is not None
        said, _ = self._stops.feed(text)
        yield from self._events((), self._parser.feed(said + self._stops.finish()))

    def _events(
        self, ids: tuple[int, ...], pieces: Sequence[Any], chances: Chances | None = None
    ) -> Iterator[Event]:
        """A token is an event, even if it adds no text; its text may be of two kinds."""
        texts = [piece for piece in pieces if isinstance(piece, Piece)]
        if ids and not texts:
            texts = [Piece(self._kind, "")]
        for piece in texts:
            self._kind = piece.kind
            made = Reasoning if piece.kind == "reasoning" else Token
            yield made(self.number, ids, piece.text, chances)
            ids, chances = (), None
        for piece in pieces:
            if not isinstance(piece, Piece):
                yield ToolCalled(self.number, piece.name, piece.arguments)


# --- all of them ---


class Answers:
    """The events of some sequences, in the order in which they come. `stop` ends all after the steps that are
    under way; what was said is kept.
    """

    def __init__(
        self,
        session: Session,
        asks: Sequence[Ask],
        tokenizer: Tokenizer | None,
        rules: Rules,
        slots: Sequence[int],
        logprobs: int | None = None,
        drafting: bool = True,
        least: float = 0.0,
    ) -> None:
        self._drafting, self._least = drafting and logprobs is None, least
        self._session, self._tokenizer, self._rules = session, tokenizer, rules
        self._stopping, self._logprobs = False, logprobs
        end = tokenizer.id_of(END) if tokenizer is not None else session.plan.config.get("eos_token_id")
        self._stops = [int(end)] if end is not None else []
        self._sequences = [self._sequence(n, s, a) for n, (s, a) in enumerate(zip(slots, asks, strict=True))]
        self._events = self._run()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    def stop(self) -> None:
        """Say no more."""
        self._stopping = True

    def _sequence(self, number: int, slot: int, ask: Ask) -> _Sequence:
        text = ""
        if isinstance(ask.prompt, Conversation):
            assert self._tokenizer is not None
            text = render(ask.prompt, self._rules)
            ids = self._session.memories[slot].ids_of(text, self._tokenizer)
        else:
            ids = self._session.check_tokens(ask.prompt)
        check_prompt(ids, self._session.max_context)
        made = _Sequence(number, slot, ask, text, ids)
        if isinstance(ask.prompt, Conversation) and self._tokenizer is not None:
            made.speak(self._tokenizer, ask.prompt.thinking_mode)
        return made

    def _run(self) -> Iterator[Event]:
        started = time.perf_counter()
        session = self._session
        for sequence in self._sequences:
            self._read(sequence)
        fresh = {s.slot: s.prompt[-1] for s in self._sequences}
        under_way: deque[tuple[Said, int]] = deque()  # and the most that it may say
        one_by_one = session.device.type == "cpu" or self._logprobs is not None
        steps, ahead = (1, 1) if one_by_one else (STEPS, AHEAD)
        while self._going or under_way:
            while self._going and len(under_way) < ahead:
                active = [s for s in self._going if self._left(s) > 0]
                if not active:
                    break
                least = min(self._left(s) for s in active)
                each = session.rounds(len(active)) if self._drafting else 0
                if least < each and under_way:
                    break  # that may say less than it might, and leave room for another round
                rounds = 0 < each <= least
                count, most = (1, each) if rounds else (min(steps, least),) * 2
                others = [s.slot for s in active if s.slot not in fresh]
                said = session.say(count, fresh, others, best=self._logprobs, rounds=rounds)
                fresh = {}
                for s in active:
                    s.enqueued += most
                under_way.append((said, most))
            said, most = under_way.popleft()
            found = session.settle(said)
            chances = dict(zip(said.slots, said.chances, strict=True)) if said.chances else {}
            counts = dict(zip(said.slots, said.counts, strict=True)) if said.each > 1 else {}
            for s in self._going:
                if s.slot in found:
                    s.enqueued -= most - len(found[s.slot])
                s.rounds += [count for count in counts.get(s.slot, ()) if count]
                yield from self._take(s, found.get(s.slot, []), started, chances.get(s.slot))
        for s in self._sequences:
            self._remember(s)

    @property
    def _going(self) -> list[_Sequence]:
        return [s for s in self._sequences if s.reason is None]

    def _left(self, sequence: _Sequence) -> int:
        """Steps that may still be enqueued for it."""
        room = self._session.max_context - len(sequence.prompt) + 1 - sequence.enqueued
        most = sequence.ask.max_new_tokens
        return room if most is None else min(room, most - sequence.enqueued)

    def _read(self, sequence: _Sequence) -> None:
        """The prompt but its last token, of which the slot may hold the beginning."""
        session, slot, ids = self._session, sequence.slot, sequence.prompt
        memory = session.memories[slot]
        kept = session.keep(min(memory.shared(ids), len(ids) - 1), slot)
        rest = ids[kept:-1]
        sequence.read = len(ids) - kept
        if rest:
            session.prefill(rest, slot, logits="last" if session.gives_last else "all")
        session.choose(slot, sequence.ask.sampling, self._stops)
        session.trust(slot, self._least)

    def _take(
        self, sequence: _Sequence, tokens: Sequence[int], started: float, chances: Chances | None
    ) -> Iterator[Event]:
        for token in tokens:
            if sequence.reason is None:
                yield from sequence.take(token, self._stops, chances)
        if sequence.reason is None and self._stopping:
            sequence.reason = "interrupted"
        if sequence.reason is None and len(sequence.ids) == sequence.enqueued and not self._left(sequence):
            sequence.reason = "length"
        if sequence.reason is not None:
            yield from sequence.done(sequence.reason, started, self._session.launches)

    def _remember(self, sequence: _Sequence) -> None:
        """What the slot holds now: tokens that were enqueued after the end are taken back."""
        session, slot = self._session, sequence.slot
        ids = [*sequence.prompt, *sequence.ids]
        held = session.keep(min(session.positions[slot], len(ids) - 1), slot)
        text = sequence.text + self._tokenizer.decode(sequence.ids) if self._tokenizer is not None else ""
        session.memories[slot] = Memory(text if sequence.text else "", ids, held)


STEPS, AHEAD = 4, 2
"""Steps enqueued at a time on a GPU, and portions of them: together no more than can be taken back. While the
host reads one portion and puts it into words, the device runs the next.
"""


def check_prompt(ids: Sequence[int], room: int) -> None:
    """Raise SessionError unless a prompt has tokens, and leaves room for an answer."""
    if not ids:
        raise SessionError("the prompt is empty; give at least one token")
    if len(ids) >= room:
        raise SessionError(
            f"the prompt has {len(ids):,} tokens, the context room for {room:,} with the answer; shorten "
            "it, or compile with a larger --max-context"
        )


def check_tokenizer(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Raise PromptError unless a tokenizer's vocabulary is that of the model with this config: its ids are
    the model's, and what every prompt is made of is there.
    """
    tokenizer.require(int(config["vocab_size"]), (BEGIN, END, USER, ASSISTANT, THOUGHT))
    for name, key in ((BEGIN, "bos_token_id"), (END, "eos_token_id")):
        found, wanted = tokenizer.id_of(name), config.get(key)
        if None not in (found, wanted) and found != wanted:
            raise PromptError(
                f"{tokenizer.path}: {name} is {found} there, {wanted} in the model's config: it is another's "
                "tokenizer"
            )


def asks_of(
    given: Any,
    thinking: bool,
    sampling: Sampling | Sequence[Sampling],
    limit: int | None,
    stop: Sequence[str],
) -> list[Ask]:
    """One `Ask` per sequence: a text, messages, a conversation, or ids of a prompt; or a list of those."""
    many = isinstance(given, list) and bool(given) and isinstance(given[0], (str, list, Conversation))
    prompts = [_prompt(each, thinking) for each in (given if many else [given])]
    if isinstance(sampling, Sampling):
        sampling = [sampling] * len(prompts)
    if len(sampling) != len(prompts):
        raise SessionError(
            f"{len(sampling)} ways to sample for {len(prompts)} sequences; give one, or one each"
        )
    if limit is not None and limit < 1:
        raise SessionError(f"max_new_tokens is {limit}, expected at least 1")
    return [Ask(prompt, how, limit, tuple(stop)) for prompt, how in zip(prompts, sampling, strict=True)]


def _prompt(given: Any, thinking: bool) -> Conversation | Sequence[int]:
    mode: Literal["chat", "thinking"] = "thinking" if thinking else "chat"
    if isinstance(given, Conversation):
        return given
    if isinstance(given, str):
        if not given:
            raise PromptError("the prompt is empty; say something")
        return Conversation([{"role": "user", "content": given}], mode)
    if isinstance(given, Sequence) and given and all(isinstance(each, Mapping) for each in given):
        return Conversation(given, mode)
    if isinstance(given, Sequence):
        return given
    raise PromptError(f"found {given!r:.80}, expected a text, messages, a Conversation, or ids of a prompt")
