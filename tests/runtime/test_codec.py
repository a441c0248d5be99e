"""The codec against recorded kernels, a scalar reimplementation, and the corners of every format."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dsv4c.numerics.codec import (
    POISON_INT,
    ConversionError,
    Quantized,
    convert,
    decode_data,
    decode_e2m1,
    decode_ue8m0,
    dequantize,
    encode_e2m1,
    nan_fill,
    quantize,
    round_once,
    type_of,
    view,
)
from dsv4c.types import (
    BF16,
    E2M1,
    E4M3,
    F16,
    F32,
    FP8_ROW,
    FP8_WEIGHT,
    I32,
    I64,
    KV_FP8,
    MXFP4,
    NVFP4,
    NVFP4_ROW,
    U8,
    UE8M0,
    GlobalScale,
    QuantFormat,
    QuantType,
    TensorType,
    parse_type,
)
from tests.goldens import golden_case

GOLDEN = load_file(golden_case("kernels") / "expected.safetensors")
FORMATS = [FP8_WEIGHT, FP8_ROW, MXFP4, NVFP4, NVFP4_ROW, KV_FP8, QuantFormat(E4M3, F32, (128, 128))]
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


def same_parts(a: Quantized, b: Quantized) -> bool:
    return a.format == b.format and all(map(same_bits, a.parts, b.parts)) and len(a.parts) == len(b.parts)


# --- recorded kernels ---


def test_fp8_rows_match_the_recorded_kernel() -> None:
    q = quantize(GOLDEN["act_quant.x"], FP8_ROW)
    assert same_bits(q.data, GOLDEN["act_quant.q"])
    assert torch.equal(decode_ue8m0(q.scale), GOLDEN["act_quant.scale"])


@pytest.mark.parametrize(
    ("name", "format"), [("kv_sim", QuantFormat(E4M3, UE8M0, (1, 64))), ("fp4_sim", MXFP4)]
)
def test_round_trips_match_the_recorded_kernels(name: str, format: QuantFormat) -> None:
    assert same_bits(dequantize(quantize(GOLDEN[f"{name}.x"], format), torch.bfloat16), GOLDEN[f"{name}.y"])


def test_nvfp4_matches_the_recorded_kernel() -> None:
    x = GOLDEN["nvfp4.x"]
    for q in (
        quantize(x, NVFP4, GOLDEN["nvfp4.input_scale"]),
        quantize(x, NVFP4_ROW, GOLDEN["nvfp4.input_scale"].expand(len(x))),
    ):
        assert same_bits(q.data, GOLDEN["nvfp4.x_q"])
        assert same_bits(q.scale, GOLDEN["nvfp4.x_scale"])


# --- rounding ---


def test_e2m1_rounds_to_nearest_with_ties_to_even_codes() -> None:
    x = torch.cat([torch.linspace(0, 7, 14 * 16 + 1), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])])
    x = torch.cat([x, torch.nextafter(x, torch.tensor(9.0)), torch.nextafter(x, torch.tensor(0.0))])
    x = torch.cat([x, x[:1]]) if len(x) % 2 else x
    codes = range(8)
    expected = [min(codes, key=lambda c: (abs(FP4_VALUES[c] - v), c % 2)) for v in x.tolist()]
    assert decode_e2m1(encode_e2m1(x)).tolist() == [FP4_VALUES[c] for c in expected]
    assert decode_e2m1(encode_e2m1(-x)).tolist() == [-FP4_VALUES[c] for c in expected]


def test_e2m1_packs_the_even_element_low_and_keeps_the_sign_of_zero() -> None:
    packed = encode_e2m1(torch.tensor([0.5, -6.0, -0.0, 100.0]))
    assert packed.tolist() == [0xF1, 0x78]
    assert torch.signbit(decode_e2m1(packed)).tolist() == [False, True, True, False]


def test_ue8m0_covers_every_byte() -> None:
    values = decode_ue8m0(torch.arange(256, dtype=torch.uint8))
    assert values[:255].tolist() == [2.0 ** (b - 127) for b in range(255)]
    assert values[255].isnan()


@settings(deadline=None, max_examples=300)
@given(
    st.floats(allow_nan=False, allow_infinity=False, width=64),
    st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_round_once_is_correctly_rounded(x: float, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    got = round_once(torch.tensor([x], dtype=torch.float64), dtype)
    if abs(x) > largest:
        assert abs(got.item()) >= largest
        return
    step = torch.tensor(1, dtype=torch.int16)
    near = [(got.view(torch.int16) + k * step).view(dtype).item() for k in (-1, 1)]
    distance = abs(Fraction(got.item()) - Fraction(x))
    for other in (n for n in near if math.isfinite(n)):
        gap = abs(Fraction(other) - Fraction(x))
        assert (
            distance < gap
            or (distance == gap and got.view(torch.int16).item() % 2 == 0)
            or other == got.item()
        )


def test_round_once_does_not_round_twice() -> None:
    above_tie = 1 + 2.0**-8 + 2.0**-40  # f32 rounds it to the tie 1 + 2^-8, which bf16 sends down to 1
    x = torch.tensor([above_tie, -above_tie, 1 + 2.0**-8, math.nan, math.inf, -0.0], dtype=torch.float64)
    assert round_once(x, torch.bfloat16)[:3].tolist() == [1 + 2.0**-7, -1 - 2.0**-7, 1.0]
    assert round_once(x[3:], torch.bfloat16).isnan().tolist() == [True, False, False]
    assert same_bits(round_once(x[4:], torch.bfloat16), x[4:].to(torch.bfloat16))


# --- quantize ---


def naive_scale(amax: float, format: QuantFormat) -> float:
    """Block scale by exact arithmetic on fractions; ue8m0 and f32 formats."""
    floor = 1e-4 if format.value is E4M3 else 6 * 2.0**-126
    a = max(amax, torch.tensor(floor).item())
    if format.scale is F32:
        return (torch.tensor(a) / format.largest).item()
    exponent = math.frexp(a)[1] - 12
    while Fraction(format.largest) * Fraction(2) ** exponent < Fraction(a):
        exponent += 1
    return 2.0**exponent


@pytest.mark.parametrize("format", [FP8_WEIGHT, FP8_ROW, MXFP4, QuantFormat(E4M3, F32, (2, 4))])
@pytest.mark.parametrize("shape", [(130, 140), (2, 66, 34), (7, 256)])
def test_scales_cover_their_blocks_and_data_is_nearest(format: QuantFormat, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, shape[-1])
    x[..., 0, :] = 0
    q = quantize(x, format)
    rows, columns = format.block
    assert q.scale.shape == (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))
    scales = decode_ue8m0(q.scale) if format.scale is UE8M0 else q.scale
    spread = torch.empty(shape)
    for *lead, i, j in torch.cartesian_prod(*map(torch.arange, scales.shape)).tolist():
        block = (*lead, slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
        expected = naive_scale(x[block].abs().max().item(), format)
        assert scales[(*lead, i, j)].item() == expected
        spread[block] = expected
    if format.value is E4M3:
        assert same_bits(q.data, (x / spread).clamp(-448, 448).to(torch.float8_e4m3fn))
    else:
        assert same_bits(q.data, encode_e2m1(x / spread))
    assert torch.equal(dequantize(q, torch.float64), decode_data(q).double() * spread.double())


@pytest.mark.parametrize(("format", "top"), [(FP8_ROW, 448.0), (MXFP4, 6.0)])
def test_exact_powers_of_two_are_not_bumped(format: QuantFormat, top: float) -> None:
    exact = torch.tensor([top * 2.0**k for k in range(-12, 12)])
    for x, bump in ((exact, 0), (torch.nextafter(exact, torch.tensor(math.inf)), 1)):
        wide = torch.zeros(len(x), 32)
        wide[:, 5] = x
        assert quantize(wide, format).scale[:, 0].tolist() == [127 + k + bump for k in range(-12, 12)]


def test_values_below_the_scale_floor() -> None:
    q = quantize(torch.tensor([[1e-4], [1e-5], [0.0], [-0.0]]).expand(4, 128), FP8_ROW)
    assert len(set(q.scale.flatten().tolist())) == 1
    assert q.data[2:].view(torch.uint8)[:, 0].tolist() == [0x00, 0x80]
    q = quantize(torch.tensor([[6 * 2.0**-126], [2.0**-140], [0.0], [-0.0]]).expand(4, 32), MXFP4)
    assert q.scale.flatten().tolist() == [1, 1, 1, 1]
    assert q.data[:, 0].tolist() == [0x77, 0x00, 0x00, 0x88]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_nan_makes_its_block_nan_and_no_other(format: QuantFormat) -> None:
    x = torch.randn(256, 256)
    x[130, 3] = math.nan
    given = torch.full((256,) if format == NVFP4_ROW else (), 0.01) if format.value is E2M1 else None
    q = quantize(x, format, given if format.global_scale is not GlobalScale.NONE else None)
    y = dequantize(q)
    assert y[130, 3].isnan()
    rows, columns = format.block
    expected = torch.zeros(256, 256, dtype=torch.bool)
    expected[130 // rows * rows :, :columns][:rows] = True
    assert torch.equal(y.isnan(), expected)


@pytest.mark.parametrize("format", [NVFP4, NVFP4_ROW], ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_nvfp4_zero_blocks_are_zero(format: QuantFormat, given: bool) -> None:
    x = torch.randn(4, 64)
    x[1], x[2, 16:32], x[3] = 0, 0, -0.0
    lead = (4,) if format == NVFP4_ROW else ()
    y = dequantize(quantize(x, format, torch.full(lead, 0.25) if given else None))
    assert torch.equal(y[1], torch.zeros(64))
    assert torch.equal(y[2, 16:32], torch.zeros(16))
    assert y.isfinite().all()
    zeros = quantize(torch.zeros(4, 64), format)
    assert torch.equal(dequantize(zeros), torch.zeros(4, 64))


def test_nvfp4_saturates_beyond_its_range() -> None:
    g = torch.tensor(2.0**-4)
    q = quantize(torch.tensor([[1e9, -1e9, *[1.0] * 14]]), NVFP4, g)
    assert dequantize(q)[0, :2].tolist() == [6 * 448 / 16, -6 * 448 / 16]


def test_global_scales_per_row_and_per_matrix() -> None:
    x = torch.randn(3, 8, 32)
    assert quantize(x, NVFP4).global_scale.shape == (3,)
    assert torch.equal(quantize(x, NVFP4).global_scale, x.abs().amax((1, 2)) / 2688)
    assert torch.equal(quantize(x, NVFP4_ROW).global_scale, x.abs().amax(2) / 2688)
    by_row = quantize(x, NVFP4_ROW, torch.full((3, 8), 0.01))
    assert same_bits(by_row.data, quantize(x, NVFP4, torch.full((3,), 0.01)).data)
    with pytest.raises(ValueError, match=r"needs a global scale \[3\], got \[3, 8\]"):
        quantize(x, NVFP4, torch.ones(3, 8))
    with pytest.raises(ValueError, match="has no global scale"):
        quantize(x, MXFP4, torch.ones(3))


def test_tail_stays_in_bf16() -> None:
    x = torch.randn(5, 192)
    q = quantize(x, KV_FP8)
    assert q.shape == (5, 192)
    assert q.data.shape == (5, 128)
    assert torch.equal(q.tail, x[:, 128:].to(torch.bfloat16))
    assert torch.equal(dequantize(q)[:, 128:], q.tail.float())
    body = QuantFormat(E4M3, UE8M0, (1, 64))
    assert torch.equal(dequantize(q)[:, :128], dequantize(quantize(x[:, :128], body)))


@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 3, 5, 96)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for format in (FP8_ROW, MXFP4, NVFP4_ROW):
        q = quantize(x, format)
        rows = quantize(x.reshape(-1, 96), format)
        assert type_of(q) == QuantType(format, shape)
        assert q.scale.shape == QuantType(format, shape).scale_shape
        assert torch.equal(dequantize(q).reshape(-1, 96), dequantize(rows))


def test_dequantize_rounds_once() -> None:
    q = quantize(torch.randn(16, 64), NVFP4, torch.tensor(0.0123456))
    wide = dequantize(q, torch.float64)
    assert torch.equal(dequantize(q, torch.float32), wide.to(torch.float32))
    assert torch.equal(dequantize(q, torch.bfloat16), round_once(wide, torch.bfloat16))
    smallest = Quantized(FP8_ROW, torch.tensor([[0x01, 0x7E]], dtype=torch.uint8).view(torch.float8_e4m3fn),
                         torch.tensor([[0]], dtype=torch.uint8))  # fmt: skip
    assert dequantize(smallest).tolist() == [[2.0**-136, 448 * 2.0**-127]]


# --- bytes ---


TYPES = [
    TensorType(F32, (3, 5)),
    TensorType(BF16, (2, 7)),
    TensorType(F16, (9,)),
    TensorType(I32, (4,)),
    TensorType(I64, ()),
    TensorType(U8, (5,)),
    *(QuantType(f, (3, 40, 192)) for f in FORMATS),
]


@pytest.mark.parametrize("type_", TYPES, ids=str)
def test_views_share_the_bytes(type_: TensorType | QuantType) -> None:
    storage = torch.zeros(type_.extent + 64, dtype=torch.uint8)
    value = view(storage, type_, 32)
    assert type_of(value) == type_
    parts = value.parts if isinstance(value, Quantized) else (value,)
    for part, component in zip(parts, type_.components, strict=True):
        assert part.data_ptr() == storage.data_ptr() + 32 + component.offset
        assert part.shape == component.shape
    nan_fill(value)
    touched = (storage != 0).nonzero()
    assert touched.min() >= 32
    assert touched.max() < 32 + type_.extent
    again = view(storage, parse_type(str(type_)), 32)
    for part, other in zip(parts, again.parts if isinstance(again, Quantized) else (again,), strict=True):
        assert same_bits(part, other)


@pytest.mark.parametrize("type_", TYPES, ids=str)
def test_poison_is_nan_or_a_far_integer(type_: TensorType | QuantType) -> None:
    value = view(torch.zeros(type_.extent, dtype=torch.uint8), type_)
    nan_fill(value)
    if isinstance(value, Quantized):
        assert dequantize(value).isnan().all()
    elif value.dtype.is_floating_point:
        assert value.isnan().all()
    elif value.dtype is not torch.uint8:
        assert (value == POISON_INT).all()


def test_views_refuse_bad_places() -> None:
    storage = torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"f32\[4\] at byte 8 of 64"):
        view(storage, TensorType(F32, (4,)), 8)
    with pytest.raises(ValueError, match="needs 68 bytes"):
        view(storage, TensorType(F32, (17,)))
    with pytest.raises(ValueError, match="flat uint8"):
        view(storage.float(), TensorType(F32, (4,)))


# --- convert ---


def bits_of(value: torch.Tensor | Quantized) -> list[list[int]]:
    parts = value.parts if isinstance(value, Quantized) else (value,)
    return [p.contiguous().view(torch.uint8).flatten().tolist() for p in parts]


def test_same_type_is_the_same_value() -> None:
    q = quantize(torch.randn(4, 128), FP8_ROW)
    assert convert(q, QuantType(FP8_ROW, (4, 128))) is q


def test_exact_tensor_conversions() -> None:
    x = torch.randn(3, 4).to(torch.bfloat16)
    assert torch.equal(convert(x, TensorType(F32, (3, 4))), x.float())
    assert same_bits(convert(x.float(), TensorType(BF16, (3, 4))), x)
    i = torch.tensor([-(2**31), 2**31 - 1])
    assert convert(i, TensorType(I32, (2,))).tolist() == i.tolist()
    assert convert(i, TensorType(I32, (2,))).dtype is torch.int32


def test_rounding_needs_permission() -> None:
    x = torch.tensor([1.0, 1 + 2.0**-20])
    with pytest.raises(ConversionError, match=r"f32\[2\] to bf16\[2\] without rounding"):
        convert(x, TensorType(BF16, (2,)))
    assert convert(x, TensorType(BF16, (2,)), requantize=True).tolist() == [1.0, 1.0]
    w = torch.randn(256, 256)
    with pytest.raises(ConversionError, match=r"q\[e4m3,ue8m0,128x128\]\[256,256\] without rounding"):
        convert(w, QuantType(FP8_WEIGHT, (256, 256)))
    q = convert(w, QuantType(FP8_WEIGHT, (256, 256)), requantize=True)
    assert same_parts(q, quantize(w, FP8_WEIGHT))


@pytest.mark.parametrize("requantize", [False, True])
def test_impossible_conversions(requantize: bool) -> None:
    cases = [
        (
            torch.tensor([2**31]),
            TensorType(I32, (1,)),
            "values from 2147483648 to 2147483648 leave its range",
        ),
        (torch.tensor([1, 2]), TensorType(F32, (2,)), "no such conversion"),
        (torch.tensor([1.0]), TensorType(I32, (1,)), "no such conversion"),
        (torch.ones(2, 32), TensorType(F32, (32, 2)), "shapes differ"),
        (torch.ones(2, 32, dtype=torch.int64), QuantType(MXFP4, (2, 32)), "no such conversion"),
    ]
    for value, want, message in cases:
        with pytest.raises(ConversionError, match=message):
            convert(value, want, requantize=requantize)


def test_dequantizing_conversions() -> None:
    q = quantize(torch.randn(130, 140), FP8_WEIGHT)
    assert torch.equal(convert(q, TensorType(F32, (130, 140))), dequantize(q))
    assert torch.equal(convert(q, TensorType(BF16, (130, 140))), dequantize(q, torch.bfloat16))
    odd = quantize(torch.randn(4, 64), NVFP4, torch.tensor(0.0123))
    assert torch.equal(convert(odd, TensorType(F32, (4, 64))), dequantize(odd))
    with pytest.raises(ConversionError, match="without rounding"):
        convert(odd, TensorType(BF16, (4, 64)))


def test_tensors_of_representable_values_convert_exactly() -> None:
    for format in (FP8_WEIGHT, MXFP4):
        q = quantize(torch.randn(128, 256), format)
        again = convert(dequantize(q, torch.bfloat16), QuantType(format, (128, 256)))
        assert torch.equal(dequantize(again, torch.float64), dequantize(q, torch.float64))


def mxfp4(spread: int, shape: tuple[int, ...] = (2, 8, 96)) -> Quantized:
    data = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
    scale = torch.randint(120 - spread, 121, (*shape[:-1], shape[-1] // 32), dtype=torch.uint8)
    scale[..., 0, 0], scale[..., 0, 1] = 120, 120 - spread
    return Quantized(MXFP4, data, scale)


@pytest.mark.parametrize("spread", [0, 1, 17])
def test_mxfp4_to_nvfp4_and_back_is_lossless(spread: int) -> None:
    q = mxfp4(spread)
    there = convert(q, QuantType(NVFP4, q.shape))
    assert there.global_scale.tolist() == [2.0 ** (120 - 127 - 8)] * 2
    assert same_bits(there.data, q.data)
    assert type_of(there) == QuantType(NVFP4, q.shape)
    assert there.scale.shape == QuantType(NVFP4, q.shape).scale_shape
    assert torch.equal(dequantize(there, torch.float64), dequantize(q, torch.float64))
    assert same_parts(convert(there, QuantType(MXFP4, q.shape)), q)


def test_mxfp4_with_too_wide_a_range_of_scales_is_refused() -> None:
    q = mxfp4(18)
    with pytest.raises(ConversionError, match=r"q\[e2m1,ue8m0,1x32\].* to q\[e2m1,e4m3,1x16,tensor\]"):
        convert(q, QuantType(NVFP4, q.shape))
    rounded = convert(q, QuantType(NVFP4, q.shape), requantize=True)
    error = (dequantize(rounded) - dequantize(q)).norm() / dequantize(q).norm()
    assert 0 < error < 0.15


def test_generic_nvfp4_to_mxfp4_is_refused() -> None:
    q = quantize(torch.randn(8, 64), NVFP4)
    with pytest.raises(ConversionError, match=r"q\[e2m1,e4m3,1x16,tensor\].* to q\[e2m1,ue8m0,1x32\]"):
        convert(q, QuantType(MXFP4, (8, 64)))
    assert convert(q, QuantType(MXFP4, (8, 64)), requantize=True).format == MXFP4


def test_mxfp4_widens_to_fp8_tiles_exactly() -> None:
    q = mxfp4(4, (256, 128))
    wide = convert(q, QuantType(FP8_WEIGHT, (256, 128)))
    assert torch.equal(dequantize(wide, torch.float64), dequantize(q, torch.float64))


def test_a_last_half_block_survives_the_recast() -> None:
    q = quantize(torch.randn(4, 48), MXFP4)
    there = convert(q, QuantType(NVFP4, (4, 48)))
    assert there.scale.shape == (4, 3)
    assert same_parts(convert(there, QuantType(MXFP4, (4, 48))), q)
