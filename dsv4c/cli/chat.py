"""A conversation in the terminal: a line is a question, or a command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsv4c.cli.console import note, write_text
from dsv4c.errors import Dsv4cError, PromptError, Terminated
from dsv4c.models.encoding.messages import Conversation, Message, read_conversation
from dsv4c.runtime.answer import Done
from dsv4c.runtime.session import Session

COMMANDS = (
    "/reset forgets, /save FILE and /load FILE keep and take back the messages, /quit (or Ctrl-D) leaves"
)


def chat(
    session: Session,
    conversation: Callable[[list[Message]], Conversation],
    options: Mapping[str, Any],
    answer: Callable[[Any], Done],
    closing: Callable[[Done], str],
) -> None:
    """Ask and answer until there is no more input. Mistakes are told, and the conversation goes on, after
    Ctrl-C too: whoever stops an answer a moment too late loses the line, not the conversation.
    """
    history: list[Message] = []
    note(COMMANDS)
    while True:
        try:
            line = _read()
        except EOFError:
            return
        except Terminated:
            raise
        except KeyboardInterrupt:
            if not _on_a_terminal():
                raise
            note("\nCtrl-D or /quit leaves")
            continue
        except UnicodeDecodeError as error:
            note(f"error: that is no UTF-8 at byte {error.start}; type it again")
            continue
        command, _, rest = line.strip().partition(" ")
        if not command:
            continue
        try:
            if command == "/quit":
                return
            if command.startswith("/"):
                history = _command(command, rest.strip(), history)
                continue
            asked = [*history, {"role": "user", "content": line}]
            done = answer(session.generate(conversation(asked), **options))
        except Dsv4cError as error:
            note(f"error: {error}")
            continue
        assert done.message is not None
        history = [*asked, done.message.to_json()]
        note(closing(done))


def _on_a_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _read() -> str:
    """A line from the terminal or a pipe. Raises EOFError."""
    if _on_a_terminal():
        import readline  # noqa: F401  (lets lines be edited; draws the prompt again when the window changes)

        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def _command(command: str, rest: str, history: list[Message]) -> list[Message]:
    """What a command makes of the messages so far. Raises PromptError for one that there is not."""
    if command == "/reset":
        return []
    if command in ("/save", "/load") and not rest:
        raise PromptError(f"{command}: name a file")
    if command == "/save":
        write_text(Path(rest), json.dumps(history, indent=1, ensure_ascii=False) + "\n", PromptError)
        note(f"{rest}: {len(history)} messages")
        return history
    if command == "/load":
        loaded = list(read_conversation(Path(rest)).messages)
        note(f"{rest}: {len(loaded)} messages")
        return loaded
    raise PromptError(f"{command} is no command; {COMMANDS}")
