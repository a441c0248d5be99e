"""Where a step's microseconds go, on the GPU: the whole step, every layer, every launch in its place.

A time is the difference of two prefixes of the step's graph, the median of many replays each, from one
position and a flushed L2: what a launch adds where it stands, with its neighbors overlapping it. Beside it
stands the floor: the bytes it must move over the bandwidth that was read with in the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsv4c.errors import PlanError
from dsv4c.plan.folder import Plan
from dsv4c.plan.records import Argument, Launch, Program
from dsv4c.runtime import driver
from dsv4c.runtime.cuda import BoundProgram, CudaExecutor, Device, check_device, stream
from dsv4c.runtime.processes import World, devices_of
from dsv4c.runtime.random_fill import fill_state, fill_value, fill_weight
from dsv4c.runtime.ranks import CudaRanks, alone, check_devices, cuda_executor
from dsv4c.runtime.residence import Resident
from dsv4c.runtime.sampling import LEAST
from dsv4c.scope import LAYERS, Scope

KINDS = {0: "SWA", 4: "CSA", 128: "HCA"}
"""What layers are called, by their compression ratio."""

FLUSH = 256 << 20  # bytes written between replays: more than four times the L2
WARM = 2  # replays that do not count
SAMPLE = 2 << 30  # bytes that the bandwidths are measured with

Progress = Callable[[str, int, int], None]


# The machine ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What the run's GPU did: bytes per second copied (read and written) and read, microseconds that a launch
    of a graph takes which does nothing.
    """

    name: str
    copy_bandwidth: float
    read_bandwidth: float
    node_us: float


