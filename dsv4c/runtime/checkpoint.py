"""Opens safetensors checkpoints: compares what they hold with what is needed, then reads it in parallel.

Files are memory-mapped and read in the order in which they lie on disk, one parameter or one matrix of a
stack per worker is in flight, and every doubt is a CheckpointError that names file, tensor, what was found
and expected.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4c.errors import CheckpointError
from dsv4c.headers import ELEMENT_BYTES, Entry, read_entries
from dsv4c.numerics.codec import Value
from dsv4c.numerics.soundness import scale_fault
from dsv4c.runtime.parameter import REMEDY, ParamReader, ParamRecord, Part, Source
from dsv4c.scope import MTP, Scope
from dsv4c.threads import cores, threads
from dsv4c.types import QuantType

# the torch dtype of element types that we read; exponent and packed bytes are uint8
_TORCH = {
    "U8": torch.uint8,
    "I8": torch.uint8,
    "F8_E8M0": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class Report:
    """A checkpoint's headers against what is needed. `missing`, `unexpected` and `spare` (the model's, and
    needed by nothing) are tensor names, the other two sentences; `ignored` counts tensors that were passed
    over on request, by prefix.
    """

    path: Path
    table: str | None
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    mistyped: list[str] = field(default_factory=list)
    spare: list[str] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)
    needed: int = 0

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen or self.mistyped)

    def __str__(self) -> str:
        names = f" ({self.table} names)" if self.table else ""
        lines = [f"{self.path}: {'fits' if self.complete else 'does not fit'} the model{names}"]
        for what, found in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.misshapen),
            ("of another dtype", self.mistyped),
            ("not needed", self.spare),
        ):
            if found:
                more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
                lines.append(f"  {len(found)} tensors {what}: {'; '.join(found[:5])}{more}")
        lines += [
            f"  {count} tensors {prefix}* ignored: not needed" for prefix, count in self.ignored.items()
        ]
        if len(self.missing) + len(self.misshapen) > self.needed / 2:
            lines.append(
                "  most tensors differ: this is the checkpoint of another model; give the one of this config"
            )
        elif not self.complete:
            lines.append("  re-download or re-export the checkpoint, or compile for its own config.json")
        return "\n".join(lines)

    def require_complete(self) -> None:
        """Raise CheckpointError with the whole report unless everything fits."""
        if not self.complete:
            raise CheckpointError(str(self))


SCALES = ("scale", "global_scale", "input_scale")
"""Parts of a source that scale the others, or what is multiplied with them."""

RUN = 32 << 20  # bytes of a stack's matrices that are read together

Sink = Callable[[str, Value], None]
RunSink = Callable[[str, range | None, Value], None]
Progress = Callable[[str, int, int], None]


class Checkpoint:
    """The tensors of a checkpoint folder or file. Opening reads headers only; payload is mapped when first
    used.
    """

    def __init__(self, path: Path, tensors: dict[str, Entry], spare: frozenset[str] = frozenset()) -> None:
        self.path = path
        self.tensors = tensors
        self.spare = spare
        self.files = sorted({entry.file for entry in tensors.values()})
        self._maps = {file: _Map(file) for file in self.files}

    @staticmethod
    def open(path: str | Path) -> Checkpoint:
        """Open a folder with model.safetensors or an index and its shards, or a single .safetensors file.

        Raises CheckpointError for anything that is not a sound checkpoint: nothing there, a foreign or
        truncated file, offsets that do not add up, a shard or tensor that the index names and that is not
        there, a tensor held twice.
        """
        path = Path(path)
        try:
            return Checkpoint(path, read_entries(path))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None

    def sparing(self, params: Iterable[ParamRecord]) -> Checkpoint:
        """This checkpoint, in which the tensors of `params` may be: they belong to the model and nothing
        needs them.
        """
        names = (n for p in params for source in p.sources.values() for n, _ in source.tensors())
        return Checkpoint(self.path, self.tensors, frozenset(names))

    # checking

    def compare(
        self,
        sources: Mapping[str, Source | Mapping[str, Any]],
        *,
        table: str | None = None,
        ignore: Sequence[str] | None = None,
    ) -> Report:
        """Names, shapes and dtypes of every tensor that `sources` (parameter name -> Source or its JSON)
        need.

        Tensors that start with a prefix in `ignore` are not unexpected. By default that is "mtp.", the draft
        blocks, or "mtp.1." and so on, where some of them are needed.
        """
        needed: dict[str, Part] = {}
        for source in sources.values():
            needed.update((source if isinstance(source, Source) else Source.from_json(source)).tensors())
        report = Report(self.path, table, needed=len(needed))
        for name, part in needed.items():
            self._compare_tensor(name, part, report)
        if ignore is None:
            used = _draft_blocks(needed)
            ignore = sorted(_draft_blocks(self.tensors) - used) if used else (f"{MTP}.",)
        for name in self.tensors:
            if name in needed:
                continue
            prefix = next((p for p in ignore if name.startswith(p)), None)
            if name in self.spare:
                report.spare.append(name)
            elif prefix is None:
                report.unexpected.append(name)
            else:
                report.ignored[prefix] = report.ignored.get(prefix, 0) + 1
        return report

    def _compare_tensor(self, name: str, part: Part, report: Report) -> None:
        entry = self.tensors.get(name)
        if entry is None:
            report.missing.append(name)
            return
        where = f"in {entry.file.name}"
        if entry.shape != part.shape:
            report.misshapen.append(f"{name} {where} is {list(entry.shape)}, expected {list(part.shape)}")
        if entry.dtype not in part.dtypes:
            report.mistyped.append(f"{name} {where} is {entry.dtype}, expected {' or '.join(part.dtypes)}")

    def table(self, params: Sequence[ParamRecord]) -> str:
        """The name table of `params` that this checkpoint follows: the one missing the smallest share of its
        tensors, because tables merge experts or do not, so that counts do not compare.

        Raises CheckpointError if it follows none or if two fit equally well and read different tensors.
        """
        tables = list(dict.fromkeys(table for param in params for table in param.sources))
        needed = {t: {n for p in params if t in p.sources for n, _ in p.sources[t].tensors()} for t in tables}
        found = {t: len(names & self.tensors.keys()) for t, names in needed.items()}
        untold = {t: sum(t not in p.sources for p in params) for t in tables}
        lacking = {t: 1 - found[t] / (len(needed[t]) + untold[t]) for t in tables}
        ranked = sorted(tables, key=lambda t: (lacking[t], -found[t]))
        if not ranked or not found[ranked[0]]:
            have = ", ".join(list(self.tensors)[:3]) or "no tensors"
            want = ", ".join(f"{min(names)} ({t})" for t, names in needed.items() if names)
            raise CheckpointError(
                f"{self.path}: holds none of the tensors needed; found {have}; expected {want}"
            )
        best, *rest = ranked
        for other in rest:
            if (lacking[other], found[other]) == (lacking[best], found[best]) and needed[other] != needed[
                best
            ]:
                a, b = min(needed[best] - needed[other]), min(needed[other] - needed[best])
                raise CheckpointError(
                    f"{self.path}: fits two spellings equally well, {best} ({a}) and {other} ({b}); "
                    "remove the tensors of one"
                )
        return best

    def check(
        self, params: Sequence[ParamRecord], table: str | None = None, *, ignore: Sequence[str] | None = None
    ) -> Report:
        """Headers against what `params` read under `table` (found out when None). Reads no payload."""
        table = table or self.table(params)
        for param in params:
            if table not in param.sources:
                raise CheckpointError(
                    f"{self.path}: follows the {table} names, which have no tensor for {param.name}; "
                    f"give a checkpoint in {' or '.join(param.sources)} names"
                )
        return self.compare(
            {param.name: param.sources[table] for param in params}, table=table, ignore=ignore
        )

    def unsound_scales(
        self, sources: Iterable[Source | Mapping[str, Any]], *, workers: int | None = None
    ) -> list[str]:
        """A sentence for every scale of what `sources` read that cannot be right, whose headers fit.

        Reads all scales, a small part of the payload, and of the data only what lies under a zero.
        """
        read = [source if isinstance(source, Source) else Source.from_json(source) for source in sources]
        with threads(1), ThreadPoolExecutor(workers or _workers(), "dsv4c-scales") as pool:
            found = [sentence for part in pool.map(self._unsound_scales, read) for sentence in part]
        return list(dict.fromkeys(found))  # the halves of a merged stack share theirs

    def _unsound_scales(self, source: Source) -> list[str]:
        sentences: list[str] = []
        if not isinstance(source.stored, QuantType):
            return sentences
        for e in range(source.stack or 1):
            data = source.parts["data"].name(e)
            for role in (r for r in SCALES if r in source.parts):
                name = source.parts[role].name(e)
                fault = self._scale_fault(name, source.stored, None if role == "input_scale" else data)
                if fault is not None:
                    sentences.append(f"{self.tensors[name].file}: tensor {name} {fault}; {REMEDY}")
        return sentences

    def _scale_fault(self, name: str, stored: QuantType, data: str | None) -> str | None:
        under = None if data is None else lambda: self.tensor(data)
        fault = scale_fault(self.tensor(name), stored.format, under)
        self.release(self.tensors[name])
        return fault

    # reading

    def load(
        self,
        params: Sequence[ParamRecord],
        sink: Sink,
        *,
        table: str | None = None,
        ignore: Sequence[str] | None = None,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> Report:
        """Check headers and scales, then read every parameter, convert it to its type and call
        `sink(name, value)`.

        `sink` copies the value to its final place: the value may be a view of the file, valid during the call
        only. It is called from several threads, once per parameter. `progress(name, bytes done, bytes in
        all)` is called after each, one call at a time. Host memory in flight is at most one parameter per
        worker. Raises CheckpointError; the parameters that were not read yet are then left out.
        """
        report, readers = self._readers(params, table, ignore, workers)
        jobs = [_Job(reader, tuple(reader.pieces), partial(_give, sink, reader)) for reader in readers]
        self._read(jobs, workers, progress)
        return report

    def stream(
        self,
        params: Sequence[ParamRecord],
        sink: RunSink,
        *,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> Report:
        """`load` in parts: `sink(name, matrices, value)` gets some matrices of a stack, as many as are `RUN`
        bytes, or with None all of a parameter. Host memory in flight is at most twice that per worker.
        """
        report, readers = self._readers(params, None, None, workers)
        jobs = [
            _Job(reader, pieces, partial(_give_run, sink, reader, pieces))
            for reader in readers
            for pieces in _runs(reader)
        ]
        self._read(jobs, workers, progress)
        return report

    def _readers(
        self,
        params: Sequence[ParamRecord],
        table: str | None,
        ignore: Sequence[str] | None,
        workers: int | None,
    ) -> tuple[Report, list[ParamReader]]:
        """Headers and scales are right; what reads each parameter."""
        report = self.check(params, table, ignore=ignore)
        report.require_complete()
        assert report.table is not None
        readers = [ParamReader(self, param, param.sources[report.table]) for param in params]
        unsound = self.unsound_scales((reader.source for reader in readers), workers=workers)
        if unsound:
            more = f"\n  and {len(unsound) - 1} more scales" if len(unsound) > 1 else ""
            raise CheckpointError(f"{unsound[0]}{more}")
        return report, readers

    def _read(self, jobs: Sequence[_Job], workers: int | None, progress: Progress | None) -> None:
        """Do all jobs, those first whose bytes come first on disk."""
        total, done, lock = sum(job.nbytes for job in jobs), 0, threading.Lock()
        stop = threading.Event()

        def read(job: _Job) -> None:
            nonlocal done
            if stop.is_set():
                return
            try:
                for entry in job.entries:
                    self._maps[entry.file].expect(entry.begin, entry.end)
                job.do()
                for entry in job.entries:
                    self.release(entry)
                with lock:
                    done += job.nbytes
                    if progress is not None:
                        progress(job.reader.param.name, done, total)
            except BaseException:
                stop.set()
                raise

        # The parallelism is over tensors.
        with threads(1), ThreadPoolExecutor(workers or _workers(), "dsv4c-weights") as pool:
            try:
                for future in [pool.submit(read, job) for job in sorted(jobs, key=lambda job: job.place)]:
                    future.result()
            finally:
                stop.set()

    def tensor(self, name: str) -> Tensor:
        """A view of one tensor's bytes in the mapped file, in its torch dtype (uint8 for I8, U8 and
        F8_E8M0).
        """
        entry = self.tensors[name]
        if entry.dtype not in _TORCH:
            raise CheckpointError(
                f"{entry.file}: tensor {name} is {entry.dtype}, expected {', '.join(_TORCH)}"
            )
        raw = self._maps[entry.file].bytes()[entry.begin : entry.end]
        if entry.begin % ELEMENT_BYTES[entry.dtype]:
            raw = raw.clone()  # the format does not promise alignment, a typed view needs it
        return raw.view(_TORCH[entry.dtype]).view(entry.shape)

    def release(self, entry: Entry) -> None:
        """Give the pages of a tensor back to the system; they are read again if they are used again."""
        self._maps[entry.file].release(entry.begin, entry.end)


@dataclass(frozen=True)
class _Job:
    """Pieces of a parameter that are read in one go, and what is done with them."""

    reader: ParamReader
    pieces: tuple[int | None, ...]
    do: Callable[[], None]

    @property
    def entries(self) -> Iterator[Entry]:
        return (entry for e in self.pieces for entry in self.reader.entries(e))

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    @property
    def place(self) -> tuple[Path, int]:
        """Where it begins on disk."""
        first = next(self.entries)
        return first.file, first.begin


def _give(sink: Sink, reader: ParamReader) -> None:
    sink(reader.param.name, reader.value())


def _runs(reader: ParamReader) -> Iterator[tuple[int | None, ...]]:
    """Pieces that are read together: small matrices would take more calls than time."""
    count = max(1, RUN // max(1, reader.param.whole.nbytes // len(reader.pieces)))
    for start in range(0, len(reader.pieces), count):
        yield tuple(reader.pieces[start : start + count])


def _give_run(sink: RunSink, reader: ParamReader, pieces: tuple[int | None, ...]) -> None:
    first = pieces[0]
    if first is None:
        sink(reader.param.name, None, reader.piece(None))
    else:
        matrices = range(first, first + len(pieces))
        sink(reader.param.name, matrices, reader.run(matrices))


def _workers() -> int:
    return min(4, cores())


def _draft_blocks(names: Iterable[str]) -> set[str]:
    """The draft blocks that tensors of these names belong to, as prefixes: `mtp.0.`."""
    return {f"{scope.layer}." for scope in map(Scope.of, names) if scope.draft}


class _Map:
    """A file mapped on first use. Copy-on-write, because torch has no read-only tensors; nothing writes to
    it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.size = file.stat().st_size
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None
        self._bytes: Tensor | None = None

    def bytes(self) -> Tensor:
        with self._lock:
            if self._bytes is None:
                with open(self.file, "rb") as file:
                    if os.fstat(file.fileno()).st_size != self.size:
                        raise CheckpointError(f"{self.file}: changed while it was open; load it again")
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
            return self._bytes

    def expect(self, begin: int, end: int) -> None:
        """Have the system read these bytes, which are wanted soon, all at once."""
        self.bytes()
        if self._map is not None and hasattr(mmap, "MADV_WILLNEED"):
            first = begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, first, end - first)

    def release(self, begin: int, end: int) -> None:
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if self._map is not None and length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, length)
