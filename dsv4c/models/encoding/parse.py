"""Completions back to messages, as their text arrives: reasoning, content, and tool calls.

The grammar is read top down by a generator that waits wherever the text so far ends, so the cuts of the text
cannot matter. What may yet become a mark is held back; what is one never reaches the reader of an answer.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dsv4c import strict_json
from dsv4c.errors import PromptError
from dsv4c.models.encoding import dsml
from dsv4c.models.encoding.dsml import ToolCall, json_text
from dsv4c.models.encoding.marks import BEGIN, DSML, END, THINK, THOUGHT
from dsv4c.models.encoding.messages import Mode

CALLS = f"\n\n{dsml.CALLS}"
PARAMETER_END = f"/{DSML}parameter"
STRAY = (BEGIN, END, THINK, THOUGHT, f"<{DSML}", f"</{DSML}", DSML)
"""Marks that mean nothing inside of reasoning or content, unless they end it."""

SHOWN = 40  # characters of what was found

Kind = Literal["reasoning", "content"]


@dataclass(frozen=True)
class Piece:
    """Some more text of an answer."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Fault:
    """Where a completion breaks the grammar, and how. Places count characters, lines and columns from 1."""

    place: int
    line: int
    column: int
    what: str

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column} (character {self.place}): {self.what}"


@dataclass(frozen=True)
class Reply:
    """An assistant's message."""

    content: str = ""
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "role": "assistant",
            "content": self.content,
            "reasoning_content": self.reasoning_content,
            "tool_calls": [call.to_json() for call in self.tool_calls],
        }


def parse(text: str, mode: Mode) -> Reply:
    """The message of a whole completion, its last token included. In the thinking mode the prompt has ended
    in `<think>`, so the text begins with reasoning.

    Raises PromptError with the place of what is malformed.
    """
    parser = Parser(mode)
    parser.feed(text)
    parser.finish()
    if parser.fault is not None:
        raise PromptError(str(parser.fault))
    return parser.reply


