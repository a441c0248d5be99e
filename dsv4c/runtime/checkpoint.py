"""Reads safetensors checkpoints: headers first, then parameters in parallel, converted and handed to a sink.

What to read is data (`ParamRecord`, from a plan); nothing here knows the model. Files are memory-mapped, one
parameter per worker is in flight, and every doubt is a CheckpointError that names file, tensor, what was
found and expected.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from dsv4c import strict_json
from dsv4c.errors import CheckpointError
from dsv4c.runtime.codec import ConversionError, Quantized, Value, convert, view
from dsv4c.types import F32, UE8M0, QuantType, TensorType, Type, TypeSyntaxError, parse_type

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # the format's own limit

# safetensors element types: bytes, and the torch dtype of those we read (exponent and packed bytes are uint8)
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
_BYTES |= {
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
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


# --- what to read: plan data --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the checkpoint, or one per expert where the name contains "{e}"; dtypes are
    alternatives.
    """

    tensor: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]

    def name(self, e: int) -> str:
        return self.tensor.replace("{e}", str(e))

    def names(self, stack: int) -> list[str]:
        return [self.name(e) for e in range(stack)] if "{e}" in self.tensor else [self.tensor]


@dataclass(frozen=True, slots=True)
class Source:
    """How a parameter is put together from the tensors of a checkpoint; written by `dsv4c.models.weights`.

    stored: its type as stored, in the parameter's shape. parts: data, scale, global_scale; also `input_scale`
    (checked with the others, read as a parameter of its own) and `same` (must hold what data holds). stack:
    experts, one tensor each. rows: (start, stop) of every matrix of a merged stack. limit: integers lie in
    [0, limit).
    """

    stored: Type
    parts: Mapping[str, Part]
    stack: int = 0
    rows: tuple[int, int] | None = None
    limit: int | None = None

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Source:
        parts = {r: Part(name, tuple(d.split("|")), tuple(s)) for r, (name, d, s) in data["parts"].items()}
        rows = tuple(data["rows"]) if "rows" in data else None
        return Source(parse_type(data["stored"]), parts, data.get("stack", 0), rows, data.get("limit"))

    def tensors(self) -> Iterator[tuple[str, Part]]:
        for part in self.parts.values():
            for name in part.names(self.stack):
                yield name, part


@dataclass(frozen=True, slots=True)
class ParamRecord:
    """A parameter a plan wants: its type, whether rounding to that type is allowed, and a source per name
    table.
    """

    name: str
    type: Type
    sources: Mapping[str, Source]
    requantize: bool = False

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ParamRecord:
        """Read a record of a plan. Raises CheckpointError if it is not one."""
        try:
            sources = {table: Source.from_json(source) for table, source in data["sources"].items()}
            return ParamRecord(
                data["name"], parse_type(data["type"]), sources, bool(data.get("requantize", False))
            )
        except (KeyError, TypeError, ValueError, AttributeError, TypeSyntaxError) as error:
            name = data.get("name", "?") if isinstance(data, Mapping) else "?"
            raise CheckpointError(f"the plan's weight record {name!r} cannot be read: {error!r}") from None


# --- what is there ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file; `begin` and `end` are offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Report:
    """A checkpoint's headers against what is needed. `missing` and `unexpected` are tensor names, the other
    two sentences; `ignored` counts tensors that were passed over on request, by prefix.
    """

    path: Path
    table: str | None
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    mistyped: list[str] = field(default_factory=list)
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


Sink = Callable[[str, Value], None]
Progress = Callable[[str, int, int], None]


