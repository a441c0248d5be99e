"""The graphs' structure: what each kind of layer computes and keeps, and that every parameter is used."""

from __future__ import annotations

from collections import Counter

import pytest

from dsv4c.config import Deployment, load_config
from dsv4c.ir.graph import Graph
from dsv4c.ir.text import parse_graph, print_graph, print_nodes
from dsv4c.ir.verify import verify
from dsv4c.models.deepseek_v4 import Mode, build
from dsv4c.models.layout import layout
from dsv4c.models.schedule import layer_plans
from dsv4c.types import BF16, F32, I32, TensorType

BATCH, CHUNK, CONTEXT = 3, 16, 512
DEPLOYMENT = Deployment(batch=BATCH, chunk=CHUNK, max_context=CONTEXT)
MODES: tuple[Mode, ...] = ("decode", "prefill", "mtp")


@pytest.fixture(scope="module")
def graphs() -> dict[str, Graph]:
    return {mode: verify(build(load_config("tiny"), DEPLOYMENT, mode)) for mode in MODES}


def of_layer(graph: Graph, layer: str, part: str = "") -> Counter[str]:
    scope = f"{layer}.{part}".rstrip(".")
    return Counter(n.op.name for n in graph.nodes if f"{n.scope}.".startswith(f"{scope}."))


@pytest.mark.parametrize("name", ["tiny", "deepseek-v4-flash", "deepseek-v4-pro"])
def test_the_graphs_use_every_parameter_once_as_declared(name: str) -> None:
    config = load_config(name)
    declared = {p.name: p for p in layout(config)}
    used: set[str] = set()
    for mode in MODES if config.mtp_layers else MODES[:2]:
        graph = verify(build(config, Deployment(), mode))
        for param in graph.params:
            storage = {"f32": F32, "i64": I32}.get(declared[param.name].storage, BF16)
            assert param.type == TensorType(storage, declared[param.name].shape)
            assert graph.users[param], f"%{param.name} is not used"
        if mode != "mtp":
            assert {p.name for p in graph.params} == {n for n in declared if not n.startswith("mtp.")}
        used |= {p.name for p in graph.params}
    assert used == set(declared)


def test_decode_and_prefill_are_the_same_program(graphs: dict[str, Graph]) -> None:
    decode, prefill = graphs["decode"], graphs["prefill"]
    assert [n.op.name for n in decode.nodes] == [n.op.name for n in prefill.nodes]
    assert [v.name for v in decode.values()] == [v.name for v in prefill.values()]
    for a, b in zip(decode.states, prefill.states, strict=True):
        assert a.type.shape == (BATCH, *b.type.shape[1:])
        assert b.type.shape[0] == 1


def test_inputs_and_outputs(graphs: dict[str, Graph]) -> None:
    config = load_config("tiny")
    streams = (config.hc_mult, config.hidden_size)
    for mode, graph in graphs.items():
        sequences, rows = (BATCH, BATCH) if mode == "decode" else (1, CHUNK)
        inputs = {v.name: v.type for v in graph.inputs}
        assert inputs["tokens"] == TensorType(I32, (rows,))
        assert inputs["lengths"] == TensorType(I32, (sequences,))
        assert inputs.get("streams") == (TensorType(BF16, (rows, *streams)) if mode == "mtp" else None)
        outputs = {label: v.type for label, v in graph.outputs.items()}
        assert outputs == {
            "logits": TensorType(F32, (rows, config.vocab_size)),
            "next": TensorType(I32, (rows,)),
            "streams": TensorType(BF16, (rows, *streams)),
        }


