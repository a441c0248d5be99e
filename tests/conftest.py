"""Shared fixtures. `golden(text, "name.txt")` compares a whole text with tests/golden/name.txt, exactly."""

from __future__ import annotations

import difflib
import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest

GOLDEN_FOLDER = Path(__file__).parent / "golden"
SHOWN_LINES = 60


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the goldens instead of comparing")


@dataclass(frozen=True)
class Golden:
    """Compares texts with files of a folder. A missing file fails too: only `--update-golden` writes."""

    folder: Path
    update: bool

    def __call__(self, text: str, name: str) -> None:
        path, text = self.folder / name, text.rstrip("\n") + "\n"
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        if not path.exists():
            pytest.fail(
                f"no golden {path}: read the text below, then run pytest with --update-golden\n{text}"
            )
        expected = path.read_text(encoding="utf-8")
        if text != expected:
            # pytest's own comparison of two long texts takes minutes; this one is linear in practice.
            changes = difflib.unified_diff(
                expected.splitlines(), text.splitlines(), "golden", "now", lineterm="", n=1
            )
            shown = "\n".join(itertools.islice(changes, SHOWN_LINES))
            pytest.fail(f"differs from golden {path} (first {SHOWN_LINES} lines of the diff):\n{shown}")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(GOLDEN_FOLDER, request.config.getoption("--update-golden"))
