"""Run the experts' kernels of `build_gemv.py` on a device: python -m tests.gpu.check_experts.

`up` against float64 under every style of routing, each with a style of rows (random, signed zeros, one
channel alone, the ends of the format), `down` on hidden rows of all of these; outputs poisoned. Timing:
graphs of up-down pairs, every launch with other experts, median of 25 replays.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import torch
from torch import Tensor

from dsv4c.numerics import codec
from dsv4c.numerics.forms import parse_packing
from dsv4c.runtime.driver import Kernel, Launch, Library
from dsv4c.types import FP8_ROW
from tests.gpu.check_gemv import Operands, bind_weight, launch_of, random_e4m3, random_weight, styled, wide
from tests.gpu.kernels import measure, options_parser, run_once, start, wanted

DISTINCT = 12  # experts in the check, over and over; in the timing all differ
STYLES = {"equal": "zeros", "pairs": "single", "wide": "ends", "low": "random", "random": "random"}


def random_experts(format: str, count: int, rows: int, k: int) -> codec.Quantized | Tensor:
    """`count` matrices stacked."""
    each = [random_weight(format, rows, k) for _ in range(count)]
    if isinstance(each[0], Tensor):
        return torch.stack(each)  # type: ignore[arg-type]
    parts = [None if p[0] is None else torch.stack(p) for p in zip(*[e[1:] for e in each], strict=True)]
    return codec.Quantized(each[0].format, *parts)


def select(value: codec.Quantized | Tensor, index: int) -> Tensor:
    """Matrix `index` of a stack in float64."""
    return wide(value[index] if isinstance(value, Tensor) else value.map(lambda part: part[index]))


def random_rows(quantized: bool, *shape: int) -> codec.Quantized | Tensor:
    """Activations."""
    if not quantized:
        return torch.randn(shape, device="cuda").to(torch.bfloat16)
    scale = torch.randint(114, 118, (*shape[:-1], shape[-1] // 128), device="cuda").to(torch.uint8)
    return codec.Quantized(FP8_ROW, random_e4m3(*shape), scale)


def bind_rows(operands: Operands, name: str, value: codec.Quantized | Tensor) -> None:
    """Activations as the kernel reads them."""
    operands[name, "data"] = value if isinstance(value, Tensor) else value.data
    if not isinstance(value, Tensor):
        operands[name, "scale"] = value.scale


def shrink(value: codec.Quantized | Tensor, factor: float) -> codec.Quantized | Tensor:
    """The rows divided by the power of two nearest to `factor`."""
    shift = round(math.log2(factor))
    if isinstance(value, Tensor):
        return value * 2.0**-shift
    return value._replace(scale=(value.scale.int() - shift).to(torch.uint8))


def swiglu(gate: Tensor, up: Tensor, limit: float, weight: Tensor | float) -> Tensor:
    """The activation in float64."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate / (1 + torch.exp(-gate)) * up * weight


def bf16_error(got: Tensor, expected: Tensor) -> float:
    """Worst error over the allowed one: a rounding to bf16, and the accumulation's order."""
    rms = expected.square().mean(-1, keepdim=True).sqrt()
    allowed = 2.0**-8 * expected.abs() + 1e-5 * rms
    error = (got.double() - expected).abs()
    return torch.where(error == 0, 0.0, error / allowed).nan_to_num(math.inf).max().item()


def restyled(value: codec.Quantized | Tensor, style: str) -> codec.Quantized | Tensor:
    """The rows in a style of `check_gemv`."""
    data = value if isinstance(value, Tensor) else value.data
    made = styled(data.flatten(0, -2), style).view(data.shape)
    return made if isinstance(value, Tensor) else value._replace(data=made)


def repeat_experts(operands: Operands, name: str, count: int, experts: int) -> None:
    """The `count` matrices of a stack over and over until there are `experts`, as bytes."""
    order = torch.arange(experts, device="cuda") % count
    for component in ("data", "scale", "global_scale"):
        if (name, component) in operands:
            each = operands[name, component].contiguous().view(torch.uint8).view(count, -1)
            operands[name, component] = each[order].flatten()


