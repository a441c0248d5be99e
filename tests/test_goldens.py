"""The recorded results in the repository: small enough for a clone, unpacked without loss."""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from tests import goldens
from tests.golden.pack import compress, round_bits, split_planes
from tests.goldens import CASES, golden_case, join_planes


def test_goldens_stay_within_the_size_limit_of_the_repository():
    folder = Path(__file__).parent / "golden"
    files = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert 0 < sum(path.stat().st_size for path in files) <= 15_000_000


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
        folder = golden_case(case)
        assert sorted(p.name for p in folder.iterdir()) == [
            "case.json",
            "config.json",
            "expected.safetensors",
            "model.safetensors",
        ]
        assert "probe_rows" in load_file(folder / "expected.safetensors")
        assert golden_case(case) == folder


def _unpack(root: str) -> str:
    tempfile.tempdir = root
    goldens.golden_case.cache_clear()
    return str(golden_case("nvfp4-experts"))


def test_processes_may_unpack_the_same_case_at_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(_unpack, [str(tmp_path)] * 2)
    assert first == second
    assert Path(first).is_relative_to(tmp_path)
    assert [p.name for p in Path(first).parent.iterdir()] == [Path(first).name]
