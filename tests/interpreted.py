"""A model run by plain interpretation of its graphs, whole or in parts, to compare with recorded results."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4c.buckets import Bucket, Kind
from dsv4c.config import Deployment, ModelConfig, load_config
from dsv4c.ir.graph import Builder, Graph, Value
from dsv4c.ir.ops.hyper import MixStreams, SpreadStreams
from dsv4c.ir.verify import verify
from dsv4c.models.deepseek_v4 import build
from dsv4c.models.weights import records
from dsv4c.numerics import codec
from dsv4c.numerics.codec import Quantized, nan_fill, view
from dsv4c.passes.quantize import quantize
from dsv4c.passes.recipes import RECIPES, Recipe
from dsv4c.reference.interpret import clone, interpret
from dsv4c.runtime.checkpoint import Checkpoint
from dsv4c.runtime.parameter import ParamRecord
from tests.goldens import Run

MAX_CONTEXT = 512


@cache
def graph_of(config: ModelConfig, recipe: Recipe, bucket: Bucket, slots: int = 1) -> Graph:
    """The verified graph of a bucket in the recipe's formats."""
    buckets = (bucket, Bucket("draft")) if config.drafts_with else (bucket,)
    deployment = deployment_of(*dict.fromkeys(buckets), slots=slots, max_context=MAX_CONTEXT)
    return verify(quantize(build(config, deployment, bucket, recipe.activation), recipe))


def deployment_of(*buckets: Bucket, **fields: Any) -> Deployment:
    """A deployment with these buckets, and a decode bucket if none of them is one."""
    decodes = any(bucket.kind == "decode" for bucket in buckets)
    return Deployment(buckets=buckets if decodes else (Bucket("decode"), *buckets), **fields)


@cache
def weights_of(folder: Path, recipe: Recipe) -> dict[str, codec.Value]:
    """Every parameter of the model, read by the loader from the checkpoint in `folder`."""
    config = load_config(folder)
    buckets = [Bucket("decode"), *[Bucket("draft")] * bool(config.drafts_with)]
    params = {p.name: p.type for bucket in buckets for p in graph_of(config, recipe, bucket).params}
    wanted = records(config, [(name, type_, recipe.rounds(name)) for name, type_ in params.items()])
    weights: dict[str, codec.Value] = {}
    Checkpoint.open(folder).load(
        [ParamRecord.from_json(record) for record in wanted],
        lambda name, value: weights.__setitem__(name, clone(value)),
    )
    return weights


def fresh_states(graph: Graph) -> dict[str, codec.Value]:
    """A sequence at position 0; what its caches hold before is NaN."""
    states = {s.name: view(torch.zeros(s.type.extent, dtype=torch.uint8), s.type) for s in graph.states}
    for name, state in states.items():
        if not name.endswith("position"):
            nan_fill(state)
    return states


def plain(value: codec.Value) -> Tensor:
    """A quantized value decoded to f32, which holds all of them exactly."""
    return codec.dequantize(value) if isinstance(value, Quantized) else value


