"""What one decoded token must move and compute, whatever the implementation. Standard library only.

Every weight byte is counted once, every state byte that the algorithm touches once, activations not at all;
floating-point operations are two per multiply-add. Work that happens once in `ratio` tokens counts 1/ratio.
The last token of the context is the one decoded: its entries are complete and its window is full.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from dsv4c.config import ModelConfig
from dsv4c.models.layout import Param, layout
from dsv4c.models.schedule import LayerKind, LayerPlan, RouterKind, layer_plans
from dsv4c.models.weights import Table, stored_format
from dsv4c.types import NVFP4, DType, QuantFormat, QuantType, TensorType, Type


class Cache(enum.Enum):
    """How compressed and raw keys, and index keys, are kept."""

    OFFICIAL = "official"  # FP8 keys with BF16 RoPE dimensions; MXFP4 index keys
    FP8_INDEX = "fp8-index"  # the same keys; FP8 index keys with one f32 scale
    BF16 = "bf16"
    F32 = "f32"

    @property
    def element_bytes(self) -> int:
        return 4 if self is Cache.F32 else 2

    def entry_bytes(self, config: ModelConfig) -> int:
        """One key of attention: of a head of 512, 448 FP8, 64 BF16, 7 scales and a byte of padding: 584."""
        if self in (Cache.BF16, Cache.F32):
            return self.element_bytes * config.head_dim
        plain = config.head_dim - config.qk_rope_head_dim
        return plain + 2 * config.qk_rope_head_dim + -(-plain // 512) * 8

    def index_key_bytes(self, config: ModelConfig) -> int:
        """One index key: 68, 132 or 256 bytes for a width of 128."""
        width = config.index_head_dim
        if self is Cache.OFFICIAL:
            return width // 2 + -(-width // 32)
        return width + 4 if self is Cache.FP8_INDEX else self.element_bytes * width


@dataclass(frozen=True)
class Work:
    """One line of the inventory: an op of a layer, and the part of the model that its weights count to."""

    op: str
    part: str
    flops: int = 0
    weights: int = 0
    state: int = 0

    @property
    def bytes(self) -> int:
        return self.weights + self.state


@dataclass(frozen=True)
class Traffic:
    """An inventory: `lines` in the order of the forward pass, and their sums."""

    lines: tuple[Work, ...]

    @property
    def flops(self) -> int:
        return sum(line.flops for line in self.lines)

    @property
    def weights(self) -> int:
        return sum(line.weights for line in self.lines)

    @property
    def state(self) -> int:
        return sum(line.state for line in self.lines)

    @property
    def bytes(self) -> int:
        return self.weights + self.state

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part, largest first: weights by `Work.part`, all state as one part."""
        totals: dict[str, int] = {"state": self.state} if self.state else {}
        for line in self.lines:
            if line.weights:
                totals[line.part] = totals.get(line.part, 0) + line.weights
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def line(self, op: str) -> Work:
        return next(line for line in self.lines if line.op == op)


@dataclass(frozen=True)
class StateBytes:
    """Resident state of one sequence, in bytes."""

    window: int
    entries: int
    index_keys: int
    compressors: int  # f32 running windows

    @property
    def total(self) -> int:
        return self.window + self.entries + self.index_keys + self.compressors


def state_bytes(config: ModelConfig, context: int, cache: Cache = Cache.OFFICIAL) -> StateBytes:
    """What a sequence of `context` tokens keeps between calls, all layers together.

    Counted as the official implementation lays it out: a ring of `sliding_window` keys per layer, one entry
    per `ratio` tokens; per compressor two f32 rings, values and scores, of one window (two if overlapping).
    """
    key, index_key = cache.entry_bytes(config), cache.index_key_bytes(config)
    window = entries = index_keys = compressors = 0
    for plan in layer_plans(config):
        window += config.sliding_window * key
        if plan.has_compressor:
            entries += context // plan.ratio * key
            compressors += _ring_bytes(plan, config.head_dim)
        if plan.has_indexer:
            index_keys += context // plan.ratio * index_key
            compressors += _ring_bytes(plan, config.index_head_dim)
    return StateBytes(window, entries, index_keys, compressors)


def _ring_bytes(plan: LayerPlan, dim: int) -> int:
    windows = 2 if plan.overlaps else 1
    return 2 * (windows * plan.ratio) * (windows * dim) * 4


def stored_types(config: ModelConfig) -> dict[str, Type]:
    """Every parameter's type as the model's checkpoint stores it, by canonical name."""
    table: Table = "nvfp4" if config.expert_format == "nvfp4" else "release"
    return {param.name: _type(stored_format(config, table, param), param) for param in layout(config)}


def _type(format: QuantFormat | DType, param: Param) -> Type:
    return TensorType(format, param.shape) if isinstance(format, DType) else QuantType(format, param.shape)


