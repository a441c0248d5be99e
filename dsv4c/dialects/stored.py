"""What the tensors beside a config say of formats that it leaves open. Reads a header or two, no payload."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from dsv4c.dialects.reading import Reading
from dsv4c.errors import CheckpointError
from dsv4c.headers import Entry, find_entry
from dsv4c.scope import LAYERS, Scope

# Tensors inside a layer, in the spellings that begin with "layers." and with "model.layers.".
LINEAR = re.compile(r"(attn\.wq_a|self_attn\.q_a_proj)\.weight")
EXPERT = re.compile(r"ffn\.experts\.\d+\.w1\.weight|mlp\.experts\.gate_up_proj")
NVFP4_SCALE = re.compile(r"ffn\.experts\.\d+\.w1\.weight_scale")

PLAIN = {"BF16": "bf16", "F32": "bf16"}
LINEARS = PLAIN | {"F8_E4M3": "fp8"}
EXPERTS = LINEARS | {"I8": "mxfp4", "U8": "mxfp4"}
"""Element type of a weight -> ModelConfig.linear_format or .expert_format."""


def settle(reading: Reading, folder: Path | None) -> None:
    """Give the fields that `reading` leaves open what the checkpoint in `folder` has, and note it."""
    for name, said in reading.open.items():
        found = None if folder is None else _stored(folder, name)
        if found is not None:
            entry, stored = found
            if reading.fields.get(name) != stored:
                why = f"the config leaves it open and {entry.name} is {entry.dtype}"
                reading.notes.append(f"{name} {stored} was taken, as {why}")
            reading.fields[name] = stored
        elif name not in reading.fields:
            reading.problems.append(said)
            reading.refused.add(name)
        elif said:
            reading.notes.append(said)


def _stored(folder: Path, name: str) -> tuple[Entry, str] | None:
    """A tensor that decides the format, and the format; None where none does."""
    try:
        if name == "linear_format":
            return _format(_find(folder, LINEAR), LINEARS)
        nvfp4 = _find(folder, NVFP4_SCALE)
        return (nvfp4, "nvfp4") if nvfp4 is not None else _format(_find(folder, EXPERT), EXPERTS)
    except CheckpointError:  # a checkpoint that is not whole tells nothing; who reads its weights will say so
        return None


def _find(folder: Path, path: re.Pattern[str]) -> Entry | None:
    """The first tensor of a main layer whose path fits."""

    def fits(tensor: str) -> bool:
        scope = Scope.of(tensor.removeprefix("model."))
        return scope.block == LAYERS and path.fullmatch(scope.path) is not None

    return find_entry(folder, fits)


def _format(entry: Entry | None, formats: Mapping[str, str]) -> tuple[Entry, str] | None:
    return None if entry is None or entry.dtype not in formats else (entry, formats[entry.dtype])
