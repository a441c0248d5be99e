"""From a config to a plan, every stage in order. Read `compile` top to bottom; the rest serves it.

A plan is made from names, types and text. Torch is loaded only to evaluate certificates not kept from before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4c.cache import cache_folder
from dsv4c.config import Deployment, ModelConfig, check_deployment, load_config
from dsv4c.errors import ConfigError, GraphError
from dsv4c.ir.fused import Fused, trace
from dsv4c.ir.graph import Graph, Node, Value
from dsv4c.ir.text import print_attribute, print_graph
from dsv4c.ir.verify import verify
from dsv4c.models.deepseek_v4 import Mode, build
from dsv4c.models.weights import records
from dsv4c.passes.memory import lay_out, plan_memory
from dsv4c.passes.pipeline import Contributions, Pipeline, Quantize, Stage, parse_pipeline
from dsv4c.passes.quantize import quantize
from dsv4c.passes.recipes import Recipe, recipe_named
from dsv4c.passes.schedule import Order, Schedule, layer_in, schedule
from dsv4c.stages import Compiled, Job, Saved, choose_rules, figures, resume, rules_of
from dsv4c.types import Type

if TYPE_CHECKING:
    from dsv4c.runtime.plan import Bucket, Launch, Plan

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
    `resumed` (`dsv4c.stages.read_saved`) goes on where a compile stopped: of the other arguments only rules,
    expected, certify, cache and progress count then.
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
    stages = _Stages(progress, total=len(job.modes) * (1 + len(job.line.passes)) + 1 + certify)

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

    # 3. On a GPU: kernels for the launches, their weights' layouts, cubins. Everything as data.
    deployment = job.deployment
    spec = str(job.line) if resumed is None else resumed.pipeline
    if deployment.target != "cpu":
        store = cache_folder(cache) / "kernels"
        plan = _with_kernels(job.config, deployment, job.recipe, spec, placed["decode"], stages, store)
    else:
        with stages("assemble"):
            plan = _assemble(job.config, deployment, job.recipe, spec, placed, stages)
    return _reported(plan, job, placed, certificates, stages, resumed)


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


# --- kernels ---


def _with_kernels(
    config: ModelConfig,
    deployment: Deployment,
    recipe: Recipe,
    line: str,
    placed: Compiled,
    stages: _Stages,
    cache: Path,
) -> Plan:
    """A GPU target's plan: lower the decode bucket, build its kernels."""
    from dsv4c.codegen.build import build as build_kernels
    from dsv4c.codegen.build import toolchain
    from dsv4c.codegen.lower import CONSTANTS_FILE, lower
    from dsv4c.runtime.plan import Argument, Bucket, KernelLaunch, Plan, Slot, StateSlot

    graph, target = placed.graph, deployment.target
    states, state_bytes = lay_out({v.name: v.type for v in graph.states})
    inputs, input_bytes = lay_out({v.name: v.type for v in graph.inputs})
    with stages("lower"):
        lowered = lower(graph, placed.schedule, target, states, inputs, placed.context.prepack)
    with stages("build"):

        def watch(done: int, total: int, _: object) -> None:
            if stages.progress is not None:
                stages.progress("build", done, total)

        built = build_kernels(list(lowered.sources.values()), target, cache, progress=watch)

    kernels, files = {}, {_graph_file("decode"): print_graph(graph).encode()}
    for (key, source), made in zip(lowered.sources.items(), built, strict=True):
        files |= {f"kernels/{key}.py": source.text.encode(), f"kernels/{key}.ptx": made.ptx.encode()}
        files |= {f"kernels/{key}.cubin": made.cubin}
        paths = {"source": f"kernels/{key}.py", "cubin": f"kernels/{key}.cubin", "ptx": f"kernels/{key}.ptx"}
        kernels[key] = {"symbol": made.symbol, **paths, **asdict(made.resources)}
        kernels[key]["not_run_here"] = target == "sm_100a"
    if lowered.constants:
        files[CONSTANTS_FILE] = lowered.constants_file
    wanted = [(w.name, w.type, recipe.requantize) for w in lowered.weights]
    launches = [
        KernelLaunch(**{**vars(launch), "arguments": tuple(Argument(**vars(a)) for a in launch.arguments)})
        for launch in lowered.launches
    ]
    bucket = Bucket(
        graph=_graph_file("decode"),
        tokens=deployment.batch,
        sequences=deployment.batch,
        values={name: Slot(p.type, p.space, p.offset) for name, p in lowered.values.items()},  # type: ignore[arg-type]
        arena_bytes=lowered.arena_bytes,
        input_bytes=input_bytes,
        inputs=tuple(v.name for v in graph.inputs),
        outputs={label: v.name for label, v in graph.outputs.items()},
        launches=tuple(launches),
    )
    report = {
        "nodes": len(graph.nodes),
        "launches": len(launches),
        "arena_bytes": lowered.arena_bytes,
        "arena_lower_bound": lowered.arena_lower_bound,
    }
    notes = ["kernels for sm_100a assemble; they have not been run on that hardware"]
    return Plan(
        name=config.name,
        config=config.to_dict(),
        config_digest=config.digest,
        deployment=asdict(deployment),
        recipe=recipe.name,
        pipeline=line,
        buckets={"decode": bucket},
        state=tuple(StateSlot(v.name, v.type, states[v.name]) for v in graph.states),
        state_bytes=state_bytes,
        weights=tuple(r | w.record for r, w in zip(records(config, wanted), lowered.weights, strict=True)),
        weights_bytes=lowered.weights_bytes,
        report={
            "buckets": {"decode": report},
            "kernels": len(kernels),
            "notes": notes if target == "sm_100a" else [],
        },
        versions=_versions() | {"toolchain": toolchain()},
        kernels=kernels,
        constants={
            "file": CONSTANTS_FILE,
            "bytes": lowered.constants_bytes,
            "values": {n: {"type": str(p.type), "offset": p.offset} for n, p in lowered.constants.items()},
        }
        if lowered.constants
        else {},
        files=files,
        timings=stages.seconds,
        cache_hits=sum(made.cached for made in built),
    )


