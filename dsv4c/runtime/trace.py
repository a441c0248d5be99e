"""When every CTA of a step begins, has waited and ends: marks of the GPU's nanosecond clock.

Marks are written into the kernels' PTX, which the driver then assembles, so that a plan carries none: at its
begin, behind its wait for predecessors and at its end the first thread of a CTA reads the clock. A record per
CTA goes to the next free place of a buffer; which launch it belongs to follows from the order, as all CTAs of
a launch begin before those of the next one of its kernel do.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from dsv4c.errors import PlanError
from dsv4c.plan.cubin import read_cubin
from dsv4c.plan.folder import Plan
from dsv4c.plan.records import Launch
from dsv4c.runtime import driver
from dsv4c.runtime.bench import Clock, fill_caches
from dsv4c.runtime.cuda import CudaExecutor

WORDS = 5
"""Of a record, 8 bytes each: begin, ready and end in nanoseconds; the kernel's number below the CTA's, which
counts rows of the grid one after the other; the SM.
"""
_HEAD = 8  # words before the records: how many there are, then nothing
_PLACE = "dsv4c_marks"
_DECLARED = f".visible .global .align 8 .b64 {_PLACE};\n\n"
_WAIT = "griddepcontrol.wait;"
_LEAST = 24  # registers that marks take on their own

_BEGIN = """
	.reg .pred %mark_p;
	.reg .b32 %mark_r<10>;
	.reg .b64 %mark_d<7>;
	mov.u64 %mark_d0, %globaltimer;
	mov.u64 %mark_d1, %mark_d0;
"""
_READY = f"""{_WAIT}
	mov.u64 %mark_d1, %globaltimer;"""
_END = f"""
$MARK_END:
	mov.u32 %mark_r0, %tid.x;
	setp.ne.u32 %mark_p, %mark_r0, 0;
	@%mark_p bra $MARK_OUT;
	mov.u64 %mark_d2, %globaltimer;
	mov.u32 %mark_r1, %ctaid.x;
	mov.u32 %mark_r2, %ctaid.y;
	mov.u32 %mark_r3, %ctaid.z;
	mov.u32 %mark_r4, %nctaid.x;
	mov.u32 %mark_r5, %nctaid.y;
	mad.lo.u32 %mark_r6, %mark_r3, %mark_r5, %mark_r2;
	mad.lo.u32 %mark_r7, %mark_r6, %mark_r4, %mark_r1;
	mov.u32 %mark_r8, %smid;
	mov.u32 %mark_r9, NUMBER;
	ld.global.b64 %mark_d3, [{_PLACE}];
	atom.global.add.u64 %mark_d4, [%mark_d3], 1;
	mad.lo.u64 %mark_d5, %mark_d4, {8 * WORDS}, %mark_d3;
	cvt.u64.u32 %mark_d6, %mark_r8;
	st.global.b64 [%mark_d5+{8 * _HEAD}], %mark_d0;
	st.global.b64 [%mark_d5+{8 * _HEAD + 8}], %mark_d1;
	st.global.b64 [%mark_d5+{8 * _HEAD + 16}], %mark_d2;
	st.global.v2.b32 [%mark_d5+{8 * _HEAD + 24}], {{%mark_r9, %mark_r7}};
	st.global.b64 [%mark_d5+{8 * _HEAD + 32}], %mark_d6;
$MARK_OUT:
	ret;
"""


@dataclass(frozen=True)
class Span:
    """A CTA of a launch: its place in the grid, its SM, and nanoseconds from the step's first mark on."""

    launch: int
    cta: int
    sm: int
    begin: int
    ready: int
    end: int


def marked(ptx: str, number: int, registers: int) -> str:
    """A kernel's PTX with marks that say `number`, for at most as many registers as the kernel has without:
    with more of them, fewer CTAs would fit an SM. Raises PlanError if it is not one kernel alone.
    """
    head, opened, body = ptx.partition("\n{\n")
    if not opened or ptx.count(".entry") != 1 or ".func" in ptx:
        raise PlanError("the PTX to be marked is not that of one kernel, without functions beside it")
    head = head.replace(".address_size 64\n", ".address_size 64\n\n" + _DECLARED, 1)
    head += f"\n.maxnreg {-(-max(registers, _LEAST) // 8) * 8}"  # an SM gives out eight at a time
    body, closed, tail = body.rpartition("\n}")
    body = re.sub(r"^(\s*(?:@!?%\w+\s+)?)ret;", r"\1bra $MARK_END;", body, flags=re.MULTILINE)
    body = body.replace(_WAIT, _READY)
    return head + opened + _BEGIN + body + _END.replace("NUMBER", str(number)) + closed + tail


