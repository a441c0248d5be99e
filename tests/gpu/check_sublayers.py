"""Recorded inputs through a plan's launches, by sublayer: python -m tests.gpu.check_sublayers PLAN CASE.

Row by row, what was recorded is put where the launch before would have left it, and what the launches leave
is compared: `kv`, `entries`, index keys from the caches, selections as sets, all within the case's bounds.
What kernels keep to themselves (`qr`, `q`, `index_q`, `comb`) the reference makes of what is stored. Batch 1.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import dsv4c.passes.fusions  # noqa: F401, registers the fused ops
from dsv4c.buckets import Bucket
from dsv4c.config import load_config
from dsv4c.ir.graph import Kind
from dsv4c.ir.ops.shape import Reshape
from dsv4c.ir.text import parse_graph
from dsv4c.numerics.codec import Quantized, Value, dequantize, quantize, view
from dsv4c.passes.recipes import RECIPES
from dsv4c.plan.folder import load
from dsv4c.runtime.cuda import CudaExecutor
from dsv4c.types import QuantType
from tests.goldens import Recorded, recorded
from tests.interpreted import evaluate, graph_of, layer_value, padded, part_of, weights_of

ATTENTION = (
    *("qr", "q", "kv", "entries", "index_q", "index_keys", "index_w", "index_scores", "index_sel"),
    *("z", "attn_out"),
)
FINISHED = ("qr", "q", "index_q", "index_w")  # by the reference, from what the device stored
CACHES = {"kv": "attn.window", "entries": "attn.entries", "index_keys": "attn.indexer.keys"}
SELECTIONS = ("index_sel", "router_idx")
# Where the case states no bound: f32 with exponentials of a few ulp; bf16, a unit of the last place.
F32, BF16 = 2e-5, 2.0**-8
# More where a boundary is given the logarithm of a recorded matrix: 20 iterations move it by hc_eps each.
MIXED = F32 + 20 * 1e-6


@dataclass(frozen=True)
class Found:
    """One recorded tensor: how far the device is from it, and how far it may be."""

    name: str
    distance: float
    bound: float


class Device:
    """A plan's blocks and launches, by the names that the recording has."""

    def __init__(self, executor: CudaExecutor, case: Recorded) -> None:
        self.executor, self.case = executor, case
        plan = executor.plan
        bucket = plan.program().shape
        if bucket.rows != 1 or int(plan.deployment["slots"]) != 1:
            raise SystemExit(f"{plan.name} is for {bucket.name} and more slots; compile one with --batch 1")
        recipe = RECIPES[plan.recipe]
        self.step = executor.programs[bucket.name]
        self.values = self.step.program.values
        self.graph = graph_of(load_config(case.folder), recipe, Bucket("decode"))
        self.weights = weights_of(case.folder, recipe)
        self.layers = len(executor.plan.config["compress_ratios"])
        views = (n for n in parse_graph(plan.graph_text()).nodes if isinstance(n.op, Reshape))
        self.views = {n.outputs[0].name: n.inputs[0].name for n in views}
        launches = self.step.launches
        self.single = [self.step.graph_of([i]) for i in range(len(launches))]
        self.writes = [{a.value for a in launch.arguments if "w" in a.access} for launch in launches]

    def has(self, name: str) -> bool:
        return name in self.values

    def value(self, name: str) -> Value:
        """What the device has."""
        place = self.values[name]
        return view(self.executor.blocks[place.space], place.type, place.offset)

    def put(self, name: str, row: Tensor) -> None:
        """A recorded row, and the codes that go with it, where launches will read them."""
        for each in (name, f"{name}_quantized"):
            if not self.has(each):
                continue
            target, type_ = self.value(each), self.values[each].type
            if isinstance(target, Tensor):
                target.copy_(row.to(target.dtype).view(target.shape))
                continue
            assert isinstance(type_, QuantType)
            codes = quantize(row.to(torch.bfloat16).view(type_.shape), type_.format)
            for part, made in zip(target.parts, codes.parts, strict=True):
                part.copy_(made)

    def place(self, layer: int, name: str) -> str:
        return layer_value(self.graph, layer, name)

    def logits(self, comb: str) -> str:
        """What Sinkhorn makes a matrix of."""
        node = self.graph.by_name[comb].node
        while node is not None and not isinstance(node.op, Reshape):
            node = node.inputs[0].node
        assert node is not None, f"{comb} is made of no reshaped logits"
        return node.outputs[0].name

    def between(self, given: Iterable[str], wanted: Iterable[str]) -> list[int]:
        """The launches from the first that reads a given value to the last that writes a wanted one, and
        those before them that they need.
        """
        names = {n for g in given for n in (g, f"{g}_quantized")}
        targets = {self.views.get(w, w) for w in wanted}
        launches = self.step.launches
        readers = [i for i, launch in enumerate(launches) if names & self._reads(i) - self.writes[i]]
        writers = [i for i, written in enumerate(self.writes) if written & targets]
        chosen = set(range(min(readers), max(writers) + 1))
        made = names.union(*(self.writes[i] for i in chosen))
        open_ = set().union(*(self._reads(i) for i in chosen)) - made
        for i in range(min(readers) - 1, -1, -1):
            if self.writes[i] & open_:
                chosen.add(i)
                open_ |= self._reads(i)
        return sorted(chosen)

    def _reads(self, index: int) -> set[str]:
        arguments = self.step.launches[index].arguments
        return {a.value for a in arguments if a.space == "arena" and "r" in a.access}

    def run(self, launches: Sequence[int], token: int, position: int) -> dict[str, Tensor]:
        """One step of them; everything that they left, decoded, on the CPU."""
        at = self.value("position")
        assert isinstance(at, Tensor)
        at.fill_(position)
        for name, number in (("tokens", token), ("lengths", 1), ("slots", 0)):
            self.step.inputs[name].fill_(number)
        stream = torch.cuda.current_stream().cuda_stream
        left: dict[str, Tensor] = {}
        for i in launches:
            self.single[i].launch(stream)
            for name in self.writes[i] | {v for v, source in self.views.items() if source in self.writes[i]}:
                place = self.values.get(name)
                if place is not None and place.space == "arena":
                    left[name] = plain(self.value(name))
        return left