def microseconds(work: Callable[[], object]) -> float:
    """Of what `work` enqueues on torch's current stream."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return 1e3 * float(start.elapsed_time(stop))


def least_seconds(work: Callable[[], object], repeats: int = 12) -> float:
    """The least of several runs."""
    return 1e-6 * min(microseconds(work) for _ in range(repeats))


def bandwidths() -> tuple[float, float]:
    """Bytes per second of the best of several large copies, and of sums."""
    source = torch.zeros(SAMPLE, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    words = source.view(torch.int64)
    copied = 2 * SAMPLE / least_seconds(lambda: target.copy_(source))
    return copied, SAMPLE / least_seconds(lambda: words.sum())


def node_us(step: BoundProgram, count: int = 64) -> float:
    """Microseconds that a launch adds to a chain of small ones, each behind the whole of the one before."""
    alone = [i for i, launch in enumerate(step.launches) if not launch.exchanges]
    small = min(alone, key=lambda i: sum(a.nbytes for a in step.launches[i].arguments))
    stream = torch.cuda.current_stream().cuda_stream

    def seconds(length: int) -> float:
        graph = step.repeated(small, length)
        found = least_seconds(lambda: graph.launch(stream))
        graph.close()
        return found

    return 1e6 * (seconds(2 * count) - seconds(count)) / count


# The step ---------------------------------------------------------------------------------------------------


class Clock:
    """Replays of parts of a step's graph, on all ranks, each from the same position and a flushed L2. Times
    are the first rank's. Sequences are given `tokens` each, or as many as the bucket has.
    """

    def __init__(
        self,
        executor: CudaExecutor | CudaRanks,
        bucket: str,
        position: int,
        replays: int,
        tokens: int | None = None,
    ) -> None:
        self.executor, self.bucket, self.position, self.replays = executor, bucket, position, replays
        self.tokens = tokens
        self._flush = [torch.empty(FLUSH, dtype=torch.uint8, device="cuda") for _ in executor.bound(bucket)]

    def prefixes(self, ends: Sequence[int], progress: Progress | None = None) -> dict[int, float]:
        """Median microseconds of the first `end` launches for every end, taken in turns."""
        graphs = {
            end: [step.graph_of(range(end)) for step in self.executor.bound(self.bucket)]
            for end in ends
            if end
        }
        times: dict[int, list[float]] = {end: [] for end in graphs}
        for replay in range(self.replays + WARM):
            for end, parts in graphs.items():
                spent = self.once(parts)
                if replay >= WARM:
                    times[end].append(spent)
            if progress is not None:
                progress(f"{len(graphs)} prefixes of the step", replay + 1, self.replays + WARM)
        for parts in graphs.values():
            for graph in parts:
                graph.close()
        return {end: statistics.median(values) for end, values in times.items()} | {0: 0.0}

    def once(self, graphs: Sequence[driver.Graph]) -> float:
        """Microseconds of one replay, a graph for each rank."""
        self._set()
        self.executor.begin(self.bucket)

        def launch() -> None:
            for graph, _ in zip(graphs, self.executor.bound(self.bucket), strict=True):
                graph.launch(stream())

        return microseconds(launch)

    def _set(self) -> None:
        for step, flush in zip(self.executor.bound(self.bucket), self._flush, strict=True):
            position, slots = step.value("position"), step.inputs["slots"]
            assert isinstance(position, Tensor)
            position.fill_(self.position)
            tokens = step.inputs["tokens"]  # unlike ones: like ones choose the same experts by hash
            torch.arange(len(tokens), out=tokens).mul_(7919).add_(17)
            tokens.remainder_(int(step.plan.config["vocab_size"]))
            step.inputs["lengths"].fill_(self.tokens or step.program.shape.tokens)
            torch.arange(len(slots), out=slots)
            torch.cuda.manual_seed(self.position)  # the same on all ranks
            for name in given(step.program):
                fill_value(step.value(name))
            flush.fill_(1)


def given(program: Program) -> list[str]:
    """Values in the arena that are read before they are written: of layers alone, what others make."""
    written, found = set[int](), dict[str, None]()  # where values begin: a view has its own name
    for launch in program.launches:
        arena = [a for a in launch.arguments if a.space == "arena"]
        for a in arena:
            if a.access != "w" and a.value in program.values and a.offset not in written:
                found[a.value] = None
        written |= {a.offset for a in arena if "w" in a.access}
    return list(found)


# Bytes ------------------------------------------------------------------------------------------------------


def moved_bytes(plan: Plan, program: Program, launch: Launch, position: int) -> float:
    """The fewest bytes a launch must move: every operand once, of stacks and caches what its tokens need."""
    return sum(_moved(plan, program, argument, position) for argument in launch.arguments)


def _moved(plan: Plan, program: Program, argument: Argument, position: int) -> float:
    config: Mapping[str, Any] = plan.config
    name, size = argument.value, float(argument.nbytes)
    rows, context = _rows(plan, program, argument), int(plan.deployment["max_context"])
    if argument.space == "weights" and ".ffn.experts." in name:
        experts = int(config["n_routed_experts"])
        return size * min(rows * int(config["num_experts_per_tok"]), experts) / experts
    if name in ("embed",) or name.endswith(("tid2eid", "markov_w1")):
        return size * rows / int(config["vocab_size"])
    if argument.space != "state":
        return size
    if "w" in argument.access:
        return 0.0  # a row or two
    place = Scope.of(name)
    used = size * program.shape.sequences / int(plan.deployment["slots"])
    ratio = int(config["compress_ratios"][place.number]) if place.block == LAYERS else 0
    if place.path == "attn.indexer.keys":
        return used * min(position / context, 1.0)
    if place.path == "attn.entries":
        visible = position // ratio
        read = min(visible, int(config["index_topk"])) if ratio == 4 else visible
        return used * read / max(context // ratio, 1)
    return used


def _rows(plan: Plan, program: Program, argument: Argument) -> int:
    """Rows of a call that a launch with this weight is about: all of them, or those that draft."""
    shape = program.shape
    if shape.drafts and Scope.of(argument.value).draft:
        return shape.sequences * int(plan.config["dspark_block_size"] or 1)
    return shape.rows


# The table --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One layer: what it is, and microseconds beside megabytes and their floor."""

    layer: int
    kind: str
    launches: int
    microseconds: float
    megabytes: float
    floor: float


@dataclass(frozen=True)
class Part:
    """What one launch adds to the step, and the nodes of the graph that it computes: the median over the
    inner layers of its kind.
    """

    layer: int
    kind: str
    name: str
    op: str
    nodes: tuple[str, ...]
    grid: int
    microseconds: float
    megabytes: float
    floor: float