def test_what_each_kind_of_layer_keeps(graphs: dict[str, Graph]) -> None:
    """Rings hold a chunk beyond what the oldest token of the chunk still reads."""
    config = load_config("tiny")
    states = {s.name: s.type for s in graphs["decode"].states}
    expected = {"position": TensorType(I32, (BATCH,))}
    window = -(-(config.sliding_window + CHUNK - 1) // 16) * 16
    for plan in layer_plans(config):
        attn, dim = f"{plan.prefix}.attn", config.head_dim
        expected[f"{attn}.window"] = TensorType(BF16, (BATCH, window, dim))
        for name, width, cache in (
            (f"{attn}.compressor", dim, f"{attn}.entries"),
            (f"{attn}.indexer.compressor", config.index_head_dim, f"{attn}.indexer.keys"),
        ):
            if not (plan.has_indexer if "indexer" in name else plan.has_compressor):
                continue
            expected[cache] = TensorType(BF16, (BATCH, CONTEXT // plan.ratio, width))
            halves = 2 if plan.overlaps else 1
            ring = -(-(halves * plan.ratio + CHUNK - 1) // plan.ratio) * plan.ratio
            for part in ("kv", "score"):
                expected[f"{name}.{part}"] = TensorType(F32, (BATCH, ring, halves * width))
    assert states == expected
    assert {s.name for s in graphs["mtp"].states} == {"mtp.position", "mtp.0.attn.window"}


def test_what_each_kind_of_layer_computes(graphs: dict[str, Graph]) -> None:
    config, graph = load_config("tiny"), graphs["decode"]
    kinds = set()
    for plan in layer_plans(config):
        kinds.add((plan.ratio, plan.router.value))
        attention = of_layer(graph, plan.prefix, "attn")
        compressors = int(plan.has_compressor) + int(plan.has_indexer)
        assert attention["compress_pool"] == attention["completed_entries"] == compressors
        assert attention["cache_write"] == 1 + 3 * compressors
        assert attention["index_scores"] == attention["top_k"] == int(plan.has_indexer)
        assert attention["hadamard"] == 2 * int(plan.has_indexer)
        assert attention["visible_entries"] == int(plan.has_compressor and not plan.has_indexer)
        assert attention["gather"] == 1 + int(plan.has_compressor)
        assert attention["rope"] == 3 + compressors + int(plan.has_indexer)
        assert attention["linear"] == 4 + 2 * compressors + 2 * int(plan.has_indexer)
        assert attention["grouped_linear"] == attention["sink_softmax"] == 1
        experts = of_layer(graph, plan.prefix, "ffn")
        hashed = plan.router.value == "hash"
        assert experts["embedding"] == int(hashed)
        assert experts["top_k"] == int(not hashed)
        assert experts["expert_linear"] == 3
        assert experts["clamp"] == 4
        steps = 2 * config.hc_sinkhorn_iters - 1
        for half in ("hc_attn", "hc_ffn"):
            mix = of_layer(graph, plan.prefix, half)
            assert mix["normalize"] == steps
            assert mix["mix_streams"] == mix["spread_streams"] == mix["collapse_streams"] == 1
    assert len(kinds) >= 3


def test_the_text_reads_back(graphs: dict[str, Graph]) -> None:
    for graph in graphs.values():
        text = print_graph(graph)
        assert parse_graph(text) == graph
        assert print_graph(parse_graph(text)) == text


@pytest.mark.parametrize("label", ["SWA+hash", "CSA+dense", "HCA+dense"])
def test_whole_text_of_one_layer_of_each_kind(label: str, graphs: dict[str, Graph], golden) -> None:
    plans = {plan.label: plan for plan in reversed(layer_plans(load_config("tiny")))}
    if label not in plans:
        pytest.fail(f"the tiny model has no {label} layer, only {', '.join(plans)}")
    scope, graph = plans[label].prefix, graphs["decode"]
    nodes = [n for n in graph.nodes if f"{n.scope}.".startswith(f"{scope}.")]
    golden("\n".join(print_nodes(nodes)), f"model/{label.lower().replace('+', '_')}.decode.txt")


def test_whole_text_of_the_rest(graphs: dict[str, Graph], golden) -> None:
    nodes = [n for n in graphs["decode"].nodes if not n.scope.startswith("layers.")]
    golden("\n".join(print_nodes(nodes)), "model/frame.decode.txt")
    nodes = [n for n in graphs["mtp"].nodes if n.scope in ("", "mtp.0", "mtp.0.output")]
    golden("\n".join(print_nodes(nodes)), "model/frame.mtp.txt")


@pytest.mark.parametrize("mode", MODES)
def test_names_do_not_depend_on_the_activation_type(mode: Mode) -> None:
    """Where F32 leaves nothing to cast, the value itself goes by the name that the cast would have."""

    wide, narrow = (build(load_config("tiny"), DEPLOYMENT, mode, dtype) for dtype in (F32, BF16))
    casts = [n.name for n in narrow.nodes if n.op.name == "cast"]
    named = {name for name in casts if not name.rpartition(".")[2].startswith("cast")}
    assert {name.rpartition(".")[2] for name in named} >= {"h", "ffn_out", "x_ffn"}
    assert named - wide.by_name.keys() == set()
