"""Compiling: arguments are checked before work begins, the plan describes the model, every recipe runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dsv4c
from dsv4c.compiler.compile import graph_of, settings
from dsv4c.config import load_config
from dsv4c.errors import CheckpointError, ConfigError
from dsv4c.ir.text import parse_graph
from dsv4c.models.layout import layout
from dsv4c.models.synth import synthesize
from dsv4c.passes.recipes import RECIPES
from tests.goldens import golden_case

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(dsv4c.load_config("tiny"), tmp_path_factory.mktemp("compiler") / "weights", seed=2)


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
            {"pipeline": "quantize{recipe=nvfp4},fold,prepack,tidy,schedule,memory"},
            "pipeline: quantizes by nvfp4, the recipe is official; give one",
        ),
        ({"batch": 0}, r"batch .*0.* a positive integer"),
        ({"chunk": 65, "max_context": 64}, r"chunk .*65.* at most max_context, 64"),
        ({"max_context": 1 << 30}, r"max_context .*max_position_embeddings of tiny"),
        ({"target": "sm_90a", "chunk": 8}, r"chunk is 8; expected 1: a plan for sm_90a takes prompts token"),
    ],
)
def test_a_wrong_argument_is_a_config_error(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dsv4c.compile("tiny", **arguments)  # type: ignore[arg-type]


def test_a_model_without_mtp_has_no_mtp_bucket() -> None:
    with pytest.raises(ConfigError, match="has no MTP block"):
        dsv4c.compile(golden_case("official-quant"), mtp=True)


def test_what_a_plan_is_compiled_from() -> None:
    """A name, a path, a folder or a config: the same plan, but for the name."""
    folder = golden_case("official-quant")
    plans = [
        dsv4c.compile(source, max_context=64)
        for source in (folder, str(folder), folder / "config.json", dsv4c.load_config(folder))
    ]
    assert len({plan.text for plan in plans}) == 1
    assert plans[0].config_digest == dsv4c.load_config(folder).digest


def test_the_chunk_fits_a_short_context() -> None:
    assert dsv4c.compile("tiny", max_context=48).deployment["chunk"] == 48
    assert dsv4c.compile("tiny", max_context=480).deployment["chunk"] == 64


# --- the plan ---


def test_a_plan_binds_every_parameter_and_state_of_its_graphs() -> None:
    plan = dsv4c.compile("tiny", batch=2, max_context=64, mtp=True)
    config = dsv4c.load_config("tiny")
    graphs = [
        parse_graph(plan.files[b.graph].decode()) for b in (*plan.buckets.values(), *plan.loads.values())
    ]
    assert {w["name"] for w in plan.weights} == {p.name for p in layout(config)}
    for graph in graphs:
        for state in graph.states:
            slot = next(s for s in plan.state if s.name == state.name)
            assert slot.type == state.type.with_shape((2, *state.type.shape[1:]))
    assert plan.bucket("decode").tokens == plan.bucket("decode").sequences == 2
    assert plan.bucket("prefill").tokens == plan.bucket("mtp").tokens == 64


def test_a_smaller_arena_gives_the_same_logits(checkpoint: Path) -> None:
    plans = [
        dsv4c.compile(checkpoint, recipe="fp32", max_context=64, chunk=16, order=order)
        for order in ("source", "memory")
    ]
    source, thrifty = (plan.bucket("prefill").arena_bytes for plan in plans)
    assert thrifty <= 1.01 * source
    a, b = (plan.bind(checkpoint, poison=True).prefill(list(range(40))) for plan in plans)
    assert torch.equal(a, b)


def test_progress_counts_to_the_end() -> None:
    calls: list[tuple[str, int, int]] = []
    plan = dsv4c.compile("tiny", max_context=64, progress=lambda *call: calls.append(call))
    counts = [done for _, done, _ in calls]
    assert counts == sorted(counts)
    assert calls[-1][1] == calls[-1][2]
    assert {stage for stage, _, _ in calls} == {t for t in plan.timings if not t.startswith("rule ")}


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


def test_an_unfolded_graph_has_only_the_recipes_rounding() -> None:
    config, deployment, recipe = settings("tiny", max_context=64)
    graph = graph_of(config, deployment, recipe, "decode")
    assert {p.name for p in graph.params} <= {p.name for p in layout(config)}
    assert sum(node.op.name == "quantize" for node in graph.nodes) > 20
    assert deployment.chunk == 64
