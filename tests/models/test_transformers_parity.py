"""Random small models: what transformers' DeepseekV4ForCausalLM computes in f32 is what our graphs compute.

Its weights go through `save_pretrained`, in both of its spellings, and our loader.
"""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.interpreted import Model, graph_of, weights_of

transformers = pytest.importorskip("transformers")

STEPS = 140
TOLERANCE = 1e-5
LAYER_TYPES = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
ROPE_DIMS = 16


@st.composite
def small_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a DeepseekV4Config. The indexer has 32 heads, or takes every entry: with few heads all of an
    entry's scores may be 0, and equal scores leave the choice open.
    """
    layers = draw(st.integers(1, 3))
    heads, groups = draw(st.sampled_from([(2, 1), (4, 2), (4, 4), (6, 3)]))
    every_entry = draw(st.booleans())
    experts = draw(st.integers(3, 6))
    types = draw(st.lists(st.sampled_from(LAYER_TYPES), min_size=layers, max_size=layers))
    hashed = draw(st.integers(0, layers))
    head_dim = draw(st.sampled_from([32, 48]))
    factor = draw(st.sampled_from([4.0, 16.0]))
    compress_theta = draw(st.sampled_from([40000.0, 160000.0]))
    yarn = {"factor": factor, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
    return {
        "vocab_size": 64,
        "hidden_size": draw(st.sampled_from([24, 32, 40])),
        "moe_intermediate_size": draw(st.sampled_from([16, 24])),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "q_lora_rank": draw(st.sampled_from([16, 24])),
        "num_experts_per_tok": draw(st.integers(1, experts - 1)),
        "n_routed_experts": experts,
        "routed_scaling_factor": draw(st.sampled_from([1.0, 1.5, 2.5])),
        "layer_types": types,
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (layers - hashed),
        "hc_mult": draw(st.sampled_from([2, 4])),
        "hc_sinkhorn_iters": draw(st.sampled_from([2, 20])),
        "swiglu_limit": draw(st.sampled_from([0.5, 10.0])),
        "sliding_window": draw(st.sampled_from([5, 16, 33])),
        "o_groups": groups,
        "o_lora_rank": draw(st.sampled_from([8, 12])),
        "index_n_heads": 4 if every_entry else 32,
        "index_head_dim": draw(st.sampled_from([16, 32])),
        "index_topk": 256 if every_entry else draw(st.integers(2, 9)),
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": ROPE_DIMS / head_dim,
        "rope_parameters": {"rope_type": "yarn", **yarn},
        "rope_theta": 10000.0,
        "compress_rope_theta": compress_theta,
        "max_position_embeddings": 1024,
    }


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights that make every part count: its own initialization leaves biases, sinks and mixes at zero."""
    random = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("tid2eid"):
            experts = model.config.n_routed_experts
            rows = [torch.randperm(experts, generator=random)[: tensor.shape[1]] for _ in range(len(tensor))]
            tensor.copy_(torch.stack(rows))
        elif tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=random)
            gain = name.endswith("norm.weight")
            tensor.copy_(1 + 0.2 * noise if gain else noise / math.sqrt(max(1, tensor.shape[-1]) ** 0.9))


def theirs(model: torch.nn.Module, ids: Tensor, prompt: int) -> Tensor:
    """Logits f32 [tokens, vocab]: the prompt in one call, then one token at a time."""
    with torch.no_grad():
        first = model(ids[None, :prompt], use_cache=True)
        logits, cache = [first.logits[0]], first.past_key_values
        for position in range(prompt, len(ids)):
            step = model(ids[None, position : position + 1], past_key_values=cache, use_cache=True)
            logits.append(step.logits[0])
    return torch.cat(logits)


@settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    fields=small_configs(),
    prompt=st.integers(1, 150),
    chunk=st.sampled_from([7, 32, 64]),
    original=st.booleans(),
    seed=st.integers(0, 999),
)
def test_prefill_and_decode(
    fields: dict[str, Any], prompt: int, chunk: int, original: bool, seed: int
) -> None:
    config = transformers.DeepseekV4Config(**fields)
    model = (
        transformers.DeepseekV4ForCausalLM._from_config(config, attn_implementation="eager").float().eval()
    )
    randomize(model, seed)
    ids = torch.randint(
        fields["vocab_size"], (prompt + STEPS,), generator=torch.Generator().manual_seed(seed)
    )
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_original_format=original)
        ours = Model(Path(folder), "fp32", chunk)
        logits = torch.cat([ours.prefill(ids[:prompt].tolist()), ours.decode(ids[prompt:].tolist())])
    graph_of.cache_clear()
    weights_of.cache_clear()
    expected = theirs(model, ids, prompt).double()
    distances = (logits.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert distances.max() <= TOLERANCE
