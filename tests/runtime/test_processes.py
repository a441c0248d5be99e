"""Ranks as processes: what they tell each other, that they agree on what cannot be, and who speaks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsv4c.errors import PlanError
from dsv4c.exchange import INBOXES
from dsv4c.runtime import driver, processes, ranks
from dsv4c.runtime.processes import World, world_of
from dsv4c.runtime.session import Session
from dsv4c.threads import leads
from tests.runtime.test_ranks import executor, words

__all__ = ["executor"]  # a fixture

TALK = """
import sys
from dsv4c.errors import SessionError
from dsv4c.runtime.processes import _joined

world = _joined()

def work():
    if world.rank == 1:
        raise SessionError("no room")
    return 7

told = world.gather({"rank": world.rank, "bytes": bytes([world.rank] * 3)})
assert [each["rank"] for each in told] == [0, 1], told
assert world.together(lambda: world.rank + 5) == world.rank + 5
try:
    world.together(work)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_processes_tell_each_other() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TALK],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in started]
    assert said == ["PlanError rank 1: no room", "SessionError no room"]


class Threads:
    """Worlds of threads in the place of processes."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=60)
        self.told: list[Any] = [None] * size

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.told[rank] = value
        self.barrier.wait()
        found = list(self.told)
        self.barrier.wait()
        return found

    def run(self, work: Callable[[World], Any]) -> list[Any]:
        """What `work` gives in every world."""
        made: list[Any] = [None] * self.size

        def run(rank: int) -> None:
            world = World(rank, self.size, rank, None)
            object.__setattr__(world, "gather", lambda value: self.gather(rank, value))
            made[rank] = work(world)

        started = [threading.Thread(target=run, args=(rank,)) for rank in range(self.size)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        return made


@pytest.fixture
def apart(
    executor: ranks.CudaRanks, monkeypatch: pytest.MonkeyPatch
) -> tuple[Threads, list[ranks.CudaRanks]]:
    """The plan's two ranks, each as if in a process of its own."""
    monkeypatch.setattr(driver, "exported", lambda address: (address.to_bytes(8, "little"), 0))
    monkeypatch.setattr(driver, "imported", lambda handle, what: int.from_bytes(handle, "little"))
    plan, threads = executor.plan, Threads(2)

    def made(world: World) -> ranks.CudaRanks:
        weights = torch.zeros(plan.blocks["weights"], dtype=torch.uint8)
        return ranks.CudaRanks(plan, [weights], world=world)

    return threads, threads.run(made)


def test_each_knows_where_the_other_is(apart: tuple[Threads, list[ranks.CudaRanks]]) -> None:
    _, both = apart
    assert [(len(each.ranks), each.first, each.limit) for each in both] == [(1, 0, 10.0), (1, 1, 10.0)]
    assert [words(each, 0)[0] for each in both] == [0, 1]
    blocks = [each.ranks[0].blocks["exchange"] for each in both]
    wanted = [block.data_ptr() + each._layout.inbox for block, each in zip(blocks, both, strict=True)]
    for block in blocks:
        assert block[INBOXES : INBOXES + 16].view(torch.int64).tolist() == wanted


def test_reset_agrees_on_a_new_step(apart: tuple[Threads, list[ranks.CudaRanks]]) -> None:
    """One has begun steps that the other never came to."""
    threads, both = apart
    both[1].begin("decode-1")
    both[1].begin("decode-1")

    def work(world: World) -> list[int]:
        session = Session(both[world.rank].plan, both[world.rank])
        session.prefill([1])
        return words(both[world.rank], 0)[:2]

    assert threads.run(work) == [[0, 3], [1, 3]]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "3"}, "has 2 ranks, 3 processes run it"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
    ],
)
def test_processes_that_do_not_do(
    executor: ranks.CudaRanks,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    message: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PlanError, match=message):
        world_of(executor.plan)


@pytest.mark.parametrize(
    ("hosts", "digests", "names", "message"),
    [
        ("ab", "pp", "GG", "its ranks would be on a and b; they exchange values through the memory"),
        ("aa", "pq", "GG", "the processes read different plans"),
        ("aa", "pp", "GH", "its ranks would be on G and H, which wait for each other"),
    ],
)
def test_processes_that_do_not_go_together(
    executor: ranks.CudaRanks,
    monkeypatch: pytest.MonkeyPatch,
    hosts: str,
    digests: str,
    names: str,
    message: str,
) -> None:
    class Told(World):
        def gather(self, value: Any) -> list[Any]:
            return list(zip(hosts, digests, names, strict=True))

    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "0")
    monkeypatch.setattr(processes, "_joined", lambda: Told(0, 2, 0, None))
    with pytest.raises(PlanError, match=message):
        world_of(executor.plan)


def test_the_first_process_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert leads()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert leads()
    monkeypatch.setenv("RANK", "1")
    assert not leads()
