"""Attention, compressor and index kernels against the reference: python -m tests.gpu.check_attention.

Needs torch and cuda-bindings. Inputs are fresh, random first and then of a `STYLES` (nothing but zeros, equal
scores, one dimension, softmaxes of one key, codes at the end of their range, all scores negative or tied), at
positions -1 (idle), 0, 1, 3, around 128, in the middle and at the end, in slots of any order, some of them of
nobody. With several rows per sequence some are shorter. Outputs and what positions hide of a cache are
poisoned with NaN. Every row alone gives the bits that it gives among others. Times are medians of 25 replays
of a graph of launches over at least 64 distinct sets of operands, in microseconds per launch, on plain and on
programmatic edges.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dsv4c.reference  # noqa: F401  (registers the meanings)
from dsv4c.ir.ops.attention import (
    AttentionScores,
    AttentionValues,
    Gather,
    SinkSoftmax,
    VisibleEntries,
    WindowIndex,
)
from dsv4c.ir.ops.compress import CompletedEntries, CompressPool
from dsv4c.ir.ops.index import IndexScores, TopK
from dsv4c.ir.ops.linear import Linear
from dsv4c.ir.ops.norm import RmsNorm
from dsv4c.ir.ops.quant import Hadamard, Quantize
from dsv4c.ir.ops.rope import Rope, RopeFrequencies
from dsv4c.ir.ops.state import CacheWrite
from dsv4c.numerics import codec
from dsv4c.numerics.codec import Quantized
from dsv4c.numerics.forms import parse_packing
from dsv4c.numerics.packing import pack
from dsv4c.reference import run
from dsv4c.runtime.driver import Kernel, Launch, Library
from dsv4c.types import BF16, F32, KV_FP8, MXFP4
from tests.gpu.kernels import measure, options_parser, run_once, start, wanted

FORMATS = {"fp8": KV_FP8, "mxfp4": MXFP4}
FREQUENCIES = run(RopeFrequencies(160000.0, 64, 16.0, 65536, 32.0, 1.0))
SPARE = 3  # slots of nobody
Operands = dict[str, Any]  # operand name -> tensor or Quantized, on the CPU


class WrongResultError(Exception):
    """A kernel's result is wrong."""


def wide(value: Any) -> Tensor:
    """As bf16, what the recipes compute with."""
    return codec.dequantize(value, torch.bfloat16) if isinstance(value, Quantized) else value


def poisoned(format: str, *shape: int) -> Any:
    """A cache full of NaN."""
    rows = torch.full(shape, math.nan, dtype=torch.bfloat16)
    if format == "bf16":
        return rows
    cache = codec.quantize(torch.zeros(shape), FORMATS[format])
    codec.nan_fill(cache)
    return cache


def parts(value: Any) -> dict[str, Tensor]:
    """Component arrays by name."""
    if isinstance(value, Tensor):
        return {"data": value}
    named = {"data": value.data, "scale": value.scale, "tail": value.tail}
    return {name: part for name, part in named.items() if part is not None}


def put(cache: Any, where: Any, rows: Tensor, format: str) -> None:
    """Store bf16 rows into cache[where], quantized as the cache is."""
    source = rows if format == "bf16" else codec.quantize(rows, FORMATS[format])
    for name, part in parts(cache).items():
        part[where] = parts(source)[name]


