"""What the checks of single kernels share: their options, and launches one after another in a graph of their
own, run once to check, replayed to time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsv4c.plan.records import Box
from dsv4c.runtime import driver
from dsv4c.runtime.driver import Edge, Graph, Launch

WARM_UP = 3


def options_parser(description: str | None, folder: str) -> argparse.ArgumentParser:
    """The options of every check, for the kernels that `build_{folder}` wrote."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--folder", type=Path, default=Path("build/gpu") / folder)
    parser.add_argument("--only", default="", help="kernels whose names start with one of a,b,...")
    parser.add_argument("--no-time", action="store_true", help="check, others use the GPU")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    return parser


def wanted(name: str, options: argparse.Namespace) -> bool:
    """Whether `--only` chooses this kernel."""
    return name.startswith(tuple(options.only.split(",")))


def start(options: argparse.Namespace) -> None:
    """A context, which kernels are loaded into, and the seed, said so that a failure can be had again."""
    torch.zeros(1, device="cuda")
    torch.manual_seed(options.seed)
    print(f"{torch.cuda.get_device_name()}, seed {options.seed}", flush=True)


def mapped(tensor: torch.Tensor, box: dict[str, Any]) -> int:
    """The address of a tensor map of it, which stays."""
    place = tensor.data_ptr(), json.dumps(box)
    if place not in _MAPS:
        made = driver.tensor_map(place[0], Box(**box))
        _MAPS[place] = torch.frombuffer(bytearray(made), dtype=torch.uint8).cuda()
    return _MAPS[place].data_ptr()


_MAPS: dict[tuple[int, str], torch.Tensor] = {}


def run_once(*launches: Launch) -> None:
    """To completion."""
    measure(launches, programmatic=False, replays=1)


def measure(launches: Sequence[Launch], programmatic: bool, replays: int = 25) -> float:
    """Microseconds of the whole chain: the median replay, after three that do not count if there are more."""
    graph, last = Graph(), None
    for launch in launches:
        last = graph.add(launch, [Edge(last, programmatic)] if last is not None else [])
    graph.instantiate()
    stream = torch.cuda.current_stream().cuda_stream
    times = []
    for _ in range(replays if replays == 1 else WARM_UP + replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.launch(stream)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    graph.close()
    return statistics.median(times[WARM_UP:] or times)
