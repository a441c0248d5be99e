"""DeepSeek-V4 as a graph of the paper's operations, one bucket at a time.

`build(config, deployment, bucket, activation)` gives the whole model, or the block that drafts, for as many
sequences and tokens as the bucket says, each sequence in any slot and starting anywhere. Weights and
activations are plain here; `passes.quantize` turns them into a recipe's formats. Equations: DeepSeek-V4's
inference/model.py.

Rings remember what later tokens look back to, and have room for `ROWS` new ones. A call of so few tokens
writes them to the ring and reads it. One of more reads a copy beside the ring, long enough for all of its
rows, and writes the last of them to the ring: what a sequence keeps does not grow with the size of chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.buckets import ROWS, Bucket
from dsv4c.config import Deployment, ModelConfig
from dsv4c.ir.graph import Builder, Graph, Value
from dsv4c.ir.ops import (
    add,
    add_position_bias,
    advance,
    argmax,
    attention_scores,
    attention_values,
    cache_extend,
    cache_write,
    cast,
    clamp,
    collapse_streams,
    completed_entries,
    compress_pool,
    concat,
    draw,
    embedding,
    emit,
    expand_streams,
    expert_linear,
    gather,
    grouped_linear,
    hadamard,
    index_scores,
    last_rows,
    linear,
    mix_streams,
    mul,
    normalize,
    owners,
    penalize,
    positions,
    reshape,
    rms_norm,
    rope,
    rope_frequencies,
    rsqrt_mean_square,
    scale,
    shift,
    sigmoid,
    silu,
    sink_softmax,
    slice_,
    softmax,
    spread_streams,
    sqrt_softplus,
    sum_,
    take_along,
    token_probabilities,
    top_k,
    visible_entries,
    window_index,
)
from dsv4c.ir.ops.sample import KNOBS, STOPS
from dsv4c.models.layout import layout
from dsv4c.models.schedule import LayerPlan, RouterKind, layer_plans, mtp_plans
from dsv4c.types import BF16, F32, I32, DType, TensorType

WINDOW_TILE = 16  # keys that attention takes at a time
POOL_TILE = 8


def ring_rows(reach: int, tokens: int, tile: int) -> int:
    """Rows that hold `tokens` new ones and what the first of them looks back to: `reach`, itself included."""
    return -(-(reach + tokens - 1) // tile) * tile


def build(config: ModelConfig, deployment: Deployment, bucket: Bucket, activation: DType = BF16) -> Graph:
    """The model's graph for one bucket: B sequences of T tokens, N = B·T rows.

    Inputs: tokens i32[N], lengths i32[B] (valid tokens of each sequence, the rest is padding; 0 is idle),
    slots i32[B] (where each sequence's state is), no two active ones alike; a draft also takes streams
    [N, S, H]. Outputs: streams [N, S, H], logits f32[N, V] and next i32[N]; or f32[B, V] and i32[B], of each
    sequence's last token, when the bucket says so. Steps that sample also give what they say, i32[N], and
    the lengths of the next step.
    """
    with Builder(f"{config.name}.{bucket.name}") as builder:
        model = _Model(config, deployment, bucket, activation, builder)
        outputs = model.draft() if bucket.block == "draft" else model.main()
    return builder.finish(outputs)


@dataclass
class _Mix:
    """Coefficients of one hyper-connection: what the sublayer reads, and how its output is mixed back."""

    x: Value
    post: Value
    comb: Value


class _Model:
    def __init__(
        self,
        config: ModelConfig,
        deployment: Deployment,
        bucket: Bucket,
        activation: DType,
        builder: Builder,
    ) -> None:
        self.config, self.deployment, self.bucket = config, deployment, bucket
        self.activation, self.builder, self.rows = activation, builder, bucket.rows
        sequences = TensorType(I32, (bucket.sequences,))
        self.layout = {p.name: p for p in layout(config)}
        self.declared: dict[str, Value] = {}
        self.frequencies: dict[bool, Value] = {}
        self.tokens = builder.input("tokens", TensorType(I32, (self.rows,)))
        self.lengths = builder.input("lengths", sequences)
        self.slots = builder.input("slots", sequences)
        self.start = self.state("mtp.position" if bucket.block == "draft" else "position", I32)
        self.positions, self.row_slots = positions(
            self.start, self.slots, self.lengths, tokens=bucket.tokens, name="positions"
        )
        builder.rename(self.row_slots, "row_slots")
        self.places: Value = self.row_slots  # where each row finds what `remember` returns
        if bucket.keeps_beside:
            self.places = owners(self.lengths, tokens=bucket.tokens, name="owners")

    # --- declarations --------------------------------------------------------------------------------------

    def weight(self, name: str) -> Value:
        """The parameter of that name: f32 and integer tables as stored, the rest in `activation`."""
        if name not in self.declared:
            param = self.layout[name]
            dtype = {"f32": F32, "i64": I32}.get(param.storage, self.activation)
            self.declared[name] = self.builder.param(name, TensorType(dtype, param.shape))
        return self.declared[name]

    def state(self, name: str, dtype: DType, *shape: int) -> Value:
        """What every slot keeps under that name."""
        return self.builder.state(name, TensorType(dtype, (self.deployment.slots, *shape)))

    def remember(self, name: str, rows: Value, reach: int, tile: int, label: str) -> Value:
        """Put a call's rows [N, D] in the ring of that name, which later tokens look `reach` rows back to.

        Returns what this call's tokens read: the ring, or the copy beside it, one per sequence of the call.
        """
        dtype = rows.type.dtype  # type: ignore[union-attr]  # quantization comes later
        ring = self.state(name, dtype, ring_rows(reach, ROWS, tile), rows.type.shape[1])
        given = (ring, rows, self.positions, self.row_slots)
        if not self.bucket.keeps_beside:
            written: Value = cache_write(*given, name=f"{label}_written")
            return written
        capacity = ring_rows(reach, self.bucket.tokens, tile)
        beside: Value = cache_extend(
            *given, capacity=capacity, tokens=self.bucket.tokens, name=f"{label}_beside"
        )
        cache_write(*given, name=f"{label}_written")
        return beside

    def rotary(self, compressed: bool) -> Value:
        """RoPE frequencies: compressed layers use their own base with YaRN, for everything in the layer."""
        c = self.config
        frequencies: Value = rope_frequencies(
            theta=c.compress_rope_theta if compressed else c.rope_theta,
            dims=c.qk_rope_head_dim,
            factor=c.rope_factor if compressed else 1.0,
            original_max_position=c.rope_original_max_position,
            beta_fast=c.rope_beta_fast,
            beta_slow=c.rope_beta_slow,
            name="compress_frequencies" if compressed else "frequencies",
        )
        return frequencies

    def to(self, x: Value, dtype: DType, name: str = "") -> Value:
        """`x` cast, and known by `name` whether or not there is anything to cast."""
        if x.type != TensorType(dtype, x.type.shape):
            x = cast(x, to=dtype, name=name)
        elif name:
            self.builder.rename(x, name)
        return x

    # --- the frame -----------------------------------------------------------------------------------------

    def main(self) -> dict[str, Value]:
        plans = layer_plans(self.config)
        self.frequencies = {kind: self.rotary(kind) for kind in sorted({p.has_compressor for p in plans})}
        x = embedding(self.weight("embed"), self.tokens, name="embedding")
        streams = expand_streams(x, streams=self.config.hc_mult, name="streams")
        for plan in plans:
            streams = self.layer(plan, streams)
        return self.outputs("", streams)

    def draft(self) -> dict[str, Value]:
        """The block that drafts one token more, from the streams and the token that follows."""
        c, (plan,) = self.config, mtp_plans(self.config)[:1]
        streams = self.builder.input(
            "streams", TensorType(self.activation, (self.rows, c.hc_mult, c.hidden_size))
        )
        self.frequencies = {False: self.rotary(False)}
        with self.builder.scope(plan.prefix):
            e = embedding(self.weight("embed"), self.tokens, name="embedding")
            e = rms_norm(e, self.weight(f"{plan.prefix}.enorm"), eps=c.rms_norm_eps, name="e")
            h = rms_norm(streams, self.weight(f"{plan.prefix}.hnorm"), eps=c.rms_norm_eps, name="h")
            e = linear(e, self.weight(f"{plan.prefix}.e_proj"), out=self.activation, name="e_out")
            h = linear(h, self.weight(f"{plan.prefix}.h_proj"), out=self.activation, name="h_out")
            streams = add(reshape(e, shape=(-1, 1, c.hidden_size)), h, name="streams")
        streams = self.layer(plan, streams)
        return self.outputs(f"{plan.prefix}.", streams)

    def outputs(self, prefix: str, streams: Value) -> dict[str, Value]:
        c = self.config
        with self.builder.scope(f"{prefix}output"):
            mixes = self.mixes(f"{prefix}hc_head", streams)
            weights = sigmoid(
                add(mul(mixes, self.weight(f"{prefix}hc_head_scale")), self.weight(f"{prefix}hc_head_base"))
            )
            x = collapse_streams(
                streams, shift(weights, offset=c.hc_eps), out=self.activation, name="hc_head"
            )
            x = rms_norm(x, self.weight(f"{prefix}norm"), eps=c.rms_norm_eps, name="final_norm")
            if self.bucket.logits == "last":
                x = last_rows(x, self.lengths, name="last")
            logits = linear(x, self.weight("head"), out=F32, name="logits")
            chosen = self.choose(logits)
            advance(self.start, self.slots, self.lengths, name="position")
        return {"logits": logits, **chosen, "streams": streams}

    def choose(self, logits: Value) -> dict[str, Value]:
        """The next token of every row; of a step that samples also what it says, and the next lengths."""
        if not self.bucket.sampled:
            return {"next": argmax(logits, name="next")}
        history = self.state("sampling.history", I32, self.deployment.max_context)
        origin = self.state("sampling.origin", I32)
        knobs = self.state("sampling.knobs", F32, len(KNOBS))
        seeds, stops = self.state("sampling.seeds", I32, 2), self.state("sampling.stops", I32, STOPS)
        at, slots = self.positions, self.row_slots
        written = cache_write(history, self.tokens, at, slots, name="history_written")
        lowered = penalize(logits, written, at, slots, origin, knobs, name="lowered")
        probabilities = token_probabilities(lowered, slots, knobs, name="probabilities")
        chosen = draw(probabilities, at, slots, origin, seeds, name="next")
        said, going = emit(chosen, self.lengths, slots, stops, name="said")
        self.builder.rename(going, "going")
        return {"next": chosen, "said": said, "going": going}

    def layer(self, plan: LayerPlan, streams: Value) -> Value:
        """One block: attention, then experts, each between a hyper-connection's two halves."""
        with self.builder.scope(plan.prefix):
            mix = self.hyper_pre("hc_attn", f"{plan.prefix}.hc_attn", streams)
            x = self.norm(mix.x, f"{plan.prefix}.attn_norm", "attn_in")
            with self.builder.scope("attn"):
                x = self.attention(plan, x)
            streams = self.hyper_post("hc_attn", x, streams, mix, "x_attn")
            mix = self.hyper_pre("hc_ffn", f"{plan.prefix}.hc_ffn", streams)
            x = self.norm(mix.x, f"{plan.prefix}.ffn_norm", "ffn_in")
            with self.builder.scope("ffn"):
                x = self.experts(plan, x)
            return self.hyper_post("hc_ffn", x, streams, mix, "x_ffn")

    def norm(self, x: Value, gain: str, name: str) -> Value:
        out: Value = rms_norm(x, self.weight(gain), eps=self.config.rms_norm_eps, name=name)
        return out

    # --- hyper-connections ---------------------------------------------------------------------------------

    def mixes(self, name: str, streams: Value) -> Value:
        """(v · fn) * rsqrt(mean(v²) + eps) with v all streams of a token, f32."""
        _, s, h = streams.type.shape
        v = reshape(streams, shape=(-1, s * h), name="v")
        projected = linear(v, self.weight(f"{name}_fn"), out=F32)
        mixes: Value = mul(projected, rsqrt_mean_square(v, eps=self.config.rms_norm_eps), name="mixes")
        return mixes

    def hyper_pre(self, scope: str, name: str, streams: Value) -> _Mix:
        """Weights from the streams: pre, post, and a doubly stochastic comb by Sinkhorn steps."""
        c, s = self.config, self.config.hc_mult
        with self.builder.scope(scope):
            mixes = self.mixes(name, streams)

            def part(i: int, start: int, stop: int) -> Value:
                factor = slice_(self.weight(f"{name}_scale"), axis=0, start=i, stop=i + 1)
                base = slice_(self.weight(f"{name}_base"), axis=0, start=start, stop=stop)
                shifted: Value = add(mul(slice_(mixes, axis=1, start=start, stop=stop), factor), base)
                return shifted

            pre = shift(sigmoid(part(0, 0, s)), offset=c.hc_eps, name="pre")
            post = scale(sigmoid(part(1, s, 2 * s)), factor=2.0, name="post")
            comb = reshape(part(2, 2 * s, 2 * s + s * s), shape=(-1, s, s))
            comb = shift(softmax(comb, axis=-1), offset=c.hc_eps)
            comb = normalize(comb, axis=-2, eps=c.hc_eps)
            for _ in range(c.hc_sinkhorn_iters - 1):
                comb = normalize(comb, axis=-1, eps=c.hc_eps)
                comb = normalize(comb, axis=-2, eps=c.hc_eps)
            return _Mix(collapse_streams(streams, pre, out=self.activation, name="x"), post, comb)

    def hyper_post(self, scope: str, f: Value, streams: Value, mix: _Mix, name: str) -> Value:
        with self.builder.scope(scope):
            mixed = add(spread_streams(f, mix.post), mix_streams(streams, mix.comb))
        return self.to(mixed, self.activation, name)

    # --- attention -----------------------------------------------------------------------------------------

    def attention(self, plan: LayerPlan, x: Value) -> Value:
        c, attn, act = self.config, f"{plan.prefix}.attn", self.activation
        heads, dim, groups = c.num_attention_heads, c.head_dim, c.o_groups
        frequencies = self.frequencies[plan.has_compressor]

        qa = linear(x, self.weight(f"{attn}.wq_a"), out=act, name="qa")
        qr = rms_norm(qa, self.weight(f"{attn}.q_norm"), eps=c.rms_norm_eps, name="qr")
        q = linear(qr, self.weight(f"{attn}.wq_b"), out=act, name="qb")
        q = rms_norm(reshape(q, shape=(-1, heads, dim)), eps=c.rms_norm_eps, name="q_normed")
        q = rope(q, self.positions, frequencies, name="q")

        kv = linear(x, self.weight(f"{attn}.wkv"), out=act, name="kv_out")
        kv = rms_norm(kv, self.weight(f"{attn}.kv_norm"), eps=c.rms_norm_eps, name="kv_normed")
        kv = rope(kv, self.positions, frequencies, name="kv")
        window = self.remember(f"{attn}.window", kv, c.sliding_window, WINDOW_TILE, "window")
        index = window_index(self.positions, window=c.sliding_window, name="window_index")
        keys = gather(window, index, self.places, name="window_keys")

        if plan.has_compressor:
            entries = self.compressor(plan, f"{attn}.compressor", f"{attn}.entries", x, dim, rotated=False)
            if plan.has_indexer:
                chosen = self.indexer(plan, x, qr)
            else:
                chosen = visible_entries(
                    self.positions, ratio=plan.ratio, capacity=entries.type.shape[1], name="entry_index"
                )
            entry_keys = gather(entries, chosen, self.row_slots, name="entry_keys")
            keys = concat(keys, entry_keys, axis=1, name="keys")
            index = concat(index, chosen, axis=1, name="index")

        scores = attention_scores(q, keys, index, scale=dim**-0.5, name="scores")
        p, denominator = sink_softmax(scores, self.weight(f"{attn}.attn_sink"), out=act, name="p")
        o = attention_values(p, denominator, keys, name="o")
        o = rope(o, self.positions, frequencies, inverse=True, name="o_unrotated")
        o = reshape(o, shape=(-1, groups, heads * dim // groups))
        z = grouped_linear(o, self.weight(f"{attn}.wo_a"), out=act, name="z_grouped")
        z = reshape(z, shape=(-1, groups * c.o_lora_rank), name="z")
        out: Value = linear(z, self.weight(f"{attn}.wo_b"), out=act, name="attn_out")
        return out

    def compressor(self, plan: LayerPlan, name: str, cache: str, x: Value, dim: int, rotated: bool) -> Value:
        """Project, keep in a ring, pool finished windows, normalize, rotate, store; returns the entries.

        `rotated` applies the Hadamard transform that index keys live under.
        """
        c, ratio = self.config, plan.ratio
        with self.builder.scope(name.removeprefix(f"{plan.prefix}.attn.")):
            kv = linear(x, self.weight(f"{name}.wkv"), out=F32, name="kv_out")
            score = linear(x, self.weight(f"{name}.wgate"), out=F32, name="gate_out")
            score = add_position_bias(score, self.weight(f"{name}.ape"), self.positions, name="score_out")
            reach = kv.type.shape[1] // dim * ratio
            kv_ring = self.remember(f"{name}.kv", kv, reach, POOL_TILE, "kv")
            score_ring = self.remember(f"{name}.score", score, reach, POOL_TILE, "score")
            done, slots = self.completed(ratio, self.row_slots, "done")
            places = slots
            if self.bucket.keeps_beside:
                _, places = self.completed(ratio, self.places, "done_beside")
            z = compress_pool(
                kv_ring,
                score_ring,
                done,
                places,
                ratio=ratio,
                overlap=plan.overlaps,
                tokens=self.bucket.tokens,
                name="pooled",
            )
            z = self.to(z, self.activation, "z")
            e = rms_norm(z, self.weight(f"{name}.norm"), eps=c.rms_norm_eps, name="normed")
            e = rope(e, done, self.frequencies[True], stride=ratio, name="entry")
            if rotated:
                e = hadamard(e, name="key")
            entries = self.state(cache, self.activation, max(1, self.deployment.max_context // ratio), dim)
            written: Value = cache_write(entries, e, done, slots, name="written")
            return written

    def completed(self, ratio: int, slots: Value, name: str) -> tuple[Value, Value]:
        """The entries that this call completes, and where: by slot, or by sequence of the call."""
        entries, places = completed_entries(
            self.positions, slots, ratio=ratio, tokens=self.bucket.tokens, name=name
        )
        self.builder.rename(places, f"{name}_slots")
        return entries, places

    def indexer(self, plan: LayerPlan, x: Value, qr: Value) -> Value:
        """Which entries each token attends to: i32[N, k], -1 padded."""
        c, name, act = self.config, f"{plan.prefix}.attn.indexer", self.activation
        heads, dim = c.index_n_heads, c.index_head_dim
        with self.builder.scope("indexer"):
            q = linear(qr, self.weight(f"{name}.wq_b"), out=act, name="qb")
            q = rope(
                reshape(q, shape=(-1, heads, dim)),
                self.positions,
                self.frequencies[True],
                name="q_rotated",
            )
            q = hadamard(q, name="q")
            weights = linear(x, self.weight(f"{name}.weights_proj"), out=act, name="weights_out")
            weights = scale(weights, factor=dim**-0.5 * heads**-0.5, name="weights")
        keys = self.compressor(plan, f"{name}.compressor", f"{name}.keys", x, dim, rotated=True)
        with self.builder.scope("indexer"):
            scores = index_scores(
                q, keys, weights, self.positions, self.row_slots, ratio=plan.ratio, name="scores"
            )
            chosen: Value = top_k(scores, k=c.index_topk, name="chosen")
            return chosen

    # --- experts -------------------------------------------------------------------------------------------

    def router(self, plan: LayerPlan, x: Value) -> tuple[Value, Value]:
        """Chosen experts i32[N, k] and their weights f32[N, k]."""
        c, gate = self.config, f"{plan.prefix}.ffn.gate"
        with self.builder.scope("router"):
            scores = sqrt_softplus(linear(x, self.weight(gate), out=F32), name="scores")
            if plan.router is RouterKind.HASH:
                experts = embedding(self.weight(f"{gate}.tid2eid"), self.tokens, name="experts")
            else:
                biased = add(scores, self.weight(f"{gate}.bias"))
                experts = top_k(biased, k=c.num_experts_per_tok, name="experts")
            chosen = normalize(take_along(scores, experts), axis=-1, eps=0.0)
            return experts, scale(chosen, factor=c.routed_scaling_factor, name="weights")

    def swiglu(self, gate: Value, up: Value, weights: Value | None) -> Value:
        """silu(min(gate, limit)) * clamp(up, ±limit), times the routing weight, in f32."""
        limit = self.config.swiglu_limit
        gate = clamp(self.to(gate, F32), low=None, high=limit)
        up = clamp(self.to(up, F32), low=-limit, high=limit)
        h = mul(silu(gate), up)
        if weights is not None:
            h = mul(h, reshape(weights, shape=(-1, weights.type.shape[1], 1)))
        return self.to(h, self.activation, "h")

    def experts(self, plan: LayerPlan, x: Value) -> Value:
        ffn, act = f"{plan.prefix}.ffn", self.activation
        experts, weights = self.router(plan, x)
        with self.builder.scope("experts"):
            gate = expert_linear(x, self.weight(f"{ffn}.experts.w1"), experts, out=act, name="gate")
            up = expert_linear(x, self.weight(f"{ffn}.experts.w3"), experts, out=act, name="up")
            h = self.swiglu(gate, up, weights)
            down = expert_linear(h, self.weight(f"{ffn}.experts.w2"), experts, out=act, name="down")
            routed = sum_(down, axis=1, out=F32, name="routed")
        with self.builder.scope("shared_experts"):
            gate = linear(x, self.weight(f"{ffn}.shared_experts.w1"), out=act, name="gate")
            up = linear(x, self.weight(f"{ffn}.shared_experts.w3"), out=act, name="up")
            h = self.swiglu(gate, up, None)
            shared = linear(h, self.weight(f"{ffn}.shared_experts.w2"), out=act, name="down")
        total = add(routed, shared, name="sum")
        return self.to(total, act, "ffn_out")
