"""`dsv4c encode --messages FILE`: the prompt that a conversation makes, or its token ids."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dsv4c.cli.console import note, print_json
from dsv4c.cli.options import EncodingOption, JsonOption, MessagesOption
from dsv4c.errors import ConfigError
from dsv4c.models.encoding.messages import read_conversation
from dsv4c.models.encoding.render import render
from dsv4c.models.encoding.rules import rules_of
from dsv4c.models.encoding.tokenizer import Tokenizer

CheckpointArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[CHECKPOINT]",
        help="Folder with the tokenizer.json for --ids, and the encoder that --encoding auto goes by.",
        show_default=False,
        readable=False,
    ),
]
IdsOption = Annotated[bool, typer.Option("--ids", help="Print the prompt's token ids, separated by commas.")]


def register(app: typer.Typer) -> None:
    app.command("encode")(encode_command)


def encode_command(
    messages: MessagesOption,
    checkpoint: CheckpointArgument = None,
    encoding: EncodingOption = "preview",
    ids: IdsOption = False,
    json: JsonOption = False,
) -> None:
    """Print the prompt of a conversation, and nothing else: no newline ends it.

    FILE is a JSON list of messages, or an object with `messages` and options of the official encoder:
    thinking_mode (chat, thinking), reasoning_effort, drop_thinking, context, add_default_bos_token.

    Examples:

      dsv4c encode --messages chat.json

      dsv4c encode --messages chat.json ./DeepSeek-V4-Flash --encoding auto --ids
    """
    if ids and checkpoint is None:
        raise ConfigError("--ids: name the checkpoint folder, or the tokenizer.json, whose ids are meant")
    conversation = read_conversation(messages)
    rules, remark = rules_of(encoding, checkpoint)
    if remark:
        note(remark)
    prompt = render(conversation, rules)
    numbers = Tokenizer.open(checkpoint).encode(prompt) if ids and checkpoint is not None else None
    if json:
        print_json({"encoding": rules.name, "prompt": prompt, "ids": numbers})
        return
    text = prompt if numbers is None else ",".join(map(str, numbers))
    sys.stdout.buffer.write(text.encode())  # these bytes, whatever the terminal's
