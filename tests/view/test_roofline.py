"""Floors of launches: bytes and operations against a GPU's."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from dsv4c.arch import SM_90A
from dsv4c.compiler.compile import compile
from dsv4c.compiler.request import Request
from dsv4c.errors import ConfigError, GraphError
from dsv4c.ir.graph import Graph
from dsv4c.ir.text import parse_graph
from dsv4c.ir.totals import compulsory, totals
from dsv4c.plan.folder import Plan
from dsv4c.view.roofline import COLORS, roofline, svg, text
from tests.commands import command


def folded(name: str, bucket: str = "decode", **options: int) -> Graph:
    job = Request(name, **options).job()
    return job.compiled(job.bucket(bucket)).graph


@pytest.fixture(scope="module")
def flash() -> Graph:
    return folded("deepseek-v4-flash", max_context=8192)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return compile("tiny", max_context=128, certify=False)


def test_every_node_that_does_work_is_a_launch_and_its_work_counts(flash: Graph) -> None:
    found = roofline(flash, SM_90A)
    works = [(part.count, work) for part in found.parts for work in part.launches]
    figures = totals(flash)
    assert sum(count for count, _ in works) == figures.launches
    assert sum(count * work.flops for count, work in works) == figures.flops
    assert found.planned == figures.bytes
    assert found.compulsory == sum(compulsory(flash).values())
    assert found.compulsory_us < found.floor_us < 1.01 * found.compulsory_us


def test_a_projection_reads_its_codes_and_scales(flash: Graph) -> None:
    part = next(p for p in roofline(flash, SM_90A).parts if p.title == "layers.0")
    work = next(w for w in part.launches if w.op == "grouped_linear")
    assert work.weights == 8192 * 4096 + 8192 // 128 * 4096 // 128  # e4m3, one ue8m0 per 128 x 128
    assert work.flops == 2 * 8192 * 4096
    assert work.bound == "bytes"
    assert work.floor_us == pytest.approx(work.bytes / 4.45e12 * 1e6)


def test_long_chunks_are_bound_by_operations() -> None:
    found = roofline(folded("deepseek-v4-flash", "prefill", max_context=8192, chunk=4096), SM_90A)
    bounds = {work.op: work.bound for part in found.parts for work in part.launches}
    assert found.rows == 4096
    assert (bounds["grouped_linear"], bounds["hyper_norm"]) == ("operations", "bytes")


def test_what_stays_inside_a_launch_is_not_moved(plan: Plan) -> None:
    graph = parse_graph(plan.graph_text())
    alone = roofline(graph, SM_90A, layer=2)
    names = [w.name for w in alone.parts[0].launches]
    router = next(n for n in graph.nodes if n.op.name == "router" and n.scope.startswith("layers.2"))
    experts = next(n for n in graph.nodes if n.op.name == "swiglu" and n.scope.startswith("layers.2"))
    joined = roofline(graph, SM_90A, [(router.name, experts.name)], layer=2)
    assert len(joined.parts[0].launches) == len(names) - 1
    weights = router.outputs[1].type.nbytes  # made and read inside; the choice is read outside as well
    assert alone.planned - joined.planned >= 2 * weights
    assert joined.compulsory == alone.compulsory < roofline(graph, SM_90A).compulsory


def test_text_and_picture_name_every_launch(flash: Graph) -> None:
    found = roofline(flash, SM_90A)
    lines = text(found).splitlines()
    rows = [line for line in lines if line.startswith("  ") and "MFLOP" not in line]
    assert len(rows) == sum(len(part.launches) for part in found.parts)
    picture = ElementTree.fromstring(svg(found))
    bars = [r for r in picture.iter("{http://www.w3.org/2000/svg}rect") if r.get("fill") in COLORS.values()]
    assert len(bars) == 3 * len(rows) + 3  # and the legend's


def test_the_command(plan: Plan, tmp_path: Path) -> None:
    folder = plan.save(tmp_path / "tiny.plan")
    done = command("roofline", folder, "--json")
    assert done.code == 0
    found = done.json
    launches = {launch.nodes for launch in plan.program("decode").launches}
    assert sum(part["count"] * len(part["launches"]) for part in found["parts"]) == len(launches)
    assert found["gpu"] == "H200"
    assert command("roofline", "tiny", "--arch", "sm_100a", "--json").json["gpu"] == "B200"
    picture = tmp_path / "tiny.svg"
    assert command("roofline", folder, "--format", "svg", "-o", picture).code == 0
    assert picture.read_text().startswith("<svg ")
    unknown = command("roofline", "tiny", "--arch", "sm_90")
    assert unknown.code == ConfigError.exit_code
    assert "'sm_90' is no GPU that dsv4c knows, only sm_90a, sm_100a" in unknown.err
    missing = command("roofline", "tiny", "--layer", "9")
    assert missing.code == GraphError.exit_code
    assert "has no layer 'layers.9'" in missing.err
