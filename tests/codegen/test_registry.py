"""Kernels are chosen by op, types and target; every refusal says why."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

import pytest

from dsv4c.arch import SM_90A, SM_100A, Arch
from dsv4c.codegen.build import LIB
from dsv4c.codegen.registry import Launchable, Request, choose, request_of
from dsv4c.errors import BuildError
from dsv4c.ir.graph import Builder, Graph, Node, Value
from dsv4c.ir.ops import add, candidates, linear, positions, present
from dsv4c.passes.fusions.attention import Attention
from dsv4c.passes.fusions.compressor import Compressor
from dsv4c.passes.fusions.experts_down import ExpertsDown
from dsv4c.passes.fusions.index_topk import IndexTopk
from dsv4c.passes.fusions.indexer import Indexer
from dsv4c.passes.fusions.kv_norm_rope_store import KvNormRopeStore
from dsv4c.passes.fusions.q_norm_quantize import QNormQuantize
from dsv4c.passes.fusions.quantize_linear import QuantizeLinear
from dsv4c.passes.fusions.router import HashRouter, Router
from dsv4c.passes.fusions.swiglu import HashSwiglu, Swiglu
from dsv4c.types import BF16, F32, FP8_ROW, FP8_WEIGHT, MXFP4, NVFP4, NVFP4_ROW, QuantFormat, parse_type
from tests.codegen.lowered import TUNED

Values = Callable[..., Value]


def graph_of(make: Callable[[Values, Values], object]) -> Graph:
    """A graph whose operands are declared on the way: `param(name, type)` and `state(name, type)`."""
    with Builder("test") as b:

        def param(name: str, text: str) -> Value:
            return b.param(name, parse_type(text))

        def state(name: str, text: str) -> Value:
            return b.state(name, parse_type(text))

        made = make(param, state)
    results = made if isinstance(made, tuple) else (made,)
    return b.finish({str(i): v for i, v in enumerate(results)})


def requests(graph: Graph, arch: Arch = SM_90A) -> list[Request]:
    """One request per node."""
    return [request_of([node], arch, graph.users, {})[0] for node in graph.nodes]


def together(graph: Graph, *nodes: Node, labels: dict[Value, str] | None = None) -> tuple[Launchable, ...]:
    return choose(request_of(nodes or graph.nodes, SM_90A, graph.users, labels or {})[0], TUNED)


def refused(graph: Graph) -> str:
    with pytest.raises(BuildError) as error:
        together(graph)
    return str(error.value)


def test_no_candidate_names_op_types_and_target() -> None:
    graph = graph_of(lambda p, _: add(p("a", "bf16[1,8]"), p("b", "bf16[1,8]")))
    text = refused(graph)
    assert "no kernel for add(" in text
    assert "bf16[1,8]" in text
    assert "sm_90a" in text
    assert "no kernel is registered for add" in text


@pytest.mark.parametrize(
    ("x", "w", "why"),
    [
        ("f32[1,256]", "bf16[128,256]", "multiplies rows of bf16"),
        ("q[e2m1,e4m3,1x16,row][1,256]", f"{FP8_WEIGHT}[128,256]", "multiplies q[e4m3,ue8m0,1x128] rows"),
        ("bf16[1,256]", "q[e4m3,ue8m0,1x128][128,256]", "takes weights of bf16"),
        ("bf16[1,256]", "bf16[124,256]", "multiples of 8"),
    ],
)
def test_a_linear_layer_is_refused_with_the_reason(x: str, w: str, why: str) -> None:
    text = refused(graph_of(lambda p, _: linear(p("x", x), p("w", w), out=BF16)))
    assert "linears: " in text
    assert why in text


def test_equal_requests_share_one_answer() -> None:
    def two(p: Values, _: Values) -> tuple[Value, ...]:
        x = p("x", f"{FP8_ROW}[2,256]")
        return tuple(linear(x, p(f"layers.{i}.w", f"{FP8_WEIGHT}[128,256]"), out=BF16) for i in range(2))

    first, second = requests(graph_of(two))
    assert first == second
    assert choose(first, TUNED) is choose(second, TUNED)


def test_a_target_is_part_of_the_key() -> None:
    graph = graph_of(lambda p, _: positions(p("s", "i32[5]"), p("at", "i32[3]"), p("n", "i32[3]"), tokens=1))
    (hopper,), (blackwell,) = requests(graph), requests(graph, SM_100A)
    assert hopper != blackwell
    assert choose(hopper, TUNED)[0].emission == choose(blackwell, TUNED)[0].emission


def test_parameters_are_bound_in_the_order_of_the_kernel() -> None:
    graph = graph_of(
        lambda p, _: linear(p("x", f"{FP8_ROW}[1,256]"), p("w", f"{FP8_WEIGHT}[128,256]"), out=F32)
    )
    (launch,) = together(graph, labels={graph.by_name["w"]: "wq_a"})
    wanted = [(0, "data", "r"), (0, "scale", "r"), (1, "data", "r"), (1, "scale", "r"), (2, "data", "w")]
    assert [(b.value, b.component, b.access) for b in launch.bindings] == wanted
    assert [p.operand for p in launch.emission.parameters][2:] == ["wq_a", "wq_a", "wq_a_out"]
    assert re.fullmatch(r"fp8/\d+x\d+", launch.forms[1])


def test_the_norms_gain_is_wanted_in_f32() -> None:
    def make(p: Values, _: Values) -> Value:
        op = QNormQuantize(eps=1e-6, format=FP8_ROW, out=BF16)
        out: Value = op(p("x", "bf16[1,128]"), p("g", "bf16[128]"), p("w", f"{FP8_WEIGHT}[256,128]"))
        return out

    (launch,) = together(graph_of(make))
    assert launch.forms[1] == "f32"
    assert "fp8(rms_norm(x: bf16[1,128], gain: f32[128]" in launch.emission.source


def test_without_quantization_the_normed_row_stays_bf16() -> None:
    def make(p: Values, _: Values) -> Value:
        op = QNormQuantize(eps=1e-6, format=None, out=BF16)
        out: Value = op(p("x", "bf16[2,128]"), p("g", "bf16[128]"), p("w", "bf16[256,128]"))
        return out

    (launch,) = together(graph_of(make))
    assert "rms_norm(x: bf16[2,128], gain: f32[128], eps=1e-06) x w0: bf16[256,128]" in launch.emission.source
    assert "fp8(" not in launch.emission.source


@pytest.mark.parametrize("row", [FP8_ROW, NVFP4_ROW])
def test_state_writes_ride_with_the_queries(row: QuantFormat) -> None:
    weight = {FP8_ROW: FP8_WEIGHT, NVFP4_ROW: NVFP4}[row]

    def make(p: Values, state: Values) -> tuple[Value, ...]:
        at, slots, f = p("at", "i32[1]"), p("slots", "i32[1]"), p("f", "f32[32]")
        kv = "q[e4m3,ue8m0,1x64,tail=64]"
        op = QNormQuantize(eps=1e-6, format=row, out=BF16)
        made = [
            op(p("x", "bf16[1,256]"), p("gq", "bf16[256]"), p("wq", f"{weight}[256,256]")),
            KvNormRopeStore(eps=1e-6)(
                state("w", f"{kv}[3,144,128]"), p("kv", "bf16[1,128]"), p("g", "bf16[128]"), at, slots, f
            ),
        ]
        for name, type_, rotated in (("e", f"{kv}[3,16,128]", False), ("k", f"{MXFP4}[3,16,128]", True)):
            rings = [state(f"{name}_{r}", "f32[3,16,256]") for r in ("kv", "score")]
            rows = [p(f"{name}_{r}", "f32[1,256]") for r in ("u", "s")]
            compressor = Compressor(ratio=4, overlap=True, tokens=1, eps=1e-6, rotated=rotated)
            bias, gain = p(f"{name}_b", "f32[4,256]"), p(f"{name}_g", "bf16[128]")
            made += compressor(state(name, type_), *rings, *rows, bias, gain, at, slots, f)
        return tuple(made)

    graph = graph_of(make)
    *before, launch = together(graph)
    (alone,) = together(graph, graph.nodes[0])[len(before) :]
    assert len(before) == (row == NVFP4_ROW)  # the rows are quantized first, without riders
    assert launch.emission.grid[0] == alone.emission.grid[0] + 3
    assert launch.forms == alone.forms  # riders want no weight in another form
    pointers = [p.name for p in launch.emission.parameters]
    assert len(pointers) == len(set(pointers))
    written = [b for b in launch.bindings if b.access == "rw"]
    assert len(written) == 3 + 2 + 3 + 2 + 2  # window, rings and entries, rings and keys, by component
    (apart,) = together(graph, *graph.nodes[1:])
    assert apart.emission.symbol == "state_0"
    assert sum(b.access == "rw" for b in apart.bindings) == len(written)
    with pytest.raises(BuildError, match="one compressor of entries and one of index keys per launch"):
        together(graph, *graph.nodes, graph.nodes[2])


def indexed(extra_reader: bool = False, rows: int = 1, entries: int = 64) -> Graph:
    def make(p: Values, _: Values) -> tuple[Value, ...]:
        scores = Indexer(ratio=4, factor=0.015625)(
            p("q", f"bf16[{rows},32,128]"),
            p("keys", f"{MXFP4}[3,{entries},128]"),
            p("weights", f"bf16[{rows},32]"),
            p("at", f"i32[{rows}]"),
            p("slots", f"i32[{rows}]"),
            p("f", "f32[32]"),
        )
        chosen: Value = IndexTopk(k=8)(scores)
        return (chosen, add(scores, scores)) if extra_reader else (chosen,)

    return graph_of(make)


def test_scores_and_their_topk_are_one_launch_for_few_rows_and_entries() -> None:
    (launch,) = together(indexed(rows=8, entries=8192))
    assert (launch.stage, launch.emission.symbol) == ("", "index_choice_0")
    assert launch.emission.cluster == (16, 1, 1)
    assert [b.access for b in launch.bindings].count("w") == 2
    assert [b.access for b in launch.bindings].count("early") == 2  # positions and slots


@pytest.mark.parametrize("shape", [{"rows": 9}, {"entries": 8196}])
def test_scores_and_their_topk_are_two_launches_of_one_request(shape: dict[str, int]) -> None:
    first, second = together(indexed(**shape))
    assert (first.stage, second.stage) == ("scores", "topk")
    assert "bf16(weights * 0.015625)" in first.emission.source
    number = next(b.value for b in first.bindings if b.access == "w")
    assert [b.access for b in second.bindings if b.value == number] == ["r"]


def test_scores_that_somebody_else_reads_are_refused() -> None:
    graph = indexed(extra_reader=True)
    with pytest.raises(BuildError, match="somebody else reads them"):
        together(graph, *graph.nodes[:2])
    with pytest.raises(BuildError, match="takes an indexer and the index_topk of its scores together"):
        together(graph, graph.nodes[0])


EXPERTS = f"{MXFP4}[8,128,256]"
SHARED = f"{FP8_WEIGHT}[128,256]"


def scratch(launch: Launchable) -> dict[str, str]:
    return {b.scratch: b.access for b in launch.bindings if b.scratch}


@pytest.mark.parametrize("rows", [1, 2])
def test_a_hash_layer_reads_the_token_early_and_logits_of_several_are_made_once(rows: int) -> None:
    def make(p: Values, _: Values) -> object:
        x = p("x", f"{FP8_ROW}[{rows},256]")
        return HashSwiglu(out=BF16, limit=10.0, factor=1.5)(
            p("row", f"bf16[{rows},256]"), p("gate", "bf16[8,256]"),
            p("table", "i32[64,2]"), p("tokens", f"i32[{rows}]"),
            x, p("w1", EXPERTS), p("w3", EXPERTS), x, p("s1", SHARED), p("s3", SHARED),
        )  # fmt: skip

    *gate, up = together(graph_of(make))
    assert [(scratch(g), g.emission.grid) for g in gate] == (
        [({"logits": "w"}, (2, 1, 1))] if rows > 1 else []
    )
    assert scratch(up) == ({"logits": "r"} if rows > 1 else {})
    for launch in (*gate, up):
        names = dict(zip((p.operand for p in launch.emission.parameters), launch.bindings, strict=True))
        assert names["tokens"].access == "early"
    assert names["experts"].access == "w"
    assert "weights" not in names  # nobody's value


def test_a_token_that_a_launch_writes_is_read_behind_the_wait() -> None:
    def make(p: Values, _: Values) -> object:
        x = p("x", f"{FP8_ROW}[2,256]")
        tokens, _lengths = candidates(p("anchors", "i32[1]"), p("drafts", "i32[1]"), p("lengths", "i32[1]"))
        return HashSwiglu(out=BF16, limit=10.0, factor=1.5)(
            p("row", "bf16[2,256]"), p("gate", "bf16[8,256]"), p("table", "i32[64,2]"), tokens,
            x, p("w1", EXPERTS), p("w3", EXPERTS), x, p("s1", SHARED), p("s3", SHARED),
        )  # fmt: skip

    graph = graph_of(make)
    gate, up = together(graph, graph.nodes[-1])
    for launch in (gate, up):
        names = dict(zip((p.operand for p in launch.emission.parameters), launch.bindings, strict=True))
        assert names["tokens"].access == "r"
    assert gate.emission.source.index("ptx.wait()") < gate.emission.source.index("router.look_up(")
    multiplying, streaming = routed(up.emission.source)
    assert multiplying.index("ptx.wait()") < multiplying.index("experts_up.look_up_all(")
    assert streaming.index("ptx.wait()") < streaming.index("experts_up.read_weights(")


def routed(source: str) -> list[str]:
    """Stages of the first half's routed experts: of those that multiply, and of the warp that reads."""
    return source.partition("experts_up.enter(")[2].partition("@cute.jit")[0].split("else:")