def layer_traffic(
    config: ModelConfig,
    attention: LayerKind,
    context: int,
    *,
    router: RouterKind = RouterKind.DENSE,
    cache: Cache = Cache.OFFICIAL,
) -> Traffic:
    """One layer of that kind in a model of this size, whether or not its schedule has one."""
    hashed = int(router is RouterKind.HASH)
    alone = replace(
        config, num_layers=1, compress_ratios=(attention.value,), num_hash_layers=hashed, mtp_layers=0
    )
    return _layer(alone, layer_plans(alone)[0], context, cache, stored_types(alone))


def token_traffic(
    config: ModelConfig,
    context: int,
    *,
    cache: Cache = Cache.OFFICIAL,
    types: Mapping[str, Type] | None = None,
) -> Traffic:
    """The whole model, one token of one sequence, without MTP blocks.

    `types`: parameters kept in another type than the checkpoint's, by canonical name (a recipe's choice).
    """
    kept = stored_types(config) | dict(types or {})
    lines = [
        line for plan in layer_plans(config) for line in _layer(config, plan, context, cache, kept).lines
    ]
    return Traffic((*lines, *_outside(config, kept)))


def _outside(config: ModelConfig, types: Mapping[str, Type]) -> tuple[Work, ...]:
    H, streams = config.hidden_size, config.hc_mult * config.hidden_size
    collapse = 2 * config.hc_mult * streams + 2 * streams + 2 * streams  # project, square and sum, collapse
    return (
        Work("embedding", "embedding and head", 0, types["embed"].nbytes // config.vocab_size),
        Work(
            "hyper-connection head and norm",
            "embedding and head",
            collapse + _NORM * H,
            _sum(types, "", ("hc_head_fn", "hc_head_base", "hc_head_scale", "norm")),
        ),
        Work("head", "embedding and head", 2 * config.vocab_size * H, types["head"].nbytes),
    )


# Vector work, in operations per element. Coarse on purpose: it is a thousandth of the whole.
_NORM = 4  # square, sum, scale, gain
_ROPE = 3  # two multiplications and an addition
_SOFTMAX = 5  # scale, maximum, exp, sum, weight


def _sum(types: Mapping[str, Type], prefix: str, names: Iterable[str]) -> int:
    return sum(types[prefix + name].nbytes for name in names)


def _layer(
    config: ModelConfig, plan: LayerPlan, context: int, cache: Cache, types: Mapping[str, Type]
) -> Traffic:
    layer = f"{plan.prefix}."
    return Traffic(
        (
            *_hyper(config, layer, types),
            *_attention(config, plan, context, cache, types),
            *_feed_forward(config, plan, types),
        )
    )


def _hyper(config: ModelConfig, layer: str, types: Mapping[str, Type]) -> Iterator[Work]:
    S, streams = config.hc_mult, config.hc_mult * config.hidden_size
    coefficients = S * (2 + S)
    pre = 2 * coefficients * streams + 2 * streams + 2 * streams  # project, square and sum, collapse
    sinkhorn = config.hc_sinkhorn_iters * 2 * 2 * S * S
    names = [f"hc_{side}_{leaf}" for side in ("attn", "ffn") for leaf in ("fn", "base", "scale")]
    weights = _sum(types, layer, names)
    yield Work("hyper-connections in, x2", "hyper-connections", 2 * (pre + sinkhorn), weights)
    yield Work("hyper-connections out, x2", "hyper-connections", 2 * (2 * S + 2) * streams)
    norms = _sum(types, layer, ("attn_norm", "ffn_norm"))
    yield Work("norms, x2", "norms", 2 * _NORM * config.hidden_size, norms)


def _attention(
    config: ModelConfig, plan: LayerPlan, context: int, cache: Cache, types: Mapping[str, Type]
) -> Iterator[Work]:
    H, D, heads, rank = config.hidden_size, config.head_dim, config.num_attention_heads, config.q_lora_rank
    attn, key, rotated = f"{plan.prefix}.attn.", cache.entry_bytes(config), config.qk_rope_head_dim
    output = config.o_groups * config.o_lora_rank

    def attend(keys: int) -> tuple[int, int]:
        return heads * keys * (4 * D + _SOFTMAX), keys * key

    part = "attention projections"
    yield Work("wq_a", part, 2 * rank * H, types[attn + "wq_a"].nbytes)
    yield Work("q_norm", part, _NORM * rank, types[attn + "q_norm"].nbytes)
    yield Work("wq_b", part, 2 * heads * D * rank, types[attn + "wq_b"].nbytes)
    yield Work("q head norm and rotation", "attention", heads * (_NORM * D + _ROPE * rotated))
    yield Work("wkv", part, 2 * D * H, types[attn + "wkv"].nbytes)
    norm = types[attn + "kv_norm"].nbytes
    yield Work("kv norm, rotation and store", part, _NORM * D + _ROPE * rotated, norm, key)
    flops, read = attend(min(config.sliding_window, context))
    yield Work("attention, window", part, flops, types[attn + "attn_sink"].nbytes, read)
    if plan.has_compressor:
        yield from _compressor(config, plan, cache, types)
        entries = context // plan.ratio
        if plan.has_indexer:
            yield from _indexer(config, plan, entries, cache, types)
            entries = min(entries, config.index_topk)
        flops, read = attend(entries)
        yield Work("attention, entries", "attention", flops, 0, read)
    yield Work("inverse rotation", "attention", heads * _ROPE * rotated)
    yield Work("wo_a", part, 2 * config.o_lora_rank * heads * D, types[attn + "wo_a"].nbytes)
    yield Work("wo_b", part, 2 * H * output, types[attn + "wo_b"].nbytes)


def _compressor(
    config: ModelConfig, plan: LayerPlan, cache: Cache, types: Mapping[str, Type]
) -> Iterator[Work]:
    name = f"{plan.prefix}.attn.compressor."
    flops, weights, row, pooled, pool_flops = _compression(config, plan, config.head_dim, types, name)
    yield Work("compressor", "compressors", flops, weights, row)
    entry = Fraction(cache.entry_bytes(config), plan.ratio)
    norm = types[f"{name}norm"].nbytes // plan.ratio
    yield Work("compressor pooling", "compressors", pool_flops, norm, int(pooled + entry))


def _indexer(
    config: ModelConfig, plan: LayerPlan, entries: int, cache: Cache, types: Mapping[str, Type]
) -> Iterator[Work]:
    heads, D, H = config.index_n_heads, config.index_head_dim, config.hidden_size
    indexer, part = f"{plan.prefix}.attn.indexer.", "indexers"
    query = heads * (D * int(math.log2(D)) + _ROPE * config.qk_rope_head_dim)  # Hadamard and rotation
    product = 2 * heads * D * config.q_lora_rank
    yield Work("indexer wq_b", part, product + query, types[f"{indexer}wq_b"].nbytes)
    yield Work("indexer weights_proj", part, 2 * heads * H, types[f"{indexer}weights_proj"].nbytes)
    name, key = f"{indexer}compressor.", cache.index_key_bytes(config)
    flops, weights, row, pooled, pool_flops = _compression(config, plan, D, types, name)
    state = int(row + pooled + Fraction(key, plan.ratio))
    # Its norm's gain, two bytes per channel once in four tokens, is left out: the inventory this one follows
    # has it in no line, and the sums are compared byte for byte.
    yield Work("indexer compressor", part, flops + pool_flops, weights, state)
    yield Work("index scores", part, entries * heads * (2 * D + 3), 0, entries * key)
    yield Work("top-k", part, entries)


def _compression(
    config: ModelConfig, plan: LayerPlan, dim: int, types: Mapping[str, Type], name: str
) -> tuple[int, int, int, Fraction, int]:
    """Per token: flops, weight bytes and bytes stored of the projections; bytes read and flops of pooling."""
    windows = 2 if plan.overlaps else 1
    width, tokens = windows * dim, windows * plan.ratio
    weights = _sum(types, name, ("wkv", "wgate")) + types[f"{name}ape"].nbytes // plan.ratio  # one row of it
    pooled = Fraction(2 * tokens * dim * 4, plan.ratio)
    return (
        4 * width * config.hidden_size,
        weights,
        2 * width * 4,
        pooled,
        tokens * dim * _SOFTMAX // plan.ratio,
    )


def _feed_forward(config: ModelConfig, plan: LayerPlan, types: Mapping[str, Type]) -> Iterator[Work]:
    H, W, E, chosen = (
        config.hidden_size,
        config.moe_intermediate_size,
        config.n_routed_experts,
        config.num_experts_per_tok,
    )
    ffn = f"{plan.prefix}.ffn."
    if plan.router is RouterKind.HASH:
        choice = types[f"{ffn}gate.tid2eid"].nbytes // config.vocab_size  # one row
    else:
        choice = types[f"{ffn}gate.bias"].nbytes
    yield Work("router", "routers", 2 * E * H, types[f"{ffn}gate"].nbytes + choice)
    experts = [types[f"{ffn}experts.{name}"] for name in ("w1", "w2", "w3")]
    weights = sum(_chosen_bytes(expert, E, chosen) for expert in experts)
    yield Work("routed experts", "routed experts", chosen * 6 * W * H, weights)
    shared = config.n_shared_experts * 6 * W * H
    weights = _sum(types, f"{ffn}shared_experts.", ("w1", "w2", "w3"))
    yield Work("shared expert", "shared experts", shared, weights)


def _chosen_bytes(experts: Type, count: int, chosen: int) -> int:
    """Bytes of `chosen` of the stacked matrices; NVFP4 comes with a f32 input scale for each."""
    static_scale = isinstance(experts, QuantType) and experts.format == NVFP4
    return experts.nbytes * chosen // count + (4 * chosen if static_scale else 0)
