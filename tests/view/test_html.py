"""The HTML page: what is in the file, and what a person does with it in a browser."""

from __future__ import annotations

import html as markup
import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from dsv4c.ir.graph import Builder, Graph
from dsv4c.ir.ops import silu
from dsv4c.ir.ops.math import Scale
from dsv4c.ir.text import print_graph
from dsv4c.types import BF16, TensorType
from dsv4c.view.diff import diff
from dsv4c.view.html import html
from dsv4c.view.launches import launched
from tests.codegen.lowered import gpu_plan
from tests.view.graphs import folded, official, plain

SOURCE = "def kernel():\n    return '</script>'\n"


def stages(name: str) -> list[tuple[str, Any]]:
    return [("build", plain(name)), ("quantize", official(name)), ("fold norms", folded(name))]


def page_data(page: str) -> Any:
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    )


@pytest.fixture(scope="module")
def flash() -> str:
    return html(stages("deepseek-v4-flash"), sources={"layers.4.attn_in_quantized": SOURCE})


def test_the_file_needs_nothing_else(flash: str) -> None:
    assert not re.search(r"""(?:src|href)=["'](?!data:)|https?://(?!www\.w3\.org)|@import|url\(""", flash)
    assert "{{" not in re.sub(r'<script type="application/json".*?</script>', "", flash, flags=re.DOTALL)


def test_pro_with_many_stages_is_small() -> None:
    graphs = [plain("deepseek-v4-pro"), official("deepseek-v4-pro"), folded("deepseek-v4-pro")]
    page = html([(f"stage {i}", graphs[min(i, 2)]) for i in range(12)])
    assert len(page.encode()) < 5_000_000


def test_equal_layers_are_stored_once(flash: str) -> None:
    data = page_data(flash)
    layers = [[g for g in stage["groups"] if g["members"][0]] for stage in data["stages"]]
    assert [[len(g["members"]) for g in groups] for groups in layers] == [[2, 1, 20, 20]] * 3
    assert (
        len(data["blocks"]) == 3 * 4 + 2
    )  # the frame, before and after the layers, is the same in all stages


def test_changes_are_those_of_the_diff(flash: str) -> None:
    """In every layer, equal ones included."""
    data, graphs = page_data(flash), [graph for _, graph in stages("deepseek-v4-flash")]
    assert data["stages"][0]["counts"] is None
    for stage, a, b in zip(data["stages"][1:], graphs, graphs[1:], strict=False):
        found = diff(a, b)
        counts = [len(found.new), len(found.changed), len(found.gone)]
        assert stage["counts"] == counts
        rows = [(data["changes"][g["change"]], len(g["members"])) for g in stage["groups"]]
        assert counts == [
            sum(len(change[0]) * times for change, times in rows),
            sum(len(change[1]) * times for change, times in rows),
            sum((len(block) - 1) * times for change, times in rows for block in change[2]),
        ]
    assert data["stages"][2]["counts"] == [0, 43, 43]


def moving(scope: str, factor: float) -> Graph:
    with Builder("g") as b:
        x = b.input("x", TensorType(BF16, (4,)))
        with b.scope("layers.0"):
            y = silu(x, name="kept")
        op = Scale(factor=factor)
        (z,) = b.emit(op, (y,), names=["layers.0.moved"], scope=scope)
        with b.scope("layers.1"):
            z = silu(z, name="end")
    return b.finish({"z": z})


def test_a_node_that_moves_to_another_layer_is_changed() -> None:
    """And not gone from the one and new in the other."""

    data = page_data(html([("a", moving("layers.0", 1.0)), ("b", moving("layers.1", 2.0))]))
    assert data["stages"][1]["counts"] == [0, 1, 0]
    first, second = data["stages"][1]["groups"]
    assert [data["changes"][g["change"]] for g in (first, second)] == [[[], [], []], [[], [0], []]]
    assert data["names"][data["blocks"][second["block"]]["nodes"][0][3][0]] == "-1.moved"


def test_a_layer_that_is_gone_is_named() -> None:
    def graph(layers: int) -> Graph:
        with Builder("g") as b:
            x = b.input("x", TensorType(BF16, (4,)))
            for i in range(layers):
                with b.scope(f"layers.{i}"):
                    x = silu(x, name="y")
        return b.finish({"x": x})

    stage = page_data(html([("a", graph(3)), ("b", graph(2))]))["stages"][1]
    assert (stage["vanished"], stage["counts"]) == (["layers.2"], [0, 0, 1])


