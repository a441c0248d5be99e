"""Rows to NVFP4, for the GEMVs that take them so: a CTA per row, with RMSNorm first where wanted.

A row's codes depend on the largest of all its elements, so it is quantized once, not by each of its readers.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.codegen.emit import Emission, Parameter, render
from dsv4c.errors import BuildError

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
    threads = min(THREADS, -(-spec.k // 512) * 32)
    gain = () if spec.eps is None else (Parameter("gain"),)
    q = (Parameter("q"), Parameter("q", "scale"), Parameter("q", "global_scale"))
    parameters = (Parameter("x"), *gain, *q)
    pointers = [p.name for p in parameters]
    source = render("quantize.py.jinja", spec=spec, threads=threads, pointers=pointers)
    return Emission(f"{spec.name}_0", source, (spec.rows, 1, 1), threads, 256, parameters)
