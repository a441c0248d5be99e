"""Prompts as the official encoder renders them, completions as it parses them, and what it would not take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.errors import PromptError
from dsv4c.models.encoding.dsml import json_text
from dsv4c.models.encoding.marks import BEGIN, DSML, END
from dsv4c.models.encoding.messages import OPTIONS, Conversation, conversation
from dsv4c.models.encoding.parse import Parser, Piece, parse
from dsv4c.models.encoding.render import render
from dsv4c.models.encoding.rules import ENCODER, EXHAUSTIVE, JULY, PREVIEW, RULES, THOROUGH, rules_of
from tests.commands import command
from tests.goldens import golden_case

CASES = json.loads((golden_case("encoding") / "cases.json").read_text())


def by_name(cases: Sequence[dict[str, Any]]) -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in cases]


def given_of(case: dict[str, Any]) -> dict[str, Any]:
    """A recorded case as the file that a user writes."""
    return {"messages": case["messages"], **case["options"]}


# --- recorded ---


@pytest.mark.parametrize("case", by_name(CASES["encode"]))
def test_a_recorded_prompt(case: dict[str, Any]) -> None:
    assert render(conversation(given_of(case))) == case["expected"]


@pytest.mark.parametrize("case", by_name(CASES["parse"]))
def test_a_recorded_completion(case: dict[str, Any]) -> None:
    if case.get("error"):
        with pytest.raises(PromptError, match=r"line 1, column 15 .*: the reasoning ends without </think>"):
            parse(case["text"], case["thinking_mode"])
    else:
        assert parse(case["text"], case["thinking_mode"]).to_json() == case["expected"]


def test_the_command_prints_the_prompt_and_nothing_else(tmp_path: Path) -> None:
    case = next(c for c in CASES["encode"] if c["name"] == "reminder")
    (tmp_path / "chat.json").write_text(json.dumps(given_of(case)))
    made = command("encode", "--messages", tmp_path / "chat.json")
    assert (made.code, made.out, made.err) == (0, case["expected"], "")
    (tmp_path / "list.json").write_text(json.dumps(case["messages"]))
    assert command("encode", "--messages", tmp_path / "list.json").out.endswith("<｜Assistant｜></think>")


def test_the_command_parses_or_says_where(tmp_path: Path) -> None:
    file = tmp_path / "completion.txt"
    file.write_text(f"Well.</think>Yes.{END}")
    assert command("parse", file, "--mode", "thinking").json["reasoning_content"] == "Well."
    refused = command("parse", file)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith(f"error: {file}: line 1, column 6 (character 5): found '</think>', which")
    file.write_bytes(b"Caf\xe9")
    assert "byte 3 is no UTF-8" in command("parse", file).err


# --- rules of a release ---

ASKED = [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    ("rules", "level", "text"),
    [
        (PREVIEW, None, ""),
        (PREVIEW, "high", ""),
        (PREVIEW, "max", THOROUGH),
        (JULY, None, ""),
        (JULY, "low", ""),
        (JULY, "high", THOROUGH),
        (JULY, "max", EXHAUSTIVE),
    ],
)
def test_levels_of_effort(rules: Any, level: str | None, text: str) -> None:
    """Digests of the texts were taken from the official encoders."""
    made = render(Conversation(ASKED, "thinking", reasoning_effort=level), rules)
    assert made == f"{BEGIN}{text}<｜User｜>Why?<｜Assistant｜><think>"
    chat = render(Conversation(ASKED, "chat", reasoning_effort=level), rules)
    assert chat == f"{BEGIN}<｜User｜>Why?<｜Assistant｜></think>"
    found = {t: hashlib.sha256(t.encode()).hexdigest()[:16] for t in (THOROUGH, EXHAUSTIVE)}
    assert found == {THOROUGH: "f7a24f3b3050d4a8", EXHAUSTIVE: "53fb31b8392ec5b4"}


def test_a_level_that_a_release_lacks_is_refused() -> None:
    with pytest.raises(PromptError, match="the preview release has no level 'low'; expected high, max"):
        render(Conversation(ASKED, "thinking", reasoning_effort="low"), PREVIEW)


def test_a_folder_tells_its_rules_by_its_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rules_of("0731", None) == (JULY, "")
    assert rules_of("auto", None)[0] is PREVIEW
    assert "has no encoding/encoding_dsv4.py" in rules_of("auto", tmp_path)[1]
    (tmp_path / ENCODER).parent.mkdir()
    (tmp_path / ENCODER).write_text("# an encoder")
    rules, remark = rules_of("auto", tmp_path)
    assert rules is PREVIEW
    assert "is no release's that is known" in remark
    known = hashlib.sha256(b"# an encoder").hexdigest()
    monkeypatch.setitem(RULES, "0731", type(JULY)("0731", JULY.efforts, known))
    assert rules_of("auto", tmp_path) == (RULES["0731"], "")


# --- there and back ---

MARKS = ("<｜", "｜", "<think", "</think")
TEXT = st.text(max_size=12).filter(lambda t: not any(mark in t for mark in MARKS))
NAME = st.text(min_size=1, max_size=6).filter(lambda t: '"' not in t and "\n" not in t and "｜" not in t)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
CALL = st.tuples(NAME, st.dictionaries(NAME, JSON, max_size=3))


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A mode, and an assistant's message that it allows."""
    mode = draw(st.sampled_from(["chat", "thinking"]))
    reasoning = draw(TEXT) if mode == "thinking" else ""
    calls = [
        {"type": "function", "function": {"name": name, "arguments": json_text(arguments)}}
        for name, arguments in draw(st.lists(CALL, max_size=2))
    ]
    content = draw(TEXT)
    return mode, {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": calls,
    }


