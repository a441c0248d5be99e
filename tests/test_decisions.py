"""What an op is, the op says: decisions about ops by name or class outside of their own modules are counted.

A fact that several rooms ask for is a trait of `dsv4c.ir.op.Op`. What stays is about one op for a reason,
which stands below beside how often it is asked. Owners are not counted: an op's module, its meaning, the
kernels that bind it, and the fusions that look for it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_house import modules

CLASSES = ("dsv4c.ir.ops", "dsv4c.passes.fusions")  # where classes of ops come from
OWNERS = (*CLASSES, "dsv4c.reference", "dsv4c.codegen.kernels")
REGISTRY = "OPS"  # ops by name: looking one up decides nothing

ALLOWED: dict[str, tuple[int, str]] = {
    "dsv4c.certify.defects": (23, "a catalogue of mistakes, each in what certain ops mean"),
    "dsv4c.passes.quantize": (
        4,
        "what recipes say of one op: index queries, the norm of heads, gathered rows, rotated dimensions",
    ),
    "dsv4c.certify.ranks": (1, "where a sum of ranks begins"),
    "dsv4c.passes.placement": (2, "a rule per op is what the module is: two ask for an op besides"),
    "dsv4c.passes.shard": (2, "casts of partial sums are exchanges, reshapes move the cut dimension"),
    "dsv4c.view.layers": (1, "the first layer reads it in place of what another layer made"),
}
"""Decisions of a module, and why they are no trait."""


def decisions(tree: ast.Module) -> Iterator[int]:
    """Lines that compare an op's name with written ones, look it up in a table, or ask for an op's class."""
    classes = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(CLASSES)
        for alias in node.names
    }
    tables = {name for node in ast.walk(tree) for name in _tables(node)} - {REGISTRY}

    def written(node: ast.expr) -> bool:
        text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        return text or _is_table(node) or (isinstance(node, ast.Name) and node.id in tables)

    for node in ast.walk(tree):
        match node:
            case ast.Compare(left=left, comparators=others):
                found = any(map(_is_name, (left, *others))) and any(map(written, (left, *others)))
            case ast.Subscript(value=table, slice=key):
                found = _is_name(key) and written(table)
            case ast.Call(func=ast.Attribute(attr="get", value=table), args=[key, *_]):
                found = _is_name(key) and written(table)
            case ast.Call(func=ast.Name(id="isinstance"), args=[_, kinds]):
                found = bool(classes & _names(kinds))
            case ast.match_case(pattern=pattern):
                found = bool(classes & _names(pattern))
            case _:
                continue
        if found:
            yield node.pattern.lineno if isinstance(node, ast.match_case) else node.lineno


def _is_name(node: ast.expr) -> bool:
    """Is it `op.name`, `node.op.name`, or a text with one in it?"""
    if isinstance(node, ast.JoinedStr):
        return any(isinstance(part, ast.FormattedValue) and _is_name(part.value) for part in node.values)
    owner = node.value if isinstance(node, ast.Attribute) and node.attr == "name" else None
    return (isinstance(owner, ast.Name) and owner.id == "op") or (
        isinstance(owner, ast.Attribute) and owner.attr == "op"
    )


def _is_table(node: ast.AST | None) -> bool:
    """A literal with something in it."""
    if isinstance(node, ast.Dict):
        return bool(node.keys)
    return isinstance(node, ast.Tuple | ast.List | ast.Set) and bool(node.elts)


def _tables(node: ast.AST) -> Iterator[str]:
    """Names that an assignment gives to a literal table; a constant may be imported, too."""
    if isinstance(node, ast.Assign | ast.AnnAssign) and _is_table(node.value):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.Name) and node.id.isupper():
        yield node.id


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def test_no_room_decides_anew_what_an_op_is() -> None:
    found = {
        module: list(decisions(ast.parse(path.read_text(encoding="utf-8"))))
        for module, path in modules()
        if not module.startswith(OWNERS)
    }
    assert {module: len(lines) for module, lines in found.items() if lines} == {
        module: count for module, (count, _) in ALLOWED.items()
    }, "a fact about an op belongs on the op, see the traits of dsv4c.ir.op.Op; fewer are always welcome"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("node.op.name == 'linear'", 1),
        ("op.name in ('linear', 'cast')", 1),
        ("node.op.name not in VIEWS", 1),
        ("roles = {'linear': 1}\nroles.get(node.op.name)", 1),
        ("{'linear': 1}.get(node.op.name)", 1),
        ("ROLES[node.op.name]", 1),
        ("f'{op.name}.{k}' in GEOMETRY", 1),
        ("isinstance(node.op, Linear | Cast)", 1),
        ("match op:\n    case Linear() | Cast():\n        pass", 1),
        ("node.op.name == wanted", 0),
        ("counts = {}\ncounts[node.op.name] = counts.get(node.op.name, 0) + 1", 0),
        ("OPS.get(node.op.name)", 0),
        ("isinstance(node.op, Fused)", 0),
        ("node.name == 'linear'", 0),
        ("node.op.view", 0),
    ],
)
def test_what_counts_as_a_decision(text: str, count: int) -> None:
    imports = "from dsv4c.ir.ops.linear import Linear\nfrom dsv4c.ir.ops.math import Cast\n"
    assert len(list(decisions(ast.parse(imports + text)))) == count
