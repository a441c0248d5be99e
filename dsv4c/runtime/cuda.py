"""Runs a plan on one NVIDIA GPU: its cubins as one explicit CUDA graph per decode step, launched on torch's
current stream with nothing beside it.

Tokens, lengths, positions and the next token live on the device: the argmax writes over the step's tokens,
so the following step needs no host. Every refusal comes before anything on the device changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from dsv4c.errors import PlanError, SessionError
from dsv4c.numerics.codec import Value, nan_fill, view
from dsv4c.plan.records import Argument, Bucket, KernelLaunch, Plan, Progress
from dsv4c.runtime import driver
from dsv4c.runtime.checkpoint import Checkpoint
from dsv4c.runtime.residence import SLAB, Resident, load_weights
from dsv4c.runtime.session import Session, one_at_a_time
from dsv4c.types import parse_type

CAPABILITIES = {"sm_90a": (9, 0), "sm_100a": (10, 0)}  # "a": only this very architecture runs it
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


def check_device(plan: Plan, device: Device) -> None:
    """Raise PlanError unless `device` can run `plan`: architecture, driver, then memory."""
    wanted = CAPABILITIES.get(plan.target)
    major, minor = device.capability
    if wanted is None:
        raise PlanError(f"plan {plan.name} is compiled for {plan.target}, which is no GPU")
    if wanted != device.capability:
        raise PlanError(
            f"plan {plan.name} is compiled for {plan.target}, this GPU ({device.name}) is sm_{major}{minor}; "
            f"compile with --target sm_{major}{minor}a, or run on a GPU of that architecture"
        )
    if device.driver < OLDEST_DRIVER:
        raise PlanError(_old_driver(f"plan {plan.name}", device.driver))
    needs = block_bytes(plan)
    needed = sum(needs.values()) + HEADROOM
    if needed > device.free:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in needs.items())
        raise PlanError(
            f"plan {plan.name} needs {_gib(needed)} of GPU memory ({parts}, {_gib(HEADROOM)} to load), "
            f"{device.name} has {_gib(device.free)} free of {_gib(device.total)}; free some, or compile with "
            "a smaller --batch or --max-context"
        )


def block_bytes(plan: Plan) -> dict[str, int]:
    """Bytes of every block that the plan's arguments point into."""
    bucket = plan.bucket("decode")
    return {
        "weights": plan.weights_bytes,
        "state": plan.state_bytes,
        "arena": bucket.arena_bytes,
        "constants": int(plan.constants.get("bytes", 0)),
        "input": bucket.input_bytes,
    }


def _old_driver(who: str, version: int) -> str:
    return (
        f"{who} needs a driver for CUDA {_version(OLDEST_DRIVER)} or newer, this machine's speaks CUDA "
        f"{_version(version)}; install driver 580 or newer"
    )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"


# --- the graph ----------------------------------------------------------------------------------------------


