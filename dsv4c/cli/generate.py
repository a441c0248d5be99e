"""`dsv4c generate CHECKPOINT|PLAN`: a question in, an answer as it is said."""

from __future__ import annotations

import contextlib
import json as json_module
import secrets
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from dsv4c.cli.chat import chat
from dsv4c.cli.console import note, progress_bar
from dsv4c.cli.options import Draft, EncodingOption, JsonOption, no_drafts
from dsv4c.cli.run import token_ids
from dsv4c.cli.subject import is_plan
from dsv4c.compiler.kept import kept_plan
from dsv4c.compiler.request import Request
from dsv4c.config import ModelConfig, load_config
from dsv4c.errors import ConfigError, PromptError
from dsv4c.models.encoding.messages import Conversation, read_conversation
from dsv4c.models.encoding.render import render
from dsv4c.models.encoding.rules import rules_of
from dsv4c.models.encoding.tokenizer import Tokenizer
from dsv4c.plan.folder import Plan, load
from dsv4c.runtime.answer import (
    Answers,
    Done,
    Event,
    Reasoning,
    Token,
    ToolCalled,
    check_prompt,
    check_tokenizer,
    generation_defaults,
)
from dsv4c.runtime.bind import machine_target
from dsv4c.runtime.checkpoint import Checkpoint
from dsv4c.runtime.processes import world_of
from dsv4c.runtime.sampling import LEAST, Sampling
from dsv4c.runtime.session import token_id

INTERRUPTED = 130

SubjectArgument = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT|PLAN",
        help="A checkpoint folder as it was downloaded, or a plan folder.",
        show_default=False,
    ),
]


def _optional(help: str, metavar: str | None = None, default: str | bool = False, **more: Any) -> Any:
    return typer.Option(help=help, metavar=metavar, show_default=default, **more)


PromptOption = Annotated[str | None, _optional("A question; - reads it from stdin.", "TEXT")]
ConversationOption = Annotated[
    Path | None,
    _optional("JSON file: messages, or an object with `messages` and options.", "FILE", readable=False),
]
TokensOption = Annotated[
    str | None, _optional("Token ids, separated by commas, and ids as the answer: needs no tokenizer.", "IDS")
]
ChatOption = Annotated[bool, typer.Option("--chat", help="Talk: a line is a question, /help lists commands.")]
WeightsOption = Annotated[Path | None, _optional("Checkpoint folder for a plan.", "DIR", readable=False)]
ThinkingOption = Annotated[bool, typer.Option("--thinking", help="Let it reason before it answers.")]
EffortOption = Annotated[
    str | None, _optional("How much it reasons: a level of the release, as max.", "LEVEL")
]
TARGET_HELP = "What runs it: cpu, sm_90a or sm_100a."
TargetOption = Annotated[str | None, _optional(TARGET_HELP, "NAME", "this machine's GPU, or cpu")]
RecipeOption = Annotated[str, typer.Option(help="Numerics (`dsv4c recipes` has all).", metavar="NAME")]
ContextOption = Annotated[int, typer.Option(help="Tokens of prompt and answer.", min=2)]
NewOption = Annotated[int | None, _optional("Tokens of the answer.", "N", "as many as there is room", min=1)]
StopOption = Annotated[list[str] | None, _optional("End before this text; may be repeated.", "TEXT")]
DEFAULT = "the checkpoint's"
TemperatureOption = Annotated[float | None, _optional("0: always the likeliest token.", "T", DEFAULT)]
TopPOption = Annotated[float | None, _optional("Of the likeliest tokens, those that sum to P.", "P", DEFAULT)]
TopKOption = Annotated[int | None, _optional("Of the K likeliest tokens.", "K", DEFAULT)]
MinPOption = Annotated[float | None, _optional("Of tokens at least P times the likeliest.", "P", DEFAULT)]
RepetitionOption = Annotated[
    float | None, _optional("Lower what is there already, by division.", "R", DEFAULT)
]
PresenceOption = Annotated[float, typer.Option(help="Lower what was said, once.", metavar="A")]
FrequencyOption = Annotated[float, typer.Option(help="Lower what was said, as often.", metavar="A")]
SeedOption = Annotated[int | None, _optional("The same seed gives the same answer.", "N", "a new one")]
LogprobsOption = Annotated[
    int | None,
    _optional("With --json: each token's log-probability, and the N best.", "N", min=0, max=100),
]
DraftOption = Annotated[
    Draft, typer.Option(help="Say several tokens a step, drafted by what the checkpoint has (auto), or off.")
]
DraftTokensOption = Annotated[int | None, _optional("Tokens drafted in a round.", "K", "1, of DSpark 3")]
ConfidenceOption = Annotated[
    float | None,
    _optional(
        "How likely a DSpark draft must be to be judged; 0: all are.",
        "P",
        "0",
        min=0,
        max=1,
    ),
]
CacheOption = Annotated[
    Path | None, _optional("Folder of kept plans and kernels.", "DIR", "the user's cache")
]


