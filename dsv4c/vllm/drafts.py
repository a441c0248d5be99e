"""Drafts: tokens that may come next, checked by the step that takes them. They change no answer.

vLLM names the class that makes them: `--speculative-config '{"method": "custom_class", "model":
"dsv4c.vllm.drafts.BlockDrafter", "num_speculative_tokens": 1}'`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dsv4c.errors import SessionError
from dsv4c.runtime.session import Session


class Drafter(Protocol):
    """Made with the session and the most tokens to draft at a time."""

    def __init__(self, session: Session, most: int) -> None: ...

    def consumed(self, slot: int, tokens: Sequence[int], start: int, streams: Tensor) -> None:
        """The slot has consumed tokens[start : start + len(streams)]; `streams` [len, S, H] are those after
        the last layer. tokens: the sequence so far, at least one more where the prompt is read.
        """
        ...

    def draft(self, slot: int, tokens: Sequence[int]) -> list[int]:
        """Tokens that may follow a sequence, of which the slot has consumed all but the last."""
        ...


class BlockDrafter:
    """The plan's own draft block (multi-token prediction), one token at a time. It follows a slot that it has
    seen from the first token, or from where it left it.
    """

    def __init__(self, session: Session, most: int) -> None:
        if most != 1:
            raise SessionError(f"the draft block drafts one token at a time, not {most}; ask for 1")
        if "draft" not in {program.shape.block for program in session.plan.buckets.values()}:
            raise SessionError(f"plan {session.plan.name} has no draft block; compile with --draft mtp")
        self._session = session
        self._guesses: dict[int, int] = {}

    def consumed(self, slot: int, tokens: Sequence[int], start: int, streams: Tensor) -> None:
        self._guesses.pop(slot, None)
        following = tokens[start + 1 : start + 1 + len(streams)]
        if following and self._session.draft_positions[slot] == start:
            logits = self._session.draft(streams[: len(following)], following, slot)
            self._guesses[slot] = int(logits[-1].argmax())

    def draft(self, slot: int, tokens: Sequence[int]) -> list[int]:
        return [self._guesses[slot]] if slot in self._guesses else []
