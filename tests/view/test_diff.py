"""What differs between two graphs."""

from __future__ import annotations

import json

from dsv4c.ir.graph import Builder, Graph
from dsv4c.ir.ops import reshape, rms_norm, scale, silu
from dsv4c.ir.totals import totals
from dsv4c.types import BF16, F32, TensorType
from dsv4c.view.diff import diff
from tests.view.graphs import folded, official, plain

X = TensorType(BF16, (2, 4))


def graph(factor: float = 2.0, extra: bool = False, gain: TensorType | None = None) -> Graph:
    with Builder("g") as b:
        x = b.input("x", X)
        if gain is not None:
            x = rms_norm(x, b.param("layers.0.gain", gain), eps=1e-6, name="normed")
        y = scale(x, factor=factor, name="y")
        z = silu(y, name="z") if extra else y
    return b.finish({"out": z})


def test_equal_graphs() -> None:
    found = diff(graph(), graph())
    assert found.empty
    assert found.text() == "g and g are equal: 1 nodes\n"


def test_new_gone_and_changed() -> None:
    found = diff(graph(), graph(3.0, extra=True))
    assert ([n.name for n in found.gone], [n.name for n in found.new]) == ([], ["z"])
    assert [(c.before.op.factor, c.after.op.factor) for c in found.changed] == [(2.0, 3.0)]  # type: ignore[attr-defined]
    assert not found.empty
    back = diff(graph(3.0, extra=True), graph())
    assert [n.name for n in back.gone] == ["z"]


def test_an_operand_counts_by_its_name() -> None:
    found = diff(graph(), graph(gain=TensorType(BF16, (4,))))
    assert [n.name for n in found.new] == ["normed"]
    assert [c.after.name for c in found.changed] == ["y"]
    assert found.signature == ("+ param %layers.0.gain: bf16[4]",)


def test_a_declared_type_that_changed() -> None:
    found = diff(graph(gain=TensorType(BF16, (4,))), graph(gain=TensorType(F32, (4,))))
    assert found.signature == ("~ param %layers.0.gain: bf16[4] -> f32[4]",)


def test_totals_leave_out_what_only_changes_shape() -> None:
    with Builder("g") as b:
        x = b.input("x", X)
        y = silu(reshape(x, shape=(8,)))
    found = totals(b.finish({"y": y}))
    assert (found.nodes, found.launches, found.bytes, found.flops) == (2, 1, 2 * 8 * 2, 8)


def test_text_of_a_recipe() -> None:
    found = diff(plain("deepseek-v4-flash"), official("deepseek-v4-flash"))
    text = found.text(limit=2)
    assert "  launches             9,005 ->            9,473\n" in text
    assert "~ param %layers.*.attn.wq_b: bf16[32768,1024] -> q[e4m3,ue8m0,128x128][32768,1024] (x43)" in text
    assert "new: 468 (quantize 384, dequantize 84)\n" in text
    assert "  ... and 466 more\n" in text
    assert "\n  ~ %layers.0.attn.qa: bf16[1,1024] = linear(%layers.0.attn_in, " in text


def test_data_of_a_fusion() -> None:
    found = diff(official("tiny"), folded("tiny")).to_dict()
    assert len(found["changed"]) == len(found["gone"]) == 6
    assert found["before"]["launches"] - found["after"]["launches"] == 6
    assert found["before"]["bytes"] > found["after"]["bytes"]
    assert found["signature"] == found["new"] == []
    assert json.loads(json.dumps(found)) == found


def test_outputs_that_came_went_or_changed() -> None:
    with Builder("a") as b:
        x = b.input("x", X)
        a = b.finish({"old": x, "same": x})
    with Builder("b") as b:
        x = b.input("x", TensorType(F32, (2, 4)))
        other = b.finish({"same": x, "new": x})
    assert diff(a, other).signature == (
        "~ input %x: bf16[2,4] -> f32[2,4]",
        "- output old",
        "~ output same: bf16[2,4] -> f32[2,4]",
        "+ output new",
    )


def test_an_output_of_another_value_is_a_difference() -> None:
    def either(first: bool) -> Graph:
        with Builder("g") as b:
            x = b.input("x", X)
            y, z = silu(x, name="y"), scale(x, factor=2.0, name="z")
        return b.finish({"out": y if first else z, "other": z})

    assert diff(either(True), either(False)).signature == ("~ output out: %y -> %z",)


def test_another_order_is_a_difference() -> None:
    def either(first: bool) -> Graph:
        with Builder("g") as b:
            x = b.input("x", X)
            for name in "yz" if first else "zy":
                silu(x, name=name)
        return b.finish({n.name: n.outputs[0] for n in sorted(b.nodes, key=lambda n: n.name)})

    assert diff(either(True), either(False)).signature == ("~ order: 2 nodes stand elsewhere",)
