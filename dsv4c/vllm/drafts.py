"""Drafts: tokens that may come next, checked by the step that takes them. They change no answer.

vLLM names the class that makes them: `--speculative-config '{"method": "custom_class", "model":
"package.Class", "num_speculative_tokens": 3}'`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dsv4c.runtime.session import Session


class Drafter(Protocol):
    """Made with the session and the most tokens to draft at a time."""

    def __init__(self, session: Session, most: int) -> None: ...

    def draft(self, slot: int, tokens: Sequence[int]) -> list[int]:
        """Tokens that may follow a sequence, of which the slot has consumed all but the last."""
        ...
