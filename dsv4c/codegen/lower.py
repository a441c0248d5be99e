"""A folded, scheduled graph as launches of kernels over blocks: arena, states, weights, constants, inputs.

Launches form one chain, each behind its predecessor on a programmatic edge. That orders all of them: a kernel
touches what others write only after its wait, the wait returns when the predecessor has completed, and the
predecessor could not complete before its own wait had returned.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dsv4c.codegen.build import Source, source_key
from dsv4c.codegen.emit import Emission
from dsv4c.codegen.lib.shapes import BYTES, COLUMNS
from dsv4c.codegen.registry import Launchable, choose, request_of
from dsv4c.errors import BuildError
from dsv4c.ir.graph import Graph, Kind, Node, Value
from dsv4c.ir.ops.rope import RopeFrequencies
from dsv4c.passes.fusions.index_topk import IndexTopk
from dsv4c.passes.fusions.indexer import Indexer
from dsv4c.passes.fusions.router import HashRouter, Router
from dsv4c.passes.fusions.swiglu import Swiglu
from dsv4c.passes.memory import aligned, lay_out, plan_memory
from dsv4c.passes.schedule import Schedule
from dsv4c.plan.records import Argument, KernelLaunch, Slot
from dsv4c.types import BF16, F32, Component, QuantType, TensorType, Type

CONSTANTS_FILE = "constants.safetensors"


@dataclass(frozen=True)
class Weight:
    """A parameter in the weights' block: `components` are (name, offset in the block, bytes)."""

    name: str
    type: Type
    form: str
    offset: int
    nbytes: int
    components: tuple[tuple[str, int, int], ...]

    @property
    def record(self) -> dict[str, object]:
        """Plan data beside the parameter's sources."""
        parts = [{"name": name, "offset": at, "nbytes": size} for name, at, size in self.components]
        return {"offset": self.offset, "nbytes": self.nbytes, "form": self.form, "components": parts}


@dataclass(frozen=True)
class Lowered:
    """A decode step as data. `sources` are the kernels to build, by the names that launches call them."""

    launches: tuple[KernelLaunch, ...]
    sources: Mapping[str, Source]
    values: Mapping[str, Slot]
    arena_bytes: int
    arena_lower_bound: int
    state_bytes: int
    input_bytes: int
    weights: tuple[Weight, ...]
    weights_bytes: int
    constants: Mapping[str, Slot]
    constants_file: bytes
    constants_bytes: int


def lower(graph: Graph, schedule: Schedule, target: str, load: Graph | None = None) -> Lowered:
    """Kernels, launches and bytes of a folded graph; `load` is what the prepack pass set aside.

    Raises BuildError naming the node that no kernel takes, with every reason.
    """
    tables = constants_of(schedule, load)
    schedule = _in_a_chain(schedule, steps(schedule))
    memory = plan_memory(graph, schedule, parallel=True)
    chosen = [_choose(graph, schedule, members, target) for members in schedule.groups]
    params = [v for v in graph.params if v.name not in tables]
    weights, weights_bytes = lay_out_weights(params, _forms(chosen))
    constants, constants_file, constants_bytes = _constants(tables)
    states, state_bytes = lay_out({v.name: v.type for v in graph.states})
    inputs, input_bytes = lay_out({v.name: v.type for v in graph.inputs})
    places: dict[Value, Slot] = {v: Slot(v.type, "arena", at) for v, at in memory.offsets.items()}
    places |= {v: Slot(v.type, "state", states[v.name]) for v in graph.states}
    places |= {v: Slot(v.type, "input", inputs[v.name]) for v in graph.inputs}
    places |= {v: Slot(v.type, "weights", w.offset) for v, w in zip(params, weights, strict=True)}
    places |= {v: constants[v.name] for v in graph.values() if v.name in constants}
    places |= {v: replace(places[o], type=v.type) for v, o in schedule.views.items()}
    parts = {w.name: {name: (at, size) for name, at, size in w.components} for w in weights}
    return Lowered(
        launches=tuple(_launches(schedule, chosen, places, parts, memory.bytes, target)),
        sources={_key(e, target): Source(e.symbol, e.source) for e in _emissions(chosen)},
        values={v.name: places[v] for v in graph.values()},
        arena_bytes=memory.bytes + max((_scratch_bytes(answer) for _, answer in chosen), default=0),
        arena_lower_bound=memory.lower_bound,
        state_bytes=state_bytes,
        input_bytes=input_bytes,
        weights=weights,
        weights_bytes=weights_bytes,
        constants=constants,
        constants_file=constants_file,
        constants_bytes=constants_bytes,
    )


# Launches ---------------------------------------------------------------------------------------------------

Chosen = tuple[tuple[Value, ...], tuple[Launchable, ...]]
"""Values by number, and the launches that compute them."""


