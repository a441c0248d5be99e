"""Random checkpoints: complete, deterministic, statistically sane, and written safely."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from dsv4c.config import load_config
from dsv4c.errors import CheckpointError
from dsv4c.models import synth
from dsv4c.models.synth import synthesize
from dsv4c.models.weights import describe, records, sources
from dsv4c.runtime.checkpoint import Checkpoint
from dsv4c.runtime.parameter import ParamRecord
from dsv4c.types import F32, TensorType


@pytest.fixture(scope="module")
def tiny():
    return load_config("tiny")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return synthesize(tiny, tmp_path_factory.mktemp("synth") / "tiny", seed=7)


def digest(folder):
    tensors = Checkpoint.open(folder).tensors
    checkpoint, result = Checkpoint.open(folder), hashlib.sha256()
    for name in sorted(tensors):
        result.update(name.encode() + bytes(checkpoint.tensor(name).reshape(-1).view(torch.uint8).tolist()))
    return result.hexdigest()


def load(folder, config, table):
    """Every parameter, dequantized to f32 where it is a float."""
    values = {}
    wanted = [
        (n, s.stored.dtype if isinstance(s.stored, TensorType) else F32, s.stored.shape)
        for n, s in sources(config, table).items()
    ]
    plan = records(config, [(n, TensorType(d if not d.is_float else F32, s), False) for n, d, s in wanted])
    params = [ParamRecord.from_json(record) for record in plan]
    Checkpoint.open(folder).load(
        params, lambda name, value: values.update({name: value.clone()}), table=table
    )
    return values


@pytest.mark.parametrize(
    ("linear", "expert"), [("fp8", "mxfp4"), ("fp8", "nvfp4"), ("fp8", "fp8"), ("bf16", "bf16")]
)
def test_a_checkpoint_holds_exactly_what_its_config_needs(tiny, tmp_path, linear, expert):
    config = replace(tiny, linear_format=linear, expert_format=expert)
    folder = synthesize(config, tmp_path / "out", seed=1)
    assert load_config(folder) == config
    found = describe(Checkpoint.open(folder), config)
    assert found["complete"], found
    assert found["table"] == ("nvfp4" if expert == "nvfp4" else "release")


def test_values_are_those_of_a_sane_model(tiny, folder):
    values = load(folder, tiny, "release")
    for name, value in values.items():
        if value.is_floating_point():
            assert value.isfinite().all(), name
    gain = values["layers.1.attn_norm"]
    assert abs(gain.mean() - 1) < 0.05
    assert 0.05 < gain.std() < 0.15
    for name in ("layers.1.attn.wq_a", "layers.1.ffn.experts.w1", "layers.1.ffn.shared_experts.w2", "head"):
        assert values[name].std() * values[name].shape[-1] ** 0.5 == pytest.approx(1, abs=0.05), name
    assert values["layers.3.ffn.gate.bias"].abs().max() < 0.2
    rows = values["layers.0.ffn.gate.tid2eid"]
    assert rows.min() == 0
    assert rows.max() == tiny.n_routed_experts - 1
    assert all(len(set(row)) == tiny.num_experts_per_tok for row in rows.tolist())
    experts = values["layers.1.ffn.experts.w1"]
    assert len({tuple(expert.flatten()[:64].tolist()) for expert in experts}) == len(experts)


def test_codes_of_experts_are_all_as_likely_and_their_scales_neighbors(tiny, folder, tmp_path):
    mxfp4 = Checkpoint.open(folder)
    nvfp4 = Checkpoint.open(synthesize(replace(tiny, expert_format="nvfp4"), tmp_path / "out", seed=3))
    for checkpoint, scale in ((mxfp4, "scale"), (nvfp4, "weight_scale")):
        data = checkpoint.tensor("layers.1.ffn.experts.0.w1.weight").view(torch.uint8)
        counts = torch.bincount(torch.cat([data & 15, data >> 4]).flatten().long(), minlength=16)
        assert counts.min() > 0.8 * counts.float().mean()
        least, most = (
            checkpoint.tensor(f"layers.1.ffn.experts.0.w1.{scale}").view(torch.uint8).unique().tolist()
        )
        assert most == least + 1


def test_nvfp4_experts_share_scales_between_w1_and_w3(tiny, tmp_path):
    config = replace(tiny, expert_format="nvfp4")
    checkpoint = Checkpoint.open(synthesize(config, tmp_path / "out", seed=3))
    for scale in ("weight_scale_2", "input_scale"):
        w1, w2, w3 = (checkpoint.tensor(f"layers.2.ffn.experts.5.w{i}.{scale}").item() for i in (1, 2, 3))
        assert w1 == w3
        assert w1 != w2
        assert w1 != checkpoint.tensor(f"layers.2.ffn.experts.4.w1.{scale}").item()


def test_a_seed_means_the_same_values_whatever_the_shards_and_threads(tiny, folder, tmp_path):
    sharded = synthesize(tiny, tmp_path / "sharded", seed=7, shards=3, workers=1)
    assert len(list(sharded.glob("model-*-of-00003.safetensors"))) == 3
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(e.nbytes for e in Checkpoint.open(sharded).tensors.values())
    assert digest(sharded) == digest(folder)
    assert digest(synthesize(tiny, tmp_path / "other", seed=8)) != digest(folder)


def test_values_do_not_depend_on_how_many_jobs_a_tensor_takes(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(synth, "CHUNK", 256 * 128)
    folder = synthesize(tiny, tmp_path / "chunked", seed=7)
    assert describe(Checkpoint.open(folder), tiny)["complete"]
    values = load(folder, tiny, "release")
    assert values["embed"].std() == pytest.approx(1, abs=0.05)
    assert values["layers.1.attn.wq_b"].std() * 128**0.5 == pytest.approx(1, abs=0.05)
    assert (values["layers.1.attn.wq_b"][-128:] != 0).any()


def test_more_shards_than_bytes_can_fill_are_still_all_used(tiny, tmp_path):
    folder = synthesize(tiny, tmp_path / "many", seed=7, shards=300)
    assert len(list(folder.glob("model-*.safetensors"))) == 300
    assert describe(Checkpoint.open(folder), tiny)["complete"]
    with pytest.raises(CheckpointError, match="cannot split 585 tensors into 586 files"):
        synthesize(tiny, tmp_path / "toomany", seed=7, shards=586)


def test_progress_ends_at_the_whole(tiny, tmp_path):
    seen = []
    synthesize(tiny, tmp_path / "out", seed=0, progress=lambda name, done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_a_folder_with_content_is_not_overwritten_unless_forced(tiny, folder, tmp_path):
    target = tmp_path / "taken"
    shutil.copytree(folder, target)
    (target / "notes.txt").write_text("keep me")
    with pytest.raises(
        CheckpointError, match=r"taken: holds a checkpoint; give another folder, or --overwrite"
    ):
        synthesize(tiny, target, seed=1)
    assert digest(target) == digest(folder)
    synthesize(tiny, target, seed=1, shards=2, overwrite=True)
    assert (target / "notes.txt").read_text() == "keep me"
    assert not (target / "model.safetensors").exists()
    assert describe(Checkpoint.open(target), tiny)["complete"]
    assert digest(target) != digest(folder)


def test_a_file_in_the_way_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="exists and is no folder; give a new folder"):
        synthesize(tiny, tmp_path / "file", seed=1)
    with pytest.raises(CheckpointError, match="cannot be written"):
        synthesize(tiny, tmp_path / "file" / "below", seed=1)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="link: exists and is no folder"):
        synthesize(tiny, tmp_path / "link", seed=1)


def test_a_folder_without_a_checkpoint_is_never_written_to(tiny, tmp_path):
    (tmp_path / "thesis.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="is not empty and holds no checkpoint; give a new folder"):
        synthesize(tiny, tmp_path, seed=1, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_checkpoint_that_came_meanwhile_is_left_alone(tiny, tmp_path):
    def meanwhile(name, done, total):
        if done == total:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "model.safetensors").write_text("another process wrote me")

    with pytest.raises(CheckpointError, match="another process wrote it just now; it was left alone"):
        synthesize(tiny, tmp_path / "out", seed=0, progress=meanwhile)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_text() == "another process wrote me"


def test_a_small_disk_is_noticed_before_anything_is_written(tiny, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    with pytest.raises(CheckpointError, match=r"need 10,113,026 bytes, the disk has 1,000 left"):
        synthesize(tiny, tmp_path / "out", seed=1)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_nothing(tiny, tmp_path):
    def stop(name, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tiny, tmp_path / "out", seed=1, progress=stop)
    assert list(tmp_path.iterdir()) == []
