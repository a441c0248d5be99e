"""Certificates of the pass that shards, on a small model of the same kinds of layers, recipe and ranks.

What the pass does depends on ops and names, which are the model's own; sizes are such as are soon evaluated.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dsv4c.buckets import Bucket
from dsv4c.certify.finding import Certificate
from dsv4c.compiler.job import Job
from dsv4c.compiler.limits import one_layer_of_each_kind
from dsv4c.config import ModelConfig
from dsv4c.errors import GraphError
from dsv4c.passes.pipeline import Shard


def certify_shard(job: Job, folder: Path, *, fresh: bool = False) -> list[Certificate]:
    """None where the job has one rank, or goes on from a stop. Raises GraphError for an exchange that is
    wrong. `fresh` evaluates again whatever was kept.
    """
    names = [p.name for p in job.line.passes]
    if job.deployment.ranks == 1 or job.saved is not None or Shard.name not in names:
        return []
    # Loads torch, which a compile for one rank whose certificates are kept never needs.
    from dsv4c.certify.ranks import certify_ranks

    ranks, drafts = job.deployment.ranks, any(bucket.drafts for bucket in job.deployment.buckets)
    buckets = [Bucket("decode", sequences=2)]
    if drafts:
        buckets.append(Bucket("draft", sequences=2, tokens=2))
    deployment = replace(job.deployment, target="cpu", max_context=256, slots=2, buckets=tuple(buckets))
    less = replace(job, config=small(job.config, ranks, drafts=drafts), deployment=deployment)
    found = []
    for bucket in buckets:
        stages = less.compiled(bucket, stop_after=Shard.name)
        before = stages.named[-2][1]
        found += certify_ranks(before, stages.graph, ranks, folder, fresh=fresh)
    for wrong in found:
        if not wrong.holds:
            raise GraphError(f"shard is wrong: {wrong.op} on {', '.join(wrong.operands)}: {wrong.reason}")
    return found


def small(config: ModelConfig, ranks: int, *, drafts: bool = False) -> ModelConfig:
    """A model like `config`, with a layer of each kind, and what `drafts` if there is any, that so many ranks
    divide and that is soon run.
    """
    layers = one_layer_of_each_kind(config)
    if drafts:
        seen = min(len(config.dspark_target_layers), layers.num_layers)
        layers = replace(
            layers,
            mtp_layers=config.mtp_layers,
            dspark_stages=config.dspark_stages,
            dspark_target_layers=tuple(range(seen)),
            dspark_markov_rank=min(config.dspark_markov_rank, 64),
            dspark_noise_token_id=0,
        )
    return replace(
        layers,
        hidden_size=256,
        head_dim=128,
        q_lora_rank=128,
        o_lora_rank=128,
        num_attention_heads=2 * ranks,
        o_groups=ranks,
        moe_intermediate_size=128 * ranks,
        n_routed_experts=8,
        num_experts_per_tok=min(config.num_experts_per_tok, 4),
        vocab_size=64 * ranks,
        sliding_window=128,
        index_n_heads=4,
        index_topk=8,
    )
