"""How many threads: by what the process may use, and by the work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dsv4c.buckets import Bucket
from dsv4c.certify import evaluate
from dsv4c.certify.application import applications
from dsv4c.compiler.compile import compile
from dsv4c.compiler.request import Request
from dsv4c.runtime import cpu
from dsv4c.threads import cores, threads, wait_asleep

V2 = "0::/jobs/mine\n"
V1 = "3:memory:/jobs\n2:cpu,cpuacct:/jobs/mine\n0::/\n"
QUOTA, PERIOD = "cpu.cfs_quota_us", "cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("groups", "files", "asked", "expected"),
    [
        ("", {}, "", 64),
        (V2, {"jobs/mine/cpu.max": "max 100000\n"}, "", 64),
        (V2, {"jobs/mine/cpu.max": "350000 100000\n"}, "", 3),
        (V2, {"jobs/mine/cpu.max": "50000 100000\n"}, "", 1),
        (V2, {"jobs/mine/cpu.max": "max 100000\n", "jobs/cpu.max": "200000 100000\n"}, "", 2),
        (V2, {"cpu.max": "200000 50000\n"}, "", 4),  # a container sees its own group as the root
        (V1, {f"cpu/jobs/mine/{QUOTA}": "-1\n", f"cpu/jobs/mine/{PERIOD}": "100000\n"}, "", 64),
        (V1, {f"cpu/jobs/mine/{QUOTA}": "600000\n", f"cpu/jobs/mine/{PERIOD}": "100000\n"}, "", 6),
        (V1, {f"cpu/{QUOTA}": "100000\n", f"cpu/{PERIOD}": "100000\n"}, "", 1),
        ("", {}, "5", 5),
        ("", {}, "5,2", 5),
        ("", {}, "100", 64),
        ("", {}, "many", 64),
        (V2, {"cpu.max": "300000 100000\n"}, "2", 2),
    ],
)
def test_cores_are_those_that_the_process_may_use(
    groups: str,
    files: dict[str, str],
    asked: str,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    for name, text in {
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{n}": t for n, t in files.items()},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores(tmp_path) == expected


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch):
    """Torch was told to take four threads, on a machine that has eight."""
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_threads_are_never_more_than_torch_was_told(four: None) -> None:
    for most, expected in ((1, 1), (3, 3), (None, 4), (100, 4)):
        with threads(most):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 4
    with pytest.raises(ZeroDivisionError), threads(1):
        _ = 1 / 0
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(("large", "expected"), [(None, 1), (0, 4)])
def test_a_plans_steps_take_one_thread_where_they_are_small(
    large: int | None, expected: int, four: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if large is not None:
        monkeypatch.setattr(cpu, "LARGE", large)
    plan = compile("tiny", max_context=16, certify=False)
    executor = cpu.CpuExecutor(plan, torch.zeros(plan.blocks["weights"], dtype=torch.uint8))
    seen = set()
    inputs = {name: torch.zeros(place.type.shape, dtype=torch.int32) for name, place in _inputs(plan).items()}
    executor.run(plan.program().shape.name, inputs, watch=lambda _: seen.add(torch.get_num_threads()))
    assert seen == {expected}
    assert torch.get_num_threads() == 4


def _inputs(plan):
    program = plan.program()
    return {name: program.values[name] for name in program.inputs}


def test_work_grows_with_rows() -> None:
    plan = compile("tiny", max_context=64, batch=[1, 4], verify=1, certify=False)
    one, four = (cpu.work(plan.program(Bucket("decode", sequences=n).name)) for n in (1, 4))
    assert 4 * one < four < 8 * one


def test_certificates_take_one_thread(four: None, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Request("tiny", max_context=16).job()
    fold = job.compiled(job.decode).context.fold
    assert fold is not None
    seen, run = [], evaluate.run

    def watched(*given):
        seen.append(torch.get_num_threads())
        return run(*given)

    monkeypatch.setattr(evaluate, "run", watched)
    assert evaluate.evaluate(next(iter(applications(fold.matches)))).holds
    assert set(seen) == {1}
    assert torch.get_num_threads() == 4


def test_waiting_threads_sleep_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    wait_asleep()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    wait_asleep()
    assert os.environ["OMP_WAIT_POLICY"] == "active"