def bind_routing(o: Operands, case: dict[str, Any], style: str) -> Tensor:
    """What the router chooses from, in the style asked for; returns the logits in float64."""
    spec, source = case["spec"], case["routing"]["source"]
    m, e, k = spec["batch"], spec["experts"], spec["top_k"]
    logits = torch.randn(m, e, device="cuda") * 3
    bias = torch.randn(e, device="cuda") * 0.1
    if style in ("equal", "pairs", "low"):
        bias.zero_()
    if style == "equal":
        logits.fill_(0.7)
    elif style == "pairs":  # every score twice: the lower number comes first
        logits[:, e // 2 : e // 2 * 2] = logits[:, : e // 2]
    elif style == "wide":  # softplus saturates
        logits = torch.linspace(-60, 60, e, device="cuda").repeat(m, 1)[:, torch.randperm(e)].contiguous()
    elif style == "low":
        logits = -30 - 5 * torch.rand(m, e, device="cuda")
    o["logits", "data"], o["bias", "data"] = logits, bias
    table = torch.stack([torch.randperm(e, device="cuda")[:k] for _ in range(64)]).to(torch.int32)
    o["table", "data"] = table
    o["tokens", "data"] = torch.randint(0, 64, (m,), device="cuda", dtype=torch.int32)
    if source != "rows":
        return logits.double()
    row = torch.randn(m, spec["hidden"], device="cuda")
    gate = torch.randn(e, spec["hidden"], device="cuda") * 3 * spec["hidden"] ** -0.5
    if style == "wide":
        row *= 5  # beyond e^-87 scores are subnormal
    elif style == "low":
        row, gate = row.abs(), -gate.abs() * 4 * spec["hidden"] ** -0.5
    elif style in ("equal", "pairs"):
        gate[e // 2 : e // 2 * 2] = gate[: e // 2]
    o["row", "data"], o["gate", "data"] = row.to(torch.bfloat16), gate.to(torch.bfloat16)
    made = wide(o["row", "data"]) @ wide(o["gate", "data"]).T
    o["logits", "data"] = made.float()  # kernels of several rows are given them
    return made


def check_routing(o: Operands, case: dict[str, Any], style: str, logits: Tensor) -> tuple[Tensor, list[str]]:
    """Weights in float64 of the experts that `up` chose, and what is wrong with its choice: it must be the
    exact one, unless scores differ by less than rounding.
    """
    experts, source = o["experts", "data"].long(), case["routing"]["source"]
    if not bool(((experts >= 0) & (experts < case["spec"]["experts"])).all()):
        return torch.zeros_like(experts, dtype=torch.float64), [f"no experts: {experts.tolist()}"]
    score = torch.nn.functional.softplus(logits).sqrt()
    if source == "scores":
        key = (score.float() + o["bias", "data"]).double()
        want = torch.argsort(key, dim=-1, descending=True, stable=True)[:, : experts.shape[1]]
        best = key.gather(1, want)
        gap = (key.gather(1, experts) - best).abs() / best.abs().clamp(min=1e-30)
        wrong = (experts != want) & ((gap > 3e-7) | (style in ("equal", "pairs")))
    else:
        wrong = experts != o["table", "data"][o["tokens", "data"].long()]
    chosen = score.gather(1, experts)
    weights = chosen / chosen.sum(-1, keepdim=True) * case["routing"]["factor"]
    found = [f"{int(wrong.sum())} wrong experts"] if bool(wrong.any()) else []
    off = ((o["weights", "data"] - weights).abs() / weights).nan_to_num(math.inf).max().item()
    if not off <= (1e-4 if source == "rows" else 1e-6):  # a logit's error is its score's relative one
        found.append(f"weights off by {off:.2g}")
    return weights, found


def check(
    up: dict[str, Any], down: dict[str, Any], kernels: tuple[Kernel, Kernel]
) -> tuple[Operands, list[float], list[str]]:
    """Bound operands, the worst error over the allowed one of both kernels, and what the choice got wrong."""
    spec = up["spec"]
    m, k, i, top = spec["batch"], spec["hidden"], spec["intermediate"], spec["top_k"]
    quantized = spec["routed"] != "bf16"
    count = min(DISTINCT, spec["experts"])
    o: Operands = {}
    w = {n: random_experts(spec["routed"], count, i, k) for n in ("w1", "w3")}
    w["w2"] = random_experts(spec["routed"], count, k, i)
    shared = {f"shared_{n}": random_weight(spec["shared"], i, k) for n in ("w1", "w3")}
    shared["shared_w2"] = random_weight(spec["shared"], k, i)
    packing = {**up["packing"], **down["packing"]}
    for name, stack in w.items():
        bind_weight(o, name, packing[name], stack)
        repeat_experts(o, name, count, spec["experts"])
    for name, value in shared.items():
        bind_weight(o, name, packing[name], value)
    x = random_rows(quantized, m, k)
    x = shrink(x, (wide(x) @ wide(shared["shared_w1"]).T).square().mean().sqrt().item() / (spec["limit"] / 2))
    worst, wrong = 0.0, []
    for style, kind in STYLES.items():
        rows = restyled(x, kind)
        bind_rows(o, "x", rows)
        xw = wide(rows)
        hs = swiglu(xw @ wide(shared["shared_w1"]).T, xw @ wide(shared["shared_w3"]).T, spec["limit"], 1.0)
        logits = bind_routing(o, up, style)
        o["experts", "data"] = torch.full((m, top), -1, dtype=torch.int32, device="cuda")
        o["weights", "data"] = torch.full((m, top), math.nan, device="cuda")
        o["h", "data"] = torch.full((m, top, i), math.nan, dtype=torch.bfloat16, device="cuda")
        o["shared_h", "data"] = torch.full((m, i), math.nan, dtype=torch.bfloat16, device="cuda")
        run_once(launch_of(up, kernels[0], o))
        route, found = check_routing(o, up, style, logits)
        wrong += [f"{style}: {text}" for text in found]
        h = torch.empty(m, top, i, dtype=torch.float64, device="cuda")
        for t in range(m):
            for s in range(top):
                e = int(o["experts", "data"][t, s]) % count
                gate, linear = (xw[t] @ select(w[n], e).T for n in ("w1", "w3"))
                h[t, s] = swiglu(gate, linear, spec["limit"], route[t, s])
        worst = max(worst, bf16_error(o["h", "data"], h), bf16_error(o["shared_h", "data"], hs))
    errors = [worst, 0.0]
    ids = o["expert_ids", "data"] = o["experts", "data"]
    for kind in ("zeros", "single", "ends", "random"):
        rows, shared_rows = (restyled(random_rows(False, *shape), kind) for shape in ((m, top, i), (m, i)))
        bind_rows(o, "h", rows)
        bind_rows(o, "shared_h", shared_rows)
        if quantized:
            rows, shared_rows = codec.quantize(rows, FP8_ROW), codec.quantize(shared_rows, FP8_ROW)
        o["y", "data"] = torch.full((m, k), math.nan, dtype=torch.bfloat16, device="cuda")
        run_once(launch_of(down, kernels[1], o))
        y = wide(shared_rows) @ wide(shared["shared_w2"]).T
        wide_rows = wide(rows)
        for t in range(m):
            y[t] += sum(wide_rows[t, s] @ select(w["w2"], int(ids[t, s]) % count).T for s in range(top))
        errors[1] = max(errors[1], bf16_error(o["y", "data"], y))
    return o, errors, wrong


def grow(operands: Operands, spec: dict[str, Any], packing: dict[str, str]) -> None:
    """All experts of the layer, random bytes: for timing."""
    for name, rows, k in (
        ("w1", spec["intermediate"], spec["hidden"]),
        ("w3", spec["intermediate"], spec["hidden"]),
        ("w2", spec["hidden"], spec["intermediate"]),
    ):
        nbytes = spec["experts"] * parse_packing(packing[name]).nbytes(rows, k)
        operands[name, "data"] = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda")


def time_chain(
    cases: list[dict[str, Any]], kernels: list[Kernel], operands: Operands, programmatic: bool
) -> float:
    """Microseconds per repetition of the chain `cases`."""
    spec = cases[0]["spec"]
    shared = [k for k in operands if k[0].startswith("shared_w") and k[1] == "data"]
    copies = max(1, math.ceil((220 << 20) / sum(operands[k].nbytes for k in shared)))
    clones = [{k: operands[k].clone() for k in shared} for _ in range(copies)]
    launches: list[Launch] = []
    count = 48
    order = torch.randperm(spec["experts"], device="cuda").to(torch.int32)
    keep = []
    for n in range(count):
        take = (
            torch.arange(spec["batch"] * spec["top_k"], device="cuda") + n * spec["batch"] * spec["top_k"]
        ) % spec["experts"]
        ids = order[take].view(spec["batch"], spec["top_k"]).contiguous()
        logits = torch.full((spec["batch"], spec["experts"]), -9.0, device="cuda")
        logits.scatter_(1, ids.long(), torch.rand(ids.shape, device="cuda"))
        tokens = torch.arange(spec["batch"], dtype=torch.int32, device="cuda")
        routing = {"experts": ids, "expert_ids": ids, "table": ids.clone(), "tokens": tokens}
        routing |= {"logits": logits}
        bound = {**operands, **clones[n % copies], **{(name, "data"): t for name, t in routing.items()}}
        keep.append(routing)
        launches += [launch_of(case, kernel, bound) for case, kernel in zip(cases, kernels, strict=True)]
    return measure(launches, programmatic) / count


def main() -> int:
    """Check every layer, then time those that ask for it; exit status 1 if any is wrong."""
    parser = options_parser(__doc__, "gemv")
    parser.add_argument("--timed", action="store_true", help="only what is timed")
    options = parser.parse_args()
    start(options)
    layers = json.loads((options.folder / "experts.json").read_text())
    layers = [p for p in layers if wanted(p[0]["symbol"], options) and (p[0]["timed"] or not options.timed)]
    wrong = 0
    for up, down in layers:
        libraries = [
            Library((options.folder / f"{c['symbol']}.cubin").read_bytes(), c["symbol"]) for c in (up, down)
        ]
        kernels = [
            lib.kernel(c["symbol"], shared=c["shared"]) for lib, c in zip(libraries, (up, down), strict=True)
        ]
        operands, errors, choice = check(up, down, (kernels[0], kernels[1]))
        bad = max(errors) > 1 or bool(choice)
        wrong += bad
        line = f"{up['symbol'][3:]:31} {'WRONG' if bad else 'ok':5} error/allowed"
        line += f" up {errors[0]:7.3g} down {errors[1]:7.3g} {'; '.join(choice)}"
        if up["timed"] and not bad and not options.no_time:
            spec = up["spec"]
            packing = {**up["packing"], **down["packing"]}
            grow(operands, spec, packing)
            routed = spec["batch"] * spec["top_k"] * operands["w1", "data"].nbytes / spec["experts"]
            nbytes = routed + operands["shared_w1", "data"].nbytes
            for name, cases, ks, size in (
                ("up", [up], kernels[:1], 2 * nbytes),
                ("down", [down], kernels[1:], nbytes),
                ("both", [up, down], kernels, 3 * nbytes),
            ):
                plain, early = (time_chain(cases, ks, operands, p) for p in (False, True))
                line += f"\n    {name:5} {size / 1e6:6.1f} MB  plain {plain:6.2f}"
                line += f"  programmatic {early:6.2f} us  {size / early / 1e6:5.2f} TB/s"
        print(line, flush=True)
        del operands
        torch.cuda.empty_cache()
    print(f"{len(layers)} layers, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
