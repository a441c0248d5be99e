"""A conversation as its file or caller gives it, checked: every mistake is named with its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from dsv4c import strict_json
from dsv4c.errors import PromptError, listed
from dsv4c.models.encoding.marks import TASKS

Mode = Literal["chat", "thinking"]
Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")


@dataclass(frozen=True)
class Conversation:
    """Messages in the form that chat interfaces share, and the options of the official encoder.

    thinking_mode: does the next answer begin with reasoning? reasoning_effort: a level of the release.
    drop_thinking: leave out the reasoning of turns before the last user's. context: messages that were
    rendered before, of which nothing is rendered again. add_default_bos_token: begin with the first token of
    a sequence, unless there is a context.
    """

    messages: Sequence[Message]
    thinking_mode: Mode = "chat"
    reasoning_effort: str | None = None
    drop_thinking: bool = True
    context: Sequence[Message] = ()
    add_default_bos_token: bool = True

    def __post_init__(self) -> None:
        """Raises PromptError naming the place of what is wrong."""
        if self.thinking_mode not in get_args(Mode):
            raise PromptError(
                f"thinking_mode is {self.thinking_mode!r}, expected "
                f"{listed(get_args(Mode), str(self.thinking_mode))}"
            )
        for name in ("drop_thinking", "add_default_bos_token"):
            _expect(getattr(self, name), bool, name, "true or false")
        if self.reasoning_effort is not None:
            _expect(self.reasoning_effort, str, "reasoning_effort", "the name of a level")
        for name in ("context", "messages"):
            _check_messages(getattr(self, name), name)
        if not self.messages:
            raise PromptError("messages: there are none; expected at least one, of role user, say")


OPTIONS = tuple(field.name for field in fields(Conversation))


def read_conversation(path: Path) -> Conversation:
    """The conversation of a JSON file: a list of messages, or an object with `messages` and options.

    Raises PromptError with the file and the place in it.
    """
    try:
        given = strict_json.parse(path.read_bytes().decode())
    except OSError as error:
        raise PromptError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: byte {error.start} is no UTF-8; save it as UTF-8") from None
    except ValueError as error:
        raise PromptError(f"{path}: is no JSON: {error}") from None
    try:
        return conversation(given)
    except PromptError as error:
        raise PromptError(f"{path}: {error}") from None


def conversation(given: Any) -> Conversation:
    """A conversation from JSON data. Raises PromptError naming the place of what is wrong."""
    if isinstance(given, list):
        return Conversation(given)
    if not isinstance(given, dict):
        raise PromptError(f"found {_kind(given)}, expected a list of messages, or an object with `messages`")
    for name in given:
        if name not in OPTIONS:
            hint = "; tools belong to a system message" if name == "tools" else ""
            raise PromptError(f"{name!r} is no option; expected {listed(OPTIONS, name)}{hint}")
    if "messages" not in given:
        raise PromptError("messages: there are none; expected a list of at least one")
    return Conversation(**{name: value for name, value in given.items() if value is not None})


def arguments_of(call: Message, place: str = "arguments") -> Mapping[str, Any]:
    """The arguments of a message's tool call, given as a JSON object or as its text.

    Raises PromptError, in which they are called `place`, for anything else.
    """
    given = call["function"].get("arguments", "")
    if isinstance(given, str):
        try:
            given = strict_json.parse(given)
        except ValueError as error:
            raise PromptError(f"{place}: is no JSON: {error}; expected the text of an object") from None
    if not isinstance(given, dict):
        raise PromptError(f"{place}: found {_kind(given)}, expected an object, by parameter, or its text")
    return given


def _check_messages(messages: Any, place: str) -> None:
    _expect(messages, Sequence, place, "a list of messages")
    for i, message in enumerate(messages):
        _check(message, f"{place}[{i}]")


def _check(message: Any, place: str) -> None:
    _expect(message, Mapping, place, 'an object like {"role": "user", "content": "Hello"}')
    role = message.get("role")
    if role not in ROLES:
        found = "missing" if "role" not in message else repr(role)
        raise PromptError(f"{place}.role is {found}, expected one of {listed(ROLES, str(role))}")
    content = message.get("content")
    if role == "tool" and isinstance(content, list):
        for i, block in enumerate(content):
            _expect(block, Mapping, f"{place}.content[{i}]", 'an object like {"type": "text", "text": ...}')
            if block.get("type") == "text":
                _check_text(block.get("text", ""), f"{place}.content[{i}].text")
    elif content is not None or role == "latest_reminder":
        _check_text(content, f"{place}.content")
    if role == "developer" and not content:
        raise PromptError(f"{place}.content is empty; a developer message needs text")
    if message.get("reasoning_content") is not None:
        _check_text(message["reasoning_content"], f"{place}.reasoning_content")
    if message.get("task") is not None and message["task"] not in TASKS:
        raise PromptError(
            f"{place}.task is {message['task']!r}, expected one of {listed(TASKS, str(message['task']))}"
        )
    for i, tool in enumerate(_list(message, "tools", place)):
        _function(tool, f"{place}.tools[{i}]")
    for i, call in enumerate(_list(message, "tool_calls", place)):
        function = _function(call, f"{place}.tool_calls[{i}]")
        _check_text(function.get("name"), f"{place}.tool_calls[{i}].function.name")
        arguments_of(call, f"{place}.tool_calls[{i}].function.arguments")


def _list(message: Message, name: str, place: str) -> Sequence[Any]:
    given = message.get(name)
    _expect(given if given is not None else [], list, f"{place}.{name}", "a list")
    return given or []


def _function(given: Any, place: str) -> Message:
    wanted = 'an object like {"type": "function", "function": {"name": ...}}'
    _expect(given, Mapping, place, wanted)
    function: Message = given.get("function", {})
    _expect(given.get("function"), Mapping, f"{place}.function", 'an object with a "name"')
    return function


def _check_text(value: Any, place: str) -> None:
    _expect(value, str, place, "text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{place}: character {error.start} is half a surrogate pair, which is no text; give both halves"
        ) from None


def _expect(value: Any, type_: type, place: str, wanted: str) -> None:
    if not isinstance(value, type_) or (type_ is Sequence and isinstance(value, str)):
        raise PromptError(f"{place}: found {_kind(value)}, expected {wanted}")


def _kind(value: Any) -> str:
    """A JSON value in a few words."""
    if value is None:
        return "nothing"
    if isinstance(value, (bool, int, float)):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    return "a list" if isinstance(value, list) else "an object"
