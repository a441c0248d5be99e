"""State writes as launches of their own: what a chunk of many tokens leaves for later ones.

A chunk's tokens take places in rings that others of them still read. So the copies beside the windows and the
compressors' entries are made in a launch that overwrites nothing unread, and the compressors' rings in the
next one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

from dsv4c.codegen.emit import Emission, branches, compose, place_of
from dsv4c.codegen.kernels.riders import (
    THREADS,
    WRITTEN,
    CompressSpec,
    Rider,
    Riding,
    parameters_of,
    riding_of,
    seated,
    stage_of,
)
from dsv4c.codegen.registry import Answer, Launchable, No, Request, kernel, launchable


@dataclass(frozen=True)
class StateSpec:
    """State of `rows` rows, by stages that each get CTAs of their own, of `threads` threads."""

    name: str
    rows: int
    riders: tuple[Rider, ...]
    threads: int = THREADS


def emit_state(spec: StateSpec) -> Emission:
    """The kernel of a spec. Raises BuildError for rows that a CTA cannot hold."""
    riders = seated(spec.name, spec.riders, spec.threads)
    firsts = tuple(accumulate((rider.ctas(spec.rows) for rider in riders), initial=0))
    shared = max(rider.shared for rider in riders)
    texts = "\n".join(f"    {rider.text}" for rider in riders)
    stages = [stage_of(rider, place_of("block", first)) for rider, first in zip(riders, firsts, strict=False)]
    return compose(
        spec.name,
        f"{spec.name}: state of {spec.rows} rows.\n\n{texts}\n\n"
        f"N = {spec.rows}; positions: i32[N], of a sequence from its first row on, -1 for none (writes "
        "nothing);\nslots: i32[N], of S; frequencies: f32[32].",
        {p: "" for rider in riders for p in parameters_of(rider)},
        f"Launch: grid {firsts[-1]}, block {spec.threads}, {shared} bytes of shared memory, programmatic "
        "edges allowed.",
        [
            "ptx.launch_dependents()",
            f"s = ptx.shared({shared})",
            "block, _, _ = cute.arch.block_idx()",
            "tid, _, _ = cute.arch.thread_idx()",
            branches(stages, firsts[1:]),
        ],
        threads=spec.threads,
        grid=(firsts[-1], 1, 1),
        spec={rider.name.upper(): rider.shape(spec.threads) for rider in riders},
        record=None,
    )


# Binding ----------------------------------------------------------------------------------------------------


def state_launches(request: Request, riding: Riding, threads: int = THREADS) -> list[Launchable]:
    """The launches of a request's state writes: first what reads rings, then what compressors leave there.

    A compressor's sums have the order that a CTA's `threads` give them.
    """
    rows = request.types[riding.values["positions"]].shape[0]
    halves = [r for r in riding.riders if isinstance(r, CompressSpec) and r.half == "entries"]
    rings = {ring for r in halves for ring in (r.kv_ring, r.score_ring)}
    first = emit_state(StateSpec("state", rows, riding.riders, threads))
    launches = [launchable(request, first, riding.values, stage="state", read=rings)]
    if halves:
        writes = tuple(replace(r, half="rings") for r in halves)
        later = emit_state(StateSpec("rings", rows, writes, threads))
        launches.append(launchable(request, later, riding.values, stage="rings"))
    return launches


@kernel(*WRITTEN, several=True)
def state_writes(request: Request) -> Answer:
    """Where no product takes them along."""
    call = request.calls[0]
    rows = request.types[call.operands["kv"]].shape[0]
    riding = riding_of(request, rows)
    return riding if isinstance(riding, No) else state_launches(request, riding)
