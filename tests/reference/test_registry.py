"""Every primitive has exactly one meaning."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import dsv4c.ir.ops  # noqa: F401  (declares the primitives)
from dsv4c.errors import GraphError
from dsv4c.ir.op import OPS, Op, operand_names
from dsv4c.ir.ops.math import Add, Scale
from dsv4c.reference import MEANINGS, meaning, run


def test_every_primitive_has_a_meaning() -> None:
    primitives = {op for op in OPS.values() if op.__module__.startswith("dsv4c.ir.ops.")}
    assert len(primitives) > 40
    assert primitives <= set(MEANINGS)


def test_meanings_live_in_the_file_of_their_op() -> None:
    for op, function in MEANINGS.items():
        if op.__module__.startswith("dsv4c.ir.ops."):
            assert function.__module__ == op.__module__.replace("dsv4c.ir.ops", "dsv4c.reference")


def test_meanings_name_operands_as_the_ops_do() -> None:
    for op, function in MEANINGS.items():
        if op.__module__.startswith("dsv4c.ir.ops."):
            code = function.__code__
            count = code.co_argcount + bool(code.co_flags & 4)
            assert code.co_varnames[1:count] == operand_names(op), op


def test_run_evaluates() -> None:
    assert run(Scale(factor=3.0), torch.tensor([2.0])).tolist() == [6.0]


def test_an_op_without_a_meaning_is_named() -> None:
    @dataclass(frozen=True)
    class Mystery(Op):
        name = "mystery"

    with pytest.raises(GraphError, match="mystery has no meaning; declare one with @meaning"):
        run(Mystery())


def test_a_second_meaning_is_refused() -> None:
    with pytest.raises(GraphError, match="add already means add"):
        meaning(Add)(lambda op, a, b: a)
