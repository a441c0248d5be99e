"""How many threads to use: no more than this process may have cores, and one where work is small.

A second thread helps where an operation takes milliseconds. In small ones it only waits, and where other
processes want the cores, too, every wait may last as long as their turn: tens of times the work itself. And
which of the processes this is that do the same work together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: those it is bound to, as far as its control groups' quotas go, and no
    more than OMP_NUM_THREADS. `root` is where /proc and /sys are.
    """
    allowed = [float(len(os.sched_getaffinity(0))), *_quotas(root)]
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if asked.isdecimal():
        allowed.append(float(asked))
    return max(1, int(min(allowed)))


@contextmanager
def threads(most: int | None = None) -> Iterator[None]:
    """Tensor operations of the calling thread take `most` threads (None: `cores`), never more than torch was
    told to take.
    """
    import torch

    before = torch.get_num_threads()
    wanted = min(before, cores() if most is None else most)
    if wanted == before:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wait_asleep() -> None:
    """Threads that wait for others leave their core to whoever wants it. Only of use before torch is loaded;
    what the user has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time that each control group around this process has, of either version."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            folder, names = root / "sys/fs/cgroup", ["cpu.max"]
        elif "cpu" in controllers.split(","):
            folder, names = root / "sys/fs/cgroup/cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        parts = Path(path.strip("/")).parts
        for depth in range(len(parts), -1, -1):  # inside a container only the last of these is there
            try:
                texts = [folder.joinpath(*parts[:depth], name).read_text() for name in names]
            except OSError:
                continue
            quota, period = " ".join(texts).split()
            if quota.isdecimal():  # not "max", not -1
                yield int(quota) / int(period)


def processes() -> int:
    """How many there are, by what torchrun says to each."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Is this the process that tells what comes of a command?"""
    return processes() == 1 or os.environ.get("RANK", "0") == "0"
