"""The next token, and the rows it is read from.

How a sequence is sampled is data of its slot: `KNOBS` f32, the `seed` of its random numbers, the `origin`,
which is the place of the first token that it makes itself, and `STOPS` ids that end it. A slot of zeros takes
the likeliest token. What was said so far is `history`, the tokens by place: a row that is taken back leaves
no trace, as only the places before it count.
"""

from __future__ import annotations

from typing import ClassVar

from dsv4c.ir.op import Cost, Op, elements, expect, expect_tensor, primitive
from dsv4c.types import F32, I32, TensorType, Type

KNOBS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""What a slot's knobs are, by column. Zero is off, for every one."""

STOPS = 8
"""Ids that can end a sequence; -1 is none."""


@primitive
class LastRows(Op):
    """Row of each sequence's last token: x[B·T, ...], lengths i32[B] -> [B, ...]; zeros where length is 0."""

    def infer(self, x: Type, lengths: Type) -> TensorType:
        tensor = expect_tensor(x, "x", least=1)
        rows, sequences = tensor.shape[0], expect_tensor(lengths, "lengths", 1, I32).shape[0]
        expect(rows % sequences == 0, f"{rows} rows do not divide over {sequences} sequences")
        return tensor.with_shape((sequences, *tensor.shape[1:]))

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        return Cost(0, (results[0].nbytes, operands[1].nbytes), (results[0].nbytes,))


@primitive
class Argmax(Op):
    """Column of the largest logit, the lowest on ties: logits[N, V] -> i32[N]."""

    by_row: ClassVar = frozenset({0})

    def infer(self, logits: Type) -> TensorType:
        return TensorType(I32, expect_tensor(logits, "logits", 2).shape[:1])


def _expect_slots(rows: int, positions: Type, slots: Type) -> None:
    expect_tensor(positions, "positions", 1, I32)
    expect(slots == positions, f"slots {slots} and positions {positions} differ")
    expect(positions.shape == (rows,), f"{rows} rows and positions {positions} differ")


@primitive
class Penalize(Op):
    """Logits f32[N, V], those of tokens that the sequence has lowered.

    history i32[S, C], positions and slots i32[N], origin i32[S], knobs f32[S, 7]. The tokens up to a row's
    position: a positive logit is divided by the repetition penalty, another multiplied; of those from the
    origin on, the presence penalty is subtracted once, the frequency penalty as often as they are there.
    """

    by_slot: ClassVar = True
    by_row: ClassVar = frozenset({0, 2, 3})
    picks: ClassVar = {1: (0, 1), 3: (1, 0)}

    def infer(
        self, logits: Type, history: Type, positions: Type, slots: Type, origin: Type, knobs: Type
    ) -> TensorType:
        tensor = expect_tensor(logits, "logits", 2, F32)
        expect_tensor(history, "history", 2, I32)
        _expect_slots(tensor.shape[0], positions, slots)
        expect_tensor(origin, "origin", 1, I32)
        wanted = TensorType(F32, (history.shape[0], len(KNOBS)))
        expect(knobs == wanted, f"knobs must be {wanted} for the history {history}, got {knobs}")
        return tensor

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        logits, history, positions, slots, origin, knobs = operands
        read = history.nbytes // history.shape[0] * min(logits.shape[0], history.shape[0])
        small = (positions.nbytes, slots.nbytes, origin.nbytes, knobs.nbytes)
        return Cost(elements(logits), (logits.nbytes, read, *small), (logits.nbytes,))


@primitive
class TokenProbabilities(Op):
    """What the next token is drawn from: logits f32[N, V], slots i32[N], knobs f32[S, 7] -> f32[N, V].

    Logits over the temperature; the top_k largest; of their softmax the largest until they sum to top_p, the
    one that crosses it included; those of at least min_p times the largest; what is left sums to 1. Equal
    logits stay or go together. Without a temperature all of it is the largest logit's, the lowest id's of
    equals.
    """

    by_slot: ClassVar = True
    by_row: ClassVar = frozenset({0, 1})
    picks: ClassVar = {1: (2, 0)}

    def infer(self, logits: Type, slots: Type, knobs: Type) -> TensorType:
        tensor = expect_tensor(logits, "logits", 2, F32)
        _expect_slots(tensor.shape[0], slots, slots)
        expect(
            expect_tensor(knobs, "knobs", 2, F32).shape[1] == len(KNOBS),
            f"knobs must have {len(KNOBS)} columns, got {knobs}",
        )
        return tensor


@primitive
class Draw(Op):
    """A token by its probability: f32[N, V] -> i32[N].

    positions and slots i32[N], origin i32[S], seeds i32[S, 2]. It is the first whose probabilities, summed
    from id 0 on, exceed a number of (0, 1): the first word of Philox 4x32-10 under the slot's seed, at the
    index that the token has among those from the origin on. So the same seed gives the same numbers in any
    slot and company. Probabilities count in whole 2^-40, so that sums depend on no order.
    """

    by_slot: ClassVar = True
    by_row: ClassVar = frozenset({0, 1, 2})
    picks: ClassVar = {2: (3, 0)}

    def infer(
        self, probabilities: Type, positions: Type, slots: Type, origin: Type, seeds: Type
    ) -> TensorType:
        rows = expect_tensor(probabilities, "probabilities", 2, F32).shape[0]
        _expect_slots(rows, positions, slots)
        sequences = expect_tensor(origin, "origin", 1, I32).shape[0]
        wanted = TensorType(I32, (sequences, 2))
        expect(seeds == wanted, f"seeds must be {wanted} for the origin {origin}, got {seeds}")
        return TensorType(I32, (rows,))


@primitive
class Emit(Op):
    """What a step says, and who goes on: chosen, lengths and slots i32[N], stops i32[S, 8] -> two i32[N].

    The chosen token, -1 where the length is 0; and the lengths of the next step, 0 once the chosen one is a
    stop of its slot.
    """

    by_slot: ClassVar = True
    by_row: ClassVar = frozenset({0, 1, 2})
    picks: ClassVar = {2: (3, 0)}

    def infer(self, chosen: Type, lengths: Type, slots: Type, stops: Type) -> tuple[TensorType, TensorType]:
        tensor = expect_tensor(chosen, "chosen", 1, I32)
        expect(lengths == chosen, f"lengths {lengths} and chosen {chosen} differ")
        expect(slots == chosen, f"slots {slots} and chosen {chosen} differ")
        expect(
            expect_tensor(stops, "stops", 2, I32).shape[1] == STOPS,
            f"stops must have {STOPS} columns, got {stops}",
        )
        return tensor, tensor


last_rows, argmax = LastRows.apply, Argmax.apply
penalize, token_probabilities, draw, emit = (
    Penalize.apply,
    TokenProbabilities.apply,
    Draw.apply,
    Emit.apply,
)