@settings(max_examples=150, deadline=None)
@given(answers(), st.data())
def test_what_was_rendered_is_parsed_to_the_same_in_any_portions(
    answer: tuple[str, dict[str, Any]], data: st.DataObject
) -> None:
    mode, message = answer
    asked = render(Conversation(ASKED, mode))
    completion = render(Conversation([*ASKED, message], mode)).removeprefix(asked)
    assert parse(completion, mode).to_json() == message
    cuts = sorted(data.draw(st.lists(st.integers(0, len(completion)), max_size=6)))
    parser = Parser(mode)
    made = [piece for part in portions(completion, cuts) for piece in parser.feed(part)] + parser.finish()
    assert parser.reply.to_json() == message
    for kind, key in (("content", "content"), ("reasoning", "reasoning_content")):
        assert "".join(p.text for p in made if isinstance(p, Piece) and p.kind == kind) == message[key]


def portions(text: str, cuts: Sequence[int]) -> Iterator[str]:
    for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
        yield text[start:stop]


# --- malformed ---

CALLS = f"\n\n<{DSML}tool_calls>\n"
INVOKE = f'<{DSML}invoke name="f">\n'
CLOSED = f"</{DSML}invoke>\n</{DSML}tool_calls>"


def parameter(text: str) -> str:
    return f"{CALLS}{INVOKE}<{DSML}parameter {text}</{DSML}parameter>\n{CLOSED}{END}"


