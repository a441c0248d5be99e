"""What drafts tokens: an MTP block that goes on from its own streams, or DSpark's stages.

Both look back to what the model computed for the tokens before, by position: every call of the model, prompts
and rounds alike, writes rows for its tokens to the rings of the blocks that draft. So tokens that are taken
back leave no trace there either, and a slot that is copied, saved or prefilled needs no catching up. Drafting
writes rows of its own at the positions after those; the model's write over them when it comes there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dsv4c.buckets import ROWS
from dsv4c.ir.graph import Value
from dsv4c.ir.ops import (
    add,
    argmax,
    concat,
    draft_rows,
    embedding,
    expand_streams,
    gather,
    linear,
    preceding,
    reshape,
    rms_norm,
    scale,
    slice_,
    sum_,
)
from dsv4c.models.rows import WINDOW_TILE, Rows
from dsv4c.models.schedule import LayerPlan, draft_plans
from dsv4c.types import F32

if TYPE_CHECKING:
    from dsv4c.models.deepseek_v4 import Model

STREAM_TILE = 8
DRAFT_REACH = ROWS
"""The most rows that drafting writes behind the model's: rings of what drafts have room for as many more."""


@dataclass(frozen=True)
class Drafted:
    """k drafts of each sequence, one by one: tokens i32[B], the logits f32[B, V] that each is the likeliest
    of, and f32[B·k, 1] the logit of each to hold, where something says.
    """

    steps: tuple[Value, ...]
    logits: tuple[Value, ...]
    confidence: Value | None = None

    @property
    def tokens(self) -> Value:
        """All of them, i32[B·k], those of a sequence in a row."""
        return reshape(_beside(self.steps), shape=(-1,), name="drafts")  # type: ignore[no-any-return]

    def joined(self) -> dict[str, Value]:
        """As outputs of a graph, a row per draft."""
        vocabulary = self.logits[0].type.shape[1]
        rows = reshape(_beside(self.logits), shape=(-1, vocabulary), name="logits")
        found = {"logits": rows, "next": self.tokens}
        return found if self.confidence is None else found | {"confidence": self.confidence}


def _beside(values: tuple[Value, ...]) -> Value:
    """Values [B, ...] as [B, k, ...]."""
    rows = [reshape(v, shape=(-1, 1, *v.type.shape[1:])) for v in values]
    joined: Value = concat(*rows, axis=1) if len(rows) > 1 else rows[0]
    return joined


class Head(Protocol):
    """What drafts, in a graph that may run the model, too."""

    def see(self, plan: LayerPlan, streams: Value) -> None:
        """The model's streams after one of its layers."""
        ...

    def keep(self, streams: Value, rows: Rows) -> None:
        """Write what drafts will look back to for the model's rows, whose last streams these are."""
        ...

    def draft(self, count: int) -> Drafted:
        """So many tokens behind the one of each sequence that a call is given."""
        ...


def head_of(model: Model) -> Head:
    """What the model's checkpoint drafts with."""
    return Dspark(model) if model.config.dspark_stages else Mtp(model)


@dataclass
class Mtp:
    """DeepSeek-V3's multi-token prediction: a block over the streams of a token and the token that follows.

    Its row for a token stands at the position of the one before. Behind the first draft it goes on from its
    own streams.
    """

    model: Model

    @property
    def plan(self) -> LayerPlan:
        return draft_plans(self.model.config)[0]

    def ring(self) -> Value:
        """The model's streams by position: of the tokens that may be the newest one but one."""
        m, c = self.model, self.model.config
        name, width = f"{self.plan.prefix}.streams", c.hc_mult * c.hidden_size
        return m.ring(name, m.activation, width, 2, STREAM_TILE)

    def see(self, plan: LayerPlan, streams: Value) -> None:
        """The last streams are all it reads."""

    def keep(self, streams: Value, rows: Rows) -> None:
        m, plan = self.model, self.plan
        flat = _flat(streams)
        ring = self.ring()
        with m.builder.scope(plan.prefix):
            earlier, places = preceding(ring, flat, rows.positions, rows.slots, name="earlier")
            m.builder.rename(places, "earlier_positions")
            m.write(f"{plan.prefix}.streams", flat, rows.positions, rows.slots, "streams_written")
            x = self._input(rows.tokens, reshape(earlier, shape=(-1, *streams.type.shape[1:])))
            mix = m.hyper_pre("hc_attn", f"{plan.prefix}.hc_attn", x)
            x = m.norm(mix.x, f"{plan.prefix}.attn_norm", "attn_in")
            with m.builder.scope("attn"):
                kv = m.window_rows(plan, x, places)
                _keep_window(m, plan, kv, places, rows.slots)

    def draft(self, count: int) -> Drafted:
        m, c, plan = self.model, self.model.config, self.plan
        tokens, steps, logits = m.tokens, list[Value](), list[Value]()
        streams: Value | None = None
        for step in range(count):
            with m.builder.scope(plan.prefix):
                given = draft_rows(
                    *(tokens, m.lengths, m.slots, m.start), block=1, offset=step - 1, noise=0, name="rows"
                )
                ids, places, slots, last = given
                window = c.sliding_window
                rows = Rows(ids, places, slots, slots, last, window, window + DRAFT_REACH)
                if streams is None:
                    held = gather(self.ring(), reshape(places, shape=(-1, 1)), slots, name="streams_before")
                    streams = reshape(held, shape=(-1, c.hc_mult, c.hidden_size))
                x = self._input(ids, streams)
            streams = m.layer(plan, x, rows)
            with m.builder.scope(f"{plan.prefix}.output"):
                x = m.collapsed(streams, f"{plan.prefix}.")
                x = m.norm(x, f"{plan.prefix}.norm", "final_norm")
                logits.append(linear(x, m.head_of_drafts(), out=F32, name="logits"))
                tokens = argmax(logits[-1], name="next")
            steps.append(tokens)
        return Drafted(tuple(steps), tuple(logits))

    def _input(self, tokens: Value, streams: Value) -> Value:
        """The block's streams [N, S, H], from those of a token and the token that follows."""
        m, c, prefix = self.model, self.model.config, self.plan.prefix
        e = embedding(m.weight("embed"), tokens, name="embedding")
        e = rms_norm(e, m.weight(f"{prefix}.enorm"), eps=c.rms_norm_eps, name="e")
        h = rms_norm(streams, m.weight(f"{prefix}.hnorm"), eps=c.rms_norm_eps, name="h")
        e = linear(e, m.weight(f"{prefix}.e_proj"), out=m.activation, name="e_out")
        h = linear(h, m.weight(f"{prefix}.h_proj"), out=m.activation, name="h_out")
        joined: Value = add(reshape(e, shape=(-1, 1, c.hidden_size)), h, name="streams")
        return joined