@dataclass(frozen=True)
class Bench:
    """A bucket's times on one machine. Floors are bytes over the bandwidth read with."""

    plan: str
    digest: str
    recipe: str
    bucket: str
    position: int
    machine: Machine
    launches: int
    step_us: float
    finite_logits: bool | None  # None where layers alone make none
    layers: tuple[Layer, ...]
    parts: tuple[Part, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def layer_of(scope: str, name: str) -> int | None:
    """The main layer that a launch belongs to, by its scope or its name; None outside of layers."""
    places = [Scope.of(scope), Scope.of(name)]
    return next((place.number for place in places if place.block == LAYERS), None)


def layers_alone(plan: Plan, bucket: str, first: int, last: int) -> Plan:
    """The plan cut to the launches of layers `first` to `last` of a bucket, to those before all layers that
    read no weights (where a call's rows are, which decides how much a layer does), and to the weights that
    these read. Raises PlanError if there are no such layers.
    """
    program = plan.program(bucket)
    owners = [layer_of(launch.scope, launch.name) for launch in program.launches]
    kept = [i for i, owner in enumerate(owners) if owner is None or first <= owner <= last]
    inside = [i for i in kept if owners[i] is not None]
    known = sorted({owner for owner in owners if owner is not None})
    if not inside:
        raise PlanError(f"plan {plan.name} has no layers {first} to {last}; it has {known[0]} to {known[-1]}")
    ahead = [
        i
        for i in range(min(inside))
        if owners[i] is None and all(a.space != "weights" for a in program.launches[i].arguments)
    ]
    kept = [*ahead, *(i for i in range(min(inside), max(inside) + 1) if i in inside)]
    number = {old: new for new, old in enumerate(kept)}
    read = {a.value for i in kept for a in program.launches[i].arguments if a.space == "weights"}
    weights = [record for record in plan.weights if record["name"] in read]
    base = min(c["offset"] for record in weights for c in record["components"])
    end = max(c["offset"] + c["nbytes"] for record in weights for c in record["components"])

    def moved(argument: Argument) -> Argument:
        return replace(argument, offset=argument.offset - base) if argument.space == "weights" else argument

    launches = tuple(
        replace(
            program.launches[i],
            arguments=tuple(map(moved, program.launches[i].arguments)),
            after=tuple(number[a] for a in program.launches[i].after if a in number),
        )
        for i in kept
    )
    records = tuple(
        {**r, "components": [{**c, "offset": c["offset"] - base} for c in r["components"]]} for r in weights
    )
    return replace(
        plan,
        buckets={program.shape.name: replace(program, launches=launches)},
        blocks={**plan.blocks, "weights": end - base},
        weights=records,
    )


def random_executor(
    plan: Plan, rank: int | None = None, *, limit: float | None = None, world: World | None = None
) -> CudaExecutor | CudaRanks:
    """The plan on random weights and caches, each rank's made on its GPU; or one `rank` alone, on the current
    one. Caches, and weights that all ranks have whole, are the same on all. `limit`: seconds that a rank
    waits for another. `world`: the processes that run the ranks, each its own. Raises PlanError if the GPUs
    cannot run it.
    """
    if rank is None:
        check_devices(plan, world)
    else:
        check_device(plan, Device.current())
    here = torch.cuda.current_device()
    several = rank is None and plan.ranks > 1
    places = devices_of(plan, world) if several else {rank or 0: here}
    blocks = [_random_weights(plan, number, device) for number, device in places.items()]
    if rank is None:
        executor = cuda_executor(plan, blocks, limit=limit, world=world)
    else:
        executor = alone(plan, blocks[0], rank)
    torch.cuda.manual_seed(0)  # the same in all processes
    fill_caches(executor)
    return executor


def fill_caches(executor: CudaExecutor | CudaRanks) -> None:
    """Random numbers of each state's type, the same on all ranks; rounds judge all of their drafts."""
    for slot in executor.plan.state:
        fill_state(executor.blocks["state"], slot.type, slot.offset)
        if slot.name == LEAST:
            executor.blocks["state"][slot.offset :][: slot.type.nbytes].zero_()
    executor.share(slot.name for slot in executor.plan.state)


def _random_weights(plan: Plan, rank: int, device: int) -> Tensor:
    """A rank's block of weights."""
    experts = int(plan.config["n_routed_experts"])
    with torch.cuda.device(device):
        block = torch.empty(-(-plan.blocks["weights"] // 256) * 256, dtype=torch.uint8, device="cuda")
        for number, resident in enumerate(map(Resident.from_json, plan.weights)):
            cut = resident.record.slice is not None
            torch.cuda.manual_seed(number * plan.ranks + (rank if cut else 0))
            fill_weight(block, resident, experts)
    return block


def bench(
    plan: Plan,
    executor: CudaExecutor | CudaRanks,
    *,
    bucket: str = "decode",
    position: int = 8192,
    replays: int = 31,
    progress: Progress | None = None,
) -> Bench:
    """Time a bucket at `position` tokens of context, or at the end of what the plan has room for.

    Raises PlanError where layers do not follow each other in the launches.
    """
    program = plan.program(bucket)
    step = next(executor.bound(program.shape.name))
    position = min(position, int(plan.deployment["max_context"]) - max(8, program.shape.tokens))
    copied, read = bandwidths()
    machine = Machine(torch.cuda.get_device_name(), copied, read, node_us(step))
    torch.cuda.empty_cache()
    launches = step.launches
    owners = [layer_of(launch.scope, launch.name) for launch in launches]
    ends = {layer: i + 1 for i, layer in enumerate(owners) if layer is not None}
    if sorted(ends.values()) != list(ends.values()):
        raise PlanError(f"plan {plan.name}: layers do not follow each other in the launches of {bucket}")
    begins = {layer: owners.index(layer) for layer in ends}
    clock = Clock(executor, program.shape.name, position, replays)
    times = clock.prefixes(range(len(launches) + 1), progress)
    megabytes = [1e-6 * moved_bytes(plan, program, launch, position) for launch in launches]
    made = {a.value for launch in launches for a in launch.arguments if "w" in a.access}
    finite = None
    if program.outputs["logits"] in made:
        finite = bool(step.outputs["logits"].isfinite().all())
    kinds = {layer: KINDS[plan.config["compress_ratios"][layer]] for layer in ends}

    def floor(size: float) -> float:
        return 1e12 * size / read

    layers = []
    for layer, end in ends.items():
        size = sum(megabytes[begins[layer] : end])
        spent = times[end] - times[begins[layer]]
        layers.append(Layer(layer, kinds[layer], end - begins[layer], spent, size, floor(size)))
    parts = []
    for layer, alike in _inner(ends, begins, kinds).items():
        for i in range(begins[layer], ends[layer]):
            places = [begins[other] + i - begins[layer] for other in alike]
            launch, (x, y, z) = launches[i], launches[i].kernel.grid
            spent = statistics.median(times[place + 1] - times[place] for place in places)
            parts.append(
                Part(
                    layer,
                    kinds[layer],
                    launch.name,
                    launch.op,
                    launch.nodes,
                    x * y * z,
                    spent,
                    megabytes[i],
                    floor(megabytes[i]),
                )
            )
    return Bench(
        plan.name,
        plan.digest,
        plan.recipe,
        program.shape.name,
        position,
        machine,
        len(launches),
        times[len(launches)],
        finite,
        tuple(layers),
        tuple(parts),
    )


def _inner(
    ends: Mapping[int, int], begins: Mapping[int, int], kinds: Mapping[int, str]
) -> dict[int, list[int]]:
    """For every kind the last layer that others surround, and all that are like it."""
    middle = list(ends)[1:-1] or list(ends)
    last = {kinds[layer]: layer for layer in middle}
    return {
        layer: [
            other
            for other in middle
            if kinds[other] == kind and ends[other] - begins[other] == ends[layer] - begins[layer]
        ]
        for kind, layer in last.items()
    }
