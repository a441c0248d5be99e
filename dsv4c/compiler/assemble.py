"""Placed graphs to a plan: where every value's bytes lie, what is launched on them, what the passes did.

The CPU's plans launch ops, a GPU's launch kernels; only those load `dsv4c.codegen`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from dsv4c.compiler.job import Compiled, Job, Saved, figures
from dsv4c.errors import GraphError
from dsv4c.ir.fused import Fused, trace
from dsv4c.ir.graph import Graph, Node, Value
from dsv4c.ir.text import print_attribute, print_graph
from dsv4c.models.weights import records
from dsv4c.passes.expand import expand
from dsv4c.passes.memory import MemoryPlan, lay_out, plan_memory
from dsv4c.passes.schedule import Schedule, layer_in, schedule
from dsv4c.plan.records import Bucket, KernelLaunch, Launch, Plan, Slot, StateSlot
from dsv4c.types import Type

if TYPE_CHECKING:
    from dsv4c.codegen.build import Built
    from dsv4c.codegen.lower import Lowered


# --- the CPU's plans: launches are ops ---


def plan_of_ops(job: Job, pipeline: str, placed: Mapping[str, Compiled]) -> Plan:
    """Every bucket's launches as they were scheduled, over states and weights that the buckets share.

    Raises GraphError where buckets disagree on a type.
    """
    batch = job.deployment.batch
    states = _union(
        (p.graph, v.name, v.type.with_shape((batch, *v.type.shape[1:])))
        for p in placed.values()
        for v in p.graph.states
    )
    loads = {mode: p.context.prepack for mode, p in placed.items() if p.context.prepack is not None}
    graphs = {mode: p.graph for mode, p in placed.items()} | {f"load.{m}": g for m, g in loads.items()}
    params = _union((g, v.name, v.type) for g in graphs.values() for v in g.params)
    packed = {v.name for load in loads.values() for v in load.outputs.values()}
    state_offsets, state_bytes = lay_out(states)
    weight_offsets, weights_bytes = lay_out(params)
    bodies = _Bodies()
    buckets = {m: _bucket_of_ops(m, p, state_offsets, weight_offsets, bodies) for m, p in placed.items()}
    sizes = {m: _sizes(b, placed[m].graph, placed[m].memory.lower_bound) for m, b in buckets.items()}
    return Plan(
        **_decided(job, pipeline),
        buckets=buckets,
        loads={mode: _load(mode, load, weight_offsets, bodies) for mode, load in loads.items()},
        state=tuple(StateSlot(name, type_, state_offsets[name]) for name, type_ in states.items()),
        state_bytes=state_bytes,
        weights=_weights(
            job,
            {name: type_ for name, type_ in params.items() if name not in packed},
            {name: {"offset": offset} for name, offset in weight_offsets.items()},
        ),
        weights_bytes=weights_bytes,
        report={"buckets": sizes, "notes": []},
        versions=_versions(),
        files={_graph_file(name): print_graph(g).encode() for name, g in graphs.items()} | bodies.files,
    )


def _union(declared: Iterator[tuple[Graph, str, Type]]) -> dict[str, Type]:
    """Types by name over all buckets, which must agree."""
    types: dict[str, Type] = {}
    for graph, name, type_ in declared:
        if types.setdefault(name, type_) != type_:
            raise GraphError(f"graph {graph.name}: %{name} is {type_}, in another bucket {types[name]}")
    return types


def _bucket_of_ops(
    mode: str,
    placed: Compiled,
    state_offsets: Mapping[str, int],
    weight_offsets: Mapping[str, int],
    bodies: _Bodies,
) -> Bucket:
    graph = placed.graph
    input_offsets, input_bytes = lay_out({v.name: v.type for v in graph.inputs})
    declared = {v: Slot(v.type, "input", input_offsets[v.name]) for v in graph.inputs}
    declared |= {v: Slot(v.type, "state", state_offsets[v.name]) for v in graph.states}
    declared |= {v: Slot(v.type, "weights", weight_offsets[v.name]) for v in graph.params}
    values = _slots(graph, placed.schedule, placed.memory, declared)
    launches = tuple(_launches(placed.schedule, bodies))
    return _bucket(mode, graph, values, placed.memory.bytes, input_bytes, launches)


def _load(mode: str, graph: Graph, weight_offsets: Mapping[str, int], bodies: _Bodies) -> Bucket:
    """What runs once, after the weights are there: results that calls read lie among the weights."""
    launches = schedule(graph)
    memory = plan_memory(graph, launches)
    kept = {
        v: Slot(v.type, "weights", weight_offsets[v.name]) for v in graph.values() if v.name in weight_offsets
    }
    return Bucket(
        graph=_graph_file(f"load.{mode}"),
        tokens=0,
        sequences=0,
        values=_slots(graph, launches, memory, kept),
        arena_bytes=memory.bytes,
        input_bytes=0,
        inputs=(),
        outputs={},
        launches=tuple(_launches(launches, bodies)),
    )


def _slots(
    graph: Graph, schedule: Schedule, memory: MemoryPlan, fixed: Mapping[Value, Slot]
) -> dict[str, Slot]:
    """Where every value lies: where it, or what it is a view of, is `fixed`; else in the arena."""

    def slot(value: Value) -> Slot:
        place = fixed.get(value) or fixed.get(schedule.owner(value))
        if place is None:
            return Slot(value.type, "arena", memory.offsets[value])
        return replace(place, type=value.type)

    return {v.name: slot(v) for v in graph.values()}


def _launches(schedule: Schedule, bodies: _Bodies) -> Iterator[Launch]:
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


# --- a GPU's plans: launches are kernels ---


def plan_of_kernels(
    job: Job, pipeline: str, placed: Compiled, lowered: Lowered, built: Sequence[Built]
) -> Plan:
    """The decode bucket `placed` as it was lowered, with its kernels: `built` are those of its sources."""
    from dsv4c.codegen.build import toolchain
    from dsv4c.codegen.lower import CONSTANTS_FILE

    graph, not_run_here = placed.graph, job.deployment.target == "sm_100a"
    kernels, files = {}, {_graph_file("decode"): print_graph(graph).encode()}
    for (key, source), made in zip(lowered.sources.items(), built, strict=True):
        contents = {"source": source.text.encode(), "cubin": made.cubin, "ptx": made.ptx.encode()}
        paths = {"source": f"kernels/{key}.py", "cubin": f"kernels/{key}.cubin", "ptx": f"kernels/{key}.ptx"}
        files |= {paths[kind]: content for kind, content in contents.items()}
        kernels[key] = {"symbol": made.symbol, **paths, **asdict(made.resources)}
        kernels[key]["not_run_here"] = not_run_here
    constants: dict[str, Any] = {}
    if lowered.constants:
        files[CONSTANTS_FILE] = lowered.constants_file
        places = {name: {"type": str(p.type), "offset": p.offset} for name, p in lowered.constants.items()}
        constants = {"file": CONSTANTS_FILE, "bytes": lowered.constants_bytes, "values": places}
    bucket = _bucket(
        "decode", graph, lowered.values, lowered.arena_bytes, lowered.input_bytes, lowered.launches
    )
    notes = ["kernels for sm_100a assemble; they have not been run on that hardware"] if not_run_here else []
    return Plan(
        **_decided(job, pipeline),
        buckets={"decode": bucket},
        state=tuple(StateSlot(v.name, v.type, lowered.values[v.name].offset) for v in graph.states),
        state_bytes=lowered.state_bytes,
        weights=_weights(
            job, {w.name: w.type for w in lowered.weights}, {w.name: w.record for w in lowered.weights}
        ),
        weights_bytes=lowered.weights_bytes,
        report={
            "buckets": {"decode": _sizes(bucket, graph, lowered.arena_lower_bound)},
            "kernels": len(kernels),
            "notes": notes,
        },
        versions=_versions() | {"toolchain": toolchain()},
        kernels=kernels,
        constants=constants,
        files=files,
        cache_hits=sum(made.cached for made in built),
    )


# --- what all plans have ---


def _decided(job: Job, pipeline: str) -> dict[str, Any]:
    """The fields of a plan that say what was compiled, and how."""
    return {
        "name": job.config.name,
        "config": job.config.to_dict(),
        "config_digest": job.config.digest,
        "deployment": job.deployment.to_dict(),
        "recipe": job.recipe.name,
        "pipeline": pipeline,
    }


def _graph_file(name: str) -> str:
    return f"graph.{name}.txt"


def _bucket(
    mode: str,
    graph: Graph,
    values: Mapping[str, Slot],
    arena_bytes: int,
    input_bytes: int,
    launches: tuple[Launch | KernelLaunch, ...],
) -> Bucket:
    return Bucket(
        graph=_graph_file(mode),
        tokens=graph.by_name["tokens"].type.shape[0],
        sequences=graph.by_name["lengths"].type.shape[0],
        values=values,
        arena_bytes=arena_bytes,
        input_bytes=input_bytes,
        inputs=tuple(v.name for v in graph.inputs),
        outputs={label: v.name for label, v in graph.outputs.items()},
        launches=launches,
    )


def _weights(
    job: Job, types: Mapping[str, Type], places: Mapping[str, Mapping[str, object]]
) -> tuple[Mapping[str, Any], ...]:
    """For every parameter where a checkpoint keeps it, and its place in the weights' block."""
    wanted = [(name, type_, job.recipe.requantize) for name, type_ in types.items()]
    return tuple({**record, **places[record["name"]]} for record in records(job.config, wanted))


def _sizes(bucket: Bucket, graph: Graph, lower_bound: int) -> dict[str, int]:
    return {
        "nodes": len(graph.nodes),
        "launches": len(bucket.launches),
        "arena_bytes": bucket.arena_bytes,
        "arena_lower_bound": lower_bound,
    }


def _versions() -> dict[str, str]:
    try:
        return {"dsv4c": version("dsv4c")}
    except PackageNotFoundError:  # a source tree that was never installed
        return {"dsv4c": "unknown"}


def reported(
    plan: Plan,
    job: Job,
    placed: Mapping[str, Compiled],
    certificates: Sequence[dict[str, Any]],
    seconds: Mapping[str, float],
    resumed: Saved | None,
) -> Plan:
    """`plan` with what its passes did, in figures, warnings, certificates, and seconds by stage."""
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
    return replace(plan, report=report, certificates=tuple(certificates), timings={**seconds, **rules})
