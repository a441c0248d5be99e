"""Unpacks the recorded model cases of `tests/golden/models` (packed by `tests/golden/pack.py`) for the
tests.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import struct
import tempfile
from functools import cache
from pathlib import Path

MODELS = Path(__file__).parent / "golden" / "models"
CASES = ("fp32", "official-quant", "nvfp4-experts")


def join_planes(packed: bytes) -> bytes:
    """The safetensors file whose payload bytes were regrouped by position; see `tests/golden/pack.py`."""
    start = 8 + struct.unpack("<Q", packed[:8])[0]
    header = json.loads(packed[8:start])
    header.pop("__metadata__", None)
    groups: dict[str, list[tuple[int, int]]] = {}
    for entry in sorted(header.values(), key=lambda e: e["data_offsets"]):
        groups.setdefault(entry["dtype"], []).append(tuple(entry["data_offsets"]))
    file, position = bytearray(packed), start
    for dtype, ranges in groups.items():
        size = 8 if dtype[-2:] == "64" else 4 if dtype[-2:] == "32" else 2 if dtype[-2:] == "16" else 1
        for byte in range(size):
            for begin, end in ranges:
                count = (end - begin) // size
                file[start + begin + byte : start + end : size] = packed[position : position + count]
                position += count
    return bytes(file)


@cache
def golden_case(name: str) -> Path:
    """Folder with config.json, case.json, model.safetensors and expected.safetensors of a recorded model.

    Unpacked once per machine and content into the temporary folder; any number of processes may ask at once.
    """
    source = MODELS / name
    digest = hashlib.sha256()
    for path in sorted(source.iterdir()):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    root = Path(tempfile.gettempdir()) / f"dsv4c-goldens-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    target = root / f"{name}-{digest.hexdigest()[:16]}"
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as scratch:
        folder = Path(scratch) / "case"
        folder.mkdir()
        for path in source.iterdir():
            if path.suffix == ".xz":
                (folder / path.stem).write_bytes(join_planes(lzma.decompress(path.read_bytes())))
            else:
                shutil.copy(path, folder / path.name)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster, with the same content
                raise
    return target