def test_a_hash_layer_under_an_nvfp4_gate_has_its_logits_in_scratch() -> None:
    def make(p: Values, _: Values) -> object:
        x, weight = p("x", f"{NVFP4_ROW}[2,256]"), "q[e2m1,e4m3,1x16,tensor]"
        return HashSwiglu(out=BF16, limit=10.0, factor=1.5)(
            x, p("gate", f"{weight}[8,256]"), p("table", "i32[64,2]"), p("tokens", "i32[2]"),
            x, p("w1", f"{weight}[8,128,256]"), p("w3", f"{weight}[8,128,256]"),
            x, p("s1", f"{weight}[128,256]"), p("s3", f"{weight}[128,256]"),
        )  # fmt: skip

    gate, up = together(graph_of(make))
    assert (gate.stage, up.stage) == ("gate", "up")
    assert scratch(gate) == {"logits": "w"}
    assert scratch(up) == {"logits": "r"}
    assert gate.scratch["logits"] == up.scratch["logits"] == 2 * 8 * 4


@pytest.mark.parametrize("hashed", [False, True])
def test_a_router_and_its_experts_are_one_request(hashed: bool) -> None:
    def make(p: Values, _: Values) -> object:
        row, gate, x = p("row", "bf16[2,256]"), p("gate", "bf16[8,256]"), p("x", f"{FP8_ROW}[2,256]")
        if hashed:
            chosen = HashRouter(factor=1.5)(row, gate, p("table", "i32[64,2]"), p("tokens", "i32[2]"))
        else:
            chosen = Router(k=2, factor=1.5)(row, gate, p("bias", "f32[8]"))
        operands = (x, *chosen, p("w1", EXPERTS), p("w3", EXPERTS), x, p("s1", SHARED), p("s3", SHARED))
        return (*chosen, *Swiglu(out=BF16, limit=10.0)(*operands))

    graph = graph_of(make)
    *gate, up = together(graph)
    assert [launch.stage for launch in gate] == ["gate"]
    written = {p.operand for p, b in zip(up.emission.parameters, up.bindings, strict=True) if b.access == "w"}
    assert written == {"experts", "weights", "h", "shared_h"}
    with pytest.raises(BuildError, match="takes a router and the swiglu of its experts together, not"):
        together(graph, graph.nodes[0])


