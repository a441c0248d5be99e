"""Bytes and operations of one decoded token, against the published inventory of both releases."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from dsv4c.config import ModelConfig, load_config
from dsv4c.models.schedule import LayerKind, RouterKind
from dsv4c.models.traffic import Cache, layer_traffic, state_bytes, token_traffic
from dsv4c.types import NVFP4, QuantType

CONTEXT = 131_072
SWA, CSA, HCA = LayerKind.SWA, LayerKind.CSA, LayerKind.HCA


@cache
def model(name: str, experts: str = "mxfp4") -> ModelConfig:
    return replace(load_config(f"deepseek-v4-{name}"), expert_format=experts)


@pytest.mark.parametrize(
    ("name", "experts", "kind", "weights"),
    [
        ("flash", "mxfp4", SWA, 217_608_536),
        ("flash", "mxfp4", CSA, 247_498_840),
        ("flash", "mxfp4", HCA, 225_999_200),
        ("flash", "nvfp4", SWA, 222_327_272),
        ("flash", "nvfp4", CSA, 252_217_576),
        ("flash", "nvfp4", HCA, 230_717_936),
        ("pro", "mxfp4", CSA, 637_794_328),
        ("pro", "mxfp4", HCA, 602_269_728),
        ("pro", "nvfp4", CSA, 650_180_776),
        ("pro", "nvfp4", HCA, 614_656_176),
    ],
)
def test_weight_bytes_of_a_layer(name: str, experts: str, kind: LayerKind, weights: int) -> None:
    traffic = layer_traffic(model(name, experts), kind, CONTEXT)
    assert traffic.weights == weights
    assert sum(traffic.parts.values()) == traffic.bytes


@pytest.mark.parametrize(
    ("name", "kind", "other"),
    [
        ("flash", SWA, 137_392_472),
        ("flash", CSA, 167_282_776),
        ("flash", HCA, 145_783_136),
        ("pro", CSA, 427_227_160),
        ("pro", HCA, 391_702_560),
    ],
)
def test_weight_bytes_beside_the_experts(name: str, kind: LayerKind, other: int) -> None:
    traffic = layer_traffic(model(name), kind, CONTEXT)
    assert traffic.weights - traffic.line("routed experts").weights == other


@pytest.mark.parametrize(
    ("name", "kind", "state"),
    [
        ("flash", SWA, 75_336),
        ("flash", CSA, 2_623_211),
        ("flash", HCA, 681_548),
        ("pro", CSA, 2_922_219),
        ("pro", HCA, 681_548),
    ],
)
def test_state_bytes_that_a_layer_touches(name: str, kind: LayerKind, state: int) -> None:
    assert layer_traffic(model(name), kind, CONTEXT).state == state


LINES = {  # op: (Flash MFLOP, Flash weight MB, Pro MFLOP, Pro weight MB)
    "hyper-connections in, x2": (1.71, 3.146, 2.98, 5.505),
    "norms, x2": (0.03, 0.016, 0.06, 0.029),
    "wq_a": (8.39, 4.195, 22.02, 11.011),
    "q_norm": (0.00, 0.002, 0.01, 0.003),
    "wq_b": (67.11, 33.556, 201.33, 100.669),
    "q head norm and rotation": (0.14, 0, 0.29, 0),
    "attention, window": (16.82, 0, 33.64, 0),
    "inverse rotation": (0.01, 0, 0.02, 0),
    "wo_a": (67.11, 33.556, 134.22, 67.113),
    "wo_b": (67.11, 33.556, 234.88, 117.448),
    "hyper-connections out, x2": (0.33, 0, 0.57, 0),
    "router": (2.10, 2.098, 5.51, 5.507),
    "routed experts": (301.99, 84.935, 792.72, 222.954),
    "shared expert": (50.33, 25.167, 132.12, 66.064),
    "compressor": (16.78, 16.781, 29.36, 29.364),
    "compressor pooling": (0.01, 0, 0.01, 0),
    "indexer wq_b": (16.83, 8.389, 25.22, 12.584),
    "indexer weights_proj": (0.52, 0.524, 0.92, 0.918),
    "indexer compressor": (4.19, 4.195, 7.34, 7.341),
    "index scores": (543.16, 0, 543.16, 0),
    "top-k": (0.03, 0, 0.03, 0),
    "attention, entries": (67.27, 0, 269.09, 0),
}


@pytest.mark.parametrize("op", LINES)
def test_lines_of_a_csa_layer(op: str) -> None:
    flash = layer_traffic(model("flash", "nvfp4"), CSA, CONTEXT).line(op)
    pro = layer_traffic(model("pro", "nvfp4"), CSA, CONTEXT).line(op)
    found = [flash.flops / 1e6, flash.weights / 1e6, pro.flops / 1e6, pro.weights / 1e6]
    wanted = LINES[op]
    assert found[::2] == pytest.approx(wanted[::2], abs=0.02)
    assert found[1::2] == pytest.approx(wanted[1::2], abs=0.0012)


def test_every_line_is_in_the_published_table() -> None:
    """No line hides in the sums: kv's two lines are one there."""
    ops = {line.op for line in layer_traffic(model("flash"), CSA, CONTEXT).lines}
    assert ops - LINES.keys() == {"wkv", "kv norm, rotation and store"}


