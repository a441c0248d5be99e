"""Runs a plan on one NVIDIA GPU: its cubins as one explicit CUDA graph per bucket, launched on torch's
current stream with nothing beside it.

Tokens, lengths, slots, positions and the next token live on the device: in a decode bucket the argmax writes
over the step's tokens, so the following step needs no host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4c.arch import ARCHS
from dsv4c.errors import PlanError
from dsv4c.numerics.codec import Value, nan_fill, view
from dsv4c.plan.folder import Plan
from dsv4c.plan.records import SPACES, Argument, Launch, Program
from dsv4c.runtime import driver
from dsv4c.runtime.cpu import constants_of
from dsv4c.runtime.executor import Watch, handed_on, said_by, states_of, tensor_at
from dsv4c.runtime.residence import SLAB

OLDEST_DRIVER = 13000  # CUDA 13.0, driver 580: what loads cubins of the CUDA 13 tools
HEADROOM = 16 * SLAB  # bytes beside the blocks: a context's own, and slabs being packed
POISON = 0xFF  # as bf16, f32, e4m3 and ue8m0 a NaN; as an integer -1


# --- the machine --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """The facts about a GPU that decide whether a plan runs on it. Memory in bytes."""

    name: str
    capability: tuple[int, int]
    driver: int  # CUDA version it speaks, 1000 * major + 10 * minor
    free: int
    total: int

    @staticmethod
    def number(index: int) -> Device:
        """Torch's device of that number. Raises PlanError as `current` does."""
        with torch.cuda.device(index):
            return Device.current()

    @staticmethod
    def current() -> Device:
        """Torch's current device. Raises PlanError if there is none, or torch cannot use its driver."""
        if not torch.cuda.is_available():
            if 0 < (version := driver.version()) < OLDEST_DRIVER:
                raise PlanError(_old_driver("a GPU plan", version))
            raise PlanError(
                "no NVIDIA GPU that torch can use on this machine; run there, or compile with --target cpu"
            )
        properties = torch.cuda.get_device_properties()
        free, total = torch.cuda.mem_get_info()
        return Device(properties.name, (properties.major, properties.minor), driver.version(), free, total)


def check_architecture(plan: Plan, device: Device) -> None:
    """Raise PlanError unless `device` can run the kernels of `plan`: architecture, then driver."""
    wanted = ARCHS.get(plan.target)
    major, minor = device.capability
    if wanted is None:
        raise PlanError(f"plan {plan.name} is compiled for {plan.target}, which is no GPU")
    if wanted.capability != device.capability:
        raise PlanError(
            f"plan {plan.name} is compiled for {plan.target}, this GPU ({device.name}) is sm_{major}{minor}; "
            f"compile with --target sm_{major}{minor}a, or run on a GPU of that architecture"
        )
    if device.driver < OLDEST_DRIVER:
        raise PlanError(_old_driver(f"plan {plan.name}", device.driver))


def check_device(plan: Plan, device: Device) -> None:
    """Raise PlanError unless `device` can run `plan`: architecture, driver, then memory."""
    check_architecture(plan, device)
    needs = {space: plan.blocks[space] for space in SPACES}
    needed = sum(needs.values()) + HEADROOM
    if needed > device.free:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in needs.items())
        raise PlanError(
            f"plan {plan.name} needs {_gib(needed)} of GPU memory ({parts}, {_gib(HEADROOM)} to load), "
            f"{device.name} has {_gib(device.free)} free of {_gib(device.total)}; free some, or compile with "
            "fewer --slots or a smaller --max-context"
        )


def _old_driver(who: str, version: int) -> str:
    return (
        f"{who} needs a driver for CUDA {_version(OLDEST_DRIVER)} or newer, this machine's speaks CUDA "
        f"{_version(version)}; install driver 580 or newer"
    )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"


# --- the graphs ---------------------------------------------------------------------------------------------


