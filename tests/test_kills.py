"""Killed at any moment, every operation that writes leaves the old or the new (`tests/kills.py`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kills import OPERATIONS

REPOSITORY = Path(__file__).parents[1]


def killed(names: tuple[str, ...], count: int) -> dict[str, dict[str, int]]:
    command = [sys.executable, "-m", "tests.kills", *names, "--count", str(count)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, dict[str, int]] = json.loads(ended.stdout)
    assert {name: each["old"] + each["new"] for name, each in found.items()} == dict.fromkeys(names, count)
    return found


def test_a_few_dozen_kills() -> None:
    found = killed(("save", "synth", "state", "cache"), 7)
    assert sum(each["killed"] for each in found.values()) > 5


@pytest.mark.slow
def test_three_hundred_kills(capsys: pytest.CaptureFixture[str]) -> None:
    found = killed(tuple(OPERATIONS), 50)
    with capsys.disabled():
        print("", *(f"{name}: {each}" for name, each in found.items()), sep="\n")
