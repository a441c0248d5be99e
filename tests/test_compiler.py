"""Compiling: arguments are checked before work begins, the plan describes the model, every recipe runs."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv4c
from dsv4c.buckets import Bucket
from dsv4c.compiler.compile import COLLECTED
from dsv4c.compiler.request import Request
from dsv4c.config import load_config
from dsv4c.errors import CheckpointError, ConfigError
from dsv4c.ir.text import parse_graph, print_graph
from dsv4c.models.layout import layout
from dsv4c.models.synth import synthesize
from dsv4c.passes.recipes import RECIPES
from dsv4c.plan.folder import Plan
from tests.goldens import golden_case

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(dsv4c.load_config("tiny"), tmp_path_factory.mktemp("compiler") / "weights", seed=2)


# --- while it runs ---


@pytest.mark.parametrize("own", [700, 0, 90_000], ids=["as Python has it", "off", "seldom"])
def test_garbage_is_collected_seldom_while_a_model_is_compiled_and_then_as_before(own: int) -> None:
    before, seen = gc.get_threshold(), list[int]()
    gc.set_threshold(own, 11, 12)
    try:
        dsv4c.compile(
            "tiny", certify=False, inspect=lambda bucket, compiled: seen.append(gc.get_threshold()[0])
        )
        after = gc.get_threshold()
        with pytest.raises(ConfigError):
            dsv4c.compile("tiny", recipe="nothing")
        assert after == gc.get_threshold() == (own, 11, 12)
    finally:
        gc.set_threshold(*before)
    assert set(seen) == {own and max(own, COLLECTED)}


# --- the public names ---


def test_public_names_are_there_and_importing_them_costs_nothing() -> None:
    for name in dsv4c.__all__:
        assert getattr(dsv4c, name) is not None
    assert set(dir(dsv4c)) == set(dsv4c.__all__)
    with pytest.raises(AttributeError, match="module 'dsv4c' has no attribute 'compil'"):
        _ = dsv4c.compil
    script = (
        "import sys, dsv4c\nassert not {'torch', 'dsv4c.ir'} & sys.modules.keys()\n"
        "plan = dsv4c.compile('tiny', max_context=64, certify=False)\nassert 'torch' not in sys.modules\n"
        "plan.text\nassert 'torch' not in sys.modules\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr


# --- arguments ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "int8"}, r"unknown recipe 'int8'; known: fp32, bf16, official"),
        ({"target": "tpu"}, r"target .*'tpu'.*'cpu' or 'sm_90a' or 'sm_100a'"),
        (
            {"pipeline": "quantize{recipe=nvfp4},fold,prepack,tidy"},
            "pipeline: quantizes by nvfp4, the recipe is official; give one",
        ),
        ({"batch": 0}, r"batch: 0 is no size of a bucket, expected a number of at least 1"),
        ({"batch": ()}, r"batch: no sizes, expected at least one"),
        ({"batch": (1, 1)}, r"batch: 1, 1 names a size twice"),
        ({"batch": "4"}, r"batch: '4' is no size of a bucket"),
        ({"chunk": (8, True)}, r"chunk: True is no size of a bucket"),
        (
            {"chunk": 65, "max_context": 64},
            r"prefill-65 takes 65 tokens; expected at most 64, max_context",
        ),
        ({"batch": 4, "slots": 2}, r"slots is 2; expected at least 4, the sequences of decode-4"),
        ({"slots": 0}, r"slots .*0.* a positive integer"),
        ({"max_context": 1 << 30}, r"max_context .*max_position_embeddings of tiny"),
        ({"verify": 0}, r"verify: 0 tokens, expected 1 \(no such bucket\) to 8"),
        ({"verify": 9}, r"verify: 9 tokens, expected 1 \(no such bucket\) to 8"),
        (
            {"verify": 4, "max_context": 3},
            r"verify-1x4 takes 4 tokens; expected at most 3, max_context",
        ),
        ({"logits": "first"}, r"logits: 'first' is unknown; expected 'last' or 'all'"),
        ({"draft": "medusa"}, r"draft: 'medusa' is unknown; expected 'off' or 'auto' or 'mtp' or"),
        (
            {"draft": "mtp", "draft_tokens": 8},
            r"draft_tokens: 8, expected 1 to 7: 8 rows of a step, less one",
        ),
        ({"draft": "mtp", "draft_tokens": 0}, r"draft_tokens: 0, expected 1 to 7"),
        ({"draft": "mtp", "draft_tokens": 3, "batch": 3}, r"draft_tokens: 3 behind .* of 3 .* are 12 rows"),
        ({"draft_tokens": 3}, r"draft_tokens: 3, but nothing drafts"),
        ({"draft": "mtp", "draft_confidence": True}, r"draft_confidence: draft 'mtp' comes with none"),
        ({"draft": "dspark"}, r"tiny: draft 'dspark', but the model drafts with an MTP block; compile with"),
    ],
)
def test_a_wrong_argument_is_a_config_error(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dsv4c.compile("tiny", **arguments)  # type: ignore[arg-type]


def test_a_model_without_mtp_has_no_draft_bucket() -> None:
    with pytest.raises(ConfigError, match="draft 'mtp', but the model has nothing that drafts"):
        dsv4c.compile(golden_case("official-quant"), draft="mtp")
    job = Request(golden_case("official-quant"), draft="auto", max_context=64).job()
    assert not job.deployment.drafts


def test_a_dspark_checkpoint_is_not_read_as_mtp() -> None:
    folder = golden_case("dspark-fp32")
    with pytest.raises(ConfigError, match="drafts with DSpark's stages, which lie under the names of MTP"):
        dsv4c.compile(folder, draft="mtp")
    with pytest.raises(ConfigError, match="draft_tokens: 6, expected 1 to 5: DSpark's block of 5"):
        dsv4c.compile(folder, draft="auto", draft_tokens=6)


def test_what_a_plan_is_compiled_from() -> None:
    """A name, a path, a folder or a config: the same plan, but for the name."""
    folder = golden_case("official-quant")
    plans = [
        dsv4c.compile(source, max_context=64)
        for source in (folder, str(folder), folder / "config.json", dsv4c.load_config(folder))
    ]
    assert len({plan.text for plan in plans}) == 1
    assert plans[0].config_digest == dsv4c.load_config(folder).digest


@pytest.mark.parametrize(
    ("options", "buckets"),
    [
        ({"max_context": 48}, "decode-1 verify-1x4 prefill-48"),
        ({"max_context": 480}, "decode-1 verify-1x4 prefill-64"),
        ({"max_context": 2}, "decode-1 verify-1x2"),
        ({"max_context": 1}, "decode-1"),
        ({"batch": (8, 1), "verify": 1, "chunk": [512, 64]}, "decode-1 decode-8 prefill-64 prefill-512"),
        ({"verify": 8, "chunk": 8}, "decode-1 verify-1x8"),
        ({"verify": 8, "chunk": 8, "logits": "last"}, "decode-1 verify-1x8 prefill-8.last"),
        ({"draft": "mtp"}, "decode-1 verify-1x4 prefill-64 draft-1 round-1x2"),
        (
            {"draft": "auto", "draft_tokens": 3, "batch": (2, 4)},
            "decode-2 decode-4 verify-1x4 prefill-64 draft-3 round-2x4",
        ),
        ({"draft": "given", "sampled": True}, "decode-1.sampled verify-1x4 prefill-64 accept-1x4.sampled"),
        ({"draft": "auto", "batch": 8}, "decode-8 verify-1x4 prefill-64"),
        (
            {"target": "sm_90a", "batch": (1, 8)},
            "decode-1 decode-8 verify-1x4 prefill-64.last prefill-512.last prefill-4096.last",
        ),
        (
            {"target": "sm_90a", "batch": 1, "max_context": 512},
            "decode-1 verify-1x4 prefill-64.last prefill-512.last",
        ),
        (
            {"target": "sm_90a", "batch": 1, "max_context": 70},
            "decode-1 verify-1x4 prefill-64.last prefill-70.last",
        ),
        ({"target": "sm_90a", "batch": 1, "max_context": 7}, "decode-1 verify-1x4 prefill-7"),
        (
            {"target": "sm_90a", "batch": 1, "ranks": 2, "max_context": 512},
            "decode-1 verify-1x4 prefill-64.last prefill-512.last",
        ),
        ({"target": "sm_100a"}, "decode-1 decode-2 decode-4 decode-8 verify-1x4 prefill-8"),
        ({"target": "sm_90a", "chunk": 1, "batch": 1}, "decode-1 verify-1x4"),
    ],
)
def test_buckets_of_a_request(options: dict[str, Any], buckets: str) -> None:
    """Chunks fit a short context; what another bucket does already is no bucket of its own."""
    deployment = Request("tiny", **options).job().deployment
    assert [b.name for b in deployment.buckets] == buckets.split()
    assert deployment.slots == deployment.batch == max(b.sequences for b in deployment.buckets)


# --- the plan ---


def test_a_plan_binds_every_parameter_and_state_of_its_graphs() -> None:
    plan = dsv4c.compile("tiny", batch=2, slots=5, max_context=64, draft="mtp")
    config = dsv4c.load_config("tiny")
    assert plan.load is not None
    graphs = [parse_graph(plan.files[p.graph].decode()) for p in (*plan.buckets.values(), plan.load)]
    assert {w["name"] for w in plan.weights} == {p.name for p in layout(config)}
    slots = {s.name: s.type for s in plan.state}
    for graph in graphs:
        for state in graph.states:
            assert slots[state.name] == state.type
            assert state.type.shape[0] == 5
    assert set(slots) == {s.name for graph in graphs for s in graph.states}
    assert plan.program("decode").shape == Bucket("decode", sequences=2)
    assert plan.program("round").shape == Bucket("round", sequences=2, tokens=2)


def test_more_buckets_cost_launches_and_an_arena_alone() -> None:
    """Weights, state and constants are there once, at the same places, however many buckets use them."""
    few = dsv4c.compile("tiny", batch=8, verify=1, max_context=64, certify=False)
    many = dsv4c.compile("tiny", batch=(1, 2, 4, 8), verify=4, chunk=(8, 64), max_context=64, certify=False)
    assert len(many.buckets) == 7
    for block in ("weights", "state", "constants", "arena", "input"):
        assert many.blocks[block] == few.blocks[block], block
    assert (many.weights, many.state, many.load) == (few.weights, few.state, few.load)
    assert many.blocks["arena"] == max(p.arena_bytes for p in many.buckets.values())
    graphs = {f"graph.{bucket}.txt" for bucket in (*many.buckets, "load")}
    assert set(many.files) - set(few.files) == graphs - set(few.files) | bodies(many) - bodies(few)
    used = {launch.code.body for p in many.buckets.values() for launch in p.launches}
    assert bodies(many) == used - {""}


def bodies(plan: Plan) -> set[str]:
    return {name for name in plan.files if name.startswith("bodies/")}


def test_progress_counts_to_the_end() -> None:
    calls: list[tuple[str, int, int]] = []
    plan = dsv4c.compile("tiny", max_context=64, progress=lambda *call: calls.append(call))
    counts = [done for _, done, _ in calls]
    assert counts == sorted(counts)
    assert calls[-1][1] == calls[-1][2]
    certificates = [stage for stage, _, _ in calls if stage.startswith("certificate of ")]
    whole = len(plan.certificates)
    assert [text.split(", ")[1] for text in certificates] == [f"{i + 1} of {whole}" for i in range(whole)]
    stages = {stage for stage, _, _ in calls} - set(certificates)
    assert stages == {t for t in plan.timings if not t.startswith("rule ")}


FOR_OTHER_CHECKPOINTS = {"nvfp4-experts-w4a4", "fp8-experts"}


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in FOR_OTHER_CHECKPOINTS])
def test_every_recipe_runs_in_a_poisoned_arena(checkpoint: Path, recipe: str) -> None:
    """On a checkpoint of the release's formats; all agree on the order of magnitude, quantized or not."""
    session = dsv4c.compile(checkpoint, recipe=recipe, max_context=64, chunk=16).bind(checkpoint, poison=True)
    rows = torch.cat([session.prefill(list(range(20))), session.decode([7])])
    plain = dsv4c.compile(checkpoint, recipe="fp32", max_context=64, chunk=16).bind(checkpoint)
    wanted = torch.cat([plain.prefill(list(range(20))), plain.decode([7])])
    assert rows.isfinite().all()
    assert (rows - wanted).norm() / wanted.norm() < 0.6


