"""Router kernels: the gate's products over many CTAs, then the choice of experts by one CTA per token.

Two launches: a last-CTA finish would need a fence, an atomic and a counter that somebody resets. (Not
compared; on an H200, 2026-11-21, both together take 2.8 us for 256 experts of 4096 columns.)
"""

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


@dataclass(frozen=True)
class RouterChoiceSpec:
    """logits f32[rows, experts] -> experts i32[rows, k], weights f32[rows, k].

    Dense: bias f32[experts]; a thread per expert. Hashed: table i32[vocabulary, k], ids i32[rows].
    """

    rows: int
    experts: int
    k: int
    factor: float
    hashed: bool = False
    eps: float = 0.0


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


def emit_router_choice(spec: RouterChoiceSpec) -> Emission:
    """The choice of experts. Raises BuildError when k exceeds the experts or a warp."""
    threads = 32 if spec.hashed else -(-spec.experts // 32) * 32
    if spec.k > min(32, spec.experts) or threads > 1024:
        raise BuildError(
            f"router choice of {spec.k} among {spec.experts} experts: at most 32 among at most 1024"
        )
    shared = 0 if spec.hashed else threads * 12  # biases, scores, their order
    symbol = "router_hash" if spec.hashed else "router_topk"
    n = spec.rows
    types = {"logits": f"f32[{n},{spec.experts}]"}
    types |= (
        {"table": f"i32[*,{spec.k}]", "ids": f"i32[{n}]"} if spec.hashed else {"bias": f"f32[{spec.experts}]"}
    )
    types |= {"experts": f"i32[{n},{spec.k}]", "weights": f"f32[{n},{spec.k}]"}
    parameters = tuple(map(Parameter, types))
    source = render(
        "router_choice.py.jinja",
        symbol=symbol,
        parameters=[p.name for p in parameters],
        signature="\n".join(f"{p.name}: {types[p.operand]}" for p in parameters),
        rows=spec.rows,
        experts=spec.experts,
        k=spec.k,
        factor=spec.factor,
        hashed=spec.hashed,
        eps=spec.eps,
        threads=threads,
        shared=shared,
    )
    return Emission(f"{symbol}_0", source, (spec.rows, 1, 1), threads, shared, parameters)
