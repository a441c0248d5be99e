"""DeepSeek-V4 as a graph of the paper's operations, one bucket at a time.

`build(config, deployment, bucket, activation)` gives the whole model, or what drafts, or both in a round, for
as many sequences and tokens as the bucket says, each sequence in any slot and starting anywhere. Weights and
activations are plain here; `passes.quantize` turns them into a recipe's formats. Equations: DeepSeek-V4's
inference/model.py.

Rings remember what later tokens look back to, and have room for `ROWS` new ones. A call of so few tokens
writes them to the ring and reads it. One of more reads a copy beside the ring, long enough for all of its
rows, and writes the last of them to the ring: what a sequence keeps does not grow with the size of chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsv4c.buckets import ROWS, Bucket
from dsv4c.config import Deployment, ModelConfig
from dsv4c.ir.graph import Builder, Graph, Value
from dsv4c.ir.ops import (
    accept,
    add,
    add_position_bias,
    advance,
    argmax,
    attention_scores,
    attention_values,
    cache_extend,
    cache_write,
    candidates,
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
    present,
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
    stop,
    sum_,
    take_along,
    token_probabilities,
    top_k,
    trusted,
    visible_entries,
    window_index,
)
from dsv4c.ir.ops.sample import KNOBS, STOPS
from dsv4c.models.draft import Head, head_of
from dsv4c.models.layout import head_of_drafts, layout
from dsv4c.models.rows import POOL_TILE, WINDOW_TILE, Rows, ring_rows
from dsv4c.models.schedule import LayerPlan, RouterKind, layer_plans
from dsv4c.types import BF16, F32, I32, DType, TensorType


def build(
    config: ModelConfig,
    deployment: Deployment,
    bucket: Bucket,
    activation: DType = BF16,
    *,
    own_head: bool = False,
) -> Graph:
    """The model's graph for one bucket: B sequences of T tokens, N = B·T rows.

    Inputs: tokens i32[N], lengths i32[B] (valid tokens of each sequence, the rest is padding; 0 is idle),
    slots i32[B] (where each sequence's state is), no two active ones alike. Outputs: streams [N, S, H],
    logits f32[N, V] and next i32[N]; or f32[B, V] and i32[B], of each sequence's last token, when the bucket
    says so. Steps that sample also give what they say, i32[N], and the lengths of the next step.

    What drafts takes one token of each sequence, i32[B], of length 1 or 0, and gives T drafts of each: next
    i32[N], the logits f32[N, V] that they are the likeliest of, and where it has an opinion, confidence
    f32[N, 1] that each holds, as logits. Rounds take the same and judge, accept steps judge the drafts among
    their tokens: logits f32[N, V], said i32[N], which ends in -1, and next i32[B], the tokens of the next
    round; where they sample also its lengths. With `own_head` drafts read the head as a parameter of theirs.
    """
    with Builder(f"{config.name}.{bucket.name}") as builder:
        model = Model(config, deployment, bucket, activation, builder, own_head=own_head)
        of_kind = {"draft": model.draft, "accept": model.accept, "round": model.round}
        outputs = of_kind.get(bucket.kind, model.main)()
    return builder.finish(outputs)


@dataclass
class _Mix:
    """Coefficients of one hyper-connection: what the sublayer reads, and how its output is mixed back."""

    x: Value
    post: Value
    comb: Value


class Model:
    """The parts of one graph, each built where it is called."""

    def __init__(
        self,
        config: ModelConfig,
        deployment: Deployment,
        bucket: Bucket,
        activation: DType,
        builder: Builder,
        *,
        own_head: bool = False,
    ) -> None:
        self.config, self.deployment, self.bucket = config, deployment, bucket
        self.activation, self.builder, self.own_head = activation, builder, own_head
        sequences = TensorType(I32, (bucket.sequences,))
        self.layout = {p.name: p for p in layout(config)}
        self.declared: dict[str, Value] = {}
        self.states: dict[str, Value] = {}  # as they were written last
        self.frequencies: dict[bool, Value] = {}
        self.head: Head | None = head_of(self) if deployment.drafts or bucket.drafts else None
        self.tokens = builder.input("tokens", TensorType(I32, (bucket.given,)))
        self.lengths = builder.input("lengths", sequences)
        self.slots = builder.input("slots", sequences)
        self.start = self.state("position", I32)

    # --- declarations --------------------------------------------------------------------------------------

    def weight(self, name: str) -> Value:
        """The parameter of that name: f32 and integer tables as stored, the rest in `activation`."""
        if name not in self.declared:
            param = self.layout[name]
            dtype = {"f32": F32, "i64": I32}.get(param.storage, self.activation)
            self.declared[name] = self.builder.param(name, TensorType(dtype, param.shape))
        return self.declared[name]

    def head_of_drafts(self) -> Value:
        """The model's head, or drafts' own copy of it."""
        if not self.own_head:
            return self.weight("head")
        name = head_of_drafts(self.config)
        if name not in self.declared:
            shape = self.layout["head"].shape
            self.declared[name] = self.builder.param(name, TensorType(self.activation, shape))
        return self.declared[name]

    def state(self, name: str, dtype: DType, *shape: int) -> Value:
        """What every slot keeps under that name, as the graph has left it so far."""
        if name not in self.states:
            type_ = TensorType(dtype, (self.deployment.slots, *shape))
            self.states[name] = self.builder.state(name, type_)
        return self.states[name]

    def ring(self, name: str, dtype: DType, width: int, reach: int, tile: int) -> Value:
        """The ring of that name for rows of a width, which later tokens look `reach` rows back to."""
        return self.state(name, dtype, ring_rows(reach, ROWS, tile), width)

    def write(self, name: str, values: Value, places: Value, slots: Value, label: str) -> Value:
        """Put rows [N, D] at their places in the state of that name."""
        written: Value = cache_write(self.states[name], values, places, slots, name=label)
        self.states[name] = written
        return written

    def remember(self, name: str, values: Value, reach: int, tile: int, label: str, rows: Rows) -> Value:
        """Put a call's rows [N, D] in the ring of that name, which later tokens look `reach` rows back to.

        Returns what this call's tokens read: the ring, or the copy beside it, one per sequence of the call.
        """
        dtype = values.type.dtype  # type: ignore[union-attr]  # quantization comes later
        ring = self.ring(name, dtype, values.type.shape[1], reach, tile)
        beside: Value | None = None
        if rows.beside:
            capacity, tokens = ring_rows(reach, self.bucket.tokens, tile), self.bucket.tokens
            given = (ring, values, rows.positions, rows.slots)
            beside = cache_extend(*given, capacity=capacity, tokens=tokens, name=f"{label}_beside")
        written = self.write(name, values, rows.positions, rows.slots, f"{label}_written")
        return written if beside is None else beside

    def frequency(self, compressed: bool) -> Value:
        """The RoPE frequencies of compressed or of other layers, computed where they are first asked for."""
        if compressed not in self.frequencies:
            self.frequencies[compressed] = self.rotary(compressed)
        return self.frequencies[compressed]

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
        """All tokens that are given, and what follows them."""
        rows = self.rows(self.tokens, self.lengths)
        streams = self.body(rows)
        with self.builder.scope("output"):
            logits = self.logits(streams)
            said: dict[str, Value] = {"next": self.choose(logits, rows)}
            if self.bucket.sampled:
                stops = self.state("sampling.stops", I32, STOPS)
                said["said"], going = emit(said["next"], self.lengths, rows.slots, stops, name="said")
                self.builder.rename(going, "going")
                said["going"] = going
            advance(self.start, self.slots, self.lengths, name="position")
        return {"logits": logits, **said, "streams": streams}

    def draft(self) -> dict[str, Value]:
        """Tokens drafted behind the one that is given."""
        assert self.head is not None
        return self.head.draft(self.bucket.tokens).joined()

    def round(self) -> dict[str, Value]:
        """Tokens drafted behind the one that is given, and judged."""
        assert self.head is not None
        drafted = self.head.draft(self.bucket.tokens - 1)
        tokens, lengths = candidates(self.tokens, drafted.tokens, self.lengths, name="tokens")
        if self.bucket.trusts and drafted.confidence is not None:
            least = self.state("drafting.least", F32)
            lengths = trusted(lengths, drafted.confidence, self.slots, least, name="trusted")
        self.builder.rename(lengths, "row_lengths")
        return self.judge(tokens, lengths)

    def accept(self) -> dict[str, Value]:
        """Tokens of which those behind the first are drafts, judged."""
        return self.judge(self.tokens, self.lengths)

    def judge(self, tokens: Value, lengths: Value) -> dict[str, Value]:
        """What the model says of them, as long as it agrees; as many are consumed."""
        rows = replace(self.rows(tokens, lengths), judged=self.bucket.trusts)
        streams = self.body(rows)
        with self.builder.scope("output"):
            logits = self.logits(streams)
            chosen = self.choose(logits, rows)
            said, counts, following = accept(chosen, tokens, lengths, name="accepted")
            self.builder.rename(counts, "counts")
            self.builder.rename(following, "following")
            outputs: dict[str, Value] = {"logits": logits, "next": following, "said": said}
            if self.bucket.sampled:
                stops = self.state("sampling.stops", I32, STOPS)
                said, counts, following, going = stop(said, rows.slots, counts, following, stops, name="said")
                self.builder.rename(going, "going")
                outputs |= {"next": following, "said": said, "going": going}
            advance(self.start, self.slots, counts, name="position")
        return outputs

    def rows(self, tokens: Value, lengths: Value) -> Rows:
        """A call's tokens: as many of each sequence as its length says, from where the slot is."""
        places, slots = positions(
            self.start, self.slots, lengths, tokens=self.bucket.tokens, name="positions"
        )
        self.builder.rename(slots, "row_slots")
        window, beside = self.config.sliding_window, self.bucket.keeps_beside
        found = owners(lengths, tokens=self.bucket.tokens, name="owners") if beside else slots
        return Rows(tokens, places, slots, found, places, window, window, beside)

    def body(self, rows: Rows) -> Value:
        """The layers, and what they leave for drafts: streams [N, S, H]."""
        plans = layer_plans(self.config)
        kinds = {p.has_compressor for p in plans} | ({False} if self.head is not None else set())
        for kind in sorted(kinds):
            self.frequency(kind)
        x = embedding(self.weight("embed"), rows.tokens, name="embedding")
        streams: Value = expand_streams(x, streams=self.config.hc_mult, name="streams")
        for plan in plans:
            streams = self.layer(plan, streams, rows)
            if self.head is not None:
                self.head.see(plan, streams)
        if self.head is not None:
            self.head.keep(streams, rows)
        return streams

    def collapsed(self, streams: Value, prefix: str = "") -> Value:
        """Streams [N, S, H] as the head reads them, [N, H]."""
        c = self.config
        mixes = self.mixes(f"{prefix}hc_head", streams)
        weights = sigmoid(
            add(mul(mixes, self.weight(f"{prefix}hc_head_scale")), self.weight(f"{prefix}hc_head_base"))
        )
        x: Value = collapse_streams(
            streams, shift(weights, offset=c.hc_eps), out=self.activation, name="hc_head"
        )
        return x

    def logits(self, streams: Value) -> Value:
        """Of every row, or of each sequence's last one."""
        x = self.norm(self.collapsed(streams), "norm", "final_norm")
        if self.bucket.logits == "last":
            x = last_rows(x, self.lengths, name="last")
        logits: Value = linear(x, self.weight("head"), out=F32, name="logits")
        return logits

    def choose(self, logits: Value, rows: Rows) -> Value:
        """The next token of every row."""
        if not self.bucket.sampled:
            likeliest: Value = argmax(logits, name="next")
            return likeliest
        self.state("sampling.history", I32, self.deployment.max_context)
        origin = self.state("sampling.origin", I32)
        knobs = self.state("sampling.knobs", F32, len(KNOBS))
        seeds = self.state("sampling.seeds", I32, 2)
        at, slots = rows.positions, rows.slots
        written = self.write("sampling.history", rows.tokens, at, slots, "history_written")
        lowered = penalize(logits, written, at, slots, origin, knobs, name="lowered")
        probabilities = token_probabilities(lowered, slots, knobs, name="probabilities")
        drawn: Value = draw(probabilities, at, slots, origin, seeds, name="next")
        return drawn

    def layer(self, plan: LayerPlan, streams: Value, rows: Rows) -> Value:
        """One block: attention, then experts, each between a hyper-connection's two halves."""
        with self.builder.scope(plan.prefix):
            mix = self.hyper_pre("hc_attn", f"{plan.prefix}.hc_attn", streams)
            x = self.norm(mix.x, f"{plan.prefix}.attn_norm", "attn_in")
            with self.builder.scope("attn"):
                x = self.attention(plan, x, rows)
            streams = self.hyper_post("hc_attn", x, streams, mix, "x_attn")
            mix = self.hyper_pre("hc_ffn", f"{plan.prefix}.hc_ffn", streams)
            x = self.norm(mix.x, f"{plan.prefix}.ffn_norm", "ffn_in")
            with self.builder.scope("ffn"):
                x = self.experts(plan, x, rows)
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

    def attention(self, plan: LayerPlan, x: Value, rows: Rows) -> Value:
        c, attn, act = self.config, f"{plan.prefix}.attn", self.activation
        heads, dim, groups = c.num_attention_heads, c.head_dim, c.o_groups
        frequencies = self.frequency(plan.has_compressor)

        qa = linear(x, self.weight(f"{attn}.wq_a"), out=act, name="qa")
        qr = rms_norm(qa, self.weight(f"{attn}.q_norm"), eps=c.rms_norm_eps, name="qr")
        q = linear(qr, self.weight(f"{attn}.wq_b"), out=act, name="qb")
        q = rms_norm(reshape(q, shape=(-1, heads, dim)), eps=c.rms_norm_eps, name="q_normed")
        q = rope(q, rows.positions, frequencies, name="q")

        kv = self.window_rows(plan, x, rows.positions)
        window = self.remember(f"{attn}.window", kv, rows.reach, WINDOW_TILE, "window", rows)
        index = window_index(rows.last, window=rows.window, name="window_index")
        keys = gather(window, index, rows.places, name="window_keys")

        if plan.has_compressor:
            cache = f"{attn}.entries"
            entries = self.compressor(plan, f"{attn}.compressor", cache, x, dim, rows, rotated=False)
            if plan.has_indexer:
                chosen = self.indexer(plan, x, qr, rows)
            else:
                chosen = visible_entries(
                    rows.positions, ratio=plan.ratio, capacity=entries.type.shape[1], name="entry_index"
                )
            entry_keys = gather(entries, chosen, rows.slots, name="entry_keys")
            keys = concat(keys, entry_keys, axis=1, name="keys")
            index = concat(index, chosen, axis=1, name="index")

        scores = attention_scores(q, keys, index, scale=dim**-0.5, name="scores")
        p, denominator = sink_softmax(scores, self.weight(f"{attn}.attn_sink"), out=act, name="p")
        o = attention_values(p, denominator, keys, name="o")
        o = rope(o, rows.positions, frequencies, inverse=True, name="o_unrotated")
        o = reshape(o, shape=(-1, groups, heads * dim // groups))
        z = grouped_linear(o, self.weight(f"{attn}.wo_a"), out=act, name="z_grouped")
        z = reshape(z, shape=(-1, groups * c.o_lora_rank), name="z")
        out: Value = linear(z, self.weight(f"{attn}.wo_b"), out=act, name="attn_out")
        return out

    def window_rows(self, plan: LayerPlan, x: Value, places: Value) -> Value:
        """What a layer's window keeps of its normalized input [N, H] at these positions: [N, D]."""
        attn = f"{plan.prefix}.attn"
        kv = linear(x, self.weight(f"{attn}.wkv"), out=self.activation, name="kv_out")
        kv = self.norm(kv, f"{attn}.kv_norm", "kv_normed")
        rotated: Value = rope(kv, places, self.frequency(plan.has_compressor), name="kv")
        return rotated

    def compressor(
        self, plan: LayerPlan, name: str, cache: str, x: Value, dim: int, rows: Rows, *, rotated: bool
    ) -> Value:
        """Project, keep in a ring, pool finished windows, normalize, rotate, store; returns the entries.

        `rotated` applies the Hadamard transform that index keys live under.
        """
        c, ratio = self.config, plan.ratio
        with self.builder.scope(name.removeprefix(f"{plan.prefix}.attn.")):
            kv = linear(x, self.weight(f"{name}.wkv"), out=F32, name="kv_out")
            score = linear(x, self.weight(f"{name}.wgate"), out=F32, name="gate_out")
            score = add_position_bias(score, self.weight(f"{name}.ape"), rows.positions, name="score_out")
            reach = kv.type.shape[1] // dim * ratio
            kv_ring = self.remember(f"{name}.kv", kv, reach, POOL_TILE, "kv", rows)
            score_ring = self.remember(f"{name}.score", score, reach, POOL_TILE, "score", rows)
            done, slots = self.completed(ratio, rows.positions, rows.slots, "done")
            places = slots
            if rows.beside:
                _, places = self.completed(ratio, rows.positions, rows.places, "done_beside")
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
            e = rope(e, done, self.frequency(True), stride=ratio, name="entry")
            if rotated:
                e = hadamard(e, name="key")
            self.state(cache, self.activation, max(1, self.deployment.max_context // ratio), dim)
            return self.write(cache, e, done, slots, "written")

    def completed(self, ratio: int, places: Value, slots: Value, name: str) -> tuple[Value, Value]:
        """The entries that this call completes, and where: by slot, or by sequence of the call."""
        entries, owned = completed_entries(places, slots, ratio=ratio, tokens=self.bucket.tokens, name=name)
        self.builder.rename(owned, f"{name}_slots")
        return entries, owned

    def indexer(self, plan: LayerPlan, x: Value, qr: Value, rows: Rows) -> Value:
        """Which entries each token attends to: i32[N, k], -1 padded."""
        c, name, act = self.config, f"{plan.prefix}.attn.indexer", self.activation
        heads, dim = c.index_n_heads, c.index_head_dim
        with self.builder.scope("indexer"):
            q = linear(qr, self.weight(f"{name}.wq_b"), out=act, name="qb")
            q = rope(
                reshape(q, shape=(-1, heads, dim)),
                rows.positions,
                self.frequency(True),
                name="q_rotated",
            )
            q = hadamard(q, name="q")
            weights = linear(x, self.weight(f"{name}.weights_proj"), out=act, name="weights_out")
            weights = scale(weights, factor=dim**-0.5 * heads**-0.5, name="weights")
        keys = self.compressor(plan, f"{name}.compressor", f"{name}.keys", x, dim, rows, rotated=True)
        with self.builder.scope("indexer"):
            scores = index_scores(
                q, keys, weights, rows.positions, rows.slots, ratio=plan.ratio, name="scores"
            )
            chosen: Value = top_k(scores, k=c.index_topk, name="chosen")
            return chosen

    # --- experts -------------------------------------------------------------------------------------------

    def router(self, plan: LayerPlan, x: Value, rows: Rows) -> tuple[Value, Value]:
        """Chosen experts i32[N, k] and their weights f32[N, k]."""
        c, gate = self.config, f"{plan.prefix}.ffn.gate"
        with self.builder.scope("router"):
            scores = sqrt_softplus(linear(x, self.weight(gate), out=F32), name="scores")
            if plan.router is RouterKind.HASH:
                experts = embedding(self.weight(f"{gate}.tid2eid"), rows.tokens, name="experts")
            else:
                biased = add(scores, self.weight(f"{gate}.bias"))
                experts = top_k(biased, k=c.num_experts_per_tok, name="experts")
            chosen = normalize(take_along(scores, experts), axis=-1, eps=0.0)
            weights = scale(chosen, factor=c.routed_scaling_factor, name="weights")
            if rows.judged:
                weights = present(weights, rows.positions, name="present")
            return experts, weights

    def swiglu(self, gate: Value, up: Value, weights: Value | None) -> Value:
        """silu(min(gate, limit)) * clamp(up, ±limit), times the routing weight, in f32."""
        limit = self.config.swiglu_limit
        gate = clamp(self.to(gate, F32), low=None, high=limit)
        up = clamp(self.to(up, F32), low=-limit, high=limit)
        h = mul(silu(gate), up)
        if weights is not None:
            h = mul(h, reshape(weights, shape=(-1, weights.type.shape[1], 1)))
        return self.to(h, self.activation, "h")

    def experts(self, plan: LayerPlan, x: Value, rows: Rows) -> Value:
        ffn, act = f"{plan.prefix}.ffn", self.activation
        experts, weights = self.router(plan, x, rows)
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
