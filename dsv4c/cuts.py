"""How kernels' streams of weights are cut, and tables of what was measured to be faster than planned."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

from dsv4c import strict_json
from dsv4c.errors import ConfigError


@dataclass(frozen=True, order=True)
class Cut:
    """What changes no order of a sum, and no weight's place in memory. 0: as planned.

    rounds: tiles that a CTA takes one after the other. stages: steps that its ring holds. early: steps that
    it holds of a second stream, which comes first. ahead: steps in flight at a time.
    """

    rounds: int = 0
    stages: int = 0
    early: int = 0
    ahead: int = 0

    def __str__(self) -> str:
        given = [f"{f.name} {n}" for f, n in zip(fields(self), astuple(self), strict=True) if n]
        return ", ".join(given) or "as planned"

    @classmethod
    def of(cls, data: object, where: str) -> Cut:
        """Out of plain data. Raises ConfigError naming `where`."""
        known = {f.name for f in fields(cls)}
        if not isinstance(data, Mapping) or not known.issuperset(data):
            raise ConfigError(f"{where} is {data!r:.80}; expected numbers named {', '.join(sorted(known))}")
        if not all(type(n) is int and 0 <= n <= 64 for n in data.values()):
            raise ConfigError(f"{where} is {data!r:.80}; expected numbers from 0 to 64")
        return cls(**data)

    @property
    def data(self) -> dict[str, int]:
        """What is not as planned."""
        return {name: n for name, n in asdict(self).items() if n}


PLANNED = Cut()


@dataclass(frozen=True)
class Row:
    """A cut that was measured: on which GPU ("H200"), of a kernel of that name and key, on a day (ISO 8601);
    `ratio` is a step's time with it to the time as planned.
    """

    gpu: str
    kernel: str
    key: str
    cut: Cut
    ratio: float
    date: str


def read_rows(path: Path) -> list[Row]:
    """The rows of a table. Raises ConfigError for a file that is none."""
    try:
        rows = strict_json.parse(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is no JSON: {error}") from None
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: is no list of rows, which `dsv4c tune` writes")
    wanted = {f.name for f in fields(Row)}
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or set(row) != wanted:
            raise ConfigError(f"{path}: row {number} has not the fields {', '.join(sorted(wanted))}")
    return [Row(**{**row, "cut": Cut.of(row["cut"], f"{path}: row {n}")}) for n, row in enumerate(rows)]


def rows_text(rows: Iterable[Row]) -> str:
    """Rows as a file holds them, a line each."""
    lines = [json.dumps({**asdict(row), "cut": row.cut.data}) for row in rows]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def cuts_for(gpu: str, rows: Iterable[Row]) -> dict[str, Cut]:
    """What was measured on that GPU, by key."""
    return {row.key: row.cut for row in rows if row.gpu == gpu}