class CudaExecutor:
    """The plan's blocks on the device (flat uint8 tensors), its kernels, and the graph of one decode step.

    `poison` fills the arena with NaN before every step and runs the launches one at a time, so that a CUDA
    error names its launch: slow, for finding faults.
    """

    def __init__(
        self, plan: Plan, weights: Tensor, *, poison: bool = False, device: str | torch.device = "cuda"
    ) -> None:
        self.plan, self.poison = plan, poison
        self.bucket = plan.bucket("decode")
        self.launches = _kernel_launches(plan, self.bucket)
        sizes = block_bytes(plan)
        self.blocks = {name: _block(sizes[name], device) for name in ("arena", "state", "constants", "input")}
        self.blocks["weights"] = weights
        _place_constants(plan, self.blocks["constants"])
        self.state = self.blocks["state"]
        self.states: dict[str, Value] = {s.name: view(self.state, s.type, s.offset) for s in plan.state}
        self.inputs = {name: self._tensor(name) for name in self.bucket.inputs}
        self.feeds_back = feeds_back(plan)
        names = dict(self.bucket.outputs)
        if self.feeds_back:
            names["next"] = "tokens"
        self.outputs = {label: self._tensor(name) for label, name in names.items()}
        self._libraries = {key: self._library(key) for key in {launch.kernel for launch in self.launches}}
        self._bound = [self._bind(launch) for launch in self.launches]
        self.graph = self.graph_of(range(len(self.launches)))
        self._single: list[driver.Graph] = []
        self.clear()

    def clear(self) -> None:
        """Fresh state: zeros, or NaN with `poison`. Positions are the caller's."""
        for block in ("arena", "input"):
            self.blocks[block].zero_()
        self.state.zero_()
        if self.poison:
            for value in self.states.values():
                nan_fill(value)

    def step(self) -> None:
        """Enqueue one decode step over what the input block holds. Outputs lie in the arena and the input
        block until the next one.
        """
        if self.poison:
            self.blocks["arena"].fill_(POISON)
            self.step_by_step()
        else:
            self.graph.launch(_stream())

    def run(self, mode: str, inputs: Mapping[str, Tensor], sequence: int = 0) -> dict[str, Tensor]:
        """One call of the decode bucket; the next call overwrites the outputs."""
        if mode != "decode":
            raise PlanError(f"plan {self.plan.name}: a GPU plan has the bucket decode only, not {mode!r}")
        for name, target in self.inputs.items():
            target.copy_(inputs[name], non_blocking=True)
        self.step()
        return self.outputs

    def step_by_step(self) -> None:
        """One step, each launch finished before the next starts. Raises DriverError naming the launch that
        failed and the graph's nodes in it.
        """
        if not self._single:
            self._single = [self.graph_of([i]) for i in range(len(self.launches))]
        for i, launch in enumerate(self.launches):
            self._single[i].launch(_stream())
            driver.synchronize(f"launch {i}, {launch.name} (nodes {', '.join(launch.nodes)})")

    def graph_of(self, indices: Iterable[int]) -> driver.Graph:
        """An instantiated CUDA graph of some of the plan's launches, with the edges between them."""
        graph = driver.Graph()
        nodes: dict[int, Any] = {}
        for i in indices:
            launch = self.launches[i]
            edges = [driver.Edge(nodes[a], launch.programmatic) for a in launch.after if a in nodes]
            nodes[i] = graph.add(self._bound[i], edges, name=f"{i}, {launch.name}")
        graph.instantiate()
        return graph

    def component(self, argument: Argument) -> Tensor:
        """The bytes that an argument points to, uint8."""
        block, offset = self._place(argument)
        return self.blocks[block][offset : offset + argument.nbytes]

    def address(self, argument: Argument) -> int:
        """The pointer that the kernel gets."""
        block, offset = self._place(argument)
        if not 0 <= offset <= offset + argument.nbytes <= self.blocks[block].numel():
            raise PlanError(
                f"plan {self.plan.name}: {argument.value}.{argument.component} lies at bytes {offset} to "
                f"{offset + argument.nbytes} of {block}, which has {self.blocks[block].numel()}; compile it "
                "again"
            )
        return self.blocks[block].data_ptr() + offset

    def _place(self, argument: Argument) -> tuple[str, int]:
        if self.feeds_back and argument.value == self.bucket.outputs["next"]:
            return "input", self.bucket.values["tokens"].offset
        return argument.space, argument.offset

    def _tensor(self, name: str) -> Tensor:
        slot = self.bucket.values[name]
        value = view(self.blocks[slot.space], slot.type, slot.offset)
        if not isinstance(value, Tensor):
            raise PlanError(f"plan {self.plan.name}: {name} is {slot.type}, expected a plain tensor")
        return value

    def _library(self, key: str) -> driver.Library:
        record = self.plan.kernels[key]
        return driver.Library(self.plan.files[record["cubin"]], f"{record['symbol']} ({record['cubin']})")

    def _bind(self, launch: KernelLaunch) -> driver.Launch:
        cluster = launch.cluster[0] * launch.cluster[1] * launch.cluster[2]
        symbol = self.plan.kernels[launch.kernel]["symbol"]
        kernel = self._libraries[launch.kernel].kernel(symbol, shared=launch.shared, cluster=cluster)
        addresses = tuple(self.address(argument) for argument in launch.arguments)
        return driver.Launch(kernel, launch.grid, launch.block, launch.shared, addresses, launch.cluster)


def feeds_back(plan: Plan) -> bool:
    """Can the argmax write over the step's tokens? Only if every launch that reads them comes before it."""
    bucket = plan.bucket("decode")
    launches, following = _kernel_launches(plan, bucket), bucket.outputs["next"]
    types = {bucket.values[name].type for name in (following, "tokens")}
    writers = [i for i, launch in enumerate(launches) if _touches(launch, following)]
    readers = [i for i, launch in enumerate(launches) if _touches(launch, "tokens")]
    if len(writers) != 1 or len(types) != 1:
        return False
    before: set[int] = set()
    pending = [writers[0]]
    while pending:
        for earlier in launches[pending.pop()].after:
            if earlier not in before:
                before.add(earlier)
                pending.append(earlier)
    return before.issuperset(readers)


def _touches(launch: KernelLaunch, value: str) -> bool:
    return any(argument.value == value for argument in launch.arguments)


