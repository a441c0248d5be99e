"""Drafts that are right seven times of ten, so that every way of accepting is taken."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

from dsv4c.runtime.session import Session


class Oracle:
    """A `Drafter` that knows the continuations of some prompts: a JSON file, named by DSV4C_KNOWN."""

    def __init__(self, session: Session, most: int) -> None:
        known = json.loads(Path(os.environ["DSV4C_KNOWN"]).read_text())
        self._known = [[*map(int, prompt.split()), *said] for prompt, said in known.items()]
        self._most, self._random = most, random.Random(0)

    def draft(self, slot: int, tokens: Sequence[int]) -> list[int]:
        whole = next((k for k in self._known if k[: len(tokens)] == list(tokens)), list(tokens))
        following = whole[len(tokens) : len(tokens) + self._most]
        return [t if self._random.random() < 0.7 else (t + 3) % 500 for t in following]
