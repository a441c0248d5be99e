"""The layer schedules of the releases, counted against what their model cards say."""

from __future__ import annotations

from collections import Counter

import pytest

from dsv4c.config import load_config
from dsv4c.models.schedule import LayerKind, RouterKind, draft_plans, layer_plans


@pytest.mark.parametrize(
    ("name", "swa", "csa", "hca"), [("deepseek-v4-flash", 2, 21, 20), ("deepseek-v4-pro", 0, 30, 31)]
)
def test_release_schedules(name: str, swa: int, csa: int, hca: int) -> None:
    kinds = [plan.attention for plan in layer_plans(load_config(name))]
    counts = Counter(kinds)
    assert (counts[LayerKind.SWA], counts[LayerKind.CSA], counts[LayerKind.HCA]) == (swa, csa, hca)
    assert set(kinds[2::2]) == {LayerKind.CSA}
    assert set(kinds[3::2]) == {LayerKind.HCA}


def test_the_first_layers_are_routed_by_token_id() -> None:
    plans = layer_plans(load_config("deepseek-v4-flash"))
    assert [plan.index for plan in plans if plan.router is RouterKind.HASH] == [0, 1, 2]
    assert [plan.label for plan in plans[:4]] == ["SWA+hash", "SWA+hash", "CSA+hash", "HCA+dense"]


def test_plan_of_each_kind() -> None:
    config = load_config("tiny")
    plans = layer_plans(config)
    assert [plan.label for plan in plans] == [
        "SWA+hash",
        "SWA+hash",
        "CSA+dense",
        "HCA+dense",
        "CSA+dense",
        "HCA+dense",
    ]
    swa, csa, hca = plans[1], plans[2], plans[3]
    assert (swa.prefix, swa.ratio, swa.has_compressor, swa.has_indexer) == ("layers.1", 0, False, False)
    assert (csa.prefix, csa.ratio, csa.has_compressor, csa.has_indexer) == ("layers.2", 4, True, True)
    assert (hca.prefix, hca.ratio, hca.has_compressor, hca.has_indexer) == ("layers.3", 128, True, False)
    assert (csa.overlaps, hca.overlaps) == (True, False)


def test_mtp_blocks_are_sliding_window_with_a_scored_router() -> None:
    (block,) = draft_plans(load_config("deepseek-v4-flash"))
    assert (block.prefix, block.label) == ("mtp.0", "SWA+dense")
