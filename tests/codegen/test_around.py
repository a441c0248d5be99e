"""Fused ops that hold matrix products: which launches they become, how the text of an epilogue reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from dsv4c import Fused, fused
from dsv4c.arch import ARCHS
from dsv4c.codegen.build import Source, build, compile_source
from dsv4c.codegen.kernels import KERNELS
from dsv4c.codegen.registry import Launchable, choose, request_of
from dsv4c.errors import BuildError
from dsv4c.ir.graph import Builder, Value
from dsv4c.ir.ops import add, linear, mul, quantize, rms_norm, scale, silu, slice_, softmax
from dsv4c.types import BF16, F32, FP8_ROW, FP8_WEIGHT, QuantType, Type, parse_type
from tests.codegen.products import SharedHidden
from tests.conftest import Golden


@fused
class GatedResidual(Fused):
    """silu(x · w) + residual, rounded after each step."""

    literals = ("linear.out",)

    def body(self, x: Value, w: Value, residual: Value) -> Value:
        out: Value = add(silu(linear(x, w, out=BF16)), residual)
        return out


@fused
class NormedAffine(Fused):
    """factor * (fp8(rms_norm(x)) · w) + bias, in f32."""

    literals = ("rms_norm.precision", "quantize.format", "linear.out")
    eps: float
    factor: float

    def body(self, x: Value, gain: Value, w: Value, bias: Value) -> Value:
        rows = quantize(rms_norm(x, gain, eps=self.eps, precision=F32), format=FP8_ROW)
        out: Value = add(scale(linear(rows, w, out=F32), factor=self.factor), bias)
        return out


@fused
class GatedPair(Fused):
    """silu(x · w1) and x · w3 + 3 (x · w3): each product has an epilogue of its own, the second one twice."""

    literals = ("linear.out", "scale.factor")

    def body(self, x: Value, w1: Value, w3: Value) -> tuple[Value, Value, Value]:
        up = linear(x, w3, out=BF16)
        return silu(linear(x, w1, out=BF16)), up, add(up, scale(up, factor=3.0))


@fused
class OwnResidual(Fused):
    """silu(x · w) + x."""

    literals = ("linear.out",)

    def body(self, x: Value, w: Value) -> Value:
        out: Value = add(silu(linear(x, w, out=BF16)), x)
        return out


@fused
class Chained(Fused):
    """A product of a product."""

    literals = ("linear.out",)

    def body(self, x: Value, w1: Value, w2: Value) -> Value:
        out: Value = linear(silu(linear(x, w1, out=BF16)), w2, out=BF16)
        return out


@fused
class Normalized(Fused):
    """softmax over rows, which no program on rows is."""

    literals = ("linear.out", "softmax.axis")

    def body(self, x: Value, w: Value) -> Value:
        out: Value = softmax(silu(linear(x, w, out=F32)), axis=0)
        return out


@fused
class HalvesMultiplied(Fused):
    """One half of a product times the other."""

    literals = ("linear.out", "slice.axis")

    def body(self, x: Value, w: Value) -> Value:
        y = linear(x, w, out=BF16)
        half = y.type.shape[1] // 2
        low, high = (slice_(y, axis=1, start=i * half, stop=(i + 1) * half) for i in (0, 1))
        out: Value = mul(low, high)
        return out


@fused
class GainTwice(Fused):
    """A norm's gain, which its product wants widened, added to what comes out."""

    literals = ("rms_norm.precision", "linear.out")
    eps: float

    def body(self, x: Value, gain: Value, w: Value) -> Value:
        normed = rms_norm(x, gain, eps=self.eps, precision=F32)
        out: Value = add(linear(normed, w, out=BF16), gain)
        return out


@fused
class TwoRows(Fused):
    """Products of rows that are not as many."""

    literals = ("linear.out",)

    def body(self, x: Value, z: Value, w: Value, w2: Value, bias: Value) -> tuple[Value, Value]:
        return add(linear(x, w, out=BF16), bias), add(linear(z, w2, out=BF16), bias)


def fp8(rows: int, columns: int) -> str:
    return str(QuantType(FP8_WEIGHT, (rows, columns)))


GATED = GatedResidual(), ("bf16[N,512]", "bf16[2048,512]", "bf16[N,2048]"), "w"
AFFINE = (
    NormedAffine(eps=1e-6, factor=0.5),
    ("bf16[N,512]", "bf16[512]", fp8(1024, 512), "f32[1024]"),
    "gain w",
)
HIDDEN = (
    SharedHidden(eps=1e-6, limit=10.0),
    ("bf16[N,512]", "bf16[512]", fp8(1024, 512), fp8(1024, 512)),
    "gain w1 w3",
)
PAIR = GatedPair(), ("bf16[N,512]", "bf16[256,512]", "bf16[256,512]"), "w1 w3"
HALVES = HalvesMultiplied(), ("bf16[N,512]", "bf16[256,512]"), "w"
Case = tuple[Fused, tuple[str, ...], str]


def launches(case: Case, rows: int, target: str = "sm_90a") -> Sequence[Launchable]:
    """Those of a case of so many rows, the operands that it names being weights."""
    op, texts, weights = case
    builder = Builder("body")
    names = list(type(op).body.__code__.co_varnames[1:])
    types: list[Type] = [parse_type(text.replace("N", str(rows))) for text in texts]
    values = [
        (builder.param if name in weights.split() else builder.input)(name, type_)
        for name, type_ in zip(names, types, strict=False)
    ]
    graph = builder.finish({str(i): v for i, v in enumerate(builder.emit(op, tuple(values)))})
    request, _ = request_of(graph.nodes, ARCHS[target], graph.users, {v: v.name for v in graph.params})
    return choose(request, KERNELS)


