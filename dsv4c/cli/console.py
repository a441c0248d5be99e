"""What commands print: JSON or text on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4c.errors import Dsv4cError
from dsv4c.publish import published

if TYPE_CHECKING:
    from rich.table import Table

Progress = Callable[[str, int, int], None]


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def note(text: str) -> None:
    """A remark for the user that is not the result."""
    print(text, file=sys.stderr)


def print_table(table: Table) -> None:
    from rich.console import Console

    Console().print(table)


@contextmanager
def progress_bar(title: str, *, bytes_counted: bool = False) -> Iterator[Progress | None]:
    """A `progress(what, done, all)` that draws a bar on stderr; None when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    count = DownloadColumn() if bytes_counted else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeElapsedColumn())
    with Bar(
        *columns, TextColumn("{task.fields[what]}"), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(title, total=None, what="")
        lock = threading.Lock()

        def report(what: str, done: int, whole: int) -> None:
            with lock:
                bar.update(task, completed=done, total=whole, what=what)

        yield report


def write_text(path: Path | None, text: str, error: type[Dsv4cError]) -> None:
    """Write a file, whole or not at all, a device or a pipe as it comes, or to stdout when `path` is None.

    Raises `error` if the file cannot be written.
    """
    if path is None:
        print(text, end="")
        return
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
