"""From a config to a plan, every stage in order. Read `compile` top to bottom; the rest serves it.

Nothing here loads torch: a plan is made from names, types and text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4c.config import Deployment, ModelConfig, check_deployment, load_config
from dsv4c.errors import ConfigError, GraphError
from dsv4c.ir.fused import Fused, trace
from dsv4c.ir.graph import Graph, Node, Value
from dsv4c.ir.text import print_attribute, print_graph
from dsv4c.ir.verify import verify
from dsv4c.models.deepseek_v4 import Mode, build
from dsv4c.models.weights import records
from dsv4c.passes.memory import MemoryPlan, lay_out, plan_memory
from dsv4c.passes.quantize import quantize
from dsv4c.passes.recipes import Recipe, recipe_named
from dsv4c.passes.schedule import Order, Schedule, schedule
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
    pipeline: str | None = None,
    order: Order = "source",
    progress: Progress | None = None,
) -> Plan:
    """Compile a model (a config, a built-in name, a config.json or a checkpoint folder) to a plan.

    `batch` sequences of at most `max_context` tokens decode together; prefill takes `chunk` tokens of one of
    them per call (64, or less in a shorter context). `mtp` adds the draft block's bucket. `order` "memory"
    looks for a launch order that needs a smaller arena. `progress(stage, done, all)` is called on the way.

    Raises ConfigError for a model, deployment or recipe that cannot be compiled, GraphError where a recipe
    does not fit the model.
    """
    # 1. What to compile.
    stages = _Stages(progress, buckets=3 if mtp else 2)
    config, deployment, numerics = settings(
        model, target=target, recipe=recipe, batch=batch, max_context=max_context, chunk=chunk, mtp=mtp
    )
    if pipeline:
        raise ConfigError(f"pipeline: {pipeline!r} names passes that do not exist; expected none")

    # 2. One graph per bucket: the paper's operations, then the recipe's formats.
    graphs: dict[Mode, Graph] = {}
    modes: tuple[Mode, ...] = ("decode", "prefill", "mtp") if mtp else ("decode", "prefill")
    for mode in modes:
        with stages(f"build {mode}"):
            graphs[mode] = graph_of(config, deployment, numerics, mode)

    # 3. Launches in order, and bytes for every value. A CPU plan runs one launch after the other.
    placed: dict[str, _Placed] = {}
    for mode, graph in graphs.items():
        with stages(f"schedule {mode}"):
            launches = schedule(graph, order)
        with stages(f"memory {mode}"):
            memory = plan_memory(graph, launches, parallel=target != "cpu")
        placed[mode] = _Placed(graph, launches, memory)

    # 4. Everything as data.
    with stages("assemble"):
        return _assemble(config, deployment, numerics, placed, stages)


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
    size = chunk if chunk is not None else min(CHUNK, max_context)
    deployment = Deployment(target, recipe, batch, max_context, size)
    check_deployment(config, deployment)
    if mtp and not config.mtp_layers:
        raise ConfigError(f"{config.name}: has no MTP block (mtp_layers is 0); compile without mtp")
    return config, deployment, recipe_named(recipe)


def graph_of(config: ModelConfig, deployment: Deployment, recipe: Recipe, mode: Mode) -> Graph:
    """One bucket's verified graph in the formats of `recipe`. Raises ConfigError, GraphError."""
    graph = verify(build(config, deployment, mode, recipe.activation))
    return verify(quantize(graph, recipe))


@dataclass
class _Stages:
    """Times the stages and tells `progress` about them."""

    progress: Progress | None
    buckets: int
    done: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self.progress is not None:
            self.progress(stage, self.done, 3 * self.buckets + 1)
        start = time.perf_counter()
        yield
        self.done += 1
        self.seconds[stage] = time.perf_counter() - start
        if self.progress is not None:
            self.progress(stage, self.done, 3 * self.buckets + 1)


@dataclass(frozen=True)
class _Placed:
    graph: Graph
    schedule: Schedule
    memory: MemoryPlan


# --- assembling ---


def _assemble(
    config: ModelConfig,
    deployment: Deployment,
    recipe: Recipe,
    placed: Mapping[str, _Placed],
    stages: _Stages,
) -> Plan:
    from dsv4c.runtime.plan import Plan, StateSlot

    states = _union(
        (p.graph, v.name, v.type.with_shape((deployment.batch, *v.type.shape[1:])))
        for p in placed.values()
        for v in p.graph.states
    )
    params = _union((p.graph, v.name, v.type) for p in placed.values() for v in p.graph.params)
    state_offsets, state_bytes = lay_out(states)
    weight_offsets, weights_bytes = lay_out(params)
    wanted = [(name, type_, recipe.requantize) for name, type_ in params.items()]
    bodies = _Bodies()
    weights = [r | {"offset": weight_offsets[r["name"]]} for r in records(config, wanted)]
    return Plan(
        name=config.name,
        config=config.to_dict(),
        config_digest=config.digest,
        deployment=asdict(deployment),
        recipe=recipe.name,
        pipeline=f"quantize{{recipe={recipe.name}}}",
        buckets={mode: _bucket(mode, p, state_offsets, weight_offsets, bodies) for mode, p in placed.items()},
        state=tuple(StateSlot(name, type_, state_offsets[name]) for name, type_ in states.items()),
        state_bytes=state_bytes,
        weights=tuple(weights),
        weights_bytes=weights_bytes,
        report=_report(deployment, placed),
        versions=_versions(),
        files={_graph_file(mode): print_graph(p.graph).encode() for mode, p in placed.items()} | bodies.files,
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
    placed: _Placed,
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
        from dsv4c.passes.fold import expand

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


def _report(deployment: Deployment, placed: Mapping[str, _Placed]) -> dict[str, Any]:
    report: dict[str, Any] = {
        mode: {
            "nodes": len(p.graph.nodes),
            "launches": len(p.schedule.nodes),
            "arena_bytes": p.memory.bytes,
            "arena_lower_bound": p.memory.lower_bound,
        }
        for mode, p in placed.items()
    }
    notes: Sequence[str] = ()
    if deployment.target != "cpu":
        notes = [f"no kernels for {deployment.target} yet: this plan holds launches, and cannot run"]
    return {"buckets": report, "notes": list(notes)}


def _versions() -> dict[str, str]:
    try:
        return {"dsv4c": version("dsv4c")}
    except PackageNotFoundError:  # a source tree that was never installed
        return {"dsv4c": "unknown"}
