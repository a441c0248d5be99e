"""Recorded inputs and outputs of single kernels, described in `tests/golden/recorded/kernels/case.json`."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.goldens import golden_case


@pytest.fixture(scope="session")
def kernels() -> dict[str, torch.Tensor]:
    return load_file(golden_case("kernels") / "expected.safetensors")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