def test_golden(golden: Golden) -> None:
    (launch,) = launches(GATED, 2)
    golden(launch.emission.source, "kernels/gemv_epilogue.py.txt")


def test_what_follows_a_product_element_by_element_is_in_its_launch() -> None:
    (launch,) = launches(AFFINE, 1)
    parameters = [(b.component, b.access, b.value) for b in launch.bindings]
    w = [("data", "r", 2), ("scale", "r", 2)]
    assert parameters == [("data", "r", 0), ("data", "r", 1), *w, ("data", "r", 3), ("data", "w", 4)]
    assert launch.forms[1] == "f32"
    assert "rms_norm(x: bf16[1,512], gain: f32[512], eps=1e-06)" in launch.emission.source
    assert "    add_i = math.add(scale, at(bias, i))\n" in launch.emission.source


def test_each_product_has_what_follows_it_and_may_be_a_result_itself() -> None:
    (launch,) = launches(PAIR, 3)
    text = launch.emission.source
    assert (
        '    w3_out_i = math.cast(value, to="bf16")\n'
        "    put(w3_out, i, w3_out_i)\n"
        "    scale = math.scale(w3_out_i, factor=3.0)\n"
        "    add_i = math.add(w3_out_i, scale)\n"
        "    put(add, i, add_i)\n"
    ) in text
    assert '    w1_out = math.cast(value, to="bf16")\n    silu_i = math.silu(w1_out)\n' in text
    assert {b.value for b in launch.bindings if b.access == "w"} == {3, 4, 5}


def test_what_no_product_takes_in_lies_around_it() -> None:
    before, product, behind = launches(HIDDEN, 2)
    assert [launch.stage for launch in (before, product, behind)] == ["before", "product", "behind"]
    made = {"w1_out": 2 * 1024 * 2, "w3_out": 2 * 1024 * 2}
    assert (before.scratch, product.scratch, behind.scratch) == ({}, made, made)
    assert [(b.scratch, b.access) for b in product.bindings if b.scratch] == [(n, "w") for n in made]
    assert [(b.scratch, b.access) for b in behind.bindings if b.scratch] == [(n, "r") for n in made]


def test_columns_that_meet_are_behind_the_product() -> None:
    assert [launch.stage for launch in launches(HALVES, 2)] == ["product", "behind"]


def test_an_operand_that_lies_in_another_form_is_read_behind() -> None:
    case = GainTwice(eps=1e-6), ("bf16[N,512]", "bf16[512]", "bf16[512,512]"), "gain w"
    product, behind = launches(case, 2)
    assert (product.forms[1], behind.forms) == ("f32", {})


def test_of_many_rows_what_follows_a_product_is_in_its_launch_too(tmp_path: Path) -> None:
    made = [launches(case, 12) for case in (GATED, AFFINE, PAIR)]
    stages = [[launch.stage for launch in each] for each in made]
    assert stages == [["product0"], ["quantize", "product1"], ["product0", "product1"]]
    (gated,), (_, affine), pair = made
    assert [b.value for b in gated.bindings] == [0, 1, 2, 3]
    assert [b.value for b in affine.bindings] == [None, None, 2, 2, 3, 4]
    texts = [launch.emission.source for launch in (gated, affine, *pair)]
    assert "    add_i = math.add(silu, at(residual, i))\n" in texts[0]
    assert all(re.search(r"many_rows\.multiply\(.*, \w+_epilogue\)", text) for text in texts)
    sources = [Source(launch.emission.symbol, launch.emission.source) for launch in (gated, affine)]
    assert all(kernel.resources.stack == 0 for kernel in build(sources, "sm_90a", tmp_path))


def test_a_row_may_be_added_to_what_is_made_of_it() -> None:
    """A GEMM has a name for its rows, the op another one."""
    (launch,) = launches((OwnResidual(), ("bf16[N,512]", "bf16[512,512]"), "w"), 12)
    assert [b.value for b in launch.bindings] == [0, 1, 0, 2]
    assert [p.operand for p in launch.emission.parameters] == ["x", "w", "x_2", "add"]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (
            (GatedResidual(), ("bf16[N,512]", "bf16[2048,512]", "bf16[N,2048]"), ""),
            "multiplies with weights that it has packed, w lies as its type says",
        ),
        (
            (GatedResidual(), ("f32[N,512]", "f32[2048,512]", "bf16[N,2048]"), "w"),
            "takes weights of bf16, ",
        ),
        (
            (Chained(), ("bf16[N,512]", "bf16[512,512]", "bf16[256,512]"), "w1 w2"),
            "a product takes what comes of another one",
        ),
        (
            (
                TwoRows(),
                ("bf16[N,512]", "bf16[4,512]", *["bf16[512,512]"] * 2, "bf16[512]"),
                "w w2",
            ),
            "multiplies rows of one shape, not (2, 512) and (4, 512)",
        ),
        (
            (Normalized(), ("bf16[N,512]", "bf16[256,512]"), "w"),
            "behind its products: rows meet in softmax",
        ),
    ],
)
def test_what_is_refused_is_told(case: Case, reason: str) -> None:
    with pytest.raises(BuildError) as error:
        launches(case, 2)
    assert f"\n  around_products: {reason}" in str(error.value)


@pytest.mark.parametrize("target", ARCHS)
def test_kernels_compile(target: str) -> None:
    for case in (GATED, AFFINE, HIDDEN, PAIR):
        for launch in launches(case, 2, target):
            if launch.stage != "before":  # a row program like any other
                compile_source(Source(launch.emission.symbol, launch.emission.source), target)
