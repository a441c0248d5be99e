"""The recorded results in the repository: small enough for a clone, unpacked without loss."""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from tests import goldens
from tests.golden.pack import compress, round_bits, split_planes
from tests.goldens import CASES, golden_case, join_planes, packed_case


def test_goldens_stay_within_the_size_limit_of_the_repository():
    folder = Path(__file__).parent / "golden"
    files = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert 0 < sum(path.stat().st_size for path in files) <= 16_500_000


def test_regrouping_bytes_loses_nothing():
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.arange(4),
        "d": torch.randn(128).to(torch.float8_e4m3fn),
        "e": torch.randn(2, 2).bfloat16(),
        "f": torch.tensor(2.5),
    }
    file = save(tensors, {"format": "pt"})
    assert split_planes(file) != file
    assert join_planes(split_planes(file)) == file
    smooth = save({"x": torch.linspace(1, 2, 4096)})
    assert len(compress(smooth)) < len(smooth) / 1.5


def test_rounding_keeps_the_significant_bits_it_promises():
    x = torch.randn(1000)
    for bits in (11, 19):
        rounded = round_bits(x, bits)
        assert ((rounded - x).abs() <= x.abs() * 2.0**-bits).all()
        assert (rounded != x).any()
        assert torch.equal(round_bits(rounded, bits), rounded)


def test_a_case_is_unpacked_once_and_complete():
    for case in CASES:
        folder = packed_case(case)
        assert sorted(p.name for p in folder.iterdir()) == [
            "case.json",
            "config.json",
            "expected.safetensors",
            "model.safetensors",
        ]
        assert "probe_rows" in load_file(folder / "expected.safetensors")
        assert packed_case(case) == folder


def _unpack(root: str) -> str:
    tempfile.tempdir = root
    goldens.packed_case.cache_clear()
    return str(packed_case("nvfp4-experts"))


def test_processes_may_unpack_the_same_case_at_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(_unpack, [str(tmp_path)] * 2)
    assert first == second
    assert Path(first).is_relative_to(tmp_path)
    assert [p.name for p in Path(first).parent.iterdir()] == [Path(first).name]


def test_complete_recordings_are_used_where_they_are(monkeypatch, tmp_path):
    monkeypatch.setenv("DSV4C_GOLDENS", str(tmp_path))
    assert golden_case("fp32") == tmp_path / "fp32"
    monkeypatch.setenv("DSV4C_GOLDENS", "")
    assert golden_case("fp32") == packed_case("fp32")


def test_packing_kept_what_the_recordings_hold():
    for case in (*CASES, "kernels"):
        packed, complete = (load_file(f(case) / "expected.safetensors") for f in (packed_case, golden_case))
        assert set(packed) <= set(complete)
        for name, tensor in packed.items():
            whole = complete[name]
            if tensor.shape[:1] < whole.shape[:1]:
                whole = whole[complete["probe_rows"]]
            assert tensor.shape == whole.shape
            if "logits" in name:
                whole, tensor = whole.double(), tensor.double()
                assert (tensor - whole).norm() <= 2.0**-12 * whole.norm()
            elif tensor.dtype is torch.float32 and tensor.isfinite().all():
                assert ((tensor - whole).abs() <= 2.0**-19 * whole.abs()).all()
            else:
                assert torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (tensor, whole)))
