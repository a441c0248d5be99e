"""Microseconds per layer and per launch of a decode step, in their place in one CUDA graph: python -m
benchmarks.layers PLAN...

PLAN is a folder that `dsv4c compile --target sm_90a` wrote, best of eight layers or more, so that nothing
stays in L2 from one step to the next; weights and caches are filled with random bytes on the device. A
layer's time is the difference of two prefixes of the step's graph, the median of many replays each; beside it
stand the bytes it must move over the copy bandwidth measured in the same run. Times of launches are such
differences too: what a launch adds where it stands, with its neighbors overlapping it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4c.numerics.codec import Quantized, view
from dsv4c.numerics.forms import UNIT_BYTES, parse_packing
from dsv4c.numerics.resident import PLAIN, WIDENED
from dsv4c.plan.folder import Plan, load
from dsv4c.plan.records import Argument, Launch
from dsv4c.runtime.cuda import BoundProgram, CudaExecutor, Device, check_device
from dsv4c.runtime.residence import Resident
from dsv4c.scope import LAYERS, Scope
from dsv4c.types import DType, Type

KINDS = {0: "SWA", 4: "CSA", 128: "HCA"}
STEP = 1 << 26  # bytes filled at once
FLUSH = 256 << 20  # bytes written between replays: more than four times the L2


# --- random contents ---


def random_bytes(target: Tensor) -> None:
    """Uniform bytes, a piece at a time."""
    for piece in target.split(STEP):
        piece.random_(0, 256)


def random_e4m3(target: Tensor) -> None:
    """Uniform codes without NaN."""
    for piece in target.split(STEP):
        piece.random_(0, 256)
        piece.sub_(((piece & 0x7F) == 0x7F).to(torch.uint8))


def random_floats(target: Tensor, dtype: torch.dtype, spread: float, center: float = 0.0) -> None:
    """Normal numbers in the bytes of `target`."""
    for piece in target.view(dtype).split(STEP):
        piece.normal_(center, spread)


def random_packed(target: Tensor, form: str) -> None:
    """Units of a packing whose weights are of the size of 1/64: rows of 4,096 give results around 1."""
    format = parse_packing(form).format
    if format == "bf16":
        random_floats(target, torch.bfloat16, 0.02)
    elif format == "fp8":
        random_e4m3(target)
    else:
        random_bytes(target)
        scales = target.view(-1, UNIT_BYTES[format])[:, 1024:]
        scales.fill_(119 if format == "mxfp4" else 0x38)


def fill_weight(block: Tensor, resident: Resident, experts: int) -> None:
    """Random contents for a parameter in the form the kernels read."""
    type_ = resident.record.type
    packed = resident.form not in (PLAIN, WIDENED)
    dtypes = {c.name: c.dtype for c in type_.components}
    for name, offset, nbytes in resident.components:
        target = block[offset : offset + nbytes]
        dtype = DType.F32 if resident.form == WIDENED else dtypes[name]
        if name == "data" and packed:
            random_packed(target, resident.form)
        elif name == "scale" and dtype is DType.UE8M0:
            target.random_(112, 117)
        elif name == "global_scale":
            target.view(torch.float32).fill_(2.0**-7)
        elif dtype is DType.I32:
            target.view(torch.int32).random_(0, experts)
        elif dtype in (DType.E4M3, DType.E2M1):
            random_e4m3(target)
        else:
            flat = len(type_.shape) == 1
            kind = torch.float32 if dtype is DType.F32 else torch.bfloat16
            random_floats(target, kind, 0.1 if flat else 0.02, 1.0 if flat else 0.0)


def fill_state(block: Tensor, type_: Type, offset: int) -> None:
    """A cache as if tokens had been there: keys of the size of 1."""
    value = view(block, type_, offset)
    if isinstance(value, Quantized):
        random_e4m3(value.data.view(torch.uint8).view(-1))
        if value.scale.dtype is torch.uint8:
            value.scale.random_(117, 121)
        if value.tail is not None:
            value.tail.normal_()
    elif value.is_floating_point():
        value.normal_()


# --- time ---


class Clock:
    """Replays of parts of the step's graph, each from the same position and a flushed L2."""

    def __init__(self, step: BoundProgram, position: int, replays: int) -> None:
        self.step, self.position, self.replays = step, position, replays
        self._flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")

    def prefixes(self, ends: Sequence[int]) -> dict[int, float]:
        """Median microseconds of the first `end` launches for every end, taken in turns."""
        stream = torch.cuda.current_stream().cuda_stream
        graphs = {end: self.step.graph_of(range(end)) for end in ends if end}
        times: dict[int, list[float]] = {end: [] for end in graphs}
        for replay in range(self.replays + 2):
            for end, graph in graphs.items():
                self._set()
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.launch(stream)
                stop.record()
                stop.synchronize()
                if replay >= 2:
                    times[end].append(1e3 * start.elapsed_time(stop))
        for graph in graphs.values():
            graph.close()
        return {end: statistics.median(values) for end, values in times.items()} | {0: 0.0}

    def _set(self) -> None:
        position, slots = self.step.value("position"), self.step.inputs["slots"]
        assert isinstance(position, Tensor)
        position.fill_(self.position)
        self.step.inputs["tokens"].fill_(17)
        self.step.inputs["lengths"].fill_(1)
        torch.arange(len(slots), out=slots)
        self._flush.fill_(1)


