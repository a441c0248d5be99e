"""How far two results are apart: bit-exact, a few ulps, one code, a relative error, or different."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4c.certify.finding import (
    APPROXIMATE,
    BIT_EXACT,
    DIFFERENT,
    REASSOCIATION,
    REQUANTIZATION,
    Finding,
    worse,
)
from dsv4c.numerics.codec import Quantized, Value, type_of

ULPS = 4  # more than this is no longer another order of the same sum
BOUND = 2.0**-7  # relative error, in the norm of the whole result, that is still an approximation


def compare(expected: Sequence[Value], found: Sequence[Value], where: str) -> Finding:
    """The worst difference over all values. Bits decide: -0 is not 0, and NaN equals NaN."""

    if len(expected) != len(found):
        return Finding(DIFFERENT, 0.0, f"{where}: {len(found)} values instead of {len(expected)}")
    worst = Finding(BIT_EXACT, 0.0, "")
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        if type_of(a) != type_of(b):
            return Finding(DIFFERENT, 0.0, f"{where}: value {i} is {type_of(b)} instead of {type_of(a)}")
        worst = worse(worst, _difference(a, b, f"{where}: value {i}"))
    return worst


def _difference(a: Value, b: Value, where: str) -> Finding:

    if isinstance(a, Quantized) and isinstance(b, Quantized):
        worst = _codes(a.data, b.data, where)
        for x, y in zip(a.parts[1:], b.parts[1:], strict=True):
            worst = worse(worst, _numbers(x, y, where))
        return worst
    assert not isinstance(a, Quantized)
    assert not isinstance(b, Quantized)
    return _numbers(a, b, where)


def _same_bits(a: Tensor, b: Tensor) -> bool:

    if not a.is_floating_point():
        return torch.equal(a, b)
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(width), b.contiguous().view(width))


def _codes(a: Tensor, b: Tensor, where: str) -> Finding:

    if _same_bits(a, b):
        return Finding(BIT_EXACT, 0.0, "")
    x, y = _ordered(a), _ordered(b)
    if a.dtype is torch.uint8:  # two e2m1 codes in a byte: sign and magnitude
        pairs = [(v >> 4, v & 15) for v in (a.to(torch.int32), b.to(torch.int32))]
        signed = [[torch.where(n >= 8, 8 - n, n) for n in pair] for pair in pairs]
        far = max(int((p - q).abs().max()) for p, q in zip(*signed, strict=True))
    else:
        far = int((x - y).abs().max())
    if far <= 1:
        return Finding(REQUANTIZATION, far, f"{where}: {far} code")
    return Finding(DIFFERENT, far, f"{where}: codes differ by {far}")


def _numbers(a: Tensor, b: Tensor, where: str) -> Finding:

    if _same_bits(a, b):
        return Finding(BIT_EXACT, 0.0, "")
    same_nan = torch.zeros_like(a, dtype=torch.bool)
    if a.is_floating_point():
        same_nan = torch.isnan(a.to(torch.float32)) & torch.isnan(b.to(torch.float32))
    x, y = _ordered(a), _ordered(b)
    apart = ((x - y).abs()).masked_fill(same_nan, 0)
    far = int(apart.max()) if apart.numel() else 0
    if far == 0:
        return Finding(BIT_EXACT, 0.0, "")
    if not a.is_floating_point():
        return Finding(DIFFERENT, far, f"{where}: integers differ by {far}")
    if far <= ULPS:
        return Finding(REASSOCIATION, far, f"{where}: {far} ulp")
    wide, other = a.to(torch.float64), b.to(torch.float64)
    error = (
        float((wide - other).norm() / wide.norm())
        if bool((wide.isfinite() & other.isfinite()).all())
        else 1.0
    )
    kind = APPROXIMATE if error <= BOUND else DIFFERENT
    return Finding(kind, error, f"{where}: relative error {error:.3g}")


def _ordered(x: Tensor) -> Tensor:
    """Integers in the order of the values: neighbors differ by one, -0 and 0 too."""

    widths = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if x.dtype in (torch.uint8, torch.int32, torch.int64):
        return x.to(torch.int64)
    bits = x.view(widths[x.element_size()]).to(torch.int64)
    smallest = -(1 << (8 * x.element_size() - 1))
    return torch.where(bits < 0, smallest - bits - 1, bits)