def plain(value: Value) -> Tensor:
    """Decoded, on the CPU."""
    return (dequantize(value) if isinstance(value, Quantized) else value).cpu().clone()


def finish(device: Device, left: Mapping[str, Tensor], place: str, token: int, position: int) -> Tensor:
    """A value inside a kernel: the graph's nodes between the last stored values and it, by the reference."""
    known, open_ = set[str](), [device.graph.by_name[place]]
    while open_:
        value = open_.pop()
        if value.name in left and value.kind is Kind.RESULT:
            known.add(value.name)
        elif value.node is not None:
            open_ += value.node.inputs
    part = part_of(device.graph, known, [place])
    inputs = {n: left[n] for n in known} | padded([token], 1)
    states = {s.name: torch.tensor([position], dtype=torch.int32) for s in part.states}
    assert set(states) <= {"position"}, f"{place} needs more than the device stored: {sorted(states)}"
    return evaluate(part, {v.name: inputs[v.name] for v in part.inputs}, device.weights, states)[place]


def found_in(left: Mapping[str, Tensor], place: str) -> list[Tensor]:
    """A value, or nothing where the kernels keep it to themselves."""
    return [left[place]] if place in left else []


def attention(device: Device, layer: int) -> list[Found]:
    """The prompt of the recorded run through an attention sublayer, token by token from an empty cache."""
    case, prefix = device.case, f"prefill.{layer}"
    run, x = case.run(), case.tensors[f"prefill.{layer}.attn_in"]
    names = [n for n in ATTENTION if f"{prefix}.{n}" in case.tensors]
    given = device.place(layer, "attn_in")
    launches = device.between([given], [device.place(layer, "attn_out")])
    device.executor.clear()
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for position in range(run.prefill):
        device.put(given, x[position])
        left = device.run(launches, run.ids[position], position)
        for name in names:
            if name == "kv":
                window = plain(device.value(f"layers.{layer}.{CACHES[name]}"))
                rows[name].append(window[:, position % window.shape[1]])
            elif name in FINISHED:
                place = device.place(layer, name)
                rows[name].append(finish(device, left, place, run.ids[position], position))
            elif name not in CACHES:
                rows[name] += found_in(left, device.place(layer, name))
    values = {name: torch.cat(some) for name, some in rows.items() if some}
    for name in ("entries", "index_keys"):
        if name in names:
            values[name] = plain(device.value(f"layers.{layer}.{CACHES[name]}"))[0]
    if "index_scores" in values:
        values["index_scores"] = needed(
            values["index_scores"], case.tensors[f"{prefix}.index_scores"], device
        )
    return [compared(case, prefix, name, values) for name in names if name in values]


def needed(scores: Tensor, recorded_scores: Tensor, device: Device) -> Tensor:
    """Scores that a choice depends on; others are not written and count as the recorded ones."""
    visible = recorded_scores.isfinite()
    needed_rows = visible.sum(-1, keepdim=True) > int(device.executor.plan.config["index_topk"])
    known = scores[:, : recorded_scores.shape[1]]
    return torch.where(visible & needed_rows, known, recorded_scores)


def experts(device: Device, layer: int) -> list[Found]:
    """The recorded rows through an expert sublayer."""
    case, prefix = device.case, f"prefill.{layer}"
    run, x = case.run(), case.tensors[f"{prefix}.ffn_in"]
    at = list(range(run.prefill)) if len(x) == run.prefill else case.probe_rows
    given, out = device.place(layer, "ffn_in"), device.place(layer, "ffn_out")
    launches = device.between([given], [out])
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for row, position in zip(x, at, strict=True):
        device.put(given, row)
        left = device.run(launches, run.ids[position], position)
        for name in ("router_idx", "router_w", "ffn_out"):
            rows[name] += found_in(left, device.place(layer, name))
    values = {name: torch.cat(some) for name, some in rows.items() if some}
    found = [compared(case, prefix, name, values) for name in values if name != "ffn_out"]
    name, bounds = "ffn_out", case.tolerance["sublayer_with_recorded_input_rel_l2"]["ffn_out"]
    if device.executor.plan.recipe == "nvfp4-experts-w4a4":
        name = "ffn_out_w4a4_same_input"
        bounds = case.tolerance[f"{name}_rel_l2"]
    distance = case.distance(f"{prefix}.{name}", values["ffn_out"])
    return [*found, Found(f"{prefix}.{name}", distance, bounds["any"])]


