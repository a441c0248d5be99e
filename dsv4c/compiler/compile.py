"""From a config to a plan, every stage in order. Read `compile` top to bottom; the rest serves it.

A plan is made from names, types and text. Torch is loaded only to evaluate certificates not kept from before.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4c.buckets import Bucket
from dsv4c.cache import cache_folder
from dsv4c.certify.certificates import certify as certificates_of
from dsv4c.certify.finding import to_dict
from dsv4c.codegen.lower import lower
from dsv4c.codegen.targets import target_of
from dsv4c.compiler.assemble import assemble
from dsv4c.compiler.job import Compiled, Job, Saved
from dsv4c.compiler.limits import refused
from dsv4c.compiler.request import Request
from dsv4c.compiler.sharding import certify_shard
from dsv4c.config import ModelConfig
from dsv4c.errors import BuildError, ConfigError, GraphError
from dsv4c.passes.pipeline import OURS, Stage
from dsv4c.passes.work import Match
from dsv4c.plan.check import check
from dsv4c.plan.folder import Plan

Progress = Callable[[str, int, int], None]

COLLECTED = 50_000
"""New objects between two collections of garbage. A compile makes hundreds of thousands that live to its end;
looking among them after every 700, Python's own number, takes 30 % of a warm compile of Flash.
"""


@contextmanager
def _rarely_collected() -> Iterator[None]:
    own, *others = gc.get_threshold()
    raised = 0 < own < COLLECTED  # 0: nothing is collected at all; not less: by choice, or by another compile
    if raised:
        gc.set_threshold(COLLECTED, *others)
    try:
        yield
    finally:
        if raised:
            gc.set_threshold(own, *others)


@_rarely_collected()
def compile(
    model: ModelConfig | str | Path | Mapping[str, Any] | Request | Saved | Job,
    *,
    certify: bool = True,
    inspect: Callable[[str, Compiled], None] | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Plan:
    """Compile a model to a plan.

    `model` and `options` are those of `dsv4c.compiler.request.Request`: target, recipe, batch, slots,
    max_context, verify, chunk, logits, draft, pipeline, rules, disable, enable, expected, require_fused,
    kernels, tuned. In their place a `Request`, a stopped compile (`dsv4c.compiler.job.read_saved`) that goes
    on, or the `Job` of either.

    `certify` stores a certificate of every way a rule applied; those not kept from before take seconds, once.
    `inspect(bucket, compiled)` sees every bucket's stages. `cache` is the folder of compiled kernels and
    certificates (default: dsv4c's in the user's cache). `progress(stage, done, all)` is called on the way.

    Raises ConfigError for a model, deployment or recipe that cannot be compiled, GraphError where a recipe
    does not fit the model or a rule's count differs, BuildError where no kernel takes an op.
    """
    # 1. What to compile, and how.
    if isinstance(model, Request | Saved | Job):
        if options:
            raise ConfigError(f"compile: the request has decided {', '.join(options)}; leave them out")
        job = model if isinstance(model, Job) else model.job()
    else:
        job = Request(model, **options).job()
    firsts, on_cpu = job.firsts(), job.deployment.target == "cpu"
    steps = len(set(firsts.values())) * (1 + len(job.line.passes)) + 1 + certify + (not on_cpu)
    stages = _Stages(progress, steps)

    # 2. One graph per form of bucket: the paper's operations, rewritten by the passes.
    compiled: dict[Bucket, Compiled] = {}
    for bucket in dict.fromkeys(firsts.values()):
        with stages(f"build {bucket.name}"):
            start = job.start(bucket)
        compiled[bucket] = job.compiled(bucket, start=start, watch=stages.watch(bucket))
        if inspect is not None:
            inspect(bucket.name, compiled[bucket])

    # 3. Programs over common blocks; what no kernel takes is unfolded.
    target = target_of(job.deployment.target, job.cuts)
    again: list[Match] = []
    with stages("lower"):
        folded = [job.folded(b, first, compiled[first], again) for b, first in firsts.items()]
        try:
            lowered = lower(folded, target.coder, target.bodies, job.require_fused, job.deployment.ranks)
        except BuildError as error:
            raise refused(job, error) from None
        target.settle(lowered.programs.values(), job.kernels)

    # 4. Both sides of every rewrite, and cubins.
    certificates: list[dict[str, Any]] = []
    if certify:
        with stages("certify"):
            folder = cache_folder(cache) / "certificates"
            certificates = _certify(compiled, again, folder, stages.within)
            certificates += [to_dict(found) for found in certify_shard(job, folder)]
    if not on_cpu:
        with stages("build"):
            target.build(cache_folder(cache) / "kernels", progress)

    # 5. Everything as data. Of kernels that dsv4c did not write, cubins say whether they fit their launches.
    plan = assemble(job, compiled, lowered, target, certificates, stages.seconds)
    foreign = any(record["edited"] or record["origin"] != OURS for record in plan.kernels.values())
    for violation in check(plan) if foreign else ():
        raise BuildError(str(violation))
    return plan


def _certify(
    compiled: Mapping[Bucket, Compiled], again: list[Match], cache: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Certificates of all buckets, equal applications once. Raises GraphError for a rule that is wrong."""
    matches = [m for c in compiled.values() if c.context.fold is not None for m in c.context.fold.matches]
    found = certificates_of([*matches, *again], folder=cache, progress=progress)
    for wrong in found.failed:
        raise GraphError(
            f"the rule {wrong.rule} is wrong on {', '.join(wrong.operands)}: {wrong.reason}; "
            f"mend it, or leave it out with --disable {wrong.rule}"
        )
    return [to_dict(certificate) for certificate in found.all]


@dataclass
class _Stages:
    """Times the stages and tells `progress` about them."""

    progress: Progress | None
    total: int
    done: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self.progress is not None:
            self.progress(stage, self.done, self.total)
        start = time.perf_counter()
        yield
        self._finish(stage, time.perf_counter() - start)

    def within(self, what: str, done: int, whole: int) -> None:
        """What a stage is at."""
        if self.progress is not None:
            self.progress(f"{what}, {done + 1} of {whole}", self.done, self.total)

    def watch(self, bucket: Bucket) -> Callable[[Stage], None]:
        """For the passes of one bucket."""
        return lambda stage: self._finish(f"{stage.name} {bucket.name}", stage.seconds)

    def _finish(self, stage: str, seconds: float) -> None:
        self.done += 1
        self.seconds[stage] = seconds
        if self.progress is not None:
            self.progress(stage, self.done, self.total)
