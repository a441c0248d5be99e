"""The next token, and the rows it is read from."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4c.ir.ops.sample import KNOBS, Argmax, Draw, Emit, LastRows, Penalize, TokenProbabilities
from dsv4c.reference.registry import meaning

PENALTIES = ("repetition", "presence", "frequency")


@meaning(LastRows)
def last_rows(op: LastRows, x: Tensor, lengths: Tensor) -> Tensor:
    sequences = lengths.numel()
    by_sequence = x.reshape(sequences, -1, *x.shape[1:])
    last = by_sequence[torch.arange(sequences), (lengths - 1).clamp(min=0)]
    return torch.where((lengths > 0).reshape(-1, *[1] * (x.ndim - 1)), last, torch.zeros((), dtype=x.dtype))


@meaning(Argmax)
def argmax(op: Argmax, logits: Tensor) -> Tensor:
    """The lowest column of the maximum; NaN counts as the maximum."""
    top = (logits == logits.amax(-1, keepdim=True)) | logits.isnan()
    columns = torch.arange(logits.shape[-1], dtype=torch.int32)
    return torch.where(top, columns, logits.shape[-1]).amin(-1).to(torch.int32)


def knob(knobs: Tensor, name: str) -> Tensor:
    """A knob by its name, off where it is no finite number."""
    return knobs[..., KNOBS.index(name)].nan_to_num(0.0, 0.0, 0.0)


@meaning(Penalize)
def penalize(
    op: Penalize,
    logits: Tensor,
    history: Tensor,
    positions: Tensor,
    slots: Tensor,
    origin: Tensor,
    knobs: Tensor,
) -> Tensor:
    lowered = logits.clone()
    places = torch.arange(history.shape[1])
    for row, position, slot in zip(lowered, positions, slots, strict=True):
        repetition, presence, frequency = (knob(knobs[slot], f"{n}_penalty") for n in PENALTIES)
        if not (repetition or presence or frequency):
            continue
        said = history[slot][places <= position]
        if repetition > 0:
            seen = torch.bincount(said, minlength=len(row)) > 0
            row[seen] = torch.where(row[seen] > 0, row[seen] / repetition, row[seen] * repetition)
        counts = torch.bincount(said[origin[slot].clamp(min=0) :], minlength=len(row)).to(row.dtype)
        row -= presence * (counts > 0) + frequency * counts
    return lowered


@meaning(TokenProbabilities)
def token_probabilities(op: TokenProbabilities, logits: Tensor, slots: Tensor, knobs: Tensor) -> Tensor:
    made = [_probabilities(row, knobs[slot]) for row, slot in zip(logits.double(), slots, strict=True)]
    return torch.stack(made).float() if made else logits.clone()


def _probabilities(row: Tensor, knobs: Tensor) -> Tensor:
    temperature, top_k, top_p, min_p = (float(knob(knobs, name)) for name in KNOBS[:4])
    if temperature <= 0:
        return torch.zeros_like(row).index_fill(0, argmax(Argmax(), row[None]).long(), 1.0)
    row = row / temperature
    if 0 < int(top_k) < len(row):
        row = row.masked_fill(row < row.topk(int(top_k)).values[-1], -torch.inf)
    p = row.softmax(0)
    least = p.amax() * min_p
    if 0 < top_p < 1:
        falling = p.sort(descending=True).values
        crossing = (falling.cumsum(0) < top_p).sum().clamp(max=len(row) - 1)
        least = torch.maximum(least, falling[crossing])
    p = torch.where(p < least, 0.0, p)
    return p / p.sum()


@meaning(Draw)
def draw(
    op: Draw, probabilities: Tensor, positions: Tensor, slots: Tensor, origin: Tensor, seeds: Tensor
) -> Tensor:
    index = positions + 1 - origin[slots]
    number = (philox(seeds[slots], index) + 0.5) * 2.0**-32
    whole = (probabilities.double().nan_to_num(0.0).clamp(0, 1) * 2.0**40).floor()  # exact in any order
    sums = whole.cumsum(1)
    wanted = (number * sums[:, -1])[:, None]
    found = torch.searchsorted(sums, wanted, right=True)[:, 0]
    return torch.where(sums[:, -1] > 0, found, 0).to(torch.int32)


@meaning(Emit)
def emit(op: Emit, chosen: Tensor, lengths: Tensor, slots: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
    stopped = (stops[slots] == chosen[:, None]).any(1)
    return torch.where(lengths > 0, chosen, -1), torch.where(stopped, 0, lengths)


WORD = (1 << 32) - 1


def philox(seeds: Tensor, index: Tensor) -> Tensor:
    """The first word, int64 [N], of Philox 4x32-10 at (index, 0, 0, 0) under the keys seeds i32[N, 2].

    Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3.
    """
    low, high = (seeds[:, i].to(torch.int64) & WORD for i in (0, 1))
    a = index.to(torch.int64) & WORD
    b, c, d = (torch.zeros_like(a) for _ in range(3))
    for _ in range(10):
        one, two = a * 0xD2511F53, c * 0xCD9E8D57  # their 64 bits are right although the sign is not
        a, b, c, d = (two >> 32 & WORD) ^ b ^ low, two & WORD, (one >> 32 & WORD) ^ d ^ high, one & WORD
        low, high = (low + 0x9E3779B9) & WORD, (high + 0xBB67AE85) & WORD
    return a
