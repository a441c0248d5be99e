"""Tool calls as the model writes and reads them: a block of invocations, each with its parameters.

A parameter is text as it is (`string="true"`), or JSON; `INTRODUCTION` shows the grammar to the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dsv4c.models.encoding.marks import DSML, THINK, THOUGHT

CALLS, CALLS_END = f"<{DSML}tool_calls", f"</{DSML}tool_calls>"
INVOKE, INVOKE_END = f"<{DSML}invoke", f"</{DSML}invoke"
PARAMETER, PARAMETER_END = f"<{DSML}parameter", f"</{DSML}parameter"

INTRODUCTION = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"{CALLS}>" block like the following:

{CALLS}>
{INVOKE} name="$TOOL_NAME">
{PARAMETER} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{PARAMETER_END}>
...
{INVOKE_END}>
{INVOKE} name="$TOOL_NAME2">
...
{INVOKE_END}>
{CALLS_END}

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, \
arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning inside \
{THINK}...{THOUGHT} BEFORE any tool calls or final response.

Otherwise, output directly after {THOUGHT} with tool calls or final response.

### Available Tool Schemas

"""
CLOSING = (
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
)


@dataclass(frozen=True)
class ToolCall:
    """A function that is to be called. `arguments` is the text of a JSON object, by parameter."""

    name: str
    arguments: str

    def to_json(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def json_text(value: Any) -> str:
    """JSON as the prompts have it: a blank after commas and colons, and letters of any script as they are."""
    return json.dumps(value, ensure_ascii=False)


def introduction(functions: Iterable[Mapping[str, Any]]) -> str:
    """What tells the model of its tools: the grammar, and a schema a line."""
    return INTRODUCTION + "\n".join(map(json_text, functions)) + CLOSING


def calls_text(calls: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """The block of these calls, name and arguments each."""
    block = "\n".join(_invocation(name, arguments) for name, arguments in calls)
    return f"{CALLS}>\n{block}\n{CALLS_END}"


def _invocation(name: str, arguments: Mapping[str, Any]) -> str:
    parameters = "\n".join(_parameter(*item) for item in arguments.items())
    return f'{INVOKE} name="{name}">\n{parameters}\n{INVOKE_END}>'


def _parameter(name: str, value: Any) -> str:
    is_text = isinstance(value, str)
    text = value if is_text else json_text(value)
    return f'{PARAMETER} name="{name}" string="{str(is_text).lower()}">{text}{PARAMETER_END}>'
