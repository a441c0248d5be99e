"""Writes a random checkpoint in the release's names and formats, for tests and benchmarks.

The values keep activations finite and near the trained model's scale, and give no exact ties in any top-k.
They depend on (seed, tensor) alone, not on threads or shards. Tensors stream to their place on disk: a few
are in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from dsv4c.config import ModelConfig, save_config
from dsv4c.errors import CheckpointError
from dsv4c.headers import ELEMENT_BYTES, INDEX, SINGLE
from dsv4c.models.weights import Source, Table, TensorSpec, inventory, sources
from dsv4c.numerics.codec import decode_e2m1, decode_scale, quantize
from dsv4c.publish import OccupiedError, published
from dsv4c.scope import Scope
from dsv4c.threads import cores, threads
from dsv4c.types import NVFP4, DType, QuantType

SHARD_BYTES = 2_000_000_000
CHUNK = 1 << 22  # elements made at a time; part of what a seed means


def synthesize(
    config: ModelConfig,
    directory: str | Path,
    seed: int,
    shards: int | None = None,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write config.json and the weights of `config` into `directory`, and return it.

    `shards` is the number of files (by default as many as keep each near 2 GB); more than one get an index.
    Everything is written beside the target and exchanged with it when complete; files there that are none of
    a checkpoint's are kept. `progress(name, bytes done, bytes in
    all)` is called from worker threads, one at a time. Raises CheckpointError if the folder is not empty
    (unless it holds a checkpoint and `overwrite`, which replaces that) or cannot be written, or if the disk
    is too small.
    """
    target = Path(directory)
    _check_target(target, overwrite)
    table: Table = "nvfp4" if config.expert_format == "nvfp4" else "release"
    specs = inventory(config, table)
    total = sum(spec.nbytes for spec in specs)
    if shards is not None and not 1 <= shards <= len(specs):
        raise CheckpointError(
            f"{target}: cannot split {len(specs)} tensors into {shards} files; expected 1 to {len(specs)}"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < total * 1.01:
            raise CheckpointError(
                f"{target}: the weights need {total:,} bytes, the disk has {free:,} left; free some"
            )
        with published(target, replace=overwrite, keep=_is_foreign) as folder:
            folder.mkdir()
            files = _create(folder, specs, shards or max(1, -(-total // SHARD_BYTES)))
            _fill(config, table, seed, files, total, workers, progress)
            save_config(config, folder)
    except OccupiedError:
        raise CheckpointError(f"{target}: another process wrote it just now; it was left alone") from None
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error.strerror or error}") from None
    return target


# --- files --------------------------------------------------------------------------------------------------


def _check_target(target: Path, overwrite: bool) -> None:
    """Raise CheckpointError unless a checkpoint may be written there."""
    try:
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise CheckpointError(f"{target}: exists and is no folder; give a new folder for the checkpoint")
        if not target.is_dir() or not any(target.iterdir()):
            return
        if not (target / SINGLE).exists() and not (target / INDEX).exists():
            raise CheckpointError(f"{target}: is not empty and holds no checkpoint; give a new folder")
        if not overwrite:
            raise CheckpointError(
                f"{target}: holds a checkpoint; give another folder, or --overwrite to replace it"
            )
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error.strerror}") from None


@dataclass(frozen=True)
class _Slot:
    """Where a tensor's bytes go."""

    spec: TensorSpec
    storage: Tensor  # uint8 view of the mapped file

    def part(self, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop`, flat, in the tensor's own dtype (bytes for those torch does not
        compute with).
        """
        size = ELEMENT_BYTES[self.spec.dtype]
        dtypes = {"I64": torch.int64, "F32": torch.float32, "BF16": torch.bfloat16}
        return self.storage[start * size : stop * size].view(dtypes.get(self.spec.dtype, torch.uint8))


def _create(folder: Path, specs: list[TensorSpec], count: int) -> dict[str, _Slot]:
    """Make `count` files of the right size, headers written, payload mapped; slots by tensor name."""
    total = sum(spec.nbytes for spec in specs)
    groups: list[list[TensorSpec]] = [[]]
    position = 0
    for number, spec in enumerate(specs):
        due = position * count // max(total, 1)  # by bytes; but every later file must get a tensor, too
        if groups[-1] and max(due, number - len(specs) + count) >= len(groups):
            groups.append([])
        groups[-1].append(spec)
        position += spec.nbytes
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    if len(groups) == 1:
        names = [SINGLE]
    slots: dict[str, _Slot] = {}
    for name, group in zip(names, groups, strict=True):
        slots.update(_create_file(folder / name, group))
    if len(groups) > 1:
        where = {spec.name: name for name, group in zip(names, groups, strict=True) for spec in group}
        listing = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(listing, indent=1) + "\n")
    return slots


def _create_file(path: Path, group: list[TensorSpec]) -> Iterator[tuple[str, _Slot]]:
    """A file of the right size, mapped, and its slots: a few tensors are in memory at a time. The library's
    `save_file` would want all of a file's, which are gigabytes.
    """
    group = sorted(group, key=lambda s: -ELEMENT_BYTES[s.dtype])  # wide elements first: all are aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, position = [], 0
    for spec in group:
        offsets.append(position)
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with open(path, "w+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        os.posix_fallocate(
            file.fileno(), 0, start + position
        )  # a full disk is an error now, not a signal later
        storage = torch.frombuffer(mmap.mmap(file.fileno(), start + position), dtype=torch.uint8)
    for spec, offset in zip(group, offsets, strict=True):
        yield spec.name, _Slot(spec, storage[start + offset : start + offset + spec.nbytes])


def _is_foreign(name: str) -> bool:
    """Is an entry of the folder none of a checkpoint's own, so that it outlives a replacement?"""
    return not re.fullmatch(r"model.*\.safetensors|model\.safetensors\.index\.json|config\.json", name)


# --- values -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """Some rows of one matrix (or of expert `e` of a stack)."""

    name: str
    source: Source
    e: int
    rows: range
    slots: dict[str, _Slot]  # by role

    @property
    def matrix(self) -> tuple[int, ...]:
        """Logical shape of the stored matrix or vector."""
        shape = self.source.stored.shape
        if len(shape) == 3:
            return shape[1:] if self.source.stack else (shape[0] * shape[1], shape[2])
        return () if self.source.stack else shape

    @property
    def nbytes(self) -> int:
        """Its share of the tensors' bytes; the shares of all jobs of a tensor add up."""
        whole, rows = (
            sum(slot.spec.nbytes for slot in self.slots.values()),
            self.matrix[0] if self.matrix else 1,
        )
        return whole * self.rows.stop // rows - whole * self.rows.start // rows

    def generator(self, seed: int, purpose: str | None = None) -> Generator:
        text = f"{seed}/{purpose or self.name}/{self.e}/{self.rows.start}"
        return torch.Generator().manual_seed(
            int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
        )


def _jobs(config: ModelConfig, table: Table, slots: dict[str, _Slot]) -> Iterator[_Job]:
    for name, source in sources(config, table).items():
        for e in range(source.stack or 1):
            own = {
                role: slots[part.tensor.format(e=e)]
                for role, part in source.parts.items()
                if role != "input_scale"
            }
            job = _Job(name, source, e, range(1), own)
            rows, width = job.matrix[0] if job.matrix else 1, math.prod(job.matrix[1:])
            step = max(CHUNK // max(width, 1) // 128, 1) * 128  # whole scale tiles
            for start in range(0, rows, step):
                yield _Job(name, source, e, range(start, min(start + step, rows)), own)


def _fill(
    config: ModelConfig,
    table: Table,
    seed: int,
    slots: dict[str, _Slot],
    total: int,
    workers: int | None,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    lock, stop, done = threading.Lock(), threading.Event(), 0

    def write(job: _Job) -> None:
        nonlocal done
        if stop.is_set():
            return
        try:
            _write(config, seed, job)
            with lock:
                done += job.nbytes
                if progress is not None:
                    progress(job.name, done, total)
        except BaseException:
            stop.set()
            raise

    # The parallelism is over tensors.
    with threads(1), ThreadPoolExecutor(workers or cores(), "dsv4c-synth") as pool:
        try:
            for future in [pool.submit(write, job) for job in _jobs(config, table, slots)]:
                future.result()
        finally:
            stop.set()


def _write(config: ModelConfig, seed: int, job: _Job) -> None:
    generator = job.generator(seed)
    rows = len(job.rows)
    if job.name.endswith(".tid2eid"):
        scores = torch.rand(rows, config.n_routed_experts, generator=generator)
        _put(job, "data", scores.topk(config.num_experts_per_tok).indices)
        return
    if job.name.endswith(".input_scale"):
        for role in job.slots:
            _put(job, role, _input_scale(job, seed))
        return
    shape = (rows, *job.matrix[1:])
    mean, deviation = _distribution(job.name, job.matrix)
    stored = job.source.stored
    if isinstance(stored, QuantType) and stored.format.value is DType.E2M1:
        _write_codes(job, stored.with_shape(shape), deviation, seed, generator)
        return
    values = torch.randn(shape, generator=generator).mul_(deviation).add_(mean)
    if not isinstance(stored, QuantType):
        _put(job, "data", values)
        return
    quantized = quantize(values, stored.format)
    _put(job, "data", quantized.data.view(torch.uint8))
    _put(job, "scale", quantized.scale.view(torch.uint8))


def _write_codes(job: _Job, part: QuantType, deviation: float, seed: int, generator: Generator) -> None:
    """FP4 is most of a model, so its bytes are drawn as they are: all codes as likely, and of each block's
    scale one of two neighbors, as often as gives the standard deviation.
    """
    data, scale = part.components[:2]
    global_scale = _global_scale(job, seed) if part.format == NVFP4 else torch.ones(())
    codes = torch.arange(256, dtype=torch.uint8)
    steps = decode_scale(codes[:0x7F].view(torch.float8_e4m3fn) if part.format == NVFP4 else codes[:0xFF])
    wanted = (deviation / (global_scale * decode_e2m1(codes).square().mean().sqrt())).square()
    lower = int((steps.square() <= wanted).sum()) - 1
    least, most = steps[lower].square(), steps[lower + 1].square()
    above = torch.rand(scale.shape, generator=generator) < (wanted - least) / (most - least)
    _put(job, "data", _random_bytes(math.prod(data.shape), generator))
    _put(job, "scale", above.to(torch.uint8) + lower)
    if part.format == NVFP4:
        _put(job, "global_scale", global_scale)


def _random_bytes(count: int, generator: Generator) -> Tensor:
    words = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(1 << 63), None, generator=generator)
    return words.view(torch.uint8)[:count]


def _put(job: _Job, role: str, values: Tensor) -> None:
    """Copy rows of a part to their place. Parts have rows in proportion to the matrix: 128 per scale tile,
    say.
    """
    slot = job.slots[role]
    size = values.numel()
    if not slot.spec.shape:
        slot.part(0, 1).copy_(values.reshape(1))
        return
    per_row = slot.spec.shape[0] / job.matrix[0] * math.prod(slot.spec.shape[1:])
    start = round(job.rows.start * per_row)
    slot.part(start, start + size).copy_(values.reshape(-1))


def _distribution(name: str, matrix: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's elements."""
    leaf = Scope.of(name).leaf
    if leaf.endswith("norm"):
        return 1.0, 0.1
    if leaf == "embed":
        return 0.0, 1.0
    if leaf.startswith("hc_"):
        if leaf.endswith("_fn"):
            return 0.0, matrix[1] ** -0.5
        return (0.0, 0.3) if leaf.endswith("_base") else (0.3, 0.05)
    if leaf in ("attn_sink", "ape"):
        return 0.0, 0.3
    if leaf == "bias":
        return 0.0, 0.02
    return 0.0, matrix[1] ** -0.5


def _pair(job: _Job) -> str:
    """w1 and w3 of an expert are one GEMM and share their second-level scales."""
    return job.name.removesuffix(".input_scale").replace(".w3", ".w1")


def _global_scale(job: _Job, seed: int) -> Tensor:
    """NVFP4 weight_scale_2 as if the largest weight were six standard deviations."""
    return _jittered(job, seed, "weight_scale_2", 6 * job.matrix[1] ** -0.5)


def _input_scale(job: _Job, seed: int) -> Tensor:
    """NVFP4 static activation scale; the inputs of w1 and w3 are normed, those of w2 are a gated product."""
    return _jittered(job, seed, "input_scale", 6.0 if job.name.endswith("w1.input_scale") else 3.0)


def _jittered(job: _Job, seed: int, purpose: str, amax: float) -> Tensor:
    whole = _Job(job.name, job.source, job.e, range(1), job.slots)
    factor = torch.rand((), generator=whole.generator(seed, f"{_pair(job)}.{purpose}"))
    return (1.0 + 0.25 * factor) * (amax / (6 * 448))
