"""From a config to a plan, every stage in order. Read `compile` top to bottom; the rest serves it.

A plan is made from names, types and text. Torch is loaded only to evaluate certificates not kept from before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4c.cache import cache_folder
from dsv4c.compiler.assemble import plan_of_kernels, plan_of_ops, reported
from dsv4c.compiler.blame import blamed
from dsv4c.compiler.job import Compiled, Job, Saved, choose_rules, resume, rules_of
from dsv4c.config import Deployment, ModelConfig, check_deployment, load_config
from dsv4c.errors import BuildError, ConfigError, GraphError
from dsv4c.ir.graph import Graph
from dsv4c.ir.verify import verify
from dsv4c.models.deepseek_v4 import Mode, build
from dsv4c.passes.pipeline import Contributions, Pipeline, Quantize, Stage, parse_pipeline
from dsv4c.passes.quantize import quantize
from dsv4c.passes.recipes import Recipe, recipe_named
from dsv4c.passes.schedule import Order
from dsv4c.plan.records import Plan

CHUNK = 64  # tokens per prefill call, unless the context is shorter
Progress = Callable[[str, int, int], None]


def compile(
    model: ModelConfig | str | Path,
    *,
    target: str = "cpu",
    recipe: str = "official",
    batch: int = 1,
    max_context: int = 4096,
    chunk: int | None = None,
    mtp: bool = False,
    pipeline: str | Pipeline | None = None,
    rules: Contributions | None = None,
    expected: Mapping[str, int] | None = None,
    order: Order = "source",
    disable: Sequence[str] = (),
    enable: Sequence[str] = (),
    resumed: Saved | None = None,
    certify: bool = True,
    inspect: Callable[[str, Compiled], None] | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Compile a model (a config, a built-in name, a config.json or a checkpoint folder) to a plan.

    `batch` sequences of at most `max_context` tokens decode together; prefill takes `chunk` tokens of one of
    them per call (64, or less in a shorter context). `mtp` adds the draft block's bucket. `pipeline` (or its
    spec) replaces the default one, whose recipe is `recipe`; `rules` are what may fold, by default the
    built-in ones and those of installed packages, without those of `disable` ("all": every one) that `enable`
    does not take back; `expected` counts of applications must hold for the decode bucket. `order` "memory"
    looks for a launch order that needs a smaller arena. `inspect(mode, compiled)` sees every bucket's stages.
    `certify` stores a certificate of every way a rule applied; those not kept from before take seconds, once.
    A GPU target has kernels and the decode bucket alone. `cache` is the folder of compiled kernels and
    certificates (default: dsv4c's in the user's cache).
    `resumed` (`dsv4c.compiler.job.read_saved`) goes on where a compile stopped: of the other arguments only
    rules, expected, certify, cache and progress count then.
    `progress(stage, done, all)` is called on the way.

    Raises ConfigError for a model, deployment or recipe that cannot be compiled, GraphError where a recipe
    does not fit the model or a rule's count differs, BuildError where no kernel takes an op.
    """
    # 1. What to compile, and how.
    if resumed is not None:
        job = resumed.job(rules, expected)
    else:
        job = job_for(
            model,
            target=target,
            recipe=recipe,
            batch=batch,
            max_context=max_context,
            chunk=chunk,
            mtp=mtp,
            pipeline=pipeline,
            rules=rules,
            expected=expected,
            order=order,
            disable=disable,
            enable=enable,
        )
    on_cpu = job.deployment.target == "cpu"
    last = 1 if on_cpu else 2  # assemble, or lower and build
    stages = _Stages(progress, total=len(job.modes) * (1 + len(job.line.passes)) + certify + last)

    # 2. One graph per bucket: the paper's operations, rewritten to launches with places for bytes.
    placed: dict[str, Compiled] = {}
    for mode in job.modes:
        if resumed is not None:
            placed[mode] = resume(job, resumed, mode, stages.watch(mode))
            continue
        with stages(f"build {mode}"):
            graph = job.built(mode)
        placed[mode] = job.bucket(mode, graph=graph, watch=stages.watch(mode))
    if inspect is not None:
        for name, compiled in placed.items():
            inspect(name, compiled)
    certificates: Sequence[dict[str, Any]] = ()
    if certify:
        with stages("certify"):
            certificates = _certify(placed, cache_folder(cache) / "certificates")

    # 3. Everything as data. On a GPU: kernels for the launches, their weights' layouts, cubins.
    spec = str(job.line) if resumed is None else resumed.pipeline
    if on_cpu:
        with stages("assemble"):
            plan = plan_of_ops(job, spec, placed)
    else:
        plan = _with_kernels(job, spec, placed["decode"], stages, cache_folder(cache) / "kernels")
    return reported(plan, job, placed, certificates, stages.seconds, resumed)