@pytest.mark.parametrize("tokens", [None, "given", "made"])
def test_experts_of_rows_that_may_not_be_there_read_where_rows_are(tokens: str | None) -> None:
    """Behind the wait, in both halves and by all warps, however experts are chosen."""

    def make(p: Values, _: Values) -> object:
        row, gate, x = p("row", "bf16[2,256]"), p("gate", "bf16[8,256]"), p("x", f"{FP8_ROW}[2,256]")
        ids = p("tokens", "i32[2]")
        if tokens == "made":
            ids, _lengths = candidates(p("anchors", "i32[1]"), p("drafts", "i32[1]"), p("lengths", "i32[1]"))
        table = HashRouter(factor=1.5), (row, gate, p("table", "i32[64,2]"), ids)
        scores = Router(k=2, factor=1.5), (row, gate, p("bias", "f32[8]"))
        router, operands = table if tokens else scores
        experts, weights = router(*operands)
        weights = present(weights, p("positions", "i32[2]"))
        taken = (x, experts, weights, p("w1", EXPERTS), p("w3", EXPERTS), x, p("s1", SHARED), p("s3", SHARED))
        h, shared_h = Swiglu(out=BF16, limit=10.0)(*taken)
        down = ExpertsDown(out=BF16, format=FP8_ROW, shared_format=FP8_ROW)
        return down(h, shared_h, experts, p("w2", f"{MXFP4}[8,256,128]"), p("s2", f"{FP8_WEIGHT}[256,128]"))

    graph = graph_of(make)
    launches = together(graph, *graph.nodes[-4:])
    assert [launch.stage for launch in launches] == ["gate", "up", "down"]
    for launch in launches[-2:]:
        names = [p.operand for p in launch.emission.parameters]
        assert launch.bindings[names.index("positions")].access == "r"
    up, down = (launch.emission.source for launch in launches[-2:])
    assert stages_with("experts_up", "turns = _turns(") == ["score", "look_up_all", "_read_turns"]
    assert "judged=True" in up
    stage = "look_up_all" if tokens else "score"
    for path, read in zip(routed(up), (f"experts_up.{stage}(", "experts_up.read_weights("), strict=True):
        assert path.index("ptx.wait()") < path.index(read)
    assert stages_with("experts_down", "rows_present(") == ["read_rest", "sum_columns"]
    assert "skips=True" in down
    _, multiplying, streaming = down.partition("@cute.kernel")[2].split("ptx.wait()")
    assert "experts_down.sum_columns(" in multiplying
    assert "experts_down.read_rest(" in streaming


