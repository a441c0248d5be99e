"""What a plan can be compiled for: the CPU's bodies, or kernels for a GPU and the files they come in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dsv4c.arch import ARCHS, Arch
from dsv4c.codegen.bodies import Bodies
from dsv4c.codegen.lower import Coder

if TYPE_CHECKING:
    from dsv4c.codegen.build import Source

Progress = Callable[[str, int, int], None]


class Target(Protocol):
    """Code, and what of it a plan keeps. `bodies` is the CPU's code, which every plan runs at load."""

    bodies: Bodies

    @property
    def coder(self) -> Coder: ...

    @property
    def sources(self) -> Mapping[str, Source]:
        """Of the kernels that code was asked for, by the names that launches call them."""
        ...

    def build(self, store: Path, progress: Progress | None) -> None:
        """Compile what code was asked for, or take it from `store`. Raises BuildError."""
        ...

    @property
    def files(self) -> Mapping[str, bytes]:
        """What launches call by name, by path within a plan."""
        ...

    @property
    def kernels(self) -> Mapping[str, Mapping[str, Any]]:
        """Records of the kernels, by the names that launches call them."""
        ...

    @property
    def cached(self) -> int:
        """Kernels that `build` found in the store."""
        ...

    @property
    def versions(self) -> Mapping[str, str]:
        """Of the tools that made its code."""
        ...


class Cpu:
    """Ops run by their meaning."""

    cached = 0

    def __init__(self) -> None:
        self.bodies = Bodies()
        self.kernels: Mapping[str, Mapping[str, Any]] = {}
        self.sources: Mapping[str, Source] = {}
        self.versions: Mapping[str, str] = {}

    @property
    def coder(self) -> Coder:
        return self.bodies

    @property
    def files(self) -> Mapping[str, bytes]:
        return self.bodies.files

    def build(self, store: Path, progress: Progress | None) -> None:
        """Nothing to do."""


class Gpu:
    """Kernels, cross-compiled."""

    def __init__(self, arch: Arch) -> None:
        from dsv4c.codegen.build import toolchain
        from dsv4c.codegen.select import Kernels  # loads jinja2 and every family

        self.arch = arch
        self.versions = {"toolchain": toolchain()}
        self.bodies = Bodies()
        self.coder = Kernels(arch)
        self.kernels: dict[str, Mapping[str, Any]] = {}
        self.cached = 0
        self._files: dict[str, bytes] = {}

    @property
    def files(self) -> Mapping[str, bytes]:
        return self._files | self.bodies.files

    @property
    def sources(self) -> Mapping[str, Source]:
        return self.coder.sources

    def build(self, store: Path, progress: Progress | None) -> None:
        from dsv4c.codegen.build import build

        def watch(done: int, total: int, _: object) -> None:
            if progress is not None:
                progress("build", done, total)

        sources = dict(sorted(self.coder.sources.items()))
        for (key, source), made in zip(
            sources.items(), build(list(sources.values()), self.arch.name, store, progress=watch), strict=True
        ):
            contents = {"source": source.text.encode(), "cubin": made.cubin, "ptx": made.ptx.encode()}
            suffix = {"source": "py", "cubin": "cubin", "ptx": "ptx"}
            paths = {kind: f"kernels/{key}.{suffix[kind]}" for kind in contents}
            self._files |= {paths[kind]: content for kind, content in contents.items()}
            self.kernels[key] = {
                "symbol": made.symbol,
                **paths,
                **asdict(made.resources),
                "not_run_here": not self.arch.run_here,
            }
            self.cached += made.cached


def target_of(name: str) -> Target:
    """The target of that name: cpu, or a GPU architecture."""
    return Cpu() if name == "cpu" else Gpu(ARCHS[name])
