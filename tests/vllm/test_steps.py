"""The worker's steps without vLLM: recorded schedules, and hand-written ones, against the session alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dsv4c.compiler.compile import compile
from dsv4c.errors import ConfigError, PlanError, SessionError
from dsv4c.runtime.sampling import Sampling
from dsv4c.runtime.session import Session
from dsv4c.vllm.drafts import PlanDrafter
from dsv4c.vllm.options import check_config, refuse_decided, server_options
from dsv4c.vllm.requests import sampling_of
from dsv4c.vllm.steps import Step, Steps, allow
from tests.words import small_checkpoint

RECORDED = sorted(Path(__file__).parent.glob("*.jsonl"))
CONTEXT = 512
GREEDY = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "seed": None,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logprobs": None,
    "prompt_logprobs": None,
    "min_tokens": 0,
}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    weights = small_checkpoint(tmp_path_factory.mktemp("served"))
    options: dict[str, Any] = {"max_context": CONTEXT, "batch": (1, 2, 4), "chunk": 64}
    return compile(weights, sampled=True, certify=False, **options).bind(weights)


@pytest.fixture
def steps(session: Session) -> Steps:
    session.reset()
    return Steps(session)


def asked(
    tokens: Mapping[str, int],
    new: Mapping[str, list[int]] | None = None,
    finished: Sequence[str] = (),
    drafts: Mapping[str, list[int]] | None = None,
    **params: Any,
) -> Any:
    """What vLLM's scheduler hands to a worker."""
    requests = [
        SimpleNamespace(
            req_id=name, prompt_token_ids=prompt, sampling_params=SimpleNamespace(**GREEDY | params)
        )
        for name, prompt in (new or {}).items()
    ]
    return SimpleNamespace(
        finished_req_ids=set(finished),
        scheduled_new_reqs=requests,
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
        num_scheduled_tokens=dict(tokens),
        scheduled_spec_decode_tokens=dict(drafts or {}),
    )


def take(steps: Steps, step: Step | None) -> dict[str, list[int]]:
    assert step is not None
    return steps.take(step)


def alone(session: Session, prompt: list[int], count: int, sampling: Sampling | None = None) -> list[int]:
    """What the session says by itself."""
    session.reset()
    if len(prompt) > 1:
        session.prefill(prompt[:-1])
    session.choose(0, sampling or Sampling())
    said = [session.settle(session.say(1, {0: prompt[-1]}))[0][0]]
    while len(said) < count:
        said += session.settle(session.say(1, slots=[0]))[0]
    return said


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_a_recorded_schedule_says_what_each_prompt_says_alone(steps: Steps, file: Path) -> None:
    """Six requests on four slots, prompts in portions; outputs are taken at once, or with the next step."""
    late = int("ahead" in file.stem)
    prompts: dict[str, list[int]] = {}
    said: dict[str, list[int]] = {}
    under_way: list[Step] = []
    for line in file.read_text().splitlines():
        given = json.loads(line)
        new = {each["name"]: each["prompt"] for each in given["new"]}
        prompts |= new
        step = steps.step(asked(given["tokens"], new, given["finished"]))
        under_way += [step] if step is not None else []
        while len(under_way) > (late if step is not None else 0):
            for name, tokens in steps.take(under_way.pop(0)).items():
                said.setdefault(name, []).extend(tokens)
    assert len(prompts) == 6
    steps.step(asked({}, finished=list(steps.requests)))
    assert steps.slots.free == 4
    for name, tokens in said.items():
        assert tokens == alone(steps.session, prompts[name], len(tokens))


def test_some_recordings_are_there() -> None:
    assert len(RECORDED) >= 2


def test_a_finished_sequence_is_gone_on_with(steps: Steps) -> None:
    prompt = list(range(20, 90))
    said = take(steps, steps.step(asked({"a": 70}, {"a": prompt})))["a"]
    for _ in range(4):
        said += take(steps, steps.step(asked({"a": 1})))["a"]
    assert steps.slots.reused == 0
    more = [*prompt, *said[:3], 6, 7]  # the last two tokens said are taken back
    step = steps.step(asked({"b": len(more)}, {"b": more}, finished=["a"]))
    found = take(steps, step)["b"]
    assert steps.slots.reused == len(prompt) + 3
    assert steps.slots.read == len(prompt) + 2
    found += take(steps, steps.step(asked({"b": 1})))["b"]
    assert found == alone(steps.session, more, 2)


def test_a_sequence_under_way_is_copied(steps: Steps) -> None:
    prompt = list(range(20, 120))
    both = {"a": prompt, "b": prompt}
    said = take(steps, steps.step(asked({"a": 100, "b": 100}, both, temperature=1.0, seed=3)))
    assert steps.slots.reused == 99
    assert said["a"] == said["b"] == alone(steps.session, prompt, 1, Sampling(temperature=1.0, seed=3))


