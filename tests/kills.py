"""Kills whatever writes, at random moments, and looks at what is left: the old or the new, and no litter.

    python -m tests.kills [--count 60] [--seed 0] [NAME ...]

One operation at a time is started in a process of its own and killed (SIGKILL) at a moment between its start
and its end; what it wrote must then be what stood there before, or what it was to write, from end to end.
After all kills the operation runs once more, undisturbed, and nothing hidden may be left. Prints, as JSON by
operation, the kills that came in time, and how often the old and the new were found. Exit code 1 for neither.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import dsv4c
from dsv4c.cache import Store
from dsv4c.compiler.compile import compile
from dsv4c.models.synth import synthesize
from dsv4c.plan.folder import load
from dsv4c.publish import PREFIX
from dsv4c.runtime.checkpoint import Checkpoint
from tests.codegen.lowered import no_compiler


@dataclass(frozen=True)
class Operation:
    """Writes version 0 or 1 of something below a folder; `read` says which of them is there."""

    write: Callable[[int], Any]
    read: Callable[[], int]


def save(folder: Path) -> Operation:
    """A plan in the place of another."""
    plan = dsv4c.compile("tiny", max_context=64, certify=False)
    return Operation(
        lambda i: _named(plan, i).save(folder / "plan", overwrite=True), lambda: _version(folder)
    )


def compile_cpu(folder: Path) -> Operation:
    """A whole compile, and its plan in the place of another's."""

    def write(i: int) -> None:
        plan = compile("tiny", max_context=64, certify=False, cache=folder / "cache")
        _named(plan, i).save(folder / "plan", overwrite=True)

    return Operation(write, lambda: _version(folder))


def compile_gpu(folder: Path) -> Operation:
    """The same for a GPU, its kernels stand-ins that are kept in a store."""

    def write(i: int) -> None:
        with no_compiler():
            sizes = {"max_context": 64, "chunk": 8}
            plan = compile("tiny", target="sm_90a", **sizes, certify=False, cache=folder / "cache")
        store = Store(folder / "cache")
        for name, content in plan.files.items():
            store.put(hashlib.sha256(name.encode()).hexdigest(), content)
        _named(plan, i).save(folder / "plan", overwrite=True)

    return Operation(write, lambda: _version(folder))


def synth(folder: Path) -> Operation:
    """A checkpoint in the place of one in another number of files, beside a file that is none of either."""
    tiny = dsv4c.load_config("tiny")
    config = replace(tiny, num_layers=1, num_hash_layers=0, compress_ratios=(0,), mtp_layers=0)
    target, found = folder / "weights", {}

    def read() -> int:
        if not found:
            (target / "notes.txt").write_text("mine")
        assert (target / "notes.txt").read_text() == "mine"
        Checkpoint.open(target)
        digest = hashlib.sha256()
        for file in sorted(target.glob("model*")):
            digest.update(file.name.encode() + file.read_bytes())
        return found.setdefault(digest.hexdigest(), len(found))

    return Operation(lambda i: synthesize(config, target, i, 1 + 2 * i, overwrite=True), read)


def state(folder: Path) -> Operation:
    """The state of a session in the place of an earlier one."""
    weights = synthesize(dsv4c.load_config("tiny"), folder / "weights", seed=1)
    session = dsv4c.compile("tiny", max_context=512, certify=False).bind(weights)

    def write(i: int) -> None:
        session.reset()
        session.prefill([3, 17, 5][: 1 + i])
        session.save_state(folder / "state")

    def read() -> int:
        session.load_state(folder / "state")
        return session.positions[0] - 1

    return Operation(write, read)


def cache(folder: Path) -> Operation:
    """Entries of a cache in the place of others under the same key."""
    store, keys = Store(folder / "cache"), [hashlib.sha256(bytes([n])).hexdigest() for n in range(8)]
    contents = [bytes([i]) * (1 << 20) for i in (0, 1)]

    def write(i: int) -> None:
        for key in keys:
            store.put(key, contents[i])

    def read() -> int:
        versions = [contents.index(content) for key in keys if (content := store.get(key)) is not None]
        assert len(versions) == len(keys), "an entry is lost"
        return versions[-1]

    return Operation(write, read)


OPERATIONS: dict[str, Callable[[Path], Operation]] = {
    f.__name__: f for f in (save, compile_cpu, compile_gpu, synth, state, cache)
}


def _named(plan: Any, i: int) -> Any:
    return replace(plan, name=f"version-{i}")


def _version(folder: Path) -> int:
    return int(load(folder / "plan").name.removeprefix("version-"))


def run(operation: Operation, i: int, killed_after: float | None = None) -> tuple[bool, float]:
    """Write version `i` in another process; was it killed, and after how many seconds did it end?"""
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            operation.write(i)
            code = 0
        finally:
            os._exit(code)
    if killed_after is not None:
        time.sleep(killed_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status)
    assert killed or status == 0, f"the operation failed with status {status}"
    return killed, time.perf_counter() - started


def kills(name: str, count: int, seed: int) -> dict[str, int]:
    """`count` kills of one operation. Raises AssertionError, or what reading raises, if something is lost."""
    choose, found = random.Random(f"{seed} {name}"), Counter(killed=0, new=0, old=0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        operation = OPERATIONS[name](folder)
        seconds = 0.0
        for i in (0, 1):
            _, seconds = run(operation, i)
            assert operation.read() == i
        there = 1
        for _ in range(count):
            wanted = 1 - there
            first = choose.choice((0.0, 0.85))  # half of the kills come late, when files are put in place
            killed, _ = run(operation, wanted, choose.uniform(first, 1.05) * seconds)
            now = operation.read()
            assert now in (there, wanted)
            found["killed" if killed else "ended before"] += 1
            found["new" if now == wanted else "old"] += 1
            there = now
        found["left behind"] = len(list(folder.rglob(f"{PREFIX}*")))
        run(operation, 1 - there)
        assert operation.read() == 1 - there
        left = [str(path) for path in folder.rglob(f"{PREFIX}*")]
        assert not left, f"hidden folders are left: {left}"
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help=", ".join(OPERATIONS))
    parser.add_argument("--count", type=int, default=60, help="kills of each operation")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork copies no other threads
    print(
        json.dumps({name: kills(name, options.count, options.seed) for name in options.names or OPERATIONS})
    )


if __name__ == "__main__":
    sys.exit(main())
