"""A plan and a checkpoint to a session. Refuses before it allocates: another model, the machine, then the
checkpoint.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from dsv4c.arch import ARCHS
from dsv4c.errors import PlanError
from dsv4c.plan.folder import Plan, Progress
from dsv4c.runtime.checkpoint import Checkpoint
from dsv4c.runtime.cpu import CpuExecutor
from dsv4c.runtime.executor import Executor
from dsv4c.runtime.model import check_model
from dsv4c.runtime.parameter import ParamRecord
from dsv4c.runtime.processes import World, devices_of, world_of
from dsv4c.runtime.residence import Loaded, Resident, load_weights
from dsv4c.runtime.session import Session


@torch.inference_mode(False)  # weights are written by threads, which are in no caller's mode
def bind(
    plan: Plan,
    weights: str | Path,
    *,
    progress: Progress | None = None,
    workers: int | None = None,
    poison: bool = False,
) -> Session:
    """See `Plan.bind`."""
    world = world_of(plan)
    if world is None:
        checkpoint, residents = check(plan, weights)
    else:
        checkpoint, residents = world.together(lambda: check(plan, weights, world))
    on_cpu, size = plan.target == "cpu", max(plan.blocks["weights"], 256)
    devices = {rank: f"cuda:{number}" for rank, number in devices_of(plan, world).items()}
    if on_cpu or plan.ranks == 1:
        devices = dict.fromkeys(devices, "cpu" if on_cpu else "cuda")  # torch's current one
    blocks = {rank: torch.empty(size, dtype=torch.uint8, device=device) for rank, device in devices.items()}

    def read() -> Loaded:
        return load_weights(checkpoint, residents, blocks, progress=progress, workers=workers)

    loaded = read() if world is None else world.together(read)
    if on_cpu:
        executor: Executor = CpuExecutor(plan, *blocks.values(), poison=poison)
    else:
        from dsv4c.runtime.ranks import cuda_executor  # loads the driver

        executor = cuda_executor(plan, list(blocks.values()), poison=poison, world=world)
    folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    session = Session(plan, executor, folder)
    session.loaded = loaded
    return session


def check(plan: Plan, weights: str | Path, world: World | None = None) -> tuple[Checkpoint, list[Resident]]:
    """The checkpoint, and what the plan keeps of it, whose ranks `world` runs. Raises PlanError for a machine
    that cannot run the plan, CheckpointError for a checkpoint that is another model's, damaged or incomplete.
    """
    check_model(plan, Path(weights))
    if plan.target == "cpu":
        _check_memory(plan)
    else:
        from dsv4c.runtime.ranks import check_devices  # loads the driver

        check_devices(plan, world)
    residents = [Resident.from_json(record) for record in plan.weights]
    checkpoint = Checkpoint.open(weights).sparing(map(ParamRecord.from_json, plan.unused))
    checkpoint.check([resident.record for resident in residents]).require_complete()
    return checkpoint, residents


def machine_target() -> str:
    """What plans for this machine are compiled for: its GPU, if there are kernels for it, or else its CPU."""
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        return next((arch.name for arch in ARCHS.values() if arch.capability == capability), "cpu")
    return "cpu"


def machine_memory(target: str) -> int:
    """Bytes that plans of that target have on this machine: its GPU's, or its own; 0 without such a GPU."""
    if target == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else 0


def _check_memory(plan: Plan) -> None:
    needed = sum(plan.blocks.values()) * plan.ranks
    memory = machine_memory("cpu")
    if needed > memory:
        raise PlanError(
            f"plan {plan.name} needs {needed / 1e9:,.1f} GB of memory for weights, state and arena, this "
            f"machine has {memory / 1e9:,.1f} GB; compile with fewer --slots or a smaller --max-context"
        )