def steps(schedule: Schedule) -> list[tuple[Node, ...]]:
    """What is computed together, in order: the launches of `schedule` without constants; an index_topk with
    the indexer whose scores it reads, and a swiglu with the router of its experts.
    """
    read = {IndexTopk: 0, Swiglu: 1}  # which operand the first of the two makes
    second = {n.inputs[read[type(n.op)]]: n for n in schedule.nodes if type(n.op) in read}
    pairs = {
        n: second[n.outputs[0]]
        for n in schedule.nodes
        if isinstance(n.op, Indexer | Router | HashRouter) and n.outputs[0] in second
    }
    ordered = []
    for members in schedule.groups:
        nodes = tuple(schedule.nodes[i] for i in members)
        if isinstance(nodes[0].op, RopeFrequencies) or nodes[0] in pairs.values():
            continue
        ordered.append((*nodes, pairs[nodes[0]]) if nodes[0] in pairs else nodes)
    return ordered


def _in_a_chain(schedule: Schedule, ordered: Sequence[tuple[Node, ...]]) -> Schedule:
    """The schedule of these steps one after the other; a step's nodes are not ordered among themselves."""
    groups: list[tuple[int, ...]] = []
    after: list[tuple[int, ...]] = []
    last: tuple[int, ...] = ()
    at = 0
    for nodes in ordered:
        members = tuple(range(at, at + len(nodes)))
        after += [last] * len(nodes)
        groups.append(members)
        last, at = members, at + len(nodes)
    return replace(
        schedule, nodes=tuple(n for nodes in ordered for n in nodes), after=tuple(after), groups=tuple(groups)
    )


def _choose(graph: Graph, schedule: Schedule, members: Sequence[int], target: str) -> Chosen:
    nodes = [schedule.nodes[i] for i in members]
    labels = {p: label_of(p.name) for node in nodes for p in node.inputs if p.kind is Kind.PARAM}
    request, values = request_of(nodes, target, graph.users, labels)
    try:
        return values, choose(request)
    except BuildError as error:
        raise BuildError(f"at {nodes[0].name}: {error}") from None


def label_of(name: str) -> str:
    """A parameter's name inside its layer, as an identifier."""
    return re.sub(r"^(layers|mtp)\.\d+\.((attn|ffn)\.)?", "", name).replace(".", "_")


def _emissions(chosen: Iterable[Chosen]) -> Iterable[Emission]:
    return (launch.emission for _, answer in chosen for launch in answer)


def _key(emission: Emission, target: str) -> str:
    return source_key(Source(emission.symbol, emission.source), target)[:24]


def _scratch(answer: Sequence[Launchable]) -> dict[str, int]:
    """Offsets of a request's scratch arrays."""
    sizes = {name: size for launch in answer for name, size in launch.scratch.items()}
    offsets, at = {}, 0
    for name, size in sizes.items():
        offsets[name] = at
        at += aligned(size)
    return offsets


def _scratch_bytes(answer: Sequence[Launchable]) -> int:
    sizes = {name: size for launch in answer for name, size in launch.scratch.items()}
    return sum(map(aligned, sizes.values()))


def _launches(
    schedule: Schedule,
    chosen: Sequence[Chosen],
    places: Mapping[Value, Slot],
    parts: Mapping[str, Mapping[str, tuple[int, int]]],
    scratch_base: int,
    target: str,
) -> Iterable[KernelLaunch]:
    index = 0
    for members, (values, answer) in zip(schedule.groups, chosen, strict=True):
        nodes = [schedule.nodes[i] for i in members]
        scratch = _scratch(answer)
        for launch in answer:
            emission = launch.emission
            arguments = []
            for b in launch.bindings:
                if b.value is None:
                    at, size = scratch_base + scratch[b.scratch], launch.scratch[b.scratch]
                    name = f"{nodes[0].name}.{b.scratch}"
                    arguments.append(Argument("arena", at, name, b.component, size, b.access))
                    continue
                value = values[b.value]
                place = places[value]
                if place.space == "weights":
                    at, size = parts[value.name][b.component]
                else:
                    c = _component(place.type, b.component)
                    at, size = place.offset + c.offset, c.nbytes
                arguments.append(Argument(place.space, at, value.name, b.component, size, b.access))
            yield KernelLaunch(
                name=f"{nodes[0].name}.{launch.stage}" if launch.stage else nodes[0].name,
                op=" + ".join(n.op.name for n in nodes),
                nodes=tuple(n.name for n in nodes),
                scope=nodes[0].scope,
                kernel=_key(emission, target),
                grid=emission.grid,
                block=emission.block,
                cluster=emission.cluster,
                shared=emission.shared,
                programmatic=index > 0 and emission.programmatic and emission.waits,
                waits=emission.waits,
                arguments=tuple(arguments),
                after=(index - 1,) if index else (),
            )
            index += 1


def _component(type_: Type, name: str) -> Component:
    return next(c for c in type_.components if c.name == name)


# Weights ----------------------------------------------------------------------------------------------------


