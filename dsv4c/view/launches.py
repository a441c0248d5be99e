"""A plan's bucket as data for the HTML page: launches in order, and what lies in the arena while they run."""

from __future__ import annotations

from typing import Any

from dsv4c.plan.folder import Plan
from dsv4c.plan.records import KernelCode, Launch
from dsv4c.scope import Scope


def launched(plan: Plan, bucket: str) -> dict[str, Any]:
    """`launches` are [name, op, nodes, layer, kernel, what it is launched with]; `values` of the arena are
    [name, layer, offset, bytes, first launch, last launch], scratch under the name of its launch.
    """
    program = plan.program(bucket)
    spans: dict[tuple[str, int], list[int]] = {}
    written: dict[int, tuple[str, int]] = {}  # by offset, what was last written there
    for number, launch in enumerate(program.launches):
        for a in launch.arguments:
            if a.space != "arena":
                continue
            own = -1 if a.value in program.values else number  # scratch lives no longer than its launch
            key = a.value, own
            if key not in spans and a.access in ("r", "early"):
                key = written.get(a.offset, key)  # a view goes by the name of what it is a view of
            written[a.offset] = key
            begin, end, first, _ = spans.get(key, [a.offset, a.offset, number, number])
            spans[key] = [min(begin, a.offset), max(end, a.offset + a.nbytes), first, number]
    values = []
    for (name, own), (begin, end, first, last) in spans.items():
        shown = name if own < 0 else f"{program.launches[own].name}: {name}"
        values.append([shown, Scope.of(name).layer, begin, end - begin, first, last])
    return {
        "bucket": program.shape.name,
        "target": plan.target,
        "arena": program.arena_bytes,
        "kernels": len({launch.kernel.kernel for launch in program.launches}) if plan.kernels else 0,
        "launches": [_launch(plan, launch) for launch in program.launches],
        "values": values,
    }


def _launch(plan: Plan, launch: Launch) -> list[Any]:
    symbol, how, code = "", "", launch.code
    if isinstance(code, KernelCode):
        symbol = plan.kernels[code.kernel]["symbol"]
        how = f"{'×'.join(map(str, code.grid))} CTAs of {code.block} threads, {code.shared:,} B shared"
        if code.programmatic:
            how += ", may start while the one before it ends"
    return [launch.name, launch.op, list(launch.nodes), Scope.of(launch.name).layer, symbol, how]
