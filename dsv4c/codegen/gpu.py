"""The GPU targets: the kernels that launches were lowered to, cross-compiled, as files of a plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import dsv4c.codegen.build as builder
from dsv4c.arch import Arch
from dsv4c.codegen.abi import check_emission
from dsv4c.codegen.bodies import Bodies
from dsv4c.codegen.build import Built, Source, toolchain
from dsv4c.codegen.contributed import installed, origin
from dsv4c.codegen.edits import edited
from dsv4c.codegen.select import Kernels
from dsv4c.cuts import PLANNED, Cut
from dsv4c.passes.pipeline import OURS
from dsv4c.plan.records import KernelCode, Program
from dsv4c.plan.variants import Variant

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
    def cuts(self) -> Mapping[str, Cut]:
        made = (self.coder.emissions[name].tuned for name in self.sources)
        return {t.key: t.cut for t in made if t is not None and t.cut != PLANNED}

    @property
    def tunable(self) -> Collection[str]:
        return [name for name in self.sources if self.coder.emissions[name].tuned is not None]

    def variants(
        self, kernels: Sequence[str], each: int, store: Path, progress: Progress | None
    ) -> Sequence[Variant]:
        made = []
        for name in kernels:
            tuned = self.coder.emissions[name].tuned
            assert tuned is not None, name
            made += [(name, tuned.key, cut, e) for cut, e in islice(tuned.others(), each)]
        sources = [Source(emission.symbol, emission.source) for *_, emission in made]
        found = []
        for (name, key, cut, e), source, kernel in zip(
            made, sources, self._built(sources, store, progress), strict=True
        ):
            record, files = in_plan(source.name, source, kernel, self.arch)
            found.append(Variant(name, key, cut, source.name, e.grid, e.block, e.shared, record, files))
        return found

    def _built(self, sources: Sequence[Source], store: Path, progress: Progress | None) -> Sequence[Built]:
        def watch(done: int, total: int, _: object) -> None:
            if progress is not None:
                progress("build", done, total)

        return builder.build(sources, self.arch.name, store, progress=watch)

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
        sources = dict(sorted({**self.coder.sources, **self._edited}.items()))
        built = self._built(list(sources.values()), store, progress)
        for (key, source), made in zip(sources.items(), built, strict=True):
            self.kernels[key], files = in_plan(key, source, made, self.arch, edited=key in self._edited)
            self._files |= files
            self.cached += made.cached


def in_plan(
    key: str, source: Source, made: Built, arch: Arch, *, edited: bool = False
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What a plan holds of a kernel that launches call `key`: its record, and its files by path."""
    contents = {"source": source.text.encode(), "cubin": made.cubin, "ptx": made.ptx.encode()}
    suffix = {"source": "py", "cubin": "cubin", "ptx": "ptx"}
    paths = {kind: f"kernels/{key}.{suffix[kind]}" for kind in contents}
    record = {
        "symbol": made.symbol,
        "origin": origin_of(source),
        "edited": edited,
        **paths,
        **asdict(made.resources),
        "not_run_here": not arch.run_here,
    }
    return record, {paths[kind]: content for kind, content in contents.items()}


def origin_of(source: Source) -> str:
    """Whose family generated a kernel: "dsv4c", or another package and its version."""
    package = source.package
    return OURS if package is None else f"{package.name} {package.version}"
