"""The text and JSON forms of a graph. `print_graph(parse_graph(print_graph(g)))` is `print_graph(g)`.

    graph tiny.decode-1
    input %tokens: i32[1]
    param %layers.0.attn.wq_a: q[e4m3,ue8m0,128x128][128,256]
    @layers.0.attn
    %.qa: bf16[1,128] = linear(%.x, %.wq_a) {out=bf16}
    return logits=%logits

Names that start with the section's scope are shortened to `%.rest`. `from [..]` names the unfused results
that a rewritten node stands for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from math import inf, isfinite, nan
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from dsv4c.errors import GraphError
from dsv4c.ir.graph import Builder, Graph, Node, Value
from dsv4c.ir.op import Op, lookup
from dsv4c.types import DType, QuantFormat, TypeSyntaxError, parse_format, parse_type

SCHEMA = 1
"""Version of the JSON form; a reader refuses any other."""


def print_attribute(value: Any) -> str:
    """A field's value as text; reads back with `parse_attribute`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, DType | QuantFormat):
        return str(value)
    if isinstance(value, tuple):
        return f"({','.join(map(print_attribute, value))})"
    raise GraphError(f"attribute {value!r} of type {type(value).__name__} has no text form")


def print_op(op: Op) -> str:
    """Name and attributes: `rms_norm {eps=1e-06, precision=f32}`."""
    attributes = op.attributes()
    if not attributes:
        return op.name
    return f"{op.name} {{{', '.join(f'{k}={print_attribute(v)}' for k, v in attributes.items())}}}"


def print_node(node: Node, scope: str = "", *, origins: bool = True) -> str:
    """One line: results, op, operands, attributes, origin; without `origins` only how many they are."""
    prefix = f"{scope}." if scope else ""

    def short(name: str) -> str:
        return f"%.{name[len(prefix) :]}" if prefix and name.startswith(prefix) else f"%{name}"

    results = ", ".join(f"{short(v.name)}: {v.type}" for v in node.outputs)
    operands = ", ".join(short(v.name) for v in node.inputs)
    attributes = node.op.attributes()
    tail = (
        f" {{{', '.join(f'{k}={print_attribute(v)}' for k, v in attributes.items())}}}" if attributes else ""
    )
    origin = ""
    if node.origin:
        origin = f" from [{' '.join(node.origin)}]" if origins else f" from {len(node.origin)} nodes"
    return f"{results} = {node.op.name}({operands}){tail}{origin}"


def print_nodes(nodes: Iterable[Node], *, origins: bool = True) -> list[str]:
    """Lines of nodes, with a scope header wherever the scope changes."""
    lines, scope = [], ""
    for node in nodes:
        if node.scope != scope:
            scope = node.scope
            lines.append(f"@{scope}")
        lines.append(print_node(node, scope, origins=origins))
    return lines


def print_graph(graph: Graph, *, origins: bool = True) -> str:
    """The whole graph as text, ending in a newline. Without `origins` it does not read back."""
    lines = [f"graph {graph.name}"]
    for values in (graph.inputs, graph.states, graph.params):
        lines += [f"{v.kind.value} %{v.name}: {v.type}" for v in values]
    lines += print_nodes(graph.nodes, origins=origins)
    lines.append("return " + ", ".join(f"{name}=%{v.name}" for name, v in graph.outputs.items()))
    return "\n".join(lines) + "\n"


_NAME = r"[A-Za-z0-9_.]+"
_DECLARATION = re.compile(rf"(input|state|param) %({_NAME}): (\S+)")
_TYPE = r"(?:q\[[^\]]*\])?[a-z0-9]*\[[0-9,]*\]"
_RESULT = re.compile(rf"%({_NAME}): ({_TYPE})")
_RESULTS = re.compile(rf"%{_NAME}: {_TYPE}(?:, %{_NAME}: {_TYPE})*")
_OPERANDS = re.compile(rf"(?:%{_NAME}(?:, ?%{_NAME})*)?")
_CALL = re.compile(r"(?P<op>[a-z][a-z0-9_]*)\((?P<operands>[^)]*)\)")
_FIELD = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=")
_LITERAL = re.compile(r'q\[[^\]]*\]|"(?:[^"\\]|\\.)*"|[^\s,()"]+')
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,18})")
_EXPONENT = r"e[+-]?[0-9]{1,3}"
_FLOAT = re.compile(rf"-?[0-9]{{1,20}}(?:\.[0-9]{{1,40}}(?:{_EXPONENT})?|{_EXPONENT})")
_WORDS = {"none": None, "true": True, "false": False, "inf": inf, "-inf": -inf, "nan": nan}
MOST_NESTED = 8
"""Tuples within tuples of an attribute."""