def test_the_data_of_a_block_is_the_graph(flash: str) -> None:
    """Rebuild the names of a folded layer from the data and compare them with the graph's."""
    data = page_data(flash)
    group = next(g for g in data["stages"][1]["groups"] if "layers.30" in g["members"])
    rows = data["blocks"][group["block"]]["nodes"]
    found = [f"layers.30{data['names'][row[3][0]]}" for row in rows]
    wanted = [n.name for n in official("deepseek-v4-flash").nodes if n.scope.startswith("layers.30")]
    assert found == wanted
    assert [data["ops"][row[0]][0] for row in rows][:3] == ["reshape", "linear", "rsqrt_mean_square"]


@pytest.mark.parametrize("title", ["</script><b>x", "{{DATA}}", "<!--<script>", "a & 'b'"])
def test_a_title_is_text_and_nothing_else(title: str) -> None:
    name, graph = stages("tiny")[0]
    titled = Graph(title, graph.inputs, graph.states, graph.params, graph.nodes, graph.outputs)
    page = html([(name, titled)], title=title)
    assert f"<title>{markup.escape(title)}</title>" in page
    assert page_data(page)["stages"][0]["graph"] == title
    assert page.count("</script>") == 2  # the data and the program
    assert "<!--" not in page.partition('id="data">')[2].partition("</script>")[0]


def test_stages_need_distinct_names() -> None:
    with pytest.raises(ValueError, match=r"distinct names, at least one; got \['a', 'a'\]"):
        html([("a", plain("tiny")), ("a", plain("tiny"))])
    with pytest.raises(ValueError, match="at least one"):
        html([])


@pytest.fixture(scope="module")
def launches() -> dict[str, Any]:
    return launched(gpu_plan("tiny", certify=False, batch=1, verify=1, chunk=8), "decode")


def test_no_two_values_of_the_arena_are_at_one_place_at_one_time(launches: dict[str, Any]) -> None:
    bars = launches["values"]
    assert len(bars) > len(launches["launches"])
    for (a, _, at, size, first, last), (b, _, at2, size2, first2, last2) in combinations(bars, 2):
        together = first <= last2 and first2 <= last and at < at2 + size2 and at2 < at + size
        assert not together, f"{a} and {b}"
    assert max(at + size for _, _, at, size, _, _ in bars) <= launches["arena"]
    assert all(first <= last < len(launches["launches"]) for *_, first, last in bars)


# --- in a browser ---


@pytest.fixture
def page(browser: Any, flash: str, tmp_path: Path) -> Iterator[Any]:
    """A fresh load of Flash's page; the console must be silent when the test is over."""
    path = tmp_path / "flash.html"
    path.write_text(flash, encoding="utf-8")
    browser.open("about:blank")
    browser.complaints()
    browser.open(path.as_uri())
    yield browser
    assert browser.complaints() == []


def headings(page: Any) -> list[str]:
    return list(page.texts("#groups h3"))


def test_it_opens_on_the_last_stage(page: Any) -> None:
    assert page.texts('#stages button[aria-current="true"]') == [page.texts("#stages button")[2]]
    assert headings(page) == ["model", "layers.0 ×2", "layers.2", "layers.3 ×20", "layers.4 ×20", "output"]
    assert len(page.texts("#overview .map button")) == 43


def test_it_switches_stages_and_marks_what_changed(page: Any) -> None:
    page.click('#stages button[data-stage="quantize"]')
    assert page.hash() == "#quantize"
    page.click('[data-title="layers.4"] > header')
    assert "attn_in_quantized" in page.text('[data-title="layers.4"] .row.new')
    assert len(page.texts('[data-title="layers.4"] .row.changed')) > 10
    page.press("[")
    assert page.hash() == "#build"
    page.press("]")
    page.press("]")
    assert page.hash() == "#fold norms"
    page.click('[data-title="layers.4"] > header')
    assert "gone since quantize" in page.text('[data-title="layers.4"] .gones > summary')


def test_a_fused_op_opens_to_its_body_and_source(page: Any) -> None:
    page.click('[data-title="layers.4"] > header')
    page.click('[data-title="layers.4"] .row.changed .caret')
    assert page.texts('#groups [data-body="viewed_norm_quantize"] .op') == ["rms_norm", "quantize"]
    page.click('[data-title="layers.4"] .row.changed .op')
    assert page.texts("#details .body .op") == ["rms_norm", "quantize"]
    assert page.text("#details #source pre") == SOURCE
    assert "RMSNorm and quantization" in page.text("#details p")
    page.press("b")
    assert page.texts('#groups [data-body="viewed_norm_quantize"] .op') == []


def test_search_by_keyboard(page: Any) -> None:
    page.press("/")
    page.type("#query", "layers.30 viewed")
    assert page.texts("#hits li[data-name] .op") == ["viewed_norm_quantize"]
    page.press("Enter")
    assert page.hash() == "#fold norms/layers.30.attn_in_quantized"
    assert "layers.30.attn_in_quantized" in page.text("#details .name")
    assert page.text('[data-title="layers.4"] .members button[aria-pressed="true"]') == "30"
    page.press("Escape")
    assert page.text("#details").startswith("DetailsChoose a node")


