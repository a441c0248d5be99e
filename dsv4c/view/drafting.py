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


@dataclass(frozen=True)
class Drafting:
    """A model's plain step and its rounds on one GPU."""

    model: str
    gpu: str
    head: str
    step_us: float
    rounds: tuple[Round, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the gains and the tokens per round that a round must say to pay."""
        described = asdict(self)
        for made, round_ in zip(described["rounds"], self.rounds, strict=True):
            made["pays_from"] = round_.floor_us / self.step_us
            made["gains"] = {str(share): round_.gain(self.step_us, share) for share in SHARES}
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
    lines += ["", "pays from: tokens per round, bonus included, from which a round beats plain steps"]
    return "\n".join(lines) + "\n"


def _columns(texts: Iterable[str]) -> str:
    return " ".join(f"{column:>6}" for column in texts)
