"""Kernels generated from bodies: what becomes a program on rows, and how its text reads."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4c.arch import SM_90A
from dsv4c.codegen.build import Source, compile_source
from dsv4c.codegen.emit import Emission
from dsv4c.codegen.kernels.row_program import Copy, Loop, index_text, nodes_of, program_of
from dsv4c.codegen.kernels.rows import Built, kernel_of, primitives
from dsv4c.codegen.registry import No
from dsv4c.ir.graph import Builder, Graph, Value
from dsv4c.ir.ops import (
    add,
    cache_write,
    cast,
    linear,
    mul,
    reshape,
    rms_norm,
    scale,
    silu,
    slice_,
    softmax,
    sum_,
    top_k,
)
from dsv4c.passes.fusions.inverse_rope import InverseRope
from dsv4c.passes.fusions.rmsnorm_quantize import RmsnormQuantize
from dsv4c.passes.fusions.sinkhorn import Sinkhorn
from dsv4c.types import BF16, F32, FP8_ROW, parse_type
from tests.codegen.primitives import BATCHES, random_body


def text_of(graph: Graph) -> str:
    return emission_of(graph).source


def emission_of(graph: Graph) -> Emission:
    built = kernel_of(graph, True, "body", "what", SM_90A)
    assert isinstance(built, Built), built
    return built.emission


def refusal(graph: Graph) -> str:
    answer = kernel_of(graph, True, "body", "what", SM_90A)
    assert isinstance(answer, No)
    return answer.reason


def types(*texts: str):  # type: ignore[no-untyped-def]
    return tuple(map(parse_type, texts))


def test_a_fused_op_reads_as_its_body() -> None:
    op = RmsnormQuantize(eps=1e-6, format=FP8_ROW)
    emission = emission_of(primitives(op, types("bf16[2,4096]", "bf16[4096]")))
    steps = emission.source.partition("    ptx.wait()\n")[2].partition("\n\n")[0]
    assert steps == (
        '    norm.rms_norm(team, x, gain, rms_norm, eps=1e-06, precision="f32")\n'
        "    cute.arch.sync_threads()\n"
        "    shape.reshape(team, rms_norm, rms_norm_out, shape=(1, 4096))\n"
        '    quant.quantize(team, rms_norm, quantize, format="q[e4m3,ue8m0,1x128]")'
    )
    assert emission.grid == (2, 1, 1)
    assert [p.name for p in emission.parameters] == [
        "m_x",
        "m_gain",
        "m_quantize",
        "m_quantize_scale",
        "m_rms_norm_out",
    ]


def test_shared_memory_is_used_again() -> None:
    many, few = (
        emission_of(primitives(Sinkhorn(iterations=n, eps=1e-6), types("f32[3,4,4]"))).shared for n in (20, 2)
    )
    assert many == few


def test_elementwise_ops_of_a_shape_become_one_loop() -> None:
    with Builder("body") as builder:
        x, w = (builder.input(n, t) for n, t in zip("xw", types("bf16[2,3,64]", "f32[2,3]"), strict=True))
        wide = cast(x, to=F32)
        h = mul(silu(wide), reshape(w, shape=(-1, 3, 1)))
        graph = builder.finish({"0": cast(h, to=BF16)})
    (loop,) = program_of(graph, 2).steps
    assert isinstance(loop, Loop)
    assert [node.op.name for node in loop.nodes] == ["cast", "silu", "mul", "cast"]
    assert len(loop.kept) == 1
    assert "at(reshape, i // 64)" in text_of(graph)


def test_a_loop_ends_where_its_results_are_read_in_another_shape() -> None:
    with Builder("body") as builder:
        x = builder.input("x", parse_type("f32[2,64]"))
        y = silu(x)
        graph = builder.finish(
            {"0": add(slice_(y, axis=1, start=0, stop=32), slice_(y, axis=1, start=32, stop=64))}
        )
    steps = program_of(graph, 2).steps
    assert [[node.op.name for node in nodes_of(step)] for step in steps] == [["silu"], ["add"]]


def test_a_result_that_is_a_reshape_is_written_where_it_lies() -> None:
    op = InverseRope(groups=2, format=None)
    graph = primitives(op, types("bf16[2,4,128]", "i32[2]", "f32[32]"))
    program = program_of(graph, 2)
    assert [node.op.name for step in program.steps for node in nodes_of(step)] == ["rope"]
    assert emission_of(graph).shared == 272  # to reduce in


def test_what_is_read_in_two_shapes_has_two_names() -> None:
    with Builder("body") as builder:
        x = builder.input("x", parse_type("f32[2,64]"))
        y = softmax(x, axis=-1)
        graph = builder.finish({"0": reshape(y, shape=(-1, 2, 32)), "1": silu(y)})
    text = text_of(graph)
    assert "    softmax = values.array(m_softmax + Int64(row) * 64, (1, 64))\n" in text
    assert "    reshape = values.part(softmax, 0, (1, 2, 32))\n" in text
    assert "norm.softmax(team, x, softmax, axis=-1)" in text


@pytest.mark.parametrize(
    ("shape", "over", "text"),
    [
        ((2, 3), (2, 3), "i"),
        ((1,), (2, 3), "0"),
        ((3,), (2, 3), "i % 3"),
        ((2, 1), (2, 3), "i // 3"),
        ((1, 4, 1), (2, 4, 5), "i // 5 % 4"),
        ((2, 1, 5), (2, 4, 5), "i // 20 * 5 + i % 5"),
    ],
)
def test_broadcasting_is_an_index(shape: tuple[int, ...], over: tuple[int, ...], text: str) -> None:
    assert index_text(shape, over) == text


def test_what_is_one_for_all_rows_every_row_makes() -> None:
    with Builder("body") as builder:
        x, b = (builder.input(n, t) for n, t in zip("xb", types("f32[2,4]", "f32[24]"), strict=True))
        graph = builder.finish({"0": add(x, silu(slice_(b, axis=0, start=4, stop=8)))})
    program = program_of(graph, 2)
    assert {v.name for v in program.by_row} == {"x", "add"}


WHOLE: dict[str, Callable[[Value, Value], Value]] = {
    "is broadcast": lambda x, w: add(x, w),
    "scales a norm": lambda x, w: rms_norm(x, w, eps=1e-6),
    "is broadcast, and read by row by nobody else": lambda x, w: mul(add(x, w), silu(w)),
}


@pytest.mark.parametrize("rows", [1, 2, 64])
@pytest.mark.parametrize("reads", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize(
    "first", [lambda w: cast(w, to=F32), lambda w: silu(scale(cast(w, to=F32), factor=2.0))]
)
def test_what_all_rows_read_may_be_computed_first(
    rows: int, reads: Callable[[Value, Value], Value], first: Callable[[Value], Value]
) -> None:
    """Though its length is a multiple of the rows, and its first reader keeps rows apart."""
    with Builder("body") as builder:
        x, w = (builder.input(n, t) for n, t in zip("xw", types(f"f32[{rows},64]", "bf16[64]"), strict=True))
        graph = builder.finish({"0": silu(reads(x, first(w)))})
    program = program_of(graph, rows)
    assert {"x", *(v.name for v in graph.outputs.values())} <= {v.name for v in program.by_row}
    assert w not in program.by_row
    emission = emission_of(graph)
    assert emission.grid == (rows, 1, 1)
    assert "m_w, (64,)" in emission.source


def test_rows_that_meet_are_refused_with_the_op() -> None:
    with Builder("body") as builder:
        x = builder.input("x", parse_type("f32[2,4]"))
        graph = builder.finish({"0": silu(softmax(silu(x), axis=0))})
    assert kernel_of(graph, True, "body", "", SM_90A) == No("rows meet in softmax")
    with Builder("body") as builder:
        x = builder.input("x", parse_type("f32[2,4]"))
        graph = builder.finish({"0": add(x, sum_(x, axis=0, out=F32))})
    assert kernel_of(graph, True, "body", "", SM_90A) == No("rows meet in sum")


def test_large_matrices_and_state_are_refused() -> None:
    with Builder("body") as builder:
        x, w = (
            builder.input(n, t) for n, t in zip("xw", types("bf16[2,4096]", "bf16[512,4096]"), strict=True)
        )
        graph = builder.finish({"0": silu(linear(x, w, out=BF16))})
    assert refusal(graph) == "linear reads 4194304 bytes of weights, too many for one CTA a row"
    with Builder("body") as builder:
        given_ = types("f32[3,5,64]", "f32[2,64]", "i32[2]", "i32[2]")
        cache, x, index, slots = (builder.input(n, t) for n, t in zip("cxis", given_, strict=True))
        graph = builder.finish({"0": cache_write(cache, silu(x), index, slots)})
    assert refusal(graph) == "cache_write writes state, where rows may meet"


def test_rows_that_shared_memory_cannot_hold_are_refused() -> None:
    with Builder("body") as builder:
        x = builder.input("x", parse_type("f32[2,100000]"))
        graph = builder.finish({"0": top_k(silu(x), k=4)})
    assert refusal(graph) == "a row needs 400272 bytes of shared memory, a CTA has 232448"


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(BATCHES))
def test_random_bodies_are_programs(random: Random, rows: int) -> None:
    """Every step reads what an earlier one made, and no two values that are needed share bytes."""
    graph = random_body(random, rows)
    program = program_of(graph, rows)
    made = set(graph.inputs)
    live: dict[object, int] = {}
    for index, step in enumerate(program.steps):
        for node in nodes_of(step):
            for value in node.inputs:
                owner = program.views[value].base if value in program.views else value
                assert owner in made or owner in program.homes
                live[owner] = index
            made.update(node.outputs)
    for index, step in enumerate(program.steps):
        if isinstance(step, Copy):  # nothing waits for it, so its value stays while the next step runs
            beside = (i for i in range(index, len(program.steps)) if not isinstance(program.steps[i], Copy))
            assert live[step.value] >= next(beside)
    inside = [(v, h) for v, h in program.homes.items() if h.offset >= 0]
    first = {v: i for i, step in enumerate(program.steps) for n in nodes_of(step) for v in n.outputs}
    for i, (v, a) in enumerate(inside):
        for w, b in inside[:i]:
            apart = a.offset >= b.offset + b.type.extent or b.offset >= a.offset + a.type.extent
            assert apart or live.get(v, first[v]) < first[w] or live.get(w, first[w]) < first[v]


def compiles(random: Random, rows: int) -> None:
    emission = emission_of(random_body(random, rows))
    compile_source(Source(emission.symbol, emission.source), "sm_90a")


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False), st.sampled_from(BATCHES))
def test_random_bodies_compile(random: Random, rows: int) -> None:
    compiles(random, rows)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False), st.sampled_from(BATCHES))
def test_many_random_bodies_compile(random: Random, rows: int) -> None:
    compiles(random, rows)
