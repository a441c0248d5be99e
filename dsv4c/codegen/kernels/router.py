"""The router's gate: its products over many CTAs. Each CTA of the experts' kernel makes the choice."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.codegen.emit import BANDWIDTH, Emission, Parameter, floor_us, render
from dsv4c.codegen.lib.slices import Gate
from dsv4c.errors import BuildError

CTAS = 132  # one per multiprocessor of an H200 at most, so that all weights are in flight at once


@dataclass(frozen=True)
class RouterGateSpec:
    """x bf16[rows, hidden], gate bf16[experts, hidden] -> logits f32[rows, experts]."""

    rows: int
    hidden: int
    experts: int

    @property
    def gate(self) -> Gate:
        """The cut. Raises BuildError when rows do not split into whole warps, or are too many."""
        each = next(
            n for n in range(1, self.experts + 1) if self.experts % n == 0 and self.experts // n <= CTAS
        )
        threads = next((t for t in range(256, 0, -32) if self.hidden % (8 * t) == 0), 0)
        if threads == 0 or each * self.rows > 32:
            raise BuildError(
                f"router of {self.rows} tokens x {self.hidden} columns x {self.experts} experts: want "
                f"columns a multiple of 256 and tokens times experts per CTA ({each}) at most 32"
            )
        return Gate(self.rows, self.hidden, self.experts, each, threads)


def emit_router_gate(spec: RouterGateSpec) -> Emission:
    """The gate's products. Raises BuildError for shapes it cannot cut."""
    gate = spec.gate
    ctas = spec.experts // gate.rows
    nbytes = spec.experts * spec.hidden * 2 + spec.rows * spec.hidden * 2
    parameters = tuple(map(Parameter, ("x", "gate", "logits")))
    source = render(
        "router_gate.py.jinja",
        symbol="router_gate",
        parameters=[p.name for p in parameters],
        gate=gate,
        ctas=ctas,
        nbytes=nbytes,
        floor=floor_us(nbytes),
        bandwidth=BANDWIDTH,
    )
    return Emission("router_gate_0", source, (ctas, 1, 1), gate.threads, gate.shared, parameters)