class CudaExecutor:
    """An `Executor` with the plan's blocks on the device, its kernels, and a graph per bucket; `weights` is
    the block of weights.

    `poison` fills the arena with NaN before every call and runs the launches one at a time, so that a CUDA
    error names its launch: slow, for finding faults.
    """

    def __init__(
        self, plan: Plan, weights: Tensor, *, poison: bool = False, device: str | torch.device = "cuda"
    ) -> None:
        self.plan, self.poison = plan, poison
        own = ("arena", "state", "input", "exchange", "tiles")
        self.blocks = {n: _block(plan.blocks[n], device) for n in own}
        constants = constants_of(plan, _read_at_load(plan, weights))
        self.blocks |= {"weights": weights, "constants": constants.to(device)}
        self.states = states_of(plan, self.blocks)
        self.libraries = Libraries(plan)
        self.programs = {
            name: BoundProgram(plan, program, self.blocks, self.libraries)
            for name, program in plan.buckets.items()
        }
        self.clear()

    def clear(self) -> None:
        for block in ("arena", "input", "state"):
            self.blocks[block].zero_()
        if self.poison:
            for value in self.states.values():
                nan_fill(value)

    def share(self, names: Iterable[str]) -> None:
        """There is one rank."""

    def run(
        self, bucket: str, inputs: Mapping[str, Tensor], watch: Watch | None = None
    ) -> Mapping[str, Tensor]:
        bound = self.programs[bucket]
        bound.take(inputs)
        if watch is None:
            bound.call(poison=self.poison)
        else:
            bound.step_by_step(watch, poison=self.poison)
        return bound.outputs

    def bound(self, bucket: str) -> Iterator[BoundProgram]:
        """Every rank's program of a bucket: there is one."""
        yield self.programs[bucket]

    def begin(self, bucket: str) -> None:
        """There are no ranks to tell of a new step."""

    def value(self, bucket: str, name: str) -> Value:
        return self.programs[bucket].value(name)

    def repeat(
        self, bucket: str, inputs: Mapping[str, Tensor], count: int, keep: Tensor | None
    ) -> Mapping[str, Tensor]:
        bound = self.programs[bucket]
        bound.take(inputs)
        for i in range(count):
            if i:
                bound.hand_on()
            bound.call(poison=self.poison)
            if keep is not None:
                keep[i].copy_(said_by(bound.outputs))
        return bound.outputs

    def wait(self) -> None:
        driver.synchronize("wait for the device")

    @contextmanager
    def naming(self) -> Iterator[None]:
        """What fails on the device comes up at whatever call is next: say which plan's step it was. With
        `poison` the launch has been named.
        """
        try:
            yield
        except (torch.AcceleratorError, driver.DriverError) as error:
            named = isinstance(error, driver.LostRankError)
            if named or (self.poison and isinstance(error, driver.DriverError)):
                raise
            what, _, _ = str(error).partition("\n")
            raise driver.DriverError(
                f"a step of plan {self.plan.name} failed: {what}; bind with poison=True (--poison) to run "
                "its launches one at a time and learn which"
            ) from error


