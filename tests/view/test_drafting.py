"""What drafting gains by bytes: rounds against the step of the same model, by hand."""

from __future__ import annotations

import pytest

from dsv4c.view.drafting import Drafting, Round, text, tokens_per_round
from tests.commands import command
from tests.goldens import golden_case


def test_tokens_of_a_round() -> None:
    assert tokens_per_round(3, 0.0) == 1
    assert tokens_per_round(3, 1.0) == 4
    assert tokens_per_round(2, 0.5) == 1.75


def test_a_gain_is_tokens_over_time() -> None:
    found = Drafting("m", "H200", "mtp", 100.0, (Round(1, 150.0, 20.0, 0.5),))
    assert found.rounds[0].gain(100.0, 0.5) == pytest.approx(1.0)
    assert found.to_dict()["rounds"][0]["pays_from"] == 1.5
    assert "  1.00" in text(found)


def test_the_table_of_a_model() -> None:
    """As many drafts as its block has rows; a round takes longer than its draft and than a step."""
    done = command("roofline", golden_case("dspark-fp32"), "--max-context", 512, "--draft", "--json").json
    assert done["head"] == "dspark"
    assert [each["drafts"] for each in done["rounds"]] == [1, 2, 3, 4, 5]
    for each in done["rounds"]:
        assert each["floor_us"] > max(done["step_us"], each["draft_us"])
        assert each["gains"]["0.9"] == pytest.approx(
            tokens_per_round(each["drafts"], 0.9) / each["pays_from"]
        )
    refused = command("roofline", golden_case("official-quant"), "--draft")
    assert refused.code == 2
    assert "has nothing that drafts" in refused.err