def register(app: typer.Typer) -> None:
    app.command("generate")(generate_command)


def generate_command(
    subject: SubjectArgument,
    prompt: PromptOption = None,
    messages: ConversationOption = None,
    tokens: TokensOption = None,
    chatting: ChatOption = False,
    weights: WeightsOption = None,
    thinking: ThinkingOption = False,
    effort: EffortOption = None,
    encoding: EncodingOption = "auto",
    max_new_tokens: NewOption = None,
    stop: StopOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionOption = None,
    presence_penalty: PresenceOption = 0.0,
    frequency_penalty: FrequencyOption = 0.0,
    seed: SeedOption = None,
    logprobs: LogprobsOption = None,
    target: TargetOption = None,
    recipe: RecipeOption = "official",
    max_context: ContextOption = 4096,
    draft: DraftOption = Draft.OFF,
    draft_tokens: DraftTokensOption = None,
    draft_confidence: ConfidenceOption = None,
    cache: CacheOption = None,
    json: JsonOption = False,
) -> None:
    """Answer: compile a checkpoint on first use, or take a plan, and print what the model says.

    stdout has the answer alone, stderr the rest: what is done, reasoning, and a closing line.

    Examples:

      dsv4c generate ./DeepSeek-V4-Flash --prompt "Why is the sky blue?" --thinking

      dsv4c generate ./DeepSeek-V4-Flash --chat

      dsv4c generate tiny.plan --weights tiny-weights --tokens 3,17,5 --temperature 0 --max-new-tokens 8
    """
    asked = {"--prompt": prompt, "--messages": messages, "--tokens": tokens, "--chat": chatting or None}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) != 1:
        raise ConfigError(f"expected one of {', '.join(asked)}, found {' and '.join(given) or 'none'}")
    if logprobs is not None and not json:
        raise ConfigError("--logprobs: is part of the events; give --json, too")
    folder = weights_of(subject, weights)
    question = _question(prompt, messages, tokens, thinking, effort)
    tokenizer = Tokenizer.open(folder) if tokens is None else None
    Checkpoint.open(folder)  # what is missing, or half there, is said before a long compile
    chosen = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    seed = secrets.randbits(32) if seed is None else seed
    sampling = Sampling(
        **generation_defaults(folder)
        | {name: value for name, value in chosen.items() if value is not None}
        | {"presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty, "seed": seed}
    )
    refuse_given(draft)
    target = target or machine_target()
    plan = load(subject) if is_plan(subject) else None
    if plan is not None:
        max_context = int(plan.deployment["max_context"])
    config = plan.config if plan is not None else load_config(folder.absolute()).to_dict()
    first = question if question is not None else _asking("a line of the chat", thinking, effort)
    _check_question(first, tokenizer, encoding, folder, config, max_context)
    if plan is None:
        trusts = bool(draft_confidence)
        plan = _plan(folder, target, recipe, max_context, draft.value, draft_tokens, trusts, cache)
    if draft is not Draft.OFF:
        check_drafts(plan, draft, draft_tokens)
    if draft_confidence and (draft is Draft.OFF or all(slot.name != LEAST for slot in plan.state)):
        raise ConfigError(
            f"--draft-confidence {draft_confidence}: no draft of plan {plan.name} comes with a confidence; "
            "expected --draft dspark, and of a plan one of `dsv4c compile --draft-confidence`"
        )
    if temperature is None and not any(program.shape.sampled for program in plan.buckets.values()):
        note("this plan always takes the likeliest token; one of `dsv4c compile --sampled` would draw it")
        sampling = Sampling(seed=seed)
    world = world_of(plan)
    if world is not None:
        if chatting:
            raise ConfigError(f"--chat: is for one process, this is one of {world.size}; give --prompt")
        sampling = replace(sampling, seed=world.gather(sampling.seed)[0])
    with progress_bar("weights", bytes_counted=True) as progress:
        session = plan.bind(folder, progress=progress)
    note(f"weights: {session.loaded}")
    options: dict[str, Any] = {
        "sampling": sampling,
        "max_new_tokens": max_new_tokens,
        "stop": stop or (),
        "logprobs": logprobs,
        "encoding": encoding,
        "drafting": draft is not Draft.OFF,
        "draft_confidence": draft_confidence or 0.0,
    }
    if chatting:
        chat(
            session,
            lambda history: Conversation(history, "thinking" if thinking else "chat", effort),
            options,
            lambda answers: answer(answers, json=json, ids=False),
            closing,
        )
        return
    done = answer(session.generate(question, **options), json=json, ids=tokens is not None)
    if not json:
        note(closing(done))
    if done.reason == "interrupted":
        raise typer.Exit(INTERRUPTED)


def weights_of(subject: str, weights: Path | None) -> Path:
    """The checkpoint folder of what is asked for. Raises ConfigError for neither a plan nor a checkpoint."""
    if is_plan(subject):
        if weights is None:
            raise ConfigError(f"{subject} is a plan; name the checkpoint folder with --weights DIR")
        return weights
    if weights is not None:
        raise ConfigError(f"{subject} is no plan, so --weights has no place; leave it out")
    if not (Path(subject) / "config.json").is_file():
        raise ConfigError(f"{subject}: is neither a plan nor a checkpoint folder with a config.json")
    return Path(subject)


def _plan(
    folder: Path,
    target: str,
    recipe: str,
    max_context: int,
    draft: str,
    draft_tokens: int | None,
    confidence: bool,
    cache: Path | None,
) -> Plan:
    request = Request(
        str(folder.absolute()),  # a folder may be called as a built-in model is
        target=target,
        recipe=recipe,
        batch=1,
        max_context=max_context,
        logits="last",
        sampled=True,
        draft=draft,  # type: ignore[arg-type]  # an option's value
        draft_tokens=draft_tokens,
        draft_confidence=confidence,
    )
    with progress_bar("compile") as progress:
        return kept_plan(request, cache=cache, progress=progress, note=note)


def refuse_given(draft: Draft) -> None:
    """Raise ConfigError for drafts of the caller's."""
    if draft is Draft.GIVEN:
        raise ConfigError("--draft given: nobody gives drafts here; expected auto, off, mtp or dspark")


def check_drafts(plan: Plan, draft: Draft, tokens: int | None) -> None:
    """Say where nothing drafts; ConfigError where something else does than is asked for."""
    rounds = [program.shape for program in plan.buckets.values() if program.shape.kind == "round"]
    config = ModelConfig.from_dict(plan.config)
    if not rounds and draft is Draft.AUTO and (tokens is None or config.drafts_with):
        note(no_drafts(config))
        return
    found = config.drafts_with if rounds else "nothing"
    if draft not in (Draft.AUTO, found):
        raise ConfigError(f"--draft {draft}: plan {plan.name} drafts with {found}; compile one with --draft")
    if tokens is not None and all(shape.tokens != 1 + tokens for shape in rounds):
        sizes = ", ".join(str(shape.tokens - 1) for shape in rounds) or "none"
        raise ConfigError(f"--draft-tokens {tokens}: plan {plan.name} drafts {sizes} tokens a round")


def _question(
    prompt: str | None, messages: Path | None, tokens: str | None, thinking: bool, effort: str | None
) -> Any:
    if tokens is not None:
        return token_ids(tokens, "--tokens")
    if messages is not None:
        return read_conversation(messages)
    if prompt is None:
        return None
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise PromptError(f"stdin: byte {error.start} is no UTF-8") from None
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"--prompt: is no UTF-8 at character {error.start}") from None
    if not prompt.strip():
        raise PromptError("--prompt: is empty; say something")
    return _asking(prompt, thinking, effort)


