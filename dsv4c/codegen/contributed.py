"""Kernels of other packages: functions under `@kernel` in what their entry points of `dsv4c.kernels` name."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

from dsv4c.codegen.build import Package
from dsv4c.codegen.registry import Kernel, kernels_in
from dsv4c.errors import BuildError
from dsv4c.ir.op import Op
from dsv4c.passes.pipeline import loaded_entries, place_of

GROUP = "dsv4c.kernels"
"""Entry points of this group contribute kernels."""


def installed() -> tuple[Kernel, ...]:
    """Kernels of installed packages, in order of their entry points' names. Raises GraphError naming an entry
    point that cannot be loaded, BuildError for what contributes none, or for a second package for one op.
    """
    return agreed(
        replace(kernel, package=package)
        for entry, given in loaded_entries(GROUP)
        for package in [_package(entry)]
        for kernel in _flatten(str(package), given)
    )


def agreed(kernels: Iterable[Kernel]) -> tuple[Kernel, ...]:
    """`kernels`, among which one package at most contributes for any op. Raises BuildError naming two."""
    found: list[Kernel] = []
    takes: dict[type[Op], Kernel] = {}
    for kernel in kernels:
        for op in kernel.ops:
            other = takes.setdefault(op, kernel)
            if other.package != kernel.package:
                raise BuildError(
                    f"{other.package} and {kernel.package} both contribute a kernel for {op.name}; "
                    "uninstall one"
                )
        found.append(kernel)
    return tuple(found)


def origin(kernel: Kernel) -> dict[str, str]:
    """Who contributed a kernel, and the file and line that it is written in, as plan data."""
    return {"name": kernel.name, "kind": "kernel", "source": str(kernel.package), "at": place_of(kernel.ask)}


def _package(entry: EntryPoint) -> Package:
    """The package of an entry point that is loaded."""
    module = sys.modules[entry.module.partition(".")[0]]
    file = Path(module.__file__ or "")
    whole = hasattr(module, "__path__")
    files = sorted(file.parent.rglob("*.py")) if whole else [file]
    text = b"\0".join(f.relative_to(file.parent).as_posix().encode() + b"\0" + f.read_bytes() for f in files)
    name, version = (entry.name, "") if entry.dist is None else (entry.dist.name, entry.dist.version)
    folder = file.parent.parent if whole else file.parent
    return Package(name, version, entry.value, str(folder), hashlib.sha256(text).hexdigest())


def _flatten(source: str, given: Any) -> Sequence[Kernel]:
    if isinstance(given, Kernel):
        return [given]
    if isinstance(given, ModuleType) and (found := kernels_in(given)):
        return found
    if isinstance(given, Sequence) and not isinstance(given, str):
        return [kernel for part in given for kernel in _flatten(source, part)]
    raise BuildError(
        f"{source} contributes {given!r:.100}; expected a function under @kernel, or a module with some"
    )
