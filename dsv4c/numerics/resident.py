"""Weights as they lie in memory: in which forms, and what their arrays take. Needs no torch."""

from __future__ import annotations

import math

from dsv4c.numerics.forms import parse_packing
from dsv4c.types import BF16, QuantType, Type

PLAIN, WIDENED = "plain", "f32"
"""Forms beside packings: as the type says, and bf16 widened."""


def component_bytes(type_: Type, form: str) -> dict[str, int]:
    """Bytes of a weight's arrays, by component. Block scales may lie inside of the packed data.

    Raises ValueError for a form that weights of the type do not have.
    """
    plain = {c.name: c.nbytes for c in type_.components}
    if form == PLAIN:
        return plain
    if form == WIDENED:
        if isinstance(type_, QuantType) or type_.dtype is not BF16:
            raise ValueError(f"{WIDENED} is a form of bf16 weights, not of {type_}")
        return {"data": 2 * plain["data"]}
    packing = parse_packing(form)
    *lead, rows, columns = type_.shape
    own = {n: size for n, size in plain.items() if n != "scale" or not packing.holds_scales}
    return own | {"data": math.prod(lead) * packing.nbytes(rows, columns)}
