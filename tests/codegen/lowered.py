"""GPU plans for tests, without compiling a kernel: cubins are stand-ins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from dsv4c.codegen.build import Built, Source, source_key
from dsv4c.codegen.kernels import KERNELS
from dsv4c.compiler.compile import compile
from dsv4c.plan.folder import Plan
from tests.plan.cubins import RESOURCES, stand_in_cubin

TUNED = tuple(kernel for kernel in KERNELS if kernel.ops)
"""The families that take ops by name; none is generated."""


def stand_in(sources: Sequence[Source], target: str, store: Path, **_: Any) -> list[Built]:
    """What `build` returns, with cubins that have no code."""
    made = [(source, stand_in_cubin(source.symbol, source.text, target)) for source in sources]
    return [Built(s.symbol, target, source_key(s, target), c, "", RESOURCES, False) for s, c in made]


@contextmanager
def no_compiler() -> Iterator[None]:
    """`compile` gives plans whose kernels were not built."""
    with mock.patch("dsv4c.codegen.build.build", stand_in):
        yield


@contextmanager
def tuned_families() -> Iterator[None]:
    """No kernel is generated: what the families do not take has none."""
    with mock.patch("dsv4c.codegen.select.KERNELS", TUNED):
        yield


@contextmanager
def whole_bodies() -> Iterator[None]:
    """No kernel is generated around a product: a fusion that holds a large one has none."""
    known = tuple(kernel for kernel in KERNELS if kernel.name != "around_products")
    with mock.patch("dsv4c.codegen.select.KERNELS", known):
        yield


def gpu_plan(model: str | Path = "tiny", **options: Any) -> Plan:
    """A plan for sm_90a and for chunks of eight rows unless `options` say otherwise."""
    with no_compiler():
        return compile(model, **{"target": "sm_90a", "max_context": 256, "chunk": 8, **options})
