"""The command line: one module of this package per command, listed in `COMMANDS`. Commands parse and print.

A command is a module of this package with a `register(app)`; add it to `COMMANDS`. Results go to stdout (with
--json nothing but JSON), the rest to stderr. Exit codes are those of `dsv4c.errors`, 130 when interrupted,
141 when nobody reads the output to its end, 1 when the system fails at something else.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

from dsv4c.errors import Dsv4cError

COMMANDS = (
    "compile",
    "show",
    "diff",
    "passes",
    "why-not",
    "check",
    "bisect",
    "verify",
    "run",
    "weights",
    "synth",
)
INTERRUPTED, UNREAD = 130, 141  # 128 + SIGINT and 128 + SIGPIPE, as shells have it


@contextmanager
def _told_in_a_sentence() -> Iterator[None]:
    """What a user or the system did wrong becomes one sentence on stderr and an exit code."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # a full disk must show while somebody can still say so
    except Dsv4cError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted: nothing was left half-written", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:  # `| head`: enough was read; what is left in the buffer must not fail again
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(UNREAD) from None
    except SystemExit as leaving:  # rich has done so, and leaves with a code of its own
        if isinstance(leaving.__context__, BrokenPipeError):
            raise typer.Exit(UNREAD) from None
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        raise typer.Exit(Dsv4cError.exit_code) from None


class _Group(TyperGroup):
    """The commands; help and parsing are part of what may go wrong."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _told_in_a_sentence():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _told_in_a_sentence():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
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


for _name in COMMANDS:
    import_module(f"dsv4c.cli.{_name.replace('-', '_')}").register(app)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # so that a polite kill cleans up as Ctrl-C does


def main() -> None:
    """Run the command line until it exits."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app(prog_name="dsv4c")
    except KeyboardInterrupt:  # on the way in or out, when there is nothing to tidy
        sys.exit(INTERRUPTED)
