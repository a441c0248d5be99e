"""Several tokens per step: the rows that draft, the rows that judge drafts, and how many of those hold."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4c.ir.ops.draft import Accept, Candidates, DraftRows, Preceding, Stop, Trusted
from dsv4c.reference.registry import meaning


@meaning(Preceding)
def preceding(
    op: Preceding, cache: Tensor, rows: Tensor, positions: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    before = torch.where(positions > 0, positions - 1, -1)
    kept = cache[slots, before % cache.shape[1]]
    above, places, of = (x.roll(1, 0) for x in (rows, positions, slots))
    in_call = (places == before) & (of == slots)
    in_call[0] = False
    earlier = torch.where(in_call[:, None], above, kept)
    return torch.where((before >= 0)[:, None], earlier, torch.zeros((), dtype=rows.dtype)), before


@meaning(DraftRows)
def draft_rows(
    op: DraftRows, tokens: Tensor, lengths: Tensor, slots: Tensor, start: Tensor
) -> tuple[Tensor, ...]:
    active = (lengths > 0)[:, None].expand(-1, op.block)
    slot = torch.where(active, slots[:, None], 0)
    step = torch.arange(op.block, dtype=torch.int32)
    places = torch.where(active, start[slot] + op.offset + step, -1).clamp(min=-1)
    last = places[:, -1:].expand(-1, op.block)
    ids = torch.where(step == 0, tokens[:, None], op.noise)
    return tuple(x.to(torch.int32).reshape(-1) for x in (ids, places, slot, last))


@meaning(Candidates)
def candidates(op: Candidates, tokens: Tensor, drafts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.cat([tokens[:, None], drafts.reshape(tokens.numel(), -1)], dim=1)
    return rows.reshape(-1), torch.where(lengths > 0, rows.shape[1], 0).to(torch.int32)


@meaning(Trusted)
def trusted(op: Trusted, lengths: Tensor, confidence: Tensor, slots: Tensor, least: Tensor) -> Tensor:
    survival = confidence.reshape(lengths.numel(), -1).double().sigmoid().cumprod(1)
    enough = survival >= least[torch.where(lengths > 0, slots, 0)].double()[:, None]
    rows = 1 + enough.int().cumprod(1).sum(1)
    return torch.minimum(lengths, rows).to(torch.int32)


@meaning(Accept)
def accept(op: Accept, chosen: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    said, rows = chosen.reshape(lengths.numel(), -1), tokens.reshape(lengths.numel(), -1)
    step = torch.arange(said.shape[1])
    holds = (said[:, :-1] == rows[:, 1:]) & (step[1:] < lengths[:, None])
    counts = torch.where(lengths > 0, 1 + holds.int().cumprod(1).sum(1), 0)
    last = said.gather(1, (counts - 1).clamp(min=0)[:, None].long())[:, 0]
    following = torch.where(counts > 0, last, rows[:, 0])
    kept = torch.where(step < counts[:, None], said, -1)
    return kept.reshape(-1), counts.to(torch.int32), following


@meaning(Stop)
def stop(
    op: Stop, said: Tensor, slots: Tensor, counts: Tensor, following: Tensor, stops: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = said.reshape(counts.numel(), -1)
    step = torch.arange(rows.shape[1])
    ends = (stops[slots] == said[:, None]).any(1).reshape(rows.shape) & (step < counts[:, None])
    stopped = ends.any(1)
    place = ends.int().argmax(1)
    shorter = torch.where(stopped, place + 1, counts).to(torch.int32)
    last = torch.where(stopped, rows.gather(1, place[:, None])[:, 0], following)
    kept = torch.where(step < shorter[:, None], rows, -1)
    going = torch.where(stopped, 0, counts.clamp(max=1)).to(torch.int32)
    return kept.reshape(-1), shorter, last, going