def stages_with(module: str, text: str) -> list[str]:
    """Functions of a module of the library that say it."""
    found = ast.walk(ast.parse((LIB / f"{module}.py").read_text()))
    return [x.name for x in found if isinstance(x, ast.FunctionDef) and text in ast.unparse(x)]


def test_weights_of_rows_that_are_there_are_one_routers() -> None:
    """Another reader of the weights as they were before wants them in memory."""

    def make(p: Values, _: Values) -> object:
        row, gate, x = p("row", "bf16[2,256]"), p("gate", "bf16[8,256]"), p("x", f"{FP8_ROW}[2,256]")
        experts, weights = Router(k=2, factor=1.5)(row, gate, p("bias", "f32[8]"))
        kept = present(weights, p("positions", "i32[2]"))
        operands = (x, experts, kept, p("w1", EXPERTS), p("w3", EXPERTS), x, p("s1", SHARED), p("s3", SHARED))
        return (*Swiglu(out=BF16, limit=10.0)(*operands), add(weights, weights))

    graph = graph_of(make)
    with pytest.raises(BuildError, match="takes the weights of its own router, which nobody else reads"):
        together(graph, *(node for node in graph.nodes if node.op.name != "add"))


def test_rows_are_quantized_to_nvfp4_once_for_all_their_readers() -> None:
    graph = graph_of(
        lambda p, _: QuantizeLinear(format=NVFP4_ROW, out=BF16)(
            p("x", "bf16[2,256]"), p("w", "q[e2m1,e4m3,1x16,tensor][128,256]")
        )
    )
    rows, product = together(graph)
    parts = {"q": 2 * 128, "q_scale": 2 * 16, "q_global_scale": 2 * 4}
    assert rows.scratch == product.scratch == parts
    assert [b.scratch for b in rows.bindings] == ["", *parts]
    assert [b.scratch for b in product.bindings] == [*parts, "", "", ""]
    assert [b.component for b in product.bindings] == [
        *("data", "scale", "global_scale"),
        *("data", "global_scale", "data"),
    ]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda p, _: QuantizeLinear(format=NVFP4_ROW, out=BF16)(
                p("x", "bf16[1,256]"), p("w", f"{FP8_WEIGHT}[128,256]")
            ),
            "multiplies q[e2m1,e4m3,1x16,row] rows with q[e2m1,e4m3,1x16,tensor] weights",
        ),
        (
            lambda p, _: ExpertsDown(out=BF16, format=NVFP4_ROW, shared_format=FP8_ROW)(
                p("h", "bf16[1,2,128]"),
                p("hs", "bf16[1,128]"),
                p("e", "i32[1,2]"),
                p("w2", "q[e2m1,e4m3,1x16,tensor][8,256,128]"),
                p("s2", f"{FP8_WEIGHT}[256,128]"),
            ),
            "encodes hidden rows as q[e4m3,ue8m0,1x128]",
        ),
        (
            lambda p, state: Attention(
                eps=1e-6, precision=BF16, window=128, scale=0.5, groups=2, format=None
            )(
                p("q", "bf16[1,4,128]"),
                *(p("at", "i32[1]"), p("last", "i32[1]")),
                p("f", "f32[32]"),
                p("sink", "f32[4]"),
                state("ring", "bf16[3,144,128]"),
                p("slots", "i32[1]"),
            ),
            "scales scores by 0.088",
        ),
    ],
)
def test_numerics_that_a_kernel_lacks_are_refused(make: Callable[..., object], why: str) -> None:
    assert why in refused(graph_of(make))