def test_another_prompt_begins_anew(steps: Steps) -> None:
    take(steps, steps.step(asked({"a": 30}, {"a": list(range(20, 50))})))
    other = [*range(20, 35), 9, 9]
    found = take(steps, steps.step(asked({"b": 17}, {"b": other}, finished=["a"])))["b"]
    assert steps.slots.reused == 0
    assert found == alone(steps.session, other, 1)


def test_a_slot_is_given_back_by_whoever_ends(steps: Steps) -> None:
    names = {name: [3, 5, place] for place, name in enumerate("abcd")}
    steps.step(asked(dict.fromkeys(names, 3), names))
    assert steps.slots.free == 0
    assert steps.step(asked({}, finished=["b", "d"])) is None
    assert steps.slots.free == 2
    assert steps.step(asked({}, finished=["b"])) is None
    assert steps.slots.free == 2


def test_a_preempted_request_is_refused(steps: Steps) -> None:
    given = asked({})
    given.scheduled_cached_reqs.resumed_req_ids = {"a"}
    with pytest.raises(SessionError, match="vLLM has preempted a request"):
        steps.step(given)


def test_what_the_plan_cannot_choose_waits_with_its_logits(steps: Steps) -> None:
    step = steps.step(asked({"a": 3}, {"a": [3, 17, 5]}, logprobs=2))
    assert step is not None
    assert step.logits is not None
    likeliest = int(step.logits[0].argmax())
    steps.chosen(step, [likeliest])
    assert steps.take(step) == {"a": [likeliest]}
    step = steps.step(asked({"a": 1}))
    assert step is not None
    assert step.logits is not None
    second = int(step.logits[0].argmax())
    assert [likeliest, second] == alone(steps.session, [3, 17, 5], 2)


