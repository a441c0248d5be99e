"""Plans that were compiled before, by what decides them: asked for again, they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import astuple
from importlib.util import find_spec
from pathlib import Path

from dsv4c.cache import cache_folder
from dsv4c.compiler.compile import compile
from dsv4c.compiler.job import Job
from dsv4c.compiler.request import Request
from dsv4c.errors import BuildError, PlanError
from dsv4c.plan.folder import Plan, load

Progress = Callable[[str, int, int], None]


def kept_plan(
    request: Request,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None],
) -> Plan:
    """The plan of a request, read where it was kept, or compiled and kept. `note` is told which, and where.

    One that is damaged, or cannot be kept, is compiled again: nothing is lost but time. Raises as `compile`
    does, BuildError where that would need a compiler that is not installed.
    """
    job = request.job()
    folder = kept_plan_folder(job, cache)
    if folder.exists():
        try:
            plan = load(folder)
        except PlanError as error:
            note(f"{error}; compiling it again")
        else:
            note(f"plan: {folder}")
            return plan
    target = job.deployment.target
    if target != "cpu" and find_spec("cutlass") is None:
        raise BuildError(
            f"the compiler for {target} is not installed and no plan is kept in {folder.parent}; run "
            "`pip install nvidia-cutlass-dsl`, or bring a plan: `dsv4c compile "
            f"{request.model} --target {target}` where it is installed, then "
            "`dsv4c generate PLAN --weights DIR` here"
        )
    note(f"compiling for {target}, once: {job.config.name}, {job.deployment.max_context:,} tokens of context")
    plan = compile(job, certify=False, cache=cache, progress=progress)
    try:
        plan.save(folder, overwrite=folder.exists())
    except PlanError as error:
        note(f"{error}; the plan is used, and not kept")
    else:
        note(f"plan: {folder}")
    return plan


def kept_plan_folder(job: Job, cache: Path | None = None) -> Path:
    """Where the plan of a job is kept."""
    return cache_folder(cache) / "plans" / f"{job.config.name}-{_key(job)[:16]}"


def _key(job: Job) -> str:
    """Digest of all that decides a plan: what is asked for, contributions by name, and this compiler."""
    asked = [
        job.config.to_dict(),
        job.deployment.to_dict(),
        job.recipe.name,
        str(job.line),
        sorted(job.rules.sources),
        None if job.cuts is None else sorted((key, astuple(cut)) for key, cut in job.cuts.items()),
    ]
    return hashlib.sha256(f"{json.dumps(asked)} {_sources()}".encode()).hexdigest()


def _sources() -> str:
    """Digest of this package."""
    found = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(path for kind in ("py", "jinja", "json") for path in root.rglob(f"*.{kind}")):
        found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()
