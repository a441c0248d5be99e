"""DSpark against what the official implementation recorded in fp32: features, drafts, confidence, episodes.

A draft depends on the tokens up to its anchor alone, so prompts are read in whatever pieces lead to the
recorded anchors.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from dsv4c.buckets import Bucket
from tests.goldens import Recorded, recorded
from tests.interpreted import Model, padded

BLOCK = 5
LOGITS, CONFIDENCE = 2e-6, 1e-5


@pytest.fixture(scope="module")
def case() -> Recorded:
    return recorded("dspark-fp32")


def deviations(case: Recorded, run: str, row: int, found: Mapping[str, Tensor]) -> tuple[float, float]:
    """Relative L2 of the worst row of logits, and the largest difference of a confidence."""
    expected = case.tensors[f"{run}.logits"][row].double()
    logits = (found["logits"].double() - expected).norm(dim=1) / expected.norm(dim=1)
    confidence = found["confidence"][:, 0] - case.tensors[f"{run}.confidence"][row]
    return float(logits.max()), float(confidence.abs().max())


@pytest.mark.parametrize(("run", "chunk"), [("main", 64), ("short", 8), ("one", 8), ("p128", 8)])
def test_drafts_behind_every_recorded_anchor(case: Recorded, run: str, chunk: int) -> None:
    ids = case.run(run).ids
    model = Model(case.folder, "fp32", chunk)
    held = 0
    for row, place in enumerate(case.tensors[f"{run}.positions"].tolist()):
        model.prefill(ids[held:place])
        held = place
        found = model.draft(ids[place], BLOCK)
        assert found["next"].tolist() == case.tensors[f"{run}.tokens"][row].tolist()
        logits, confidence = deviations(case, run, row, found)
        assert logits <= LOGITS
        assert confidence <= CONFIDENCE


def test_an_episode_of_partly_right_drafts(case: Recorded) -> None:
    """Per round the recorded drafts are judged, what holds is consumed, and the next draft is asked for."""
    episode = case.description["episode"]
    model = Model(case.folder, "fp32", 9)
    logits = [model.prefill(episode["prompt"])[-1:]]
    for row, round_ in enumerate(episode["rounds"]):
        found = model.draft(round_["anchor"], BLOCK)
        assert found["next"].tolist() == round_["natural_tokens"]
        assert max(deviations(case, "episode", row, found)) <= CONFIDENCE
        rows = [round_["anchor"], *round_["forced_drafts"]]
        judged = model.call(Bucket("accept", tokens=1 + BLOCK), padded(rows, len(rows)))
        said = [token for token in judged["said"].tolist() if token >= 0]
        assert said == round_["emitted"]
        assert judged["next"].tolist() == said[-1:]
        logits.append(judged["logits"][: len(said)])
    assert int(model.states["position"]) == episode["final_anchor_position"]
    assert [r["accepted"] for r in episode["rounds"]] == [5, 0, 2, 1, 4, 0, 3, 5, 5, 0, 1]
    found = model.draft(episode["sequence"][-1], BLOCK)
    assert found["next"].tolist() == case.tensors["episode.tokens"][-1].tolist()
    rows, expected = torch.cat(logits).double(), case.tensors["episode.target_logits"].double()
    assert len(rows) == len(expected) - 1  # the last anchor was recorded, too
    distances = (rows - expected[:-1]).norm(dim=1) / expected[:-1].norm(dim=1)
    assert distances.max() <= case.tolerance["logits_rel_l2_per_row"]
