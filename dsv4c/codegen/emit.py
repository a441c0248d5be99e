"""Kernel sources: stages and the literals that they are cut by become one readable Python file, with
everything its launch needs beside it.

A kernel family is a function from a frozen spec and an `Arch` to an `Emission`. Nothing here imports the
compiler or a device.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from textwrap import indent
from typing import Any

import jinja2

from dsv4c.arch import Arch
from dsv4c.cuts import Cut
from dsv4c.plan.declared import read_source
from dsv4c.plan.records import Box

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter, in ABI order: 8 bytes for a pointer, 4 for an i32.

    A pointer leads to `component` (data, scale, tail, global_scale) of the value that the launch binds to
    `operand`, or with a `box` to a tensor map of it. `early`: read before the wait, though no weight.
    """

    operand: str
    component: str = "data"
    kind: str = "pointer"
    early: bool = False
    box: Box | None = None

    @property
    def name(self) -> str:
        """The parameter's name in the generated text; `m` marks a whole tensor."""
        return f"m_{self.operand}" if self.component == "data" else f"m_{self.operand}_{self.component}"


@dataclass(frozen=True)
class Tuned:
    """What tuning knows a kernel by, how it is cut, and how else it may be: `others` are cuts with the kernel
    that each gives, nearest first.
    """

    key: str
    cut: Cut
    others: Callable[[], Iterator[tuple[Cut, Emission]]] = field(compare=False)


@dataclass(frozen=True)
class Emission:
    """A kernel before compilation: its source and the launch facts that a cubin does not hold."""

    symbol: str
    source: str
    grid: tuple[int, int, int]
    block: int
    shared: int  # dynamic shared memory, bytes
    parameters: tuple[Parameter, ...]
    cluster: tuple[int, int, int] = (1, 1, 1)
    programmatic: bool = True  # may sit behind a programmatic edge
    waits: bool = True  # griddepcontrol.wait precedes every dependent access
    packing: Mapping[str, str] = field(default_factory=dict)  # weight operand -> name of its packing
    tuned: Tuned | None = field(default=None, compare=False)


@cache
def environment() -> jinja2.Environment:
    """The jinja2 environment of the kernel templates: undefined names are errors, blocks leave no blank
    lines.
    """
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def render(template: str, **context: object) -> str:
    """The text of `templates/<template>`; checked to be Python that opens with a docstring."""
    text = environment().get_template(template).render(context)
    compile(text, template, "exec")
    assert text.startswith('"""'), f"{template} does not open with what it computes"
    return text


def host(
    symbol: str,
    pointers: Sequence[str],
    grid: Sequence[int | str],
    cluster: Sequence[int] | None = None,
    resident: int | None = None,
) -> str:
    """The function that launches `kernel(*pointers)` once, the last of every kernel's text.

    A grid counts in numbers, or in `rows`, `sequences`, `vectors` or `parts`, perhaps times a number: then
    one kernel serves any number of them. `resident`: CTAs that an SM must have registers for.
    """
    module: Any = environment().get_template("host.py.jinja").module
    return str(module.host(symbol, pointers, grid, cluster, resident)).strip() + "\n"


