"""The graphs' structure: what each kind of layer computes and keeps, and that every parameter is used."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from dsv4c.buckets import ROWS, Bucket
from dsv4c.config import Deployment, load_config
from dsv4c.ir.graph import Graph
from dsv4c.ir.text import parse_graph, print_graph, print_nodes
from dsv4c.ir.verify import verify
from dsv4c.models.deepseek_v4 import build
from dsv4c.models.layout import layout
from dsv4c.models.schedule import layer_plans
from dsv4c.types import BF16, F32, I32, TensorType

SLOTS, CONTEXT = 5, 512
DECODE, VERIFY = Bucket("decode", 3), Bucket("verify", 2, 4)
SMALL, CHUNK = Bucket("prefill", tokens=ROWS, logits="last"), Bucket("prefill", tokens=64)
DRAFT, ROUND = Bucket("draft", tokens=2), Bucket("round", 2, 3, sampled=True)
DEPLOYMENT = Deployment(max_context=CONTEXT, slots=SLOTS, buckets=(DECODE, VERIFY, SMALL, CHUNK))
DRAFTING = replace(DEPLOYMENT, buckets=(*DEPLOYMENT.buckets, DRAFT, ROUND))

Graphs = dict[Bucket, Graph]


@pytest.fixture(scope="module")
def graphs() -> Graphs:
    return {bucket: verify(build(load_config("tiny"), DEPLOYMENT, bucket)) for bucket in DEPLOYMENT.buckets}


@pytest.fixture(scope="module")
def drafting() -> Graphs:
    return {bucket: verify(build(load_config("tiny"), DRAFTING, bucket)) for bucket in DRAFTING.buckets}


def of_layer(graph: Graph, layer: str, part: str = "") -> Counter[str]:
    scope = f"{layer}.{part}".rstrip(".")
    return Counter(n.op.name for n in graph.nodes if f"{n.scope}.".startswith(f"{scope}."))


@pytest.mark.parametrize("name", ["tiny", "deepseek-v4-flash", "deepseek-v4-pro"])
def test_the_graphs_use_every_parameter_once_as_declared(name: str) -> None:
    config = load_config(name)
    declared = {p.name: p for p in layout(config)}
    used: set[str] = set()
    plain = {p.name for p in verify(build(config, DEPLOYMENT, DECODE)).params}
    assert plain == {n for n in declared if not n.startswith("mtp.")}
    for bucket in DRAFTING.buckets if name == "tiny" else (DECODE, ROUND):
        graph = verify(build(config, DRAFTING, bucket))
        for param in graph.params:
            storage = {"f32": F32, "i64": I32}.get(declared[param.name].storage, BF16)
            assert param.type == TensorType(storage, declared[param.name].shape)
            assert graph.users[param], f"%{param.name} is not used"
        assert bucket is DRAFT or {p.name for p in graph.params} > plain
        assert bucket is not ROUND or {p.name for p in graph.params} == set(declared)
        used |= {p.name for p in graph.params}
    assert used == set(declared)


def test_calls_of_few_tokens_are_the_same_program(graphs: Graphs) -> None:
    decode, verify_ = graphs[DECODE], graphs[VERIFY]
    assert [n.op.name for n in decode.nodes] == [n.op.name for n in verify_.nodes]
    assert [v.name for v in decode.values()] == [v.name for v in verify_.values()]


def test_every_bucket_keeps_the_same_state(graphs: Graphs) -> None:
    """Chunks of any size: it is the sequences' state, not the call's."""
    main = [graphs[bucket] for bucket in (DECODE, VERIFY, SMALL, CHUNK)]
    states = [{s.name: s.type for s in graph.states} for graph in main]
    assert all(each == states[0] for each in states)
    assert {s.type.shape[0] for graph in graphs.values() for s in graph.states} == {SLOTS}


def test_chunks_read_beside_the_rings_and_then_write_to_them(graphs: Graphs) -> None:
    """One copy per ring; the ring itself is read by that copy alone, before its only write."""
    config, graph = load_config("tiny"), graphs[CHUNK]
    rings = [s for s in graph.states if s.name.endswith((".window", ".kv", ".score"))]
    compressors = sum(p.has_compressor + p.has_indexer for p in layer_plans(config))
    assert len(rings) == config.num_layers + 2 * compressors
    for ring in rings:
        assert [n.op.name for n in graph.users[ring]] == ["cache_extend", "cache_write"]
        copy, write = graph.users[ring]
        assert copy.inputs == write.inputs
        assert not graph.users[write.outputs[0]]
        longer = copy.outputs[0].type.shape[1] - ring.type.shape[1]
        assert longer == (48 if ring.name.endswith(".window") else 56)  # 64 tokens instead of 8, in tiles
        assert copy.outputs[0].type.shape[0] == 1
    few = [n.op.name for bucket in (DECODE, VERIFY, SMALL) for n in graphs[bucket].nodes]
    assert not {"cache_extend", "owners"} & set(few)


def test_inputs_and_outputs(graphs: Graphs) -> None:
    config = load_config("tiny")
    streams = (config.hc_mult, config.hidden_size)
    for bucket, graph in graphs.items():
        sequences, rows = bucket.sequences, bucket.rows
        answered = sequences if bucket.logits == "last" else rows
        assert {v.name: v.type for v in graph.inputs} == {
            "tokens": TensorType(I32, (rows,)),
            "lengths": TensorType(I32, (sequences,)),
            "slots": TensorType(I32, (sequences,)),
        }
        outputs = {label: v.type for label, v in graph.outputs.items()}
        assert outputs == {
            "logits": TensorType(F32, (answered, config.vocab_size)),
            "next": TensorType(I32, (answered,)),
            "streams": TensorType(BF16, (rows, *streams)),
        }


def test_inputs_and_outputs_of_rounds(drafting: Graphs) -> None:
    """One token of each sequence, and what is said of six rows."""
    vocabulary = load_config("tiny").vocab_size
    draft, round_ = drafting[DRAFT], drafting[ROUND]
    assert {v.name: v.type.shape for v in round_.inputs} == dict.fromkeys(
        ("tokens", "lengths", "slots"), (2,)
    )
    assert {label: v.type for label, v in round_.outputs.items()} == {
        "logits": TensorType(F32, (6, vocabulary)),
        "said": TensorType(I32, (6,)),
        "next": TensorType(I32, (2,)),
        "going": TensorType(I32, (2,)),
    }
    assert {label: v.type for label, v in draft.outputs.items()} == {
        "logits": TensorType(F32, (2, vocabulary)),
        "next": TensorType(I32, (2,)),
    }


def test_what_drafts_look_back_to_is_kept_by_every_call(drafting: Graphs) -> None:
    """By prompts in chunks, too; and drafting itself moves no position."""
    kept = {s.name: s.type for s in drafting[DRAFT].states}
    assert set(kept) == {"position", "mtp.0.streams", "mtp.0.attn.window"}
    for bucket in (DECODE, VERIFY, SMALL, CHUNK, ROUND):
        finals = {state.name: last for state, last in drafting[bucket].finals.items()}
        for name, type_ in kept.items():
            assert finals[name].type == type_
            assert finals[name].node is not None, f"{bucket.name} does not write {name}"
    assert "advance" not in {n.op.name for n in drafting[DRAFT].nodes}


def test_what_each_kind_of_layer_keeps(graphs: Graphs) -> None:
    """Rings hold what the oldest of a few new tokens still reads, and the new ones."""
    config = load_config("tiny")
    states = {s.name: s.type for s in graphs[DECODE].states}
    expected = {"position": TensorType(I32, (SLOTS,))}
    window = -(-(config.sliding_window + ROWS - 1) // 16) * 16
    for plan in layer_plans(config):
        attn, dim = f"{plan.prefix}.attn", config.head_dim
        expected[f"{attn}.window"] = TensorType(BF16, (SLOTS, window, dim))
        for name, width, cache in (
            (f"{attn}.compressor", dim, f"{attn}.entries"),
            (f"{attn}.indexer.compressor", config.index_head_dim, f"{attn}.indexer.keys"),
        ):
            if not (plan.has_indexer if "indexer" in name else plan.has_compressor):
                continue
            expected[cache] = TensorType(BF16, (SLOTS, CONTEXT // plan.ratio, width))
            halves = 2 if plan.overlaps else 1
            ring = {4: 16, 128: 136}[plan.ratio]
            assert ring >= halves * plan.ratio + ROWS - 1
            for part in ("kv", "score"):
                expected[f"{name}.{part}"] = TensorType(F32, (SLOTS, ring, halves * width))
    assert states == expected


def test_what_each_kind_of_layer_computes(graphs: Graphs) -> None:
    config, graph = load_config("tiny"), graphs[DECODE]
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


def test_the_text_reads_back(graphs: Graphs, drafting: Graphs) -> None:
    for graph in (*graphs.values(), *drafting.values()):
        text = print_graph(graph)
        assert parse_graph(text) == graph
        assert print_graph(parse_graph(text)) == text


@pytest.mark.parametrize("label", ["SWA+hash", "CSA+dense", "HCA+dense"])
def test_whole_text_of_one_layer_of_each_kind(label: str, graphs: Graphs, golden) -> None:
    plans = {plan.label: plan for plan in reversed(layer_plans(load_config("tiny")))}
    if label not in plans:
        pytest.fail(f"the tiny model has no {label} layer, only {', '.join(plans)}")
    scope, graph = plans[label].prefix, graphs[DECODE]
    nodes = [n for n in graph.nodes if f"{n.scope}.".startswith(f"{scope}.")]
    golden("\n".join(print_nodes(nodes)), f"model/{label.lower().replace('+', '_')}.decode.txt")


def test_whole_text_of_the_rest(graphs: Graphs, drafting: Graphs, golden) -> None:
    nodes = [n for n in graphs[DECODE].nodes if not n.scope.startswith("layers.")]
    golden("\n".join(print_nodes(nodes)), "model/frame.decode.txt")
    nodes = [n for n in drafting[DRAFT].nodes if n.scope in ("", "mtp.0", "mtp.0.output")]
    golden("\n".join(print_nodes(nodes)), "model/frame.draft.txt")


@pytest.mark.parametrize("bucket", DEPLOYMENT.buckets, ids=lambda bucket: bucket.name)
def test_names_do_not_depend_on_the_activation_type(bucket: Bucket) -> None:
    """Where F32 leaves nothing to cast, the value itself goes by the name that the cast would have."""

    wide, narrow = (build(load_config("tiny"), DEPLOYMENT, bucket, dtype) for dtype in (F32, BF16))
    casts = [n.name for n in narrow.nodes if n.op.name == "cast"]
    named = {name for name in casts if not name.rpartition(".")[2].startswith("cast")}
    assert {name.rpartition(".")[2] for name in named} >= {"h", "ffn_out", "x_ffn"}
    assert named - wide.by_name.keys() == set()