class Checkpoint:
    """The tensors of a checkpoint folder or file. Opening reads headers only; payload is mapped when first
    used.
    """

    def __init__(self, path: Path, tensors: dict[str, Entry]) -> None:
        self.path = path
        self.tensors = tensors
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
            return Checkpoint(path, _entries(path))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None

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
        blocks, unless one of them is needed.
        """
        needed: dict[str, Part] = {}
        for source in sources.values():
            needed.update((source if isinstance(source, Source) else Source.from_json(source)).tensors())
        report = Report(self.path, table, needed=len(needed))
        for name, part in needed.items():
            self._compare_tensor(name, part, report)
        if ignore is None:
            ignore = () if any(name.startswith("mtp.") for name in needed) else ("mtp.",)
        for name in self.tensors:
            if name in needed:
                continue
            prefix = next((p for p in ignore if name.startswith(p)), None)
            if prefix is None:
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
        """Check everything, then read every parameter, convert it to its type and call `sink(name, value)`.

        `sink` copies the value to its final place: the value may be a view of the file, valid during the call
        only. It is called from several threads, once per parameter. `progress(name, bytes done, bytes in
        all)` is called after each, one call at a time. Host memory in flight is at most one parameter per
        worker. Raises CheckpointError; the parameters that were not read yet are then left out.
        """
        report = self.check(params, table, ignore=ignore)
        report.require_complete()
        assert report.table is not None
        readers = [_Reader(self, param, param.sources[report.table]) for param in params]
        total, done, lock = sum(reader.nbytes for reader in readers), 0, threading.Lock()

        stop = threading.Event()

        def read(reader: _Reader) -> None:
            nonlocal done
            if stop.is_set():
                return
            try:
                sink(reader.param.name, reader.value())
                reader.release()
                with lock:
                    done += reader.nbytes
                    if progress is not None:
                        progress(reader.param.name, done, total)
            except BaseException:
                stop.set()
                raise

        with ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1), "dsv4c-weights") as pool:
            try:
                for future in [pool.submit(read, reader) for reader in readers]:
                    future.result()
            finally:
                stop.set()
        return report

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
        if entry.begin % _BYTES[entry.dtype]:
            raw = raw.clone()  # the format does not promise alignment, a typed view needs it
        return raw.view(_TORCH[entry.dtype]).view(entry.shape)

    def release(self, entry: Entry) -> None:
        """Give the pages of a tensor back to the system; they are read again if they are used again."""
        self._maps[entry.file].release(entry.begin, entry.end)


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

    def release(self, begin: int, end: int) -> None:
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if self._map is not None and length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, length)


# --- one parameter ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    checkpoint: Checkpoint
    param: ParamRecord
    source: Source

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries())

    def _entries(self) -> Iterator[Entry]:
        for role, part in self.source.parts.items():
            if role != "input_scale":
                for name in part.names(self.source.stack):
                    yield self.checkpoint.tensors[name]

    def release(self) -> None:
        for entry in self._entries():
            self.checkpoint.release(entry)

    def value(self) -> Value:
        """The parameter, assembled, checked and converted. Stacks are converted matrix by matrix."""
        merged = not self.source.stack and len(self.source.parts["data"].shape) == 3
        lead = self.param.type.shape[0] if merged else self.source.stack
        if not lead:
            return self._convert(self._regroup(self._piece(None)), self.param.type)
        whole = view(torch.empty(self.param.type.extent, dtype=torch.uint8), self.param.type)
        inner = self.param.type.with_shape(self.param.type.shape[1:])
        for e in range(lead):
            _copy(
                whole.map(_at(e)) if isinstance(whole, Quantized) else whole[e],
                self._convert(self._piece(e), inner),
            )
        return whole

    def _convert(self, value: Value, want: Type) -> Value:
        try:
            return convert(value, want, requantize=self.param.requantize)
        except ConversionError as error:
            self._fail("data", 0, f"cannot become parameter {self.param.name}: {error}")

    def _fail(self, role: str, e: int, what: str) -> NoReturn:
        name = self.source.parts[role].name(e)
        raise CheckpointError(f"{self.checkpoint.tensors[name].file}: tensor {name} {what}")

    def _piece(self, e: int | None) -> Value:
        """The stored value: of expert `e` of a stack, or the whole parameter."""
        parts = {r: self._tensor(r, e) for r in self.source.parts if r not in ("input_scale", "same")}
        data, stored = parts["data"], self.source.stored
        if "same" in self.source.parts and not torch.equal(data, other := self._tensor("same", e)):
            same = self.source.parts["same"].name(e or 0)
            self._fail(
                "data",
                e or 0,
                f"is {data.tolist()}, but {same} is {other.tolist()}; expected one value for both",
            )
        if isinstance(stored, TensorType):
            return data
        scale, format = parts["scale"], stored.format
        if format.scale is UE8M0 and scale.dtype is torch.float32:
            exponents = _exponents(scale)
            format = format if exponents is not None else replace(format, scale=F32)
            scale = scale if exponents is None else exponents
        return Quantized(format, data, scale, global_scale=parts.get("global_scale"))

    def _tensor(self, role: str, e: int | None) -> Tensor:
        """One part of the parameter (rows of a merged stack cut out), all of whose elements are proper
        numbers.
        """
        part = self.source.parts[role]
        tensor = self.checkpoint.tensor(part.name(e or 0))
        if e is not None and not self.source.stack:
            tensor = tensor[e]
        if self.source.rows is not None:
            tensor = tensor[self._rows(role)]
        self._check_numbers(role, e or 0, tensor)
        return tensor

    def _rows(self, role: str) -> slice:
        start, stop = self.source.rows or (0, 0)
        stored = self.source.stored
        block = stored.format.block[0] if role == "scale" and isinstance(stored, QuantType) else 1
        if start % block or (stop % block and stop != self.source.parts["data"].shape[-2]):
            self._fail(
                role,
                0,
                f"has blocks of {block} rows that straddle w1 and w3, which meet inside one at row {stop}",
            )
        return slice(start // block, -(-stop // block))

    def _check_numbers(self, role: str, e: int, tensor: Tensor) -> None:
        if self.source.limit is not None and role == "data":
            low, high = (int(x) for x in torch.aminmax(tensor))
            if low < 0 or high >= self.source.limit:
                worst = low if low < 0 else high
                self._fail(
                    role, e, f"holds {worst}; expected expert numbers from 0 to {self.source.limit - 1}"
                )
            return
        # A scale in bytes is ue8m0; data in bytes is packed e2m1, where every byte is two numbers.
        bad = _first_bad(tensor) if role == "scale" or tensor.dtype is not torch.uint8 else None
        if bad is not None:
            index = list(torch.unravel_index(torch.tensor(bad), tensor.shape)) if tensor.ndim else []
            at = [int(i) for i in index]
            self._fail(role, e, f"is not finite (NaN or infinity) at {at}; re-export it or download it again")

    def _regroup(self, value: Value) -> Value:
        """Give a matrix [G * R, K] the parameter's shape [G, R, K]; scale tiles must lie within a group or
        cover it.
        """
        shape = self.param.type.shape
        if tuple(value.shape) == shape:
            return value
        if not isinstance(value, Quantized):
            return value.reshape(shape)
        (groups, rows), tile = shape[:2], value.format.block[0]
        if rows % tile == 0:
            scale = value.scale.reshape(groups, rows // tile, -1)
        elif tile % rows == 0:
            scale = value.scale[torch.arange(groups) * rows // tile].unsqueeze(1)
        else:
            self._fail(
                "scale",
                0,
                f"has tiles of {tile} rows, which do not line up with {groups} groups of {rows} rows",
            )
        return Quantized(value.format, value.data.reshape(*shape[:2], -1), scale)


def _at(e: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[e]


def _copy(target: Value, value: Value) -> None:
    if isinstance(target, Quantized):
        assert isinstance(value, Quantized)
        for part, new in zip(target.parts, value.parts, strict=True):
            part.copy_(new)
    else:
        assert isinstance(value, Tensor)
        target.copy_(value)


def _exponents(scale: Tensor) -> Tensor | None:
    """f32 scales that are all powers of two, as ue8m0 bytes; None if any is not."""
    bits = scale.view(torch.int32)
    exponent = bits >> 23  # negative for negative numbers
    if bool((((bits & 0x7FFFFF) != 0) | (exponent < 1) | (exponent > 254)).any()):
        return None
    return exponent.to(torch.uint8)


CHUNK = 1 << 22  # elements looked at together, so that the mask stays small


def _first_bad(tensor: Tensor) -> int | None:
    """Position of the first element, in row-major order, that is no finite number; None if all are. Bytes
    are ue8m0 exponents.
    """
    flat = tensor.contiguous().view(-1)
    for start in range(0, flat.numel(), CHUNK):
        chunk = flat[start : start + CHUNK]
        if tensor.dtype is torch.uint8:
            bad = chunk == 0xFF
        elif tensor.dtype is torch.float8_e4m3fn:
            bad = (chunk.view(torch.uint8) & 0x7F) == 0x7F
        else:
            bad = ~torch.isfinite(chunk)
        if bool(bad.any()):
            return start + int(bad.to(torch.uint8).argmax())
    return None


# --- files --------------------------------------------------------------------------------------------------


def _entries(path: Path) -> dict[str, Entry]:
    """Tensors of a checkpoint folder, of an index, or of a single file."""
    if path.is_file():
        return _read_index(path) if path.name.endswith(".index.json") else read_header(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such file or folder; expected a checkpoint folder or a .safetensors file"
        )
    single, index = path / SINGLE, path / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(
            f"{path}: holds both {SINGLE} and {INDEX}; remove the one that is not to be read"
        )
    if index.exists():
        return _read_index(index)
    if single.exists():
        return read_header(single)
    present = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "an empty folder"
    raise CheckpointError(f"{path}: no checkpoint here; expected {SINGLE} or {INDEX}, found {present}")


def read_header(file: Path) -> dict[str, Entry]:
    """Tensors of one safetensors file by name. Raises CheckpointError if the file is not sound from end to
    end.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            start = stream.read(9)
            length = int.from_bytes(start[:8], "little")
            if not 2 <= length <= MAX_HEADER or start[8:] != b"{":
                raise CheckpointError(f"{file}: not a safetensors file: {_what_it_is(start, size)}")
            if 8 + length > size:
                raise CheckpointError(
                    f"{file}: truncated: its header needs {8 + length:,} bytes, the file has {size:,}; "
                    "download it again"
                )
            text = start[8:] + stream.read(length - 1)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        header = strict_json.parse(text)
    except ValueError as error:
        raise CheckpointError(f"{file}: not a safetensors file: its header cannot be read: {error}") from None
    header.pop("__metadata__", None)
    entries = [_entry(file, name, fields, 8 + length) for name, fields in header.items()]
    _check_offsets(file, entries, 8 + length, size)
    return {entry.name: entry for entry in entries}


