"""Launches one after another in a graph of their own: run once to check, replayed to time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from dsv4c.runtime.driver import Edge, Graph, Launch

WARM_UP = 3


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