def boundary(device: Device, layer: int, part: str) -> list[Found]:
    """The launch behind a sublayer: streams mixed, the next coefficients and the next sublayer's input."""
    case, last = device.case, layer == device.layers - 1
    before = f"prefill.{layer - 1}.x_ffn" if part == "attn" else f"prefill.{layer}.x_attn"
    own = [f"hc_{part}_post", f"hc_{part}_comb", f"{part}_out"]
    given = {before: device.place(*_streams(layer, part))} if part == "ffn" or layer else {}
    given |= {f"prefill.{layer}.{n}": device.place(layer, n) for n in own}
    comb = f"prefill.{layer}.hc_{part}_comb"  # which boundaries make of its logits: Sinkhorn keeps what it is
    given[comb] = device.logits(given[comb])
    if (part == "attn" and not layer) or not set(given) <= set(case.tensors):
        return []  # these streams are not recorded, or not in the packed recordings
    after = [(layer, n) for n in ("x_attn", "ffn_in", "hc_ffn_post", "hc_ffn_comb")]
    if part == "ffn":
        after = [(layer, "x_ffn")]
        if not last:
            after += [(layer + 1, n) for n in ("attn_in", "hc_attn_post", "hc_attn_comb")]
    wanted = {f"prefill.{at}.{n}": device.place(at, n) for at, n in after}
    if part == "ffn" and last:
        wanted["prefill.final_norm"] = "output.final_norm"
    return _rows_through(device, given, {n: p for n, p in wanted.items() if n in case.tensors})


def _streams(layer: int, part: str) -> tuple[int, str]:
    return (layer - 1, "x_ffn") if part == "attn" else (layer, "x_attn")


def head(device: Device) -> list[Found]:
    """From the last norm to the logits."""
    if "prefill.final_norm" not in device.case.tensors:
        return []
    return _rows_through(
        device, {"prefill.final_norm": "output.final_norm"}, {"main.logits": "output.logits"}
    )


def _rows_through(device: Device, given: Mapping[str, str], wanted: Mapping[str, str]) -> list[Found]:
    """The probe rows of recorded values through the launches between them and the wanted ones."""
    case, run = device.case, device.case.run()
    launches = device.between(given.values(), wanted.values())
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for i, position in enumerate(case.probe_rows):
        for name, place in given.items():
            known = case.tensors[name]
            row = known[i if len(known) == len(case.probe_rows) else position]
            device.put(place, row.log() if name.endswith("_comb") else row)
        left = device.run(launches, run.ids[position], position)
        for name, place in wanted.items():
            if name.endswith("_comb"):
                rows[name].append(finish(device, left, place, run.ids[position], position))
            else:
                rows[name] += found_in(left, place)
    found = []
    for name, some in ((n, r) for n, r in rows.items() if r):
        value, known = torch.cat(some), case.tensors[name]
        known = known if len(known) == len(value) else known[case.probe_rows]
        distance = float((value.double() - known.double()).norm() / known.double().norm())
        found.append(Found(name, distance, MIXED if name.endswith(("_post", "_comb")) else BF16))
    return found


def compared(case: Recorded, prefix: str, name: str, values: Mapping[str, Tensor]) -> Found:
    """The distance of one recorded tensor of a sublayer, and its bound for any rounding points."""
    stated = case.tolerance["sublayer_with_recorded_input_rel_l2"]
    bound = BF16
    if name in SELECTIONS:
        bound = 0.0
    elif name in stated:
        bound = stated[name]["any"]
    elif name == "index_scores":
        bound = stated["index_q"]["any"]  # they are products of these queries
    elif name == "router_w":
        bound = F32
    return Found(f"{prefix}.{name}", case.deviation(prefix, name, values), bound)


def check(device: Device) -> list[Found]:
    """All sublayers and what lies between them."""
    found: list[Found] = []
    for layer in range(device.layers):
        found += attention(device, layer) + experts(device, layer)
        for part in ("attn", "ffn"):
            found += boundary(device, layer, part)
    return found + head(device)


def main() -> int:
    """Feed, compare, print. Status 1 if anything is beyond its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("case")
    options = parser.parse_args()
    case = recorded(options.case)
    session = load(options.plan).bind(case.folder)
    assert isinstance(session.executor, CudaExecutor)
    with torch.inference_mode():
        found = check(Device(session.executor, case))
    failed = [f for f in found if not f.distance <= f.bound]
    for f in found:
        print(f"{f.name:36} {f.distance:10.3g} <= {f.bound:<10.3g} {'FAILS' if f in failed else ''}")
    print(
        f"{len(found)} recorded tensors, {len(failed)} beyond their bounds" if found else "nothing compared"
    )
    return int(bool(failed) or not found)


if __name__ == "__main__":
    sys.exit(main())
