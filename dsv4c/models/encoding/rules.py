"""What differs between releases: the levels of reasoning effort; and which rules a folder follows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv4c.errors import ConfigError, PromptError, listed

THOROUGH = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the "
    "root cause, rigorously stress-testing your logic against all potential paths, edge cases, and "
    "adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
EXHAUSTIVE = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively "
    "decompose the problem into its most fundamental components, trace every causal chain to its root, and "
    "resolve the underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are "
    "certain that no assumption remains unchecked and no error remains undiscovered.\n\n"
)


@dataclass(frozen=True)
class Rules:
    """One release's rules: the texts that its levels of effort begin a prompt with, its encoder's sha256."""

    name: str
    efforts: Mapping[str, str]
    digest: str

    def effort(self, level: str | None) -> str:
        """The text of a level; none without one. Raises PromptError for a level that this release lacks."""
        if level is None:
            return ""
        if level not in self.efforts:
            raise PromptError(
                f"reasoning_effort: the {self.name} release has no level {level!r}; expected "
                f"{listed(self.efforts, str(level))}"
            )
        return self.efforts[level]


PREVIEW = Rules(
    "preview",
    {"high": "", "max": THOROUGH},
    "bdbd57c132a1b3725042323d02b98b9d1df28e5f388f134399555d041f5055e0",
)
"""The release of April."""

JULY = Rules(
    "0731",
    {"low": "", "high": THOROUGH, "max": EXHAUSTIVE},
    "abc0d26120250dda0ae077dc64aa28836026e61e970854aaeb792445e6a0dde6",
)
"""The releases of 0731 and 0813."""

RULES = {rules.name: rules for rules in (PREVIEW, JULY)}

ENCODER = Path("encoding", "encoding_dsv4.py")
"""Where a checkpoint folder has the official encoder: its rules are those that the model was trained with."""


def rules_of(name: str, folder: Path | None) -> tuple[Rules, str]:
    """The rules of that name; with "auto" those of a checkpoint folder. Also a remark for the user, or "".

    "auto" goes by the digest of the folder's encoder file; without one that is known the rules are preview,
    and the remark says so. Raises ConfigError for another name, PromptError for a file that cannot be read.
    """
    if name in RULES:
        return RULES[name], ""
    if name != "auto":
        raise ConfigError(
            f"--encoding: no rules are named {name!r}; expected {listed([*RULES, 'auto'], name)}"
        )
    if folder is None:
        return PREVIEW, "encoding: no checkpoint folder to tell by, taking the rules of preview"
    file = folder / ENCODER
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return PREVIEW, f"encoding: {folder} has no {ENCODER}, taking the rules of preview"
    except OSError as error:
        raise PromptError(f"{file}: cannot be read: {error.strerror or error}") from None
    for rules in RULES.values():
        if rules.digest == digest:
            return rules, ""
    return (
        PREVIEW,
        f"encoding: {file} is no release's that is known ({digest[:12]}), taking the rules of preview",
    )