def test_the_state_of_a_chunk_takes_launches_of_its_own() -> None:
    """Entries are pooled before the rings that they are pooled from are overwritten."""

    def make(p: Values, state: Values) -> tuple[Value, ...]:
        at, slots, f = p("at", "i32[16]"), p("slots", "i32[16]"), p("f", "f32[32]")
        rings = [state(r, "f32[3,16,256]") for r in ("kv_ring", "score_ring")]
        rows = [p(r, "f32[16,256]") for r in ("u", "s")]
        compressor = Compressor(ratio=4, overlap=True, tokens=16, eps=1e-6, rotated=False, beside=24)
        row = (p("kv", "bf16[16,128]"), p("g", "bf16[128]"), at, slots, f)
        q = (p("x", "bf16[16,128]"), p("gq", "bf16[128]"), p("wq", "bf16[256,128]"))
        return (
            QNormQuantize(eps=1e-6, format=None, out=BF16)(*q),
            *KvNormRopeStore(eps=1e-6, beside=144, tokens=16)(state("w", "bf16[3,144,128]"), *row),
            *compressor(
                *(state("e", "bf16[3,16,128]"), *rings, *rows, p("b", "f32[4,256]"), p("ge", "bf16[128]")),
                *(at, slots, f, p("owners", "i32[16]")),
            ),
        )

    graph = graph_of(make)
    state, rings, product = together(graph)
    assert [launch.stage for launch in (state, rings, product)] == ["state", "rings", ""]
    assert product == together(graph, graph.nodes[0])[0]
    access = [
        {p.operand: b.access for p, b in zip(x.emission.parameters, x.bindings, strict=True)}
        for x in (state, rings)
    ]
    assert access[0].items() >= {"beside": "w", "window": "rw", "compress_kv": "r"}.items()
    assert access[1].items() >= {"compress_kv": "rw", "compress_score": "rw"}.items()
    assert state.emission.grid == (144 + 16 // 4, 1, 1)
    assert rings.emission.grid == (16, 1, 1)


def test_attention_reads_copies_beside_rings_in_slots_of_their_own() -> None:
    def attend(p: Values, state: Values) -> object:
        op = Attention(
            eps=1e-6, precision=BF16, window=128, scale=128**-0.5, groups=2, format=None, ratio=128
        )
        at = p("at", "i32[2]")
        q = (p("q", "bf16[2,4,128]"), at, at, p("f", "f32[32]"), p("sink", "f32[4]"))
        ring, entries = p("beside", "bf16[1,256,128]"), state("entries", "bf16[3,4,128]")
        return op(*q, ring, p("owners", "i32[2]"), entries, p("slots", "i32[2]"))

    (launch,) = together(graph_of(attend))
    names = [p.operand for p in launch.emission.parameters]
    assert names[-4:] == ["positions", "ring_slots", "slots", "out"]
