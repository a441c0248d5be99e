"""Plans edited by hand, their digests right: every kind of edit is found, or is known to do no harm."""

from __future__ import annotations

import fnmatch
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dsv4c.compiler import again
from dsv4c.compiler.verify import check as verify
from dsv4c.config import ModelConfig, load_config
from dsv4c.errors import PlanError
from dsv4c.plan.check import check, programs
from dsv4c.plan.folder import PLAN_FILE, Plan, plan_of
from tests.codegen.lowered import gpu_plan, no_compiler
from tests.plan.mutations import Kind, edits, places

HARMLESS = {
    "config.dspark_* out of range": "a model without DSpark's stages reads none of their sizes",
    "pipeline *": "how it was compiled: read by commands that compile again, by nothing that runs",
    "versions* *": "names of tools, printed for people",
    "certificates* *": "evidence for people; `dsv4c check` evaluates both sides again",
    "report* *": "figures printed for people; those of buckets and kernels are compared all the same",
    "kernels.*.origin *": "who wrote a kernel's text, for people; a rebuild names what it leaves out",
    "kernels.*.edited *": "the same of who changed it",
}
"""Kinds that nothing finds, and why none has to."""


OF_FILES = ("digest", "schema", "files")
"""Fields that are read with the folder, where tests of folders edit them."""


def model() -> ModelConfig:
    """One layer of each kind, the first with a hash router."""
    tiny = load_config("tiny")
    return replace(tiny, num_layers=3, compress_ratios=(0, 4, 128), num_hash_layers=1)


def made(target: str) -> tuple[Plan, Plan]:
    """A plan with all that plans have, and another one of the same model."""
    certify = target == "cpu"
    common = {"target": target, "certify": certify, "max_context": 256}
    return (
        gpu_plan(model(), batch=(1, 2), slots=2, verify=1, chunk=1, **common),
        gpu_plan(
            replace(model(), rms_norm_eps=1e-5),
            recipe="bf16",
            batch=(1, 3),
            slots=3,
            verify=2,
            chunk=8,
            **{**common, "max_context": 512},
        ),
    )


@dataclass(frozen=True)
class Result:
    """Which check found an edit of a kind, and what it said."""

    kind: Kind
    by: str
    said: str


def judged(plan: Plan, data: Mapping[str, Any], files: Mapping[str, bytes], kind: Kind) -> Result:
    """The first check that finds what is wrong with an edited plan."""
    try:
        edited = plan_of(Path(PLAN_FILE), data, files, {})
    except PlanError as error:
        return Result(kind, "load: form", str(error))
    if edited == plan and edited.files == plan.files:
        return Result(kind, "nothing: it reads as the same plan", "")
    if found := check(edited):
        return Result(kind, f"load: {found[0].kind}", str(found[0]))
    if found := verify(edited):
        return Result(kind, f"verify: {found[0].kind}", str(found[0]))
    if edited.files != plan.files and edited.kernels and again.rebuild(edited).differing:
        return Result(kind, "verify --rebuild", "")
    return Result(kind, "nothing", "")


def results(plan: Plan, other: Plan) -> Iterator[Result]:
    data, stale = json.loads(plan.text), json.loads(other.text)
    for kind, edit in edits(data, stale):
        edited = json.loads(plan.text)
        edit(edited)
        if kind.path.partition(".")[0] not in OF_FILES:
            yield judged(plan, edited, plan.files, kind)


def of_files(plan: Plan, other: Plan) -> Iterator[Result]:
    """Contents of files, the digests in plan.json being right."""
    data = json.loads(plan.text)
    for suffix in sorted({name.rpartition(".")[2] for name in plan.files}):
        for folder in sorted({name.rpartition("/")[0] for name in plan.files if name.endswith(f".{suffix}")}):
            names = [n for n in plan.files if n.rpartition("/")[0] == folder and n.endswith(f".{suffix}")]
            olds = [n for n in other.files if n.rpartition("/")[0] == folder and n.endswith(f".{suffix}")]
            name, twin = (
                names[0],
                next(n for n in names if plan.files[n] != plan.files[names[0]] or suffix == "ptx"),
            )
            content, path = plan.files[name], f"{folder or '.'}/*.{suffix}"
            changed = {
                "missing": content[: len(content) // 2],
                "extra": content + b"\n",
                "foreign": b"\x7fELF" + bytes(99),
                "out of range": content.replace(b"1", b"7", 1) if suffix != "ptx" else b"7",
                "swapped": plan.files[twin],
                "stale": next((other.files[n] for n in olds if other.files[n] != content), content + b" "),
            }
            for edit, text in changed.items():
                if text != content:
                    yield judged(plan, data, {**plan.files, name: text}, Kind(path, edit))


@pytest.fixture
def lowered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal graphs are lowered once: most edits leave them alone."""
    lower, known = again.lowered_again, {}

    def remembered(plan: Plan) -> Any:
        graphs = {name: plan.files.get(program.graph) for name, program in programs(plan).items()}
        key = plan.target, *graphs.items()
        if key not in known:
            known[key] = lower(plan)
        return known[key]

    monkeypatch.setattr(again, "lowered_again", remembered)
    for name in ("weights_of", "unused_of"):
        monkeypatch.setattr(again, name, _remembering(getattr(again, name)))


def _remembering(records: Callable[..., Any]) -> Callable[..., Any]:
    """Records of a model's weights, made once for each of its lowered graphs, which are kept meanwhile."""
    known: dict[tuple[Any, ...], Any] = {}

    def remembered(config: ModelConfig, *others: Any) -> Any:
        key = config.digest, *map(id, others)
        if key not in known:
            known[key] = records(config, *others), others
        return known[key][0]

    return remembered


@pytest.mark.usefixtures("lowered_once")
@pytest.mark.parametrize("target", [pytest.param("cpu", marks=pytest.mark.slow), "sm_90a"])
def test_every_kind_of_edit_is_found(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan, other = made(target)
    with no_compiler() if target != "cpu" else nullcontext():
        assert check(plan) == verify(plan) == []
        found = [*results(plan, other), *of_files(plan, other)]
    missed = [r for r in found if r.by == "nothing"]
    reasons = {r.kind: reason(r.kind) for r in missed}
    with capsys.disabled():
        print(f"\n{table(found, target)}")
    assert len({r.kind for r in found}) == len(found) > 300
    assert {path for path in places(json.loads(plan.text)) if path.partition(".")[0] not in OF_FILES} <= {
        r.kind.path for r in found
    }
    assert not [str(kind) for kind, why in reasons.items() if not why]


def reason(kind: Kind) -> str:
    return next((why for pattern, why in HARMLESS.items() if fnmatch.fnmatchcase(str(kind), pattern)), "")


def table(found: list[Result], target: str) -> str:
    """Kinds by the check that finds them, and those that do no harm, by their reason."""
    rows = Counter(r.by for r in found if r.by != "nothing")
    harmless = Counter(reason(r.kind) or f"UNKNOWN {r.kind}" for r in found if r.by == "nothing")
    lines = [f"{target}: {len(found)} kinds of edits"]
    lines += [f"  {count:5} {by}" for by, count in sorted(rows.items())]
    lines += [f"  {count:5} harmless: {why}" for why, count in sorted(harmless.items())]
    return "\n".join(lines)
