"""Which request is in which slot, and what a new one finds there.

A slot that is given back keeps its state: a prompt that begins with what it has consumed goes on from there,
on the very ids. So does one that begins as a sequence under way, in a copy of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsv4c.buckets import ROWS
from dsv4c.runtime.session import Session

WORTH_A_COPY = 64
"""Tokens of a prompt from which on a sequence's state is copied rather than read again."""


class Slots:
    """The slots of a session. `read` and `reused` count tokens of prompts: those to be read, and those that
    slots held already.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._free = list(range(session.slots))  # given back longest ago first
        self._ids: list[Sequence[int]] = [() for _ in self._free]
        self._reached = [0 for _ in self._free]  # the furthest that each was seen
        self.read = self.reused = 0

    @property
    def free(self) -> int:
        """How many have no request."""
        return len(self._free)

    def admit(self, tokens: list[int], *, fresh: bool = False) -> int:
        """A slot for a prompt, holding as much of all but its last token as can be had; nothing if `fresh`.
        `tokens` will grow by what is said; it tells later what the slot holds.
        """
        shared = [0 if fresh else self._shared(slot, tokens) for slot in range(self._session.slots)]
        under_way = [slot for slot in range(self._session.slots) if slot not in self._free]
        slot = max(self._free, key=lambda s: shared[s])  # the first of equals
        held = shared[slot]
        best = max(under_way, key=lambda s: shared[s], default=slot)
        if shared[best] >= max(held + 1, WORTH_A_COPY):
            slot, held = self._free[0], shared[best]
            self._session.copy_slot(best, slot)
            self._reached[slot] = self._reached[best]
        self._free.remove(slot)
        held = self._session.keep(held, slot)
        if not held:
            self._reached[slot] = 0
        self._ids[slot] = tokens
        self.reused += held
        self.read += len(tokens) - held
        return slot

    def release(self, slot: int) -> None:
        """The slot's request is over; what it has consumed stays."""
        self._free.append(slot)

    def _shared(self, slot: int, prompt: list[int]) -> int:
        """Tokens of a prompt, without its last one, that the slot holds or can go back to."""
        position = self._session.positions[slot]
        self._reached[slot] = max(self._reached[slot], position)
        floor = max(self._reached[slot] - ROWS, 0)
        held = min(position, len(self._ids[slot]), len(prompt) - 1)
        if held < floor or prompt[:floor] != self._ids[slot][:floor]:
            return 0
        known = zip(prompt[floor:held], self._ids[slot][floor:held], strict=True)
        return next((floor + i for i, (a, b) in enumerate(known) if a != b), held)
