"""Recorded cases for the tests: where they lie, and how a result is compared with them.

A case is read from the complete recordings where they are at hand (the folder that DSV4C_GOLDENS names, or
`shared/goldens` beside the repository), otherwise from what `tests/golden/pack.py` packed into the
repository. DSV4C_GOLDENS= (empty) asks for the packed ones.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

RECORDED = Path(__file__).parent / "golden" / "recorded"
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


def complete_cases() -> Path | None:
    """The folder of the complete recordings, if there is one."""
    named = os.environ.get("DSV4C_GOLDENS")
    if named is not None:
        return Path(named) if named else None
    beside = Path(__file__).parents[2] / "shared" / "goldens"
    return beside if beside.is_dir() else None


def golden_case(name: str) -> Path:
    """Folder with case.json and expected.safetensors, of a model also config.json and model.safetensors."""
    complete = complete_cases()
    return complete / name if complete else packed_case(name)


@cache
def packed_case(name: str) -> Path:
    """The case as the repository has it.

    Unpacked once per machine and content into the temporary folder; any number of processes may ask at once.
    """
    source = RECORDED / name
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
        other = json.loads((folder / "case.json").read_text()).get("weights_of")
        if other is not None:
            models = [path / "model.safetensors" for path in (packed_case(other), folder)]
            theirs, ours = map(load_file, models)
            added = {n: t for n, t in theirs.items() if not n.startswith("mtp.")} | ours
            save_file(added, models[1], {"format": "pt"})
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster, with the same content
                raise
    return target


@dataclass(frozen=True)
class Run:
    """One recorded sequence: the first `prefill` tokens went in at once, the rest one by one."""

    name: str
    ids: tuple[int, ...]
    prefill: int


@dataclass(frozen=True)
class Recorded:
    """A recorded model and how far a result is from it."""

    case: str

    @property
    def folder(self) -> Path:
        return golden_case(self.case)

    @cached_property
    def description(self) -> dict[str, Any]:
        return json.loads((self.folder / "case.json").read_text())

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "expected.safetensors")

    @cached_property
    def packed_names(self) -> frozenset[str]:
        """What a comparison must cover at least: the recorded tensors that the repository has."""
        return frozenset(load_file(packed_case(self.case) / "expected.safetensors"))

    @property
    def tolerance(self) -> dict[str, Any]:
        return self.description["tolerance"]

    @cached_property
    def probe_rows(self) -> list[int]:
        return self.description["probe_rows"]

    def run(self, name: str = "main") -> Run:
        run = next(r for r in self.description["runs"] if r["name"] == name)
        return Run(name, tuple(run["ids"]), run["prefill"])

    def rows(self, name: str, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`value` (a row per token, or per probe row) and the recorded tensor, at the rows both have."""
        expected = self.tensors[name]
        if len(value) > len(expected):
            value = value[self.probe_rows]
        elif len(value) < len(expected):
            expected = expected[self.probe_rows]
        assert value.shape == expected.shape, name
        return value, expected

    def distances(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """|value - recorded| / |recorded| of every row, float64."""
        value, expected = self.rows(name, value)
        difference = (value.double() - expected.double()).flatten(1).norm(dim=1)
        return difference / expected.double().flatten(1).norm(dim=1)

    def distance(self, name: str, value: torch.Tensor) -> float:
        """|value - recorded| / |recorded| over the whole tensor."""
        value, expected = self.rows(name, value)
        return float((value.double() - expected.double()).norm() / expected.double().norm())

    def exceeded(
        self, name: str, value: torch.Tensor, bounds: Mapping[str, float]
    ) -> dict[str, tuple[float, float]]:
        """Statistics of the rows' distances (median, p95, max; rms of the tensor) that exceed their bound."""
        rows = self.distances(name, value)
        found = {
            "median": float(rows.median()),
            "p95": float(rows.quantile(0.95)),
            "max": float(rows.max()),
            "rms": self.distance(name, value),
        }
        return {key: (found[key], bound) for key, bound in bounds.items() if not found[key] <= bound}

    def deviation(self, prefix: str, name: str, values: Mapping[str, torch.Tensor]) -> float:
        """Distance of one recorded tensor of a layer, as the model's `values` go by the recorded names.

        Selections are sets, and equal (0) or not (infinity); weights belong to their experts; of the caches'
        rows and the scores' columns the first ones were recorded; scores must be -inf in the same places.
        """
        value, expected = values[name], self.tensors[f"{prefix}.{name}"]
        if name in ("index_sel", "router_idx"):
            return 0.0 if self.same_sets(f"{prefix}.{name}", value) else math.inf
        if name in ("entries", "index_keys"):
            return self.distance(f"{prefix}.{name}", value[: len(expected)])
        value, expected = self.rows(f"{prefix}.{name}", value[:, : expected.shape[1]])
        if name == "router_w":
            pair = self.rows(f"{prefix}.router_idx", values["router_idx"])
            value, expected = (
                w.gather(1, experts.long().argsort(dim=1))
                for w, experts in zip((value, expected), pair, strict=True)
            )
        if name == "index_scores":
            if not torch.equal(value.isinf(), expected.isinf()):
                return math.inf
            value, expected = (x.masked_fill(expected.isinf(), 0) for x in (value, expected))
        return float((value.double() - expected.double()).norm() / expected.double().norm())

    def same_sets(self, name: str, value: torch.Tensor) -> bool:
        """Are the selections of every row equal, whatever their order?"""
        value, expected = self.rows(name, value)
        return torch.equal(value.sort(dim=1).values, expected.sort(dim=1).values)


@cache
def recorded(case: str) -> Recorded:
    return Recorded(case)