class Libraries:
    """The plan's kernels by name, each loaded once for all buckets."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._loaded: dict[str, driver.Library] = {}

    def __getitem__(self, key: str) -> driver.Library:
        if key not in self._loaded:
            if key not in self._plan.kernels:
                raise PlanError(
                    f"plan {self._plan.name}: a launch names kernel {key}, which the plan has not"
                )
            record = self._plan.kernels[key]
            name = f"{record['symbol']} ({record['cubin']})"
            self._loaded[key] = driver.Library(self._plan.files[record["cubin"]], name)
        return self._loaded[key]


class BoundProgram:
    """A bucket's launches on blocks of memory, as one graph.

    `feeds_back`: the argmax writes over the call's tokens.
    """

    def __init__(
        self, plan: Plan, program: Program, blocks: Mapping[str, Tensor], libraries: Libraries
    ) -> None:
        # Not the executor: a circle would keep its memory on the device until Python looks for circles.
        self.plan, self.program, self.blocks, self.launches = plan, program, blocks, program.launches
        self._libraries = libraries
        self.feeds_back = feeds_back(program)
        names = dict(program.outputs) | ({"next": "tokens"} if self.feeds_back else {})
        self.inputs = {n: tensor_at(plan, blocks, n, program.values[n]) for n in program.inputs}
        self.outputs = {o: tensor_at(plan, blocks, n, program.values[n]) for o, n in names.items()}
        self._maps: list[Tensor] = []
        self._bound = [self._bind(launch) for launch in self.launches]
        self.graph = self.graph_of(range(len(self.launches)))
        self._single: list[driver.Graph] = []

    def take(self, inputs: Mapping[str, Tensor]) -> None:
        for name, target in self.inputs.items():
            target.copy_(inputs[name], non_blocking=True)

    def call(self, *, poison: bool = False) -> None:
        """Enqueue one call over what the input block holds. Outputs lie in the arena and the input block
        until the next one. With `poison` its launches run one at a time.
        """
        if poison:
            self.step_by_step(poison=True)
        else:
            self.graph.launch(stream())

    def step_by_step(self, watch: Watch | None = None, *, poison: bool = False) -> None:
        """One call, each launch finished before the next starts, in an arena of NaN with `poison`. Raises
        DriverError naming the launch that failed and the graph's nodes in it.
        """
        if poison:
            self.blocks["arena"].fill_(POISON)
        for i, launch in enumerate(self.launches):
            self.start(i)
            self.finish(i)
            if watch is not None:
                watch(launch)

    def start(self, index: int) -> None:
        """Enqueue one launch by itself."""
        if not self._single:
            self._single = [self.graph_of([i]) for i in range(len(self.launches))]
        self._single[index].launch(stream())

    def finish(self, index: int) -> None:
        """Wait for a launch. Raises DriverError naming it and its nodes."""
        launch = self.launches[index]
        driver.synchronize(f"launch {index}, {launch.name} (nodes {', '.join(launch.nodes)})")

    def hand_on(self) -> None:
        """Let the next call take what this one left, where it does not lie there already."""
        for label, name in handed_on(self.outputs).items() if not self.feeds_back else ():
            self.inputs[name].copy_(self.outputs[label])

    def value(self, name: str) -> Value:
        """The bytes of a value as the last call left them."""
        place = self.program.values[name]
        space, offset = self._place(name, place.space, place.offset)
        return view(self.blocks[space], place.type, offset)

    def graph_of(self, indices: Iterable[int]) -> driver.Graph:
        """An instantiated CUDA graph of some of the launches, with the edges between them."""
        graph = driver.Graph()
        nodes: dict[int, Any] = {}
        for i in indices:
            launch = self.launches[i]
            edges = [driver.Edge(nodes[a], launch.kernel.programmatic) for a in launch.after if a in nodes]
            nodes[i] = graph.add(self._bound[i], edges, name=f"{i}, {launch.name}")
        graph.instantiate()
        return graph

    def repeated(self, index: int, count: int) -> driver.Graph:
        """An instantiated graph of one launch, again and again, each behind the whole of the one before."""
        graph, edges = driver.Graph(), list[driver.Edge]()
        for i in range(count):
            edges = [driver.Edge(graph.add(self._bound[index], edges, name=str(i)), False)]
        graph.instantiate()
        return graph

    def component(self, argument: Argument) -> Tensor:
        """The bytes that an argument points to, uint8."""
        block, offset = self._place(argument.value, argument.space, argument.offset)
        return self.blocks[block][offset : offset + argument.nbytes]

    def address(self, argument: Argument) -> int:
        """The pointer that the kernel gets."""
        block, offset = self._place(argument.value, argument.space, argument.offset)
        memory = self.blocks[block]
        if not 0 <= offset <= offset + argument.nbytes <= memory.numel():
            raise PlanError(
                f"plan {self.plan.name}: {argument.value}.{argument.component} lies at bytes "
                f"{offset} to {offset + argument.nbytes} of {block}, which has {memory.numel()}; compile it "
                "again"
            )
        at = memory.data_ptr() + offset
        if argument.box is None:
            return at
        made = torch.frombuffer(bytearray(driver.tensor_map(at, argument.box)), dtype=torch.uint8)
        self._maps.append(made.to(memory.device))
        return self._maps[-1].data_ptr()

    def _place(self, value: str, space: str, offset: int) -> tuple[str, int]:
        if self.feeds_back and value == self.program.outputs["next"]:
            return "input", self.program.values["tokens"].offset
        return space, offset

    def _bind(self, launch: Launch) -> driver.Launch:
        run = launch.kernel
        cluster = run.cluster[0] * run.cluster[1] * run.cluster[2]
        library = self._libraries[run.kernel]
        symbol = self.plan.kernels[run.kernel]["symbol"]
        kernel = library.kernel(symbol, shared=run.shared, cluster=cluster)
        addresses = tuple(self.address(argument) for argument in launch.arguments)
        return driver.Launch(kernel, run.grid, run.block, run.shared, addresses, run.cluster)


def feeds_back(program: Program) -> bool:
    """Can the argmax write over the call's tokens? Only where a call takes one token per sequence, and every
    launch that reads them comes before it. A sampler reads them itself.
    """
    following = program.outputs.get("next")
    if following is None or program.shape.kind != "decode" or program.shape.sampled:
        return False
    if len({program.values[n].type for n in (following, "tokens")}) != 1:
        return False
    writers = [i for i, launch in enumerate(program.launches) if _touches(launch, following)]
    readers = [i for i, launch in enumerate(program.launches) if _touches(launch, "tokens")]
    if len(writers) != 1:
        return False
    before: set[int] = set()
    pending = [writers[0]]
    while pending:
        for earlier in program.launches[pending.pop()].after:
            if earlier not in before:
                before.add(earlier)
                pending.append(earlier)
    return before.issuperset(readers)


def _touches(launch: Launch, value: str) -> bool:
    return any(argument.value == value for argument in launch.arguments)


def _read_at_load(plan: Plan, weights: Tensor) -> Tensor:
    """The block of weights on the host, of which only those that the plan reads at load take memory."""
    host = torch.empty(weights.numel(), dtype=torch.uint8)
    for launch in plan.load.launches if plan.load is not None else ():
        for a in launch.arguments:
            if a.space == "weights":
                host[a.offset : a.offset + a.nbytes].copy_(weights[a.offset : a.offset + a.nbytes])
    return host


def _block(size: int, device: str | torch.device) -> Tensor:
    return torch.zeros(max(-(-size // 256) * 256, 256), dtype=torch.uint8, device=device)


def stream() -> int:
    """Torch's current one, of its current device."""
    return int(torch.cuda.current_stream().cuda_stream)