class Dspark:
    """Stages that draft a block at once: the anchor and noise behind it, all of which see each other and the
    features of the tokens before; then each draft is chosen knowing the one before it.

    Equations: inference/model.py of the releases with dspark_* keys.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.plans = draft_plans(model.config)
        self.features: list[Value] = []

    def see(self, plan: LayerPlan, streams: Value) -> None:
        """Of some layers the mean of the streams is a feature."""
        m, c = self.model, self.model.config
        if plan.index in c.dspark_target_layers:
            with m.builder.scope(plan.prefix):
                mean = scale(sum_(streams, axis=1, out=F32), factor=1 / c.hc_mult)
                self.features.append(m.to(mean, m.activation, "feature"))

    def keep(self, streams: Value, rows: Rows) -> None:
        m, first = self.model, self.plans[0].prefix
        with m.builder.scope(first):
            seen = self.features
            x = concat(*seen, axis=1, name="features") if len(seen) > 1 else seen[0]
            x = linear(x, m.weight(f"{first}.main_proj"), out=m.activation, name="main_out")
            x = m.norm(x, f"{first}.main_norm", "main_x")
        for plan in self.plans:
            with m.builder.scope(f"{plan.prefix}.context"):
                kv = m.window_rows(plan, x, rows.positions)
                _keep_window(m, plan, kv, rows.positions, rows.slots)

    def draft(self, count: int) -> Drafted:
        m, c, first = self.model, self.model.config, self.plans[0].prefix
        block = c.dspark_block_size
        with m.builder.scope(first):
            ids, places, slots, last = draft_rows(
                *(m.tokens, m.lengths, m.slots, m.start),
                block=block,
                offset=0,
                noise=c.dspark_noise_token_id,
                name="rows",
            )
            x = embedding(m.weight("embed"), ids, name="embedding")
            streams = expand_streams(x, streams=c.hc_mult, name="streams")
        # Its own rows stand behind the window's: all rows see all of both.
        window, reach = c.sliding_window + block, c.sliding_window + DRAFT_REACH
        rows = Rows(ids, places, slots, slots, last, window, reach)
        for plan in self.plans:
            streams = m.layer(plan, streams, rows)
        end = self.plans[-1].prefix
        with m.builder.scope(f"{end}.output"):
            y = m.collapsed(streams, f"{end}.")
            x = m.norm(y, f"{end}.norm", "final_norm")
            base = linear(x, m.head_of_drafts(), out=F32, name="base_logits")
            return self._chain(f"{end}.", y, base, count)

    def _chain(self, end: str, y: Value, base: Value, count: int) -> Drafted:
        """Drafts one behind the other: the logits of each row are biased by the token before it."""
        m, block = self.model, self.model.config.dspark_block_size
        token, steps, logits, embedded = m.tokens, list[Value](), list[Value](), list[Value]()
        vocabulary = base.type.shape[1]
        rows = reshape(base, shape=(-1, block, vocabulary))
        for step in range(count):
            e = embedding(m.weight(f"{end}markov_head.markov_w1"), token, name="markov_embed")
            bias = linear(e, m.weight(f"{end}markov_head.markov_w2"), out=F32, name="bias")
            row = slice_(rows, axis=1, start=step, stop=step + 1)
            biased = add(reshape(row, shape=(-1, vocabulary)), bias, name="logits")
            token = argmax(biased, name="next")
            embedded.append(e)
            logits.append(biased)
            steps.append(token)
        known = _beside(tuple(embedded))
        h = slice_(reshape(y, shape=(-1, block, y.type.shape[1])), axis=1, start=0, stop=count)
        both = concat(h, known, axis=2)
        both = reshape(both, shape=(-1, both.type.shape[2]))
        proj = m.weight(f"{end}confidence_head.proj")
        confidence = linear(both, proj, out=F32, name="confidence")
        return Drafted(tuple(steps), tuple(logits), confidence)


def _keep_window(model: Model, plan: LayerPlan, values: Value, places: Value, slots: Value) -> None:
    """Write rows [N, D] to the window of a block that drafts."""
    name, reach = f"{plan.prefix}.attn.window", model.config.sliding_window + DRAFT_REACH
    model.ring(name, model.activation, values.type.shape[1], reach, WINDOW_TILE)
    model.write(name, values, places, slots, "window_written")


def _flat(streams: Value) -> Value:
    """[N, S, H] -> [N, S·H]."""
    _, count, width = streams.type.shape
    flat: Value = reshape(streams, shape=(-1, count * width))
    return flat
