"""GEMVs on a GPU, against float64, then timed: python -m tests.gpu.check_gemv.

Needs torch and cuda-bindings. Random codes and scales, then activations of `STYLES`: signed zeros, the ends
of the format, one channel alone; rows to NVFP4 also with ties and with one outlier above the smallest scales.
Outputs are poisoned with NaN. Kernels of fewer rows give the bits that those of more rows give. Timing is the
median of 25 replays of a graph of launches that cycle over at least 220 MB of distinct weights, in
microseconds per launch.
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
from dsv4c.numerics.packing import pack
from dsv4c.runtime.driver import Kernel, Launch, Library
from dsv4c.types import FP8_ROW, FP8_WEIGHT, MXFP4, NVFP4, NVFP4_ROW
from tests.gpu.kernels import mapped, measure, options_parser, run_once, start, wanted

FORMATS = {"fp8": FP8_WEIGHT, "mxfp4": MXFP4, "nvfp4": NVFP4}
ROTATE = 220 << 20  # bytes of distinct weights: more than three times the L2
OUT = {"bf16": torch.bfloat16, "f32": torch.float32}
# Largest |error| allowed, relative to the row's RMS (accumulation order) and to the value (output rounding).
ABSOLUTE, RELATIVE = 2e-6, {"bf16": 2.0**-8, "f32": 1e-6}
Operands = dict[tuple[str, str], Tensor]
STYLES = ("random", "zeros", "ends", "single")
LARGE = 0x5880  # bf16 rows' end, 2^50: squares of it still have a sum in f32


def random_bytes(*shape: int) -> Tensor:
    """Uniform bytes."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")


def random_e4m3(*shape: int) -> Tensor:
    """Uniform e4m3 codes without NaN."""
    codes = random_bytes(*shape)
    return torch.where(codes & 0x7F == 0x7F, codes - 1, codes).view(torch.float8_e4m3fn)


