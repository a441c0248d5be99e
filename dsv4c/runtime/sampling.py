"""How a sequence's tokens are chosen: what a caller asks for, and the rows of state that tell the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4c.errors import SessionError
from dsv4c.numerics.codec import Value

STATES = {name: f"sampling.{name}" for name in ("history", "origin", "knobs", "seeds", "stops")}
"""The states of plans whose decode steps sample."""

LEAST = "drafting.least"
"""The state of plans whose drafts come with a confidence: by slot how likely one must be to be judged."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. As given here: the likeliest, always.

    temperature: 0 takes the likeliest. top_k, top_p, min_p: only the k largest; of those the largest until
    they sum to p, the one that crosses it included; of those what is at least min_p times the largest; 0, 1
    and 0 are off. repetition_penalty: logits of all tokens so far are divided by it where they are positive,
    else multiplied. presence_penalty, frequency_penalty: subtracted from those of tokens that were made here,
    once or as often. seed: of 64 bits; the same one gives the same tokens, whatever runs beside.

    Raises SessionError for a value that is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (least, most, expected) in RANGES.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            whole = isinstance(getattr(type(self), name), int)
            if not number or not least <= value <= most or (whole and not isinstance(value, int)):
                raise SessionError(f"{name} is {value!r}, expected {expected}")

    @property
    def is_greedy(self) -> bool:
        """Is it always the likeliest token, with nothing lowered?"""
        lowers = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return self.temperature == 0 and not any(lowers)

    @property
    def knobs(self) -> list[float]:
        """As the slot's row of state has them: zero is off, so that zeros take the likeliest."""
        top_p = 0.0 if self.top_p == 1 else self.top_p
        repetition = 0.0 if self.repetition_penalty == 1 else self.repetition_penalty
        return [
            self.temperature,
            self.top_k,
            top_p,
            self.min_p,
            repetition,
            self.presence_penalty,
            self.frequency_penalty,
        ]


RANGES: Mapping[str, tuple[float, float, str]] = {
    "temperature": (0, 100, "a number of 0 (always the likeliest token) to 100"),
    "top_k": (0, 1 << 24, "a number of tokens, 0 for all"),
    "top_p": (1e-6, 1, "a number above 0, of at most 1 (all tokens)"),
    "min_p": (0, 1, "a number of 0 (all tokens) to 1"),
    "repetition_penalty": (1e-2, 100, "a number of 0.01 to 100, 1 for none"),
    "presence_penalty": (-100, 100, "a number of -100 to 100, 0 for none"),
    "frequency_penalty": (-100, 100, "a number of -100 to 100, 0 for none"),
    "seed": (0, (1 << 64) - 1, "a whole number of 64 bits"),
}


class SamplingState:
    """The states of a plan that samples, by slot."""

    def __init__(self, states: Mapping[str, Value]) -> None:
        def plain(name: str) -> Tensor:
            value = states[STATES[name]]
            assert isinstance(value, Tensor)
            return value

        self._history, self._origin, self._knobs = plain("history"), plain("origin"), plain("knobs")
        self._seeds, self._stops = plain("seeds"), plain("stops")

    def set(self, slot: int, sampling: Sampling, stops: Iterable[int], origin: int) -> None:
        """How the slot goes on: `origin` is the place of the first token that it makes."""
        ids = list(stops)
        most = self._stops.shape[1]
        if len(ids) > most:
            raise SessionError(f"{len(ids)} tokens that stop, expected at most {most}")
        low, high = (_signed(sampling.seed >> shift & 0xFFFFFFFF) for shift in (0, 32))
        self._knobs[slot] = torch.tensor(sampling.knobs, dtype=torch.float32)
        self._seeds[slot] = torch.tensor([low, high], dtype=torch.int32)
        self._stops[slot] = torch.tensor([*ids, *[-1] * (most - len(ids))], dtype=torch.int32)
        self._origin[slot] = origin

    def remember(self, slot: int, place: int, ids: list[int]) -> None:
        """Tokens that the slot was given, from `place` on. Steps that sample remember theirs themselves."""
        self._history[slot, place : place + len(ids)] = torch.tensor(ids, dtype=torch.int32)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


@dataclass(frozen=True)
class Chances:
    """Log-probabilities under the model's own logits, before anything lowers or leaves out a token: of the
    chosen one, and of the n best by id.
    """

    chosen: float
    best: tuple[tuple[int, float], ...]


class Said:
    """What steps of some slots say, and whether their logits were finite, once the device is through.

    A step says `each` tokens of a slot at most. With the logits of a single step also the log-probabilities
    of the chosen token and the `best`, by slot.
    """

    def __init__(
        self,
        slots: Sequence[int],
        kept: Tensor,
        tainted: Tensor,
        logits: Tensor | None = None,
        best: int = 0,
        each: int = 1,
    ) -> None:
        self.slots = tuple(slots)
        self.finite: list[bool] = []
        self.counts: list[list[int]] = []  # by slot: how many tokens each step has said
        self.chances: list[Chances] = []
        self.each = each
        self._best = best
        self._through: torch.cuda.Event | None = None
        by_slot = kept.reshape(len(kept), len(self.slots), each).transpose(0, 1).flatten(1)
        rows = [tainted.view(torch.int32)[:, None], by_slot]
        if logits is not None:
            known = logits.log_softmax(1)
            most = known.topk(best, dim=1)
            chosen = known.gather(1, kept[0].clamp(min=0).long()[:, None])
            chances = torch.cat([chosen, most.values], dim=1).view(torch.int32)  # the bits, beside the ids
            rows += [most.indices.to(torch.int32), chances]
        self._steps, self._rows = len(kept) * each, torch.cat(rows, dim=1)
        if kept.is_cuda:
            found = self._rows
            self._rows = torch.empty_like(found, device="cpu", pin_memory=True)
            self._rows.copy_(found, non_blocking=True)
            self._through = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._through.record()

    def wait(self) -> list[list[int]]:
        """The tokens of each slot, step by step, -1 where one says nothing, or nothing more. Waits for these
        steps alone.
        """
        if self._through is not None:
            self._through.synchronize()
        at = 1 + self._steps
        rows = self._rows[:, :at].tolist()
        if self._rows.shape[1] > at:
            ids = self._rows[:, at : at + self._best].tolist()
            chances = self._rows[:, at + self._best :].contiguous().view(torch.float32).tolist()
            pairs = zip(ids, chances, strict=True)
            self.chances = [Chances(c[0], tuple(zip(i, c[1:], strict=True))) for i, c in pairs]
        self.finite = [row[0] == 0 for row in rows]  # bits of a float that is 0 or NaN
        said = [row[1:] for row in rows]
        steps = range(0, self._steps, self.each)
        self.counts = [[sum(t >= 0 for t in row[at : at + self.each]) for at in steps] for row in said]
        return said
