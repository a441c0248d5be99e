"""Lowered buckets to a plan: where checkpoints keep its weights, what was decided, what the passes did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dsv4c.arch import ARCHS
from dsv4c.buckets import ROWS, Bucket
from dsv4c.codegen.lower import Lowered
from dsv4c.codegen.targets import Target
from dsv4c.compiler.job import Compiled, Job
from dsv4c.config import ModelConfig
from dsv4c.ir.totals import compulsory, totals
from dsv4c.models.schedule import LayerKind, layer_plans
from dsv4c.models.weights import records, sources
from dsv4c.passes.explain import table
from dsv4c.passes.recipes import Recipe
from dsv4c.plan.folder import Plan
from dsv4c.plan.records import Program
from dsv4c.scope import Scope


def assemble(
    job: Job,
    compiled: Mapping[Bucket, Compiled],
    lowered: Lowered,
    target: Target,
    certificates: Sequence[dict[str, Any]],
    seconds: Mapping[str, float],
) -> Plan:
    """The plan of a job, with its figures, warnings, certificates, and seconds by stage."""
    fold = compiled[job.decode].context.fold
    rules = {f"rule {name}": r.ms / 1e3 for name, r in fold.rules.items()} if fold is not None else {}
    return Plan(
        name=job.config.name,
        config=job.config.to_dict(),
        config_digest=job.config.digest,
        deployment=job.deployment.to_dict(),
        recipe=job.recipe.name,
        pipeline=str(job.line) if job.saved is None else job.saved.pipeline,
        blocks=lowered.blocks,
        buckets=lowered.programs,
        load=lowered.load,
        state=lowered.state,
        weights=weights_of(job.config, job.recipe, lowered),
        unused=unused_of(job.config, lowered),
        contributed=(*map(job.rules.origin, _contributed(job, compiled)), *target.contributed),
        certificates=tuple(certificates),
        report=_report(job, compiled, lowered, target),
        versions=_versions(target),
        kernels=target.kernels,
        files=lowered.files | dict(target.files),
        timings={**seconds, **rules},
        cache_hits=target.cached,
    )


def weights_of(config: ModelConfig, recipe: Recipe, lowered: Lowered) -> tuple[Mapping[str, Any], ...]:
    """For every parameter where a checkpoint keeps it, and its place in the weights' block."""
    wanted = [(w.name, w.type, recipe.requantize) for w in lowered.weights]
    places = {w.name: w.record for w in lowered.weights}
    return tuple({**record, **places[record["name"]]} for record in records(config, wanted))


def _contributed(job: Job, compiled: Mapping[Bucket, Compiled]) -> list[str]:
    """Names of contributed passes, and of contributed rules that applied in some bucket."""
    folds = [each.context.fold for each in compiled.values() if each.context.fold is not None]
    applied = {name for fold in folds for name, count in fold.counts.items() if count}
    if job.saved is not None:
        applied |= {name for name, count in job.saved.counts.items() if count}
    took_part = applied | {p.name for p in job.line.passes}
    return [name for name in job.rules.sources if name in took_part]


def unused_of(config: ModelConfig, lowered: Lowered) -> tuple[Mapping[str, Any], ...]:
    """Where a checkpoint keeps the parameters of the model's layers that no launch reads; and of blocks that
    draft, those that launches read in part.
    """
    read = {w.name for w in lowered.weights}
    stored = {name: source.stored for name, source in sources(config, "release").items()}
    needed = {Scope.of(name).layer for name in read}
    left = [n for n in stored if n not in read and (not Scope.of(n).draft or Scope.of(n).layer in needed)]
    return tuple(records(config, [(name, stored[name], False) for name in left]))


def _versions(target: Target) -> dict[str, str]:
    try:
        found = {"dsv4c": version("dsv4c")}
    except PackageNotFoundError:  # a source tree that was never installed
        found = {"dsv4c": "unknown"}
    return found | dict(target.versions)


def _report(
    job: Job, compiled: Mapping[Bucket, Compiled], lowered: Lowered, target: Target
) -> dict[str, Any]:
    """The plan in figures. Those of launches, bytes and rules are the smallest decode bucket's."""
    decode = compiled[job.decode]
    fold = decode.context.fold
    notes = []
    if any(record["not_run_here"] for record in target.kernels.values()):
        notes.append(f"kernels for {job.deployment.target} assemble; they have not been run on that hardware")
    arch = ARCHS.get(job.deployment.target)
    many = [b.name for b in job.deployment.buckets if b.rows > ROWS]
    if arch is not None and arch.tensor_memory and many:
        notes.append(
            f"{', '.join(many)}: no GEMM for {arch.name} yet; rows go through what steps multiply with, "
            f"{ROWS} at a time"
        )
    if job.saved is not None:
        after = job.saved.after
        notes.append(f"resumed after {after}: commands that compile again do not see edits made there")
        if fold is None:
            notes.append(
                "no certificates: the rules had applied before the stop; compile in one go for those"
            )
    rows = [asdict(row) for row in table(fold)] if fold is not None else []
    for row in rows:
        del row["ms"]  # a plan holds nothing that differs from run to run; its timings have it
    counts = {} if job.saved is None else dict(job.saved.counts)
    graph = lowered.graphs[job.decode.name]
    return {
        "buckets": sizes_of(lowered),
        **_launches(job, lowered.programs[job.decode.name]),
        "planned_bytes_per_token": totals(graph).bytes // job.decode.sequences,
        "compulsory_bytes_per_token": sum(compulsory(graph).values()) // job.decode.sequences,
        "rules": dict(fold.counts) if fold is not None else counts,
        "passes": rows,
        "unfolded": [asdict(each) for each in lowered.unfolded],
        "kernels": len(target.kernels),
        "cuts": {key: cut.data for key, cut in sorted(target.cuts.items())},
        "warnings": list(decode.context.warnings),
        "notes": notes,
    }


def sizes_of(lowered: Lowered) -> dict[str, dict[str, int]]:
    """Figures of every bucket."""
    return {
        name: {
            "nodes": len(lowered.graphs[name].nodes),
            "launches": len(program.launches),
            "arena_bytes": program.arena_bytes,
            "arena_lower_bound": lowered.lower_bounds[name],
        }
        for name, program in lowered.programs.items()
    }


def _launches(job: Job, program: Program) -> dict[str, Any]:
    """Launches by kind of layer, of which the largest counts, None without one; and those outside."""
    by_layer: dict[str, int] = {}
    for launch in program.launches:
        layer = Scope.of(launch.scope).layer
        by_layer[layer] = by_layer.get(layer, 0) + 1
    per_kind: dict[str, int | None] = {str(kind).lower(): None for kind in LayerKind}
    for layer_plan in layer_plans(job.config):
        kind = str(layer_plan.attention).lower()
        per_kind[kind] = max(per_kind[kind] or 0, by_layer.get(layer_plan.prefix, 0))
    return {"launches_per_layer": per_kind, "launches_outside_layers": by_layer.get("", 0)}
