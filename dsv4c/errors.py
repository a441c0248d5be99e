"""Every error a user can cause. The command line prints the message and exits with `exit_code`."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


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


@contextmanager
def contributed(what: str) -> Iterator[None]:
    """A mistake in code that somebody contributes, which is called in this block, becomes a GraphError with
    its file and line.
    """
    try:
        yield
    except SyntaxError as error:
        raise GraphError(f"{what}: {error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        inside = traceback.extract_tb(error.__traceback__)[2:]  # behind this line and the block's
        calls = [call for call in inside if not call.filename.startswith(_PYTHON)]
        if not calls or calls[0].filename.startswith(_DSV4C):
            raise  # nobody else's
        raise GraphError(f"{what}: {_told(calls, error)}") from error


def told(error: Exception) -> str:
    """File, line and words of an error in code that somebody contributes; in dsv4c's own the words alone."""
    inside = traceback.extract_tb(error.__traceback__)
    calls = [call for call in inside if not call.filename.startswith((*_PYTHON, _DSV4C))]
    return _told(calls, error) if calls else str(error)


def _told(calls: Sequence[traceback.FrameSummary], error: Exception) -> str:
    line = [c.lineno for c in calls if c.filename == calls[0].filename][-1]
    said = str(error) if isinstance(error, Dsv4cError) else f"{type(error).__name__}: {error}"
    return f"{calls[0].filename}:{line}: {said}"


_PYTHON = (str(Path(traceback.__file__).parent), "<frozen ")
_DSV4C = str(Path(__file__).parent)


def listed(known: Iterable[str], meant: str) -> str:
    """The names that there are, and the likeliest that was meant, if one is like it."""
    names = list(known)
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(meant.lower(), by_lower, 1)
    return ", ".join(names) + (f"; did you mean {by_lower[near[0]]!r}?" if near else "")


class Terminated(KeyboardInterrupt):
    """A polite kill, which cleans up as Ctrl-C does, and leaves where that only stops what is under way."""
