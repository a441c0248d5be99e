"""Every primitive is read three ways, by one name in one layout: its type rule, the reference, the device."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

import dsv4c.codegen.meanings
import dsv4c.ir.ops
from dsv4c.arch import ARCHS
from dsv4c.codegen.build import Source, compile_source, read_resources
from dsv4c.codegen.kernels.row_program import ELEMENTWISE, MEANINGS, meaning_of
from dsv4c.codegen.kernels.rows import Built, kernel_of
from dsv4c.ir.op import OPS, Op, arity, field_names
from dsv4c.reference import MEANINGS as REFERENCE
from tests.codegen.primitives import PRIMITIVES, graph_of

ROOM = Path(dsv4c.codegen.meanings.__file__).parent
# Those of the model's. An exchange is none of one device: it has a kernel of its own, or is refused.
OWN = [
    op
    for op in OPS.values()
    if op.__module__.startswith("dsv4c.ir.ops.") and not op.__module__.endswith(".collective")
]
FIRST = {type(op): (op, types) for op, types in reversed(PRIMITIVES)}


@cache
def functions(module: str) -> Mapping[str, ast.FunctionDef]:
    """Functions of a module of device code, which is not imported: there may be no compiler here."""
    tree = ast.parse((ROOM / f"{module}.py").read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("op", OWN, ids=lambda op: op.name)
def test_type_rule_reference_and_device_meaning(op: type[Op]) -> None:
    assert op.infer is not Op.infer
    module, name = meaning_of(op.__new__(op))
    reference = REFERENCE[op]
    assert (reference.__module__, reference.__name__) == (f"dsv4c.reference.{module}", name)
    device = functions(module)[name]
    takes = [a.arg for a in (*device.args.args, *device.args.kwonlyargs)]
    assert "team" not in takes if op in ELEMENTWISE else takes[0] == "team"
    attributes = field_names(op)
    assert tuple(takes[len(takes) - len(attributes) :]) == attributes
    least, most = arity(op)
    values = len(takes) - len(attributes) - (op not in ELEMENTWISE)
    made = 0 if op in ELEMENTWISE else len(results(op)) - len(op.alias)
    assert device.args.vararg is not None or least <= values - made <= most


def results(op: type[Op]) -> tuple[object, ...]:
    case, types = FIRST[op]
    (node,) = graph_of(case, types, 2).nodes
    return node.outputs


def test_the_room_mirrors_the_reference() -> None:
    assert {path.stem for path in ROOM.glob("*.py")} == {"__init__", *MEANINGS}
    own = {op.__module__.rpartition(".")[2] for op in OWN}
    assert own == set(MEANINGS) - {"values"}
    for module in own:
        public = {name for name in functions(module) if not name.startswith("_")}
        missing = {meaning_of(op.__new__(op))[1] for op in OWN if op.__module__.endswith(f".{module}")}
        assert missing <= public


def test_every_primitive_is_shown() -> None:
    assert set(FIRST) == set(OWN)


@pytest.mark.parametrize("op", OWN, ids=lambda op: op.name)
def test_the_device_meaning_compiles(op: type[Op]) -> None:
    case, types = FIRST[op]
    built = kernel_of(graph_of(case, types, 2), False, op.name, op.name, ARCHS["sm_90a"])
    assert isinstance(built, Built)
    emission = built.emission
    cubin, _ = compile_source(Source(emission.symbol, emission.source), "sm_90a")
    assert read_resources(cubin, emission.symbol).stack == 0  # nothing spills


@pytest.mark.slow
@pytest.mark.parametrize("target", ARCHS)
@pytest.mark.parametrize("number", range(len(PRIMITIVES)))
def test_all_of_them_on_all_operands_compile(number: int, target: str) -> None:
    op, types = PRIMITIVES[number]
    built = kernel_of(graph_of(op, types, 3), False, op.name, op.name, ARCHS[target])
    assert isinstance(built, Built)
    compile_source(Source(built.emission.symbol, built.emission.source), target)