def test_fp8_experts_run_as_such_though_the_config_does_not_say_so(tmp_path: Path) -> None:
    one = {"num_layers": 1, "compress_ratios": (0,), "num_hash_layers": 0, "mtp_layers": 0}
    model = replace(load_config("tiny"), expert_format="fp8", **one)
    folder = synthesize(model, tmp_path / "w", seed=3)
    raw = json.loads((folder / "config.json").read_text())
    del raw["expert_dtype"]
    (folder / "config.json").write_text(json.dumps(raw))
    plan = dsv4c.compile(folder, max_context=16)
    assert (plan.recipe, plan.deployment["recipe"]) == ("fp8-experts", "fp8-experts")
    rows = plan.bind(folder).prefill([3, 17, 5])
    wanted = dsv4c.compile(folder, recipe="fp32", max_context=16).bind(folder).prefill([3, 17, 5])
    assert 0 < (rows - wanted).norm() / wanted.norm() < 0.3


def test_the_recorded_nvfp4_checkpoint_runs_with_both_activation_formats() -> None:
    folder = golden_case("nvfp4-experts")
    rows = [
        dsv4c.compile(folder, recipe=recipe, max_context=64, chunk=16).bind(folder).prefill(list(range(9)))
        for recipe in ("nvfp4-experts", "nvfp4-experts-w4a4")
    ]
    assert 0.001 < (rows[0] - rows[1]).norm() / rows[0].norm() < 0.5


