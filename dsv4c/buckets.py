"""The static shapes a plan is compiled for, one per way of calling it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["decode", "verify", "prefill", "draft", "accept", "round"]
Logits = Literal["last", "all"]

ROWS = 8
"""The most tokens of one sequence that a call may write to a ring before it reads it back.

Rings have room for as many beside what they must remember, so a step of up to this many tokens can be taken
back by its position alone, and calls of more tokens keep their rows beside the ring until they end.
"""


@dataclass(frozen=True)
class Bucket:
    """`tokens` rows of each of `sequences` sequences per call.

    kind: decode steps (one token each), verify steps (a few, to be kept or taken back), a prompt's chunks;
    tokens drafted behind each sequence's one; accept steps, which judge a token and others drafted behind it
    and consume those that hold; or rounds, which draft and judge. logits: of every row, or of each sequence's
    last one. sampled: a step draws the next token as its slot says, in place of taking the likeliest. trusts:
    of what it judges, rows that are not there read no experts, and in a round the drafts' confidence says
    which those are.
    """

    kind: Kind
    sequences: int = 1
    tokens: int = 1
    logits: Logits = "all"
    sampled: bool = False
    trusts: bool = False

    @property
    def name(self) -> str:
        """decode-8, verify-1x4, prefill-64, draft-3, round-1x4; suffixes tell those with the last row's
        logits, those that sample, and those that trust a confidence.
        """
        shape = f"{self.sequences}" if self.kind == "decode" else f"{self.sequences}x{self.tokens}"
        if self.kind in ("prefill", "draft") and self.sequences == 1:
            shape = f"{self.tokens}"
        suffix = ".last" if self.logits == "last" else ".sampled" if self.sampled else ""
        return f"{self.kind}-{shape}{suffix}{'.trusts' if self.trusts else ''}"

    @property
    def rows(self) -> int:
        """Rows per call, of all sequences together."""
        return self.sequences * self.tokens

    @property
    def given(self) -> int:
        """Tokens that a call is given: one of each sequence where it drafts the others itself."""
        return self.sequences if self.drafts else self.rows

    @property
    def drafts(self) -> bool:
        """Does what drafts run?"""
        return self.kind in ("draft", "round")

    @property
    def judges(self) -> bool:
        """Does the model consume as many of the tokens as hold?"""
        return self.kind in ("accept", "round")

    @property
    def is_main(self) -> bool:
        """Does the model run over the tokens that it is given, and consume all of them?"""
        return self.kind in ("decode", "verify", "prefill")

    @property
    def keeps_beside(self) -> bool:
        """Are there more tokens than a ring takes ahead, so that rows stay beside it until the call ends?"""
        return self.tokens > ROWS


def bucket_named(name: str) -> Bucket:
    """The bucket of that name. Raises ValueError for what is none."""
    shape = r"(?:([1-9]\d{0,5})x)?([1-9]\d{0,6})"
    match = re.fullmatch(rf"([a-z]+)-{shape}(\.last|\.sampled)?(\.trusts)?", name, re.ASCII)
    if match is None or match[1] not in get_args(Kind):
        raise ValueError(f"{name!r} names no bucket; expected decode-8, verify-1x4, prefill-64 or draft-3")
    kind, first, last, suffix, trusts = match.groups()
    sequences, tokens = (int(last), 1) if kind == "decode" else (int(first or 1), int(last))
    logits: Logits = "last" if suffix == ".last" else "all"
    bucket = Bucket(kind, sequences, tokens, logits, suffix == ".sampled", trusts is not None)  # type: ignore[arg-type]
    if bucket.name != name:
        raise ValueError(f"{name!r} names no bucket; {bucket.name} is how it is written")
    return bucket
