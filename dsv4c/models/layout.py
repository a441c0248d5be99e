"""Which parameters a DeepSeek-V4 model has: names, shapes, and the number format the release gives each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dsv4c.config import ModelConfig
from dsv4c.scope import LAYERS, MTP, Scope


@dataclass(frozen=True, slots=True)
class Param:
    """One canonical parameter. `storage` is the number format of the release: f32 and bf16 stay what they
    are, `linear` and `expert` follow the config, i64 is the hash router's table.
    """

    name: str
    shape: tuple[int, ...]
    storage: Literal["f32", "bf16", "linear", "expert", "i64"]

    @property
    def place(self) -> Scope:
        """Where it stands in the model, by its name."""
        return Scope.of(self.name)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


PARTS = {
    "attn.indexer.": "indexers",
    "attn.compressor.": "compressors",
    "attn.": "attention projections",
    "ffn.gate": "routers",
    "ffn.experts.": "routed experts",
    "ffn.shared_experts.": "shared experts",
    "hc_attn_": "hyper-connections",
    "hc_ffn_": "hyper-connections",
    "attn_norm": "norms",
    "ffn_norm": "norms",
}
ENDS = "embedding and head"


def part_of(name: str) -> str:
    """The part of the model that a parameter counts to, by its canonical name."""
    path = Scope.of(name).path
    return next((part for start, part in PARTS.items() if path.startswith(start)), ENDS)


def layout(config: ModelConfig) -> Iterator[Param]:
    """Every parameter of the model, in the order of the forward pass, what drafts last. Experts are stacked
    [E,out,in]; the grouped output projection is [groups, rank, in].
    """
    H, V = config.hidden_size, config.vocab_size
    yield Param("embed", (V, H), "bf16")
    for index, ratio in enumerate(config.compress_ratios[: config.num_layers]):
        yield from _layer(config, Scope(LAYERS, index).layer, ratio, hashed=index < config.num_hash_layers)
    yield from _output(config, "")
    yield Param("head", (V, H), "bf16")
    for index in range(config.mtp_layers):
        block = Scope(MTP, index).layer
        yield Param(f"{block}.e_proj", (H, H), "linear")
        yield Param(f"{block}.h_proj", (H, H), "linear")
        yield Param(f"{block}.enorm", (H,), "bf16")
        yield Param(f"{block}.hnorm", (H,), "bf16")
        yield from _layer(config, block, 0, hashed=False)
        yield from _output(config, f"{block}.")
    for index in range(config.dspark_stages):
        yield from _stage(config, index)


def head_of_drafts(config: ModelConfig) -> str:
    """What drafts call the head where they have a copy in a format of its own; checkpoints hold it once."""
    return f"{Scope(MTP, max(config.dspark_stages, 1) - 1).layer}.head"


def _stage(config: ModelConfig, index: int) -> Iterator[Param]:
    """One of DSpark's stages: the first reads the target's features, the last gives tokens."""
    H, V, R = config.hidden_size, config.vocab_size, config.dspark_markov_rank
    stage = Scope(MTP, index).layer
    if index == 0:
        yield Param(f"{stage}.main_proj", (H, len(config.dspark_target_layers) * H), "linear")
        yield Param(f"{stage}.main_norm", (H,), "bf16")
    yield from _layer(config, stage, 0, hashed=False)
    if index == config.dspark_stages - 1:
        yield from _output(config, f"{stage}.")
        yield Param(f"{stage}.markov_head.markov_w1", (V, R), "bf16")
        yield Param(f"{stage}.markov_head.markov_w2", (V, R), "bf16")
        yield Param(f"{stage}.confidence_head.proj", (1, H + R), "bf16")


def _output(config: ModelConfig, prefix: str) -> Iterator[Param]:
    yield from _hyper(config, f"{prefix}hc_head", config.hc_mult, scales=1)
    yield Param(f"{prefix}norm", (config.hidden_size,), "bf16")


def _hyper(config: ModelConfig, name: str, rows: int, scales: int) -> Iterator[Param]:
    yield Param(f"{name}_fn", (rows, config.hc_mult * config.hidden_size), "f32")
    yield Param(f"{name}_base", (rows,), "f32")
    yield Param(f"{name}_scale", (scales,), "f32")


def _layer(config: ModelConfig, layer: str, ratio: int, hashed: bool) -> Iterator[Param]:
    coefficients = config.hc_mult * (2 + config.hc_mult)  # pre, post and the mixing matrix
    yield from _hyper(config, f"{layer}.hc_attn", coefficients, scales=3)
    yield Param(f"{layer}.attn_norm", (config.hidden_size,), "bf16")
    yield from _attention(config, f"{layer}.attn", ratio)
    yield from _hyper(config, f"{layer}.hc_ffn", coefficients, scales=3)
    yield Param(f"{layer}.ffn_norm", (config.hidden_size,), "bf16")
    yield from _experts(config, f"{layer}.ffn", hashed)


def _attention(config: ModelConfig, attn: str, ratio: int) -> Iterator[Param]:
    H, D, heads, Q = config.hidden_size, config.head_dim, config.num_attention_heads, config.q_lora_rank
    G, R = config.o_groups, config.o_lora_rank
    yield Param(f"{attn}.wq_a", (Q, H), "linear")
    yield Param(f"{attn}.q_norm", (Q,), "bf16")
    yield Param(f"{attn}.wq_b", (heads * D, Q), "linear")
    yield Param(f"{attn}.wkv", (D, H), "linear")
    yield Param(f"{attn}.kv_norm", (D,), "bf16")
    yield Param(f"{attn}.attn_sink", (heads,), "f32")
    yield Param(f"{attn}.wo_a", (G, R, heads * D // G), "linear")
    yield Param(f"{attn}.wo_b", (H, G * R), "linear")
    if ratio:
        yield from _compressor(config, f"{attn}.compressor", ratio, D)
    if ratio == 4:
        index = config.index_n_heads * config.index_head_dim
        yield Param(f"{attn}.indexer.wq_b", (index, Q), "linear")
        yield Param(f"{attn}.indexer.weights_proj", (config.index_n_heads, H), "bf16")
        yield from _compressor(config, f"{attn}.indexer.compressor", ratio, config.index_head_dim)


def _compressor(config: ModelConfig, name: str, ratio: int, dim: int) -> Iterator[Param]:
    width = (
        2 * dim if ratio == 4 else dim
    )  # ratio 4 windows overlap: one half for the previous, one for the current
    yield Param(f"{name}.ape", (ratio, width), "f32")
    yield Param(f"{name}.wkv", (width, config.hidden_size), "bf16")
    yield Param(f"{name}.wgate", (width, config.hidden_size), "bf16")
    yield Param(f"{name}.norm", (dim,), "bf16")


def _experts(config: ModelConfig, ffn: str, hashed: bool) -> Iterator[Param]:
    H, E, W = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    yield Param(f"{ffn}.gate", (E, H), "bf16")
    if hashed:
        yield Param(f"{ffn}.gate.tid2eid", (config.vocab_size, config.num_experts_per_tok), "i64")
    else:
        yield Param(f"{ffn}.gate.bias", (E,), "f32")
    shared = W * config.n_shared_experts
    yield Param(f"{ffn}.shared_experts.w1", (shared, H), "linear")
    yield Param(f"{ffn}.shared_experts.w3", (shared, H), "linear")
    yield Param(f"{ffn}.shared_experts.w2", (H, shared), "linear")
    yield Param(f"{ffn}.experts.w1", (E, W, H), "expert")
    yield Param(f"{ffn}.experts.w3", (E, W, H), "expert")
    yield Param(f"{ffn}.experts.w2", (E, H, W), "expert")
