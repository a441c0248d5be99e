"""How weights are packed for kernels: names and sizes. Standard library only; `packing` does it.

A packing is named `format/TxS`: matrices as units of 16 rows x C columns, T tiles of 16 rows side by side, S
units of a tile in a row. mxfp4_pairs and nvfp4_pairs have the codes of an mma register in one byte, for
targets that convert e2m1. nvfp4_mma/8x2 has stages of 128 rows x 256 columns for tcgen05 in place of units.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

UNIT_COLUMNS = {
    "fp8": 128,
    "bf16": 64,
    "mxfp4": 128,
    "nvfp4": 128,
    "mxfp4_pairs": 128,
    "nvfp4_pairs": 128,
    "nvfp4_mma": 128,
}
"""Columns of a unit, which has 16 rows."""

UNIT_BYTES = {
    "fp8": 2048,
    "bf16": 2048,
    "mxfp4": 1088,
    "nvfp4": 1152,
    "mxfp4_pairs": 1088,
    "nvfp4_pairs": 1152,
    "nvfp4_mma": 1152,
}
"""Bytes of a unit, block scales of FP4 formats included."""


@dataclass(frozen=True)
class Packing:
    """One layout; `str` and `parse_packing` are inverses."""

    format: str
    tiles: int
    span: int

    def __str__(self) -> str:
        return f"{self.format}/{self.tiles}x{self.span}"

    @property
    def holds_scales(self) -> bool:
        """Do the units hold the block scales, too?"""
        return self.format.startswith(("mxfp4", "nvfp4"))

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of one packed matrix: whole tiles, T at a time, and whole units, S at a time."""
        tiles = _round_up(-(-rows // 16), self.tiles)
        units = _round_up(-(-columns // UNIT_COLUMNS[self.format]), self.span)
        return tiles * units * UNIT_BYTES[self.format]


def parse_packing(name: str) -> Packing:
    """The packing of a name. Raises ValueError."""
    match = re.fullmatch(r"(\w+)/(\d+)x(\d+)", name)
    if match is None or match[1] not in UNIT_BYTES:
        raise ValueError(f"unknown packing {name!r}: want format/TxS with format of {', '.join(UNIT_BYTES)}")
    return Packing(match[1], int(match[2]), int(match[3]))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
