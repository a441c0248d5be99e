"""vLLM's own sampler, for what a plan's cannot do: grammars, log-probabilities, biases, lists of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsLists, LogprobsTensors
from vllm.v1.sample.logits_processor import LogitsProcessor, LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from dsv4c.vllm.requests import GREEDY, Request


class Least(LogitsProcessor):  # type: ignore[misc]
    """min_p of each row: only tokens at least so many times as likely as the likeliest."""

    def __init__(self, least: Tensor) -> None:
        self._least = least

    def apply(self, logits: Tensor) -> Tensor:
        chances = logits.softmax(-1)
        return logits.masked_fill_(
            chances < chances.amax(-1, keepdim=True) * self._least[:, None], -torch.inf
        )

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        """It is made anew for every batch."""


def sample(
    sampler: Sampler, logits: Tensor, requests: Sequence[Request]
) -> tuple[list[int], LogprobsLists | None]:
    """A token for each row of logits f32 [n, vocab], and their log-probabilities if one has asked. Waits."""
    for row, request in zip(logits, requests, strict=True):
        for token, bias in (request.params.logit_bias or {}).items():
            row[token] += bias
        if len(request.tokens) - request.prompt < request.params.min_tokens:
            row[list(request.params.all_stop_token_ids)] = -torch.inf
    made = sampler(logits, _metadata(logits, requests))
    chances = made.logprobs_tensors
    return made.sampled_token_ids[:, 0].tolist(), None if chances is None else chances.tolists()


def spread(found: LogprobsLists, waiting: Sequence[Request], order: Sequence[Request]) -> LogprobsLists:
    """Rows of those that waited among the rows of all, in order, where vLLM looks for them."""
    at = [next(i for i, r in enumerate(order) if r is request) for request in waiting]

    def rows(part: Any) -> Any:
        whole = np.zeros((len(order), *part.shape[1:]), part.dtype)
        whole[at] = part
        return whole

    return LogprobsLists(rows(found.logprob_token_ids), rows(found.logprobs), rows(found.sampled_token_ranks))


def of_prompt(rows: Tensor, request: Request) -> LogprobsTensors:
    """Log-probabilities of a prompt's tokens but the first, from logits f32 [len - 1, vocab]."""
    vocab = rows.shape[1]
    most = vocab if request.params.prompt_logprobs == -1 else request.params.prompt_logprobs
    following = torch.tensor(request.tokens[1 : request.prompt], dtype=torch.int64)
    return Sampler.gather_logprobs(Sampler.compute_logprobs(rows), most, following)


def _metadata(logits: Tensor, requests: Sequence[Request]) -> SamplingMetadata:
    params = [r.params for r in requests]
    vocab, device = logits.shape[1], logits.device

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(p, name) for p in params], dtype=torch.float32, device=device)

    greedy = [p.temperature < GREEDY for p in params]
    top_k = [p.top_k if p.top_k > 0 else vocab for p in params]
    lowers = any(p.frequency_penalty or p.presence_penalty or p.repetition_penalty != 1 for p in params)
    chances = [vocab if p.logprobs == -1 else p.logprobs for p in params if p.logprobs is not None]
    special = {i: p.logprob_token_ids for i, p in enumerate(params) if getattr(p, "logprob_token_ids", None)}
    return SamplingMetadata(
        temperature=None if all(greedy) else column("temperature"),
        all_greedy=all(greedy),
        all_random=not any(greedy),
        top_p=column("top_p") if any(p.top_p < 1 for p in params) else None,
        top_k=torch.tensor(top_k, dtype=torch.int32, device=device) if min(top_k) < vocab else None,
        generators={i: r.generator for i, r in enumerate(requests) if r.generator is not None},
        max_num_logprobs=max(chances, default=None),
        no_penalties=not lowers,
        prompt_token_ids=_prompts(requests, vocab).to(device) if lowers else None,
        frequency_penalties=column("frequency_penalty"),
        presence_penalties=column("presence_penalty"),
        repetition_penalties=column("repetition_penalty"),
        output_token_ids=[r.tokens[r.prompt :] for r in requests],
        allowed_token_ids_mask=_forbidden(requests, vocab, device),
        bad_words_token_ids={i: p.bad_words_token_ids for i, p in enumerate(params) if p.bad_words_token_ids},
        logitsprocs=LogitsProcessors([Least(column("min_p"))] if any(p.min_p for p in params) else []),
        **({"logprob_token_ids": special} if special else {}),
    )


def _prompts(requests: Sequence[Request], vocab: int) -> Tensor:
    """The prompts, row by row, filled up with an id that is none."""
    made = torch.full((len(requests), max(r.prompt for r in requests)), vocab, dtype=torch.int64)
    for row, request in zip(made, requests, strict=True):
        row[: request.prompt] = torch.tensor(request.tokens[: request.prompt])
    return made


def _forbidden(requests: Sequence[Request], vocab: int, device: torch.device) -> Tensor | None:
    """True where a request that lists what it allows does not allow a token."""
    if not any(r.params.allowed_token_ids for r in requests):
        return None
    made = torch.zeros(len(requests), vocab, dtype=torch.bool, device=device)
    for row, request in zip(made, requests, strict=True):
        if request.params.allowed_token_ids:
            row.fill_(True)
            row[request.params.allowed_token_ids] = False
    return made