def test_search_that_finds_nothing_says_so(page: Any) -> None:
    page.type("#query", "no such thing")
    assert page.texts("#hits li") == ["nothing in fold norms"]


def test_search_by_attribute_and_type(page: Any) -> None:
    page.type("#query", "quantize tail=64")
    shown = page.texts("#hits li[data-name]")
    assert shown
    assert all("quantize" in text for text in shown)


def test_a_link_leads_to_its_node(page: Any, tmp_path: Path) -> None:
    base = page.script("return location.href.split('#')[0]")
    page.open("about:blank")
    page.open(f"{base}#quantize/layers.17.attn.qa")
    assert page.text("#details .name") == "layers.17.attn.qa"
    assert page.text(".row.chosen .op") == "linear"
    page.click('#details [data-goto="layers.17.attn_in_quantized"]')
    assert page.hash() == "#quantize/layers.17.attn_in_quantized"
    assert "layers.17.attn.qa" in page.texts("#details [data-goto]")


def test_values_of_the_layer_before_are_links(page: Any) -> None:
    base = page.script("return location.href.split('#')[0]")
    page.open(f"{base}#build/layers.9.hc_attn.v")
    assert page.texts("#details [data-goto]")[0] == "layers.8.x_ffn"
    page.click('#details [data-goto="layers.8.x_ffn"]')
    assert "layers.9.hc_attn.v" in page.texts("#details [data-goto]")


def test_a_layer_as_a_graph(page: Any) -> None:
    page.click('[data-title="layers.3"] > header')
    page.click('[data-title="layers.3"] [data-tab="graph"]')
    nodes = [
        n
        for n in folded("deepseek-v4-flash").nodes
        if n.scope.startswith("layers.3.") or n.scope == "layers.3"
    ]
    assert len(page.texts(".canvas .box")) == len(nodes)
    box = "document.querySelector('.canvas [data-name=\"layers.3.attn.qa\"]')"
    page.script(f"{box}.dispatchEvent(new Event('click'))")
    assert page.text("#details .name") == "layers.3.attn.qa"
    assert len(page.texts(".canvas .edge.near")) == 2


def test_light_and_dark(page: Any) -> None:
    colors = "return getComputedStyle(document.body).backgroundColor"
    before = page.script(colors)
    page.click("#theme")
    assert page.script(colors) != before


def test_a_result_named_after_another_layer_has_its_whole_name(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "moved.html"
    path.write_text(html([("a", moving("layers.1", 1.0))]), encoding="utf-8")
    browser.open(path.as_uri())
    browser.click('[data-title="layers.1"] > header')
    assert browser.texts(".row > span:nth-child(2)") == ["layers.0.moved", "end"]


def test_every_stage_of_pro_opens(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "pro.html"
    path.write_text(html(stages("deepseek-v4-pro")), encoding="utf-8")
    browser.open("about:blank")
    browser.complaints()
    browser.open(path.as_uri())
    for stage in ("build", "quantize", "fold norms"):
        browser.click(f'#stages button[data-stage="{stage}"]')
        assert len(browser.texts("#overview .map button")) == 61
        opened = "document.querySelectorAll('.group:not(.open) > header').forEach((h) => h.click())"
        browser.script(opened)
        assert len(browser.texts("#groups .row[data-name]")) > 500
    assert browser.complaints() == []


def test_the_text_of_the_stages_is_untouched() -> None:
    """Making a page only reads its graphs."""
    graph = official("tiny")
    before = print_graph(graph)
    html([("one", graph)])
    assert print_graph(graph) == before


def test_the_launches_of_a_plan_and_their_arena(
    browser: Any, launches: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "plan.html"
    path.write_text(html([("build", plain("tiny"))], launches=launches), encoding="utf-8")
    browser.open("about:blank")
    browser.complaints()
    browser.open(path.as_uri())
    assert "1,227 nodes work" in browser.text('#stages button[data-stage="build"]')
    browser.click('#stages button[data-stage="launches"]')
    assert browser.hash() == "#launches"
    names = [name for name, *_ in launches["launches"]]
    assert browser.texts(".row.launch > span:nth-child(2)") == names
    assert len(browser.texts(".arena rect.bar")) == len(launches["values"])
    browser.click(f'.row.launch[data-name="{names[3]}"]')
    assert browser.hash() == f"#launches/{names[3]}"
    live = [v for v in launches["values"] if v[4] <= 3 <= v[5]]
    assert len(browser.texts(".arena rect.live")) == len(live)
    assert browser.text("#details h2") == f"Launch 4 of {len(names)}"
    browser.click('#stages button[data-stage="build"]')
    assert browser.texts(".row.launch") == []
    assert browser.complaints() == []