def kv_rows(count: int, width: int) -> Tensor:
    """Rows like normed keys: channels and rows of different size, some nearly constant blocks."""
    gains = torch.exp(torch.randn(width) * 0.5)
    rows = torch.randn(count, width) * gains * torch.exp(torch.randn(count, 1))
    rows[torch.rand(count) < 0.05, : width // 4] *= 1e-4
    return rows.to(torch.bfloat16)


@dataclass(frozen=True)
class Step:
    """Where the rows of a launch are: positions and slots i32[N], as the kernel `positions` makes them.

    `count` slots, more than sequences.
    """

    positions: Tensor
    slots: Tensor
    count: int

    @property
    def sequences(self) -> Iterator[tuple[int, int, int]]:
        """(slot, first position, last position) of those that are not idle."""
        for slot in self.slots[self.positions >= 0].unique().tolist():
            at = self.positions[(self.slots == slot) & (self.positions >= 0)]
            yield slot, int(at.min()), int(at.max())

    def __str__(self) -> str:
        return f"positions {self.positions.tolist()} of slots {self.slots.tolist()}"


def step_from(starts: Sequence[int], tokens: int, limit: int, turn: int = 0) -> Step:
    """A step of up to `tokens` rows of each sequence, from `starts` on (-1: none), in slots drawn anew.

    Every other sequence has half of the rows, if there are more than one; none goes beyond `limit`.
    """
    positions, slots = [], []
    places = torch.randperm(len(starts) + SPARE).tolist()
    for i, (first, slot) in enumerate(zip(starts, places, strict=False)):
        length = 0 if first < 0 else min(tokens - (i + turn) % 2 * (tokens // 2), limit - first)
        positions += [first + t if t < length else -1 for t in range(tokens)]
        slots += [slot if t < length else 0 for t in range(tokens)]
    return Step(
        torch.tensor(positions, dtype=torch.int32), torch.tensor(slots, dtype=torch.int32), len(places)
    )


def steps_of(case: dict[str, Any], limit: int) -> list[Step]:
    """Steps that cover empty, partial, wrapped and full windows, windows of both old and new tokens, and idle
    sequences.
    """
    pool = [0, limit - 1, 5, -1, 1, limit // 2, 127, 3, 124, 128, 122, min(700, limit - 1), limit - 2]
    tokens = case["tokens"]
    count = case["rows"] // tokens
    vectors = [
        [pool[(i * count + j) % len(pool)] for j in range(count)] for i in range(-(-len(pool) // count))
    ]
    starts = [[min(p, limit - 1) for p in vector] for vector in vectors]
    return [step_from(vector, tokens, limit, turn) for turn, vector in enumerate(starts)]


# What each family's inputs are, and what should come out ----------------------------------------------------


def attention_inputs(spec: dict[str, Any], step: Step) -> Operands:
    """Random operands; only what the positions make visible is a number."""
    N, h, D, fmt = spec["rows"], spec["heads"], spec["width"], spec["format"]
    scale = torch.exp(torch.randn(N, h, 1))
    x: Operands = {
        "q": (torch.randn(N, h, D) * scale).to(torch.bfloat16),
        "window": poisoned(fmt, step.count, spec["ring"], D),
        "sink": torch.randn(h) * 2,
        "frequencies": FREQUENCIES,
        "positions": step.positions,
        "slots": step.slots,
        "out": torch.full((N, h, D), math.nan, dtype=torch.bfloat16),
    }
    for slot, first, last in step.sequences:
        seen = torch.arange(max(0, first - spec["window"] + 1), last + 1)
        put(x["window"], (slot, seen % spec["ring"]), kv_rows(len(seen), D), fmt)
    if spec["entries"] == "none":
        return x
    x["entries"] = poisoned(fmt, step.count, spec["capacity"], D)
    if spec["entries"] == "all":
        for slot, _, last in step.sequences:
            count = min((last + 1) // spec["ratio"], spec["capacity"])
            put(x["entries"], (slot, torch.arange(count)), kv_rows(count, D), fmt)
        return x
    x["selected"] = torch.full((N, spec["selected_count"]), -1, dtype=torch.int32)
    for n, (t, slot) in enumerate(zip(step.positions.tolist(), step.slots.tolist(), strict=True)):
        count = min((t + 1) // spec["ratio"], spec["capacity"])
        chosen = torch.randperm(count)[: spec["selected_count"]].sort().values
        x["selected"][n, : len(chosen)] = chosen.to(torch.int32)
        put(x["entries"], (slot, chosen), kv_rows(len(chosen), D), fmt)
    return x


def attention_expected(spec: dict[str, Any], x: Operands) -> Operands:
    """The graph's ops, one after the other."""
    positions, slots = x["positions"], x["slots"]
    # On the device: torch's CPU rsqrt rounds short bf16 tensors twice, to bf16 after the root as well.
    q = run(RmsNorm(eps=spec["eps"], precision=BF16 if spec["exact_norm"] else F32), x["q"].cuda()).cpu()
    q = run(Rope(), q, positions, FREQUENCIES)
    index = run(WindowIndex(window=spec["window"]), positions)
    keys = wide(run(Gather(), x["window"], index, slots))
    if spec["entries"] != "none":
        more = x.get("selected")
        if more is None:
            more = run(VisibleEntries(ratio=spec["ratio"], capacity=spec["capacity"]), positions)
        keys = torch.cat([keys, wide(run(Gather(), x["entries"], more, slots))], dim=1)
        index = torch.cat([index, more], dim=1)
    logits = run(AttentionScores(scale=spec["width"] ** -0.5), q, keys, index)
    p, denominator = run(SinkSoftmax(out=BF16), logits, x["sink"])
    out = run(AttentionValues(), p, denominator, keys)
    return {"out": run(Rope(inverse=True), out, positions, FREQUENCIES)}


def state_inputs(spec: dict[str, Any], step: Step) -> Operands:
    """Random rows; rings hold numbers for the tokens that are pooled with the new ones, caches are poison.
    `plain_w` is the weight of the product beside.
    """
    N, S = spec["batch"], step.count
    store, *compressors = spec["riders"]
    (matrix,) = spec["matrices"]
    w = (torch.randn(matrix["rows"], spec["k"]) * spec["k"] ** -0.5).to(torch.bfloat16)
    x: Operands = {
        "x": torch.randn(N, spec["k"]).to(torch.bfloat16),
        "w": pack(parse_packing(spec["packing"]["w"]), w),
        "plain_w": w,
        "y": torch.full((N, matrix["rows"]), math.nan, dtype=torch.bfloat16),
        "kv": kv_rows(N, store["width"]),
        "kv_norm": torch.randn(store["width"]).to(torch.bfloat16),
        "frequencies": FREQUENCIES,
        "positions": step.positions,
        "slots": step.slots,
        "window": poisoned(store["format"], S, store["ring"], store["width"]),
    }
    for c in compressors:
        name, R = c["name"], c["ring"]
        windows = 2 if c["overlap"] else 1
        channels = c["width"] * windows
        x[f"{name}_u"] = torch.randn(N, channels) * 3
        x[f"{name}_s"] = torch.randn(N, channels) * 4
        x[f"{name}_ape"] = torch.randn(c["ratio"], channels)
        x[f"{name}_norm"] = torch.randn(c["width"]).to(torch.bfloat16)
        x[f"{name}_entries"] = poisoned(c["format"], S, c["capacity"], c["width"])
        for ring in ("kv", "score"):
            x[f"{name}_{ring}"] = torch.full((S, R, channels), math.nan)
            for slot, first, _ in step.sequences:
                before = torch.arange(max(0, first + 1 - windows * c["ratio"]), first)
                x[f"{name}_{ring}"][slot, before % R] = torch.randn(len(before), channels) * 4
    return x


def state_expected(spec: dict[str, Any], x: Operands) -> Operands:
    """Caches after the step, and the product."""
    store, *compressors = spec["riders"]
    positions, slots = x["positions"], x["slots"]
    rows = run(RmsNorm(eps=store["eps"]), x["kv"], x["kv_norm"])
    rows = run(Rope(), rows, positions, FREQUENCIES)
    out = {"window": write(x["window"], rows, store["format"], positions, slots)}
    out["y"] = run(Linear(out=BF16), x["x"], x["plain_w"])
    for c in compressors:
        name, ratio = c["name"], c["ratio"]
        ape = x[f"{name}_ape"][positions.long() % ratio]
        kv = run(CacheWrite(), x[f"{name}_kv"], x[f"{name}_u"], positions, slots)
        score = run(CacheWrite(), x[f"{name}_score"], x[f"{name}_s"] + ape, positions, slots)
        entries, places = run(CompletedEntries(ratio=ratio, tokens=c["tokens"]), positions, slots)
        pool = CompressPool(ratio=ratio, overlap=c["overlap"], tokens=c["tokens"])
        z = run(pool, kv, score, entries, places).to(torch.bfloat16)
        z = run(RmsNorm(eps=c["eps"]), z, x[f"{name}_norm"])
        z = run(Rope(stride=ratio), z, entries, FREQUENCIES)
        if c["hadamard"]:
            z = run(Hadamard(), z)
        out[f"{name}_kv"], out[f"{name}_score"] = kv, score
        out[f"{name}_entries"] = write(x[f"{name}_entries"], z, c["format"], entries, places)
    return out


def write(cache: Any, rows: Tensor, format: str, index: Tensor, slots: Tensor) -> Any:
    """CacheWrite of rows in the cache's format."""
    encoded = rows if format == "bf16" else run(Quantize(FORMATS[format]), rows)
    return run(CacheWrite(), cache, encoded, index, slots)


def index_inputs(spec: dict[str, Any], step: Step) -> Operands:
    """Random operands; invisible keys are poison."""
    N, H, C, fmt = spec["rows"], spec["heads"], spec["capacity"], spec["format"]
    x: Operands = {
        "q": torch.randn(N, H, 128).to(torch.bfloat16),
        "keys": poisoned(fmt, step.count, C, 128),
        "weights": (torch.randn(N, H) * 0.01).to(torch.bfloat16),
        "frequencies": FREQUENCIES,
        "positions": step.positions,
        "slots": step.slots,
        "scores": torch.full((N, C), math.nan, dtype=torch.bfloat16),
    }
    for slot, _, last in step.sequences:
        count = min((last + 1) // spec["ratio"], C)
        put(x["keys"], (slot, torch.arange(count)), (torch.randn(count, 128) * 2).to(torch.bfloat16), fmt)
    return x


def choice_inputs(spec: dict[str, Any], step: Step) -> Operands:
    """The same, and a place for the choice."""
    out = torch.full((spec["rows"], min(spec["k"], spec["capacity"])), -(1 << 30), dtype=torch.int32)
    return {**index_inputs(spec, step), "out": out}


def index_expected(spec: dict[str, Any], x: Operands) -> Operands:
    """Scores where visible; NaN, as before, elsewhere and while everything would be chosen anyway."""
    positions = x["positions"]
    q = run(Hadamard(), run(Rope(), x["q"], positions, FREQUENCIES))
    if spec["format"] == "mxfp4":
        q = run(Quantize(MXFP4), q)
    scores = run(IndexScores(ratio=spec["ratio"]), q, x["keys"], x["weights"], positions, x["slots"])
    visible = (positions + 1) // spec["ratio"]
    scores[visible <= spec["k"]] = math.nan
    return {"scores": scores.masked_fill(scores == -math.inf, math.nan)}


def top_k_inputs(spec: dict[str, Any], step: Step) -> Operands:
    """Scores with many ties, zeros of both signs and huge values; invisible ones are NaN."""
    N, C = spec["rows"], spec["capacity"]
    scores = torch.randn(N, C) * torch.exp(torch.randn(N, C))
    scores[torch.rand(N, C) < 0.3] = 0.0
    scores[torch.rand(N, C) < 0.001] = 3e38
    scores = torch.where(torch.rand(N, C) < 0.3, scores.clamp(-0.5, 0.5), scores)
    if spec["bits"] == 16:
        scores = scores.to(torch.bfloat16)
    for n, t in enumerate(step.positions.tolist()):
        scores[n, min((t + 1) // spec["ratio"], C) :] = math.nan
    out = torch.full((N, min(spec["k"], C)), -(1 << 30), dtype=torch.int32)
    return {"scores": scores + 0.0, "positions": step.positions, "out": out}


def top_k_expected(spec: dict[str, Any], x: Operands) -> Operands:
    """Exactly the reference's."""
    return {"out": run(TopK(k=spec["k"]), x["scores"].nan_to_num(-math.inf))}


Family = tuple[Callable[[dict[str, Any], Step], Operands], Callable[[dict[str, Any], Operands], Operands]]
FAMILIES: dict[str, Family] = {
    "AttentionSpec": (attention_inputs, attention_expected),
    "GemvSpec": (state_inputs, state_expected),
    "IndexScoresSpec": (index_inputs, index_expected),
    "IndexChoiceSpec": (choice_inputs, index_expected),
    "TopKSpec": (top_k_inputs, top_k_expected),
}


def limit_of(case: dict[str, Any]) -> int:
    """Tokens that the case's caches hold."""
    spec = case["spec"]
    if case["family"] == "AttentionSpec":
        return spec["capacity"] * spec["ratio"] if spec["entries"] != "none" else 9000
    if case["family"] == "GemvSpec":
        return min((c["capacity"] * c["ratio"] for c in spec["riders"][1:]), default=9000)
    return spec["capacity"] * spec["ratio"]


# Adversarial operands ---------------------------------------------------------------------------------------

STYLES = ("zeros", "single", "large", "negative")
LONG = 40000  # tokens from which on fewer trials are enough: the reference takes long


def adversarial(family: str, x: Operands, style: str) -> None:
    """Change random operands to those of a style, in place. What is NaN stays so."""
    if family == "TopKSpec":
        x["scores"] = tied(x["scores"], style)
        return
    rows = [n for n in x if n in ("q", "kv") or n.endswith(("_u", "_s"))]
    for name in rows:
        if style == "zeros":  # signed ones: every score is the same
            x[name] = x[name] * 0.0
        elif style == "single":
            kept = torch.zeros_like(x[name])
            kept[..., 3] = x[name][..., 3]
            x[name] = kept
        elif style == "large":
            x[name] = x[name] * 64
    if style == "large":
        for name in ("window", "entries", "keys"):
            if name in x and family != "GemvSpec":
                enlarge(x[name], 4)
    if style == "negative":
        if family.startswith("Index"):
            x["weights"] = -x["weights"].abs()
        for name in rows:
            x[name] = -x[name].abs()
    if "sink" in x:
        x["sink"] = x["sink"] + {"zeros": -30.0, "negative": 8.0}.get(style, 0.0)


def enlarge(cache: Any, exponent: int) -> None:
    """The cache's numbers times 2^exponent, where they are numbers."""
    if not isinstance(cache, Quantized):
        cache.mul_(2.0**exponent)
        return
    cache.scale.add_(torch.where(cache.scale < 200, exponent, 0).to(torch.uint8))  # a NaN is 255
    if cache.tail is not None:
        cache.tail.mul_(2.0**exponent)


def tied(scores: Tensor, style: str) -> Tensor:
    """Scores all equal, one above the others, all the largest, or all negative; NaN where they were."""
    known = torch.zeros_like(scores)
    if style == "single":
        known[:, 2] = 1.0
    elif style == "large":
        known = torch.where(scores > 0, 3e38, -3e38).to(scores.dtype)
    elif style == "negative":
        known = torch.where(scores == 0, -1.0, -scores.abs())
    return torch.where(scores.isnan(), scores, known)


# Comparing --------------------------------------------------------------------------------------------------


def raw(x: Tensor) -> Tensor:
    """The bits, so that NaN equals NaN."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def compare(case: dict[str, Any], name: str, got: Any, want: Any) -> float:
    """Error of one output, 1 = the allowed one. Raises WrongResultError when something untouched changed."""
    family, error = case["family"], 0.0
    if family == "TopKSpec":
        return 0.0 if torch.equal(got, want) else math.inf
    if family == "AttentionSpec":
        for g, w in zip(got.double(), want.double(), strict=True):
            # Probabilities and result are rounded to bf16: a row's largest probability may be off by 2^-8,
            # which all of the row has in common, and its numbers, each in its own way, by 2^-9.
            error = max(error, relative(g, w) / (2.0**-8 + 2.0**-9))
        return error
    if family.startswith("Index"):
        if not torch.equal(got.isnan(), want.isnan()):
            raise WrongResultError(f"{name}: scores are missing, or written where nothing is visible")
        return relative(got.nan_to_num(0), want.nan_to_num(0)) / 4e-3
    for part, w in parts(
        want
    ).items():  # state and products: few codes may round the other way, nothing else may change
        g = parts(got)[part]
        changed = raw(w) != raw(g)
        if bool((g.float().isnan() != w.float().isnan()).any()):
            raise WrongResultError(f"{name}.{part}: a slot is missing, or another was written")
        error = max(error, changed.sum().item() / max(2.0, 0.02 * w.shape[0] * w.shape[-1]))
    far, near = wide(got).nan_to_num(0), wide(want).nan_to_num(0)
    if isinstance(want, Quantized):  # in a single row one code is a large share of what a norm would allow
        coded = want.shape[-1] - want.format.tail
        apart = (far - near)[..., :coded].abs() / largest_step(got, want, far[..., :coded], near[..., :coded])
        error, far, near = max(error, float(apart.max())), far[..., coded:], near[..., coded:]
    return max(error, relative(far, near) / 4e-3)


def largest_step(a: Quantized, b: Quantized, far: Tensor, near: Tensor) -> Tensor:
    """Per element how far apart neighboring codes are at most: e2m1 2 of the block's scale, e4m3 an eighth of
    the larger value, or 2^-9 of the scale.
    """
    scales = torch.maximum(codec.decode_ue8m0(a.scale), codec.decode_ue8m0(b.scale)).nan_to_num(1.0)
    scales = scales.repeat_interleave(a.format.block[-1], -1)
    if a.format == MXFP4:
        return 2 * scales
    return torch.maximum(torch.maximum(far.abs(), near.abs()) / 8, scales * 2.0**-9)


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|; anything but zeros is infinitely wrong where zeros are wanted."""
    got, want = got.double(), want.double()
    size = want.norm().item()
    difference = (got - want).norm().item()
    if math.isnan(difference):
        return math.inf
    return difference / size if size else (math.inf if difference else 0.0)


# Running ----------------------------------------------------------------------------------------------------


def on_device(x: Operands) -> dict[tuple[str, str], Tensor]:
    """Copies of all component arrays on the device."""
    return {(name, part): t.clone().cuda() for name, value in x.items() for part, t in parts(value).items()}


def back(x: Operands, device: dict[tuple[str, str], Tensor], name: str) -> Any:
    """An output, from the device."""
    fetched = {part: device[name, part].cpu() for part in parts(x[name])}
    return Quantized(x[name].format, **fetched) if isinstance(x[name], Quantized) else fetched["data"]


def launch_of(case: dict[str, Any], kernel: Kernel, device: dict[tuple[str, str], Tensor]) -> Launch:
    """The launch with its operands' addresses."""
    arguments = tuple(device[operand, component].data_ptr() for operand, component in case["parameters"])
    return Launch(
        kernel, tuple(case["grid"]), case["block"], case["shared"], arguments, tuple(case["cluster"])
    )


ROWS = {  # operands with a row for each row of the launch; the last is the result
    "AttentionSpec": ("q", "selected", "positions", "slots", "out"),
    "IndexScoresSpec": ("q", "weights", "positions", "slots", "scores"),
    "IndexChoiceSpec": ("q", "weights", "positions", "slots", "scores", "out"),
    "TopKSpec": ("scores", "positions", "out"),
}


def check_alone(case: dict[str, Any], kernel: Kernel, device: dict[tuple[str, str], Tensor]) -> None:
    """Every row in a launch of its own leaves the bits that the launch of all left.

    Raises WrongResultError if one does not.
    """
    of_rows = ROWS[case["family"]]
    result = of_rows[-1], "data"
    for n in range(case["rows"]):
        one = {(o, c): t[n : n + 1].clone() if o in of_rows else t for (o, c), t in device.items()}
        one[result].copy_(torch.full_like(one[result], -1 if one[result].dtype is torch.int32 else math.nan))
        run_once(launch_of({**case, "grid": case["grid_of_one"]}, kernel, one))
        if not torch.equal(raw(one[result]), raw(device[result][n : n + 1])):
            raise WrongResultError(f"row {n} alone differs from row {n} of {case['rows']}")


def check_choice(spec: dict[str, Any], x: Operands, device: dict[tuple[str, str], Tensor]) -> None:
    """The choice is exact, of the scores that the device left; of what is visible where it left none.

    Raises WrongResultError if it is not.
    """
    scores = back(x, device, "scores").nan_to_num(-math.inf)
    for row, visible in zip(scores, ((x["positions"] + 1) // spec["ratio"]).tolist(), strict=True):
        if visible <= spec["k"]:
            row[:visible] = 0.0
    if not torch.equal(back(x, device, "out"), run(TopK(k=spec["k"]), scores)):
        raise WrongResultError("out: not the best of the scores beside it")


def check(case: dict[str, Any], kernel: Kernel) -> float:
    """Worst error over all steps, 1 = the allowed one."""
    inputs, expected = FAMILIES[case["family"]]
    limit, worst = limit_of(case), 0.0
    steps = steps_of(case, limit)
    if limit > LONG:
        steps = steps[:6]
    trials = [("random", step) for step in steps]
    for i, style in enumerate(STYLES if limit <= LONG else ()):
        trials += [(style, steps[j % len(steps)]) for j in (2 * i + 1, 2 * i + 2)]
    for style, step in trials:
        x = inputs(case["spec"], step)
        if style != "random":
            adversarial(case["family"], x, style)
        device = on_device(x)
        run_once(launch_of(case, kernel, device))
        if case["grid_of_one"] and case["rows"] > 1:
            check_alone(case, kernel, device)
        if case["family"] == "IndexChoiceSpec":
            check_choice(case["spec"], x, device)
        for name, want in expected(case["spec"], x).items():
            error = compare(case, name, back(x, device, name), want)
            if not error <= 1.0:
                where = f"{name} of {style} operands at {step}"
                raise WrongResultError(f"{where}: error {error:.3g} of the allowed")
            worst = max(worst, error)
    return worst


def time_case(case: dict[str, Any], kernel: Kernel, programmatic: bool) -> float:
    """Microseconds per launch, over distinct operands."""
    starts = [case["timed_at"]] * (case["rows"] // case["tokens"])
    x = FAMILIES[case["family"]][0](case["spec"], step_from(starts, case["tokens"], limit_of(case)))
    nbytes = sum(p.nbytes for value in x.values() for p in parts(value).values())
    sets = min(64, max(4, (1 << 30) // nbytes))
    devices = [on_device(x) for _ in range(sets)]
    count = max(sets, 64)
    launches = [launch_of(case, kernel, devices[n % sets]) for n in range(count)]
    return measure(launches, programmatic) / count


def main() -> int:
    """Check, time, print a table. Status 1 if anything is wrong."""
    options = options_parser(__doc__, "attention").parse_args()
    start(options)
    print("error 1 = allowed; us per launch on plain, programmatic edges")
    count = failed = 0
    for case in json.loads((options.folder / "cases.json").read_text()):
        symbol = case["symbol"]
        if not wanted(symbol, options):
            continue
        library = Library((options.folder / f"{symbol}.cubin").read_bytes(), symbol)
        cluster = math.prod(case["cluster"])
        kernel = library.kernel(symbol, shared=case["shared"], cluster=cluster)
        try:
            line = f"{symbol:24} error {check(case, kernel):7.3f}"
            if case["timed_at"] is not None and not options.no_time:
                plain, programmatic = (time_case(case, kernel, p) for p in (False, True))
                line += f"   {plain:7.2f} {programmatic:7.2f} us"
        except WrongResultError as failure:
            failed += 1
            line = f"{symbol:24} FAILED {failure}"
        print(line, flush=True)
        count += 1
    print(f"{count} kernels, {failed} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
