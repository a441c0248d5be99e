"""NVFP4 experts, with FP8 (W4A8) and NVFP4 (W4A4) activations, against recorded results end to end."""

from __future__ import annotations

import pytest

from tests.goldens import Recorded, recorded
from tests.interpreted import logits_of

WHOLE = -1  # the prompt in one call
KEYS = {"nvfp4-experts": "logits", "nvfp4-experts-w4a4": "logits_w4a4"}


@pytest.fixture(scope="module")
def case() -> Recorded:
    return recorded("nvfp4-experts")


@pytest.mark.parametrize("recipe", KEYS)
@pytest.mark.parametrize(("run", "chunk"), [("main", WHOLE), ("main", 37), ("main", 0), ("short", WHOLE)])
def test_logits(case: Recorded, recipe: str, run: str, chunk: int) -> None:
    ids, key = case.run(run), KEYS[recipe]
    logits = logits_of(case.folder, recipe, ids, ids.prefill if chunk == WHOLE else chunk)
    assert case.exceeded(f"{run}.{key}", logits, case.tolerance[key]["same_rounding_points"]) == {}


@pytest.mark.parametrize("chunk", [WHOLE, 5])
def test_logits_with_exact_weights_and_nothing_rounded(case: Recorded, chunk: int) -> None:
    run = case.run()
    logits = logits_of(case.folder, "fp32", run, run.prefill if chunk == WHOLE else chunk)
    distances = case.distances("main.logits_weight_only", logits)
    assert distances.max() <= case.tolerance["weight_only_logits_rel_l2_per_position"]