def random_weight(format: str, rows: int, k: int) -> codec.Quantized | Tensor:
    """A matrix of random codes and scales."""
    if format == "bf16":
        return torch.randn(rows, k, device="cuda").to(torch.bfloat16)
    if format == "fp8":
        scale = torch.randint(110, 130, (-(-rows // 128), k // 128), device="cuda").to(torch.uint8)
        return codec.Quantized(FP8_WEIGHT, random_e4m3(rows, k), scale)
    if format == "mxfp4":
        scale = torch.randint(115, 135, (rows, k // 32), device="cuda").to(torch.uint8)
        return codec.Quantized(MXFP4, random_bytes(rows, k // 2), scale)
    scale = (random_bytes(rows, k // 16) & 0x7F).clamp(max=0x7E).view(torch.float8_e4m3fn)
    return codec.Quantized(NVFP4, random_bytes(rows, k // 2), scale, None, torch.tensor(0.35, device="cuda"))


def bind_weight(operands: Operands, name: str, packing: str, value: codec.Quantized | Tensor) -> None:
    """A weight as the kernel reads it."""
    if isinstance(value, Tensor):
        operands[name, "data"] = pack(parse_packing(packing), value)
        return
    in_unit = value.scale if value.format in (MXFP4, NVFP4) else None
    operands[name, "data"] = pack(parse_packing(packing), value.data, in_unit)
    operands[name, "scale"] = value.scale
    if value.global_scale is not None:
        operands[name, "global_scale"] = value.global_scale


def wide(value: codec.Quantized | Tensor) -> Tensor:
    """The value in float64."""
    if isinstance(value, Tensor):
        return value.double()
    return codec.dequantize(value, torch.float64)


def styled(data: Tensor, style: str) -> Tensor:
    """Codes or bf16 numbers [rows, channels], their signs kept: all zero, all the largest, or all zero but
    one channel of every row.
    """
    if style == "random":
        return data
    if data.dtype is torch.bfloat16:
        bits, signs, end = data.view(torch.int16), -0x8000, LARGE
    else:  # e4m3, or two e2m1 in a byte
        packed = data.dtype is torch.uint8
        bits, signs, end = data.view(torch.uint8), 0x88 if packed else 0x80, 0x77 if packed else 0x7E
    sign = bits & signs
    if style == "ends":
        return (sign | end).view(data.dtype)
    rows = torch.arange(len(data), device=data.device)
    kept = torch.zeros_like(bits, dtype=torch.bool)
    kept[rows, (37 * rows + 5) % data.shape[1]] = style == "single"
    return torch.where(kept, bits, sign).view(data.dtype)


def bind_activations(
    operands: Operands, spec: dict[str, Any], x: dict[str, Any], style: str = "random"
) -> Tensor:
    """Rows for an activation operand; returns what the product uses, float64 [M, groups * k]."""
    shape = (spec["batch"], spec["groups"] * spec["k"])
    if x["prologue"] == "unpack":
        if (x["name"], "data") not in operands:
            scale = (random_bytes(shape[0], shape[1] // 16) & 0x7F).clamp(max=0x7E)
            operands[x["name"], "data"] = styled(random_bytes(shape[0], shape[1] // 2), style)
            operands[x["name"], "scale"] = scale.view(torch.float8_e4m3fn)
            # one per row and group, as in [M, g, k]
            operands[x["name"], "global_scale"] = torch.rand(shape[0], spec["groups"], device="cuda") + 0.1
        names = ("data", "scale", "global_scale")
        data, scale, total = (operands[x["name"], c] for c in names)
        blocks = codec.Quantized(
            NVFP4_ROW,
            data.view(-1, spec["k"] // 2),
            scale.view(-1, spec["k"] // 16),
            None,
            total.flatten(),
        )
        return wide(blocks).view(shape)
    if x["prologue"] == "expand" or (x["kind"] == "e4m3" and x["prologue"] == "copy"):
        if (x["name"], "data") not in operands:
            operands[x["name"], "data"] = styled(random_e4m3(*shape), style)
            scale = torch.randint(110, 130, (shape[0], shape[1] // 128), device="cuda").to(torch.uint8)
            operands[x["name"], "scale"] = scale
        return wide(codec.Quantized(FP8_ROW, operands[x["name"], "data"], operands[x["name"], "scale"]))
    if (x["name"], "data") not in operands:
        rows = torch.randn(shape, device="cuda") * torch.logspace(-3, 2, shape[0], device="cuda")[:, None]
        operands[x["name"], "data"] = styled(rows.to(torch.bfloat16), style)
    rows = operands[x["name"], "data"]
    if x["prologue"] == "copy" or x["kind"] == "f16":
        return rows.double()
    if x["prologue"] == "normalize":
        if (x["gain"], "data") not in operands:
            operands[x["gain"], "data"] = torch.randn(spec["k"], device="cuda")
        f = rows.float()
        inverse = torch.rsqrt(f.double().square().mean(-1, keepdim=True) + x["eps"]).float()
        rows = (f * inverse * operands[x["gain"], "data"]).to(torch.bfloat16)
        if x["kind"] == "bf16":
            return rows.double()
    return wide(codec.quantize(rows, FP8_ROW))


def check_quantize(case: dict[str, Any], kernel: Kernel, style: str = "random") -> float:
    """Values that a kernel rounds otherwise than the codec: none, and a few behind a norm."""
    rows, k = case["spec"]["rows"], case["spec"]["k"]
    x = torch.randn(rows, k, device="cuda") * torch.logspace(-6, 3, rows, device="cuda")[:, None]
    x[:, : k // 4] *= 1e-4  # some block scales are subnormal, or zero
    x[rows // 2, k // 2 :] = 0
    x[-1] = 0 if rows > 1 else x[-1]
    x = x.to(torch.bfloat16)
    if style == "floor":  # one outlier: other blocks' scales are at or below the smallest
        x = torch.where(torch.arange(k, device="cuda") == 5, 6.0, x.sign() * 2.0**-8).to(torch.bfloat16)
    elif style == "ties":  # halves between codes: k / 4 below a largest value of 6
        x = (torch.randint(-24, 25, (rows, k), device="cuda") / 4).to(torch.bfloat16)
        x[:, 0] = 6
    elif style != "random":
        x = styled(x, style)
    operands = {("x", "data"): x, ("gain", "data"): torch.randn(k, device="cuda").to(torch.bfloat16)}
    operands["q", "data"] = torch.full((rows, k // 2), 0x77, dtype=torch.uint8, device="cuda")
    operands["q", "scale"] = torch.full((rows, k // 16), math.nan, device="cuda").to(torch.float8_e4m3fn)
    operands["q", "global_scale"] = torch.full((rows,), math.nan, device="cuda")
    eps = case["spec"]["eps"]
    if eps is not None:
        f = x.float().cpu()
        inverse = torch.rsqrt(f.double().square().mean(-1, keepdim=True) + eps).float()
        x = (f * inverse * operands["gain", "data"].float().cpu()).to(torch.bfloat16)
    run_once(launch_of(case, kernel, operands))
    want = codec.quantize(x.cpu(), NVFP4_ROW)
    got = codec.Quantized(
        NVFP4_ROW,
        operands["q", "data"].cpu(),
        operands["q", "scale"].cpu(),
        None,
        operands["q", "global_scale"].cpu(),
    )
    assert want.global_scale is not None
    wrong = sum(
        int((a != b).sum())
        for a, b in zip(got.parts, want.parts, strict=True)
        if a.dtype != torch.float8_e4m3fn
    )
    wrong += int((got.scale.view(torch.uint8) != want.scale.view(torch.uint8)).sum())
    if eps is None:
        return math.inf if wrong else 0.0
    known = codec.dequantize(want)
    return float((codec.dequantize(got) - known).norm() / known.norm().clamp(min=1e-30)) / 5e-3


def launch_of(case: dict[str, Any], kernel: Kernel, operands: Operands) -> Launch:
    """The launch with its operands' addresses."""
    arguments = tuple(
        operands[operand, component].data_ptr() if box is None else mapped(operands[operand, component], box)
        for operand, component, box in case["parameters"]
    )
    return Launch(
        kernel, tuple(case["grid"]), case["block"], case["shared"], arguments, tuple(case["cluster"])
    )


def check(case: dict[str, Any], kernel: Kernel) -> tuple[Operands, float]:
    """Operands of a case that passed, and its worst error over the allowed one."""
    spec = case["spec"]
    operands: Operands = {}
    weights = {}
    for m in spec["matrices"]:
        weight = random_weight(m["format"], m["rows"], spec["k"])
        if isinstance(weight, codec.Quantized) and weight.global_scale is not None and spec["groups"] > 1:
            # each group is a matrix with a scale of its own
            by_group = weight.map(
                lambda part: part.view(spec["groups"], -1, *part.shape[1:]) if part.ndim else part
            )
            weight = by_group._replace(global_scale=torch.rand(spec["groups"], device="cuda") + 0.1)
        bind_weight(operands, m["name"], case["packing"][m["name"]], weight)
        weights[m["name"]] = wide(weight).view(spec["groups"], -1, spec["k"])
    worst, bound = 0.0, operands
    for style in reversed(STYLES):  # random rows last: they are timed
        bound = dict(operands)
        worst = max(worst, check_style(case, kernel, bound, weights, style))
    return bound, worst


def check_style(
    case: dict[str, Any], kernel: Kernel, operands: Operands, weights: dict[str, Tensor], style: str
) -> float:
    """Worst error over the allowed one with activations of a style; adds them and the results."""
    spec, outputs = case["spec"], []
    for m in spec["matrices"]:
        x = bind_activations(operands, spec, m["x"], style)
        rows = x.view(spec["batch"], spec["groups"], spec["k"])
        expected = torch.einsum("mgk,grk->mgr", rows, weights[m["name"]]).flatten(1)
        operands[m["out"], "data"] = torch.full(
            expected.shape, math.nan, dtype=OUT[m["out_dtype"]], device="cuda"
        )
        outputs.append((m, expected, m["x"]["prologue"]))
    run_once(launch_of(case, kernel, operands))
    worst = 0.0
    for m, expected, prologue in outputs:
        error = (operands[m["out"], "data"].double() - expected).abs()
        rms = expected.square().mean(-1, keepdim=True).sqrt()
        slack = 3e-3 if prologue == "normalize" else ABSOLUTE  # a norm that rounds the other way moves a code
        allowed = slack * rms + RELATIVE[m["out_dtype"]] * expected.abs()
        ratio = torch.where(error == 0, 0.0, error / allowed).nan_to_num(math.inf)
        worst = max(worst, ratio.max().item())
    return worst


def check_rows(same: list[tuple[dict[str, Any], Kernel]]) -> list[str]:
    """Of cases alike but for their rows: whose first or last rows differ in a bit from the largest's."""
    *fewer, (most, kernel) = sorted(same, key=lambda item: item[0]["spec"]["batch"])
    operands, _ = check(most, kernel)
    spec, wrong = most["spec"], []
    inputs = {m["x"]["name"] for m in spec["matrices"]}
    results = {m["out"] for m in spec["matrices"]}
    for case, other in fewer:
        count = case["spec"]["batch"]
        assert case["packing"] == most["packing"]
        for first in (0, spec["batch"] - count):
            part = dict(operands)
            for operand, component in operands:
                if operand in inputs | results:
                    part[operand, component] = operands[operand, component][first : first + count].clone()
            for name in results:
                part[name, "data"].fill_(math.nan)
            run_once(launch_of(case, other, part))
            for name in results:
                bits = part[name, "data"].view(torch.uint8)
                if not torch.equal(bits, operands[name, "data"][first : first + count].view(torch.uint8)):
                    wrong.append(f"{case['symbol']}: {name} of rows {first}.. of {most['symbol']}")
    return wrong


def time_case(case: dict[str, Any], kernel: Kernel, operands: Operands, programmatic: bool) -> float:
    """Microseconds per launch."""
    weights = [(m["name"], "data") for m in case["spec"]["matrices"]]
    nbytes = sum(operands[w].nbytes for w in weights)
    copies = max(1, math.ceil(ROTATE / nbytes))
    sets = [operands] + [{**operands, **{w: operands[w].clone() for w in weights}} for _ in range(copies - 1)]
    launches = [launch_of(case, kernel, s) for s in sets]
    count = max(8, math.ceil(96 / copies) * copies) if nbytes < ROTATE else 8
    return measure([launches[i % copies] for i in range(count)], programmatic) / count


def main() -> int:
    """Check every case, then time those that ask for it; exit status 1 if any is wrong."""
    parser = options_parser(__doc__, "gemv")
    parser.add_argument("--timed", action="store_true", help="only what is timed")
    options = parser.parse_args()
    start(options)
    cases = json.loads((options.folder / "cases.json").read_text())
    cases = [c for c in cases if wanted(c["symbol"], options) and (c["timed"] or not options.timed)]
    wrong, rows = 0, []
    alike: dict[str, list[tuple[dict[str, Any], Kernel]]] = {}
    libraries = []
    for case in cases:
        library = Library((options.folder / f"{case['symbol']}.cubin").read_bytes(), case["symbol"])
        libraries.append(library)
        kernel = library.kernel(case["symbol"], shared=case["shared"])
        if "matrices" in case["spec"]:
            name = case["spec"]["name"].rpartition("_b")[0]
            key = json.dumps({**case["spec"], "name": name, "batch": None})
            alike.setdefault(key, []).append((case, kernel))
        if "eps" in case["spec"]:
            worst = max(check_quantize(case, kernel, style) for style in (*STYLES, "floor", "ties"))
            operands = {}
        else:
            operands, worst = check(case, kernel)
        status = "ok" if worst <= 1 else "WRONG"
        wrong += worst > 1
        line = f"{case['symbol']:24} {status:5} error/allowed {worst:8.3g}"
        if case["timed"] and worst <= 1 and not options.no_time:
            nbytes = sum(operands[m["name"], "data"].nbytes for m in case["spec"]["matrices"])
            plain, early = (time_case(case, kernel, operands, p) for p in (False, True))
            line += f"  {nbytes / 1e6:7.1f} MB  plain {plain:7.2f}"
            line += f"  programmatic {early:7.2f} us  {nbytes / early / 1e6:5.2f} TB/s"
        print(line, flush=True)
        rows.append(line)
        del operands
        torch.cuda.empty_cache()
    for same in alike.values():
        for line in check_rows(same) if len(same) > 1 else ():
            print(f"BITS DIFFER: {line}", flush=True)
            wrong += 1
        torch.cuda.empty_cache()
    print(f"{len(rows)} cases, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