# --- assembling ---


def _assemble(
    config: ModelConfig,
    deployment: Deployment,
    recipe: Recipe,
    line: str,
    placed: Mapping[str, Compiled],
    stages: _Stages,
) -> Plan:
    from dsv4c.runtime.plan import Plan, StateSlot

    states = _union(
        (p.graph, v.name, v.type.with_shape((deployment.batch, *v.type.shape[1:])))
        for p in placed.values()
        for v in p.graph.states
    )
    loads = {mode: p.context.prepack for mode, p in placed.items() if p.context.prepack is not None}
    packed = {v.name for load in loads.values() for v in load.outputs.values()}
    graphs = [*(p.graph for p in placed.values()), *loads.values()]
    params = _union((g, v.name, v.type) for g in graphs for v in g.params)
    state_offsets, state_bytes = lay_out(states)
    weight_offsets, weights_bytes = lay_out(params)
    wanted = [(name, type_, recipe.requantize) for name, type_ in params.items() if name not in packed]
    bodies = _Bodies()
    weights = [r | {"offset": weight_offsets[r["name"]]} for r in records(config, wanted)]
    return Plan(
        name=config.name,
        config=config.to_dict(),
        config_digest=config.digest,
        deployment=asdict(deployment),
        recipe=recipe.name,
        pipeline=line,
        buckets={mode: _bucket(mode, p, state_offsets, weight_offsets, bodies) for mode, p in placed.items()},
        loads={mode: _load(mode, load, weight_offsets, bodies) for mode, load in loads.items()},
        state=tuple(StateSlot(name, type_, state_offsets[name]) for name, type_ in states.items()),
        state_bytes=state_bytes,
        weights=tuple(weights),
        weights_bytes=weights_bytes,
        report=_report(placed),
        versions=_versions(),
        files={_graph_file(mode): print_graph(p.graph).encode() for mode, p in placed.items()}
        | {_graph_file(f"load.{mode}"): print_graph(load).encode() for mode, load in loads.items()}
        | bodies.files,
        timings=stages.seconds,
    )


def _graph_file(mode: str) -> str:
    return f"graph.{mode}.txt"


def _union(declared: Iterator[tuple[Graph, str, Type]]) -> dict[str, Type]:
    """Types by name over all buckets, which must agree."""
    types: dict[str, Type] = {}
    for graph, name, type_ in declared:
        if types.setdefault(name, type_) != type_:
            raise GraphError(f"graph {graph.name}: %{name} is {type_}, in another bucket {types[name]}")
    return types


def _bucket(
    mode: str,
    placed: Compiled,
    state_offsets: Mapping[str, int],
    weight_offsets: Mapping[str, int],
    bodies: _Bodies,
) -> Bucket:
    from dsv4c.runtime.plan import Bucket, Slot

    graph, launches = placed.graph, placed.schedule
    input_offsets, input_bytes = lay_out({v.name: v.type for v in graph.inputs})
    declared = {v: Slot(v.type, "input", input_offsets[v.name]) for v in graph.inputs}
    declared |= {v: Slot(v.type, "state", state_offsets[v.name]) for v in graph.states}
    declared |= {v: Slot(v.type, "weights", weight_offsets[v.name]) for v in graph.params}

    def slot(value: Value) -> Slot:
        if value in placed.memory.offsets:
            return Slot(value.type, "arena", placed.memory.offsets[value])
        owner = declared[launches.owner(value)]
        return Slot(value.type, owner.space, owner.offset)

    sequences = next(v for v in graph.inputs if v.name == "lengths").type.shape[0]
    tokens = next(v for v in graph.inputs if v.name == "tokens").type.shape[0]
    return Bucket(
        graph=_graph_file(mode),
        tokens=tokens,
        sequences=sequences,
        values={v.name: slot(v) for v in graph.values()},
        arena_bytes=placed.memory.bytes,
        input_bytes=input_bytes,
        inputs=tuple(v.name for v in graph.inputs),
        outputs={label: v.name for label, v in graph.outputs.items()},
        launches=tuple(_launches(launches, bodies)),
    )


