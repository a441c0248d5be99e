"""The command line, called in this process."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from dsv4c import strict_json
from dsv4c.cli import app


class Result:
    """What a command left: exit code, stdout, stderr."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return strict_json.parse(self.out)  # NaN is none


def command(*arguments: object) -> Result:
    """`dsv4c` with these arguments. An exception that reaches its user as a traceback is raised here."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="dsv4c")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Result(result.exit_code, result.stdout, result.stderr)
