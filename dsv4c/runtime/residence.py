"""Weights on their way to the device: converted, packed and copied to their place, a slab of rows at a time.

Where a parameter goes and in which form is plan data. Memory in flight is bounded: a parameter or a matrix of
a stack per reading thread on the host, a few slabs on the device.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4c.errors import PlanError
from dsv4c.numerics.codec import Value, parts_of
from dsv4c.numerics.forms import Packing, parse_packing
from dsv4c.numerics.packing import pack
from dsv4c.numerics.resident import PLAIN, WIDENED
from dsv4c.runtime.checkpoint import Checkpoint, Progress
from dsv4c.runtime.parameter import ParamRecord

SLAB = 64 << 20  # bytes of a matrix packed at once; a slab's temporaries are a few times that


@dataclass(frozen=True, slots=True)
class Resident:
    """A parameter's place in the weights' block. `form` is "plain", "f32" (widened from bf16) or the name of
    a packing; `components` are (name, byte offset in the block, bytes).
    """

    record: ParamRecord
    form: str
    components: tuple[tuple[str, int, int], ...]

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Resident:
        """Read a weight record of a plan. Raises PlanError if it is not one."""
        try:
            components = tuple((c["name"], int(c["offset"]), int(c["nbytes"])) for c in data["components"])
            form = str(data["form"])
            if form not in (PLAIN, WIDENED):
                parse_packing(form)
        except (KeyError, TypeError, ValueError) as error:
            name = data.get("name", "?")
            raise PlanError(
                f"weight {name}: its place in memory cannot be read: {error!r}; compile the plan again"
            ) from None
        return Resident(ParamRecord.from_json(data), form, components)

    def store(self, block: Tensor, value: Value, matrices: range | None = None) -> None:
        """Copy `value`, which lies on the host, to its place: all of the record, or some `matrices` of it."""
        parts = parts_of(value)
        for name, start, whole in self.components:
            offset, nbytes = start, whole
            if matrices is not None:
                each = whole // self.record.type.shape[0]
                offset, nbytes = start + each * matrices.start, each * len(matrices)
            if name not in parts:
                raise PlanError(
                    f"weight {self.record.name}: has a place for {name}, but {self.record.type} has only "
                    f"{', '.join(parts)}; compile the plan again"
                )
            target = block[offset : offset + nbytes]
            if name == "data" and self.form not in (PLAIN, WIDENED):
                packing = parse_packing(self.form)
                _store_packed(
                    target, packing, parts["data"], parts["scale"] if packing.holds_scales else None
                )
            else:
                _store_plain(target, parts[name], widened=self.form == WIDENED, what=self.record.name)


@dataclass(frozen=True)
class Loaded:
    """What reading a checkpoint took: its bytes, seconds, and the most host memory at once that was neither
    the files' nor the weights' block.
    """

    nbytes: int
    seconds: float
    memory: int

    def __str__(self) -> str:
        rate = self.nbytes / self.seconds / 1e9
        return (
            f"{self.nbytes / 1e9:.2f} GB in {self.seconds:.1f} s, {rate:.2f} GB/s, "
            f"{self.memory / 1e9:.2f} GB of memory on the way"
        )


def load_weights(
    checkpoint: Checkpoint,
    residents: Sequence[Resident],
    blocks: Mapping[int, Tensor],
    *,
    progress: Progress | None = None,
    workers: int | None = None,
) -> Loaded:
    """Read every parameter into the weights' uint8 blocks, by rank, stacks matrix by matrix. All is read
    once: every rank gets its part of what was read.

    Raises CheckpointError.
    """
    places = {resident.record.name: resident for resident in residents}
    read = 0

    def sink(name: str, matrices: range | None, value: Value) -> None:
        for rank, block in blocks.items():
            places[name].store(block, places[name].record.part(value, rank), matrices)
        for block in blocks.values():
            if block.is_cuda:
                torch.cuda.current_stream(block.device).synchronize()  # the value goes away with this call

    def report(name: str, done: int, total: int) -> None:
        nonlocal read
        read = done
        if progress is not None:
            progress(name, done, total)

    started = time.perf_counter()
    on_cuda = any(block.is_cuda for block in blocks.values())
    with _Watch(None if on_cuda else lambda: read) as watch:
        records = [resident.record for resident in residents]
        checkpoint.stream(records, sink, progress=report, workers=workers)
    return Loaded(read, time.perf_counter() - started, watch.most)


class _Watch:
    """The most host memory, beside files, that the process takes while it is watched, a few times a second.

    `own` says what of it is none of its business.
    """

    EVERY = 0.02  # seconds

    def __init__(self, own: Callable[[], int] | None) -> None:
        self.most = 0
        self._own = own
        self._first = _anonymous_memory()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dsv4c-memory", daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self.EVERY):
            own = self._own() if self._own is not None else 0
            self.most = max(self.most, _anonymous_memory() - self._first - own)


def _anonymous_memory() -> int:
    """Bytes of the process that lie in memory and in no file."""
    with open("/proc/self/status") as lines:
        (line,) = (line for line in lines if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def _store_plain(target: Tensor, part: Tensor, *, widened: bool, what: str) -> None:
    part = part.to(target.device).contiguous()
    if widened:
        part = part.to(torch.float32)
    flat = part.view(-1).view(torch.uint8)
    if flat.numel() != target.numel():
        raise PlanError(
            f"weight {what}: {flat.numel()} bytes for a place of {target.numel()}; compile the plan again"
        )
    target.copy_(flat)


def _store_packed(target: Tensor, packing: Packing, data: Tensor, scale: Tensor | None) -> None:
    """Matrices one after the other, each in slabs of whole tile groups of rows."""
    position = 0
    group = 16 * packing.tiles
    for matrix, scales in _matrices(data, scale, group):
        step = max(SLAB // max(matrix.shape[1] * matrix.element_size(), 1) // group, 1) * group
        for start in range(0, matrix.shape[0], step):
            rows = matrix[start : start + step].to(target.device)
            slab = None if scales is None else scales[start : start + step].to(target.device)
            packed = pack(packing, rows, slab)
            if position + packed.numel() > target.numel():
                raise PlanError(f"a matrix packed as {packing} outgrows its place; compile the plan again")
            target[position : position + packed.numel()].copy_(packed)
            position += packed.numel()
    if position != target.numel():
        raise PlanError(
            f"matrices packed as {packing} take {position} bytes, their place has {target.numel()}; "
            "compile the plan again"
        )


def _matrices(data: Tensor, scale: Tensor | None, group: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A stack's matrices one by one, or one below the other where each is whole groups of rows."""
    count = math.prod(data.shape[:-2])
    if data.shape[-2] % group == 0:
        yield data.flatten(0, -2), None if scale is None else scale.flatten(0, -2)
        return
    matrices = data.reshape(count, *data.shape[-2:])
    scales = None if scale is None else scale.reshape(count, *scale.shape[-2:])
    for i in range(count):
        yield matrices[i], None if scales is None else scales[i]
