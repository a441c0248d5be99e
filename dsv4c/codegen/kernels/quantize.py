"""Rows to NVFP4, for the GEMVs that take them so: a CTA per row, with RMSNorm first where wanted.

A row's codes depend on the largest of all its elements, so it is quantized once, not by each of its readers:
a launch of its own beside theirs, which other families ask for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dsv4c.codegen.emit import Emission, Parameter, compose
from dsv4c.codegen.lib.slices import Nvfp4Row
from dsv4c.codegen.registry import Launchable, Request, Scratch, launchable
from dsv4c.errors import BuildError
from dsv4c.types import BF16, NVFP4_ROW, QuantType, TensorType, Type

THREADS = 512
LONGEST = 32768  # a thread holds 64 floats of such a row


@dataclass(frozen=True)
class QuantizeSpec:
    """x bf16[rows, k] -> q NVFP4[rows, k] with a global scale per row, of rms_norm(x) if `eps` is given: then
    with operand gain bf16[k].
    """

    name: str
    rows: int
    k: int
    eps: float | None = None


def emit_quantize(spec: QuantizeSpec) -> Emission:
    """The kernel of a spec. Raises BuildError for rows that it cannot cut."""
    if spec.k % 16 or spec.k > LONGEST:
        raise BuildError(f"{spec.name}: rows of {spec.k}: want blocks of 16, at most {LONGEST} columns")
    row = Nvfp4Row(spec.k, threads=min(THREADS, -(-spec.k // 512) * 32), eps=spec.eps)
    normed = spec.eps is not None
    norm = f"    y = bf16(x * rsqrt(mean(x^2) + {spec.eps}) * gain)\n" if normed else ""
    return compose(
        spec.name,
        f"{spec.name}: N rows to NVFP4.\n\n"
        f"{norm}    q = nvfp4({'y' if normed else 'x'}), with global scale max|row| / (6 * 448)",
        {
            Parameter("x"): f"bf16[N,{spec.k}]",
            Parameter("gain"): f"bf16[{spec.k}]" if normed else None,
            Parameter("q"): f"{NVFP4_ROW}[N,{spec.k}]",
            Parameter("q", "scale"): "its block scales",
            Parameter("q", "global_scale"): "its global scales, f32[N]",
        },
        f"Launch: a CTA of {row.threads} threads per row; 256 B shared each. Reads {2 * spec.k} B per row.",
        ("ptx.launch_dependents()", "s = ptx.shared(256)", "ptx.wait()", "nvfp4.quantize_row(SPEC, m, s)"),
        threads=row.threads,
        grid=("vectors", 1, 1),
        sizes={"vectors": spec.rows},
        spec=row,
    )


# Binding ----------------------------------------------------------------------------------------------------


def scratch_for(name: str, type_: Type, access: str) -> dict[str, Scratch]:
    """Scratch for a value of this type: an array per component."""
    suffixed = {name if c.name == "data" else f"{name}_{c.name}": c.nbytes for c in type_.components}
    return {n: Scratch(n, nbytes, access) for n, nbytes in suffixed.items()}


def quantize_rows(
    request: Request,
    values: dict[str, int],
    shape: Sequence[int],
    name: str = "q",
    eps: float | None = None,
    x: str = "x",
) -> Launchable:
    """bf16 rows to NVFP4. What `values` do not bind, of `x` and `q`, are scratch "row" and `name`."""
    *lead, k = shape
    spec = QuantizeSpec("quantize" if eps is None else "norm_quantize", math.prod(lead), k, eps)
    scratch: dict[str, Scratch] = {}
    if "x" not in values:
        scratch["x"] = scratch_for("row", TensorType(BF16, tuple(shape)), "r")["row"]
    if "q" not in values:
        arrays = scratch_for(name, QuantType(NVFP4_ROW, tuple(shape)), "w")
        scratch |= {f"q{n.removeprefix(name)}": array for n, array in arrays.items()}
    return launchable(request, emit_quantize(spec), values, stage=f"quantize_{x}", scratch=scratch)
