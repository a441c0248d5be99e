"""Kernel sources: a template and literals become one readable Python file, with everything its launch needs
beside it.

A kernel family is a function from a frozen spec and an `Arch` to an `Emission`. Nothing here imports the
compiler or a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from dsv4c.cuts import Cut

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter, in ABI order: 8 bytes for a pointer, 4 for an i32.

    A pointer leads to `component` (data, scale, tail, global_scale) of the value that the launch binds to
    `operand`. `early`: read before the wait, though no weight.
    """

    operand: str
    component: str = "data"
    kind: str = "pointer"
    early: bool = False

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
    module: Any = environment().get_template("stages.py.jinja").module
    return str(module.host(symbol, pointers, grid, cluster, resident)).strip() + "\n"
