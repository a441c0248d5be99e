"""A plan with weights and state: prompts in, logits out. Every request is checked before anything moves.

The host counts every slot's positions itself, so that no request waits for the device to know where it is.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from dsv4c.buckets import ROWS, Bucket, Kind, Logits
from dsv4c.errors import Dsv4cError, PromptError, SessionError
from dsv4c.models.encoding.messages import Conversation
from dsv4c.models.encoding.rules import rules_of
from dsv4c.models.encoding.tokenizer import Tokenizer
from dsv4c.plan.folder import Plan
from dsv4c.runtime import state
from dsv4c.runtime.answer import Answers, Memory, asks_of, check_tokenizer, generation_defaults
from dsv4c.runtime.executor import Executor, states_of
from dsv4c.runtime.residence import Loaded
from dsv4c.runtime.sampling import LEAST, Said, Sampling, SamplingState
from dsv4c.runtime.sampling import STATES as SAMPLED

POSITION = "position"
"""The state that counts each slot's tokens."""

SAMPLING = tuple(SAMPLED.values())
"""Those that say how a slot's next token is chosen."""


P = ParamSpec("P")
R = TypeVar("R")


def _one_at_a_time(
    method: Callable[Concatenate[Session, P], R],
) -> Callable[Concatenate[Session, P], R]:
    """Calls from several threads wait for each other: all share one arena and one state."""

    @wraps(method)
    def waiting(self: Session, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            return method(self, *args, **kwargs)

    return waiting


class _Counter:
    """Tokens that every slot has consumed, and the furthest that its buffers were ever written.

    Of steps that wait to be settled it holds as many tokens as they may say at most, `open`.
    """

    def __init__(self, slots: int) -> None:
        self.held = [0] * slots
        self.reached = [0] * slots
        self.open = [0] * slots

    def advance(self, slot: int, count: int) -> None:
        self.held[slot] += count
        self.reach(slot, self.held[slot])

    def reach(self, slot: int, place: int) -> None:
        self.reached[slot] = max(self.reached[slot], place)

    def enqueue(self, slot: int, most: int) -> None:
        """Steps that say so many tokens at most."""
        self.held[slot] += most
        self.open[slot] += most

    def settle(self, slot: int, said: Sequence[int], rows: int) -> None:
        """Steps of so many rows have said so many tokens each; those that said none have not run."""
        self.open[slot] -= len(said) * rows
        at = self.held[slot] - len(said) * rows - self.open[slot]
        for count in said:
            if count:
                self.reach(slot, at + rows)
            at += count
        self.held[slot] = at + self.open[slot]

    def furthest(self, slot: int) -> int:
        """How far the buffers are written once all steps are through, at most."""
        return max(self.held[slot], self.reached[slot])

    def put(self, slot: int, held: int, reached: int) -> None:
        self.held[slot], self.reached[slot], self.open[slot] = held, reached, 0


@dataclass(frozen=True)
class _Seats:
    """Some slots in a bucket's sequences, on the device: index i64 [slots], and what a step is given, i32
    [sequences]: slots, -1 for none, and a length of 1 for each.
    """

    index: Tensor
    slots: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Drafts:
    """Tokens drafted behind one, the logits f32 [k, vocab] that each is the likeliest of, and where the model
    says so, f32 [k] the logit of each to hold.
    """

    tokens: list[int]
    logits: Tensor
    confidence: Tensor | None


class Session:
    """Generates with one plan and one checkpoint. A sequence lives in a slot, numbered from 0; slots are
    independent. Logits, streams and tokens are tensors on the plan's device.

    Results do not depend on the bucket that a call runs in: it is the smallest that fits. A request that is
    refused (SessionError) changes nothing. Logits that are not finite are refused, too, but too late for
    their slot: only `reset` helps there. On a GPU that shows where something waits for the device.

    Threads may share a session: their calls follow one another, and `streams` and `next_tokens` are of the
    last one, whosever that was.
    """

    loaded: Loaded | None = None
    """What reading the weights took, where a checkpoint was read."""

    def __init__(self, plan: Plan, executor: Executor, checkpoint: Path | None = None) -> None:
        self.plan, self.executor, self.checkpoint = plan, executor, checkpoint
        self._lock = threading.RLock()
        self.slots, self.max_context = int(plan.deployment["slots"]), int(plan.deployment["max_context"])
        self.vocab_size = int(plan.config["vocab_size"])
        self.device = executor.blocks["state"].device
        self._states = states_of(plan, executor.blocks)
        self._counter = _Counter(self.slots)
        self._following = torch.zeros(self.slots, dtype=torch.int32, device=self.device)
        self._followed = [False] * self.slots  # slots whose likeliest next token `_following` holds
        self._tainted = torch.zeros(self.slots, device=self.device)  # NaN once logits were not finite
        self._going = torch.ones(self.slots, dtype=torch.int32, device=self.device)  # 0 where one has stopped
        samples = any(program.shape.sampled for program in plan.buckets.values())
        self._sampling = SamplingState(self._states) if samples else None
        self._seated: dict[tuple[str, tuple[int, ...]], _Seats] = {}
        self.memories = [Memory() for _ in range(self.slots)]
        self._streams: Tensor | None = None
        self._next: Tensor | None = None
        self._broken = False
        self.reset()

    def __repr__(self) -> str:
        held = ", ".join(f"{held:,}" for held in self._counter.held)
        return (
            f"<Session of {self.plan.name} on {self.device}: {held} of {self.max_context:,} tokens by slot>"
        )

    # --- running ---

    @_one_at_a_time
    def prefill(
        self,
        tokens: Sequence[int] | Tensor,
        slot: int = 0,
        *,
        logits: Logits = "all",
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Consume `tokens` after what the slot has consumed so far. Returns logits f32 [len, vocab]: row i
        predicts what follows tokens[i]; with "last" f32 [1, vocab], the last row alone: chunks that give no
        others are for this.

        `progress(done, all)` is called after every chunk. What it raises, or an interrupt between chunks,
        leaves the slot reset, as a note on the exception says.

        Raises SessionError, before the first chunk, for no tokens, an id out of range, a context that would
        overflow, no such slot.
        """
        ids = self._prompt(tokens)
        self._check_slot(slot)
        self._check_room(slot, len(ids))
        return self._chunks(ids, slot, logits, progress)

    @_one_at_a_time
    def decode(self, tokens: Sequence[int | None] | Mapping[int, int]) -> Tensor:
        """One token for each slot: None for those that wait, or a mapping that names only the others.
        Returns logits f32 [slots, vocab], NaN in the rows of those that wait.

        Raises SessionError for another number of tokens, nothing but None, an id out of range, a full
        context.
        """
        given = self._by_slot(tokens)
        if not given:
            raise SessionError("decode got no token for any slot; give at least one")
        work = {s: [self._id(token, f"token {s}")] for s, token in given.items()}
        for s in work:
            self._check_room(s, 1)
        logits = torch.full((self.slots, self.vocab_size), torch.nan, device=self.device)
        streams: list[Tensor | None] = [None] * self.slots
        most = max(b.sequences for b in self._buckets())
        active = list(work)
        for start in range(0, len(active), most):
            part = {s: work[s] for s in active[start : start + most]}
            made = self._call(self._fitting(len(part), 1), part)
            for s, rows in made.items():
                logits[s] = rows["logits"][0]
                streams[s] = rows["streams"]
        empty = next(rows for rows in streams if rows is not None)
        self._streams = torch.cat([torch.zeros_like(empty) if r is None else r for r in streams])
        self._next = self._following.clone()
        return logits

    @_one_at_a_time
    def verify(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """A few tokens of some slots in one call. Returns logits f32 [len, vocab] by slot, row i after its
        token i; `take_back` undoes the tokens that are not to be kept.

        Raises SessionError as `prefill` does, and where no bucket of the plan has as many rows.
        """
        work = {}
        for slot, given in tokens.items():
            self._check_slot(slot)
            work[slot] = self._prompt(given)
            self._check_room(slot, len(work[slot]))
        if not work:
            raise SessionError("verify got no tokens for any slot; give at least one")
        longest = max(map(len, work.values()))
        bucket = self._fitting(len(work), longest)
        if bucket.sequences < len(work) or bucket.tokens < longest or bucket.logits != "all":
            raise SessionError(
                f"verify got {longest} tokens of {len(work)} slots; no bucket of the plan takes as many, "
                f"only {', '.join(self.plan.buckets)}; compile with another --verify, or give fewer"
            )
        made = self._call(bucket, work)
        self._remember(list(made.values()))
        return {slot: rows["logits"] for slot, rows in made.items()}

    @_one_at_a_time
    def take_back(self, count: int, slot: int = 0) -> None:
        """Forget the last `count` tokens of a slot, bit for bit as if they had never run.

        Raises SessionError for more than it holds, or than its buffers can step back from the furthest token
        that they were given.
        """
        self._check_slot(slot)
        self._check_whole()
        counter = self._counter
        held, reached = counter.held[slot], counter.furthest(slot)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= held:
            raise SessionError(f"slot {slot} holds {held} tokens, {count!r} cannot be taken back")
        if reached - (held - count) > ROWS:
            raise SessionError(
                f"slot {slot} was given {reached} tokens; it can go back to {reached - ROWS} at most, not to "
                f"{held - count}; reset it and prefill again"
            )
        self._set_position(slot, held - count, reached)
        self._followed[slot] = False

    @_one_at_a_time
    def steps(self, count: int, slots: Sequence[int] | None = None) -> Tensor:
        """Enqueue `count` greedy steps: each takes the likeliest token after the last one, first that of the
        slot's last call. The host waits for none of them. Returns i32 [count, slots] on the device: row i
        holds the tokens chosen by step i, -1 for slots that wait.

        `slots` move on, all by default. Raises SessionError as `decode` does.
        """
        wanted = list(range(self.slots)) if slots is None else list(slots)
        kept = self._greedy(count, wanted, keep=True)
        chosen = torch.full((count, self.slots), -1, dtype=torch.int32, device=self.device)
        assert kept is not None
        chosen[:, wanted] = kept
        return chosen

    @_one_at_a_time
    def choose(self, slot: int, sampling: Sampling, stops: Sequence[int] = ()) -> None:
        """Say how the slot's tokens are chosen from here on, and which end it: what it holds, and one token
        more, is the prompt.

        Raises SessionError for no such slot, an id out of range, or a plan that cannot: one compiled without
        `sampled` takes the likeliest token and finds no stops itself.
        """
        self._check_slot(slot)
        ids = self._ids(stops, "stop")
        if self._sampling is not None:
            self._sampling.set(slot, sampling, ids, self._counter.held[slot] + 1)
            self.executor.share(SAMPLING)
        elif not sampling.is_greedy:
            raise SessionError(
                f"plan {self.plan.name} always takes the likeliest token; for {sampling} compile with "
                "--sampled"
            )

    @_one_at_a_time
    def trust(self, slot: int, least: float) -> None:
        """Let rounds of the slot judge drafts no further than they are likely to be said: by the model's own
        confidence, each of them together with those before it with a probability of `least` or more. 0 judges
        all, as after `reset`. What is said stays the same.

        Raises SessionError for no such slot, what is no probability, or a plan whose drafts come with no
        confidence, unless all are judged.
        """
        self._check_slot(slot)
        if isinstance(least, bool) or not isinstance(least, int | float) or not 0 <= least <= 1:
            raise SessionError(f"drafts are to be judged from {least!r} on, expected a probability of 0 to 1")
        if LEAST in self._states:
            value = self._states[LEAST]
            assert isinstance(value, Tensor)
            value[slot] = least
            self.executor.share([LEAST])
        elif least:
            raise SessionError(
                f"plan {self.plan.name}: its drafts come with no confidence, so that all of a round are "
                "judged; those of DSpark do"
            )

    @_one_at_a_time
    def say(
        self,
        count: int,
        tokens: Mapping[int, int] | None = None,
        slots: Sequence[int] = (),
        *,
        best: int | None = None,
        rounds: bool = False,
    ) -> Said:
        """Enqueue `count` steps of the slots that `tokens` names, each beginning with its token, or of
        `slots`, going on from the steps before. The host waits for none of them. With `best`, of a single
        step also log-probabilities, of the chosen token and of so many.

        Steps say a token each; `rounds` draft others behind it, and say as many as hold, and one more: the
        same tokens in fewer steps. A slot that comes to one of its stops says nothing after it, and has not
        consumed it. Raises SessionError as `decode` does, and for rounds that the plan has not.
        """
        given = dict(tokens or {})
        work = [*given, *slots]
        each = self.rounds(len(work)) if rounds else 1
        if not each:
            raise SessionError(
                f"no bucket of the plan drafts for {len(work)} slots together, only "
                f"{', '.join(self.plan.buckets)}; compile with --draft, or with fewer --draft-tokens"
            )
        self._check_steps(count, work, each)
        if best is not None and (count != 1 or not 0 <= best <= self.vocab_size):
            raise SessionError(
                f"the {best} best of {count} steps; expected 0 to {self.vocab_size} of one step"
            )
        fresh = {s: self._id(token, f"token {s}") for s, token in given.items()}
        for s in slots:
            if not self._followed[s]:
                raise SessionError(f"slot {s} has no next token yet; give it one")
        for s, token in fresh.items():
            self._following[s], self._going[s] = token, 1
        kept, logits, taints = self._repeat(count, work, keep=True, rounds=rounds)
        assert kept is not None
        for s in work:
            self._counter.enqueue(s, count * each)
            self._followed[s] = True
        return Said(work, kept, taints, None if best is None else logits, best or 0, each)

    @_one_at_a_time
    def settle(self, said: Said) -> dict[int, list[int]]:
        """What steps have said, by slot: the tokens up to a stop, and that. Waits for these steps alone."""
        rows = said.wait()
        found: dict[int, list[int]] = {}
        for s, column, counts in zip(said.slots, rows, said.counts, strict=True):
            found[s] = [token for token in column if token >= 0]
            self._counter.settle(s, counts, said.each)
        self.check_finite(said.slots, said.finite)
        return found

    @_one_at_a_time
    def enqueue(self, count: int, slots: Sequence[int] | None = None) -> None:
        """`steps` without keeping the tokens: one graph launch per step and nothing else on the stream."""
        self._greedy(count, list(range(self.slots)) if slots is None else list(slots), keep=False)

    def rounds(self, slots: int) -> int:
        """The most tokens that each of so many slots says in a round; 0 if no bucket drafts for as many."""
        return next((b.tokens for b in self._of_kind("round", slots)), 0)

    @_one_at_a_time
    def draft(self, tokens: Mapping[int, int]) -> dict[int, Drafts]:
        """Draft behind a token of some slots, which none of them has consumed. Nothing is consumed.

        Raises SessionError as `decode` does, PlanError if the plan was compiled without what drafts.
        """
        bucket = self.plan.program("draft").shape
        work = {s: [self._id(token, f"token {s}")] for s, token in self._by_slot(tokens).items()}
        for s in work:
            self._check_room(s, 1)
        found: dict[int, Drafts] = {}
        for slot, ids in work.items():
            made = self._outputs(bucket, {slot: ids})
            rows = slice(0, bucket.tokens)
            confidence = made["confidence"][rows, 0].clone() if "confidence" in made else None
            found[slot] = Drafts(made["next"][rows].tolist(), made["logits"][rows].clone(), confidence)
        return found

    @_one_at_a_time
    def accept(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
        """Judge tokens of some slots, of which those behind the first are drafts, whoever made them: what
        each slot says is what it would say without them. It consumes the first and the drafts that hold,
        and the last that it says is the next one's first.

        Raises SessionError as `prefill` does, and where no bucket of the plan has as many rows.
        """
        work: dict[int, list[int]] = {}
        for slot, given in tokens.items():
            self._check_slot(slot)
            work[slot] = self._prompt(given)
            self._check_room(slot, len(work[slot]))
        longest = max(map(len, work.values()), default=0)
        fitting = [b for b in self._of_kind("accept", len(work)) if b.tokens >= longest]
        if not work or not fitting:
            raise SessionError(
                f"accept got {longest} tokens of {len(work)} slots; no bucket of the plan judges as many, "
                f"only {', '.join(self.plan.buckets)}; compile with --draft given, or give fewer"
            )
        bucket = fitting[0]
        made = self._outputs(bucket, work)
        said: dict[int, list[int]] = {}
        for i, (slot, ids) in enumerate(work.items()):
            rows = made["said"][i * bucket.tokens : (i + 1) * bucket.tokens].tolist()
            said[slot] = [token for token in rows if token >= 0]
            self._counter.reach(slot, self._counter.held[slot] + len(ids))
            self._counter.advance(slot, len(said[slot]))
            self._following[slot], self._followed[slot] = said[slot][-1], True
            self.memories[slot] = Memory()
        self._look(work)
        return said

    def _of_kind(self, kind: Kind, sequences: int) -> list[Bucket]:
        """Buckets of a kind for so many sequences, the smallest first."""
        shapes = (program.shape for program in self.plan.buckets.values())
        found = (b for b in shapes if b.kind == kind and b.sequences >= sequences)
        return sorted(found, key=lambda b: b.rows)

    def _outputs(self, bucket: Bucket, work: Mapping[int, Sequence[int]]) -> Mapping[str, Tensor]:
        """One call of a bucket that drafts or judges; the next call overwrites what it returns."""
        with self.executor.naming(), torch.inference_mode():
            self._broken = True
            made = self.executor.run(bucket.name, self._inputs(bucket, work))
            taints = _taints(made["logits"]).reshape(bucket.sequences, bucket.tokens)
            for i, (slot, ids) in enumerate(work.items()):
                self._tainted[slot] += taints[i, : bucket.tokens if bucket.drafts else len(ids)].sum()
            self._broken = False
        return made

    @_one_at_a_time
    def reset(self, slot: int | None = None) -> None:
        """Forget one slot's sequence, or all. What its buffers hold does not matter: positions say what is
        valid.
        """
        if slot is None:
            self.executor.clear()
            self._broken = False
        else:
            self._check_slot(slot)
            self._check_whole()
        for s in range(self.slots) if slot is None else (slot,):
            self._set_position(s, 0, 0)
            if self._sampling is not None:
                self._sampling.set(s, Sampling(), (), 1)
                self.executor.share(SAMPLING)
            self.trust(s, 0)
            self.memories[s] = Memory()
            self._followed[s] = False
            self._tainted[s] = 0
        self._streams = self._next = None

    def wait(self) -> None:
        """Wait for everything enqueued. Raises DriverError if a step failed on the device; the state is then
        half-written.
        """
        try:
            with self.executor.naming():
                self.executor.wait()
        except Dsv4cError:
            self._broken = True
            raise

    @_one_at_a_time
    def keep(self, count: int, slot: int = 0) -> int:
        """Let a slot hold the first `count` of its tokens, if its buffers can still go back to them, else
        none. Returns how many it holds.
        """
        self._check_slot(slot)
        counter = self._counter
        if count <= counter.held[slot] and counter.furthest(slot) - count <= ROWS:
            self.take_back(counter.held[slot] - count, slot)
        else:
            self.reset(slot)
        return counter.held[slot]

    # --- answering ---

    def generate(
        self,
        messages: Any,
        *,
        thinking: bool = False,
        sampling: Sampling | Sequence[Sampling] | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        encoding: str = "auto",
        slots: Sequence[int] | None = None,
        drafting: bool = True,
        draft_confidence: float = 0.0,
    ) -> Answers:
        """Answer, event by event: `for event in session.generate(messages)`.

        messages: a conversation as chat interfaces have it, a text (one question), a `Conversation` with the
        official encoder's options, or the ids of a prompt; or a list of such, a sequence each, which end on
        their own. A conversation that goes on in its slot is not read again. sampling: by default what the
        checkpoint's generation_config.json recommends, if the plan can. logprobs: with every token its
        log-probability, and those of so many likeliest ones; steps then follow one another with the host in
        between. encoding: rules of which release
        (preview, 0731, auto). slots: where the sequences are, by default the first ones. drafting: in rounds,
        where the plan has some for as many sequences, and no log-probabilities are asked for.
        draft_confidence: how likely a draft must be for a round to judge it, as `trust` takes it.

        Raises PromptError for messages that make no prompt or a tokenizer that does not fit, SessionError for
        a prompt that is too long, values that are out of range, or more sequences than a step takes.
        """
        if sampling is None:
            fits = self._sampling is not None
            sampling = Sampling(**generation_defaults(self.checkpoint)) if fits else Sampling()
        asks = asks_of(messages, thinking, sampling, max_new_tokens, stop)
        chosen = range(len(asks)) if slots is None else slots
        for slot in chosen:
            self._check_slot(slot)
        rules, _ = rules_of(encoding, self.checkpoint)
        texts = any(isinstance(ask.prompt, Conversation) for ask in asks)
        tokenizer = self.tokenizer if texts else None
        return Answers(self, asks, tokenizer, rules, list(chosen), logprobs, drafting, draft_confidence)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises PromptError without one that fits the model."""
        if self.checkpoint is None:
            raise PromptError("the session has no checkpoint folder, so no tokenizer; give ids of a prompt")
        tokenizer = Tokenizer.open(self.checkpoint)
        check_tokenizer(tokenizer, self.plan.config)
        return tokenizer

    @property
    def gives_last(self) -> bool:
        """Can prompts be read without logits of every token?"""
        return any(p.shape.kind == "prefill" and p.shape.logits == "last" for p in self.plan.buckets.values())

    # --- looking ---

    @property
    def launches(self) -> int:
        """Launches of a step of one sequence."""
        return len(self.plan.program("decode").launches)

    @property
    def positions(self) -> list[int]:
        """Tokens that every slot has consumed, once the device is through."""
        return list(self._counter.held)

    @property
    def streams(self) -> Tensor:
        """The hyper-connection streams after the last layer [rows, S, H] of the last call: its tokens in
        order, or one row per slot.
        """
        if self._streams is None:
            raise SessionError("no streams yet for this state; call prefill or decode first")
        return self._streams

    @property
    def next_tokens(self) -> list[int]:
        """The likeliest next token by row of the last call (the lowest id of equals). Waits for all calls."""
        if self._next is None:
            raise SessionError("no next tokens yet for this state; call prefill or decode first")
        self.wait()
        self.check_finite(range(self.slots))
        return self._next.tolist()

    # --- keeping ---

    @_one_at_a_time
    def copy_slot(self, source: int, target: int) -> None:
        """Let `target` hold what `source` holds. Raises SessionError for no such slot, or one whose logits
        were not finite.
        """
        for slot in (source, target):
            self._check_slot(slot)
        self._check_whole()
        self.check_finite([source])
        if source != target:
            state.copy_slot(self._states, source, target)
            self.executor.share(self._states)
            self._following[target] = self._following[source]
            self._followed[target] = self._followed[source]
            self._counter.put(target, self._counter.held[source], self._counter.furthest(source))
            self._tainted[target] = self._tainted[source]
            self.memories[target] = self.memories[source]

    @_one_at_a_time
    def export_slot(self, path: str | Path, slot: int = 0) -> Path:
        """Write one slot's state to a safetensors file, whole or not at all, and return its path.

        Raises SessionError if it cannot be written, or its logits were not finite.
        """
        self._check_slot(slot)
        self._check_whole()
        self.check_finite([slot])
        return state.write(Path(path), self.plan, self._states, [slot], self._reached)

    @_one_at_a_time
    def restore_slot(self, path: str | Path, slot: int = 0) -> None:
        """Go on in a slot from what `export_slot` wrote, of this or another slot. The next call must bring
        tokens: what was likeliest is not in the file.

        Raises SessionError for a file that is damaged or of another plan; the slot is then as before.
        """
        self._check_slot(slot)
        self._check_whole()
        self._take(state.read(Path(path), self.plan, self._states, 1), [slot])

    @_one_at_a_time
    def save_state(self, path: str | Path) -> Path:
        """Write the state of all slots to a safetensors file, whole or not at all, and return its path.

        Raises SessionError if it cannot be written, or logits of a slot were not finite.
        """
        self._check_whole()
        self.check_finite(range(self.slots))
        return state.write(Path(path), self.plan, self._states, list(range(self.slots)), self._reached)

    @_one_at_a_time
    def load_state(self, path: str | Path) -> None:
        """Go on from a saved state. The next call must bring tokens: what was likeliest is not in the file.

        Raises SessionError for a file that is damaged or of another plan; the session is then as before.
        """
        read = state.read(Path(path), self.plan, self._states, self.slots)
        self._take(read, list(range(self.slots)))
        self._broken = False

    @property
    def _reached(self) -> dict[str, list[int]]:
        """The furthest token that every slot was given, by the state that counts them."""
        return {POSITION: [self._counter.furthest(slot) for slot in range(self.slots)]}

    def _take(self, saved: state.Saved, slots: Sequence[int]) -> None:
        saved.put(self._states, slots)
        self.executor.share(self._states)
        for slot, *counts in zip(slots, saved.held(POSITION), saved.reached(POSITION), strict=True):
            self._counter.put(slot, *counts)
        for slot in slots:
            self._followed[slot] = False
            self._tainted[slot] = 0
            self.memories[slot] = Memory()
        self._streams = self._next = None

    # --- checks ---

    def check_tokens(self, tokens: Iterable[Any], what: str = "token") -> list[int]:
        """Them as numbers. Raises SessionError, in which they are called `what`, unless all are token ids of
        the model.
        """
        return self._ids(tokens, what)

    def _ids(self, tokens: Iterable[Any], what: str = "token") -> list[int]:
        return [self._id(token, f"{what} {place}") for place, token in enumerate(tokens)]

    def _id(self, token: Any, which: str) -> int:
        return token_id(token, which, self.vocab_size)

    def _prompt(self, tokens: Sequence[int] | Tensor) -> list[int]:
        if not isinstance(tokens, Iterable) or (isinstance(tokens, Tensor) and tokens.ndim != 1):
            raise SessionError(f"the prompt is {tokens!r}, expected token ids in a row, [3, 17, 5]")
        ids = self._ids(tokens.tolist() if isinstance(tokens, Tensor) else tokens)
        if not ids:
            raise SessionError("the prompt is empty; give at least one token")
        return ids

    def _by_slot(self, tokens: Sequence[int | None] | Mapping[int, int]) -> dict[int, Any]:
        if isinstance(tokens, Mapping):
            for slot in tokens:
                self._check_slot(slot)
            return dict(tokens)
        if not isinstance(tokens, Iterable):
            raise SessionError(f"decode got {tokens!r}, expected a token per slot, [3]")
        given = list(tokens)
        if len(given) != self.slots:
            raise SessionError(
                f"decode takes one token per slot, {self.slots} in all, got {len(given)}; "
                "give None for a slot that waits"
            )
        return {slot: token for slot, token in enumerate(given) if token is not None}

    def _check_slot(self, slot: int) -> None:
        if isinstance(slot, bool) or not isinstance(slot, int) or not 0 <= slot < self.slots:
            raise SessionError(f"there is no slot {slot!r}; this plan has 0 to {self.slots - 1}")

    def _look(self, slots: Iterable[int]) -> None:
        """`check_finite`, where looking does not make the host wait for what it has enqueued."""
        if self.device.type == "cpu":
            self.check_finite(slots)

    def _check_room(self, slot: int, count: int) -> None:
        self._check_whole()
        self._look([slot])
        held = self._counter.held[slot]
        if held + count > self.max_context:
            raise SessionError(
                f"slot {slot} holds {held} tokens; {count} more exceed the context of {self.max_context}; "
                "reset it, or compile with a larger --max-context"
            )

    def _check_whole(self) -> None:
        if self._broken:
            raise SessionError("an earlier step was interrupted: the state is half-written; call reset()")

    @_one_at_a_time
    def check_finite(self, slots: Iterable[int], known: Sequence[bool] | None = None) -> None:
        """Raise SessionError, naming the slot, where logits of one of these were not finite: nothing is to
        come of them. Waits for the device, unless it is known.
        """
        chosen = list(slots)
        finite = (self._tainted[chosen] == 0).tolist() if known is None else known
        bad = [s for s, fine in zip(chosen, finite, strict=True) if not fine]
        if bad:
            self._streams = self._next = None
            self.wait()  # where a step failed, that is why
            raise SessionError(
                f"the logits of slot {bad[0]} are not finite (NaN or infinity): its weights overflow these "
                "numerics; compare with the recipe fp32, or find the first such node with `dsv4c bisect`; "
                f"then call reset({bad[0]})"
            )

    # --- steps ---

    def _buckets(self, logits: Logits = "all") -> list[Bucket]:
        shapes = (program.shape for program in self.plan.buckets.values())
        return [b for b in shapes if b.is_main and logits in (b.logits, "last")]

    def _fitting(self, sequences: int, tokens: int, logits: Logits = "all") -> Bucket:
        """The smallest bucket that holds so many rows; of several sequences at least that many, of one as
        many tokens as there are in any.
        """
        fitting = self._buckets(logits)
        wide = [b for b in fitting if b.sequences >= sequences] or fitting
        enough = [b for b in wide if b.tokens >= tokens]
        if enough:
            return min(enough, key=lambda b: (b.rows, b.tokens))
        return max(wide, key=lambda b: (b.tokens, -b.sequences))

    def _chunks(
        self,
        ids: list[int],
        slot: int,
        logits: Logits,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """One slot's tokens, as many per call as the plan has room for; the last call is padded."""
        made = []
        start = 0
        try:
            while start < len(ids):
                bucket = self._fitting(1, len(ids) - start, logits)
                part = ids[start : start + bucket.tokens]
                made.append(self._call(bucket, {slot: part})[slot])
                start += len(part)
                if progress is not None:
                    progress(start, len(ids))
        except SessionError:  # which says itself what its slot needs
            raise
        except BaseException as error:
            if start and not self._broken:
                self.reset(slot)
                error.add_note(f"slot {slot} was reset: {start} of {len(ids)} tokens had gone in")
            raise
        self._remember(made)
        if logits == "last":
            return made[-1]["logits"][-1:]
        return torch.cat([rows["logits"] for rows in made])

    def _remember(self, made: Sequence[Mapping[str, Tensor]]) -> None:
        self._streams = torch.cat([rows["streams"] for rows in made])
        self._next = torch.cat([rows["next"] for rows in made])

    def _call(self, bucket: Bucket, work: Mapping[int, Sequence[int]]) -> dict[int, dict[str, Tensor]]:
        """One call on the tokens of some slots. Returns copies of each slot's rows of the outputs."""
        inputs = self._inputs(bucket, work)
        with self.executor.naming(), torch.inference_mode():
            self._broken = True  # until the step is through: an interrupt may leave half-written state
            outputs = self.executor.run(bucket.name, inputs)
            made = {}
            for i, (slot, ids) in enumerate(work.items()):
                row, last = i * bucket.tokens, bucket.logits == "last"
                rows = {n: v[row : row + len(ids)].clone() for n, v in outputs.items() if n == "streams"}
                at, count = (i, 1) if last else (row, len(ids))
                rows |= {n: v[at : at + count].clone() for n, v in outputs.items() if n != "streams"}
                made[slot] = rows
                self._tainted[slot] += _taints(rows["logits"]).sum()
                self._following[slot] = rows["next"][-1]
            self._broken = False
        for slot, ids in work.items():
            self.memories[slot] = Memory()
            if self._sampling is not None and not bucket.sampled:
                self._sampling.remember(slot, self._counter.held[slot], list(ids))
                self.executor.share(SAMPLING)
            self._counter.advance(slot, len(ids))
            self._followed[slot] = True
        self._look(work)
        return made

    def _inputs(self, bucket: Bucket, work: Mapping[int, Sequence[int]]) -> dict[str, Tensor]:
        """Tokens row by row, lengths and slots of the bucket's sequences; idle ones have none and no slot."""
        tokens, lengths, slots = [], [], []
        each = bucket.given // bucket.sequences
        for slot, ids in work.items():
            tokens += [*ids, *[0] * (each - len(ids))]
            lengths.append(len(ids))
            slots.append(slot)
        idle = bucket.sequences - len(work)
        rows = {
            "tokens": [*tokens, *[0] * (idle * each)],
            "lengths": [*lengths, *[0] * idle],
            "slots": [*slots, *[-1] * idle],
        }
        return {name: torch.tensor(values, dtype=torch.int32) for name, values in rows.items()}

    def _greedy(self, count: int, slots: Sequence[int], *, keep: bool) -> Tensor | None:
        self._check_steps(count, slots)
        unknown = [s for s in slots if not self._followed[s]]
        if unknown:
            raise SessionError(f"slot {unknown[0]} has no likeliest token yet; call prefill or decode first")
        for s in slots:
            self._going[s] = 1
        kept, _, _ = self._repeat(count, slots, keep=keep)
        for s in slots:
            self._counter.advance(s, count)
        self._look(slots)
        return kept

    def _check_steps(self, count: int, slots: Sequence[int], each: int = 1) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise SessionError(f"steps to enqueue: {count!r}, expected a number of at least 1")
        for s in slots:
            self._check_slot(s)
            self._check_room(s, count * each)
        if not slots or len(set(slots)) < len(slots):
            raise SessionError(f"slots to move on: {list(slots)}, expected at least one, each once")

    def _repeat(
        self, count: int, slots: Sequence[int], *, keep: bool, rounds: bool = False
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Steps or rounds of these slots, from what they come to say and whether they go on. Returns what
        they said, if asked to keep it, the logits of the last one, and what is tainted.

        Nothing here makes the host wait: a list that indexes a tensor on the device, or a copy from memory
        that is not pinned, would, and the device would stand still between portions.
        """
        bucket = self._of_kind("round", len(slots))[0] if rounds else self._fitting(len(slots), 1)
        if bucket.sequences < len(slots):
            raise SessionError(
                f"no bucket of the plan decodes {len(slots)} slots together, only "
                f"{', '.join(self.plan.buckets)}; move fewer on at a time, or compile with another --batch"
            )
        kept = torch.empty(count, bucket.rows, dtype=torch.int32, device=self.device) if keep else None
        seats = self._seats(bucket, slots)
        with self.executor.naming(), torch.inference_mode():
            inputs = {"tokens": _seated(self._following, seats), "slots": seats.slots}
            inputs["lengths"] = _seated(self._going, seats) if bucket.sampled else seats.lengths
            self._broken = True
            outputs = self.executor.repeat(bucket.name, inputs, count, kept)
            self._following.index_copy_(0, seats.index, outputs["next"][: len(slots)])
            if bucket.sampled:
                self._going.index_copy_(0, seats.index, outputs["going"][: len(slots)])
            taints = _taints(outputs["logits"][: len(slots) * bucket.tokens].reshape(len(slots), -1))
            self._tainted.index_add_(0, seats.index, taints)
            tainted = self._tainted.index_select(0, seats.index)
            self._broken = False
        for s in slots:
            self.memories[s] = Memory()
        said = None if kept is None else kept[:, : len(slots) * bucket.tokens]
        return said, outputs["logits"][: len(slots)], tainted

    def _seats(self, bucket: Bucket, slots: Sequence[int]) -> _Seats:
        """Made once for some slots: a sequence that goes on sits where it sat."""
        key = bucket.name, tuple(slots)
        if key not in self._seated:
            if len(self._seated) >= SEATS:
                self._seated.clear()
            idle = [-1] * (bucket.sequences - len(slots))
            index = self._moved(torch.tensor(slots))
            given = self._moved(torch.tensor([[*slots, *idle], [1] * len(slots) + [0] * len(idle)]).int())
            self._seated[key] = _Seats(index, given[0], given[1])
        return self._seated[key]

    def _moved(self, value: Tensor) -> Tensor:
        """A value of the host on the device, which nobody waits for."""
        if self.device.type == "cpu":
            return value
        return value.pin_memory().to(self.device, non_blocking=True)

    def _set_position(self, slot: int, held: int, reached: int) -> None:
        value = self._states[POSITION]
        assert isinstance(value, Tensor)
        value[slot] = held
        self.executor.share([POSITION])
        self._counter.put(slot, held, reached)


SEATS = 256
"""Ways in which slots sit in buckets that a session remembers."""


def _seated(values: Tensor, seats: _Seats) -> Tensor:
    """Those of the slots, one to a sequence; 0 where there is none."""
    given = values.index_select(0, seats.index)
    idle = len(seats.slots) - len(given)
    return torch.cat([given, given.new_zeros(idle)]) if idle else given


def _taints(logits: Tensor) -> Tensor:
    """By row: 0, or NaN where a number is not finite."""
    return logits.mul(0.0).sum(1)


def token_id(token: Any, which: str, vocab_size: int) -> int:
    """It as a number: integers of any library count, tensors of one among them; truth values do not. Raises
    SessionError, in which it is called `which`, unless it is an id of the vocabulary.
    """
    try:
        number = None if isinstance(token, bool) else operator.index(token)
    except TypeError:
        number = None
    if number is None:
        raise SessionError(f"{which} is {token!r}, expected a token id")
    if not 0 <= number < vocab_size:
        raise SessionError(f"{which} is {number}, out of range; expected ids from 0 to {vocab_size - 1}")
    return number
