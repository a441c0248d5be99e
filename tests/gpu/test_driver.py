"""What needs no GPU of the checks that do: which run, what becomes of them, and how launches are grouped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.gpu.__main__ import Job, jobs, sanitizer_jobs, together
from tests.gpu.build import KERNELS, WANTED
from tests.gpu.build_rows import cases
from tests.gpu.check_layers import groups


def python(name: str, code: str, **changes: object) -> Job:
    return Job(name, (sys.executable, "-c", code), **changes)  # type: ignore[arg-type]


def test_a_check_that_fails_hangs_or_comes_too_late_is_seen(tmp_path: Path) -> None:
    wanted = [
        python("good", "print('fine')"),
        python("bad", "print('2 wrong'); raise SystemExit(3)"),
        python("found", "raise SystemExit(9)", status=9),
        python("missed", "print('nothing found')", status=9),
        python("hanging", "import time; time.sleep(600)", seconds=1.0),
        python("alone", "print('alone')", alone=True),
    ]
    verdicts = {v.name: v for v in together(wanted, tmp_path, 600.0, 10.0, 3)}
    assert {name: v.status for name, v in verdicts.items()} == {
        "good": "ok",
        "bad": "FAILS 3",
        "found": "ok",
        "missed": "FAILS 0",
        "hanging": "too slow",
        "alone": "ok",
    }
    assert verdicts["bad"].last == "2 wrong"
    assert list(verdicts)[-1] == "alone"
    assert (tmp_path / "good.txt").read_text().endswith("fine\n")
    assert together(wanted[:1], tmp_path, -1.0, 10.0, 1)[0].status == "not run"


def test_jobs_share_the_memory(tmp_path: Path) -> None:
    """Each wants more than half: the second starts when the first has ended."""
    mark = tmp_path / "mark"
    code = f"import os; os.mkdir({str(mark)!r}); sum(range(10**6)); os.rmdir({str(mark)!r})"
    wanted = [python(f"job {i}", code, gibibytes=6.0) for i in range(3)]
    assert [v.status for v in together(wanted, tmp_path, 600.0, 10.0, 3)] == ["ok"] * 3


KEYS = ("name", "use", "model", "recipe", "batch", "at", "every", "logits")


def test_every_plan_and_every_family_of_kernels_is_checked(tmp_path: Path) -> None:
    described = [
        {
            **{key: getattr(w, key) for key in KEYS},
            "weights": "random" if w.layers else w.model,
            "gibibytes": 1.0,
        }
        for w in WANTED
    ]
    (tmp_path / "plans.json").write_text(json.dumps(described))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "plans.json").write_text(json.dumps([{"name": case.name} for case in cases()]))
    commands = [" ".join(job.command) for job in jobs(tmp_path, tmp_path)]
    for name in (*(w.name for w in WANTED), *KERNELS):
        assert any(str(tmp_path / name) in command for command in commands), name
    assert all(any(f"check_rows {case.name} " in command for command in commands) for case in cases())
    assert all("--at=" in command for command in commands if "check_layers" in command)
    tools = [job.name for job in sanitizer_jobs(tmp_path, "compute-sanitizer")]
    chunks = ["memcheck of chunks", "racecheck of chunks"]
    assert tools == ["memcheck", "memcheck of a fault", *chunks, "racecheck", "synccheck"]


def test_launches_that_share_nodes_are_one_group() -> None:
    found = groups([("a",), ("b", "c"), ("d",), ("c",), ("e",), ("e", "f"), ("f",), ("g",)])
    assert found == [
        (["a"], [0]),
        (["b", "c", "d"], [1, 2, 3]),
        (["e", "f"], [4, 5, 6]),
        (["g"], [7]),
    ]