def compose(
    symbol: str,
    what: str,
    operands: Mapping[Parameter, str | None],
    launch: str,
    stages: Sequence[str],
    *,
    threads: int,
    grid: Sequence[int | str],
    sizes: Mapping[str, int] | None = None,
    cluster: int = 1,
    resident: int | None = None,
    spec: object = None,
    record: str | None = "",
    given: Mapping[str, str] | None = None,
    functions: Sequence[str] = (),
    elements: Mapping[str, str] | None = None,
    meanings: Sequence[str] = (),
) -> Emission:
    """A kernel whose code is in `dsv4c.codegen.lib`: its text says what it computes, the `spec` by which it
    is cut, and its `stages` in order. These are calls of the library on `SPEC`, on `m`, the `record` of its
    operands' pointers (by default `Operands` of the last stage's module), and on what stages before returned.
    A kernel of several parts has a spec for each, by name, and no record: its stages make theirs.

    what, launch: for people, as the operands' types are, by parameter; None is one that the record has and
    this kernel does without, and of an empty one `what` tells. grid: counts in numbers, or in those of
    `sizes` as `host` does. cluster: so many CTAs in a row. resident: as for `host`. given: what the record's
    fields are given, if not a pointer each. functions: that stages are given, on the `meanings` of primitives
    (modules of that package); elements: what their pointers, by name, lead to.
    """
    parameters = tuple(p for p, type_ in operands.items() if type_ is not None)
    types = {p.name.removeprefix("m_"): type_ for p, type_ in operands.items()}
    made = None
    if record is not None:
        record = record or f"{_CALLED.findall(stages[-1])[0]}.Operands"
        given = given or {name: "None" if type_ is None else f"m_{name}" for name, type_ in types.items()}
        made = call_text(record, [f"{name}={value}" for name, value in given.items()])
    specs = spec if isinstance(spec, Mapping) else {} if spec is None else {"SPEC": spec}
    code = "\n".join([made or "", *functions, *stages])
    source = render(
        "kernel.py.jinja",
        symbol=symbol,
        what=what,
        types={name: type_ for name, type_ in types.items() if type_},
        launch=launch,
        numbers=sorted({*_NUMBER.findall(code), *(["Int32"] if sizes else []), *(elements or {}).values()}),
        libs=sorted({*_CALLED.findall("\n".join([made or "", *stages]))} - {*meanings}),
        meanings=meanings,
        uses=sorted(set(_ELEMENT.findall(code))) if meanings else [],
        numbers_of=elements or {},
        functions=functions,
        loops="cutlass." in code,
        shapes=_classes(tuple(specs.values())),
        threads=threads,
        specs={name: literal(value) for name, value in specs.items()},
        pointers=[p.name for p in parameters],
        record=record,
        given=made,
        stages=stages,
        grid=grid,
        cluster=[cluster, 1, 1] if cluster > 1 else None,
        resident=resident,
    )
    said = read_source(source)
    x, y, z = said.grid_of(sizes or {})
    return Emission(f"{symbol}_0", source, (x, y, z), threads, said.shared, parameters, said.cluster)


_CALLED = re.compile(
    r"(?:^|[ (])(?!cutlass\.)([a-z]\w*)\.\w+\(", re.MULTILINE
)  # modules whose functions a line calls
_ELEMENT = re.compile(r"(?<!\.)\b(at|put)\(")  # of arrays
_NUMBER = re.compile(r"\b(?:B?Float|Int|Uint)\d+\b")


def call_text(name: str, arguments: Sequence[str]) -> str:
    """A call on one line, or with a line for each argument where that is too long."""
    line = f"{name}({', '.join(arguments)})"
    if len(line) <= 100 and "\n" not in line:
        return line
    return f"{name}(\n" + "".join(f"{indent(a, '    ')},\n" for a in arguments) + ")"


def place_of(block: str, first: int) -> str:
    """A CTA's number among those from number `first` on."""
    return f"{block} - {first}" if first else block


def branches(bodies: Sequence[str], ends: Sequence[int], number: str = "block") -> str:
    """Each body for the CTAs up to number `ends` of it, behind those of the one before; alone, for all. Or
    for warps, as `number` says.
    """
    if len(bodies) == 1:
        return bodies[0]
    heads = [f"{number} < {end}:" for end in ends[: len(bodies) - 1]]
    heads = [f"if {heads[0]}", *(f"elif {head}" for head in heads[1:]), "else:"]
    return "\n".join(f"{head}\n{indent(body, '    ')}" for head, body in zip(heads, bodies, strict=True))


def literal(value: object) -> str:
    """The expression that makes numbers, texts, frozen dataclasses, and tuples of them."""
    if isinstance(value, tuple):
        return call_text("", [literal(v) for v in value]) if len(value) != 1 else f"({literal(value[0])},)"
    if not is_dataclass(value):
        return f'"{value}"' if isinstance(value, str) else repr(value)
    given = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}
    return call_text(type(value).__name__, [f"{name}={literal(v)}" for name, v in given.items()])


def _classes(value: object) -> dict[str, list[str]]:
    """The classes that `literal` names, by module."""
    found: dict[str, set[str]] = {}

    def visit(value: object) -> None:
        if isinstance(value, tuple):
            for v in value:
                visit(v)
        if is_dataclass(value):
            found.setdefault(type(value).__module__, set()).add(type(value).__name__)
            for f in fields(value):
                if getattr(value, f.name) != f.default:
                    visit(getattr(value, f.name))

    visit(value)
    return {module: sorted(names) for module, names in sorted(found.items())}


def floor_text(nbytes: int, arch: Arch, each: str = "") -> str:
    """What reading so many bytes, for `each` where that is said, takes at least: for a kernel's text."""
    per = f" per {each}" if each else ""
    return f"Reads {nbytes} B{per}: {arch.floor_us(nbytes):.2f} us at the read bandwidth of the {arch.gpu}."
