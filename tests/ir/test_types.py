"""Types: their text, their bytes, and what they refuse."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4c.types import (
    ALIGN,
    BF16,
    E2M1,
    E4M3,
    F32,
    FP8_ROW,
    FP8_WEIGHT,
    I32,
    KV_FP8,
    MXFP4,
    NVFP4,
    NVFP4_ROW,
    U8,
    UE8M0,
    DType,
    GlobalScale,
    QuantFormat,
    QuantType,
    TensorType,
    Type,
    TypeSyntaxError,
    parse_format,
    parse_type,
)

TEXTS = [
    (TensorType(BF16, (1, 4096)), "bf16[1,4096]"),
    (TensorType(F32, ()), "f32[]"),
    (QuantType(FP8_ROW, (1, 4096)), "q[e4m3,ue8m0,1x128][1,4096]"),
    (QuantType(FP8_WEIGHT, (1024, 4096)), "q[e4m3,ue8m0,128x128][1024,4096]"),
    (QuantType(MXFP4, (2048, 4096)), "q[e2m1,ue8m0,1x32][2048,4096]"),
    (QuantType(NVFP4, (2048, 4096)), "q[e2m1,e4m3,1x16,tensor][2048,4096]"),
    (QuantType(NVFP4_ROW, (3, 64)), "q[e2m1,e4m3,1x16,row][3,64]"),
    (QuantType(KV_FP8, (1, 128, 512)), "q[e4m3,ue8m0,1x64,tail=64][1,128,512]"),
]


@pytest.mark.parametrize(("type_", "text"), TEXTS)
def test_text(type_: Type, text: str) -> None:
    assert str(type_) == text
    assert parse_type(text) == type_
    assert hash(parse_type(text)) == hash(type_)


formats = st.builds(
    QuantFormat,
    st.sampled_from([E4M3, E2M1]),
    st.sampled_from([UE8M0, E4M3, F32]),
    st.tuples(st.sampled_from([1, 2, 128]), st.sampled_from([16, 32, 64, 128])),
    st.sampled_from(list(GlobalScale)),
    st.sampled_from([0, 2, 64]),
)
shapes = st.lists(st.integers(1, 300), min_size=2, max_size=4).map(lambda s: (*s[:-1], 2 * s[-1] + 64))
types = st.one_of(
    st.builds(TensorType, st.sampled_from(list(DType)), st.lists(st.integers(1, 9), max_size=4).map(tuple)),
    st.builds(QuantType, formats, shapes),
)


@settings(deadline=None)
@given(types)
def test_any_type_reads_back(type_: Type) -> None:
    assert parse_type(str(type_)) == type_


@settings(deadline=None)
@given(st.builds(QuantType, formats, shapes))
def test_components_neither_overlap_nor_leave_the_extent(type_: QuantType) -> None:
    end = 0
    for part in type_.components:
        assert part.offset % ALIGN == 0
        assert end <= part.offset < end + ALIGN
        end = part.offset + part.nbytes
    assert type_.nbytes <= end <= type_.extent < end + ALIGN
    assert type_.extent % ALIGN == 0


@pytest.mark.parametrize(
    ("text", "components"),
    [
        ("bf16[3,5]", [("data", BF16, (3, 5), 0)]),
        ("q[e4m3,ue8m0,128x128][130,256]", [("data", E4M3, (130, 256), 0), ("scale", UE8M0, (2, 2), 33280)]),
        ("q[e2m1,ue8m0,1x32][3,64]", [("data", U8, (3, 32), 0), ("scale", UE8M0, (3, 2), 96)]),
        ("q[e2m1,ue8m0,1x32][40]", [("data", U8, (20,), 0), ("scale", UE8M0, (2,), 32)]),
        (
            "q[e2m1,e4m3,1x16,tensor][4,2,32]",
            [("data", U8, (4, 2, 16), 0), ("scale", E4M3, (4, 2, 2), 128), ("global_scale", F32, (4,), 144)],
        ),
        (
            "q[e2m1,e4m3,1x16,row][2,32]",
            [("data", U8, (2, 16), 0), ("scale", E4M3, (2, 2), 32), ("global_scale", F32, (2,), 48)],
        ),
        (
            "q[e4m3,ue8m0,1x64,tail=64][2,512]",
            [("data", E4M3, (2, 448), 0), ("scale", UE8M0, (2, 7), 896), ("tail", BF16, (2, 64), 912)],
        ),
    ],
)
def test_components(text: str, components: list[tuple[str, DType, tuple[int, ...], int]]) -> None:
    assert [tuple(part) for part in parse_type(text).components] == components


def test_payload_of_a_cache_entry() -> None:
    """583 bytes: 448 of FP8, 64 of BF16 and 7 scales."""
    entry = QuantType(KV_FP8, (1, 1, 512))
    assert entry.nbytes == 448 + 128 + 7
    assert TensorType(I32, (3, 5)).nbytes == 60
    assert TensorType(BF16, (3,)).extent == 16


def test_shape_changes_keep_the_format() -> None:
    assert QuantType(KV_FP8, (1, 128, 512)).with_shape((6, 4, 512)) == QuantType(KV_FP8, (6, 4, 512))
    assert TensorType(BF16, (2,)).with_shape((1, 2)) == TensorType(BF16, (1, 2))


def test_largest_elements() -> None:
    assert (FP8_ROW.largest, MXFP4.largest) == (448.0, 6.0)
    assert {d: d.bits for d in (F32, BF16, E2M1)} == {F32: 32, BF16: 16, E2M1: 4}
    assert [d for d in DType if d.is_float] == [DType.F32, DType.BF16, DType.F16]
    assert math.prod((E4M3.bits, UE8M0.bits)) == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf17[2]", "unknown element type 'bf17' in 'bf17[2]'; known: f32, bf16"),
        ("bf16", "cannot read the shape '' of type 'bf16'"),
        ("bf16[2,]", "cannot read the shape '[2,]' of type 'bf16[2,]'; expected [n,m,...]"),
        ("bf16[-1]", "cannot read the shape"),
        ("bf16[2]x", "cannot read the shape"),
        ("q[e4m3,ue8m0][2,128]", "cannot read the quantized format 'q[e4m3,ue8m0]'"),
        ("q[e4m3,ue8m0,1x128", "expected q[value,scale,RxC,...]"),
        ("q[e4m3,ue8m0,1x128,nowhere][2,128]", "'nowhere' is not a valid GlobalScale"),
        ("q[e4m3,bf16,1x128][2,128]", "block scales are ue8m0, e4m3 or f32, not bf16"),
        ("q[bf16,ue8m0,1x128][2,128]", "quantized values are e4m3 or e2m1, not bf16"),
        ("q[e4m3,ue8m0,axb][2,128]", "cannot read the quantized format"),
    ],
)
def test_syntax_errors(text: str, message: str) -> None:
    with pytest.raises(TypeSyntaxError) as error:
        parse_type(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q[e4m3,ue8m0,128x128][256]", "needs 2 dimensions, got (256,)"),
        ("q[e4m3,ue8m0,1x128][]", "needs 1 dimensions, got ()"),
        ("q[e4m3,ue8m0,1x64,tail=64][2,64]", "leaves nothing to quantize in rows of 64"),
        ("q[e2m1,ue8m0,1x32][2,63]", "packs pairs: the last dimension of (2, 63) is odd"),
    ],
)
def test_shapes_that_a_format_does_not_fit(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_type(text)
    assert message in str(error.value)


def test_a_format_without_brackets() -> None:
    with pytest.raises(TypeSyntaxError, match="cannot read the quantized format 'e4m3'"):
        parse_format("e4m3")
