"""Recorded inputs and outputs of single kernels, described in `tests/golden/kernels/case.json`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="session")
def kernels() -> dict[str, torch.Tensor]:
    return load_file(Path(__file__).parents[1] / "golden" / "kernels" / "expected.safetensors")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
