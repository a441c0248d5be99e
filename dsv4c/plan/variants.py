"""A plan with other kernels for some of its launches, as a folder: what `dsv4c tune` builds, and times."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dsv4c import strict_json
from dsv4c.cuts import Cut
from dsv4c.errors import ConfigError, PlanError
from dsv4c.plan.check import check
from dsv4c.plan.folder import Plan, load
from dsv4c.plan.records import KernelCode, Launch
from dsv4c.plan.typed import require_types
from dsv4c.publish import published

INDEX, PLAN = "variants.json", "plan"


@dataclass(frozen=True)
class Variant:
    """A kernel `name` that can take the place of the plan's `kernel`: the same arguments and sums, the
    weights where they are. `key` is what tables of cuts know it by; `record` and `files` are as in a plan.
    """

    kernel: str
    key: str
    cut: Cut
    name: str
    grid: tuple[int, int, int]
    block: int
    shared: int
    record: Mapping[str, Any]
    files: Mapping[str, bytes] = field(repr=False, default_factory=dict)


@dataclass(frozen=True)
class Variants:
    """A plan, and its variants kernel by kernel."""

    plan: Plan
    variants: tuple[Variant, ...]

    def with_variant(self, variant: Variant) -> Plan:
        """The plan in which the variant's kernel is launched wherever the one was that it replaces."""
        plan, old = self.plan, self.plan.kernels[variant.kernel]
        buckets = {
            name: replace(program, launches=tuple(_launches(program.launches, variant)))
            for name, program in plan.buckets.items()
        }
        kernels = {key: record for key, record in plan.kernels.items() if key != variant.kernel}
        gone = {old[kind] for kind in ("source", "cubin", "ptx")}
        files = {name: content for name, content in plan.files.items() if name not in gone}
        return replace(
            plan,
            buckets=buckets,
            kernels={**kernels, variant.name: variant.record},
            files={**files, **variant.files},
        )

    def save(self, folder: Path, *, overwrite: bool = False) -> Path:
        """Write the folder, whole or not at all. Raises PlanError."""
        if folder.exists() and not overwrite:
            raise PlanError(f"{folder}: exists; give another folder, or --overwrite to replace it")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with published(folder, replace=overwrite) as made:
                self.plan.save(made / PLAN)
                for path, content in [item for v in self.variants for item in v.files.items()]:
                    (made / path).parent.mkdir(exist_ok=True)
                    (made / path).write_bytes(content)
                rows = [
                    {f.name: getattr(v, f.name) for f in fields(v) if f.name != "files"}
                    | {"cut": v.cut.data, "files": {n: _sha256(c) for n, c in v.files.items()}}
                    for v in self.variants
                ]
                (made / INDEX).write_text(json.dumps({"plan": self.plan.digest, "variants": rows}, indent=1))
        except OSError as error:
            raise PlanError(f"{folder}: cannot be written: {error.strerror or error}") from None
        return folder


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _launches(launches: tuple[Launch, ...], variant: Variant) -> Iterator[Launch]:
    for launch in launches:
        code = launch.code
        if isinstance(code, KernelCode) and code.kernel == variant.kernel:
            code = replace(
                code, kernel=variant.name, grid=variant.grid, block=variant.block, shared=variant.shared
            )
        yield replace(launch, code=code)


def read_variants(folder: Path) -> Variants:
    """What `Variants.save` wrote. Raises PlanError for a folder that is none, is damaged, or holds a variant
    that does not fit the plan's launches.
    """
    index = folder / INDEX
    if not index.is_file():
        raise PlanError(f"{folder}: has no {INDEX}; make it with `dsv4c tune PLAN --build FOLDER`")
    plan = load(folder / PLAN)
    try:
        data = strict_json.parse(index.read_text())
        rows = data["variants"]
        if data["plan"] != plan.digest:
            raise PlanError(f"{index}: is of another plan than {folder / PLAN}; build the folder again")
        found = Variants(plan, tuple(_variant(folder, row, number) for number, row in enumerate(rows)))
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise PlanError(f"{index}: cannot be read: {error}; build the folder again") from None
    for variant in found.variants:
        if variant.kernel not in plan.kernels:
            raise PlanError(f"{index}: the plan has no kernel {variant.kernel}; build the folder again")
        for violation in check(found.with_variant(variant)):
            raise PlanError(f"{index}: {variant.name}: {violation}; build the folder again")
    return found


def _variant(folder: Path, row: dict[str, Any], number: int) -> Variant:
    where = f"{INDEX}: variant {number}"
    if strange := [name for name in row["files"] if not re.fullmatch(r"kernels/\w+\.(py|cubin|ptx)", name)]:
        raise PlanError(f"{where}: {strange[0]!r:.80} is no file of a kernel; build the folder again")
    files = {name: (folder / name).read_bytes() for name in row["files"]}
    for name, digest in row["files"].items():
        if _sha256(files[name]) != digest:
            raise PlanError(f"{folder / name}: is damaged; build the folder again")
    cut, grid = Cut.of(row["cut"], where), tuple(row["grid"])
    made = Variant(**{**row, "cut": cut, "grid": grid, "files": files})
    require_types(made, where)
    return made