def job_for(
    model: ModelConfig | str | Path,
    *,
    target: str = "cpu",
    recipe: str = "official",
    batch: int = 1,
    max_context: int = 4096,
    chunk: int | None = None,
    mtp: bool = False,
    pipeline: str | Pipeline | None = None,
    rules: Contributions | None = None,
    expected: Mapping[str, int] | None = None,
    order: Order = "source",
    disable: Sequence[str] = (),
    enable: Sequence[str] = (),
) -> Job:
    """The arguments of `compile` as what decides its graphs. Raises ConfigError, GraphError."""
    config, deployment, numerics = settings(
        model, target=target, recipe=recipe, batch=batch, max_context=max_context, chunk=chunk, mtp=mtp
    )
    known = rules_of() if rules is None else rules
    for name in expected or ():
        known.rule(name)
    line = choose_rules(pipeline_of(pipeline, numerics, known, order), known, disable, enable)
    return Job(config, deployment, numerics, line, known, modes_of(deployment, mtp=mtp), expected or {})


def pipeline_of(
    pipeline: str | Pipeline | None, recipe: Recipe, rules: Contributions, order: Order = "source"
) -> Pipeline:
    """The passes of a compile: the given ones, or the default ones under `recipe` and contributed ones.

    Raises GraphError for a spec that does not parse or an order that does not work, ConfigError for one that
    quantizes by another recipe.
    """
    if pipeline is not None:
        given = parse_pipeline(pipeline, rules.passes) if isinstance(pipeline, str) else pipeline
        for p in given.passes:
            if isinstance(p, Quantize) and p.recipe != recipe.name:
                raise ConfigError(f"pipeline: quantizes by {p.recipe}, the recipe is {recipe.name}; give one")
        return given
    line = Pipeline().with_options("quantize", recipe=recipe.name).with_options("schedule", order=order)
    for extra in rules.instances:
        line = line.with_pass(extra)
    return line


def modes_of(deployment: Deployment, *, mtp: bool) -> tuple[Mode, ...]:
    """The buckets of a plan. A GPU target has kernels for decode steps, and prefills by them."""
    if deployment.target != "cpu":
        return ("decode",)
    return ("decode", "prefill", "mtp") if mtp else ("decode", "prefill")


def settings(
    model: ModelConfig | str | Path,
    *,
    target: str = "cpu",
    recipe: str = "official",
    batch: int = 1,
    max_context: int = 4096,
    chunk: int | None = None,
    mtp: bool = False,
) -> tuple[ModelConfig, Deployment, Recipe]:
    """The arguments of `compile`, checked. Raises ConfigError."""
    config = model if isinstance(model, ModelConfig) else load_config(model)
    size = chunk if chunk is not None else min(CHUNK, max_context) if target == "cpu" else 1
    deployment = Deployment(target, recipe, batch, max_context, size)
    check_deployment(config, deployment)
    if mtp and not config.mtp_layers:
        raise ConfigError(f"{config.name}: has no MTP block (mtp_layers is 0); compile without mtp")
    if mtp and target != "cpu":
        raise ConfigError(
            f"mtp: {target} plans have no bucket for the MTP block; compile without mtp, or for cpu"
        )
    return config, deployment, recipe_named(recipe)


def graph_of(config: ModelConfig, deployment: Deployment, recipe: Recipe, mode: Mode) -> Graph:
    """One bucket's graph in the formats of `recipe`, nothing folded. Raises ConfigError, GraphError."""
    graph = verify(build(config, deployment, mode, recipe.activation))
    return verify(quantize(graph, recipe))


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

    def watch(self, mode: str) -> Callable[[Stage], None]:
        """For the passes of one bucket."""
        return lambda stage: self._finish(f"{stage.name} {mode}", stage.seconds)

    def _finish(self, stage: str, seconds: float) -> None:
        self.done += 1
        self.seconds[stage] = seconds
        if self.progress is not None:
            self.progress(stage, self.done, self.total)


def _certify(placed: Mapping[str, Compiled], cache: Path) -> list[dict[str, Any]]:
    """Certificates of all buckets, equal applications once. Raises GraphError for a rule that is wrong."""
    from dsv4c.passes.certify import certify, to_dict

    matches = [m for p in placed.values() if p.context.fold is not None for m in p.context.fold.matches]
    found = certify(matches, folder=cache)
    for wrong in found.failed:
        raise GraphError(
            f"the rule {wrong.rule} is wrong on {', '.join(wrong.operands)}: {wrong.reason}; "
            f"mend it, or leave it out with --disable {wrong.rule}"
        )
    return [to_dict(certificate) for certificate in found.all]


def _with_kernels(job: Job, pipeline: str, placed: Compiled, stages: _Stages, store: Path) -> Plan:
    """A GPU target's plan: the decode bucket lowered to kernels, and those built, or found in `store`."""
    from dsv4c.codegen.build import build as build_kernels
    from dsv4c.codegen.lower import lower

    def watch(done: int, total: int, _: object) -> None:
        if stages.progress is not None:
            stages.progress("build", done, total)

    target = job.deployment.target
    with stages("lower"):
        try:
            lowered = lower(placed.graph, placed.schedule, target, placed.context.prepack)
        except BuildError as error:
            raise blamed(job, error) from None
    with stages("build"):
        built = build_kernels(list(lowered.sources.values()), target, store, progress=watch)
    return plan_of_kernels(job, pipeline, placed, lowered, built)
