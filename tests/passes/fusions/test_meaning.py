"""Folding changes no bit: unfused and folded graphs on the same random model, and recorded results."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from dsv4c.buckets import Bucket, Kind
from dsv4c.config import load_config
from dsv4c.ir.graph import Graph
from dsv4c.ir.verify import verify
from dsv4c.numerics import codec
from dsv4c.passes.fold import fold
from dsv4c.passes.recipes import RECIPES
from dsv4c.reference.interpret import clone, interpret
from tests.goldens import recorded
from tests.interpreted import Model, fresh_states, padded, padded_all
from tests.passes.fusions.cases import (
    CHUNK,
    DECODE,
    DRAFT,
    PREFILL,
    RULES,
    VERIFY,
    differing,
    folded,
    random_weights,
    unfolded,
)

DECODED = 5  # crosses the end of a window of four


def tokens(count: int, vocab: int) -> list[int]:
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("recipe", RECIPES)
def test_folding_changes_no_bit_of_prefill_and_decode(recipe: str) -> None:
    config = load_config("tiny")
    plain = {bucket: unfolded("tiny", recipe, bucket) for bucket in (PREFILL, VERIFY, DECODE)}
    fused = {bucket: folded("tiny", recipe, bucket)[0] for bucket in plain}
    weights = random_weights(plain[DECODE], config.n_routed_experts)
    ids = tokens(CHUNK + DECODED, config.vocab_size)
    first = fresh_states(plain[PREFILL])
    second = {name: clone(value) for name, value in first.items()}
    calls = [(PREFILL, padded(ids[: CHUNK - 1], CHUNK)), (VERIFY, padded_all({1: ids[:3], 0: ids[:4]}, 2, 4))]
    calls += [(DECODE, padded([token], 1)) for token in ids[CHUNK - 1 :]]
    for bucket, inputs in calls:
        expected = interpret(plain[bucket], inputs, first, weights)
        found = interpret(fused[bucket], inputs, second, weights)
        assert bool(expected["logits"][: int(inputs["lengths"].sum())].isfinite().all())
        assert differing(expected, found) == []
        assert differing(first, second) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_folding_changes_no_bit_of_a_draft(recipe: str) -> None:
    config = load_config("tiny")
    plain, fused = unfolded("tiny", recipe, DRAFT), folded("tiny", recipe, DRAFT)[0]
    weights = random_weights(plain, config.n_routed_experts)
    inputs = padded(tokens(1, config.vocab_size), 1)
    first = fresh_states(plain)
    streams = first["mtp.0.streams"]
    assert isinstance(streams, torch.Tensor)
    streams.copy_(torch.randn(streams.shape, generator=torch.Generator().manual_seed(2)))
    second: dict[str, codec.Value] = {name: clone(value) for name, value in first.items()}
    expected = interpret(plain, inputs, first, weights)
    assert bool(expected["logits"].isfinite().all())
    assert differing(expected, interpret(fused, inputs, second, weights)) == []
    assert differing(first, second) == []


@cache
def _folded(graph: Graph) -> Graph:
    return verify(fold(graph, RULES)[0])


class FoldedModel(Model):
    """A recorded model whose graphs are folded."""

    def graph(self, bucket: Bucket | Kind) -> Graph:
        return _folded(super().graph(bucket))


def test_the_folded_official_model_is_within_tolerance_of_its_recording() -> None:
    case = recorded("official-quant")
    run = case.run("p128")
    model = FoldedModel(case.folder, "official", run.prefill)
    assert any(node.op.name == "attention" for node in model.graph("prefill").nodes)
    logits = torch.cat([model.prefill(run.ids[: run.prefill]), model.decode(run.ids[run.prefill :])])
    assert case.exceeded("p128.logits", logits, case.tolerance["logits"]["same_rounding_points"]) == {}


def test_the_folded_unquantized_model_is_within_tolerance_of_its_recording() -> None:
    case = recorded("fp32")
    run = case.run("short")
    model = FoldedModel(case.folder, "fp32", run.prefill)
    logits = torch.cat([model.prefill(run.ids[: run.prefill]), model.decode(run.ids[run.prefill :])])
    assert case.distances("short.logits", logits).max() <= case.tolerance["logits_rel_l2_per_position"]