MALFORMED = {
    "no last token": ("Four", "chat", "character 4): the text ends without"),
    "text after it": (f"Four{END}!", "chat", "character 23): found '!', expected nothing more"),
    "a stray mark": ("Four <think>", "chat", "column 6 (character 5): found '<think>', which means nothing"),
    "reasoning that is not closed": ("Hm", "thinking", "character 2): the reasoning ends without </think>"),
    "calls after a single new line": (f"A\n<{DSML}tool_calls>", "chat", "line 2, column 1 (character 2)"),
    "calls that do not end": (CALLS + INVOKE, "chat", "expected '<｜DSML｜parameter' or '</｜DSML｜invoke'"),
    "no name": (f"{CALLS}<{DSML}invoke>\n{CLOSED}{END}", "chat", 'line 4, column 14 .*expected name="..."'),
    "no kind": (parameter('name="a">1'), "chat", 'expected name="..." string="true|false">'),
    "no JSON": (parameter('name="a" string="false">yes'), "chat", "where the value of 'a' is no JSON"),
    "text between": (f"{CALLS}and {INVOKE}{CLOSED}{END}", "chat", "line 4, column 1 .*found 'and "),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_completion_is_refused_with_the_place_however_it_is_cut(name: str) -> None:
    text, mode, message = MALFORMED[name]
    with pytest.raises(PromptError) as refused:
        parse(text, mode)
    for cut in range(len(text)):
        parser = Parser(mode)
        made = [*parser.feed(text[:cut]), *parser.feed(text[cut:]), *parser.finish()]
        assert str(parser.fault) == str(refused.value)
        assert not any(DSML in piece.text for piece in made if isinstance(piece, Piece))
    place, _, rest = message.rpartition(".*")
    assert all(part in str(refused.value) for part in (place, rest))


def test_a_call_after_reasoning_that_is_not_closed_is_kept() -> None:
    text = "Look it up." + parameter('name="a" string="true">7')
    parser = Parser("thinking")
    made = [*parser.feed(text), *parser.finish()]
    assert [p.text for p in made if isinstance(p, Piece)] == ["Look it up."]
    assert parser.reply.to_json()["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": "7"}'}
    assert "without </think>" in str(parser.fault)


def test_what_is_malformed_is_kept_as_it_came() -> None:
    broken = parameter('name="a" string="false">yes')
    parser = Parser("chat")
    parser.feed(f"Well.{broken}")
    parser.finish()
    assert (parser.reply.content, parser.rest) == ("Well.", broken.removeprefix(CALLS))


# --- messages that make no prompt ---

WRONG = {
    "no list": ('"Hello"', "found the text 'Hello', expected a list of messages"),
    "no JSON": ("[", "is no JSON"),
    "no messages": ("[]", "messages: there are none"),
    "an unknown option": (
        '{"messages": [], "tools": []}',
        "'tools' is no option; .*tools belong to a system",
    ),
    "an unknown role": ('[{"role": "bot"}]', "messages[0].role is 'bot', expected one of system, developer"),
    "no role": ('[{"content": "Hello"}]', "messages[0].role is missing"),
    "content of another kind": ('[{"role": "user", "content": 7}]', "messages[0].content: found 7"),
    "half a character": (
        '[{"role": "user", "content": "a\\ud800"}]',
        "messages[0].content: character 1 is half",
    ),
    "an unknown mode": (
        '{"messages": [{"role": "user"}], "thinking_mode": "loud"}',
        "thinking_mode is 'loud'",
    ),
    "an unknown task": ('[{"role": "user", "task": "sing"}]', "messages[0].task is 'sing'"),
    "arguments that are no JSON": (
        '[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{a"}}]}]',
        "messages[0].tool_calls[0].function.arguments: is no JSON",
    ),
    "a call without a function": (
        '[{"role": "assistant", "tool_calls": [{"name": "f"}]}]',
        "messages[0].tool_calls[0].function: found nothing",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_with_its_name_and_the_place(name: str, tmp_path: Path) -> None:
    text, message = WRONG[name]
    (tmp_path / "chat.json").write_text(text)
    refused = command("encode", "--messages", tmp_path / "chat.json")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith(f"error: {tmp_path / 'chat.json'}: ")
    assert all(part in refused.err for part in message.split(".*"))


def test_options_are_those_of_the_official_encoder() -> None:
    assert set(OPTIONS) == {
        "messages",
        "thinking_mode",
        "reasoning_effort",
        "drop_thinking",
        "context",
        "add_default_bos_token",
    }
