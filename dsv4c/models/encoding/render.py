"""Conversations to prompts, byte for byte as the official encoder renders them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsv4c.models.encoding.dsml import calls_text, introduction, json_text
from dsv4c.models.encoding.marks import ASSISTANT, BEGIN, END, REMINDER, TASKS, THINK, THOUGHT, USER
from dsv4c.models.encoding.messages import Conversation, Message, arguments_of
from dsv4c.models.encoding.rules import PREVIEW, Rules


@dataclass(frozen=True)
class _Result:
    """What a tool gave back, and which call it answers."""

    call: str
    text: str


@dataclass(frozen=True)
class _Turn:
    """A message of a role that prompts have. A user's is made of what they wrote and what tools gave back."""

    role: str
    message: Message
    blocks: tuple[str | _Result, ...] = ()

    @property
    def asks(self) -> bool:
        """Is it one that the model answers?"""
        return self.role in ("user", "developer")


def render(conversation: Conversation, rules: Rules = PREVIEW) -> str:
    """The prompt of a conversation. Raises PromptError for an effort that the release has no level for."""
    effort = rules.effort(conversation.reasoning_effort)
    before = list(_merged(conversation.context))
    turns = _sorted_results([*before, *_merged(conversation.messages)])
    thinking = conversation.thinking_mode == "thinking"
    has_tools = any(turn.message.get("tools") for turn in turns if turn.role != "user")
    drop = conversation.drop_thinking and not has_tools
    if thinking and drop:
        # The context is counted as it was dropped when it was rendered, which is not always as it is now.
        before, turns = _dropped(before), _dropped(turns)
    prompt = [BEGIN] if conversation.add_default_bos_token and not conversation.context else []
    asked = _last_asked(turns)
    for i in range(len(before), len(turns)):
        if i == 0 and thinking:
            prompt.append(effort)
        prompt.append(_text(turns, i, asked, thinking, drop))
        prompt.append(_transition(turns, i, asked, thinking, drop))
    return "".join(prompt)


# --- turns ---


def _merged(messages: Sequence[Message]) -> Iterator[_Turn]:
    """Turns: results of tools are parts of a user's turn, and users who follow one another are one."""
    user: _Turn | None = None
    for message in messages:
        role = message["role"]
        block: str | _Result
        if role not in ("user", "tool"):
            if user is not None:
                yield user
            user = None
            yield _Turn(role, message)
            continue
        if role == "tool":
            block, joins = _Result(message.get("tool_call_id") or "", _result_text(message)), True
        else:
            # A message with a task is rendered to its end: nothing may be added to it.
            block = message.get("content") or ""
            joins = user is not None and user.message.get("task") is None
        if user is not None and joins:
            user = replace(user, blocks=(*user.blocks, block))
            continue
        if user is not None:
            yield user
        user = _Turn("user", message if role == "user" else {}, (block,))
    if user is not None:
        yield user


def _result_text(message: Message) -> str:
    content = message.get("content")
    if isinstance(content, list):
        texts = (
            b.get("text", "") if b.get("type") == "text" else f"[Unsupported {b.get('type')}]"
            for b in content
        )
        return "\n\n".join(texts)
    return content or ""


def _sorted_results(turns: Sequence[_Turn]) -> list[_Turn]:
    """The results of a turn in the order in which the last assistant called for them."""
    order: dict[str, int] = {}
    made = []
    for turn in turns:
        if turn.role == "assistant" and turn.message.get("tool_calls"):
            calls = turn.message["tool_calls"]
            ids = [call.get("id") or call["function"].get("id") or "" for call in calls]
            order = {id_: place for place, id_ in enumerate(ids) if id_}
        results = [b for b in turn.blocks if isinstance(b, _Result)]
        if len(results) > 1 and order:
            following = iter(sorted(results, key=lambda result: order.get(result.call, 0)))
            blocks = tuple(next(following) if isinstance(b, _Result) else b for b in turn.blocks)
            turn = replace(turn, blocks=blocks)
        made.append(turn)
    return made


def _last_asked(turns: Sequence[_Turn]) -> int:
    """The place of the last turn that the model answers, -1 without one."""
    return max((i for i, turn in enumerate(turns) if turn.asks), default=-1)


def _dropped(turns: Sequence[_Turn]) -> list[_Turn]:
    """Without developers before the last question. The reasoning before it is left out in `_text`."""
    asked = _last_asked(turns)
    return [turn for i, turn in enumerate(turns) if i >= asked or turn.role != "developer"]


# --- texts ---


def _text(turns: Sequence[_Turn], i: int, asked: int, thinking: bool, drop: bool) -> str:
    """One turn, without what leads to the next."""
    turn, message = turns[i], turns[i].message
    if turn.role == "user":
        return USER + "\n\n".join(
            b if isinstance(b, str) else f"<tool_result>{b.text}</tool_result>" for b in turn.blocks
        )
    content = message.get("content") or ""
    if turn.role == "latest_reminder":
        return REMINDER + content
    if turn.role != "assistant":
        return (USER if turn.role == "developer" else "") + content + _sections(message)
    reasoning = ""
    answers_task = i > 0 and turns[i - 1].message.get("task") is not None
    if thinking and not answers_task and (not drop or i > asked):
        reasoning = (message.get("reasoning_content") or "") + THOUGHT
    calls = message.get("tool_calls")
    block = "\n\n" + calls_text((c["function"]["name"], arguments_of(c)) for c in calls) if calls else ""
    return reasoning + content + block + ("" if message.get("wo_eos") else END)


def _sections(message: Message) -> str:
    """What a system's or developer's message adds to its text: tools, and the form of the response."""
    text = ""
    if message.get("tools"):
        functions: list[dict[str, Any]] = [tool["function"] for tool in message["tools"]]
        text += "\n\n" + introduction(functions)
    if message.get("response_format"):
        schema = json_text(message["response_format"])
        text += (
            f"\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n{schema}"
        )
    return text


def _transition(turns: Sequence[_Turn], i: int, asked: int, thinking: bool, drop: bool) -> str:
    """What lets the assistant speak, or a task begin, where that follows."""
    if i + 1 < len(turns) and turns[i + 1].role not in ("assistant", "latest_reminder"):
        return ""
    task = turns[i].message.get("task")
    if task == "action":
        return ASSISTANT + (THINK if thinking else THOUGHT) + TASKS[task]
    if task is not None:
        return TASKS[task]
    if turns[i].asks:
        return ASSISTANT + (THINK if thinking and (not drop or i >= asked) else THOUGHT)
    return ""
