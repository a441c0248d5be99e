"""The router's gate: its products over many CTAs. Each CTA of the experts' kernel makes the choice."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Emission, Parameter, compose, floor_text
from dsv4c.codegen.lib.slices import Gate, RowGate
from dsv4c.errors import BuildError

MOST_SUMS = 32  # of a CTA, tokens times experts: a warp's lanes add up as many


@dataclass(frozen=True)
class RouterGateSpec:
    """x bf16[rows, hidden], gate bf16[experts, hidden] -> logits f32[rows, experts]."""

    rows: int
    hidden: int
    experts: int

    def gate(self, arch: Arch) -> Gate:
        """The cut: a CTA per SM at most, so that all weights are in flight at once, for as many rows as a
        warp's lanes can sum up; for more, as many times.

        Raises BuildError when rows do not split into whole warps, or an expert's CTA has too many of them.
        """
        each = next(
            n for n in range(1, self.experts + 1) if self.experts % n == 0 and self.experts // n <= arch.sms
        )
        threads = next((t for t in range(256, 0, -32) if self.hidden % (8 * t) == 0), 0)
        if threads == 0 or each > MOST_SUMS:
            raise BuildError(
                f"router of {self.hidden} columns x {self.experts} experts: want columns a multiple of 256 "
                f"and at most {MOST_SUMS} experts per CTA, not {each}"
            )
        tokens = min(self.rows, MOST_SUMS // each)
        return Gate(self.rows, tokens, self.hidden, self.experts, each, threads)


def emit_router_gate(spec: RouterGateSpec, arch: Arch) -> Emission:
    """The gate's products. Raises BuildError for shapes it cannot cut."""
    gate = spec.gate(arch)
    ctas = spec.experts // gate.rows
    nbytes = spec.experts * spec.hidden * 2 + spec.rows * spec.hidden * 2
    several, own = "s" if spec.rows > 1 else "", f"{gate.rows} expert{'s' if gate.rows > 1 else ''}"
    if gate.blocks > 1:
        ctas_text, own = f"{ctas} x {gate.blocks}", f"{own} and {gate.tokens} tokens"
    else:
        ctas_text = f"{ctas}"
    return compose(
        "router_gate",
        f"Router products: logits = x . gate, {spec.rows} token{several}, f32 accumulation.",
        {
            Parameter("x"): f"bf16[{spec.rows},{spec.hidden}]",
            Parameter("gate"): f"bf16[{spec.experts},{spec.hidden}]",
            Parameter("logits"): f"f32[{spec.rows},{spec.experts}]",
        },
        f"Launch: {ctas_text} CTAs x {gate.threads} threads, {own} each; {gate.shared} B shared each.\n"
        f"{floor_text(nbytes, arch)}",
        (
            "ptx.launch_dependents()",
            f"s = ptx.shared({gate.shared})",
            "at = router.enter(SPEC, m, s)",
            "ptx.wait()",
            "router.multiply(SPEC, s, at)",
        ),
        threads=gate.threads,
        grid=(ctas, gate.blocks, 1),
        spec=gate,
        record="router.GateOperands",
    )


def emit_router_rows(gate: RowGate, rows: int, arch: Arch, *, given: bool) -> Emission:
    """Logits of the experts that a table names, a token a CTA. `given`: tokens are the call's input."""
    nbytes = (gate.k + 1) * gate.hidden * 2
    first = ["at = router.look_up(SPEC, m)"]
    wait = ["ptx.wait()"]
    return compose(
        "router_rows",
        f"Router products of N tokens with their {gate.k} experts' rows of the gate, f32 accumulation.",
        {
            Parameter("row"): f"bf16[N,{gate.hidden}]",
            Parameter("gate"): f"bf16[{gate.experts},{gate.hidden}]",
            Parameter("table"): f"i32[*,{gate.k}]",
            Parameter("tokens", early=given): "i32[N]",
            Parameter("logits"): f"f32[N,{gate.experts}], of which those are written",
        },
        f"Launch: N CTAs x {gate.threads} threads; {gate.shared} B shared each.\n"
        f"{floor_text(nbytes, arch, 'token')}",
        (
            "ptx.launch_dependents()",
            f"s = ptx.shared({gate.shared})",
            *([*first, *wait] if given else [*wait, *first]),
            "router.multiply_rows(SPEC, m, s, at)",
        ),
        threads=gate.threads,
        grid=("rows", 1, 1),
        sizes={"rows": rows},
        spec=gate,
        record="router.RowsOperands",
    )
