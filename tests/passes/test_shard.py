"""Placement of values, a rule per op, and the pass that shards: what is cut, exchanged, and refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from dsv4c.compiler.request import Request
from dsv4c.config import ModelConfig, load_config
from dsv4c.errors import ConfigError, GraphError
from dsv4c.ir.graph import Builder, Graph
from dsv4c.ir.ops import add, all_gather, all_reduce, linear, mul, rms_norm, sum_
from dsv4c.ir.text import print_graph
from dsv4c.ir.verify import verify
from dsv4c.passes.placement import PARTIAL, REPLICATED, MismatchError, cut, placements, results_of, rule
from dsv4c.passes.shard import local_type, placement_of, shard
from dsv4c.types import BF16, F32, parse_type
from tests.ir.test_ops import op_of, types


def wide() -> ModelConfig:
    """The tiny model, of widths that four ranks divide, with a layer of each kind."""
    return replace(
        load_config("tiny"),
        name="wide",
        num_layers=3,
        compress_ratios=(0, 4, 128),
        num_hash_layers=1,
        num_attention_heads=8,
        o_groups=4,
        moe_intermediate_size=512,
        mtp_layers=0,
    )


def graphs(ranks: int, recipe: str = "official") -> tuple[Graph, Graph]:
    """Before and after the pass, of a decode step of two sequences."""
    job = Request(wide(), recipe=recipe, batch=2, max_context=64, chunk=8, ranks=ranks).job()
    compiled = job.compiled(job.decode, stop_after="shard")
    return compiled.after("quantize"), compiled.graph


W, E = "q[e4m3,ue8m0,128x128]", "q[e2m1,ue8m0,1x32]"
R, P = REPLICATED, PARTIAL

RULED = [  # op, operands of a rank, their placements, those of the results
    ("linear {out=f32}", "f32[2,64] f32[32,64]", (R, R), (R,)),
    ("linear {out=f32}", "f32[2,64] f32[32,64]", (R, cut(0)), (cut(1),)),
    ("linear {out=f32}", "f32[2,64] f32[32,64]", (cut(1), cut(1)), (P,)),
    ("grouped_linear {out=f32}", "f32[2,4,64] f32[4,32,64]", (cut(1), cut(0)), (cut(1),)),
    ("expert_linear {out=f32}", "f32[2,64] f32[8,32,64] i32[2,3]", (R, cut(1), R), (cut(2),)),
    ("expert_linear {out=f32}", "f32[2,3,64] f32[8,32,64] i32[2,3]", (cut(2), cut(2), R), (P,)),
    ("silu", "f32[2,64]", (cut(1),), (cut(1),)),
    ("scale {factor=2.0}", "f32[2,64]", (P,), (P,)),
    ("add", "f32[2,64] f32[2,64]", (P, P), (P,)),
    ("add", "f32[2,64] f32[64]", (cut(1), cut(0)), (cut(1),)),
    ("mul", "f32[2,3,64] f32[2,3,1]", (cut(2), R), (cut(2),)),
    ("mul", "f32[2,64] f32[2,64]", (P, R), (P,)),
    ("sum {axis=1, out=f32}", "f32[2,3,64]", (cut(2),), (cut(1),)),
    ("sum {axis=1, out=f32}", "f32[2,3,64]", (cut(1),), (P,)),
    ("reshape {shape=(-1,4,16)}", "f32[2,64]", (cut(1),), (cut(1),)),
    ("reshape {shape=(-1,64)}", "f32[2,4,16]", (cut(1),), (cut(1),)),
    ("slice {axis=1, start=0, stop=1}", "f32[2,4,16]", (cut(2),), (cut(2),)),
    ("concat {axis=1}", "f32[2,1,16] f32[2,2,16]", (cut(2), cut(2)), (cut(2),)),
    ("rms_norm {eps=1e-06}", "f32[2,4,16]", (cut(1),), (cut(1),)),
    ("rope", "f32[2,4,16] i32[2] f32[4]", (cut(1), R, R), (cut(1),)),
    ("quantize {format=q[e4m3,ue8m0,1x128]}", "bf16[2,256]", (cut(1),), (cut(1),)),
    ("attention_scores {scale=1.0}", "f32[2,4,8] f32[2,9,8] i32[2,9]", (cut(1), R, R), (cut(1),)),
    ("sink_softmax {out=f32}", "f32[2,4,9] f32[4]", (cut(1), cut(0)), (cut(1), cut(1))),
    ("attention_values", "f32[2,4,9] f32[2,4] f32[2,9,8]", (cut(1), cut(1), R), (cut(1),)),
    ("all_gather {axis=1, ranks=2}", "f32[2,64]", (cut(1),), (R,)),
    ("all_reduce {ranks=2, out=bf16}", "f32[2,64]", (P,), (R,)),
    ("top_k {k=3}", "f32[2,64]", (R,), (R,)),
]


@pytest.mark.parametrize(("op", "operands", "given", "results"), RULED)
def test_rule(op, operands, given, results) -> None:
    assert results_of(op_of(op), given, types(operands)) == results


REFUSED = [  # op, operands, placements, the operand at fault, what is said
    ("linear {out=f32}", "f32[2,64] f32[32,64]", (cut(1), R), 0, "is cut(1), expected replicated"),
    ("linear {out=f32}", "f32[2,64] f32[32,64]", (R, cut(1)), 0, "is replicated, expected cut(1)"),
    ("grouped_linear {out=f32}", "f32[2,4,64] f32[4,32,64]", (R, cut(0)), 0, "expected cut(1)"),
    ("expert_linear {out=f32}", "f32[2,64] f32[8,32,64] i32[2,3]", (R, cut(0), R), 1, "is cut(0)"),
    ("silu", "f32[2,64]", (P,), 0, "is partial, expected replicated"),
    ("add", "f32[2,64] f32[2,64]", (P, R), 0, "insert all_reduce"),
    ("mul", "f32[2,64] f32[2,64]", (P, P), 0, "is partial"),
    ("add", "f32[2,64] f32[2,64]", (cut(1), R), 0, "insert all_gather {axis=1}"),
    ("add", "f32[2,64] f32[2,64]", (cut(1), cut(0)), 0, "cut along different dimensions"),
    ("reshape {shape=(-1,32,2)}", "f32[4,16,4]", (cut(2),), 0, "begins where the cut one does"),
    ("slice {axis=1, start=0, stop=1}", "f32[2,4]", (cut(1),), 0, "a slice is of the whole dimension"),
    ("concat {axis=1}", "f32[2,4] f32[2,4]", (cut(1), cut(1)), 0, "no part of them joined"),
    ("concat {axis=0}", "f32[2,4] f32[2,4]", (R, cut(1)), 1, "is cut(1), expected replicated"),
    ("rms_norm {eps=1e-06}", "f32[2,64]", (cut(1),), 0, "a norm is of whole rows"),
    ("rope", "f32[2,16] i32[2] f32[4]", (cut(0), R, R), 0, "rows have positions"),
    ("quantize {format=q[e4m3,ue8m0,1x128]}", "bf16[2,64]", (cut(1),), 0, "no whole blocks"),
    ("quantize {format=q[e2m1,e4m3,1x16,row]}", "bf16[2,64]", (cut(1),), 0, "a scale is of a whole row"),
    ("attention_scores {scale=1.0}", "f32[2,4,8] f32[2,9,8] i32[2,9]", (R, cut(1), R), 1, "is cut(1)"),
    ("sink_softmax {out=f32}", "f32[2,4,9] f32[4]", (cut(1), R), 1, "expected cut(0)"),
    ("all_reduce {ranks=2, out=bf16}", "f32[2,64]", (R,), 0, "is replicated, expected partial"),
    ("all_gather {axis=1, ranks=2}", "f32[2,64]", (P,), 0, "is partial, expected cut(1)"),
    ("top_k {k=3}", "f32[2,64]", (cut(1),), 0, "expected replicated"),
]


@pytest.mark.parametrize(("op", "operands", "given", "at", "text"), REFUSED)
def test_refusal_names_both_and_the_conversion(op, operands, given, at, text) -> None:
    with pytest.raises(MismatchError, match=re.escape(text)) as error:
        results_of(op_of(op), given, types(operands))
    assert error.value.operand == at


def test_one_rule_per_op() -> None:
    with pytest.raises(GraphError, match="linear has a rule of placement already"):
        rule(type(op_of("linear {out=f32}")))(lambda op, given, types: REPLICATED)


def test_a_misplaced_operand_of_a_graph_is_named() -> None:
    with Builder("g") as b:
        x, w = b.input("x", parse_type("f32[2,64]")), b.param("w", parse_type("f32[32,64]"))
        y = linear(x, w, out=F32, name="y")
        z = rms_norm(y, eps=1e-6, name="z")
        whole = all_gather(y, axis=1, ranks=2, name="whole")
        graph = b.finish({"z": z, "whole": whole})
    with pytest.raises(
        GraphError, match=re.escape("at z: rms_norm: %y: f32[2,32] is cut(1), expected replicated")
    ):
        placements(graph, {"w": cut(0)})
    alone = Graph("g", graph.inputs, (), graph.params, (y.node,), {"y": y})
    with pytest.raises(GraphError, match=re.escape("output y: %y: f32[2,32] is cut(1)")):
        placements(alone, {"w": cut(0)})


@pytest.mark.parametrize("recipe", ["fp32", "bf16", "official", "nvfp4-experts"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_two_exchanges_a_layer_and_the_logits(ranks: int, recipe: str) -> None:
    _, sharded = graphs(ranks, recipe)
    found = placements(verify(sharded), {p.name: placement_of(p.name) for p in sharded.params})
    names = [node.op.name for node in sharded.nodes if node.op.collective]
    assert names == [*["all_reduce", "all_reduce"] * 3, "all_gather"]
    assert all(found[v] == REPLICATED for v in sharded.outputs.values())
    assert all(v.type == w.type for v, w in zip(sharded.states, graphs(ranks, recipe)[0].states, strict=True))


def test_shapes_are_a_ranks_own() -> None:
    text = print_graph(graphs(4)[1])
    for line in (
        "param %layers.1.attn.wq_b: q[e4m3,ue8m0,128x128][256,128]",
        "param %layers.1.ffn.experts.w2: q[e2m1,ue8m0,1x32][8,256,128]",
        "{shape=(-1,2,128)}",
        "%.attn_out: f32[2,256] = linear(%.z_quantized, %.wo_b) {out=f32}",
        "%.attn_out_sum: bf16[2,256] = all_reduce(%.attn_out) {ranks=4, out=bf16}",
        "return logits=%output.logits_whole",
    ):
        assert line in text


def test_parts_of_weights() -> None:
    def part(text: str, axis: int, ranks: int) -> str:
        return str(local_type("w", parse_type(text), axis, ranks))

    assert part(f"{W}[512,256]", 0, 8) == f"{W}[64,256]"  # two ranks share a block of scales
    assert part(f"{E}[8,64,256]", 2, 4) == f"{E}[8,64,64]"
    with pytest.raises(GraphError, match=r"%w: bf16\[6,4\]: 6 do not divide over 4 ranks"):
        part("bf16[6,4]", 0, 4)
    with pytest.raises(GraphError, match="192 for each of 2 ranks are no whole blocks of 128"):
        part(f"{W}[384,256]", 0, 2)
    with pytest.raises(GraphError, match="64 for each of 2 ranks are no whole blocks of 128"):
        part(f"{W}[256,128]", 1, 2)


def test_ranks_that_cannot_be() -> None:
    with pytest.raises(GraphError, match="9 ranks, expected 2 to 8"):
        shard(graphs(2)[0], 9)
    with pytest.raises(ConfigError, match="ranks is 9; expected at most 8"):
        Request("tiny", ranks=9).job()
    with pytest.raises(ConfigError, match="shards for 2 ranks, ranks is 1"):
        Request("tiny", pipeline="quantize{recipe=official},shard{ranks=2},fold").job()
    job = Request("tiny", ranks=2).job()
    with pytest.raises(
        GraphError, match=r"shard: %layers\.0\.ffn\.shared_experts\.w2: .* no whole blocks of 128"
    ):
        job.compiled(job.decode)


def test_a_recipe_that_scales_whole_rows_says_so() -> None:
    job = Request(wide(), recipe="nvfp4", ranks=2).job()
    with pytest.raises(GraphError, match="is replicated, expected cut"):
        job.compiled(job.decode)


def test_the_ops_of_exchanges_are_built_like_others() -> None:
    with Builder("g") as b:
        x = b.input("x", parse_type("f32[2,64]"))
        total = all_reduce(add(x, mul(x, x)), ranks=2, out=BF16)
        assert str(total.type) == "bf16[2,64]"
        assert str(sum_(x, axis=1, out=F32).type) == "f32[2]"