def _asking(text: str, thinking: bool, effort: str | None) -> Conversation:
    return Conversation([{"role": "user", "content": text}], "thinking" if thinking else "chat", effort)


def _check_question(
    question: Any,
    tokenizer: Tokenizer | None,
    encoding: str,
    folder: Path,
    config: Mapping[str, Any],
    room: int,
) -> None:
    """Raise, before anything is compiled or loaded, what a session would raise."""
    if tokenizer is None:
        size = int(config["vocab_size"])
        check_prompt([token_id(id_, f"token {n}", size) for n, id_ in enumerate(question)], room)
        return
    check_tokenizer(tokenizer, config)
    rules, remark = rules_of(encoding, folder)
    if remark:
        note(remark)
    check_prompt(tokenizer.encode(render(question, rules)), room)


# --- showing ---


def answer(answers: Answers, *, json: bool, ids: bool) -> Done:
    """Print the events as they come, and return the last. An interrupt ends the answer and keeps it."""
    done: Done | None = None
    shown, open_line = 0, ""
    with _interrupting(answers):
        for event in answers:
            if isinstance(event, Done):
                done = event
            if json:
                print(json_module.dumps(event.to_json(), allow_nan=False), flush=True)
            elif ids and isinstance(event, Token):
                print(f"{',' * bool(shown)}{event.ids[0]}", end="", flush=True)
                shown += 1
            elif not ids:
                if open_line and event.type not in (open_line, "done" if open_line == "token" else ""):
                    print(file=sys.stderr, flush=True)  # what is of another kind begins a line
                    open_line = ""
                show(event)
                if isinstance(event, Token) and event.text:
                    open_line = event.type
    if not json:
        print(flush=True)
    assert done is not None
    return done


