"""What a plan can be compiled for: the CPU's bodies, or kernels for a GPU and the files they come in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dsv4c.arch import ARCHS
from dsv4c.codegen.bodies import Bodies
from dsv4c.codegen.lower import Coder
from dsv4c.cuts import Cut, cuts_for, read_rows
from dsv4c.errors import BuildError
from dsv4c.plan.records import Program
from dsv4c.plan.variants import Variant

if TYPE_CHECKING:
    from dsv4c.codegen.build import Source

Progress = Callable[[str, int, int], None]

TUNED = Path(__file__).parent / "tuned.json"
"""What `dsv4c tune` found faster than planned, for kernels of the releases' models."""


class Target(Protocol):
    """Code, and what of it a plan keeps. `bodies` is the CPU's code, which every plan runs at load."""

    bodies: Bodies

    @property
    def coder(self) -> Coder: ...

    @property
    def sources(self) -> Mapping[str, Source]:
        """Of the kernels that code was asked for, by the names that launches call them."""
        ...

    @property
    def contributed(self) -> Sequence[Mapping[str, str]]:
        """Of other packages' kernels that code was asked for: who gave them, as plan data."""
        ...

    def settle(self, programs: Iterable[Program], edits: Path | None) -> None:
        """Keep the code that these programs launch, and look at texts of kernels that dsv4c did not write:
        contributed ones, and edited files of the folder `edits`, which take the place of generated ones.
        Raises BuildError for one that does not fit its launches.
        """
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

    @property
    def cuts(self) -> Mapping[str, Cut]:
        """How kernels are cut that are not as planned, by their keys."""
        ...

    @property
    def tunable(self) -> Collection[str]:
        """The kernels that can be cut otherwise."""
        ...

    def variants(
        self, kernels: Sequence[str], each: int, store: Path, progress: Progress | None
    ) -> Sequence[Variant]:
        """Up to `each` other cuts of these kernels, built. Raises BuildError."""
        ...


class Cpu:
    """Ops run by their meaning."""

    cached = 0

    def __init__(self) -> None:
        self.bodies = Bodies()
        self.kernels: Mapping[str, Mapping[str, Any]] = {}
        self.sources: Mapping[str, Source] = {}
        self.versions: Mapping[str, str] = {}
        self.contributed: Sequence[Mapping[str, str]] = ()
        self.cuts: Mapping[str, Cut] = {}
        self.tunable: Collection[str] = ()

    @property
    def coder(self) -> Coder:
        return self.bodies

    @property
    def files(self) -> Mapping[str, bytes]:
        return self.bodies.files

    def settle(self, programs: Iterable[Program], edits: Path | None) -> None:
        if edits is not None:
            raise BuildError(f"{edits}: the cpu has no kernels to edit; compile for a GPU target")

    def build(self, store: Path, progress: Progress | None) -> None:
        """Nothing to do."""

    def variants(
        self, kernels: Sequence[str], each: int, store: Path, progress: Progress | None
    ) -> Sequence[Variant]:
        """It has no kernels."""
        return ()


def target_of(name: str, cuts: Mapping[str, Cut] | None = None) -> Target:
    """The target of that name: cpu, or a GPU architecture. `cuts`: how kernels are cut, by their keys, in
    place of what dsv4c has measured.
    """
    if name == "cpu":
        return Cpu()
    # Loads jinja2 and every family of kernels, which a plan for the CPU never needs.
    from dsv4c.codegen.gpu import Gpu

    arch = ARCHS[name]
    chosen = cuts_for(arch.gpu, read_rows(TUNED)) if cuts is None else cuts
    return Gpu(replace(arch, cuts=tuple(sorted(chosen.items()))))
