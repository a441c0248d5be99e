"""What drafts runs on kernels of the tuned families, and in few launches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from dsv4c.config import load_config
from dsv4c.plan.folder import Plan
from tests.codegen.lowered import gpu_plan

LAYERS = 4
BOUNDARY = "hyper_norm"
STAGE = ["in_proj", "q_proj", "attention_swa", "wo_a", "wo_b", BOUNDARY, "router_gate"]
STAGE += ["experts_up", "experts_down", BOUNDARY]


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Flash's first layers with DSpark's stages behind them."""
    flash = load_config("deepseek-v4-flash")
    config = replace(
        flash,
        num_layers=LAYERS,
        compress_ratios=flash.compress_ratios[:LAYERS],
        mtp_layers=0,
        dspark_stages=3,
        dspark_block_size=5,
        dspark_noise_token_id=128_799,
        dspark_target_layers=(1, 2, 3),
        dspark_markov_rank=256,
    )
    return gpu_plan(config, batch=1, chunk=8, draft="dspark", draft_tokens=5, certify=False)  # type: ignore[arg-type]


def kernels(plan: Plan, bucket: str) -> list[str]:
    """The kernels of a bucket's launches by family, in order."""
    return [launch.kernel.kernel.rpartition("_")[0] for launch in plan.buckets[bucket].launches]


def test_a_draft_of_dspark_has_no_more_launches_than_its_stages_and_choices(plan: Plan) -> None:
    found = Counter(kernels(plan, "draft-5"))
    around = ["draft_rows", "embed", "hyper_norm_first", "embedding", "hyper_head", "head"]
    chain = ["markov_head_markov_w2", "pick_draft"] * 5
    confidence, joined = ["concat", "slice", "concat", "linear"], ["concat", "concat"]
    wanted = Counter([*around, *STAGE * 3, *chain, *confidence, *joined])
    wanted[BOUNDARY] -= 1  # the last one is the head's
    assert found == wanted


def test_a_choice_in_a_round_keeps_no_logits(plan: Plan) -> None:
    """And none behind the last one, whose token biases no other."""
    picks = [x for x in plan.buckets["round-1x6"].launches if x.kernel.kernel.startswith("pick_draft")]
    made = [[a.value for a in launch.arguments if "w" in a.access] for launch in picks]
    assert [len(values) for values in made] == [2, 2, 2, 2, 1]
    assert not any("logits" in value for values in made for value in values)


def test_features_of_three_layers_are_one_launch(plan: Plan) -> None:
    for bucket in ("decode-1", "verify-1x4", "round-1x6"):
        names = kernels(plan, bucket)
        assert names.count("features") == 1
        assert not {"sum", "scale", "cast"} & set(names)


def test_a_block_that_sees_itself_gives_attention_its_last_row(plan: Plan) -> None:
    """Its window ends there for all rows; a row of the model's ends its own."""
    sources = {name: plan.files[f"kernels/{name}.py"].decode() for name in plan.kernels}
    swa = [text for name, text in sources.items() if name.startswith("attention_swa")]
    ends = sorted("m_last: cute.Pointer" in text for text in swa)
    assert ends == [False, True]
    (block,) = [text for text in swa if "m_last" in text]
    assert "        last=m_last,\n" in block
    assert "window=133,\n" in block


def test_every_stream_of_a_token_is_projected() -> None:
    """MTP's `h_proj` takes a row for each of a token's streams: as many rows as its norm has."""
    config = replace(load_config("tiny"), num_layers=1, compress_ratios=(0,), num_hash_layers=1)
    plan = gpu_plan(config, batch=1, verify=2, chunk=8, draft="mtp", draft_tokens=1, certify=False)
    kernels = {
        launch.name: plan.files[f"kernels/{launch.kernel.kernel}.py"].decode()
        for launch in plan.program("decode").launches
    }
    assert "x: bf16[1," in kernels["mtp.0.e_out"]
    assert "x: bf16[4," in kernels["mtp.0.h_out"]


def test_a_chunk_s_length_counts_no_streams() -> None:
    """Of 64 tokens, 256 rows are projected, whatever the length says of them."""
    flash = load_config("deepseek-v4-flash")
    config = replace(flash, num_layers=1, compress_ratios=flash.compress_ratios[:1], num_hash_layers=0)
    plan = gpu_plan(config, batch=1, chunk=64, draft="mtp", certify=False)  # type: ignore[arg-type]
    launches = plan.buckets["prefill-64.last"].launches
    reads = {
        node: {a.value for launch in launches if node in launch.nodes for a in launch.arguments}
        for node in ("mtp.0.h_out", "mtp.0.e_out")
    }
    assert "lengths" in reads["mtp.0.e_out"]
    assert "lengths" not in reads["mtp.0.h_out"]
    assert plan.report["unfolded"] == []
    kept = [x.nodes for x in plan.program("decode").launches if any(n.startswith("mtp.") for n in x.nodes)]
    assert len(kept) == 9  # of which one is the boundary before the block, whose coefficients nobody reads
