"""Drafts: tokens that may come next, checked by the step that takes them. They change no answer.

vLLM names the class that makes them: `--speculative-config '{"method": "custom_class", "model":
"package.Class", "num_speculative_tokens": 3}'`. `dsv4c.vllm.drafts.PlanDrafter` is the plan's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dsv4c.errors import ConfigError
from dsv4c.runtime.session import Session


class Drafter(Protocol):
    """Made with the session and the most tokens to draft at a time."""

    def __init__(self, session: Session, most: int) -> None: ...

    def draft(self, slot: int, tokens: Sequence[int]) -> list[int]:
        """Tokens that may follow a sequence, of which the slot has consumed all but the last."""
        ...


class PlanDrafter:
    """What the checkpoint itself drafts with, its MTP block or DSpark's stages: a plan compiled with --draft.

    Raises PlanError for a plan that drafts nothing, ConfigError for one that drafts fewer tokens.
    """

    def __init__(self, session: Session, most: int) -> None:
        drafted = session.plan.program("draft").shape.tokens
        if most > drafted:
            raise ConfigError(
                f"num_speculative_tokens is {most}: plan {session.plan.name} drafts {drafted}; draft fewer, "
                "or compile with more --draft-tokens"
            )
        self._session, self._most = session, most

    def draft(self, slot: int, tokens: Sequence[int]) -> list[int]:
        return self._session.draft({slot: tokens[-1]})[slot].tokens[: self._most]
