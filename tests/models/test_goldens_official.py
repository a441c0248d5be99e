"""The official recipe against recorded results of the official implementation: FP8 and MXFP4 end to end.

Rounding flips cost about as much as a missing step here, so this only says that nothing large is wrong;
`test_sublayers` proves the recipe part by part.
"""

from __future__ import annotations

import pytest

from tests.goldens import Recorded, recorded
from tests.interpreted import logits_of

WHOLE = -1  # the prompt in one call


@pytest.fixture(scope="module")
def case() -> Recorded:
    return recorded("official-quant")


@pytest.mark.parametrize("chunk", [WHOLE, 37, 0])
def test_logits_of_the_main_run(case: Recorded, chunk: int) -> None:
    run = case.run()
    logits = logits_of(case.folder, "official", run, run.prefill if chunk == WHOLE else chunk)
    bounds = case.tolerance["logits"]["same_rounding_points"]
    assert case.exceeded("main.logits", logits, bounds) == {}


@pytest.mark.parametrize(("run", "chunk"), [("short", WHOLE), ("short", 2), ("p128", WHOLE), ("p128", 5)])
def test_logits_of_the_short_runs(case: Recorded, run: str, chunk: int) -> None:
    ids = case.run(run)
    logits = logits_of(case.folder, "official", ids, ids.prefill if chunk == WHOLE else chunk)
    bounds = case.tolerance["logits"]["same_rounding_points"]
    assert case.exceeded(f"{run}.logits", logits, bounds) == {}


@pytest.mark.parametrize("chunk", [WHOLE, 37])
def test_logits_with_exact_weights_and_nothing_rounded(case: Recorded, chunk: int) -> None:
    run = case.run()
    logits = logits_of(case.folder, "fp32", run, run.prefill if chunk == WHOLE else chunk)
    distances = case.distances("main.logits_weight_only", logits)
    assert distances.max() <= case.tolerance["weight_only_logits_rel_l2_per_position"]
