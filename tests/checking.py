"""Switches single checks of a module off, to see that a named test notices.

A check is an `if` whose body refuses (raises, yields or records what is wrong, returns a reason, a finding),
one that ends a search at its BUDGET, or a call of `expect`. Switched off, it does nothing; all else stays.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, ModuleType
from typing import Any

from dsv4c.ir.op import OPS


def checks(module: ModuleType) -> list[str]:
    """Every check as `function: condition`, in order of the source; repeated ones get a number."""
    return [name for name, _, _ in _found(ast.parse(inspect.getsource(module)))]


@contextmanager
def without(module: ModuleType, check: str) -> Iterator[None]:
    """`module` with that check switched off. Every reference to its function sees it, however imported."""
    tree = ast.parse(inspect.getsource(module))
    ((qualname, node),) = [(q, n) for name, q, n in _found(tree) if name == check]
    if isinstance(node, ast.If):
        node.test = ast.copy_location(ast.Constant(False), node.test)
    else:
        node.value = ast.copy_location(ast.Constant(None), node)
    function = _function(module, qualname)
    code = next(c for c in _codes(compile(tree, str(module.__file__), "exec")) if c.co_qualname == qualname)
    kept, function.__code__ = function.__code__, code
    try:
        yield
    finally:
        function.__code__ = kept


@contextmanager
def own_ops() -> Iterator[None]:
    """Ops that tests declare inside of functions are declared at every call: forget them before and after."""
    kept = {name: op for name, op in OPS.items() if _passing(op)}
    try:
        for name in kept:
            del OPS[name]
        yield
    finally:
        for name in [name for name, op in OPS.items() if _passing(op)]:
            del OPS[name]
        OPS.update(kept)


def _passing(op: type) -> bool:
    return op.__module__.startswith("tests.") and ("<locals>" in op.__qualname__ or op.name == "broken_test")  # type: ignore[attr-defined]


def notices(test: Callable[..., Any], *arguments: Any) -> bool:
    """Does the test fail?"""
    with own_ops():
        try:
            test(*arguments)
        except BaseException as failure:
            if isinstance(failure, KeyboardInterrupt | SystemExit):
                raise
            return True
    return False


def _found(tree: ast.Module) -> Iterator[tuple[str, str, Any]]:
    """(name, qualified name of the function, node) of every check."""
    seen: dict[str, int] = {}

    def walk(node: ast.AST, scope: list[str]) -> Iterator[tuple[str, str, Any]]:
        for child in ast.iter_child_nodes(node):
            inner = scope
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = [*scope, child.name]
            elif _is_check(child):
                text = ast.unparse(child.test if isinstance(child, ast.If) else child.value.args[0])  # type: ignore[attr-defined]
                name = f"{'.'.join(scope)}: {text}"
                seen[name] = seen.get(name, 0) + 1
                yield name if seen[name] == 1 else f"{name} #{seen[name]}", ".".join(scope), child
            yield from walk(child, inner)

    yield from walk(tree, [])


def _is_check(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "expect"
    if not isinstance(node, ast.If):
        return False
    return "BUDGET" in ast.unparse(node.test) or any(_refuses(statement) for statement in node.body)


def _refuses(statement: ast.stmt) -> bool:
    match statement:
        case ast.Raise() | ast.Expr(ast.Yield()):
            return True
        case ast.Expr(ast.Call(ast.Attribute(attr="fail"))):
            return True
        case ast.Return(ast.Tuple([ast.Constant(str()), *_])):
            return True
        case ast.Return(ast.Call(ast.Name("Finding"), [ast.Name("DIFFERENT"), *_])):
            return True
    return False


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _function(module: ModuleType, qualname: str) -> FunctionType:
    found: Any = module
    for name in qualname.split("."):
        found = vars(found)[name] if isinstance(found, type) else getattr(found, name)
    found = getattr(found, "fget", found)
    function = inspect.unwrap(found)
    assert isinstance(function, FunctionType)
    return function
