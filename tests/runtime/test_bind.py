"""Which checkpoints a plan takes: those of its model, whatever way they come, dead weights and all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv4c
from dsv4c.errors import CheckpointError
from dsv4c.models.synth import synthesize
from dsv4c.plan.folder import Plan
from tests.commands import command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    one = {"num_layers": 1, "compress_ratios": (0,), "num_hash_layers": 0, "mtp_layers": 0}
    model = replace(dsv4c.load_config("tiny"), **one)  # type: ignore[arg-type]
    return synthesize(model, tmp_path_factory.mktemp("bind") / "weights", seed=2)


@pytest.fixture(scope="module")
def plan(checkpoint: Path) -> Plan:
    return dsv4c.compile(checkpoint, max_context=16, certify=False)


def changed(checkpoint: Path, folder: Path, **keys: object) -> Path:
    """The same weights beside a config in which these keys are others."""
    shutil.copytree(checkpoint, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | keys))
    return folder


WAYS: dict[str, Callable[[Path], Path]] = {
    "a folder": lambda folder: folder,
    "a file": lambda folder: folder / "model.safetensors",
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_config_beside_the_weights_is_the_plans(
    way: Callable[[Path], Path], plan: Plan, checkpoint: Path, tmp_path: Path
) -> None:
    other = changed(checkpoint, tmp_path / "other", rope_theta=5000.0, routed_scaling_factor=2.5)
    found = "routed_scaling_factor is 2.5, the plan has 1.5; rope_theta is 5000.0, the plan has 10000.0"
    with pytest.raises(
        CheckpointError, match=f"is the checkpoint of another model: {found}; give the plan's"
    ):
        plan.bind(way(other))
    (other / "config.json").unlink()  # weights that come alone are judged by their shapes
    assert plan.bind(way(other)).positions == [0]


def test_keys_that_change_nothing_are_not_compared(plan: Plan, checkpoint: Path, tmp_path: Path) -> None:
    other = changed(checkpoint, tmp_path / "other", eos_token_id=[1, 5], bos_token_id=None)
    assert plan.bind(other).positions == [0]


def test_formats_are_told_before_shapes(plan: Plan, checkpoint: Path, tmp_path: Path) -> None:
    fp8 = replace(dsv4c.load_config(checkpoint), expert_format="fp8")
    other = synthesize(fp8, tmp_path / "fp8", seed=2)
    with pytest.raises(CheckpointError, match="expert_format is fp8, the plan has mxfp4"):
        plan.bind(other)


def dead_gate(text: str) -> str:
    """A stopped compile in which the shared expert is silu(up) * up, so that nothing reads its gate."""
    lines, scope = [], ""
    for line in text.split("\n"):
        if line.startswith(("@", "#", "graph ")):
            scope = line
        if scope == "@layers.0.ffn.shared_experts":
            line = line.replace("silu(%.clamp)", "silu(%.clamp_2)")
        lines.append(line)
    return "\n".join(lines).replace("},fold,prepack,tidy", "},tidy")


def test_a_weight_that_a_rewrite_made_dead_is_not_needed(checkpoint: Path, tmp_path: Path) -> None:
    stopped, folder = tmp_path / "x.ir", tmp_path / "x.plan"
    stop = command("compile", checkpoint, "--stop-after", "quantize", "-o", stopped, "--max-context", 16)
    assert stop.code == 0, stop.err
    text = stopped.read_text()
    edited = dead_gate(text)
    assert edited != text
    stopped.write_text(edited)
    assert command("compile", "--resume", stopped, "-o", folder).code == 0
    plan = dsv4c.load(folder)
    gate = "layers.0.ffn.shared_experts.w1"
    assert [record["name"] for record in plan.unused] == [gate]
    expected = plan.bind(checkpoint).prefill([3, 5])

    without, more = tmp_path / "without", tmp_path / "more"
    for target in (without, more):
        shutil.copytree(checkpoint, target)
    tensors = load_file(checkpoint / "model.safetensors")
    less = {name: value for name, value in tensors.items() if not name.startswith(gate)}
    save_file(less, without / "model.safetensors")
    assert torch.equal(plan.bind(without).prefill([3, 5]), expected)
    save_file(tensors | {"layers.0.ffn.shared_experts.w4.weight": torch.ones(2)}, more / "model.safetensors")
    told = r"1 tensors unexpected: \S+w4.weight\n  2 tensors not needed: "
    with pytest.raises(CheckpointError, match=told):
        plan.bind(more)


def test_a_plan_that_reads_all_weights_spares_none(plan: Plan) -> None:
    assert plan.unused == ()


def test_a_plan_is_bound_in_any_of_torchs_modes(plan: Plan, checkpoint: Path) -> None:
    expected = plan.bind(checkpoint).prefill([3, 1])
    with torch.inference_mode():
        session = plan.bind(checkpoint, workers=2)
        assert torch.equal(session.prefill([3, 1]), expected)
    session.reset()
    assert torch.equal(session.prefill([3, 1]), expected)