def test_static_scales_need_a_checkpoint_that_has_them(checkpoint: Path) -> None:
    plan = dsv4c.compile(checkpoint, recipe="nvfp4-experts-w4a4", max_context=64)
    with pytest.raises(CheckpointError, match=r"input_scale"):
        plan.bind(checkpoint)


def test_the_graph_before_folding_has_only_the_recipes_rounding() -> None:
    job = Request("tiny", max_context=64).job()
    graph = job.compiled(job.decode, stop_after="quantize").graph
    assert {p.name for p in graph.params} <= {p.name for p in layout(job.config)}
    assert sum(node.op.name == "quantize" for node in graph.nodes) > 20


def test_a_request_is_all_that_a_compile_is_asked_for() -> None:
    request = Request("tiny", max_context=64)
    with pytest.raises(ConfigError, match="compile: the request has decided batch, chunk; leave them out"):
        dsv4c.compile(request, batch=2, chunk=8)
    assert dsv4c.compile(request, certify=False) == dsv4c.compile("tiny", max_context=64, certify=False)


def test_a_plan_of_large_decode_steps_alone_has_their_figures() -> None:
    plan = dsv4c.compile("tiny", batch=8, max_context=32, certify=False)
    assert plan.report["buckets"].keys() == {"decode-8", "verify-1x4", "prefill-32"}
    assert plan.report["rules"]["attention"] == plan.report["rules"]["hyper_norm_first"] * 6


@pytest.mark.parametrize("options", [{"draft": "mtp"}, {"recipe": "nvfp4", "logits": "last"}])
def test_a_bucket_of_another_size_has_the_graph_it_would_be_compiled_to(options: dict[str, Any]) -> None:
    job = Request("tiny", batch=(1, 2, 8), chunk=(8, 64, 100, 512), **options).job()
    firsts = job.firsts()
    assert {b.name for b, first in firsts.items() if b == first} >= {"decode-1"}
    derived = [(b, first) for b, first in firsts.items() if b != first]
    assert {b.name for b, _ in derived} >= {"decode-2", "decode-8", "verify-1x4"}
    assert [(b.tokens, first.tokens) for b, first in derived if b.keeps_beside] == [(512, 64)]
    for bucket, first in derived:
        made = job.resized(job.compiled(first).graph, bucket)
        assert print_graph(made) == print_graph(job.compiled(bucket).graph)
