"""Recorded results through what a user calls: compile, save, load, bind, then prefill, decode and draft.

Every recipe, with all passes on, in an arena that is filled with NaN before each call.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dsv4c
from dsv4c.passes.recipes import RECIPES
from tests.goldens import recorded
from tests.interpreted import MAX_CONTEXT, logits_of

CHUNK = 64


def session(folder: Path, recipe: str, target: Path, draft: str = "off") -> dsv4c.Session:
    plan = dsv4c.compile(folder, recipe=recipe, max_context=MAX_CONTEXT, chunk=CHUNK, draft=draft)
    return dsv4c.load(plan.save(target / "plan")).bind(folder, poison=True)


def test_the_unquantized_model(tmp_path: Path) -> None:
    """Runs of one session after another, and a draft behind the prompt."""
    case = recorded("fp32")
    bound = case.tolerance["logits_rel_l2_per_position"]
    model = session(case.folder, "fp32", tmp_path, draft="mtp")
    run = case.run()
    logits = [model.prefill(run.ids[: run.prefill])]
    draft = model.draft({0: run.ids[run.prefill]})[0].logits[0].double()
    expected = case.tensors["mtp.logits"][run.prefill - 1].double()
    assert (draft - expected).norm() <= bound * expected.norm()
    logits += [model.decode([token]) for token in run.ids[run.prefill :]]
    assert case.distances("main.logits", torch.cat(logits)).max() <= bound
    for name in ("short", "one"):
        run = case.run(name)
        model.reset()
        logits = [model.prefill(run.ids[: run.prefill]), *(model.decode([t]) for t in run.ids[run.prefill :])]
        assert case.distances(f"{name}.logits", torch.cat(logits)).max() <= bound


@pytest.mark.parametrize(
    ("name", "recipe", "key"),
    [
        ("official-quant", "official", "logits"),
        ("nvfp4-experts", "nvfp4-experts", "logits"),
        ("nvfp4-experts", "nvfp4-experts-w4a4", "logits_w4a4"),
    ],
)
def test_quantized_models(name: str, recipe: str, key: str, tmp_path: Path) -> None:
    """The short run: bit by bit what plain interpretation gives, and close to what was recorded."""
    case = recorded(name)
    run = case.run("short")
    model = session(case.folder, recipe, tmp_path)
    logits = [model.prefill(run.ids[: run.prefill]), *(model.decode([t]) for t in run.ids[run.prefill :])]
    assert torch.equal(torch.cat(logits), logits_of(case.folder, recipe, run, CHUNK))
    largest = case.tolerance[key]["same_rounding_points"]["max"]
    assert case.distances(f"short.{key}", torch.cat(logits)).max() <= largest


@pytest.mark.parametrize(
    ("name", "recipe", "rounding"), [("fp32", "bf16", 0.02), ("nvfp4-experts", "nvfp4", 0.3)]
)
def test_recipes_without_a_recording_of_their_own(
    name: str, recipe: str, rounding: float, tmp_path: Path
) -> None:
    """Bit by bit what plain interpretation gives, and no further from the recorded recipe than rounding."""
    case = recorded(name)
    run = case.run("short")
    model = session(case.folder, recipe, tmp_path)
    logits = [model.prefill(run.ids[: run.prefill]), *(model.decode([t]) for t in run.ids[run.prefill :])]
    assert torch.equal(torch.cat(logits), logits_of(case.folder, recipe, run, CHUNK))
    distances = case.distances("short.logits", torch.cat(logits))
    assert 0 < distances.max() <= rounding


def test_every_recipe_is_run() -> None:
    """All but the one for checkpoints of FP8 experts, of which there is no recording."""
    tests = (test_quantized_models, test_recipes_without_a_recording_of_their_own)
    cases = [case for test in tests for mark in test.pytestmark for case in mark.args[1]]
    assert {"fp32", *(recipe for _, recipe, _ in cases)} == set(RECIPES) - {"fp8-experts"}
