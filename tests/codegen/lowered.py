"""GPU plans for tests, without compiling a kernel: cubins are stand-ins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from dsv4c.codegen.build import Built, Resources, Source, source_key
from dsv4c.compiler.compile import compile
from dsv4c.plan.folder import Plan


def stand_in(sources: Sequence[Source], target: str, store: Path, **_: Any) -> list[Built]:
    """What `build` returns, with a cubin of a few bytes."""
    resources = Resources(registers=32, stack=0, static_shared=0, code=128)
    return [
        Built(s.symbol, target, source_key(s, target), b"\x7fELF" + s.symbol.encode(), "", resources, False)
        for s in sources
    ]


@contextmanager
def no_compiler() -> Iterator[None]:
    """`compile` gives plans whose kernels were not built."""
    with mock.patch("dsv4c.codegen.build.build", stand_in):
        yield


def gpu_plan(model: str | Path = "tiny", **options: Any) -> Plan:
    """A plan for sm_90a unless `options` say otherwise."""
    with no_compiler():
        return compile(model, **{"target": "sm_90a", "max_context": 256, **options})
