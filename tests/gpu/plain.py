"""Plain kernel launches in the place of `driver.Graph`, each finished before the next: for tools that follow
launches one by one. Programmatic edges are dropped, so what a kernel does before its wait is ordered too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import cuda.bindings.driver as cuda

from dsv4c.runtime import driver


class PlainGraph:
    """As `driver.Graph`; its nodes run in the order in which they were added."""

    def __init__(self) -> None:
        self._nodes: list[tuple[driver.Launch, str]] = []

    def add(self, launch: driver.Launch, after: Sequence[driver.Edge] = (), *, name: str = "") -> int:
        """Keep a launch; `after` must have been added before."""
        assert all(edge.node < len(self._nodes) for edge in after)
        self._nodes.append((launch, f"launch {name or launch.kernel.symbol}"))
        return len(self._nodes) - 1

    def instantiate(self) -> None:
        """Nothing to do."""

    def launch(self, stream: int) -> None:
        """Launch and finish every kernel in turn."""
        for launch, what in self._nodes:
            table, buffers = driver._argument_table(launch.arguments)
            address = ctypes.addressof(table)
            result = cuda.cuLaunchKernelEx(configuration(launch, stream), launch.kernel.function, address, 0)
            driver.call(what, result)
            driver.synchronize(what)
            del table, buffers

    def close(self) -> None:
        """Nothing to free."""


def configuration(launch: driver.Launch, stream: int) -> Any:
    """The launch's shape."""
    config = cuda.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
    config.blockDimX, config.blockDimY, config.blockDimZ = launch.block, 1, 1
    config.sharedMemBytes = launch.shared
    config.hStream = cuda.CUstream(stream)
    if launch.cluster != (1, 1, 1):
        cluster = cuda.CUlaunchAttribute()
        cluster.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        value = cluster.value
        value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = launch.cluster
        cluster.value = value
        config.attrs, config.numAttrs = [cluster], 1
    return config
