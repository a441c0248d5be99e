"""Help as it is written: rich takes brackets for its own, and lines for paragraphs."""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

import typer
from typer.core import TyperCommand


class Commands(typer.Typer):
    """Where the module of a command registers it."""

    def command(self, name: str | None = None, **settings: Any) -> Any:
        return super().command(name, cls=_Command, **settings)


class _Command(TyperCommand):
    def __init__(self, *given: Any, help: str | None = None, **settings: Any) -> None:
        super().__init__(*given, help=_reflowed(cleandoc(help or "")), **settings)
        for param in self.params:
            if text := getattr(param, "help", None):
                param.help = _as_written(text)  # type: ignore[attr-defined]

    def get_params(self, ctx: Any) -> list[Any]:
        return without_values(super().get_params(ctx))


def without_values(params: list[Any]) -> list[Any]:
    """Parameters whose flags do not read as if they took a value."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


def _reflowed(text: str) -> str:
    """A docstring whose paragraphs break where the terminal ends; indented ones, examples, stay lines."""
    paragraphs = _as_written(text).split("\n\n")
    return "\n\n".join(p if p.startswith(" ") else p.replace("\n", " ") for p in paragraphs)


def _as_written(text: str) -> str:
    return text.replace("[", r"\[")