def _kernel_launches(plan: Plan, bucket: Bucket) -> tuple[KernelLaunch, ...]:
    launches = tuple(launch for launch in bucket.launches if isinstance(launch, KernelLaunch))
    if not launches or len(launches) != len(bucket.launches):
        raise PlanError(f"plan {plan.name} has launches without kernels; compile it again")
    unknown = sorted({launch.kernel for launch in launches} - plan.kernels.keys())
    if unknown:
        raise PlanError(f"plan {plan.name}: a launch names kernel {unknown[0]}, which the plan has not")
    return launches


def _block(size: int, device: str | torch.device) -> Tensor:
    return torch.zeros(max(-(-size // 256) * 256, 256), dtype=torch.uint8, device=device)


def _place_constants(plan: Plan, block: Tensor) -> None:
    if not plan.constants:
        return
    tensors = load_safetensors(plan.files[plan.constants["file"]])
    for name, place in plan.constants["values"].items():
        target = view(block, parse_type(place["type"]), place["offset"])
        assert isinstance(target, Tensor)
        target.copy_(tensors[name])


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


# --- the session --------------------------------------------------------------------------------------------


P = ParamSpec("P")
R = TypeVar("R")


def _named(
    method: Callable[Concatenate[CudaSession, P], R],
) -> Callable[Concatenate[CudaSession, P], R]:
    """What fails on the device comes up at whatever call is next: say which plan's step it was. With `poison`
    the launch has been named.
    """

    @wraps(method)
    def naming(self: CudaSession, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except (torch.AcceleratorError, driver.DriverError) as error:
            self._broken = True
            if self.executor.poison and isinstance(error, driver.DriverError):
                raise
            what, _, _ = str(error).partition("\n")
            raise driver.DriverError(
                f"one of the {len(self.executor.launches)} launches of a step of plan {self.plan.name} "
                f"failed: {what}; bind with poison=True (--poison) to run them one at a time and learn which"
            ) from error

    return naming


class CudaSession(Session):
    """`Session` on a GPU. Logits, streams and tokens are tensors on the device: looking at one waits for it.

    Positions are counted on the host too, so that no request waits for the device. The prompt goes in one
    token at a time.
    """

    executor: CudaExecutor

    def __init__(self, plan: Plan, executor: CudaExecutor) -> None:
        batch = int(plan.deployment["batch"])
        self._held = [0] * batch  # tokens of every sequence, as the device has them once it is through
        self._following = torch.zeros(batch, dtype=torch.int32, device=executor.state.device)
        self._followed = [False] * batch  # sequences whose likeliest next token `_following` holds
        super().__init__(plan, executor)

    @one_at_a_time
    @_named
    def prefill(self, tokens: Sequence[int] | Tensor, sequence: int = 0) -> Tensor:
        """As `Session.prefill`; returns logits f32 [len, vocab] on the device, without waiting for them."""
        ids = self._prompt(tokens)
        self._check_sequence(sequence)
        self._check_room(self._held[sequence], len(ids), f"sequence {sequence}")
        inputs, outputs = self.executor.inputs, self.executor.outputs
        given = torch.tensor(ids, dtype=torch.int32).to(self._following.device)
        rows = {
            label: torch.empty((len(ids), *output.shape[1:]), dtype=output.dtype, device=output.device)
            for label, output in outputs.items()
        }
        self._broken = True
        inputs["tokens"].zero_()
        self._set_lengths([int(s == sequence) for s in range(self.batch)])
        for i in range(len(ids)):
            inputs["tokens"][sequence].copy_(given[i])
            self.executor.step()
            for label, output in outputs.items():
                rows[label][i].copy_(output[sequence])
        self._broken = False
        self._held[sequence] += len(ids)
        self._following[sequence].copy_(rows["next"][-1])
        self._followed[sequence] = True
        self._streams, self._next = rows["streams"], rows["next"]
        return rows["logits"]

    @one_at_a_time
    @_named
    def decode(self, tokens: Sequence[int | None]) -> Tensor:
        """As `Session.decode`; returns logits f32 [batch, vocab] on the device, without waiting for them."""
        given = list(tokens)
        active = self._active([token is not None for token in given])
        ids = dict(zip(active, self._ids(given[s] for s in active), strict=True))
        self._check_rooms(active, 1)
        row = torch.tensor([ids.get(s, 0) for s in range(self.batch)], dtype=torch.int32)
        self.executor.inputs["tokens"].copy_(row, non_blocking=True)
        self._run_steps(active, 1)
        logits = self.executor.outputs["logits"].clone()
        for s in set(range(self.batch)) - set(active):
            logits[s].fill_(torch.nan)
        self._streams = self.executor.outputs["streams"].clone()
        self._next = self.executor.outputs["next"].clone()
        return logits

    def enqueue(self, count: int, sequences: Sequence[int] | None = None) -> None:
        """Enqueue `count` greedy steps: each takes the likeliest token after the last one, first that of the
        last call. One graph launch per step and nothing else on the stream; the host waits for none of them.

        `sequences` move on, all by default; the others wait. Raises SessionError as `decode` does.
        """
        self._greedy(count, sequences, None)

    def generate(self, count: int, sequences: Sequence[int] | None = None) -> Tensor:
        """`enqueue`, with a copy of the tokens beside every step. Returns i32 [count, batch] on the device:
        row i holds the tokens chosen by step i.
        """
        chosen = torch.empty(max(count, 0), self.batch, dtype=torch.int32, device=self._following.device)
        self._greedy(count, sequences, chosen)
        return chosen

    @_named
    def wait(self) -> None:
        """Wait for everything enqueued. Raises DriverError if a step failed on the device."""
        driver.synchronize("wait for the device")

    @one_at_a_time
    def reset(self, sequence: int | None = None) -> None:
        """As `Session.reset`."""
        super().reset(sequence)
        for s in range(self.batch) if sequence is None else (sequence,):
            self._held[s], self._followed[s] = 0, False

    @one_at_a_time
    def load_state(self, path: str | Path) -> None:
        """As `Session.load_state`. The next call must bring tokens: what was likeliest is not in the file."""
        super().load_state(path)
        self._held = [int(position) for position in self._position("position").tolist()]
        self._followed = [False] * self.batch

    @property
    def positions(self) -> list[int]:
        """Tokens that every sequence has consumed once the device is through."""
        return list(self._held)

    @property
    def next_tokens(self) -> list[int]:
        """As `Session.next_tokens`, of which it waits for the last. Raises DriverError as `wait` does."""
        self.wait()
        return super().next_tokens

    @one_at_a_time
    @_named
    def _greedy(self, count: int, sequences: Sequence[int] | None, chosen: Tensor | None) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise SessionError(f"steps to enqueue: {count!r}, expected a number of at least 1")
        wanted = range(self.batch) if sequences is None else sequences
        for s in wanted:
            self._check_sequence(s)
        active = self._active([s in wanted for s in range(self.batch)])
        self._check_rooms(active, count)
        unknown = [s for s in active if not self._followed[s]]
        if unknown:
            raise SessionError(
                f"sequence {unknown[0]} has no likeliest token yet; call prefill or decode first"
            )
        self.executor.inputs["tokens"].copy_(self._following)
        self._run_steps(active, count, chosen)

    def _run_steps(self, active: Sequence[int], count: int, chosen: Tensor | None = None) -> None:
        executor = self.executor
        self._broken = True
        self._set_lengths([int(s in active) for s in range(self.batch)])
        for i in range(count):
            if i and not executor.feeds_back:
                executor.inputs["tokens"].copy_(executor.outputs["next"])
            executor.step()
            if chosen is not None:
                chosen[i].copy_(executor.outputs["next"])
        self._broken = False
        for s in active:
            self._held[s] += count
            self._following[s].copy_(executor.outputs["next"][s])
            self._followed[s] = True

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        row = torch.tensor(lengths, dtype=torch.int32)
        self.executor.inputs["lengths"].copy_(row, non_blocking=True)

    def _active(self, flags: Sequence[bool]) -> list[int]:
        if len(flags) != self.batch:
            raise SessionError(
                f"decode takes one token per sequence, {self.batch} in all, got {len(flags)}; "
                "give None for a sequence that waits"
            )
        active = [s for s, flag in enumerate(flags) if flag]
        if not active:
            raise SessionError("decode got no token for any sequence; give at least one")
        return active

    def _check_rooms(self, active: Sequence[int], count: int) -> None:
        for s in active:
            self._check_room(self._held[s], count, f"sequence {s}")


# --- binding ------------------------------------------------------------------------------------------------


def bind(
    plan: Plan,
    weights: str | Path,
    *,
    progress: Progress | None = None,
    workers: int | None = None,
    poison: bool = False,
) -> CudaSession:
    """See `Plan.bind`. Refuses before it allocates: device, then checkpoint."""
    check_device(plan, Device.current())
    residents = [Resident.from_json(record) for record in plan.weights]
    checkpoint = Checkpoint.open(weights)
    checkpoint.check([resident.record for resident in residents]).require_complete()
    block = _block(plan.weights_bytes, "cuda")
    load_weights(checkpoint, residents, block, progress=progress, workers=workers)
    return CudaSession(plan, CudaExecutor(plan, block, poison=poison))