def spans_of(
    launches: Sequence[Launch], numbers: Mapping[str, int], records: Iterable[Sequence[int]]
) -> list[Span]:
    """Records of `WORDS` words by launch; `numbers` are the kernels'. Raises PlanError where a launch's CTAs
    are not all there.
    """
    found = defaultdict[int, list[tuple[int, int, int, int, int]]](list)
    for begin, ready, end, place, sm in records:
        found[place & 0xFFFFFFFF].append((begin, ready, end, place >> 32, sm))
    for of_kernel in found.values():
        of_kernel.sort()
    first = min((of_kernel[0][0] for of_kernel in found.values()), default=0)
    spans, taken = [], defaultdict[int, int](int)
    for i, launch in enumerate(launches):
        x, y, z = launch.kernel.grid
        number, count = numbers[launch.kernel.kernel], x * y * z
        at = taken[number]
        own = found[number][at : at + count]
        if sorted(cta for *_, cta, _ in own) != list(range(count)):
            raise PlanError(
                f"launch {i}, {launch.name}: {len(own)} marks, not one of each of its {count} CTAs"
            )
        taken[number] = at + count
        spans += [Span(i, cta, sm, b - first, r - first, e - first) for b, r, e, cta, sm in own]
    return spans


def record(plan: Plan, weights: torch.Tensor, bucket: str, position: int) -> list[Span]:
    """Every CTA of one replay of a bucket's step at `position` tokens, after two that do not count, on a
    block of weights and random caches. Times are a little longer than without marks.

    Raises PlanError for a plan of several ranks, DriverError where the driver cannot assemble a kernel.
    """
    if plan.ranks > 1:
        raise PlanError(f"plan {plan.name} is for {plan.ranks} ranks; a trace is of one GPU")
    program = plan.program(bucket)
    kernels = sorted({launch.kernel.kernel for launch in program.launches})
    numbers = {kernel: number for number, kernel in enumerate(kernels)}
    records = {kernel: plan.kernels[kernel] for kernel in kernels}
    registers = {k: read_cubin(plan.files[records[k]["cubin"]]).resources.registers for k in kernels}
    texts = [marked(plan.files[records[k]["ptx"]].decode(), numbers[k], registers[k]) for k in kernels]
    device = torch.cuda.current_device()

    def join_context() -> None:  # a thread has none of its own
        torch.cuda.synchronize(device)

    with ThreadPoolExecutor(os.cpu_count(), initializer=join_context) as pool:
        cubins = list(pool.map(driver.assemble, texts, kernels))
    files = {**plan.files, **{records[k]["cubin"]: cubin for k, cubin in zip(kernels, cubins, strict=True)}}
    executor = CudaExecutor(replace(plan, files=files, buckets={program.shape.name: program}), weights)
    fill_caches(executor)
    ctas = sum(x * y * z for x, y, z in (launch.kernel.grid for launch in program.launches))
    marks = torch.zeros(_HEAD + WORDS * ctas, dtype=torch.int64, device="cuda")
    for kernel in kernels:
        executor.libraries[kernel].set_pointer(_PLACE, marks.data_ptr())
    clock = Clock(executor, program.shape.name, position, 1)
    graphs = [step.graph_of(range(len(program.launches))) for step in executor.bound(program.shape.name)]
    for _ in range(3):
        marks.zero_()
        clock.once(graphs)
    rows = marks[_HEAD:].view(-1, WORDS)[: int(marks[0])]
    return spans_of(program.launches, numbers, rows.tolist())


def perfetto(launches: Sequence[Launch], spans: Sequence[Span]) -> dict[str, Any]:
    """The Trace Event Format, which ui.perfetto.dev and chrome://tracing open: a process of launches, and one
    for each SM with as many tracks as CTAs ran side by side; within a CTA's slice its wait.
    """
    events: list[dict[str, Any]] = [_named("process_name", "launches", 0)]

    def slice_(name: str, pid: int, tid: int, begin: int, end: int, **about: object) -> None:
        times = {"ts": begin / 1e3, "dur": (end - begin) / 1e3}
        events.append({"name": name, "ph": "X", "pid": pid, "tid": tid, **times, "args": about})

    by_launch = defaultdict[int, list[Span]](list)
    for span in spans:
        by_launch[span.launch].append(span)
    for i, own in by_launch.items():
        begin, end = min(s.begin for s in own), max(s.end for s in own)
        launch = launches[i]
        slice_(launch.name, 0, i % 2, begin, end, op=launch.op, nodes=list(launch.nodes), ctas=len(own))
    free = defaultdict[int, list[int]](list)  # by SM: when each of its tracks is free
    for span in sorted(spans, key=lambda s: s.begin):
        tracks = free[span.sm]
        track = next((t for t, until in enumerate(tracks) if until <= span.begin), len(tracks))
        tracks[track : track + 1] = [span.end]
        name = launches[span.launch].name
        slice_(name, 1 + span.sm, track, span.begin, span.end, cta=span.cta)
        if span.ready > span.begin:
            slice_("wait", 1 + span.sm, track, span.begin, span.ready)
    events += [_named("process_name", f"SM {sm}", 1 + sm) for sm in sorted(free)]
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def _named(what: str, name: str, pid: int) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "args": {"name": name}}