class _GrammarError(Exception):
    """The grammar cannot go on where this says."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault


Reading = Generator[None, None, None]


class Parser:
    """Takes a completion in any portions and gives what each adds to the answer.

    A malformed completion has a `fault`, its first, known when it is over. What was understood is in `reply`
    all the same: an answer without its `</think>` as reasoning, tool calls after such reasoning, text around
    other marks that mean nothing. From where the grammar of tool calls breaks, it is in `rest` as it came.
    """

    def __init__(self, mode: Mode) -> None:
        self.fault: Fault | None = None
        self.rest = ""
        self._held, self._over = "", False
        self._place, self._line, self._column = 0, 1, 1  # of the first character that is held
        self._unsure: list[str] = []  # what was taken of an element that is not whole yet
        self._made: list[Piece | ToolCall] = []
        self._said: dict[Kind, list[str]] = {"reasoning": [], "content": []}
        self._calls: list[ToolCall] = []
        self._reading = self._completion(mode)

    def feed(self, text: str) -> list[Piece | ToolCall]:
        """What this portion adds."""
        self._held += text
        return self._read()

    def finish(self) -> list[Piece | ToolCall]:
        """What was held back; no more text comes."""
        self._over = True
        return self._read()

    @property
    def reply(self) -> Reply:
        """The message so far."""
        content, reasoning = "".join(self._said["content"]), "".join(self._said["reasoning"])
        return Reply(content, reasoning, tuple(self._calls))

    def _read(self) -> list[Piece | ToolCall]:
        next(self._reading, None)
        made, self._made = self._made, []
        return made

    # --- the grammar ---

    def _completion(self, mode: Mode) -> Reading:
        try:
            mark = THOUGHT
            if mode == "thinking":
                mark = yield from self._flow("reasoning", (THOUGHT, CALLS, END))
                if mark != THOUGHT:
                    self._blame(f"the reasoning ends without {THOUGHT}")
                yield from self._expect(mark)
            if mark == THOUGHT:
                mark = yield from self._flow("content", (CALLS, END))
                if not mark:
                    self._blame(f"the text ends without {END}")
                yield from self._expect(mark)
            if mark == CALLS:
                yield from self._tool_calls()
                yield from self._expect(END, "")
            yield from self._expect("")
        except _GrammarError as malformed:
            self.rest = "".join(self._unsure)
            shown = yield from self._swallow()
            what = f"found {shown!r}, {malformed.fault.what}" if shown else f"the end, {malformed.fault.what}"
            self.fault = self.fault or replace(malformed.fault, what=what)

    def _flow(self, kind: Kind, ends: Sequence[str]) -> Generator[None, None, str]:
        """Hand on text up to the first of the marks `ends`, which is returned; "" where the text is over."""
        marks = (*ends, *(mark for mark in STRAY if mark not in ends))
        wanted = re.compile("|".join(map(re.escape, marks)))
        while True:
            match = wanted.search(self._held)
            sure = len(self._held) if self._over else _sure(self._held, marks)
            text = self._take(min(match.start() if match else sure, sure))
            self._say(kind, text)
            if match and match.start() == len(text):
                if match[0] in ends:
                    return match[0]
                if DSML in match[0]:
                    raise self._malformed(f"which means nothing inside the {kind}")
                self._blame(f"found {match[0]!r}, which means nothing inside the {kind}")
                self._take(len(match[0]))
                self._say(kind, " ")  # so that what is around the mark does not join to another
                continue
            if self._over:
                return ""
            yield

    def _tool_calls(self) -> Reading:
        yield from self._expect(">\n")
        while (yield from self._expect(dsml.INVOKE, dsml.CALLS_END)) == dsml.INVOKE:
            self._unsure = [dsml.INVOKE]
            header = yield from self._until(dsml.PARAMETER, dsml.INVOKE_END)
            name = re.fullmatch(r'\s*name="(.*?)">\n\n?', header, re.DOTALL)
            if name is None:
                raise self._malformed('expected name="..."> and a new line, then the parameters')
            self._unsure.append(self._take(len(header)))
            arguments: dict[str, str] = {}
            while (yield from self._expect(dsml.PARAMETER, dsml.INVOKE_END)) == dsml.PARAMETER:
                self._unsure.append(dsml.PARAMETER)
                key, value = yield from self._parameter()
                if key in arguments:
                    raise self._malformed(f"expected each parameter once, {key!r} is given twice")
                arguments[key] = value
            yield from self._expect(">\n")
            text = ", ".join(f"{json_text(key)}: {value}" for key, value in arguments.items())
            call = ToolCall(name[1], f"{{{text}}}")
            self._unsure = []
            self._calls.append(call)
            self._made.append(call)

    def _parameter(self) -> Generator[None, None, tuple[str, str]]:
        """A parameter's name and its value as JSON."""
        given = yield from self._until(PARAMETER_END)
        parts = re.fullmatch(r' name="(.*?)" string="(true|false)">(.*)<', given, re.DOTALL)
        if parts is None:
            raise self._malformed(f'expected name="..." string="true|false">, a value and <{PARAMETER_END}>')
        key, is_text, value = parts.groups()
        if is_text == "false":
            try:
                strict_json.parse(value)
            except ValueError as error:
                raise self._malformed(f"where the value of {key!r} is no JSON: {error}") from None
        self._unsure.append(self._take(len(given) + len(PARAMETER_END)))
        self._unsure.append((yield from self._expect(">\n")))
        return key, json_text(value) if is_text == "true" else value

    # --- what it is read with ---

    def _expect(self, *wanted: str) -> Generator[None, None, str]:
        """Take one of these, "" being the end of the text."""
        while True:
            for mark in wanted:
                if (mark and self._held.startswith(mark)) or (not mark and self._over and not self._held):
                    return self._take(len(mark))
            if self._over or not any(mark.startswith(self._held) for mark in wanted):
                names = " or ".join(repr(mark) if mark else "nothing more" for mark in wanted)
                raise self._malformed(f"expected {names}")
            yield

    def _until(self, *marks: str) -> Generator[None, None, str]:
        """The text up to the first of these marks, all of which stays where it is."""
        searched = 0
        while True:
            places = [place for mark in marks if (place := self._held.find(mark, searched)) >= 0]
            if places:
                return self._held[: min(places)]
            if self._over:
                raise self._malformed(f"expected {' or '.join(map(repr, marks))} after it")
            searched = max(0, len(self._held) - max(map(len, marks)))
            yield

    def _swallow(self) -> Generator[None, None, str]:
        """Take all that comes, for `rest`. Returns its beginning."""
        beginning = ""
        while True:
            text = self._take(len(self._held))
            beginning = (beginning + text)[:SHOWN]
            self.rest += text
            if self._over:
                return beginning
            yield

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        newlines = text.count("\n")
        self._place, self._line = self._place + count, self._line + newlines
        self._column = len(text) - text.rfind("\n") if newlines else self._column + count
        return text

    def _here(self, what: str) -> Fault:
        return Fault(self._place, self._line, self._column, what)

    def _say(self, kind: Kind, text: str) -> None:
        if text:
            self._said[kind].append(text)
            self._made.append(Piece(kind, text))

    def _blame(self, what: str) -> None:
        """A fault after which reading goes on."""
        self.fault = self.fault or self._here(what)

    def _malformed(self, what: str) -> _GrammarError:
        return _GrammarError(self._here(what))


def _sure(text: str, marks: Sequence[str]) -> int:
    """How much of the text cannot be the beginning of a mark."""
    for length in range(min(len(text), max(map(len, marks)) - 1), 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return len(text) - length
    return len(text)
