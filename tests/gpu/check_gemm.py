"""Products of many rows on a GPU, against float64, then timed: python -m tests.gpu.check_gemm.

Needs torch and cuda-bindings. Random codes and scales, then rows of `check_gemv.STYLES`; every number of
rows of `ROWS` that a bucket holds, the others' results untouched (all results start as NaN); two runs with
the same bits. A sum may differ by `SLACK` times the sum of its terms' magnitudes, and where e4m3 numbers are
multiplied all results together, in the norm, by `NORM` besides their rounding; MXFP4's block scales below
2^-14 of the largest of their row's 128 columns cost what `FLUSHED` says. Experts: rows by list, skewed ones,
too. Times are medians of graphs that cycle over weights beyond the L2, beside torch._scaled_mm (cuBLAS, 1x128
by 128x128 blocks) and bf16 matmul.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4c.numerics import codec
from dsv4c.numerics.forms import UNIT_BYTES, parse_packing
from dsv4c.numerics.packing import pack
from dsv4c.runtime.bench import microseconds
from dsv4c.runtime.driver import Kernel, Library
from dsv4c.types import FP8_ROW, MXFP4
from tests.gpu.check_gemv import (
    OUT,
    ROTATE,
    STYLES,
    Operands,
    launch_of,
    random_e4m3,
    random_weight,
    styled,
    wide,
)
from tests.gpu.kernels import measure, options_parser, run_once, start, wanted

ROWS = (1, 9, 63, 64, 65, 127, 128, 129, 150, 511, 512, 4095, 4096)
SLACK = {"e4m3": 2.0**-10, "bf16": 2.0**-19, "f16": 2.0**-19}
"""FP8 tensor cores cut off each of an instruction's 32 products and the sum so far at 2^-13 of the largest of
them, by as much at the most: 2^-8 of the magnitudes' sum where one dominates, and with random signs and sizes
less the more there are (cuBLAS's FP8 on an H200, too: 2^-11). One misplaced term of few fails `single`.
"""
CUT = 2.0**-15
"""Of the largest weight of 32, for each of the 32: a quarter of what is cut off at the most. It counts where
few weights of a block are much larger than all others; else `SLACK` is the most of it.
"""
NORM = 5e-4  # measured on an H200: 1.3e-4 for sums of 128 to 4,096 random terms in f32 registers per 128
FLUSHED = 2.0**-16
"""Of a row's largest block scale among 128 columns: half of e4m3's smallest step, 2^-10, where the largest
scale stands at 2^6. It is what a weight is off that is too small for the step; weights of the largest scale
are off by up to half of the scale from being MXFP4.
"""
ROUNDING = {"bf16": 2.0**-8, "f32": 2.0**-22}
SMALLEST = {"bf16": 2.0**-134, "f32": 2.0**-150}  # half of the smallest step


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def random_rows(
    rows: int, k: int, scaled: bool, style: str, small: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Rows by component, and what they are in float64; `small`, so that sums are about 1."""
    if not scaled:
        x = styled(torch.randn(rows, k, device="cuda").to(torch.bfloat16), style)
        return {"data": x}, x.double()
    scale = torch.randint(115, 128, (rows, k // 128), device="cuda") - 20 * small
    scale = scale.to(torch.uint8)
    data = styled(random_e4m3(rows, k), style)
    q = codec.Quantized(FP8_ROW, data, scale)
    return {"data": data, "scale": scale}, codec.dequantize(q, torch.float64)


def kind_of(spec: dict[str, Any]) -> str:
    """As what tensor cores multiply."""
    if not spec["scaled"]:
        return "bf16"
    return "f16" if spec["packing"].startswith("nvfp4") else "e4m3"


def bind(operands: Operands, name: str, packing: str, weight: codec.Quantized | Tensor) -> None:
    """A weight as the kernel reads it: packed, or as it lies."""
    if packing == "plain":
        assert isinstance(weight, Tensor)
        operands[name, "data"] = weight
        return
    form = parse_packing(packing)
    if isinstance(weight, Tensor):
        operands[name, "data"] = pack(form, weight)
        return
    operands[name, "data"] = pack(form, weight.data, weight.scale if form.holds_scales else None)
    operands[name, "scale"] = weight.scale
    if weight.global_scale is not None:
        operands[name, "global_scale"] = weight.global_scale


def silu_pair(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return torch.nn.functional.silu(gate) * up


def doubt(weight: codec.Quantized | Tensor, kind: str) -> Tensor:
    """f32 [rows, k]: what a product of each weight may be off, over the magnitude of its row of x: of sums of
    128 twice as much, which may be all but one term's.
    """
    values = wide(weight).abs().float()
    off = SLACK[kind] * max(1, 256 // values.shape[1]) * values
    if kind == "e4m3":
        off += CUT * values.view(len(values), -1, 32).amax(-1).repeat_interleave(32, 1)
    if isinstance(weight, codec.Quantized) and weight.format == MXFP4:
        scales = torch.exp2(weight.scale.float() - 127)
        blocks = torch.nn.functional.pad(scales, (0, -scales.shape[1] % 4)).view(len(scales), -1, 4)
        off += FLUSHED * blocks.amax(-1).repeat_interleave(128, 1)[:, : off.shape[1]]
    return off


def product(
    x: Tensor, weights: list[Tensor], doubts: list[Tensor], groups: int, limit: float | None
) -> tuple[Tensor, Tensor]:
    """(What a matrix or a pair gives, how far off it may be before rounding.)"""
    rows = x.view(len(x), groups, -1)
    small = rows.abs().float()
    sums, slacks = (
        [torch.einsum("mgk,grk->mgr", a, w.view(groups, -1, rows.shape[-1])).flatten(1) for w in matrices]
        for a, matrices in ((rows, weights), (small, doubts))
    )
    if limit is None:
        return sums[0], slacks[0].double()
    made = silu_pair(sums[0], sums[1], limit)
    steep = 1.1 * slacks[0] * sums[1].abs().clamp(max=limit) + slacks[1] * sums[0].abs().clamp(max=limit)
    return made, steep.double()


def ratio(found: Tensor, expected: Tensor, slack: Tensor, out: str, *, norm: bool = False) -> float:
    """The worst error over what is allowed; with `norm`, or of all together, whichever is worse."""
    error = (found.double() - expected).abs()
    allowed = slack + ROUNDING[out] * expected.abs() + SMALLEST[out]
    worst = torch.where(error == 0, 0.0, error / allowed).nan_to_num(math.inf).max().item()
    whole = error.norm() / expected.norm() / (NORM + ROUNDING[out] / 2)
    return max(worst, float(whole.nan_to_num(math.inf))) if norm else worst


def check(case: dict[str, Any], kernel: Kernel) -> tuple[Operands, float]:
    """Operands of random rows, and the worst error over the allowed one."""
    spec, worst = case["spec"], 0.0
    operands: Operands = {}
    kind = kind_of(spec)
    weights: list[tuple[list[Tensor], list[Tensor]]] = []
    for m in spec["matrices"]:
        own = [half_near(random_weight(format_of(spec), m["rows"], spec["k"])) for _ in m["names"]]
        for name, weight in zip(m["names"], own, strict=True):
            bind(operands, name, spec["packing"], weight)
        weights.append(([wide(w) for w in own], [doubt(w, kind) for w in own]))
    summed = kind == "e4m3" and spec["limit"] is None
    for style in reversed(STYLES):
        most = spec["rows"]
        x, x64 = random_rows(
            most, spec["groups"] * spec["k"], spec["scaled"], style, spec["limit"] is not None
        )
        operands |= {("x", c): part for c, part in x.items()}
        wanted_rows = [product(x64, *w, spec["groups"], spec["limit"]) for w in weights]
        for rows in [n for n in ROWS if n <= most] if style == "random" else [most]:
            operands["lengths", "data"] = i32(rows)
            twice = []
            for _ in range(2):
                for m, (expected, _s) in zip(spec["matrices"], wanted_rows, strict=True):
                    y = torch.full(expected.shape, math.nan, dtype=OUT[spec["out_dtype"]], device="cuda")
                    operands[m["out"], "data"] = y
                run_once(launch_of(case, kernel, operands))
                twice.append([operands[m["out"], "data"] for m in spec["matrices"]])
            for first, second, (expected, slack) in zip(*twice, wanted_rows, strict=True):
                norm = summed and style == "random"
                found = ratio(first[:rows], expected[:rows], slack[:rows], spec["out_dtype"], norm=norm)
                same = torch.equal(first.view(torch.uint8), second.view(torch.uint8))
                alone = bool(first[rows:].isnan().all())
                if not (found <= 1 and same and alone):
                    print(f"  {style} {rows} rows: {found:.3g}, same bits {same}, others alone {alone}")
                worst = max(worst, found if same and alone else math.inf)
    return operands, worst


def random_matrix(format: str, rows: int, k: int) -> codec.Quantized:
    """A quantized one."""
    weight = half_near(random_weight(format, rows, k))
    assert isinstance(weight, codec.Quantized)
    return weight


def half_near(weight: codec.Quantized | Tensor) -> codec.Quantized | Tensor:
    """The same, but MXFP4's block scales in the first half of the columns are within 2^9 of each other, as
    those of trained weights are.
    """
    if isinstance(weight, codec.Quantized) and weight.format == MXFP4:
        weight.scale[:, : weight.scale.shape[1] // 2].random_(119, 129)
    return weight


def format_of(spec: dict[str, Any]) -> str:
    return "bf16" if spec["packing"] == "plain" else str(spec["packing"].partition("/")[0])


def scales_of(packed: Tensor, packing: str) -> Tensor:
    """The block scales in MXFP4's units; of other packings nothing."""
    units = packed.view(-1, UNIT_BYTES["mxfp4"]) if packing.startswith("mxfp4") else packed.view(1, -1)[:, :0]
    return units[:, 1024:]


def settle(packed: Tensor, packing: str) -> Tensor:
    """MXFP4's block scales within 2^6 of each other, as those of trained weights are: for timing. What they
    were before.
    """
    scales = scales_of(packed, packing)
    before = scales.clone()
    scales.random_(119, 125)
    return before


def rotated(case: dict[str, Any], kernel: Kernel, operands: Operands) -> float:
    """Microseconds per launch over copies of the weights."""
    names = [(n, "data") for m in case["spec"]["matrices"] for n in m["names"]]
    for name in names:
        settle(operands[name], case["spec"]["packing"])
    nbytes = sum(operands[n].nbytes for n in names)
    copies = max(1, min(16, math.ceil(ROTATE / nbytes)))
    sets = [operands] + [{**operands, **{n: operands[n].clone() for n in names}} for _ in range(copies - 1)]
    launches = [launch_of(case, kernel, sets[i % copies]) for i in range(2 * copies)]
    return measure(launches, True, replays=7) / len(launches)


def peers(spec: dict[str, Any]) -> dict[str, float]:
    """Microseconds of cuBLAS on the same shape: FP8 in blocks, bf16."""
    rows, k = spec["rows"], spec["k"]
    columns = sum(m["rows"] * len(m["names"]) for m in spec["matrices"]) // spec["groups"]
    copies = max(2, min(16, math.ceil(ROTATE / (columns * k))))
    found: dict[str, float] = {}

    def timed(call: Any) -> float:
        for i in range(copies):
            call(i)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(2 * copies):
                call(i % copies)
        times: list[float] = [microseconds(graph.replay) for _ in range(8)]
        return statistics.median(times[1:]) / (2 * copies)

    if spec["scaled"] and columns % 16 == 0:
        x = random_e4m3(rows, k)
        w = [random_e4m3(columns, k) for _ in range(copies)]
        sx = torch.ones(k // 128, rows, device="cuda").t()
        sw = torch.ones(columns // 128, k // 128, device="cuda").t()
        try:
            found["cuBLAS FP8"] = timed(
                lambda i: torch._scaled_mm(x, w[i].t(), sx, sw, out_dtype=torch.bfloat16)
            )
        except RuntimeError as error:
            print(f"  no cuBLAS FP8 in blocks: {str(error)[:90]}")
    else:
        b = torch.randn(rows, spec["groups"], k, device="cuda").to(torch.bfloat16).transpose(0, 1)
        v = [torch.randn(spec["groups"], columns, k, device="cuda").to(torch.bfloat16) for _ in range(copies)]
        found["cuBLAS bf16"] = timed(lambda i: b @ v[i].mT)
    return found


# Experts ----------------------------------------------------------------------------------------------------


def choices(rows: int, top_k: int, experts: int, style: str) -> Tensor:
    """Different experts of each row."""
    if style == "skewed":
        return torch.arange(top_k, device="cuda").int().repeat(rows, 1)
    return torch.rand(rows, experts, device="cuda").argsort(-1)[:, :top_k].int().contiguous()


def check_layer(layer: dict[str, Any], folder: Path, timed: bool) -> tuple[float, str]:
    """A MoE layer's launches: worst error over the allowed one, and a line of times."""
    up, down = layer["specs"]
    rows, count, top_k = layer["rows"], up["experts"], layer["top_k"]
    libraries = {
        k["symbol"]: Library((folder / f"{k['symbol']}.cubin").read_bytes(), k["symbol"])
        for k in layer["kernels"]
    }
    kernels = [libraries[k["symbol"]].kernel(k["symbol"], shared=k["shared"]) for k in layer["kernels"]]
    format, distinct = format_of(up), min(count, 8)
    k, middle = up["k"], down["k"]
    weights: dict[str, tuple[Tensor, Tensor]] = {}
    operands: Operands = {}
    for name, shape in (("w1", (middle, k)), ("w3", (middle, k)), ("w2", (k, middle))):
        own = [random_matrix(format, *shape) for _ in range(distinct)]
        packing = parse_packing((down if name == "w2" else up)["packing"])
        data = [pack(packing, w.data, w.scale if packing.holds_scales else None) for w in own]
        operands[name, "data"] = torch.stack(data).repeat(count // distinct, 1)
        if not packing.holds_scales:
            operands[name, "scale"] = torch.stack([w.scale for w in own]).repeat(count // distinct, 1, 1)
        factors = [w.global_scale for w in own if w.global_scale is not None]
        if factors:
            operands[name, "global_scale"] = torch.stack(factors).repeat(count // distinct)
        doubts = [doubt(w, kind_of(up)) for w in own]
        weights[name] = torch.stack([wide(w).float() for w in own]), torch.stack(doubts)
    worst, line = 0.0, ""
    sizes = sorted({1, 9, rows - 1, rows})
    for style in ("skewed", "random"):
        chosen = choices(rows, top_k, count, style)
        x, x64 = random_rows(rows, k, True, "random", small=True)
        h_rows, h64 = random_rows(rows * top_k, middle, True, "random")
        operands["weights", "data"] = torch.rand(rows, top_k, device="cuda")
        operands["shared", "data"] = torch.randn(rows, k, device="cuda").to(torch.bfloat16)
        for live in sizes:
            operands["experts", "data"] = chosen
            operands["lengths", "data"] = i32(live)
            operands["order", "data"] = torch.full(
                (count, rows * top_k), 1 << 30, dtype=torch.int32, device="cuda"
            )
            operands["counts", "data"] = i32(*[-1] * count)
            h = torch.full((rows * top_k, middle), math.nan, dtype=torch.bfloat16, device="cuda")
            y = torch.full((rows * top_k, k), math.nan, dtype=torch.bfloat16, device="cuda")
            total = torch.full((rows, k), math.nan, dtype=torch.bfloat16, device="cuda")
            first = operands | {("x", c): p for c, p in x.items()} | {("h", "data"): h}
            second = operands | {("x", c): p for c, p in h_rows.items()} | {("y", "data"): y}
            third = operands | {("routed", "data"): y, ("y", "data"): total}
            launches = [
                launch_of(kernel, loaded, bound)
                for kernel, loaded, bound in zip(
                    layer["kernels"], kernels, (operands, first, second, third), strict=True
                )
            ]
            run_once(*launches)
            n = live * top_k
            flat = chosen[:live].flatten()
            found, counts = operands["order", "data"], operands["counts", "data"]
            for expert in range(count):
                want = (flat == expert).nonzero().flatten().int()
                if counts[expert] != len(want) or not torch.equal(found[expert, : len(want)], want):
                    print(f"  {style} {live}: rows of expert {expert} are not its rows")
                    worst = math.inf
                    break
            for made, source, names, limit, spec in (
                (h, x64.repeat_interleave(top_k, 0), ("w1", "w3"), up["limit"], up),
                (y, h64, ("w2",), None, down),
            ):
                for expert in range(distinct):
                    own = (flat % distinct == expert).nonzero().flatten()[:512]
                    if not len(own):
                        continue
                    values, doubts = zip(*[[part[expert] for part in weights[m]] for m in names], strict=True)
                    expected, slack = product(source[own], [v.double() for v in values], [*doubts], 1, limit)
                    if limit is not None:
                        f = operands["weights", "data"].flatten()[own, None].double()
                        expected, slack = expected * f, slack * f
                    norm = limit is None and kind_of(spec) == "e4m3"
                    r = ratio(made[own], expected, slack, "bf16", norm=norm)
                    if not r <= 1:
                        print(f"  {style} {live} rows, {names}, expert {expert}: {r:.3g}")
                    worst = max(worst, r)
                if not made[n:].isnan().all():
                    print(f"  {style} {live} rows, {names}: writes rows that nobody asked for")
                    worst = math.inf
            parts = [*y[:n].view(live, top_k, k).float().unbind(1), operands["shared", "data"][:live].float()]
            sums = parts[0]
            for part in parts[1:]:
                sums = sums + part
            if not torch.equal(total[:live], sums.to(torch.bfloat16)):
                print(f"  {style} {live} rows: sums over experts differ")
                worst = math.inf
        if timed and layer["timed"]:
            packings = {"w1": up["packing"], "w3": up["packing"], "w2": down["packing"]}
            kept = {n: settle(operands[n, "data"], packing) for n, packing in packings.items()}
            times = [measure([launch] * 4, True, replays=7) / 4 for launch in launches]
            for n, packing in packings.items():
                scales_of(operands[n, "data"], packing).copy_(kept[n])
            read = [operands[w, "data"].nbytes for w in ("w1", "w2")]
            line += (
                f"  {style}: list {times[0]:.1f} up {times[1]:.1f} down {times[2]:.1f} sum {times[3]:.1f} us"
            )
            if style == "random":
                flops = 2 * rows * top_k * k * middle
                line += (
                    f" ({2 * flops / times[1] / 1e6:.0f} TF {2 * read[0] / times[1] / 1e6:.2f} TB/s,"
                    f" {flops / times[2] / 1e6:.0f} TF {read[1] / times[2] / 1e6:.2f} TB/s)"
                )
    return worst, line


def check_quantizer(case: dict[str, Any], kernel: Kernel) -> float:
    """Rows to FP8: wrong numbers, infinitely bad; under a norm, the distance."""
    rows, k, each = case["rows"], case["k"], case.get("each", 1)
    live = rows - 3
    x = torch.randn(rows * each, k, device="cuda").to(torch.bfloat16)
    x[0] = 0
    gain = torch.rand(k, device="cuda").to(torch.bfloat16).float()
    q = torch.zeros(rows * each, k, dtype=torch.uint8, device="cuda")
    scale = torch.zeros(rows * each, k // 128, dtype=torch.uint8, device="cuda")
    operands: Operands = {
        ("x", "data"): x,
        ("gain", "data"): gain,
        ("q", "data"): q,
        ("q", "scale"): scale,
        ("lengths", "data"): i32(live),
    }
    run_once(launch_of(case, kernel, operands))
    n = live * each
    if q[n:].any() or scale[n:].any():
        return math.inf
    f = x[:n].float()
    if "eps" in case:
        f = f * torch.rsqrt(f.square().mean(-1, keepdim=True) + case["eps"]) * gain
    want = codec.quantize(f.to(torch.bfloat16).cpu(), FP8_ROW)
    got = codec.Quantized(FP8_ROW, q[:n].cpu().view(torch.float8_e4m3fn), scale[:n].cpu())
    known = codec.dequantize(want)
    off = float((codec.dequantize(got) - known).norm() / known.norm())
    return off / 2e-3 if "eps" in case else (0.0 if off == 0 else math.inf)


def main() -> int:
    """Check every case, then time those that ask for it; exit status 1 if any is wrong."""
    parser = options_parser(__doc__, "gemm")
    options = parser.parse_args()
    start(options)
    wrong, count = 0, 0
    folder = options.folder
    for case in json.loads((folder / "rows.json").read_text()):
        if wanted(case["symbol"], options):
            library = Library((folder / f"{case['symbol']}.cubin").read_bytes(), case["symbol"])
            worst = check_quantizer(case, library.kernel(case["symbol"], shared=case["shared"]))
            wrong, count = wrong + (not worst <= 1), count + 1
            print(f"{case['symbol']:22} {'ok' if worst <= 1 else 'WRONG':5} {worst:8.3g}", flush=True)
    for case in json.loads((folder / "cases.json").read_text()):
        if not wanted(case["symbol"], options):
            continue
        library = Library((folder / f"{case['symbol']}.cubin").read_bytes(), case["symbol"])
        kernel = library.kernel(case["symbol"], shared=case["shared"])
        operands, worst = check(case, kernel)
        wrong, count = wrong + (not worst <= 1), count + 1
        line = f"{case['symbol']:22} {'ok' if worst <= 1 else 'WRONG':5} error/allowed {worst:8.3g}"
        if case["timed"] and not options.no_time:
            spec, us = case["spec"], rotated(case, kernel, operands)
            columns = sum(m["rows"] * len(m["names"]) for m in spec["matrices"])
            line += f"  {us:8.1f} us {2 * spec['rows'] * spec['k'] * columns / us / 1e6:6.0f} TF"
            nbytes = sum(operands[n, "data"].nbytes for m in spec["matrices"] for n in m["names"])
            line += f" {nbytes / us / 1e6:5.2f} TB/s"
            for name, other in peers(spec).items():
                line += f"  {name} {other:8.1f} us, {other / us:.2f} x"
        print(line, flush=True)
        del operands
        torch.cuda.empty_cache()
    for layer in json.loads((folder / "experts.json").read_text()):
        if not wanted(f"experts_{layer['name']}", options):
            continue
        worst, line = check_layer(layer, folder, not options.no_time)
        wrong, count = wrong + (not worst <= 1), count + 1
        print(
            f"experts_{layer['name']:20} {'ok' if worst <= 1 else 'WRONG':5} {worst:8.3g}{line}", flush=True
        )
        torch.cuda.empty_cache()
    print(f"{count} cases, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
