"""What safetensors files say they hold: headers and indexes, believed only if sound from end to end.

Every doubt is a CheckpointError that names file and tensor, what was found and what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv4c import strict_json
from dsv4c.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # the format's own limit

ELEMENT_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
ELEMENT_BYTES |= {"I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4}
ELEMENT_BYTES |= {"I64": 8, "U64": 8, "F64": 8}
"""Bytes of the format's element types."""


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


def read_entries(path: Path) -> dict[str, Entry]:
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
    for file in (single, index):
        if file.is_symlink():
            raise CheckpointError(f"{file}: leads to {file.readlink()}, where nothing is; download it again")
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
    if dtype not in ELEMENT_BYTES:
        raise CheckpointError(
            f"{file}: tensor {name} has the unknown dtype {dtype!r}; known: {', '.join(ELEMENT_BYTES)}"
        )
    needed = math.prod(shape) * ELEMENT_BYTES[dtype]
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


def find_entry(folder: Path, fits: Callable[[str], bool]) -> Entry | None:
    """The first tensor of a checkpoint folder whose name fits; None without one, or without a checkpoint.

    Reads one file's header, however many shards there are. Raises CheckpointError if that is not sound.
    """
    single, index = folder / SINGLE, folder / INDEX
    if index.is_file():
        shards = _weight_map(index)
        found = next((tensor for tensor in shards if fits(tensor)), None)
        return None if found is None else read_header(folder / shards[found]).get(found)
    entries = read_header(single) if single.is_file() else {}
    return next((entry for entry in entries.values() if fits(entry.name)), None)


def _weight_map(index: Path) -> dict[str, str]:
    """File by tensor, as an index has it; the files lie next to the index."""
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
    foreign = sorted(shard for shard in where.values() if Path(shard).name != shard)
    if foreign:
        raise CheckpointError(f"{index}: names the shard {foreign[0]!r}; expected files next to the index")
    return where


def _read_index(index: Path) -> dict[str, Entry]:
    """Tensors of all shards that an index names, which must agree with the index both ways."""
    where = _weight_map(index)
    shards = sorted(set(where.values()))
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