def _what_it_is(start: bytes, size: int) -> str:
    if size < 9:
        return f"it has {size} bytes"
    for magic, what in (
        (b"version ", "it is a Git LFS pointer; fetch the real file with `git lfs pull`"),
        (b"PK\x03\x04", "it is a zip archive, perhaps a PyTorch checkpoint; convert it to safetensors"),
        (b"\x80", "it is a pickle, perhaps a PyTorch checkpoint; convert it to safetensors"),
        (b"GGUF", "it is a GGUF file; give the original checkpoint"),
    ):
        if start.startswith(magic):
            return what
    return f"it starts with {start!r}, expected the length of a JSON header and the header"


def _entry(file: Path, name: str, fields: object, payload: int) -> Entry:
    try:
        assert isinstance(fields, dict)
        dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        assert all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        assert isinstance(dtype, str)
    except (AssertionError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: tensor {name} has a malformed header entry: {fields!r}") from None
    if dtype not in _BYTES:
        raise CheckpointError(
            f"{file}: tensor {name} has the unknown dtype {dtype!r}; known: {', '.join(_BYTES)}"
        )
    needed = math.prod(shape) * _BYTES[dtype]
    if end - begin != needed:
        raise CheckpointError(
            f"{file}: tensor {name} takes {end - begin:,} bytes ({begin:,} to {end:,}), "
            f"but {dtype} {list(shape)} needs {needed:,}"
        )
    return Entry(name, dtype, shape, file, payload + begin, payload + end)


def _check_offsets(file: Path, entries: list[Entry], payload: int, size: int) -> None:
    position, previous = payload, "the header"
    for entry in sorted(entries, key=lambda e: (e.begin, e.end)):
        if entry.begin != position:
            what = "overlaps" if entry.begin < position else "leaves a gap after"
            raise CheckpointError(f"{file}: tensor {entry.name} {what} {previous}: the header is damaged")
        position, previous = entry.end, entry.name
    if position > size:
        lost = [e.name for e in entries if e.end > size]
        raise CheckpointError(
            f"{file}: truncated: its tensors need {position:,} bytes, the file has {size:,}; "
            f"{len(lost)} tensors are cut off, {min(lost)} among them; download it again"
        )
    if position < size:
        raise CheckpointError(
            f"{file}: {size - position:,} bytes after the last tensor; expected none: it is damaged"
        )


def _read_index(index: Path) -> dict[str, Entry]:
    """Tensors of all shards that an index names, which must agree with the index both ways."""
    try:
        content = strict_json.parse(index.read_text(encoding="utf-8"))
        where = content["weight_map"]
        assert isinstance(where, dict)
        assert all(isinstance(shard, str) for shard in where.values())
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise CheckpointError(
            f"{index}: not a checkpoint index: no weight_map of names to files ({error!r})"
        ) from None
    shards = sorted(set(where.values()))
    foreign = [shard for shard in shards if Path(shard).name != shard]
    if foreign:
        raise CheckpointError(f"{index}: names the shard {foreign[0]!r}; expected files next to the index")
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        names = sorted(name for name, shard in where.items() if shard == absent[0])
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise CheckpointError(
            f"{index}: names the shard {absent[0]}{more}, which is not there; "
            f"it holds {len(names)} tensors, {names[0]} among them; download it"
        )
    tensors: dict[str, Entry] = {}
    for shard in shards:
        for name, entry in read_header(index.parent / shard).items():
            _place(index, where, tensors, name, entry)
    for name, shard in where.items():
        if name not in tensors:
            raise CheckpointError(
                f"{index}: says that {shard} holds tensor {name}, but it does not; download both again"
            )
    return tensors


def _place(index: Path, where: Mapping[str, str], tensors: dict[str, Entry], name: str, entry: Entry) -> None:
    shard = entry.file.name
    if name in tensors:
        raise CheckpointError(
            f"{index.parent}: {tensors[name].file.name} and {shard} both hold tensor {name}"
        )
    if where.get(name) != shard:
        said = f"says it is in {where[name]}" if name in where else "does not name it"
        raise CheckpointError(
            f"{index}: {shard} holds tensor {name}, but the index {said}; download both again"
        )
    tensors[name] = entry
