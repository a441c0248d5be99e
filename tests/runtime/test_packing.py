"""Packed weights: unpack is the inverse of pack, and a lane finds its operands where the kernels look for
them.
"""

import pytest
import torch

from dsv4c.numerics.forms import Packing, parse_packing
from dsv4c.numerics.packing import pack, unpack

REVERSED = (
    0,
    4,
    2,
    6,
    1,
    5,
    3,
    7,
)  # the first of the two rows of an FP4 unit that lanes 4g..4g+3 work on, by g


def _matrix(format: str, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(rows * 7 + columns)

    def bytes_(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    if format == "fp8":
        return bytes_(rows, columns).view(torch.float8_e4m3fn), None
    if format == "bf16":
        return bytes_(rows, 2 * columns).view(torch.bfloat16), None
    if format.startswith("mxfp4"):
        return bytes_(rows, columns // 2), bytes_(rows, columns // 32)
    return bytes_(rows, columns // 2), bytes_(rows, columns // 16).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("format", ["fp8", "bf16", "mxfp4", "nvfp4", "mxfp4_pairs", "nvfp4_pairs"])
@pytest.mark.parametrize(
    ("rows", "columns", "tiles", "span"),
    [(16, 128, 1, 1), (128, 1024, 8, 2), (64, 512, 2, 4), (48, 256, 2, 1)],  # the last one pads a tile group
)
def test_unpack_inverts_pack(format: str, rows: int, columns: int, tiles: int, span: int) -> None:
    packing = Packing(format, tiles, span)
    data, scale = _matrix(format, rows, columns)
    packed = pack(packing, data, scale)
    assert packed.dtype is torch.uint8
    assert packed.numel() == packing.nbytes(rows, columns)
    data2, scale2 = unpack(packing, packed, rows, columns)
    assert torch.equal(data.view(torch.uint8), data2.view(torch.uint8))
    if scale is not None:
        assert scale2 is not None
        assert torch.equal(scale.view(torch.uint8), scale2.view(torch.uint8))


def test_bf16_columns_are_padded_with_zeros() -> None:
    packing = Packing("bf16", 1, 1)
    data, _ = _matrix("bf16", 48, 96)
    packed = pack(packing, data)
    assert packed.numel() == 3 * 2 * 2048
    assert torch.equal(unpack(packing, packed, 48, 96)[0].view(torch.int16), data.view(torch.int16))
    assert not unpack(packing, packed, 48, 128)[0][:, 96:].view(torch.int16).any()


@pytest.mark.parametrize("format", ["mxfp4_pairs", "nvfp4_pairs"])
def test_a_byte_of_a_pairs_word_is_a_register_as_the_matrix_holds_it(format: str) -> None:
    data, scale = _matrix(format, 16, 128)
    words = pack(Packing(format, 1, 1), data, scale)[:1024].view(2, 8, 4, 4, 4)  # 64-chunk, g, q, word, byte
    c64, g, q, half, step = 1, 5, 3, 1, 1
    word = words[c64, g, q, 2 * half + step]
    first = (64 * c64 + 32 * half + 8 * q + 4 * step) // 2  # byte of the lane's column
    assert word.tolist() == [data[REVERSED[g] + 8 * (r % 2), first + r // 2] for r in range(4)]  # a0..a3


@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (256, 1024), (208, 768)])
def test_stages_of_tcgen05_hold_swizzled_codes_and_atoms_of_scales(rows: int, columns: int) -> None:
    packing = parse_packing("nvfp4_mma/8x2")
    data, scale = _matrix("nvfp4", rows, columns)
    packed = pack(packing, data, scale)
    assert packed.numel() == packing.nbytes(rows, columns)
    assert scale is not None
    for r, byte in ((0, 0), (77, 5), (rows - 1, columns // 2 - 1), (100, columns // 2 - 20)):
        stage = packed.view(-1, columns // 256, 18432)[r // 128, byte // 128]
        row, piece = r % 128, byte % 128 // 16
        assert stage[row * 128 + (piece ^ row % 8) * 16 + byte % 16] == data[r, byte]
        block = byte // 8  # 16 columns each
        at = 16384 + block % 16 // 4 * 512 + row % 32 * 16 + row // 32 * 4 + block % 4
        assert stage[at] == scale.view(torch.uint8)[r, block]
    data2, scale2 = unpack(packing, packed, rows, columns)
    assert scale2 is not None
    assert torch.equal(data, data2)
    assert torch.equal(scale.view(torch.uint8), scale2.view(torch.uint8))


@pytest.mark.parametrize("format", ["fp8", "bf16"])
def test_rows_of_a_unit_are_swizzled_as_wgmma_reads_them(format: str) -> None:
    data, _ = _matrix(format, 16, 128 if format == "fp8" else 64)
    unit = pack(Packing(format, 1, 1), data).view(16, 8, 16)
    pieces = data.view(torch.uint8).view(16, 8, 16)
    for row, piece in ((0, 3), (5, 6), (8, 0), (14, 1)):
        assert torch.equal(unit[row, piece ^ row % 8], pieces[row, piece])


def test_lanes_that_read_a_unit_together_meet_in_no_bank() -> None:
    """Loads of 16 bytes, a quarter of a warp at a time."""
    for first in range(0, 32, 8):
        for chunk in range(2):
            rows = [(REVERSED[lane // 4], lane % 4) for lane in range(first, first + 8)]
            assert len({(4 * chunk + q ^ row) % 8 for row, q in rows}) == 8


def test_fp4_word_expands_to_the_registers_of_one_mma() -> None:
    """The kernel's logic operations on a word give f16 values of e2m1 * 2^-14 in mma register order."""
    data, scale = _matrix("mxfp4", 16, 128)
    words = (
        pack(Packing("mxfp4", 1, 1), data, scale)[:1024].view(torch.int32).view(2, 8, 4, 4).to(torch.int64)
    )
    codes = torch.stack([data & 15, data >> 4], dim=-1).flatten(-2).long()
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([values, -values])[codes]
    chunk, g, q, j = 1, 6, 2, 3
    word = words[chunk, g, q, j].item() & 0xFFFFFFFF

    def f16(register: int) -> list[float]:
        halves = torch.tensor([register & 0xFFFF, register >> 16 & 0xFFFF], dtype=torch.int32).to(torch.int16)
        return (halves.view(torch.float16).float() * 2**14).tolist()

    a0 = word & 0x8E008E00
    a1 = word << 8 & 0x8E008E00
    a2 = word << 7 & 0x80008000 | word << 5 & 0x0E000E00
    a3 = word << 15 & 0x80008000 | word >> 3 & 0x0E000E00
    k = 64 * chunk + 32 * (j // 2) + 8 * q + 4 * (j % 2)
    row = REVERSED[g]
    assert f16(a0) == values[row, k : k + 2].tolist()
    assert f16(a1) == values[row + 8, k : k + 2].tolist()
    assert f16(a2) == values[row, k + 2 : k + 4].tolist()
    assert f16(a3) == values[row + 8, k + 2 : k + 4].tolist()


def test_steps_of_a_tile_group_are_side_by_side() -> None:
    """Two tiles, span 2: units 0-1 of tile 0, units 0-1 of tile 1, units 2-3 of tile 0, ..."""
    data, _ = _matrix("fp8", 32, 512)
    packed = pack(Packing("fp8", 2, 2), data).view(2, 2, 2, 2048)
    alone = pack(Packing("fp8", 1, 1), data).view(2, 4, 2048)
    for step in range(2):
        for tile in range(2):
            assert torch.equal(packed[step, tile], alone[tile, 2 * step : 2 * step + 2])


def test_names_round_trip_and_bad_ones_are_refused() -> None:
    assert str(parse_packing("nvfp4/2x4")) == "nvfp4/2x4"
    with pytest.raises(ValueError, match=r"fp9/1x1.*fp8, bf16"):
        parse_packing("fp9/1x1")
    with pytest.raises(ValueError, match="is 2048 bytes, got 10"):
        unpack(Packing("fp8", 1, 1), torch.zeros(10, dtype=torch.uint8), 16, 128)


def test_experts_are_packed_one_after_the_other() -> None:
    data, scale = _matrix("mxfp4", 96, 128)
    packed = pack(
        Packing("mxfp4", 1, 1), data.view(3, 32, 64), scale.view(3, 32, 4) if scale is not None else None
    )
    assert packed.shape == (3, 2 * 1088)
    assert torch.equal(packed[1], pack(Packing("mxfp4", 1, 1), data[32:64], scale[32:64]))  # type: ignore[index]
