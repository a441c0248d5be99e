"""What drafting gains at best: rounds against plain steps, by their bytes and how often drafts hold.

A round drafts k tokens and judges them beside their anchor in one call. If each draft behind one that holds
holds with probability p, it says 1 + p + ... + p^k tokens. Floors are those of `view.roofline`, launch after
launch, with experts of its own for every row: rows that share experts cost less.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Probabilities that a draft holds for which gains are shown."""


def tokens_per_round(drafts: int, share: float) -> float:
    """1 + p + ... + p^k."""
    return sum(share**n for n in range(drafts + 1))


@dataclass(frozen=True)
class Round:
    """Rounds of `drafts` drafts: their floor in microseconds, of which the drafts take `draft_us`, and GB."""

    drafts: int
    floor_us: float
    draft_us: float
    gigabytes: float

    def gain(self, step_us: float, share: float) -> float:
        """How many times as fast as plain steps, if drafts hold so often."""
        return tokens_per_round(self.drafts, share) * step_us / self.floor_us

    def row_us(self, step_us: float) -> float:
        """What a judged draft adds: experts of its own."""
        return (self.floor_us - self.draft_us - step_us) / self.drafts

    def foreseen(self, step_us: float, share: float) -> float:
        """The same where a confidence that is never wrong ends a round behind the last draft that holds, so
        that as many rows are judged as tokens are said.
        """
        said = tokens_per_round(self.drafts, share)
        return said * step_us / (self.floor_us - (1 + self.drafts - said) * self.row_us(step_us))


@dataclass(frozen=True)
class Drafting:
    """A model's plain step and its rounds on one GPU. worth: how likely a draft must be that judging it pays,
    where drafts come with a confidence.
    """

    model: str
    gpu: str
    head: str
    step_us: float
    rounds: tuple[Round, ...]
    worth: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the gains and the tokens per round that a round must say to pay."""
        described = asdict(self)
        for made, round_ in zip(described["rounds"], self.rounds, strict=True):
            made["pays_from"] = round_.floor_us / self.step_us
            made["gains"] = {str(share): round_.gain(self.step_us, share) for share in SHARES}
            if self.worth is not None:
                made["row_us"] = round_.row_us(self.step_us)
                made["foreseen"] = {str(share): round_.foreseen(self.step_us, share) for share in SHARES}
        return described


def text(found: Drafting) -> str:
    """A row for each number of drafts."""
    lines = [
        f"{found.model} drafts with {found.head}; a plain step takes {found.step_us:,.0f} us at least on one "
        f"{found.gpu}",
        "",
        "drafts  round us  of it drafts     GB  pays from   gain if a draft holds with probability",
        f"{'':51}   {_columns(f'{share:.1f}' for share in SHARES)}",
    ]
    for each in found.rounds:
        gains = _columns(f"{each.gain(found.step_us, share):.2f}" for share in SHARES)
        lines.append(
            f"{each.drafts:6} {each.floor_us:9,.0f} {each.draft_us:13,.0f} {each.gigabytes:6.1f} "
            f"{each.floor_us / found.step_us:10.2f}   {gains}"
        )
    if found.worth is not None:
        lines += ["", "drafts  us a row   gain if a confidence that is never wrong ends rounds (rows judged)"]
        for each in found.rounds:
            columns = _columns(f"{each.foreseen(found.step_us, share):.2f}" for share in SHARES)
            rows = " ".join(f"{tokens_per_round(each.drafts, share):.1f}" for share in SHARES)
            lines.append(f"{each.drafts:6} {each.row_us(found.step_us):9,.0f}   {columns}   ({rows})")
        lines += ["", f"worth judging: a draft that will be said with a probability of {found.worth:.2f}"]
    lines += ["", "pays from: tokens per round, bonus included, from which a round beats plain steps"]
    return "\n".join(lines) + "\n"


def _columns(texts: Iterable[str]) -> str:
    return " ".join(f"{column:>6}" for column in texts)
