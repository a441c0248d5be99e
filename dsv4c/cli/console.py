"""What commands print: JSON or text on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4c.errors import Dsv4cError
from dsv4c.publish import published
from dsv4c.threads import leads

if TYPE_CHECKING:
    from rich.table import Table

Progress = Callable[[str, int, int], None]


def print_json(data: Any) -> None:
    """Standard JSON, which has no word for what is no finite number: that becomes null."""
    print(json.dumps(_finite(data), indent=2, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def note(text: str) -> None:
    """A remark for the user that is not the result."""
    if leads():
        print(text, file=sys.stderr)


def print_table(table: Table) -> None:
    from rich.console import Console

    Console(markup=False, emoji=False).print(table)  # names may look like either


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the same keys, which are the headings; all columns but the last are kept on one line."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    *narrow, wide = rows[0]
    for heading in narrow:
        table.add_column(heading, no_wrap=True)
    table.add_column(wide, overflow="fold")
    for row in rows:
        table.add_row(*map(str, row.values()))
    print_table(table)


@contextmanager
def progress_bar(title: str, *, bytes_counted: bool = False) -> Iterator[Progress | None]:
    """A `progress(what, done, all)` that draws a bar on stderr; None when stderr is no terminal, or another
    process tells.
    """
    if not (sys.stderr.isatty() and leads()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    count = DownloadColumn() if bytes_counted else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeElapsedColumn())
    with Bar(
        *columns,
        TextColumn("{task.fields[what]}", markup=False),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(title, total=None, what="")
        lock = threading.Lock()

        def report(what: str, done: int, whole: int) -> None:
            with lock:
                bar.update(task, completed=done, total=whole, what=what)

        yield report


PAINTS = (
    (r"^#.*$", "2"),  # comments, dim
    (r"^@.*$", "1"),  # scopes, bold
    (r"(?<= = )[a-z0-9_]+(?=\()", "36"),  # ops
    (r"(?<=[a-z0-9_]: )(?:q\[[^\]]*\])?[a-z0-9]*\[[0-9,]*\]", "32"),  # types
    (r" \{.*\}(?= from |$)", "33"),  # attributes
    (r" from (?:\[[^\]]*\]|\d+ nodes)$", "2"),
)
"""What of a graph's text is painted on a terminal, and how."""


def painted(text: str) -> str:
    """A graph's text in colors where stdout is a terminal that wants them (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if plain or sys.stdout is None or not sys.stdout.isatty():
        return text
    for pattern, paint in PAINTS:
        text = re.sub(pattern, rf"\033[{paint}m\g<0>\033[0m", text, flags=re.MULTILINE)
    return text


def write_text(path: Path | None, text: str, error: type[Dsv4cError]) -> None:
    """Write a file, whole or not at all, a device or a pipe as it comes, or to stdout when `path` is None.

    Raises `error` if the file cannot be written.
    """
    if path is None:
        print(painted(text), end="")
        return
    if path.is_dir():
        raise error(f"{path}: is a folder; give a file")
    try:
        with published(path, stream=True) as made:
            made.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise error(f"{path}: cannot be written: {problem.strerror}") from None


def size(count: int) -> str:
    """A number of bytes to read."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count} B"