class Model:
    """A checkpoint's model under a recipe, with the state that its slots have come to.

    `prefill`, `draft` and `decode` are about the sequence in slot 0.
    """

    def __init__(self, folder: Path, recipe: str | Recipe, chunk: int = 64, slots: int = 1) -> None:
        self.recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
        self.config, self.chunk, self.slots = load_config(folder), chunk, slots
        self.weights = weights_of(folder, self.recipe)
        self.states = fresh_states(self.graph("prefill"))
        self.streams = torch.empty(0)

    def graph(self, bucket: Bucket | Kind) -> Graph:
        """Of a bucket; of one sequence and the usual number of tokens if there is only its kind."""
        if not isinstance(bucket, Bucket):
            bucket = Bucket(bucket, tokens=1 if bucket == "decode" else self.chunk)
        return graph_of(self.config, self.recipe, bucket, self.slots)

    def call(
        self, bucket: Bucket | Kind, inputs: Mapping[str, Tensor], watch: Collection[str] = ()
    ) -> dict[str, Tensor]:
        graph = self.graph(bucket)
        results = interpret(graph, inputs, self.states, self.weights, watch=watch)
        return {name: plain(value) for name, value in results.items()}

    def prefill(self, ids: Sequence[int]) -> Tensor:
        """Logits f32 [len(ids), vocab] after each token, `chunk` tokens at a time; keeps the streams."""
        calls = []
        for start in range(0, len(ids), self.chunk):
            part = list(ids[start : start + self.chunk])
            result = self.call("prefill", padded(part, self.chunk))
            calls.append([result[name][: len(part)] for name in ("logits", "streams")])
        logits, self.streams = (torch.cat(parts) for parts in zip(*calls, strict=True))
        return logits

    def draft(self, token: int, count: int = 1) -> dict[str, Tensor]:
        """What is drafted behind a token that is not consumed yet."""
        return self.call(Bucket("draft", tokens=count), padded([token], 1))

    def decode(self, ids: Sequence[int]) -> Tensor:
        """Logits f32 [len(ids), vocab], one token at a time."""
        return torch.cat([self.call("decode", padded([token], 1))["logits"] for token in ids])

    def part(
        self, graph: Graph, given: Mapping[str, codec.Value], wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """The values named in `wanted`, computed from the values `given` and fresh state."""
        return evaluate(part_of(graph, given, wanted), given, self.weights)


def evaluate(
    graph: Graph,
    inputs: Mapping[str, codec.Value],
    weights: Mapping[str, codec.Value],
    states: Mapping[str, codec.Value] | None = None,
) -> dict[str, Tensor]:
    states = fresh_states(graph) if states is None else states
    return {name: plain(value) for name, value in interpret(graph, inputs, states, weights).items()}


def padded(ids: Sequence[int], rows: int) -> dict[str, Tensor]:
    """Inputs of one call for the sequence in slot 0: tokens (padded with 0) and how many of them count."""
    return padded_all({0: ids}, 1, rows)


def padded_all(ids: Mapping[int, Sequence[int]], sequences: int, rows: int) -> dict[str, Tensor]:
    """Inputs of one call: tokens by slot, `rows` places each; the call's other sequences are idle."""
    tokens = torch.zeros(sequences, rows, dtype=torch.int32)
    lengths = torch.zeros(sequences, dtype=torch.int32)
    slots = torch.full((sequences,), -1, dtype=torch.int32)
    for place, (slot, own) in enumerate(ids.items()):
        tokens[place, : len(own)] = torch.tensor(own, dtype=torch.int32)
        lengths[place], slots[place] = len(own), slot
    return {"tokens": tokens.reshape(-1), "lengths": lengths, "slots": slots}


def part_of(graph: Graph, given: Collection[str], wanted: Collection[str]) -> Graph:
    """The nodes that `wanted` needs once the values `given` are known; those become inputs."""
    known = {graph.by_name[name] for name in given}
    needed = {graph.by_name[name] for name in wanted}
    nodes = []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs) - known:
            nodes.append(node)
            needed.update(node.inputs)
    builder = Builder(f"{graph.name}.part")
    values: dict[Value, Value] = {v: builder.input(v.name, v.type) for v in graph.values() if v in known}
    for group, declare in (
        (graph.inputs, builder.input),
        (graph.states, builder.state),
        (graph.params, builder.param),
    ):
        values |= {v: declare(v.name, v.type) for v in group if v in needed and v not in known}
    for node in reversed(nodes):
        builder.copy(node, values)
    return verify(builder.finish({name: values[graph.by_name[name]] for name in wanted}))


