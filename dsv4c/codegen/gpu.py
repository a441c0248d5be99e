"""The GPU targets: the kernels that launches were lowered to, cross-compiled, as files of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dsv4c.codegen.build as kernels
from dsv4c.arch import Arch
from dsv4c.codegen.abi import check_emission
from dsv4c.codegen.bodies import Bodies
from dsv4c.codegen.build import Source, toolchain
from dsv4c.codegen.contributed import installed, origin
from dsv4c.codegen.edits import edited
from dsv4c.codegen.select import Kernels
from dsv4c.passes.pipeline import OURS
from dsv4c.plan.records import KernelCode, Program

Progress = Callable[[str, int, int], None]


class Gpu:
    """Kernels, cross-compiled."""

    def __init__(self, arch: Arch) -> None:
        self.arch = arch
        self.versions = {"toolchain": toolchain()}
        self.bodies = Bodies()
        self.coder = Kernels(arch, installed())
        self.kernels: dict[str, Mapping[str, Any]] = {}
        self.cached = 0
        self._files: dict[str, bytes] = {}
        self._edited: Mapping[str, Source] = {}

    @property
    def files(self) -> Mapping[str, bytes]:
        return self._files | self.bodies.files

    @property
    def sources(self) -> Mapping[str, Source]:
        return self.coder.sources

    @property
    def contributed(self) -> Sequence[Mapping[str, str]]:
        packages = {source.package for source in self.sources.values()}
        return [origin(kernel) for kernel in self.coder.contributed if kernel.package in packages]

    def settle(self, programs: Iterable[Program], edits: Path | None) -> None:
        codes = (launch.code for program in programs for launch in program.launches)
        launched = {code.kernel for code in codes if isinstance(code, KernelCode)}
        for name in self.coder.sources.keys() - launched:  # what was unfolded after all
            del self.coder.sources[name]
        for name, source in self.sources.items():
            if source.package is not None:
                check_emission(self.coder.emissions[name], source.package)
        if edits is not None:
            self._edited = edited(self.sources, edits)

    def build(self, store: Path, progress: Progress | None) -> None:
        def watch(done: int, total: int, _: object) -> None:
            if progress is not None:
                progress("build", done, total)

        sources = dict(sorted({**self.coder.sources, **self._edited}.items()))
        for (key, source), made in zip(
            sources.items(),
            kernels.build(list(sources.values()), self.arch.name, store, progress=watch),
            strict=True,
        ):
            contents = {"source": source.text.encode(), "cubin": made.cubin, "ptx": made.ptx.encode()}
            suffix = {"source": "py", "cubin": "cubin", "ptx": "ptx"}
            paths = {kind: f"kernels/{key}.{suffix[kind]}" for kind in contents}
            self._files |= {paths[kind]: content for kind, content in contents.items()}
            self.kernels[key] = {
                "symbol": made.symbol,
                "origin": origin_of(source),
                "edited": key in self._edited,
                **paths,
                **asdict(made.resources),
                "not_run_here": not self.arch.run_here,
            }
            self.cached += made.cached


def origin_of(source: Source) -> str:
    """Whose family generated a kernel: "dsv4c", or another package and its version."""
    package = source.package
    return OURS if package is None else f"{package.name} {package.version}"
