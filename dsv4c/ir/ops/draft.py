"""Several tokens per step: the rows that draft, the rows that judge drafts, and how many of those hold.

A round of a sequence begins with its anchor, the newest token, which the model has not consumed yet. Tokens
drafted behind it are judged by the model in one call: it says what follows each of them, and they hold up to
the first that is not what the model said. Whether the model takes its likeliest token or draws one, it says
what it would have said without drafts (for tokens drafted without chance, to draw and compare is rejection
sampling: one holds with its own probability, and another comes from what is left).
"""

from __future__ import annotations

from typing import ClassVar

from dsv4c.ir.op import Cost, Op, expect, expect_tensor, primitive
from dsv4c.ir.ops.sample import STOPS
from dsv4c.types import F32, I32, TensorType, Type


@primitive
class Preceding(Op):
    """The row one token earlier of every row of a call: (earlier [N, D], its positions i32[N]).

    rows[N, D] are at positions i32[N] of slots i32[N], -1 is no row; cache[S, C, D] holds those of tokens
    before the call, p at p % C. The one before position p is the call's row above, if it is the same slot's
    p - 1, or else the cache's. Before the first token it is zeros at -1. The cache stays as it is.
    """

    by_slot: ClassVar = True
    picks: ClassVar = {3: (0, 0)}

    def infer(self, cache: Type, rows: Type, positions: Type, slots: Type) -> tuple[Type, TensorType]:
        tensor = expect_tensor(rows, "rows", 2)
        ring = expect_tensor(cache, "cache", 3, tensor.dtype)
        places = expect_tensor(positions, "positions", 1, I32)
        expect(places.shape == tensor.shape[:1], f"rows {rows} and positions {positions} differ")
        expect(slots == positions, f"slots {slots} and positions {positions} differ")
        expect(ring.shape[2] == tensor.shape[1], f"cache {cache} and rows {rows} differ in width")
        return tensor, places

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        _, rows, positions, slots = operands
        first = rows.nbytes // rows.shape[0]
        reads = (first, rows.nbytes - first, positions.nbytes, slots.nbytes)
        return Cost(0, reads, tuple(r.nbytes for r in results))


@primitive
class DraftRows(Op):
    """The rows that draft behind each sequence's token: `block` of them, from `offset` tokens behind on.

    tokens, lengths and slots i32[B], start i32[S] -> ids, positions, row slots and last positions,
    i32[B·block] each. A sequence's rows are its token and then `noise`, at start[slot] + offset and the
    places that follow, of which the last is every row's last position. Places before 0, and the rows of a
    sequence of length 0, are -1, the latter in slot 0.
    """

    block: int
    offset: int
    noise: int

    def infer(self, tokens: Type, lengths: Type, slots: Type, start: Type) -> tuple[TensorType, ...]:
        given = expect_tensor(tokens, "tokens", 1, I32)
        expect(lengths == tokens, f"lengths {lengths} and tokens {tokens} differ")
        expect(slots == tokens, f"slots {slots} and tokens {tokens} differ")
        expect_tensor(start, "start", 1, I32)
        expect(self.block > 0, f"a block of {self.block} rows, expected at least 1")
        return (TensorType(I32, (given.shape[0] * self.block,)),) * 4


@primitive
class Candidates(Op):
    """What the model is to judge: tokens i32[B] and drafts i32[B·k] -> rows i32[B·(1+k)], lengths i32[B].

    Each sequence's token, then its drafts; as many rows are valid, none of a sequence of length 0.
    """

    def infer(self, tokens: Type, drafts: Type, lengths: Type) -> tuple[TensorType, TensorType]:
        given, drafted = expect_tensor(tokens, "tokens", 1, I32), expect_tensor(drafts, "drafts", 1, I32)
        expect(lengths == tokens, f"lengths {lengths} and tokens {tokens} differ")
        sequences = given.shape[0]
        expect(drafted.shape[0] % sequences == 0, f"{drafts} are not drafts of {sequences} sequences")
        return TensorType(I32, (sequences + drafted.shape[0],)), given


@primitive
class Trusted(Op):
    """How many rows of a round are worth judging: lengths i32[B] -> i32[B].

    confidence f32[B·k, 1] are logits of each draft to hold behind one that holds, so that the product of
    their sigmoids up to a draft is its own probability to be said. The anchor stays, and the drafts before
    the first whose product is below what its slot asks for, least f32[S] by slots i32[B]: with 0 all of
    them. A sequence of length 0 may have any slot. Whether a draft stays depends on none behind it.
    """

    by_slot: ClassVar = True
    picks: ClassVar = {2: (3, 0)}

    def infer(self, lengths: Type, confidence: Type, slots: Type, least: Type) -> TensorType:
        given = expect_tensor(lengths, "lengths", 1, I32)
        expect(slots == lengths, f"slots {slots} and lengths {lengths} differ")
        drafts = expect_tensor(confidence, "confidence", 2, F32).shape
        fits = drafts[0] % given.shape[0] == 0 and drafts[1] == 1
        expect(fits, f"{confidence} is no confidence in drafts of {given.shape[0]} sequences")
        expect_tensor(least, "least", 1, F32)
        return given


def _expect_rounds(rows: TensorType, sequences: Type, name: str) -> None:
    count = expect_tensor(sequences, name, 1, I32).shape[0]
    expect(rows.shape[0] % count == 0, f"{rows} are not rows of {count} sequences")


@primitive
class Accept(Op):
    """What a round says: chosen and tokens i32[N], lengths i32[B] -> said i32[N], counts and next i32[B].

    chosen[i] is the model's token after row i, whose token is the anchor or a draft. A sequence says what is
    chosen after its anchor, and goes on while the next row's draft is what was just said: `counts` tokens,
    then -1. As many rows count as consumed; the last that was said is the next anchor. A sequence of length 0
    says nothing and keeps its anchor.
    """

    def infer(self, chosen: Type, tokens: Type, lengths: Type) -> tuple[TensorType, TensorType, TensorType]:
        rows = expect_tensor(chosen, "chosen", 1, I32)
        expect(tokens == chosen, f"tokens {tokens} and chosen {chosen} differ")
        _expect_rounds(rows, lengths, "lengths")
        per_sequence = TensorType(I32, lengths.shape)
        return rows, per_sequence, per_sequence


@primitive
class Stop(Op):
    """The end of what is said at a stop of its slot.

    said and slots i32[N], counts and following i32[B], stops i32[S, 8] -> said i32[N]; counts, following and
    lengths i32[B]. Behind the first stop nothing is said, it is the next anchor, and the sequence has length
    0 in the next round; without one nothing changes, and the length is 1 for who said something.
    """

    by_slot: ClassVar = True
    picks: ClassVar = {1: (4, 0)}

    def infer(
        self, said: Type, slots: Type, counts: Type, following: Type, stops: Type
    ) -> tuple[TensorType, TensorType, TensorType, TensorType]:
        rows = expect_tensor(said, "said", 1, I32)
        expect(slots == said, f"slots {slots} and said {said} differ")
        _expect_rounds(rows, counts, "counts")
        expect(following == counts, f"following {following} and counts {counts} differ")
        expect(
            expect_tensor(stops, "stops", 2, I32).shape[1] == STOPS,
            f"stops must have {STOPS} columns, got {stops}",
        )
        per_sequence = TensorType(I32, counts.shape)
        return rows, per_sequence, per_sequence, per_sequence


preceding, draft_rows, candidates = Preceding.apply, DraftRows.apply, Candidates.apply
trusted, accept, stop = Trusted.apply, Accept.apply, Stop.apply
