"""The end of a step that samples: what was said is remembered, the next token chosen, stops are found."""

from __future__ import annotations

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Value
from dsv4c.ir.ops import cache_write, draw, emit, penalize, token_probabilities


@fused
class Sampler(Fused):
    """logits f32[N, V] -> the chosen token, what is said, the next lengths, i32[N] each; and the history."""

    optional = True

    def body(
        self,
        logits: Value,
        tokens: Value,
        lengths: Value,
        positions: Value,
        slots: Value,
        history: Value,
        origin: Value,
        knobs: Value,
        seeds: Value,
        stops: Value,
    ) -> tuple[Value, ...]:
        written = cache_write(history, tokens, positions, slots)
        lowered = penalize(logits, written, positions, slots, origin, knobs)
        probabilities = token_probabilities(lowered, slots, knobs)
        chosen = draw(probabilities, positions, slots, origin, seeds)
        said, going = emit(chosen, lengths, slots, stops)
        return chosen, said, going, written
