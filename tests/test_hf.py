"""transformers' own loops over a plan: greedy, sampled, padded, streamed, continued; and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4c.compiler.compile import compile
from dsv4c.errors import SessionError
from tests.words import small_checkpoint

transformers = pytest.importorskip("transformers")
PROMPT = [3, 17, 5, 44, 9]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def model(weights: Path) -> Any:
    from dsv4c.hf import PlanForCausalLM

    plan = compile(weights, max_context=64, batch=(1, 3), chunk=8, certify=False)
    made = PlanForCausalLM.from_plan(plan, weights)
    made.generation_config.update(eos_token_id=None, pad_token_id=2, do_sample=False)
    return made


@pytest.fixture(scope="module")
def greedy(model: Any) -> list[int]:
    """What the session itself says."""
    model.session.reset()
    first = int(model.session.prefill(PROMPT)[-1].argmax())
    return [*PROMPT, first, *model.session.steps(3, [0])[:, 0].tolist()]


def ids(*rows: list[int]) -> Any:
    return torch.tensor(rows)


def test_greedy_is_the_sessions(model: Any, greedy: list[int]) -> None:
    assert model.generate(ids(PROMPT), max_new_tokens=4).tolist() == [greedy]


def test_a_left_padded_batch_is_each_row_alone(model: Any, greedy: list[int]) -> None:
    short = [7, 11]
    alone = model.generate(ids(short), max_new_tokens=4)[0].tolist()
    mask = torch.tensor([[1] * 5, [0] * 3 + [1] * 2])
    both = model.generate(ids(PROMPT, [2, 2, 2, *short]), attention_mask=mask, max_new_tokens=4)
    assert both.tolist() == [greedy, [2, 2, 2, *alone]]


def test_going_on_from_a_cache_reads_only_what_is_new(model: Any, greedy: list[int]) -> None:
    made = model.generate(ids(PROMPT), max_new_tokens=2, return_dict_in_generate=True)
    before = model.session.positions[0]
    more = model.generate(made.sequences, past_key_values=made.past_key_values, max_new_tokens=2)
    assert more.tolist() == [greedy]
    assert (before, model.session.positions[0]) == (len(PROMPT) + 1, len(PROMPT) + 3)


def test_sampling_several_and_streaming(model: Any) -> None:
    torch.manual_seed(1)
    rows = model.generate(ids(PROMPT), do_sample=True, num_return_sequences=3, max_new_tokens=4)
    assert len({tuple(row) for row in rows.tolist()}) > 1

    class Streamer(transformers.generation.BaseStreamer):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: Any) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    streamer = Streamer()
    made = model.generate(ids(PROMPT), streamer=streamer, max_new_tokens=3)
    assert streamer.seen == [*made[0].tolist(), -1]


def test_a_pipeline_answers(model: Any, weights: Path) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(weights / "tokenizer.json"))
    answer = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    (made,) = answer("hello", max_new_tokens=2)
    assert made["generated_text"].startswith("hello")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams: a plan follows one sequence a row, not 2 beams"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens: a plan does not offer drafts from"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size: a plan does not offer prompts in portions"),
        ({"output_attentions": True}, "output_attentions: a plan does not offer attention weights"),
        ({"num_return_sequences": 4, "do_sample": True}, "4 rows, the plan has 3 slots"),
    ],
)
def test_what_a_plan_cannot_do_is_refused_by_name(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SessionError, match=message):
        model.generate(ids(PROMPT), max_new_tokens=2, **options)