def _load(mode: str, graph: Graph, weight_offsets: Mapping[str, int], bodies: _Bodies) -> Bucket:
    """What runs once, after the weights are there: results that calls read lie among the weights."""
    from dsv4c.runtime.plan import Bucket, Slot

    launches = schedule(graph)
    memory = plan_memory(graph, launches)

    def slot(value: Value) -> Slot:
        if value.name in weight_offsets:
            return Slot(value.type, "weights", weight_offsets[value.name])
        owner = launches.owner(value)
        if owner.name in weight_offsets:
            return Slot(value.type, "weights", weight_offsets[owner.name])
        return Slot(value.type, "arena", memory.offsets[value])

    return Bucket(
        graph=_graph_file(f"load.{mode}"),
        tokens=0,
        sequences=0,
        values={v.name: slot(v) for v in graph.values()},
        arena_bytes=memory.bytes,
        input_bytes=0,
        inputs=(),
        outputs={},
        launches=tuple(_launches(launches, bodies)),
    )


def _launches(schedule: Schedule, bodies: _Bodies) -> Iterator[Launch]:
    from dsv4c.runtime.plan import Launch

    for node, after in zip(schedule.nodes, schedule.after, strict=True):
        attributes = node.op.attributes()
        yield Launch(
            name=node.name,
            op=node.op.name,
            attributes=", ".join(f"{key}={print_attribute(value)}" for key, value in attributes.items()),
            inputs=tuple(v.name for v in node.inputs),
            outputs=tuple(v.name for v in node.outputs),
            scope=node.scope,
            origin=node.origin,
            after=after,
            body=bodies.file(node) if isinstance(node.op, Fused) else "",
        )


class _Bodies:
    """Fused ops spelled out in primitives, equal ones in one file: a plan runs without their source."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self._names: dict[tuple[Fused, tuple[Type, ...]], str] = {}

    def file(self, node: Node) -> str:
        """Name of the file with the body of a fused node: its operands as inputs, its results in order."""
        from dsv4c.passes.expand import expand

        assert isinstance(node.op, Fused)
        key = node.op, tuple(v.type for v in node.inputs)
        if key not in self._names:
            body = trace(*key)
            kept = {str(i): v for i, v in enumerate(node.op.kept(body.results))}
            graph = body.graph
            text = print_graph(expand(Graph(graph.name, graph.inputs, (), (), graph.nodes, kept)))
            name = f"bodies/{node.op.name}-{sha256(text.encode()).hexdigest()[:12]}.txt"
            self.files[name] = text.encode()
            self._names[key] = name
        return self._names[key]


def _report(placed: Mapping[str, Compiled]) -> dict[str, Any]:
    report: dict[str, Any] = {
        mode: {
            "nodes": len(p.graph.nodes),
            "launches": len(p.schedule.nodes),
            "arena_bytes": p.memory.bytes,
            "arena_lower_bound": p.memory.lower_bound,
        }
        for mode, p in placed.items()
    }
    return {"buckets": report, "notes": []}


def _reported(
    plan: Plan,
    job: Job,
    placed: Mapping[str, Compiled],
    certificates: Sequence[dict[str, Any]],
    stages: _Stages,
    resumed: Saved | None,
) -> Plan:
    """`plan` with what its passes did, in figures, warnings, and certificates."""
    made: dict[str, int] = {}
    for launch in plan.buckets["decode"].launches if plan.kernels else ():
        layer = layer_in(launch.scope)
        made[layer] = made.get(layer, 0) + 1
    report = dict(plan.report) | figures(placed, job, made, resumed.counts if resumed is not None else None)
    report["warnings"] = list(placed["decode"].context.warnings)
    fold = placed["decode"].context.fold
    if resumed is not None:
        notes = [f"resumed after {resumed.after}: commands that compile again do not see edits made there"]
        if fold is None:
            notes.append(
                "no certificates: the rules had applied before the stop; compile in one go for those"
            )
        report["notes"] = [*report.get("notes", ()), *notes]
    rules = {f"rule {name}": r.ms / 1e3 for name, r in fold.rules.items()} if fold is not None else {}
    return replace(plan, report=report, certificates=tuple(certificates), timings={**stages.seconds, **rules})


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


def _versions() -> dict[str, str]:
    try:
        return {"dsv4c": version("dsv4c")}
    except PackageNotFoundError:  # a source tree that was never installed
        return {"dsv4c": "unknown"}