def test_nothing_comes_of_logits_that_are_not_finite(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step is only enqueued, as on a GPU, they show once vLLM's sampler has waited for them."""
    monkeypatch.setattr(steps.session, "_look", lambda slots: None)
    step = steps.step(asked({"a": 3}, {"a": [3, 17, 5]}, logprobs=2))
    assert step is not None
    steps.session._tainted[steps.requests["a"].slot] = torch.nan
    with pytest.raises(SessionError, match=r"the logits of slot \d are not finite"):
        steps.chosen(step, [7])


def test_logits_of_a_prompt_are_kept_for_those_who_ask(steps: Steps) -> None:
    prompt = list(range(20, 100))
    take(steps, steps.step(asked({"a": 80}, {"a": prompt})))
    step = steps.step(asked({"b": 80}, {"b": prompt}, finished=["a"], prompt_logprobs=1))
    assert step is not None
    assert step.rows["b"].shape == (79, steps.session.vocab_size)
    steps.session.reset()
    assert torch.equal(step.rows["b"], steps.session.prefill(prompt[:-1]))


@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_drafts_change_nothing(session: Session, right: int) -> None:
    prompt = [3, 17, 5]
    wanted = alone(session, prompt, 9)
    session.reset()

    class Known:
        def draft(self, slot: int, tokens: Sequence[int]) -> list[int]:
            following = wanted[len(tokens) - len(prompt) :][:3]
            return [t if i < right else (t + 1) % 500 for i, t in enumerate(following)]

    steps = Steps(session, drafter=Known())
    step = steps.step(asked({"a": 3}, {"a": prompt}))
    assert step is not None
    said = take(steps, step)["a"]
    while len(said) < 8:
        drafts = steps.drafts(step)
        step = steps.step(asked({"a": 1 + len(drafts["a"])}, drafts=drafts))
        assert step is not None
        found = take(steps, step)["a"]
        assert len(found) == 1 + min(right, len(drafts["a"]))
        said += found
    assert said[:9] == wanted[: len(said)]


def test_a_plan_drafts_for_itself(tmp_path: Path) -> None:
    weights, prompt = small_checkpoint(tmp_path), [3, 17, 5, 9]
    options: dict[str, Any] = {"max_context": 64, "batch": 1, "chunk": 8, "certify": False, "draft": "mtp"}
    session = compile(weights, sampled=True, draft_tokens=2, **options).bind(weights)
    wanted = alone(session, prompt, 8)
    session.reset()
    steps = Steps(session, drafter=PlanDrafter(session, 2))
    step = steps.step(asked({"a": 4}, {"a": prompt}))
    assert step is not None
    said = take(steps, step)["a"]
    while len(said) < 8:
        drafts = steps.drafts(step)
        assert drafts["a"] == session.draft({0: said[-1]})[0].tokens
        step = steps.step(asked({"a": 3}, drafts=drafts))
        assert step is not None
        said += take(steps, step)["a"]
    assert said[:8] == wanted
    with pytest.raises(ConfigError, match=r"num_speculative_tokens is 3: plan .* drafts 2"):
        PlanDrafter(session, 3)


def test_a_plan_that_drafts_nothing_is_said_to(session: Session) -> None:
    with pytest.raises(PlanError, match="draft"):
        PlanDrafter(session, 1)


def test_a_grammar_lets_only_its_tokens_through() -> None:
    logits = torch.zeros(2, 40)
    allowed = np.array([[1 << 5, 1 << 2], [-1, -1]], dtype=np.int32)
    requests: Any = [SimpleNamespace(name="a"), SimpleNamespace(name="b")]
    allow(logits, requests, ["a", "c"], allowed)
    assert logits[0].isfinite().nonzero().flatten().tolist() == [5, 34]
    assert logits[1].isfinite().all()


@pytest.mark.parametrize(
    ("params", "samples", "wanted"),
    [
        ({}, False, Sampling(seed=9)),
        ({"temperature": 1.0}, False, None),
        ({"temperature": 0.7, "top_k": -1, "seed": -1}, True, Sampling(0.7, seed=(1 << 64) - 1)),
        ({"temperature": 1e-6, "top_p": 0.5}, True, Sampling(seed=9)),
        ({"presence_penalty": 0.5}, False, None),
        ({"repetition_penalty": 1e-3}, True, None),
        ({"logprobs": 0}, True, None),
        ({"prompt_logprobs": 0}, True, None),
        ({"min_tokens": 2}, True, None),
        ({"logit_bias": {3: 1.0}}, True, None),
        ({"structured_outputs": object()}, True, None),
    ],
)
def test_who_chooses(params: dict[str, Any], samples: bool, wanted: Sampling | None) -> None:
    assert sampling_of(SimpleNamespace(**GREEDY | params), samples=samples, seed=9) == wanted


# --- what vLLM is told ---


def config(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "parallel_config.tensor_parallel_size": 1,
        "parallel_config.pipeline_parallel_size": 1,
        "parallel_config.data_parallel_size": 1,
        "scheduler_config.max_num_seqs": 4,
        "scheduler_config.async_scheduling": False,
        "model_config.max_model_len": CONTEXT,
        "model_config.logits_processors": None,
        "cache_config.enable_prefix_caching": False,
        "lora_config": None,
        "kv_transfer_config": None,
        "speculative_config": None,
    }
    made = SimpleNamespace()
    for name, value in (settings | changes).items():
        part, _, field = name.rpartition(".")
        if part and not hasattr(made, part):
            setattr(made, part, SimpleNamespace())
        setattr(getattr(made, part) if part else made, field, value)
    return made


def speculating(method: str, drafts: int) -> Any:
    return SimpleNamespace(method=method, num_speculative_tokens=drafts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel_config.tensor_parallel_size": 2}, "--tensor-parallel-size 2: one worker drives all"),
        ({"parallel_config.data_parallel_size": 2}, "--data-parallel-size 2: one worker runs a plan"),
        ({"scheduler_config.max_num_seqs": 5}, "--max-num-seqs is 5, the plan has 4 slots"),
        ({"model_config.max_model_len": 513}, "--max-model-len is 513, the plan's context 512"),
        ({"cache_config.enable_prefix_caching": True}, "--enable-prefix-caching"),
        ({"lora_config": object()}, "--enable-lora"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
        ({"model_config.logits_processors": ["a.b"]}, "--logits-processors"),
        ({"speculative_config": speculating("ngram", 1)}, "only method custom_class"),
        ({"speculative_config": speculating("custom_class", 4)}, "4 drafts: the plan verifies 4 tokens"),
        (
            {
                "speculative_config": speculating("custom_class", 1),
                "scheduler_config.async_scheduling": True,
            },
            "--async-scheduling: drafts are known only after a step",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(session: Session, changes: dict[str, Any], message: str) -> None:
    check_config(config(), session.plan)
    with pytest.raises(ConfigError, match=message):
        check_config(config(**changes), session.plan)


def test_the_servers_options(session: Session, tmp_path: Path) -> None:
    made = server_options(session.plan, tmp_path, tmp_path, name="tiny")
    assert made[:2] == ["serve", str(tmp_path)]
    options = dict(zip(made[2::2], made[3::2], strict=False))
    assert options["--block-size"] == options["--max-model-len"] == str(CONTEXT)
    assert options["--num-gpu-blocks-override"] == "5"
    assert json.loads(options["--additional-config"]) == {"plan": str(tmp_path)}
    assert "--async-scheduling" in made
    assert "--no-async-scheduling" in server_options(session.plan, tmp_path, tmp_path, name="a", ahead=False)
    refuse_decided(["--api-key", "secret", "--max-num-batched-tokens=64"], made)
    with pytest.raises(ConfigError, match="--max-num-seqs: is decided by the plan"):
        refuse_decided(["--max-num-seqs=9"], made)
