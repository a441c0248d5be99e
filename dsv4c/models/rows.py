"""Which rows a part of the model's graph runs over, and what they see."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.ir.graph import Value

WINDOW_TILE = 16  # keys that attention takes at a time
POOL_TILE = 8


def ring_rows(reach: int, tokens: int, tile: int) -> int:
    """Rows that hold `tokens` new ones and what the first of them looks back to: `reach`, itself included."""
    return -(-(reach + tokens - 1) // tile) * tile


@dataclass(frozen=True)
class Rows:
    """The rows that layers run over: their tokens, positions (-1 is padding), the slots that they belong to,
    and where each finds what `Model.remember` returns, i32[N] all.

    A row's window is the `window` positions up to its `last`. Rings of these layers serve rows that look
    `reach` rows back; `beside`: rows are kept beside them until the call ends; `judged`: as many rows count
    as hold, and padding has no experts.
    """

    tokens: Value
    positions: Value
    slots: Value
    places: Value
    last: Value
    window: int
    reach: int
    beside: bool = False
    judged: bool = False
