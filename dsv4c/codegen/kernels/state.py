"""State writes as launches of their own: what a chunk of many tokens leaves for later ones.

A chunk's tokens take places in rings that others of them still read. So the copies beside the windows and the
compressors' entries are made in a launch that overwrites nothing unread, and the compressors' rings in the
next one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

from dsv4c.codegen.emit import Emission, render
from dsv4c.codegen.kernels.riders import THREADS, WRITTEN, CompressSpec, Rider, Riding, riding_of, seated
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
    parameters = tuple(dict.fromkeys(p for rider in riders for p in rider.parameters))
    firsts = tuple(accumulate((rider.ctas(spec.rows) for rider in riders), initial=0))
    shared = max(rider.shared for rider in riders)
    compress = any(isinstance(rider, CompressSpec) for rider in riders)
    store = any(not isinstance(rider, CompressSpec) for rider in riders)
    source = render(
        "state.py.jinja",
        spec=spec,
        riders=riders,
        pointers=[p.name for p in parameters],
        firsts=firsts,
        grid=firsts[-1],
        threads=spec.threads,
        shared=shared,
        libs=", ".join([*(["cache"] * store), *(["compress"] * compress), "ptx"]),
        shapes="Pool, Row" if compress else "Row",
    )
    return Emission(f"{spec.name}_0", source, (firsts[-1], 1, 1), spec.threads, shared, parameters)


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