STATE_LINES = {
    "kv norm, rotation and store": 584,
    "attention, window": 74_752,
    "compressor": 8_192,
    "compressor pooling": 8_338,
    "indexer compressor": 4_113,
    "index scores": 2_228_224,
    "attention, entries": 299_008,
}


def test_state_lines_of_a_csa_layer() -> None:
    traffic = layer_traffic(model("flash"), CSA, CONTEXT)
    assert {line.op: line.state for line in traffic.lines if line.state} == STATE_LINES


def test_state_lines_of_an_hca_layer() -> None:
    traffic = layer_traffic(model("pro"), HCA, CONTEXT)
    ops = ("compressor", "compressor pooling", "attention, entries")
    assert [traffic.line(op).state for op in ops] == [4_096, 4_100, 598_016]


@pytest.mark.parametrize(
    ("name", "kind", "mflop"),
    [
        ("flash", SWA, 587.4),
        ("flash", CSA, 1236.2),
        ("flash", HCA, 730.3),
        ("pro", SWA, 1567.7),
        ("pro", CSA, 2442.8),
        ("pro", HCA, 1851.5),
    ],
)
def test_operations_of_a_layer(name: str, kind: LayerKind, mflop: float) -> None:
    assert layer_traffic(model(name), kind, CONTEXT).flops / 1e6 == pytest.approx(mflop, abs=0.06)


TOKENS = [  # name, experts, context, GFLOP, weights GB, state MB with FP4, FP8 and BF16 keys, total GB
    ("flash", "mxfp4", 8_192, 29.58, 11.212, 13.8, 16.5, 29.6, 11.226),
    ("flash", "mxfp4", 131_072, 42.80, 11.212, 68.9, 112.9, 214.4, 11.281),
    ("flash", "mxfp4", 1_048_576, 141.49, 11.212, 480.1, 832.5, 1594.3, 11.692),
    ("flash", "nvfp4", 8_192, 29.58, 11.415, 13.8, 16.5, 29.6, 11.429),
    ("flash", "nvfp4", 131_072, 42.80, 11.415, 68.9, 112.9, 214.4, 11.484),
    ("flash", "nvfp4", 1_048_576, 141.49, 11.415, 480.1, 832.5, 1594.3, 11.895),
    ("pro", "mxfp4", 8_192, 109.44, 39.658, 28.7, 32.7, 58.2, 39.687),
    ("pro", "mxfp4", 131_072, 132.53, 39.658, 108.8, 171.7, 324.6, 39.767),
    ("pro", "mxfp4", 1_048_576, 305.00, 39.658, 706.5, 1209.8, 2313.7, 40.365),
    ("pro", "nvfp4", 8_192, 109.44, 40.414, 28.7, 32.7, 58.2, 40.442),
    ("pro", "nvfp4", 131_072, 132.53, 40.414, 108.8, 171.7, 324.6, 40.522),
    ("pro", "nvfp4", 1_048_576, 305.00, 40.414, 706.5, 1209.8, 2313.7, 41.120),
]


