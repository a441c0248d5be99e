"""Every error a user can cause. The command line prints the message and exits with `exit_code`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Dsv4cError(Exception):
    """Base of the family: a message that names the place, what was found, what was wanted and what to do."""

    exit_code = 1


class ConfigError(Dsv4cError):
    """A model config or a deployment that cannot be compiled."""

    exit_code = 2


class GraphError(Dsv4cError):
    """An ill-formed graph, type or text."""

    exit_code = 3


class CheckpointError(Dsv4cError):
    """Weights that do not fit the model, or cannot be read."""

    exit_code = 4


class PlanError(Dsv4cError):
    """A plan folder that is damaged, foreign or of another version."""

    exit_code = 5


class PromptError(Dsv4cError):
    """Messages that make no prompt, a completion that is no message, or a tokenizer that does not fit."""

    exit_code = 2


class SessionError(Dsv4cError):
    """A request that a running session refuses; its state is as it was before."""

    exit_code = 6


class BuildError(Dsv4cError):
    """Code generation or kernel compilation failed."""

    exit_code = 7


def listed(known: Iterable[str], meant: str) -> str:
    """The names that there are, and the likeliest that was meant, if one is like it."""
    names = list(known)
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(meant.lower(), by_lower, 1)
    return ", ".join(names) + (f"; did you mean {by_lower[near[0]]!r}?" if near else "")
