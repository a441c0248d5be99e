"""What drafting gains by bytes: rounds against the step of the same model, by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from dsv4c.arch import SM_90A
from dsv4c.cli.roofline import drafting_of
from dsv4c.compiler.request import DSPARK_TOKENS, MTP_TOKENS, Request
from dsv4c.config import ModelConfig, load_config
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


MTP_HELD = [0.7**n for n in range(1, 8)]
DSPARK_HELD = [0.83, 0.64, 0.46, 0.32, 0.23]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "usual", "held"), [("mtp", MTP_TOKENS, MTP_HELD), ("dspark", DSPARK_TOKENS, DSPARK_HELD)]
)
def test_what_is_drafted_by_default_gains_most(head: str, usual: int, held: Sequence[float]) -> None:
    """By bytes, for the share of rounds in which so many drafts hold."""
    config = load_config("deepseek-v4-flash")
    found = drafting_of(
        Request(config if head == "mtp" else with_dspark(config), max_context=8192).job(), SM_90A
    )
    gains = {
        each.drafts: (1 + sum(held[: each.drafts])) * found.step_us / each.floor_us for each in found.rounds
    }
    assert max(gains, key=lambda drafts: gains[drafts]) == usual, gains


def with_dspark(config: ModelConfig) -> ModelConfig:
    """With stages as the 0731 release has them."""
    return replace(
        config,
        mtp_layers=0,
        dspark_stages=3,
        dspark_block_size=5,
        dspark_noise_token_id=128_799,
        dspark_target_layers=(40, 41, 42),
        dspark_markov_rank=256,
    )
