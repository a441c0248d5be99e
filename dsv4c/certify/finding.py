"""What a comparison finds: the classes of difference, and the certificate of an application."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dsv4c.certify.application import Application

BIT_EXACT, REASSOCIATION, REQUANTIZATION, APPROXIMATE = (
    "bit-exact",
    "reassociation",
    "requantization",
    "approximate",
)
DIFFERENT = "different"
ORDER = (BIT_EXACT, REASSOCIATION, REQUANTIZATION, APPROXIMATE, DIFFERENT)


@dataclass(frozen=True)
class Finding:
    """One comparison; `worst` counts ulps, codes, or is a relative error."""

    kind: str
    worst: float
    reason: str


def worse(a: Finding, b: Finding) -> Finding:
    """The one of the worse class, or farther off in the same."""
    return max(a, b, key=lambda f: (ORDER.index(f.kind), f.worst))


@dataclass(frozen=True)
class Certificate:
    """What was found: `kind` is bit-exact, reassociation, requantization, approximate, or different.

    `allowed` is the worst kind that the fused op declares in `certified_as`; bit-exact unless it says so.
    """

    rule: str
    op: str
    operands: tuple[str, ...]
    count: int
    digest: str
    kind: str
    worst: float  # ulps, codes, or relative error, as the kind says
    patterns: tuple[str, ...]
    allowed: str = BIT_EXACT
    reduced: tuple[str, ...] = ()  # the operand types that were evaluated, where they were cut down
    reason: str = ""  # why it is `different`

    @property
    def holds(self) -> bool:
        return ORDER.index(self.kind) <= ORDER.index(self.allowed)

    def of_all_sizes(self, applied: Application) -> Certificate:
        """The certificate of an application, where this is that of its reduced sizes."""
        operands = tuple(map(str, applied.types))
        reduced = self.operands if self.operands != operands else ()
        return replace(self, operands=operands, count=applied.count, reduced=reduced)


def to_dict(certificate: Certificate) -> dict[str, Any]:
    """As plain data, for the plan: what JSON gives back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(certificate).items()}


def from_dict(record: Mapping[str, Any]) -> Certificate:
    """`to_dict` read back."""
    lists = {k: tuple(v) for k, v in record.items() if isinstance(v, list | tuple)}
    return Certificate(**{**record, **lists})
