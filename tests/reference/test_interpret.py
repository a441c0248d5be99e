"""Plain interpretation: values, states written in place, what is watched, and what is refused."""

from __future__ import annotations

import pytest
import torch

from dsv4c.errors import GraphError
from dsv4c.ir.graph import Builder, Graph
from dsv4c.ir.ops import add, cache_write, quantize, reshape, scale
from dsv4c.ir.verify import verify
from dsv4c.numerics.codec import Quantized, dequantize
from dsv4c.reference import interpret
from dsv4c.types import F32, FP8_ROW, I32, TensorType

X = torch.arange(8.0).reshape(2, 4)
INDEX, SLOTS = torch.tensor([1, 3], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)


def ring() -> Graph:
    """Reads the cache before and after a write to it."""
    with Builder("ring") as b:
        x, index = b.input("x", TensorType(F32, (2, 4))), b.input("index", TensorType(I32, (2,)))
        slots = b.input("slots", TensorType(I32, (2,)))
        cache, w = b.state("cache", TensorType(F32, (1, 4, 4))), b.param("w", TensorType(F32, (2, 4)))
        before = reshape(cache, shape=(16,), name="before")
        written = cache_write(cache, add(x, w, name="sum"), index, slots, name="written")
        after = scale(reshape(written, shape=(16,)), factor=1.0, name="after")
    return verify(b.finish({"before": before, "after": after, "again": written}))


def test_states_are_written_in_place_and_earlier_values_stay() -> None:
    cache, w = torch.full((1, 4, 4), -1.0), torch.full((2, 4), 10.0)
    out = interpret(ring(), {"x": X, "index": INDEX, "slots": SLOTS}, {"cache": cache}, {"w": w})
    assert (out["before"] == -1).all()
    wanted = torch.full((4, 4), -1.0)
    wanted[[1, 3]] = X + 10
    assert torch.equal(out["after"], wanted.reshape(16))
    assert torch.equal(cache[0], wanted)
    assert out["again"] is cache


def test_watching_by_name_and_by_function() -> None:
    given = {"x": X, "index": INDEX, "slots": SLOTS}, {"cache": torch.zeros(1, 4, 4)}, {"w": torch.ones(2, 4)}
    out = interpret(ring(), *given, watch={"sum", "w"})
    assert torch.equal(out["sum"], X + 1)
    assert torch.equal(out["w"], torch.ones(2, 4))
    seen: list[str] = []
    interpret(ring(), *given, watch=lambda name, value: seen.append(name))
    assert seen == ["before", "sum", "written", "reshape", "after"]
    with pytest.raises(GraphError, match="graph ring has no value %nothing to watch"):
        interpret(ring(), *given, watch={"nothing"})


def test_quantized_values_pass_through() -> None:
    with Builder("q") as b:
        q = quantize(b.input("x", TensorType(F32, (2, 128))), format=FP8_ROW, name="q")
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    out = interpret(b.finish({"q": q}), {"x": x}, {}, {})["q"]
    assert isinstance(out, Quantized)
    assert ((dequantize(out) - x).abs() <= x.abs() / 16 + 1e-2).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, r"input %x: f32\[2,4\] is not given"),
        ({"x": X.bfloat16()}, r"input %x is bf16\[2,4\], expected f32\[2,4\]"),
        ({"index": INDEX[:1]}, r"input %index is i32\[1\], expected i32\[2\]"),
    ],
)
def test_a_missing_or_wrong_value_is_named(change: dict[str, torch.Tensor | None], message: str) -> None:
    inputs = {k: v for k, v in ({"x": X, "index": INDEX, "slots": SLOTS} | change).items() if v is not None}
    with pytest.raises(GraphError, match=message):
        interpret(ring(), inputs, {"cache": torch.zeros(1, 4, 4)}, {"w": torch.ones(2, 4)})


def test_a_meaning_that_breaks_its_type_rule_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4c.ir.ops.math import Add
    from dsv4c.reference import MEANINGS

    monkeypatch.setitem(MEANINGS, Add, lambda op, a, b: (a + b).double().float()[:1])
    given = {"x": X, "index": INDEX, "slots": SLOTS}, {"cache": torch.zeros(1, 4, 4)}, {"w": torch.ones(2, 4)}
    with pytest.raises(GraphError, match=r"sum: add returned f32\[1,4\], its type rule says f32\[2,4\]"):
        interpret(ring(), *given)
