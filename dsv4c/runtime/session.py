"""A plan with weights and state: prompts in, logits out. Every request is checked before anything moves."""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv4c.errors import PlanError, SessionError
from dsv4c.numerics.codec import Quantized, Value, view
from dsv4c.plan.records import Plan, Progress
from dsv4c.publish import published
from dsv4c.runtime.checkpoint import Checkpoint
from dsv4c.runtime.parameter import ParamRecord
from dsv4c.types import Type

STATE_SCHEMA = "2"


class Executor(Protocol):
    """What runs a plan's buckets. `state` is the block of all sequences, `states` its typed views."""

    state: Tensor

    @property
    def states(self) -> Mapping[str, Value]: ...

    def clear(self) -> None: ...

    def run(self, mode: str, inputs: Mapping[str, Tensor], sequence: int = 0) -> dict[str, Tensor]: ...


class Session:
    """Generates with one plan and one checkpoint, `batch` sequences at a time.

    Sequences are numbered from 0 and independent. A request that is refused (SessionError) changes nothing.
    """

    def __init__(self, plan: Plan, executor: Executor) -> None:
        self.plan, self.executor = plan, executor
        deployment, config = plan.deployment, plan.config
        self.batch, self.max_context = int(deployment["batch"]), int(deployment["max_context"])
        self.vocab_size = int(config["vocab_size"])
        self._streams: Tensor | None = None
        self._next: Tensor | None = None
        self._broken = False
        self.reset()

    # --- running ---

    def prefill(self, tokens: Sequence[int] | Tensor, sequence: int = 0) -> Tensor:
        """Consume `tokens` after what the sequence has consumed so far. Returns logits f32 [len, vocab]: row
        i predicts what follows tokens[i].

        Raises SessionError for no tokens, an id out of range, a context that would overflow, no such
        sequence.
        """
        ids = self._prompt(tokens)
        self._check_sequence(sequence)
        self._check_room(self.positions[sequence], len(ids), f"sequence {sequence}")
        return self._chunks("prefill", ids, sequence, {})

    def decode(self, tokens: Sequence[int | None]) -> Tensor:
        """One token for each sequence, None for those that wait. Returns logits f32 [batch, vocab], NaN in
        the rows of those.

        Raises SessionError for another number of tokens, nothing but None, an id out of range, a full
        context.
        """
        if not isinstance(tokens, Iterable):
            raise SessionError(f"decode got {tokens!r}, expected a token per sequence, [3]")
        given = list(tokens)
        if len(given) != self.batch:
            raise SessionError(
                f"decode takes one token per sequence, {self.batch} in all, got {len(given)}; "
                "give None for a sequence that waits"
            )
        active = [sequence for sequence, token in enumerate(given) if token is not None]
        if not active:
            raise SessionError("decode got no token for any sequence; give at least one")
        ids = {sequence: self._id(given[sequence], f"token {sequence}") for sequence in active}
        for sequence in active:
            self._check_room(self.positions[sequence], 1, f"sequence {sequence}")
        lengths = torch.tensor([int(s in ids) for s in range(self.batch)], dtype=torch.int32)
        row = torch.tensor([ids.get(s, 0) for s in range(self.batch)], dtype=torch.int32)
        outputs = self._run("decode", {"tokens": row, "lengths": lengths}, 0)
        logits = outputs["logits"].clone()
        logits[lengths == 0] = torch.nan
        self._streams, self._next = outputs["streams"].clone(), outputs["next"].clone()
        return logits

    def draft(self, streams: Tensor, tokens: Sequence[int] | Tensor, sequence: int = 0) -> Tensor:
        """Run the MTP block on the streams [len, S, H] of consecutive tokens and the token that follows each.
        Returns logits f32 [len, vocab]: row i predicts what follows tokens[i].

        Raises SessionError as `prefill` does, PlanError if the plan was compiled without MTP.
        """
        bucket = self.plan.bucket("mtp")
        ids = self._prompt(tokens)
        self._check_sequence(sequence)
        wanted = bucket.values["streams"].type.shape[1:]
        if tuple(streams.shape) != (len(ids), *wanted):
            raise SessionError(
                f"draft takes one row of streams per token, {[len(ids), *wanted]}, got {list(streams.shape)}"
            )
        self._check_room(self.draft_positions[sequence], len(ids), f"the MTP block of sequence {sequence}")
        return self._chunks("mtp", ids, sequence, {"streams": streams})

    def reset(self, sequence: int | None = None) -> None:
        """Forget one sequence, or all. What its buffers hold does not matter: positions say what is valid."""
        if sequence is None:
            self.executor.clear()
            self._broken = False
            for position in self._positions():
                position.zero_()
            return
        self._check_sequence(sequence)
        self._check_whole()
        for position in self._positions():
            position[sequence] = 0

    # --- looking ---

    @property
    def positions(self) -> list[int]:
        """Tokens that every sequence has consumed."""
        return self._position("position").tolist()

    @property
    def draft_positions(self) -> list[int]:
        """Tokens that the MTP block of every sequence has consumed."""
        return self._position("mtp.position").tolist()

    @property
    def streams(self) -> Tensor:
        """The hyper-connection streams after the last layer [rows, S, H] of the last call: its tokens in
        order, or one row per sequence. Input of `draft`.
        """
        if self._streams is None:
            raise SessionError("no streams yet; call prefill or decode first")
        return self._streams

    @property
    def next_tokens(self) -> list[int]:
        """The likeliest next token by row of the last call (the lowest id of equals)."""
        if self._next is None:
            raise SessionError("no next tokens yet; call prefill or decode first")
        return self._next.tolist()

    # --- keeping ---

    def save_state(self, path: str | Path) -> Path:
        """Write the state of all sequences to a safetensors file, whole or not at all, and return its path.

        Raises SessionError if it cannot be written.
        """
        self._check_whole()
        target = Path(path)
        state = self.executor.state.cpu()
        metadata = {
            "format": "dsv4c-state",
            "schema": STATE_SCHEMA,
            "plan": self.plan.digest,
            "sha256": _checksum(state),
        }
        try:
            with published(target) as made:
                save_file({"state": state}, made, metadata)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SessionError(f"{target}: the state cannot be written: {reason}") from None
        return target

    def load_state(self, path: str | Path) -> None:
        """Go on from a saved state. Raises SessionError for a file that is damaged or of another plan; the
        session's state is then as before.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != "dsv4c-state" or metadata.get("schema") != STATE_SCHEMA:
                    raise SessionError(f"{path}: is no saved state of this version of dsv4c")
                if metadata.get("plan") != self.plan.digest:
                    raise SessionError(
                        f"{path}: was saved with another plan ({metadata.get('plan', '?')[:12]}) than this "
                        f"one ({self.plan.digest[:12]}); load the plan it was saved with"
                    )
                state = file.get_tensor("state")
        except (OSError, SafetensorError) as error:
            raise SessionError(f"{path}: cannot be read as a saved state: {error}") from None
        mine = self.executor.state
        if state.dtype != mine.dtype or state.shape != mine.shape:
            found = f"{state.dtype}{list(state.shape)}"
            raise SessionError(f"{path}: holds {found}, expected {mine.numel()} bytes of state")
        if metadata.get("sha256") != _checksum(state):
            raise SessionError(f"{path}: is damaged: its bytes are not those that were saved")
        self._check_positions(path, state)
        mine.copy_(state)
        self._broken = False

    # --- checks ---

    def check_tokens(self, tokens: Iterable[Any], what: str = "token") -> None:
        """Raise SessionError, in which they are called `what`, unless all are token ids of the model."""
        self._ids(tokens, what)

    def _ids(self, tokens: Iterable[Any], what: str = "token") -> list[int]:
        return [self._id(token, f"{what} {place}") for place, token in enumerate(tokens)]

    def _id(self, token: Any, which: str) -> int:
        """Integers of any library count, tensors of one among them; truth values do not."""
        try:
            number = None if isinstance(token, bool) else operator.index(token)
        except TypeError:
            number = None
        if number is None:
            raise SessionError(f"{which} is {token!r}, expected a token id")
        if not 0 <= number < self.vocab_size:
            raise SessionError(
                f"{which} is {number}, out of range; expected ids from 0 to {self.vocab_size - 1}"
            )
        return number

    def _prompt(self, tokens: Sequence[int] | Tensor) -> list[int]:
        if not isinstance(tokens, Iterable) or (isinstance(tokens, Tensor) and tokens.ndim != 1):
            raise SessionError(f"the prompt is {tokens!r}, expected token ids in a row, [3, 17, 5]")
        ids = self._ids(tokens.tolist() if isinstance(tokens, Tensor) else tokens)
        if not ids:
            raise SessionError("the prompt is empty; give at least one token")
        return ids

    def _check_sequence(self, sequence: int) -> None:
        if isinstance(sequence, bool) or not isinstance(sequence, int) or not 0 <= sequence < self.batch:
            raise SessionError(f"there is no sequence {sequence!r}; this plan has 0 to {self.batch - 1}")

    def _check_room(self, position: int, count: int, who: str) -> None:
        self._check_whole()
        if position + count > self.max_context:
            raise SessionError(
                f"{who} holds {position} tokens; {count} more exceed the context of {self.max_context}; "
                "reset it, or compile with a larger --max-context"
            )

    def _check_whole(self) -> None:
        if self._broken:
            raise SessionError("an earlier step was interrupted: the state is half-written; call reset()")

    def _check_positions(self, path: str | Path, state: Tensor) -> None:
        for slot in self.plan.state:
            if slot.name in POSITIONS:
                value = view(state, slot.type, slot.offset)
                assert isinstance(value, Tensor)
                if bool(((value < 0) | (value > self.max_context)).any()):
                    raise SessionError(f"{path}: is damaged: {slot.name} is {value.tolist()}")

    # --- steps ---

    def _chunks(self, mode: str, ids: list[int], sequence: int, rows: Mapping[str, Tensor]) -> Tensor:
        size = self.plan.bucket(mode).tokens
        logits, streams, chosen = [], [], []
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            inputs = {"tokens": _padded(torch.tensor(part, dtype=torch.int32), size)}
            inputs["lengths"] = torch.tensor([len(part)], dtype=torch.int32)
            inputs |= {name: _padded(value[start : start + size], size) for name, value in rows.items()}
            outputs = self._run(mode, inputs, sequence)
            logits.append(outputs["logits"][: len(part)].clone())
            streams.append(outputs["streams"][: len(part)].clone())
            chosen.append(outputs["next"][: len(part)].clone())
        if mode != "mtp":
            self._streams, self._next = torch.cat(streams), torch.cat(chosen)
        return torch.cat(logits)

    def _run(self, mode: str, inputs: Mapping[str, Tensor], sequence: int) -> dict[str, Tensor]:
        self._broken = True  # until the step is through: an interrupt may leave half-written state
        with torch.inference_mode():
            outputs = self.executor.run(mode, inputs, sequence)
        self._broken = False
        return outputs

    def _position(self, name: str) -> Tensor:
        if name not in self.executor.states:
            self.plan.bucket("mtp")
        value = self.executor.states[name]
        assert isinstance(value, Tensor)
        return value

    def _positions(self) -> list[Tensor]:
        return [self._position(name) for name in POSITIONS if name in self.executor.states]


POSITIONS = ("position", "mtp.position")


def _checksum(state: Tensor) -> str:
    """sha256 (hex) of a block of bytes in host memory."""
    return hashlib.sha256(state.numpy().data).hexdigest()


def _padded(rows: Tensor, size: int) -> Tensor:
    """`rows` with zeros appended to `size` rows."""
    padding = rows.new_zeros(size - len(rows), *rows.shape[1:])
    return torch.cat([rows, padding])


# --- binding ---


def bind(
    plan: Plan,
    weights: str | Path,
    *,
    progress: Progress | None = None,
    workers: int | None = None,
    poison: bool = False,
) -> Session:
    """See `Plan.bind`."""
    if plan.target != "cpu":
        from dsv4c.runtime import cuda

        return cuda.bind(plan, weights, progress=progress, workers=workers, poison=poison)
    from dsv4c.runtime.cpu import CpuExecutor

    checkpoint = Checkpoint.open(weights)
    params = [ParamRecord.from_json(record) for record in plan.weights]
    checkpoint.check(params).require_complete()
    _check_memory(plan)
    block = torch.empty(plan.weights_bytes, dtype=torch.uint8)
    offsets = {record["name"]: int(record["offset"]) for record in plan.weights}
    types = {param.name: param.type for param in params}
    checkpoint.load(params, _sink(block, types, offsets), progress=progress, workers=workers)
    return Session(plan, CpuExecutor(plan, block, poison=poison))


def _sink(
    block: Tensor, types: Mapping[str, Type], offsets: Mapping[str, int]
) -> Callable[[str, Value], None]:
    """Copies every parameter to its place in the block; called from several threads, each for another one."""

    def store(name: str, value: Value) -> None:
        target = view(block, types[name], offsets[name])
        wanted = target.parts if isinstance(target, Quantized) else (target,)
        given = value.parts if isinstance(value, Quantized) else (value,)
        for to, part in zip(wanted, given, strict=True):
            to.copy_(part)

    return store


def _check_memory(plan: Plan) -> None:
    needed = plan.weights_bytes + plan.state_bytes + max(b.arena_bytes for b in plan.buckets.values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise PlanError(
            f"plan {plan.name} needs {needed / 1e9:,.1f} GB of memory for weights, state and arena, this "
            f"machine has {memory / 1e9:,.1f} GB"
        )