def parse_attribute(text: str) -> Any:
    """`print_attribute` read back. Raises GraphError."""
    value, end = _value(text, 0)
    if end != len(text):
        raise GraphError(f"cannot read the attribute value {_cut(text)!r}: {_cut(text[end:])!r} is left over")
    return value


def _value(text: str, at: int, depth: int = 0) -> tuple[Any, int]:
    """The value that begins at `at`, and where it ends."""
    if not text.startswith("(", at):
        match = _LITERAL.match(text, at)
        if match is None:
            raise GraphError(f"cannot read the attribute value {_cut(text[at:])!r}")
        return _literal(match[0]), match.end()
    if depth == MOST_NESTED:
        raise GraphError(f"attributes are nested at most {MOST_NESTED} deep, {_cut(text)!r} is deeper")
    items: list[Any] = []
    at += 1
    while not text.startswith(")", at):
        if items and not text.startswith(",", at):
            raise GraphError(f"cannot read the tuple at {_cut(text[at:])!r}; expected (a,b,...)")
        item, at = _value(text, at + bool(items), depth + 1)
        items.append(item)
    return tuple(items), at + 1


@cache
def _literal(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    if text.startswith("q["):
        return _read(parse_format, text)
    if text.startswith('"'):
        return _read(json.loads, text)
    if not text.startswith(tuple("-.0123456789")):
        return _read(DType, text)
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and isfinite(number := float(text)):
        return number
    raise GraphError(f"cannot read the attribute value {_cut(text)!r}")


def _read(kind: Callable[[str], Any], text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise GraphError(f"cannot read the attribute value {_cut(text)!r}") from None


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


@cache
def make_op(name: str, attributes: str) -> Op:
    """An op from its name and its attributes' text. Raises GraphError naming what is missing or unknown."""
    op = lookup(name)
    fields: dict[str, Any] = {}
    at = 0
    while at < len(attributes):
        if fields:
            at += len(", ") if attributes.startswith(", ", at) else len(attributes)
        match = _FIELD.match(attributes, at)
        if match is None:
            raise GraphError(f"cannot read the attributes {_cut(attributes)!r} of {name}")
        if match[1] in fields:
            raise GraphError(f"{name}: attribute {match[1]} is given twice")
        fields[match[1]], at = _value(attributes, match.end())
    return build_op(op, fields)


def build_op(op: type[Op], fields: dict[str, Any]) -> Op:
    """An instance of `op`. Raises GraphError when the fields are not its own or of another type."""
    try:
        made = op(**fields)
    except TypeError as error:
        raise GraphError(f"{op.name}: {str(error).partition(') ')[2] or error}") from None
    hints = _hints(op)  # type: ignore[arg-type]  # mypy takes the class for an instance
    for name, value in fields.items():
        hint = hints.get(name, object)
        if not _is_a(value, hint):
            wanted = hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else hint
            raise GraphError(f"{op.name}: attribute {name} is {print_attribute(value)}, expected {wanted}")
    return made


@cache
def _hints(op: type[Op]) -> dict[str, Any]:
    """Annotations of the attributes; none where they name what only a type checker imports."""
    try:
        return get_type_hints(op)
    except NameError:
        return {}


def _is_a(value: Any, hint: Any) -> bool:
    """Is `value` what an attribute so annotated may hold? An integer will do for a float, a bool will not."""
    if get_origin(hint) in (Union, UnionType):
        return any(_is_a(value, choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_a(item, get_args(hint)[0]) for item in value)
    if hint in (int, float):
        return type(value) in (int, hint)
    return isinstance(value, hint)


_EXPECTED_NODE = "expected `%result: type = op(%operand, ...) {attribute=value}`"
WIDEST = 400  # characters of a line that an error shows


class _Parser:
    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        self.number = 0
        self.values: dict[str, Value] = {}

    def fail(self, message: str, near: str = "") -> GraphError:
        line = self.lines[self.number - 1]
        column = max(line.find(near), 0) if near else 0
        start = max(column - WIDEST // 2, 0) if len(line) > WIDEST else 0
        shown = line[start : start + WIDEST]
        return GraphError(f"line {self.number}: {message}\n  {shown}\n  {' ' * (column - start)}^")

    def value(self, name: str, scope: str) -> Value:
        full = f"{scope}{name}" if name.startswith(".") else name
        if full not in self.values:
            raise self.fail(f"%{full} is used before it is defined", f"%{name}")
        return self.values[full]

    def node(self, line: str, builder: Builder, scope: str) -> None:
        written, _, call = line.partition(" = ")
        match = _CALL.match(call)
        if match is None or not _RESULTS.fullmatch(written) or not _OPERANDS.fullmatch(match["operands"]):
            raise self.fail(_EXPECTED_NODE)
        attributes, named = self._tail(call[match.end() :])
        results = _RESULT.findall(written)
        names = [f"{scope}{n}" if n.startswith(".") else n for n, _ in results]
        given = match["operands"].split(",") if match["operands"] else []
        operands = [self.value(o.strip()[1:], scope) for o in given]
        try:
            op = make_op(match["op"], attributes)
            made = builder.emit(op, tuple(operands), names=names, scope=scope, origin=named.split())
        except GraphError as error:
            raise self.fail(str(error)) from None
        for (_, type_), value in zip(results, made, strict=True):
            if str(value.type) != type_:
                raise self.fail(
                    f"%{value.name} is written as {type_} but {match['op']} gives {value.type}", type_
                )
            self.values[value.name] = value

    def _tail(self, text: str) -> tuple[str, str]:
        """Attributes and origin of ` {attributes} from [origin]`, of which either may be missing."""
        origin = ""
        if text.endswith("]") and (start := text.rfind(" from [")) >= 0:
            text, origin = text[:start], text[start + len(" from [") : -1]
        if text and not (text.startswith(" {") and text.endswith("}")):
            raise self.fail(_EXPECTED_NODE)
        return text[2:-1], origin

    def outputs(self, line: str) -> dict[str, Value]:
        outputs: dict[str, Value] = {}
        listed = line[len("return") :].strip()
        for pair in listed.split(",") if listed else []:
            label, equals, name = pair.strip().partition("=%")
            if not (label and equals and name):
                raise self.fail("expected `return label=%value, ...`", pair.strip())
            if label in outputs:
                raise self.fail(f"output {label} is returned twice", pair.strip())
            outputs[label] = self.value(name, "")
        return outputs

    def parse(self) -> Graph:
        outputs: dict[str, Value] | None = None
        builder: Builder | None = None
        scope = ""
        for raw in self.lines:
            self.number += 1
            line = raw.strip()
            if not line or line.startswith("#"):
                continue
            if builder is None:
                if not line.startswith("graph "):
                    raise self.fail("expected `graph NAME`")
                builder = Builder(line[6:].strip())
            elif outputs is not None:
                raise self.fail("nothing may follow `return`")
            elif match := _DECLARATION.fullmatch(line):
                declare = {"input": builder.input, "state": builder.state, "param": builder.param}[match[1]]
                try:
                    self.values[match[2]] = declare(match[2], parse_type(match[3]))
                except (TypeSyntaxError, GraphError) as error:
                    raise self.fail(str(error), match[3]) from None
            elif line.startswith("@"):
                scope = line[1:].strip()
            elif line.startswith("return"):
                outputs = self.outputs(line)
            else:
                self.node(line, builder, scope)
        if builder is None or outputs is None:
            self.number = max(self.number, 1)
            raise GraphError(f"line {self.number}: the text ends without `return`; is it cut off?")
        return builder.finish(outputs)


def parse_graph(text: str) -> Graph:
    """A graph from its text. Raises GraphError with the line and a caret."""
    return _Parser(text).parse()


def graph_to_json(graph: Graph) -> dict[str, Any]:
    """The graph as plain data with a schema version."""

    def declared(values: Iterable[Value]) -> list[dict[str, str]]:
        return [{"name": v.name, "type": str(v.type)} for v in values]

    return {
        "schema": SCHEMA,
        "name": graph.name,
        "inputs": declared(graph.inputs),
        "states": declared(graph.states),
        "params": declared(graph.params),
        "nodes": [
            {
                "op": node.op.name,
                "attributes": {k: print_attribute(v) for k, v in node.op.attributes().items()},
                "inputs": [v.name for v in node.inputs],
                "outputs": declared(node.outputs),
                "scope": node.scope,
                "origin": list(node.origin),
            }
            for node in graph.nodes
        ],
        "outputs": {name: v.name for name, v in graph.outputs.items()},
    }
