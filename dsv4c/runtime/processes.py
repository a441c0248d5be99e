"""Ranks as processes, one for each GPU of a machine, as torchrun starts them: who is there, and what they
tell each other.

All of them run the same program: whatever one calls, the others call too, in the same order. Results are the
same in each; the first one tells.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as distributed

from dsv4c.errors import Dsv4cError, PlanError
from dsv4c.plan.folder import Plan
from dsv4c.threads import processes

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a plan. `rank` is this one's, `device` the number of its GPU."""

    rank: int
    size: int
    device: int
    group: Any  # of torch.distributed, which tells of the host's memory

    def gather(self, value: T) -> list[T]:
        """What every process tells, in order of the ranks. Waits for all of them."""
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value, group=self.group)
        return found

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives in this process, once it is through in all. Where it fails in one, all raise."""
        made: T | None = None
        error: Dsv4cError | None = None
        try:
            made = work()
        except Dsv4cError as problem:
            error = problem
        said = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text is not None:
                raise PlanError(f"rank {rank}: {text}")
        return made  # type: ignore[return-value]


def world_of(plan: Plan) -> World | None:
    """The processes that run a plan's ranks, each on its GPU, torch's current one; None where one does.

    Raises PlanError for another number of them, or processes of several machines.
    """
    if plan.ranks == 1 or plan.target == "cpu" or processes() == 1:
        return None
    if processes() != plan.ranks:
        raise PlanError(
            f"plan {plan.name} has {plan.ranks} ranks, {processes()} processes run it (WORLD_SIZE); start "
            f"torchrun with --nproc-per-node {plan.ranks}, or one process without it"
        )
    missing = [
        name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if missing:
        raise PlanError(
            f"plan {plan.name}: WORLD_SIZE is {processes()}, but {', '.join(missing)} is not set; start the "
            "processes by torchrun"
        )
    if not distributed.is_available() or not distributed.is_gloo_available():
        raise PlanError("this torch has no gloo, by which processes find each other; run in one process")
    world = _joined()
    here = torch.cuda.is_available() and world.device < torch.cuda.device_count()
    name = torch.cuda.get_device_name(world.device) if here else "none"
    hosts, digests, names = zip(*world.gather((socket.gethostname(), plan.digest, name)), strict=True)
    if len(set(hosts)) > 1:
        raise PlanError(
            f"plan {plan.name}: its ranks would be on {' and '.join(dict.fromkeys(hosts))}; they exchange "
            "values through the memory of one machine's GPUs: start all of them there"
        )
    if len(set(digests)) > 1:
        raise PlanError(f"plan {plan.name}: the processes read different plans; give all of them the same")
    check_alike(plan, names)
    return world


def devices_of(plan: Plan, world: World | None) -> dict[int, int]:
    """The GPU's number of each rank that this process runs."""
    if world is not None:
        return {world.rank: world.device}
    return {rank: rank for rank in range(plan.ranks)}


def check_alike(plan: Plan, names: Sequence[str]) -> None:
    """Raise PlanError unless GPUs of these names are alike."""
    other = next((name for name in names if name != names[0]), None)
    if other is not None:
        raise PlanError(
            f"plan {plan.name}: its ranks would be on {names[0]} and {other}, which wait "
            "for each other; choose GPUs that are alike (CUDA_VISIBLE_DEVICES)"
        )


@lru_cache(maxsize=1)
def _joined() -> World:
    """Of this process, which waits for the others."""
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available() and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    if distributed.is_initialized():
        return World(rank, processes(), local, distributed.new_group(backend="gloo"))
    distributed.init_process_group("gloo")
    return World(rank, processes(), local, distributed.group.WORLD)