@pytest.mark.parametrize(
    ("name", "experts", "context", "gflop", "weights", "fp4", "fp8", "bf16", "total"), TOKENS
)
def test_a_whole_token(
    name: str,
    experts: str,
    context: int,
    gflop: float,
    weights: float,
    fp4: float,
    fp8: float,
    bf16: float,
    total: float,
) -> None:
    config = model(name, experts)
    traffic = token_traffic(config, context)
    states = [token_traffic(config, context, cache=cache).state / 1e6 for cache in list(Cache)[:3]]
    assert traffic.flops / 1e9 == pytest.approx(gflop, abs=0.006)
    assert traffic.weights / 1e9 == pytest.approx(weights, abs=0.0005)
    assert states == pytest.approx([fp4, fp8, bf16], abs=0.051)
    assert traffic.bytes / 1e9 == pytest.approx(total, abs=0.0005)
    assert sum(traffic.parts.values()) == traffic.bytes


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("flash", (4599.5, 3652.2, 1082.2, 1059.3, 520.2, 275.3, 135.3, 90.2)),
        ("pro", (18294.8, 13600.2, 4029.9, 1853.8, 1336.1, 625.3, 335.8, 335.9)),
    ],
)
def test_where_the_weight_bytes_go(name: str, parts: tuple[float, ...]) -> None:
    names = (
        "attention projections",
        "routed experts",
        "shared experts",
        "embedding and head",
        "compressors",
        "indexers",
        "hyper-connections",
        "routers",
    )
    found = token_traffic(model(name, "nvfp4"), CONTEXT).parts
    assert [found[part] / 1e6 for part in names] == pytest.approx(parts, abs=0.11)
    assert found.keys() - set(names) == {"norms", "state"}


@pytest.mark.parametrize(
    ("name", "context", "total", "rings", "bf16"),
    [
        ("flash", 8_192, 44.2, 12.2, 74.2),
        ("flash", 131_072, 476.0, 12.2, 919.6),
        ("flash", 1_048_576, 3700, 12.2, 7232),
        ("pro", 8_192, 64.5, 18.7, 107.4),
        ("pro", 131_072, 682.8, 18.7, 1317.5),
        ("pro", 1_048_576, 5299, 18.7, 10353),
    ],
)
def test_resident_state(name: str, context: int, total: float, rings: float, bf16: float) -> None:
    state = state_bytes(model(name), context)
    unit = 0.051 if total < 1000 else 0.51
    assert state.total / 1e6 == pytest.approx(total, abs=unit)
    assert state.compressors / 1e6 == pytest.approx(rings, abs=0.051)
    assert state_bytes(model(name), context, Cache.BF16).total / 1e6 == pytest.approx(bf16, abs=unit)


def test_a_hash_router_reads_one_row_instead_of_the_bias() -> None:
    dense = layer_traffic(model("flash"), SWA, CONTEXT).line("router")
    hashed = layer_traffic(model("flash"), SWA, CONTEXT, router=RouterKind.HASH).line("router")
    assert dense.weights - hashed.weights == 256 * 4 - 6 * 8


def test_a_context_shorter_than_the_window_reads_only_what_is_there() -> None:
    traffic = layer_traffic(model("flash"), CSA, 64)
    assert traffic.line("attention, window").state == 64 * 584
    assert traffic.line("index scores").state == 16 * 68
    assert traffic.line("attention, entries").state == 16 * 584


def test_types_of_a_recipe_replace_those_of_the_checkpoint() -> None:
    config, plain = model("flash"), token_traffic(model("flash"), CONTEXT)
    shape = (config.q_lora_rank, config.hidden_size)
    recast = token_traffic(config, CONTEXT, types={"layers.5.attn.wq_a": QuantType(NVFP4, shape)})
    fp8, nvfp4 = 1024 * 4096 + 8 * 32, 1024 * 4096 * 9 // 16 + 4
    assert plain.weights - recast.weights == fp8 - nvfp4
