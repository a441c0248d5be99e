"""What drafting gains by bytes: rounds against the step of the same model, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsv4c.arch import SM_90A
from dsv4c.cli.roofline import drafting_of
from dsv4c.compiler.request import DSPARK_TOKENS, MTP_TOKENS, Draft, Request
from dsv4c.config import ModelConfig, load_config
from dsv4c.models.drafting import HELD, gain, with_dspark, worth
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
    assert "worth judging" not in text(found)


def test_a_confidence_that_is_never_wrong_saves_the_rows_that_say_nothing() -> None:
    """Three drafts, each held with one half, say 1.875 tokens by as many rows: 60 + 100 + 0.875 · 40 us."""
    found = Drafting("m", "H200", "dspark", 100.0, (Round(3, 280.0, 60.0, 0.5),), worth=0.41)
    (each,) = found.rounds
    assert each.row_us(100.0) == 40
    assert each.foreseen(100.0, 0.5) == pytest.approx(187.5 / 195)
    assert each.foreseen(100.0, 1.0) == each.gain(100.0, 1.0)
    assert "worth judging: a draft that will be said with a probability of 0.41" in text(found)
    assert found.to_dict()["rounds"][0]["foreseen"]["0.5"] == each.foreseen(100.0, 0.5)


def test_what_is_worth_judging_is_what_a_row_costs() -> None:
    """As often as was published the third draft is said, and not the fourth."""
    config = with_dspark(load_config("deepseek-v4-flash"))
    least = worth(config, 3)
    assert HELD["dspark"][2] > least > HELD["dspark"][3]  # so that three are judged by default
    assert 0.38 < least < 0.45


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


@pytest.mark.parametrize(("head", "usual"), [("mtp", MTP_TOKENS), ("dspark", DSPARK_TOKENS)])
def test_what_is_drafted_by_default_gains_most(head: str, usual: int) -> None:
    config = load_config("deepseek-v4-flash")
    config = config if head == "mtp" else with_dspark(config)
    gains = {drafts: gain(config, drafts, 1) for drafts in range(1, len(HELD[head]) + 1)}
    assert max(gains, key=lambda drafts: gains[drafts]) == usual, gains


@pytest.mark.slow
@pytest.mark.parametrize("head", ["mtp", "dspark"])
def test_gains_by_weights_are_those_of_the_launches(head: str) -> None:
    """Within 3 %, where a launch's floor has all that it moves."""
    config = load_config("deepseek-v4-flash")
    config = config if head == "mtp" else with_dspark(config)
    found = drafting_of(Request(config, max_context=8192).job(), SM_90A)
    for each in found.rounds:
        said = 1 + sum(HELD[head][: each.drafts])
        assert gain(config, each.drafts, 1) == pytest.approx(said * found.step_us / each.floor_us, rel=0.03)


def test_drafts_that_do_not_pay_are_left_out() -> None:
    """On a GPU "auto" has rounds where their bytes gain; what is asked for by name is had."""
    flash = load_config("deepseek-v4-flash")

    def rounds(config: ModelConfig, draft: Draft) -> list[str]:
        deployment = Request(config, target="sm_90a", draft=draft).job().deployment
        return [b.name for b in deployment.buckets if b.kind == "round"]

    assert rounds(flash, "auto") == ["round-1x2", "round-2x2"]
    assert rounds(flash, "mtp") == ["round-1x2", "round-2x2", "round-4x2"]
    assert rounds(with_dspark(flash), "auto") == ["round-1x4"]
    shallow = replace(flash, num_layers=4, compress_ratios=flash.compress_ratios[:4])
    assert rounds(with_dspark(shallow), "auto") == []
    assert rounds(with_dspark(shallow), "dspark") == ["round-1x4"]
