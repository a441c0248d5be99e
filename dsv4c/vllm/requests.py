"""A request as the worker sees it, and how its tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsv4c.errors import SessionError
from dsv4c.runtime.sampling import Sampling

BEYOND = (
    "structured_outputs",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "min_tokens",
    "logprob_token_ids",
)
"""What a plan's own sampler knows nothing of, beside log-probabilities: fields of vLLM's SamplingParams."""

GREEDY = 1e-5
"""Temperatures below it take the likeliest token, as in vLLM."""


@dataclass
class Request:
    """A sequence on its way. `tokens` are those of the prompt, then what was said.

    sampling: how the plan chooses its tokens; None where vLLM's sampler does, from the logits. asked: tokens
    of the prompt that vLLM has scheduled so far. generator: torch's, of a request with a seed, for that
    sampler.
    """

    name: str
    tokens: list[int]
    prompt: int
    params: Any
    slot: int
    sampling: Sampling | None
    asked: int = 0
    generator: Any = None

    @property
    def is_reading(self) -> bool:
        """Is there some of the prompt that vLLM has not scheduled yet?"""
        return self.asked < self.prompt


def sampling_of(params: Any, *, samples: bool, seed: int) -> Sampling | None:
    """What `params` (vLLM's SamplingParams) ask of a plan, or None where it cannot do that: one that does
    not sample takes the likeliest token. seed: for those that have none.
    """
    if any(getattr(params, name, None) for name in BEYOND) or wants_chances(params):
        return None
    greedy = params.temperature < GREEDY
    given = seed if params.seed is None else params.seed
    try:
        sampling = Sampling(
            temperature=0.0 if greedy else params.temperature,
            top_k=0 if greedy else max(params.top_k, 0),
            top_p=1.0 if greedy else params.top_p,
            min_p=0.0 if greedy else params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            seed=given & ((1 << 64) - 1),
        )
    except SessionError:
        return None  # out of the plan's range, in vLLM's
    return sampling if samples or sampling.is_greedy else None


def wants_chances(params: Any) -> bool:
    """Does it ask for log-probabilities? Of none but the chosen token counts, too."""
    return params.logprobs is not None or params.prompt_logprobs is not None
