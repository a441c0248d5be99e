"""The sampler's kernel: one launch where a cluster holds the vocabulary, else the launches of its parts."""

from __future__ import annotations

import re

import pytest

from dsv4c.arch import ARCHS, SM_90A
from dsv4c.codegen.build import Source, compile_source, read_resources
from dsv4c.codegen.gpu import Kernels
from dsv4c.codegen.kernels import KERNELS
from dsv4c.codegen.kernels.sampler import SamplerSpec, emit_sampler
from dsv4c.codegen.registry import choose, request_of
from dsv4c.errors import BuildError
from dsv4c.ir.graph import Graph
from dsv4c.passes.fusions.sampler import Sampler
from tests.codegen.primitives import graph_of

OPERANDS = ("f32[N,{v}]", *["i32[N]"] * 4, "i32[4,64]", "i32[4]", "f32[4,7]", "i32[4,2]", "i32[4,8]")


def sampler_on(vocabulary: int, rows: int = 2) -> Graph:
    return graph_of(Sampler(), tuple(text.format(v=vocabulary) for text in OPERANDS), rows)


@pytest.mark.parametrize("target", ARCHS)
def test_a_step_draws_in_one_launch(target: str) -> None:
    graph = sampler_on(129280, 8)
    (launch,) = choose(request_of(graph.nodes, ARCHS[target], {}, {})[0], KERNELS)
    emission = launch.emission
    assert (emission.grid, emission.cluster, emission.block) == ((8 * 8, 1, 1), (8, 1, 1), 512)
    assert emission.shared <= ARCHS[target].shared_per_cta // 2  # beside a predecessor's CTA
    access = {p.operand: b.access for p, b in zip(emission.parameters, launch.bindings, strict=True)}
    assert {name for name, how in access.items() if how == "w"} == {"chosen", "said", "going"}
    assert {name for name, how in access.items() if how == "rw"} == {"history"}
    cubin, _ = compile_source(Source(emission.symbol, emission.source), target)
    assert read_resources(cubin, emission.symbol).stack <= 128  # bytes: 32 columns fill the registers


@pytest.mark.parametrize(("vocabulary", "ctas", "each"), [(512, 2, 256), (1000, 2, 500), (259648, 16, 16228)])
def test_a_cluster_shares_the_vocabulary(vocabulary: int, ctas: int, each: int) -> None:
    if each > 16224:
        with pytest.raises(BuildError, match=f"a CTA of {ctas} has {each}, more than 16224"):
            emit_sampler(SamplerSpec(1, vocabulary, 64), SM_90A)
        return
    emission = emit_sampler(SamplerSpec(1, vocabulary, 64), SM_90A)
    assert emission.cluster == (ctas, 1, 1)
    assert re.search(rf"per row, {each} columns each", emission.source)


def test_no_other_number_of_tokens_is_taken() -> None:
    with pytest.raises(BuildError, match=r"sampler: sampler of 1002 tokens: want a multiple of 4"):
        Kernels(SM_90A).code(sampler_on(1002), sampler_on(1002).nodes)