def _forms(chosen: Iterable[Chosen]) -> dict[Value, str]:
    """How each weight must lie in memory. Raises BuildError when two kernels disagree."""
    forms: dict[Value, str] = {}
    for values, answer in chosen:
        for launch in answer:
            wanted = {b.value: "plain" for b in launch.bindings if b.value is not None} | dict(launch.forms)
            for number, form in wanted.items():
                value = values[number]
                if value.kind is not Kind.PARAM:
                    if form != "plain":
                        symbol = launch.emission.symbol
                        raise BuildError(f"{symbol} wants %{value.name} as {form}: it is no weight")
                elif forms.setdefault(value, form) != form:
                    raise BuildError(f"%{value.name} is wanted as {forms[value]} and, elsewhere, as {form}")
    return forms


def packed_bytes(packing: str, rows: int, columns: int) -> int:
    """Bytes of one matrix in a packing `format/TxS`: whole tiles of 16 rows, T at a time, and S units."""
    format_, tiles, span = re.fullmatch(r"(\w+)/(\d+)x(\d+)", packing).groups()  # type: ignore[union-attr]
    format_ = format_.partition("_")[0]  # variants have the same bytes
    across = math.ceil(math.ceil(rows / 16) / int(tiles)) * int(tiles)
    along = math.ceil(math.ceil(columns / COLUMNS[format_]) / int(span)) * int(span)
    return across * along * BYTES[format_]


def lay_out_weights(params: Iterable[Value], forms: Mapping[Value, str]) -> tuple[tuple[Weight, ...], int]:
    """Offsets of the parameters in their block, one after the other, and the bytes of all."""
    weights, end = [], 0
    for value in params:
        form = forms.get(value, "plain")
        sizes = component_bytes(value.type, form)
        components, at = [], end
        for name, size in sizes.items():
            components.append((name, at, size))
            at += -(-size // 16) * 16
        weights.append(Weight(value.name, value.type, form, end, at - end, tuple(components)))
        end += aligned(at - end)
    return tuple(weights), end


def component_bytes(type_: Type, form: str) -> dict[str, int]:
    """Bytes of a weight's arrays in memory. Block scales of FP4 formats lie inside of their packing."""
    plain = {c.name: c.nbytes for c in type_.components}
    if form == "plain":
        return plain
    if form == "f32":
        if isinstance(type_, QuantType) or type_.dtype is not BF16:
            raise BuildError(f"f32 is a form of bf16 weights, not of {type_}")
        return {"data": 2 * plain["data"]}
    *lead, rows, columns = type_.shape
    data = math.prod(lead) * packed_bytes(form, rows, columns)
    inside = form.startswith(("mxfp4", "nvfp4"))
    return {"data": data} | {n: s for n, s in plain.items() if n != "data" and not (inside and n == "scale")}


# Constants --------------------------------------------------------------------------------------------------


def _f32(x: float) -> float:
    """x rounded to f32."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def rope_table(op: RopeFrequencies) -> list[float]:
    """theta^(-2i/dims) with YaRN's blend, every step rounded to f32, as `precompute_freqs_cis` of
    DeepSeek-V4 inference/model.py does. Sums, products and quotients of f32 numbers may pass through f64.
    """
    plain = [_f32(1.0 / _f32(op.theta ** _f32(2 * i / op.dims))) for i in range(op.dims // 2)]
    if op.factor == 1:
        return plain

    def pair_of(turns: float) -> float:
        wavelengths = op.original_max_position / (turns * 2 * math.pi)
        return op.dims * math.log(wavelengths) / (2 * math.log(op.theta))

    low = max(math.floor(pair_of(op.beta_fast)), 0)
    high = min(math.ceil(pair_of(op.beta_slow)), op.dims - 1)
    span = _f32(high - low if high != low else 0.001)
    table = []
    for i, frequency in enumerate(plain):
        fast = _f32(1 - min(max(_f32((i - low) / span), 0.0), 1.0))
        stretched = _f32(_f32(frequency / _f32(op.factor)) * _f32(1 - fast))
        table.append(_f32(stretched + _f32(frequency * fast)))
    return table


def constants_of(schedule: Schedule, load: Graph | None) -> dict[str, RopeFrequencies]:
    """Values computed at compile time, by name. Raises BuildError for other work on weights alone."""
    tables = {n.name: n.op for n in schedule.nodes if isinstance(n.op, RopeFrequencies)}
    for node in load.nodes if load is not None else ():
        if not isinstance(node.op, RopeFrequencies):
            raise BuildError(
                f"at {node.name}: {node.op.name} of weights is left over; kernels take the weights "
                "themselves, expected it folded into the op that reads it"
            )
        tables[node.name] = node.op
    return tables


def _constants(tables: Mapping[str, RopeFrequencies]) -> tuple[dict[str, Slot], bytes, int]:
    """Places of the frequency tables, the safetensors file that holds them, and the block's bytes."""
    places: dict[str, Slot] = {}
    header: dict[str, object] = {}
    data = b""
    for name, op in tables.items():
        table = rope_table(op)
        begin = len(data)
        places[name] = Slot(TensorType(F32, (len(table),)), "constants", begin)
        data += struct.pack(f"<{len(table)}f", *table)
        header[name] = {"dtype": "F32", "shape": [len(table)], "data_offsets": [begin, len(data)]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return places, struct.pack("<Q", len(text)) + text + data, len(data)