@contextlib.contextmanager
def _interrupting(answers: Answers) -> Iterator[None]:
    """The first interrupt ends the answer after the step under way, a second one everything."""

    def first(number: int, frame: FrameType | None) -> None:
        answers.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def show(event: Event) -> None:
    """An event on the terminal: answers on stdout, reasoning dimmed and calls on stderr."""
    if isinstance(event, Reasoning):
        dim = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
        if event.text:
            sys.stdout.flush()
            print(f"{dim[0]}{event.text}{dim[1]}", end="", file=sys.stderr, flush=True)
    elif isinstance(event, Token):
        print(event.text, end="", flush=True)
    elif isinstance(event, ToolCalled):
        print(f"call: {event.name} {event.arguments}", file=sys.stderr)


def closing(done: Done) -> str:
    """What an answer took, in a line."""
    why = {"stop": "", "length": ", cut off", "interrupted": ", interrupted", "stop_string": ""}[done.reason]
    fault = f"; malformed: {done.malformed}" if done.malformed else ""
    if done.accepted:
        held = " ".join(map(str, done.accepted))
        fault = f"; {sum(done.accepted)} rounds, {done.tokens_per_round:.2f} tokens each (held {held}){fault}"
    return (
        f"{len(done.ids)} tokens{why} after {done.prompt_tokens} ({done.read} read), first after "
        f"{done.seconds_to_first:.2f} s, {done.tokens_per_second:.1f} tokens/s, "
        f"{done.launches} launches per token, seed {done.seed}{fault}"
    )
