"""Marks of CTAs: what is written into a kernel's text, and what is made of what they say."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dsv4c.errors import PlanError
from dsv4c.plan.records import Launch
from dsv4c.runtime.trace import WORDS, Span, marked, perfetto, spans_of

PTX = """.version 8.8
.target sm_90a
.address_size 64

.visible .entry twice_0(
	.param .u64 twice_0_param_0
)
.reqntid 64, 1, 1
{
	.reg .pred 	%p<2>;

	// begin inline asm
	griddepcontrol.wait;
	// end inline asm
	@%p1 ret;
	bra 	$L__BB0_2;
$L__BB0_2:
	ret;

}
"""


def launch(name: str, kernel: str, *grid: int) -> Launch:
    code = SimpleNamespace(kernel=kernel, grid=grid)
    return cast(Launch, SimpleNamespace(name=name, op=kernel, nodes=(name,), kernel=code))


STEP = (launch("a", "one", 2, 1, 1), launch("b", "other", 1, 2, 1), launch("c", "one", 2, 1, 1))
NUMBERS = {"one": 0, "other": 1}


def row(number: int, cta: int, sm: int, begin: int, ready: int, end: int) -> list[int]:
    found = [begin, ready, end, cta << 32 | number, sm]
    assert len(found) == WORDS
    return found


RECORDS = [
    row(1, 1, 1, 1130, 1210, 1300),
    row(0, 0, 0, 1000, 1000, 1100),
    row(0, 1, 1, 1010, 1010, 1120),
    row(0, 1, 1, 1320, 1340, 1400),
    row(1, 0, 0, 1090, 1200, 1310),
    row(0, 0, 0, 1330, 1330, 1390),
]


def test_every_way_out_of_a_kernel_goes_by_the_marks() -> None:
    text = marked(PTX, 7, 41)
    assert re.findall(r"^.*\bret;", text, re.MULTILINE) == ["\tret;"]
    assert (
        text.index("\t@%p1 bra $MARK_END;") < text.index("\n$MARK_END:") < text.index("\n$MARK_OUT:\n\tret;")
    )
    assert text.count("%globaltimer") == 3
    assert text.count("\n.maxnreg 48\n{\n") == 1
    assert re.search(r"griddepcontrol\.wait;\n\tmov\.u64 %mark_d1, %globaltimer;", text)
    assert "mov.u32 %mark_r9, 7;" in text
    assert text.index(".global .align 8 .b64 dsv4c_marks;") < text.index(".entry")
    assert text.count("{\n") == text.count("}\n") == 1


@pytest.mark.parametrize("text", ["", PTX + PTX, PTX.replace(".entry", ".func")])
def test_what_is_not_one_kernel_gets_no_marks(text: str) -> None:
    with pytest.raises(PlanError, match="not that of one kernel"):
        marked(text, 0, 41)


def test_marks_belong_to_launches_by_their_order() -> None:
    spans = spans_of(STEP, NUMBERS, RECORDS)
    assert spans == [
        Span(0, 0, 0, 0, 0, 100),
        Span(0, 1, 1, 10, 10, 120),
        Span(1, 0, 0, 90, 200, 310),
        Span(1, 1, 1, 130, 210, 300),
        Span(2, 1, 1, 320, 340, 400),
        Span(2, 0, 0, 330, 330, 390),
    ]


@pytest.mark.parametrize("lost", range(len(RECORDS)))
def test_a_mark_that_is_lost_is_said(lost: int) -> None:
    with pytest.raises(PlanError, match=r"launch \d, [abc]: . marks, not one of each of its 2 CTAs"):
        spans_of(STEP, NUMBERS, [r for i, r in enumerate(RECORDS) if i != lost])


def test_slices_of_a_track_do_not_overlap() -> None:
    events = perfetto(STEP, spans_of(STEP, NUMBERS, RECORDS))["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names == {0: "launches", 1: "SM 0", 2: "SM 1"}
    slices = [e for e in events if e["ph"] == "X"]
    assert [(e["name"], e["ts"], e["dur"]) for e in slices if e["pid"] == 0] == [
        ("a", 0.0, 0.12),
        ("b", 0.09, 0.22),
        ("c", 0.32, 0.08),
    ]
    by_track: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in slices:
        if event["pid"] and event["name"] != "wait":
            by_track.setdefault((event["pid"], event["tid"]), []).append(event)
    assert {key: [e["name"] for e in own] for key, own in by_track.items()} == {
        (1, 0): ["a", "c"],
        (1, 1): ["b"],
        (2, 0): ["a", "b", "c"],
    }
    waits = {(e["pid"], e["ts"]): e["dur"] for e in slices if e["name"] == "wait"}
    assert waits == {(1, 0.09): 0.11, (2, 0.13): 0.08, (2, 0.32): 0.02}
