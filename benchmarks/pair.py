"""Plans of one model against each other, step by step in turns: python -m benchmarks.pair BASE NEW [NEW ...].

All are folders that `dsv4c compile --target sm_90a` wrote, perhaps by different versions: of a plan only
what its versions have in common is read, the records of launches, weights and states. They run on one block
of random weights, in one process on one card; every round times all, in changing order, whole steps and
layers alike. Printed are, for each NEW, the median of the rounds' ratios NEW / BASE and its quartiles. Two
copies of a plan differ by up to 1 %, by where their blocks lie: give copies of both to tell less apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4c.numerics.codec import view
from dsv4c.plan.records import Box
from dsv4c.runtime import driver
from dsv4c.runtime.bench import FLUSH, KINDS, layer_of
from dsv4c.runtime.random_fill import fill_state, fill_weight
from dsv4c.runtime.residence import Resident
from dsv4c.types import parse_type


class Step:
    """A bucket of a plan folder on blocks of its own but for `weights`, ready to run prefixes of it."""

    def __init__(self, folder: Path, data: Mapping[str, Any], bucket: str, weights: Tensor) -> None:
        self.name, self.data = str(folder), data
        self.program = find(data["buckets"], bucket)
        self.launches = self.program["launches"]
        spaces = {"weights"} | {a["space"] for x in self.launches for a in x["arguments"]}
        self.blocks = {
            s: torch.zeros(extent(data, s), dtype=torch.uint8, device="cuda") for s in spaces - {"weights"}
        }
        self.blocks["weights"] = weights
        for record in data["state"]:
            fill_state(self.blocks["state"], parse_type(record["type"]), record["offset"])
        if "constants" in self.blocks:  # frequencies
            self.blocks["constants"].view(torch.float32).uniform_(0, 1)
        kernels = {x["kernel"] for x in self.launches}
        files = {key: (folder / data["kernels"][key]["cubin"]).read_bytes() for key in kernels}
        libraries = {key: driver.Library(content, key) for key, content in files.items()}
        self._maps: list[Tensor] = []
        self._bound = [self._bind(x, libraries) for x in self.launches]
        self.graphs: dict[int, driver.Graph] = {}

    def _bind(self, x: Mapping[str, Any], libraries: Mapping[str, driver.Library]) -> driver.Launch:
        symbol = self.data["kernels"][x["kernel"]]["symbol"]
        a, b, c = x["cluster"]
        kernel = libraries[x["kernel"]].kernel(symbol, shared=x["shared"], cluster=a * b * c)
        addresses = tuple(map(self._address, x["arguments"]))
        return driver.Launch(kernel, tuple(x["grid"]), x["block"], x["shared"], addresses, (a, b, c))

    def _address(self, argument: Mapping[str, Any]) -> int:
        """An array's, or that of a tensor map of it, which stays."""
        at = self.blocks[argument["space"]].data_ptr() + argument["offset"]
        if "box" not in argument:
            return at
        made = driver.tensor_map(at, Box(**argument["box"]))
        self._maps.append(torch.frombuffer(bytearray(made), dtype=torch.uint8).cuda())
        return self._maps[-1].data_ptr()

    def prepare(self, ends: Sequence[int]) -> None:
        """Graphs of the first launches up to each end."""
        for end in ends:
            graph = driver.Graph()
            nodes: list[Any] = []
            for bound, x in zip(self._bound[:end], self.launches[:end], strict=True):
                nodes.append(graph.add(bound, [driver.Edge(nodes[i], x["programmatic"]) for i in x["after"]]))
            graph.instantiate()
            self.graphs[end] = graph

    def reset(self, position: int) -> None:
        """As before a step at that position, with the sequences in the first slots."""
        given = {  # by number of the row or sequence; unlike tokens: like ones choose the same experts
            "tokens": lambda i: (17 + 7919 * i) % int(self.data["config"]["vocab_size"]),
            "lengths": lambda i: torch.full_like(i, int(self.program["tokens"])),
            "slots": lambda i: i,
        }
        for name, values in given.items():
            place = self.program["values"].get(name)
            if place is None:
                continue
            target = view(self.blocks[place["space"]], parse_type(place["type"]), place["offset"])
            assert isinstance(target, Tensor)
            target.copy_(values(torch.arange(target.numel())))
        place = self.program["values"]["position"]
        held = view(self.blocks["state"], parse_type(place["type"]), place["offset"])
        assert isinstance(held, Tensor)
        held.fill_(position)