def copy_bandwidth() -> float:
    """Bytes read and written per second by the best of several large copies."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(12):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        best = max(best, 2 * source.numel() / (1e-3 * start.elapsed_time(stop)))
    return best


# --- bytes ---


def moved_bytes(plan: Plan, launch: Launch, position: int) -> float:
    """The fewest bytes a launch must move: every operand once, of stacks and caches what a token needs."""
    return sum(_moved(plan, argument, position) for argument in launch.arguments)


def _moved(plan: Plan, argument: Argument, position: int) -> float:
    config = plan.config
    name, size = argument.value, float(argument.nbytes)
    batch, context = plan.program().shape.sequences, int(plan.deployment["max_context"])
    if argument.space == "weights" and ".ffn.experts." in name:
        touched = min(batch * config["num_experts_per_tok"], config["n_routed_experts"])
        return size * touched / config["n_routed_experts"]
    if name in ("embed",) or name.endswith("tid2eid"):
        return size * batch / config["vocab_size"]
    if argument.space != "state":
        return size
    if "w" in argument.access:
        return 0.0  # a row or two
    place = Scope.of(name)
    ratio = config["compress_ratios"][place.number] if place.block == LAYERS else 0
    if place.path == "attn.indexer.keys":
        return size * min(position / context, 1.0)
    if place.path == "attn.entries":
        visible = position // ratio
        read = min(visible, config["index_topk"]) if ratio == 4 else visible
        return size * read / max(context // ratio, 1)
    return size


# --- the table ---


@dataclass(frozen=True)
class Layer:
    """One layer: what it is, and microseconds beside megabytes."""

    plan: str
    layer: int
    kind: str
    launches: int
    microseconds: float
    megabytes: float
    floor: float


@dataclass(frozen=True)
class Part:
    """What one launch adds to the step: the median over the inner layers of its kind."""

    layer: int
    kind: str
    name: str
    op: str
    grid: int
    microseconds: float
    megabytes: float
    floor: float


def layer_of(scope: str, name: str) -> int | None:
    """The main layer that a launch belongs to, by its scope or its name; None outside of layers."""
    places = [Scope.of(scope), Scope.of(name)]
    return next((place.number for place in places if place.block == LAYERS), None)


def measure(folder: Path, options: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """Times of one plan."""
    plan = load(folder)
    check_device(plan, Device.current())
    block = torch.empty(-(-plan.blocks["weights"] // 256) * 256, dtype=torch.uint8, device="cuda")
    experts = int(plan.config["n_routed_experts"])
    for record in plan.weights:
        fill_weight(block, Resident.from_json(record), experts)
    torch.cuda.synchronize()
    started = time.perf_counter()
    executor = CudaExecutor(plan, block)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    for slot in plan.state:
        fill_state(executor.blocks["state"], slot.type, slot.offset)
    position = min(options.position, int(plan.deployment["max_context"]) - 8)
    step = executor.programs[plan.program().shape.name]
    clock = Clock(step, position, options.replays)
    launches = step.launches
    owners = [layer_of(launch.scope, launch.name) for launch in launches]
    ends = {layer: i + 1 for i, layer in enumerate(owners) if layer is not None}
    if sorted(ends.values()) != list(ends.values()):
        raise SystemExit(f"{folder}: layers do not follow each other in the launches")
    begins = {layer: owners.index(layer) for layer in ends}
    kinds = {layer: KINDS[plan.config["compress_ratios"][layer]] for layer in ends}
    inner = {kinds[layer]: layer for layer in list(ends)[1:-1]}  # the last inner layer of every kind
    times = clock.prefixes(range(len(launches) + 1))
    parts, layers = [], []
    for layer, end in ends.items():
        nbytes = sum(moved_bytes(plan, launches[i], position) for i in range(begins[layer], end))
        layers.append(
            Layer(
                plan.name,
                layer,
                kinds[layer],
                end - begins[layer],
                times[end] - times[begins[layer]],
                nbytes / 1e6,
                1e6 * nbytes / bandwidth,
            )
        )
    for kind, layer in inner.items():
        alike = [
            other
            for other in list(ends)[1:-1]
            if kinds[other] == kind and ends[other] - begins[other] == ends[layer] - begins[layer]
        ]
        for i in range(begins[layer], ends[layer]):
            nbytes = moved_bytes(plan, launches[i], position)
            places = [begins[other] + i - begins[layer] for other in alike]
            grid = launches[i].kernel.grid
            parts.append(
                Part(
                    layer,
                    kind,
                    launches[i].name,
                    launches[i].op,
                    grid[0] * grid[1] * grid[2],
                    statistics.median(times[place + 1] - times[place] for place in places),
                    nbytes / 1e6,
                    1e6 * nbytes / bandwidth,
                )
            )
    finite = bool(step.outputs["logits"].isfinite().all())
    return {
        "plan": plan.name,
        "digest": plan.digest,
        "recipe": plan.recipe,
        "deployment": dict(plan.deployment),
        "position": position,
        "launches": len(launches),
        "seconds_to_load_and_instantiate": seconds,
        "step_microseconds": times[len(launches)],
        "finite_logits": finite,
        "layers": [asdict(layer) for layer in layers],
        "parts": [asdict(part) for part in parts],
    }


def show(result: dict[str, Any]) -> None:
    """Print a plan's tables."""
    print(
        f"\n{result['plan']}, {result['recipe']}, position {result['position']}: {result['launches']} "
        f"launches, {result['step_microseconds']:.1f} us from launch to end, "
        f"logits finite: {result['finite_logits']}; kernels loaded, graph instantiated in "
        f"{result['seconds_to_load_and_instantiate']:.2f} s"
    )
    print(
        f"{'layer kind':12} {'layers':>6} {'us (median)':>12} {'least':>8} {'most':>8} {'MB':>8} "
        f"{'floor us':>9}"
    )
    for kind in KINDS.values():
        rows = [row for row in result["layers"][1:] if row["kind"] == kind]
        if rows:
            times = [row["microseconds"] for row in rows]
            print(
                f"{kind:12} {len(rows):6} {statistics.median(times):12.1f} {min(times):8.1f} "
                f"{max(times):8.1f} {rows[-1]['megabytes']:8.1f} {rows[-1]['floor']:9.1f}"
            )
    print(f"{'launch':58} {'grid':>6} {'us':>8} {'MB':>8} {'floor':>7}")
    for part in result["parts"]:
        name = f"{part['kind']} {part['name']}"
        print(
            f"{name[:58]:58} {part['grid']:6} {part['microseconds']:8.2f} {part['megabytes']:8.2f} "
            f"{part['floor']:7.2f}"
        )


def main() -> int:
    """Measure every plan in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plans", nargs="+", type=Path)
    parser.add_argument("--position", type=int, default=8192, help="tokens before the step")
    parser.add_argument("--replays", type=int, default=31)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.zeros(1, device="cuda")
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    stamp = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    print(f"{stamp} UTC, {torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s read and written")
    results = []
    for folder in options.plans:
        results.append(measure(folder, options, bandwidth))
        show(results[-1])
        torch.cuda.empty_cache()
    if options.json:
        summary = {"date": stamp, "device": torch.cuda.get_device_name(), "bandwidth": bandwidth}
        options.json.write_text(json.dumps(summary | {"plans": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
