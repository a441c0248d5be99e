"""Weight layouts of the GEMV kernels: matrices as units of 16 rows x C columns, in the order the lanes read
them.

A packing is named `format/TxS` (fp8, bf16, mxfp4, nvfp4): T tiles of 16 rows side by side, S units of a tile
in a row. Bytes are [N/16/T][K/C/S][T][S][unit]; rows and columns are padded with zeros to whole units and
tile groups. Block scales of FP4 formats live in the units; FP8 block scales and the NVFP4 global scale stay
where they are. mxfp4_pairs and nvfp4_pairs have the codes of an mma register in one byte, for targets that
convert e2m1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

UNIT_COLUMNS = {"fp8": 128, "bf16": 64, "mxfp4": 128, "nvfp4": 128, "mxfp4_pairs": 128, "nvfp4_pairs": 128}
UNIT_BYTES = {
    "fp8": 2048,
    "bf16": 2048,
    "mxfp4": 1088,
    "nvfp4": 1152,
    "mxfp4_pairs": 1088,
    "nvfp4_pairs": 1152,
}
_BLOCK = {"mxfp4": 32, "nvfp4": 16, "mxfp4_pairs": 32, "nvfp4_pairs": 16}  # columns under one block scale


@dataclass(frozen=True)
class Packing:
    """One layout; `str` and `parse_packing` are inverses."""

    format: str
    tiles: int
    span: int

    def __str__(self) -> str:
        return f"{self.format}/{self.tiles}x{self.span}"

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of one packed matrix."""
        tiles = _round_up(-(-rows // 16), self.tiles)
        units = _round_up(-(-columns // UNIT_COLUMNS[self.format]), self.span)
        return tiles * units * UNIT_BYTES[self.format]


def parse_packing(name: str) -> Packing:
    """The packing of a name. Raises ValueError."""
    match = re.fullmatch(r"(\w+)/(\d+)x(\d+)", name)
    if match is None or match[1] not in UNIT_BYTES:
        raise ValueError(f"unknown packing {name!r}: want format/TxS with format of {', '.join(UNIT_BYTES)}")
    return Packing(match[1], int(match[2]), int(match[3]))


def pack(packing: Packing, data: Tensor, scale: Tensor | None = None) -> Tensor:
    """Packed bytes, uint8 [..., nbytes], of matrices [..., N, K].

    `data` is float8_e4m3fn or bfloat16 [..., N, K], or uint8 [..., N, K/2] with the even element in the low
    nibble; `scale` holds the FP4 block scales: uint8 (ue8m0) [..., N, K/32] or float8_e4m3fn [..., N, K/16].
    Works on any device, one matrix at a time: the temporaries are a few times one matrix.
    """
    if data.ndim > 2:
        scales = [None] * data.shape[0] if scale is None else list(scale)
        return torch.stack([pack(packing, d, s) for d, s in zip(data, scales, strict=True)])
    units = _UNITS[packing.format](data, scale)  # [tiles, units, bytes]
    tiles, count, nbytes = units.shape
    pad_tiles, pad_units = -tiles % packing.tiles, -count % packing.span
    if pad_tiles or pad_units:
        units = torch.nn.functional.pad(units, (0, 0, 0, pad_units, 0, pad_tiles))
    count = units.shape[1] // packing.span
    units = units.reshape(-1, packing.tiles, count, packing.span, nbytes)
    return units.permute(0, 2, 1, 3, 4).reshape(-1)


def unpack(packing: Packing, packed: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
    """`data` and `scale` as `pack` took them, for one matrix of `rows` x `columns`."""
    if packed.numel() != packing.nbytes(rows, columns):
        wanted = packing.nbytes(rows, columns)
        raise ValueError(f"{packing} of {rows}x{columns} is {wanted} bytes, got {packed.numel()}")
    nbytes = UNIT_BYTES[packing.format]
    tiles, units = -(-rows // 16), -(-columns // UNIT_COLUMNS[packing.format])
    count = _round_up(units, packing.span) // packing.span
    grouped = packed.view(-1, count, packing.tiles, packing.span, nbytes).permute(0, 2, 1, 3, 4)
    flat = grouped.reshape(-1, count * packing.span, nbytes)[:tiles, :units]
    data, scale = _MATRICES[packing.format](flat)
    per_byte = 2 if packing.format in _BLOCK else 1
    data = data[:rows, : columns // per_byte].contiguous()
    if scale is not None:
        scale = scale[:rows, : -(-columns // _BLOCK[packing.format])].contiguous()
    return data, scale


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """x with its two dimensions padded by zeros to multiples."""
    down, right = -x.shape[0] % rows, -x.shape[1] % columns
    return torch.nn.functional.pad(x, (0, right, 0, down)) if down or right else x


# Units of each format: [tiles, units, bytes]. Lane 4g + q of a warp works on rows g and g + 8.


def _fp8_units(data: Tensor, scale: Tensor | None) -> Tensor:
    x = _padded(data.view(torch.uint8), 16, 128)
    # [tile, half, g, unit, chunk of 32, q, 8 columns]: a lane's 16 bytes are row g, then row g + 8
    x = x.view(-1, 2, 8, x.shape[1] // 128, 4, 4, 8).permute(0, 3, 4, 2, 5, 1, 6)
    return x.reshape(x.shape[0], x.shape[1], 2048)


def _fp8_matrix(units: Tensor) -> tuple[Tensor, None]:
    tiles, count, _ = units.shape
    x = units.reshape(tiles, count, 4, 8, 4, 2, 8).permute(0, 5, 3, 1, 2, 4, 6)
    return x.reshape(tiles * 16, count * 128).view(torch.float8_e4m3fn), None


def _bf16_units(data: Tensor, scale: Tensor | None) -> Tensor:
    x = _padded(data.view(torch.int16), 16, 64)
    # [tile, half, g, unit, chunk, q, step, pair, 2]: a lane's 16 bytes of one mma are a0..a3 = (pair, half)
    x = x.view(-1, 2, 8, x.shape[1] // 64, 2, 4, 2, 2, 2).permute(0, 3, 4, 6, 2, 5, 7, 1, 8)
    return x.reshape(x.shape[0], x.shape[1], 1024).view(torch.uint8)


def _bf16_matrix(units: Tensor) -> tuple[Tensor, None]:
    tiles, count, _ = units.shape
    x = units.contiguous().view(torch.int16).reshape(tiles, count, 2, 2, 8, 4, 2, 2, 2)
    x = x.permute(0, 7, 4, 1, 2, 5, 3, 6, 8)
    return x.reshape(tiles * 16, count * 64).view(torch.bfloat16), None


# Where the sign and the magnitude of the codes of mma registers a0..a3 sit in a 16-bit half of an FP4 word:
# chosen so that each register comes out as e2m1 bits of an f16 with at most two shifts.
_PLACES = ((15, 9), (7, 1), (8, 4), (0, 12))


def _fp4_words(data: Tensor, pairs: bool = False) -> Tensor:
    """Codes of one matrix as the words of its units, int32 [tiles, units, 2, 8 g, 4 q, 4]; with `pairs`,
    byte n of a word is register n's two codes.
    """
    packed = _padded(data, 16, 64)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).to(torch.int32)
    # [tile, half, g, unit, 64-chunk, 32-chunk, q, step, pair, element]
    codes = codes.view(-1, 2, 8, codes.shape[1] // 128, 2, 2, 4, 2, 2, 2)
    if pairs:
        words = torch.zeros_like(codes[:, 0, ..., 0, 0])
        for register in range(4):
            code = codes[:, register % 2, ..., register // 2, :]
            words |= (code[..., 0] | code[..., 1] << 4) << 8 * register
        return _by_lane(words)
    halves: Tensor | int = 0
    for register, (sign, magnitude) in enumerate(_PLACES):
        code = codes[
            :, register % 2, ..., register // 2, :
        ]  # a0, a2: row g; a1, a3: row g + 8; a0, a1: first pair
        halves = halves | (code >> 3) << sign | (code & 7) << magnitude
    assert isinstance(halves, Tensor)
    words = halves[..., 0] | halves[..., 1] << 16  # [tile, g, unit, 64-chunk, 32-chunk, q, step]
    return _by_lane(words)


def _by_lane(words: Tensor) -> Tensor:
    """Words [tile, g, unit, 64-chunk, 32-chunk, q, step] as lanes read them."""
    return words.permute(0, 2, 3, 1, 5, 4, 6).reshape(words.shape[0], words.shape[2], 2, 8, 4, 4)


def _fp4_data(words: Tensor, pairs: bool = False) -> Tensor:
    """The packed codes back, uint8 [rows, columns / 2], from int32 words [tiles, units, 2, 8, 4, 4]."""
    tiles, count = words.shape[:2]
    words = words.view(tiles, count, 2, 8, 4, 2, 2).permute(0, 3, 1, 2, 5, 4, 6)
    halves = torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF], dim=-1)
    codes = torch.empty(tiles, 2, *halves.shape[1:-1], 2, 2, dtype=torch.uint8, device=words.device)
    for register, (sign, magnitude) in enumerate(_PLACES):
        if pairs:
            code = torch.stack([words >> 8 * register & 15, words >> 8 * register + 4 & 15], dim=-1)
        else:
            code = (halves >> sign & 1) << 3 | halves >> magnitude & 7
        codes[:, register % 2, ..., register // 2, :] = code.to(torch.uint8)
    flat = codes.reshape(tiles * 16, count * 64, 2)
    return flat[..., 0] | flat[..., 1] << 4


def _fp4_units(words: Tensor, scales: Tensor) -> Tensor:
    tiles, count = words.shape[:2]
    codes = words.contiguous().view(torch.uint8).reshape(tiles, count, 1024)
    return torch.cat([codes, scales.reshape(tiles, count, -1)], dim=-1)


def _mxfp4_units(data: Tensor, scale: Tensor | None, pairs: bool = False) -> Tensor:
    assert scale is not None, "mxfp4 units carry their block scales"
    scale = _padded(scale, 16, 4)
    scales = scale.view(-1, 2, 8, scale.shape[1] // 4, 4).permute(
        0, 3, 2, 4, 1
    )  # [tile, unit, g, block, half]
    return _fp4_units(_fp4_words(data, pairs), scales)


def _mxfp4_matrix(units: Tensor, pairs: bool = False) -> tuple[Tensor, Tensor]:
    tiles, count, _ = units.shape
    scale = units[..., 1024:].reshape(tiles, count, 8, 4, 2).permute(0, 4, 2, 1, 3)
    words = units[..., :1024].contiguous().view(torch.int32).view(tiles, count, 2, 8, 4, 4)
    return _fp4_data(words, pairs), scale.reshape(tiles * 16, count * 4)


def _nvfp4_units(data: Tensor, scale: Tensor | None, pairs: bool = False) -> Tensor:
    assert scale is not None, "nvfp4 units carry their block scales"
    scale = _padded(scale.view(torch.uint8), 16, 8)
    # [tile, half, g, unit, chunk of 32, half chunk] -> [tile, unit, g, half chunk, chunk, half]
    scales = scale.view(-1, 2, 8, scale.shape[1] // 8, 4, 2).permute(0, 3, 2, 5, 4, 1)
    return _fp4_units(_fp4_words(data, pairs), scales)


def _nvfp4_matrix(units: Tensor, pairs: bool = False) -> tuple[Tensor, Tensor]:
    tiles, count, _ = units.shape
    scale = units[..., 1024:].reshape(tiles, count, 8, 2, 4, 2).permute(0, 5, 2, 1, 4, 3)
    words = units[..., :1024].contiguous().view(torch.int32).view(tiles, count, 2, 8, 4, 4)
    return _fp4_data(words, pairs), scale.reshape(tiles * 16, count * 8).view(torch.float8_e4m3fn)


_UNITS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "fp8": _fp8_units,
    "bf16": _bf16_units,
    "mxfp4": _mxfp4_units,
    "nvfp4": _nvfp4_units,
    "mxfp4_pairs": partial(_mxfp4_units, pairs=True),
    "nvfp4_pairs": partial(_nvfp4_units, pairs=True),
}
_MATRICES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor | None]]] = {
    "fp8": _fp8_matrix,
    "bf16": _bf16_matrix,
    "mxfp4": _mxfp4_matrix,
    "nvfp4": _nvfp4_matrix,
    "mxfp4_pairs": partial(_mxfp4_matrix, pairs=True),
    "nvfp4_pairs": partial(_nvfp4_matrix, pairs=True),
}