def find(buckets: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The bucket of that name, or the first whose name begins so."""
    found = [b for n, b in buckets.items() if n == name] or [
        b for n, b in buckets.items() if n.startswith(name)
    ]
    if not found:
        raise SystemExit(f"no bucket {name}, only {', '.join(buckets)}")
    return found[0]


def extent(data: Mapping[str, Any], space: str) -> int:
    """Bytes that the launches of any bucket touch of a block, and its states."""
    touched = [
        a["offset"] + a["nbytes"]
        for bucket in data["buckets"].values()
        for x in bucket["launches"]
        for a in x["arguments"]
        if a["space"] == space
    ]
    states = [s["offset"] + parse_type(s["type"]).extent for s in data["state"]] if space == "state" else []
    inputs = [
        v["offset"] + parse_type(v["type"]).extent
        for bucket in data["buckets"].values()
        for v in bucket["values"].values()
        if v["space"] == space and space == "input"
    ]
    return -(-max([*touched, *states, *inputs, 256]) // 256) * 256


def ends_of(step: Step) -> dict[str, int]:
    """Ends of prefixes by what they are: every layer, and the whole step."""
    ends: dict[str, int] = {}
    for i, x in enumerate(step.launches):
        layer = layer_of(x["scope"], x["name"])
        if layer is not None:
            ends[str(layer)] = i + 1
    return ends | {"step": len(step.launches)}


def timed(graph: driver.Graph, step: Step, position: int, flush: Tensor) -> float:
    """Microseconds of one run from a flushed L2."""
    step.reset(position)
    flush.fill_(1)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.launch(torch.cuda.current_stream().cuda_stream)
    stop.record()
    stop.synchronize()
    return 1e3 * start.elapsed_time(stop)


def layers_of(times: Mapping[str, float]) -> dict[str, float]:
    """Microseconds of every layer but the first, and of the whole step."""
    layers = sorted(int(n) for n in times if n != "step")
    found = {str(n): times[str(n)] - times[str(n - 1)] for n in layers[1:]}
    return found | {"step": times["step"]}


def in_turn(count: int, turn: int) -> list[int]:
    """Numbers below `count` from another one on every turn, every other turn backwards."""
    order = [(n + turn) % count for n in range(count)]
    return order[::-1] if turn // count % 2 else order


def main() -> int:
    """Time all in turns and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("new", type=Path, nargs="+")
    parser.add_argument("--bucket", default="decode", help="of all plans, or the first that begins so")
    parser.add_argument("--position", type=int, default=8192, help="tokens before the step")
    parser.add_argument("--rounds", type=int, default=9, help="at least seven")
    parser.add_argument(
        "--replays", type=int, default=7, help="of each prefix and round; their median counts"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    folders = (options.base, *options.new)
    data = [json.loads((folder / "plan.json").read_text()) for folder in folders]
    weights = torch.empty(max(extent(d, "weights") for d in data), dtype=torch.uint8, device="cuda")
    for record in data[1]["weights"]:
        fill_weight(weights, Resident.from_json(record), int(data[1]["config"]["n_routed_experts"]))
    steps = [Step(f, d, options.bucket, weights) for f, d in zip(folders, data, strict=True)]
    ends = [ends_of(step) for step in steps]
    for step, own in zip(steps, ends, strict=True):
        step.prepare(sorted(set(own.values())))
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    rounds: list[list[dict[str, float]]] = []
    for number in range(options.rounds + 1):
        measured: list[dict[str, float]] = [{} for _ in steps]
        for label in ends[0]:
            found: list[list[float]] = [[] for _ in steps]
            for replay in range(options.replays):
                for i in in_turn(len(steps), number + replay):
                    step = steps[i]
                    found[i].append(timed(step.graphs[ends[i][label]], step, options.position, flush))
            for of_plan, times in zip(measured, found, strict=True):
                of_plan[label] = statistics.median(times)
        if number:  # the first round warms up
            rounds.append([layers_of(m) for m in measured])
    print(f"{torch.cuda.get_device_name()}, position {options.position}, {len(rounds)} rounds")
    ratios = data[0]["config"]["compress_ratios"]
    kinds: dict[str, list[str]] = {}
    for label in rounds[0][0]:
        kinds.setdefault("step" if label == "step" else KINDS[ratios[int(label)]], []).append(label)
    for i, step in enumerate(steps[1:], 1):
        print(f"{step.name}, {len(step.launches)} launches, against {len(steps[0].launches)}")
        print(f"{'':8} {'base us':>9} {'new us':>9} {'ratio':>7} {'quartiles':>16}")
        for kind, labels in kinds.items():
            sums = [[sum(of[j][label] for label in labels) / len(labels) for j in (0, i)] for of in rounds]
            low, middle, high = statistics.quantiles([new / base for base, new in sums], n=4)
            base, new = (statistics.median([pair[j] for pair in sums]) for j in (0, 1))
            print(f"{kind:8} {base:9.1f} {new:9.1f} {middle:7.3f} {low:8.3f} {high:7.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
