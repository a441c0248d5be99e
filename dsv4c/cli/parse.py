"""`dsv4c parse FILE`: a completion as the message it is."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dsv4c.cli.console import print_json
from dsv4c.cli.options import JsonOption
from dsv4c.errors import PromptError
from dsv4c.models.encoding.parse import parse


class Mode(StrEnum):
    """How the prompt ended, and so how the completion begins."""

    CHAT = "chat"
    THINKING = "thinking"


FileArgument = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help="What the model wrote, its last token included, in UTF-8.",
        show_default=False,
        readable=False,
    ),
]
ModeOption = Annotated[
    Mode, typer.Option(help="thinking: the prompt ended in <think>, the text begins with reasoning.")
]


def register(app: typer.Typer) -> None:
    app.command("parse")(parse_command)


def parse_command(file: FileArgument, mode: ModeOption = Mode.CHAT, json: JsonOption = False) -> None:
    """Turn a completion into the message that it is, a JSON object, or say where it is malformed.

    The object has role, content, reasoning_content and tool_calls, whose arguments are the text of an object.

    Examples:

      dsv4c parse completion.txt --mode thinking
    """
    try:
        text = file.read_bytes().decode()
    except OSError as error:
        raise PromptError(f"{file}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"{file}: byte {error.start} is no UTF-8; save it as UTF-8") from None
    try:
        print_json(parse(text, mode.value).to_json())
    except PromptError as error:
        raise PromptError(f"{file}: {error}") from None
