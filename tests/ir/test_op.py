"""Declaring ops: fields, names, arity, registration."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dsv4c.errors import GraphError
from dsv4c.ir.graph import Builder
from dsv4c.ir.op import (
    OPS,
    Cost,
    Op,
    arity,
    elements,
    expect_tensor,
    field_names,
    lookup,
    operand_names,
    primitive,
    row_bytes,
    snake_case,
)
from dsv4c.ir.ops import linear, rms_norm
from dsv4c.ir.ops.linear import Linear
from dsv4c.ir.ops.norm import RmsNorm
from dsv4c.ir.ops.shape import Concat
from dsv4c.types import BF16, F32, KV_FP8, QuantType, TensorType, Type

X = TensorType(BF16, (2, 4))


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    before = dict(OPS)
    yield
    OPS.clear()
    OPS.update(before)


def test_names() -> None:
    assert [snake_case(n) for n in ("RmsNorm", "TopK", "SqrtSoftplus", "Linear")] == [
        "rms_norm",
        "top_k",
        "sqrt_softplus",
        "linear",
    ]
    assert lookup("rms_norm") is RmsNorm


def test_attributes_are_the_fields_in_order() -> None:
    assert RmsNorm(eps=1e-6).attributes() == {"eps": 1e-6, "precision": F32}
    assert RmsNorm(eps=1e-6) == RmsNorm(1e-6)
    assert RmsNorm(eps=1e-6) != RmsNorm(eps=1e-5)


def test_operands_are_read_off_the_type_rule() -> None:
    assert operand_names(Linear) == ("x", "w")
    assert (arity(Linear), arity(RmsNorm)) == ((2, 2), (1, 2))
    assert arity(Concat)[0] == 0
    assert arity(Concat)[1] > 1000


def test_an_op_is_frozen_and_has_no_rule_of_its_own() -> None:
    @primitive
    class Silent(Op):
        pass

    assert Silent.name == "silent"
    with pytest.raises(NotImplementedError, match="Silent declares no type rule"):
        Silent().infer(X)
    with pytest.raises(AttributeError):
        Silent().colour = 1  # type: ignore[attr-defined]


def test_two_ops_of_one_name_clash() -> None:
    @primitive
    class Clashing(Op):
        def infer(self, x: Type) -> Type:
            return x

    first = Clashing
    with pytest.raises(GraphError) as error:

        @primitive
        class Another(Op):
            name = "clashing"

    message = str(error.value)
    assert message.startswith("two ops are named 'clashing': ")
    assert f"{first.__module__}.{first.__qualname__}" in message
    assert "Another" in message
    assert OPS["clashing"] is first


def test_the_same_op_may_register_again() -> None:
    from dsv4c.ir.op import register

    register(RmsNorm)
    assert OPS["rms_norm"] is RmsNorm


def test_unknown_op() -> None:
    with pytest.raises(GraphError, match=r"unknown op 'rms_nrom'; did you mean rms_norm"):
        lookup("rms_nrom")
    with pytest.raises(
        GraphError, match=r"unknown op 'zzz' \(an op of another package must be imported first\)"
    ):
        lookup("zzz")


def test_default_cost_counts_every_operand_and_result_once() -> None:
    cost = RmsNorm(eps=1e-6).cost((X, TensorType(BF16, (4,))), (X,))
    assert cost == Cost(8, (16, 8), (16,))
    assert cost.bytes == 40


def test_a_format_that_does_not_fit_is_a_graph_error() -> None:
    @primitive
    class Encode(Op):
        def infer(self, x: Type) -> Type:
            return QuantType(KV_FP8, x.shape)

    with pytest.raises(GraphError, match="leaves nothing to quantize in rows of 4"):
        Encode().results((X,))


def test_counting() -> None:
    assert elements(TensorType(BF16, (2, 3, 4))) == 24
    assert elements(TensorType(BF16, ())) == 1
    assert row_bytes(TensorType(F32, (8, 4)), 2) == 32
    assert row_bytes(QuantType(KV_FP8, (2, 8, 512)), 3, rank=2) == 3 * 583
    assert row_bytes(TensorType(F32, (0, 4)), 2) == 0


def test_expect_tensor_says_what_it_wanted() -> None:
    with pytest.raises(GraphError, match=r"x must have 3 dimensions, got bf16\[2,4\]"):
        expect_tensor(X, "x", 3)
    with pytest.raises(GraphError, match=r"x must be f32, got bf16\[2,4\]"):
        expect_tensor(X, "x", dtype=F32)
    with pytest.raises(GraphError, match=r"x must have at least 3 dimension"):
        expect_tensor(X, "x", least=3)
    assert expect_tensor(X, "x", 2, BF16) is X


def test_applying_an_op_leaves_out_absent_operands() -> None:
    with Builder("g") as b:
        x = b.input("x", X)
        plain = rms_norm(x, None, eps=1e-6)
        assert len(plain.node.inputs) == 1
        with pytest.raises(
            GraphError, match=r"^at linear: linear\(%x: bf16\[2,4\]\): linear takes 2 operands, got 1$"
        ):
            linear(x, out=BF16)


def test_applying_an_op_outside_of_a_builder() -> None:
    with Builder("g") as b:
        x = b.input("x", X)
    with pytest.raises(GraphError, match="no graph is being built here"):
        rms_norm(x, eps=1e-6)


def test_traits_speak_of_operands_and_attributes_that_there_are() -> None:
    weighted = 0
    for op in OPS.values():
        _, most = arity(op)
        places = {*op.picks, *(table for table, _ in op.picks.values()), *op.same_format.keys()}
        places |= {*op.same_format.values(), *(() if op.weight is None else (op.weight,))}
        assert all(0 <= place < most for place in places), op.name
        assert op.geometry <= set(field_names(op)), op.name
        assert op.weight is not None or not op.product, op.name
        assert op.picks or not op.by_slot, op.name
        weighted += op.weight is not None
    assert weighted >= 6
