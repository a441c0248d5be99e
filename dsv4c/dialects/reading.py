"""What a dialect hands to `dsv4c.config`: fields and their spelling, problems and notes."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

LARGEST = (1 << 31) - 1
"""Counts above it are wrong whatever they count."""


def problem(key: str, found: str, expected: str) -> str:
    """One line of a ConfigError: which key, what it holds, what it should hold."""
    return f"{key} {found}; expected {expected}"


def shown(value: object) -> str:
    """`is VALUE`, shortened: a schedule of 61 entries must not drown the message."""
    return f"is {reprlib.repr(value)}"


def alternatives(names: Iterable[str]) -> str:
    return " or ".join(repr(name) for name in names)


def is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


@dataclass
class Reading:
    """What a config file says: ModelConfig's fields, not yet checked one by one, and their keys in it.

    open: fields that the file does not decide, where the checkpoint beside it does; with what to say if there
    is none: a note on the value in `fields`, or a problem where that has none.
    """

    raw: Mapping[str, Any]
    spelling: dict[str, str]
    fields: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)  # fields whose problem is already in the list
    used: set[str] = field(default_factory=set)  # keys that some rule has looked at
    unread: list[str] = field(default_factory=list)  # keys that none has
    open: dict[str, str] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        self.used.add(key)
        return self.raw.get(key)

    def count(self, name: str) -> int | None:
        """The field as an int; None when it is missing or wrong, which the field's own rule will report."""
        value = self.fields.get(name)
        return value if type(value) is int and 0 <= value <= LARGEST else None

    def refuse(self, key: str, found: str, expected: str, *fields: str) -> None:
        """Add a problem. Of the `fields` that it leaves without a value nothing else is said."""
        self.problems.append(problem(key, found, expected))
        self.refused.update(fields)

    def judge_keys(self, inside: str, keys: Iterable[str], known: Iterable[str]) -> None:
        """Of the `keys` that stand `inside` an object ("" is the file) those that are not `known` are unread,
        or refused where one is a known one misspelled.
        """
        known = sorted(known)
        for key in sorted(set(keys) - set(known)):
            spelled = f"{inside}.{key}" if inside else key
            near = difflib.get_close_matches(key, known, 1, ALIKE)
            if near and key not in NAMESAKES and difflib.SequenceMatcher(None, key, near[0]).ratio() >= TYPO:
                fields = [name for name, own in self.spelling.items() if own == near[0]]
                self.refuse(spelled, "is unknown", f"{near[0]}, or no such key", *fields)
            else:
                self.unread.append(f"{spelled} (is it {near[0]}?)" if near else spelled)


ALIKE, TYPO = 0.85, 0.9  # difflib's ratio; a letter of ten is a typo, more may be another word
NAMESAKES = frozenset({"qk_nope_head_dim", "qk_head_dim", "v_head_dim"})  # of earlier DeepSeek models


def copy_fields(reading: Reading) -> None:
    for name, key in reading.spelling.items():
        if reading.get(key) is not None:
            reading.fields[name] = reading.raw[key]


def token_ids(reading: Reading) -> None:
    """Nothing that is compiled depends on them: of several the first counts, and there may be none."""
    for name in ("bos_token_id", "eos_token_id"):
        key = reading.spelling[name]
        given = reading.fields.setdefault(name, None)
        if is_list_of(given, int) and given:
            reading.fields[name] = given[0]
            reading.notes.append(f"{key} is {given}: {given[0]} was taken")


# Field of ModelConfig -> key of the file, alike in all dialects. The number of stages has none of its own.
DSPARK = {
    "dspark_block_size": "dspark_block_size",
    "dspark_noise_token_id": "dspark_noise_token_id",
    "dspark_target_layers": "dspark_target_layer_ids",
    "dspark_markov_rank": "dspark_markov_rank",
}


def drafts_with_dspark(reading: Reading) -> bool:
    """Does the release draft with DSpark stages? They take the place of MTP blocks, under the same names,
    whatever its number of MTP blocks says. Described in part they are left out: the fields are all there, or
    none.
    """
    if not any(key in reading.raw for key in DSPARK.values()):
        return False
    reading.spelling |= DSPARK
    missing = [key for key in DSPARK.values() if reading.get(key) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        reading.notes.append(f"DSpark's stages are left out: {' and '.join(missing)} {are} missing")
    else:
        reading.fields |= {name: reading.raw[key] for name, key in DSPARK.items()}
    stated = reading.fields.get("mtp_layers")
    reading.fields["mtp_layers"] = 0
    if stated:
        key = reading.spelling["mtp_layers"]
        reading.notes.append(f"{key} {stated} counts for nothing: the mtp.* tensors are DSpark's stages")
    return True
