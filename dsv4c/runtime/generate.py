"""Loops over a session: a prompt, tokens it is made to take, and greedy continuation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsv4c.errors import SessionError
from dsv4c.plan.folder import Progress
from dsv4c.publish import published, require_writable
from dsv4c.runtime.session import Session


def generate(
    session: Session,
    prompt: Sequence[int],
    forced: Sequence[int] = (),
    new: int = 0,
    *,
    progress: Progress | None = None,
) -> tuple[Tensor, list[int]]:
    """Prefill `prompt` in slot 0, decode every token of `forced`, then `new` greedy tokens; other
    slots wait. Returns logits f32 [len(prompt) + len(forced), vocab], row i after token i, and the new
    tokens.

    Raises SessionError as the session does, for a context that would overflow before anything runs.
    """
    room = session.max_context - session.positions[0]
    wanted = len(prompt) + len(forced) + max(new - 1, 0)  # the last new token is not consumed
    if wanted > room:
        raise SessionError(
            f"{wanted} tokens exceed the context of {room}; compile with a larger --max-context"
        )
    session.check_tokens(forced, "forced token")

    def report(what: str, done: int) -> None:
        if progress is not None:
            progress(what, done, len(forced) + new)

    report("prompt", 0)
    rows = [session.prefill(prompt)]
    following = session.next_tokens[-1]
    for done, token in enumerate(forced):
        report("forced tokens", done)
        rows.append(session.decode({0: token})[:1])
        following = session.next_tokens[0]
    generated: list[int] = []
    while len(generated) < new:
        generated.append(following)
        report("new tokens", len(forced) + len(generated))
        if len(generated) < new:
            session.decode({0: following})
            following = session.next_tokens[0]
    return torch.cat(rows), generated


def check_file(path: Path) -> None:
    """Raise SessionError unless logits may be written there, so that a long run fails before it starts."""
    try:
        if path.is_dir():
            raise SessionError(f"{path}: the logits cannot be written: it is a folder; give a file")
        if path.exists() and not path.is_file():
            raise SessionError(f"{path}: the logits cannot be written: it is no regular file; give one")
        require_writable(path.parent)
    except OSError as error:
        raise SessionError(f"{path}: the logits cannot be written: {error.strerror or error}") from None


def save_logits(path: Path, logits: Tensor) -> None:
    """Write `logits` to a safetensors file, whole or not at all. Raises SessionError."""
    try:
        with published(path) as made:
            save_file({"logits": logits}, made)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SessionError(f"{path}: the logits cannot be written: {reason}") from None