def logits_of(folder: Path, recipe: str, run: Run, chunk: int) -> Tensor:
    """The logits of a recorded run: its prompt in chunks (0: token by token), then every decode step."""
    model = Model(folder, recipe, chunk or 1)
    if not chunk:
        return model.decode(run.ids)
    return torch.cat([model.prefill(run.ids[: run.prefill]), model.decode(run.ids[run.prefill :])])


# Recorded name -> name of our value below layers.L. What is stored rounded was recorded rounded.
LAYER_VALUES = {
    "attn_in": "attn_in",
    "attn_out": "attn.attn_out",
    "ffn_in": "ffn_in",
    "hc_attn_pre": "hc_attn.pre",
    "hc_attn_post": "hc_attn.post",
    "hc_ffn_pre": "hc_ffn.pre",
    "hc_ffn_post": "hc_ffn.post",
    "router_idx": "ffn.router.experts",
    "router_w": "ffn.router.weights",
    "qr": "attn.qr",
    "q": "attn.q",
    "kv": "attn.kv",
    "o": "attn.o",
    "z": "attn.z",
    "entries": "attn.compressor.entry",
    "index_q": "attn.indexer.q",
    "index_keys": "attn.indexer.compressor.key",
    "index_w": "attn.indexer.weights",
    "index_scores": "attn.indexer.scores",
    "index_sel": "attn.indexer.chosen",
}
STORED_ROUNDED = ("kv", "entries", "index_q", "index_keys")


def layer_value(graph: Graph, layer: int, name: str) -> str:
    """The name of our value for a recorded tensor of a layer."""
    prefix = f"layers.{layer}"
    if name in ("hc_attn_comb", "hc_ffn_comb"):
        return operand(graph, f"{prefix}.{name.removesuffix('_comb')}", MixStreams, 1)
    if name == "ffn_out":
        return operand(graph, f"{prefix}.hc_ffn", SpreadStreams, 0)
    if name == "x_attn":
        return operand(graph, f"{prefix}.hc_ffn", MixStreams, 0)
    if name == "x_ffn":
        return streams_after(graph, layer)
    value = f"{prefix}.{LAYER_VALUES[name]}"
    rounded = f"{value}_quantized"
    return rounded if name in STORED_ROUNDED and rounded in graph.by_name else value


def operand(graph: Graph, scope: str, op: type, index: int) -> str:
    """The operand of the only node of that kind in a scope."""
    (node,) = (n for n in graph.nodes if n.scope == scope and isinstance(n.op, op))
    return node.inputs[index].name


def streams_after(graph: Graph, layer: int) -> str:
    """The streams that a layer leaves; -1 is the embedding."""
    following = f"layers.{layer + 1}.hc_attn"
    if any(n.scope == following for n in graph.nodes):
        return operand(graph, following, MixStreams, 0)
    return graph.outputs["streams"].name


# Recorded state -> ours. What a slot holds that no position names yet does not matter.
STATES = {
    "window": "attn.window",
    "entries": "attn.entries",
    "index_keys": "attn.indexer.keys",
    "kv_state": "attn.compressor.kv",
    "score_state": "attn.compressor.score",
    "index_kv_state": "attn.indexer.compressor.kv",
    "index_score_state": "attn.indexer.compressor.score",
}


def recorded_slots(name: str, rows: int, position: int) -> list[tuple[int, int]]:
    """(recorded row, token or entry it belongs to), before the step at `position`.

    The window is a ring. A compressor keeps the tokens of the unfinished window (rows ratio.. with overlap)
    and, with overlap, those of the one before it.
    """
    if name in ("entries", "index_keys"):
        return [(row, row) for row in range(rows)]
    if name == "window":
        return [(p % rows, p) for p in range(max(0, position - rows), position)]
    ratio = 4 if rows == 8 else rows
    begin = position // ratio * ratio
    current = [(p - begin + (rows - ratio), p) for p in range(begin, position)]
    previous = [(p - begin + ratio, p) for p in range(begin - ratio, begin)] if rows == 8 else []
    return previous + current
