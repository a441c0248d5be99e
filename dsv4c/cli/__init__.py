"""The command line: one module of this package per command, listed in `COMMANDS`. Commands parse and print.

A command is a module of this package with a `register(app)`; add it to `COMMANDS`. Its module is loaded when
it is called, with all that it needs. Results go to stdout (with --json nothing but JSON), the rest to stderr,
where with --json an error is an object in a line. Exit codes are those of `dsv4c.errors`, 130 when
interrupted, 141 when nobody reads the output to its end, 1 when the system fails at something else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType, ModuleType
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from dsv4c.cli.help import Commands, without_values
from dsv4c.errors import ConfigError, Dsv4cError, Terminated
from dsv4c.threads import leads, wait_asleep

COMMANDS = {
    "compile": "Compile a model to a plan: a folder of plain data that `dsv4c run` executes.",
    "limits": "Say what stands between a model and a plan for a target: every obstacle, and the memory.",
    "show": "Show a model's graph: figures first, then the operations, equal layers folded into one.",
    "diff": "Compare two graphs: nodes gone, new and changed; launches, bytes and operations.",
    "passes": "Show the pipeline of a plan and what every rule saved in a decode step.",
    "why-not": "Explain where a rule did not apply: the best match, what failed first, what it would save.",
    "check": "Check every way a rule applied: the nodes it replaced and the fused op agree on hard inputs.",
    "bisect": "Find the rewrite at fault: run the plan, and its unfused nodes on operands of each launch.",
    "verify": "Check a plan: files, launches against kernels and graphs, and what they do to each other.",
    "roofline": "Say what every launch must move and compute, and how long that takes at least.",
    "bench": "Time a plan's step, every layer and every launch in its place, beside what its bytes take.",
    "tune": "Find faster cuts of a plan's heaviest kernels.",
    "run": "Run a plan: prefill the prompt, decode the forced tokens, then generate greedily.",
    "generate": "Answer: compile a checkpoint on first use, or take a plan, and print what the model says.",
    "serve": "Serve by vLLM, over the OpenAI API: compile a checkpoint on first use, or take a plan.",
    "memory": "Say what a plan takes of memory before it is loaded, and what fits in how much.",
    "encode": "Print the prompt of a conversation, and nothing else: no newline ends it.",
    "parse": "Turn a completion into the message that it is, a JSON object, or say where it is malformed.",
    "weights": "Compare a checkpoint's names, shapes, types and scales with the model's.",
    "synth": "Write a random checkpoint of a model, for tests and benchmarks.",
    "rules": "List the rules that compile may apply, in the order in which it tries them.",
    "recipes": "List the recipes: where a model's values are quantized, and in which format.",
    "targets": "List the targets, and what runs their plans.",
    "models": "List the built-in models.",
}
"""The commands by name, with the first sentence or two of their own help."""

SETTINGS: dict[str, Any] = {
    "pretty_exceptions_enable": False,
    "rich_markup_mode": "rich",
}
INTERRUPTED, UNREAD = 130, 141  # 128 + SIGINT and 128 + SIGPIPE, as shells have it
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # click's, which newer typers bring themselves
NO_ARGUMENTS: type[Exception] = sys.modules[USAGE_ERROR.__module__].NoArgsIsHelpError


def _tell(message: str, kind: str, code: int, as_json: bool) -> typer.Exit:
    """Say on stderr what went wrong, with `--json` as an object in a line. Returns what is to be raised."""
    error = {"error": message, "kind": kind, "exit_code": code}
    print(json.dumps(error) if as_json else f"error: {message}", file=sys.stderr)
    return typer.Exit(code)


@contextmanager
def _told_in_a_sentence(as_json: bool) -> Iterator[None]:
    """What a user or the system did wrong becomes one sentence on stderr and an exit code."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # a full disk must show while somebody can still say so
    except Dsv4cError as error:
        raise _tell(str(error), type(error).__name__, error.exit_code, as_json) from None
    except NO_ARGUMENTS:
        raise  # it shows the help
    except USAGE_ERROR as error:
        raise _tell(_usage(error), "UsageError", ConfigError.exit_code, as_json) from None
    except KeyboardInterrupt:
        print("interrupted: nothing was left half-written", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        raise typer.Exit(UNREAD) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}"
        raise _tell(message, "OSError", Dsv4cError.exit_code, as_json) from None


def _usage(error: Any) -> str:
    """What is wrong with a command line, and where it says what is right."""
    said = " ".join(error.format_message().split()).replace("Value error, ", "").removesuffix(".")
    if error.ctx is None:
        return said
    return f"{said}{' See' if said.endswith('?') else '; see'} {error.ctx.command_path} --help"


def module_of(name: str) -> ModuleType:
    """The module of a command, loaded with what it needs."""
    return import_module(f"dsv4c.cli.{name.replace('-', '_')}")


class _Group(TyperGroup):
    """The commands; loading, help and parsing are part of what may go wrong."""

    as_json = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands.update({name: TyperCommand(name, help=text) for name, text in COMMANDS.items()})

    def get_params(self, ctx: Any) -> list[Any]:
        return without_values(super().get_params(ctx))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] in COMMANDS:
            called = Commands(add_completion=False, **SETTINGS)
            module_of(args[0]).register(called)
            self.commands[args[0]] = get_command(called)
        return super().resolve_command(ctx, args)

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **kwargs: Any) -> Any:
        self.as_json = "--json" in args
        with _told_in_a_sentence(self.as_json):
            return super().make_context(info_name, args, *more, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _told_in_a_sentence(self.as_json):
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    **SETTINGS,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Compile DeepSeek-V4 to an executable plan, look at it, run it.

    [bold]Examples[/bold]

      dsv4c show deepseek-v4-flash --layer 2

      dsv4c synth tiny -o tiny-weights --seed 1

      dsv4c compile tiny-weights -o tiny.plan

      dsv4c run tiny.plan --weights tiny-weights --tokens 3,17,5 --max-new-tokens 8
    """,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"dsv4c {version('dsv4c')}")
        except PackageNotFoundError:
            print("dsv4c, from a source tree that is not installed")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def main() -> None:
    """Run the command line until it exits."""
    wait_asleep()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    if not leads():  # of several processes that do the same, one says what comes of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    try:
        app(prog_name="dsv4c")
    except KeyboardInterrupt:  # on the way in or out, when there is nothing to tidy
        sys.exit(INTERRUPTED)
    except SystemExit as leaving:
        if leaving.code != UNREAD and not isinstance(leaving.__context__, BrokenPipeError):
            raise
        for stream in filter(None, (sys.stdout, sys.stderr)):  # what they still hold must not fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(UNREAD) from None
