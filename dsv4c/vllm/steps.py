"""vLLM's schedule, step by step, over a session. Knows of vLLM only the plain data that it hands to workers.

A request whose tokens the plan can choose goes from step to step on the device: its last token is read there,
and the host waits for none of them. Where vLLM's sampler chooses, or drafts are checked, each step waits.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv4c.errors import SessionError
from dsv4c.runtime.sampling import Said, Sampling
from dsv4c.runtime.session import Session
from dsv4c.vllm.drafts import Drafter
from dsv4c.vllm.requests import Request, sampling_of
from dsv4c.vllm.slots import Slots


class Scheduled(Protocol):
    """Of vLLM's SchedulerOutput what a step needs."""

    finished_req_ids: set[str]
    scheduled_new_reqs: Sequence[Any]  # req_id, prompt_token_ids, sampling_params
    scheduled_cached_reqs: Any  # resumed_req_ids
    num_scheduled_tokens: Mapping[str, int]
    scheduled_spec_decode_tokens: Mapping[str, Sequence[int]]


@dataclass
class Step:
    """A step under way: whom it is for, in vLLM's order, and what is still to come.

    said: portions that the plan chooses. waiting: requests of vLLM's sampler, and their logits f32
    [n, vocab], row by row. tokens: what is known of the rest, none for those in the middle of a prompt.
    rows: logits f32 [len - 1, vocab] of prompts, for those that asked for their log-probabilities.
    """

    order: list[Request]
    said: list[tuple[list[Request], Said]] = field(default_factory=list)
    waiting: list[Request] = field(default_factory=list)
    logits: Tensor | None = None
    tokens: dict[str, list[int]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)


class Steps:
    """The requests of a session. seed: of those that bring none. drafter: drafts for greedy requests."""

    def __init__(self, session: Session, seed: int = 0, drafter: Drafter | None = None) -> None:
        self.session, self.slots, self.drafter = session, Slots(session), drafter
        self.requests: dict[str, Request] = {}
        shapes = [program.shape for program in session.plan.buckets.values()]
        self._samples = any(shape.sampled for shape in shapes)
        self._together = max(shape.sequences for shape in shapes if shape.kind == "decode")
        self._chunk = max(shape.tokens for shape in shapes if shape.is_main)
        self._seeds = random.Random(seed)
        self._rows: dict[str, list[Tensor]] = {}

    def step(self, scheduled: Scheduled) -> Step | None:
        """Enqueue a step; None where nothing is to be computed. Raises SessionError for a request that vLLM
        has preempted, which it never does where each has its own block.
        """
        for name in scheduled.finished_req_ids:
            request = self.requests.pop(name, None)
            if request is not None:
                self.slots.release(request.slot)
        if scheduled.scheduled_cached_reqs.resumed_req_ids:
            raise SessionError("vLLM has preempted a request; give each slot a block, as `dsv4c serve` does")
        if not scheduled.num_scheduled_tokens:
            return None
        step, ready = Step([]), []
        new = {each.req_id: each for each in scheduled.scheduled_new_reqs}
        for name, count in scheduled.num_scheduled_tokens.items():
            if name in new:  # after those before it have read: they may have the same prompt
                self._admit(new[name])
            step.order.append(self.requests[name])
            if self._read(self.requests[name], count, step):
                ready.append(self.requests[name])
        drafted = [r for r in ready if self._drafts(r)]
        for request in drafted:
            drafts = scheduled.scheduled_spec_decode_tokens.get(request.name, ())
            step.tokens[request.name] = self._check(request, list(drafts))
        self._say([r for r in ready if r.sampling is not None and r not in drafted], step)
        self._ask([r for r in ready if r.sampling is None], step)
        return step

    def take(self, step: Step) -> dict[str, list[int]]:
        """What a step has said, by request. Waits for it; other threads may go on enqueueing."""
        for requests, said in step.said:
            said.wait()  # before the session is held, so that others may enqueue meanwhile
            found = self.session.settle(said)
            for request in requests:
                step.tokens[request.name] = found[request.slot]
                request.tokens += found[request.slot]
        return {request.name: step.tokens.get(request.name, []) for request in step.order}

    def chosen(self, step: Step, tokens: Sequence[int]) -> None:
        """vLLM's sampler has chosen for those that wait. Raises SessionError if it had logits that are not
        finite.
        """
        self.session.check_finite(request.slot for request in step.waiting)
        for request, token in zip(step.waiting, tokens, strict=True):
            step.tokens[request.name] = [token]
            request.tokens.append(token)

    def drafts(self, step: Step) -> dict[str, list[int]]:
        """Drafts for the next step, by request that has said something."""
        said = [r for r in step.order if step.tokens.get(r.name)]
        if self.drafter is None:
            return {}
        return {r.name: self.drafter.draft(r.slot, r.tokens) if self._drafts(r) else [] for r in said}

    # --- one request ---

    def _admit(self, new: Any) -> None:
        params, tokens = new.sampling_params, list(new.prompt_token_ids)
        sampling = sampling_of(params, samples=self._samples, seed=self._seeds.getrandbits(64))
        slot = self.slots.admit(tokens, fresh=params.prompt_logprobs is not None)
        request = Request(new.req_id, tokens, len(tokens), params, slot, sampling)
        if params.seed is not None:
            request.generator = torch.Generator(self.session.device).manual_seed(params.seed)
        self.requests[request.name] = request

    def _drafts(self, request: Request) -> bool:
        return self.drafter is not None and request.sampling is not None and request.sampling.is_greedy

    def _read(self, request: Request, count: int, step: Step) -> bool:
        """Read what is scheduled of a prompt, all but its last token, of which the slot may hold some.
        Returns whether the request says something in this step.
        """
        if not request.is_reading:
            return True
        request.asked += count
        whole = request.params.prompt_logprobs is not None
        end = min(request.asked, request.prompt - 1)
        while (start := self.session.positions[request.slot]) < end:
            part = request.tokens[start : min(start + self._chunk, end)]
            last = not whole and self.session.gives_last
            rows = self.session.prefill(part, request.slot, logits="last" if last else "all")
            if whole:
                self._rows.setdefault(request.name, []).append(rows.cpu())
        if request.asked < request.prompt:
            return False
        self.session.choose(request.slot, request.sampling or Sampling())
        if whole and (read := self._rows.pop(request.name, None)):
            step.rows[request.name] = torch.cat(read)
        return True

    # --- a step's tokens ---

    def _say(self, requests: list[Request], step: Step) -> None:
        """Steps of requests whose tokens the plan chooses."""
        for start in range(0, len(requests), self._together):
            part = requests[start : start + self._together]
            fresh = {r.slot: r.tokens[-1] for r in part if self._is_fresh(r)}
            going = [r.slot for r in part if r.slot not in fresh]
            said = self.session.say(1, fresh, going)
            of_slot = {r.slot: r for r in part}
            step.said.append(([of_slot[slot] for slot in said.slots], said))

    def _is_fresh(self, request: Request) -> bool:
        """Is the prompt's last token still to be read?"""
        return self.session.positions[request.slot] == request.prompt - 1

    def _ask(self, requests: list[Request], step: Step) -> None:
        """Logits for requests whose tokens vLLM's sampler chooses."""
        if requests:
            logits = self.session.decode({r.slot: r.tokens[-1] for r in requests})
            step.waiting, step.logits = requests, logits[[r.slot for r in requests]]

    def _check(self, request: Request, drafts: list[int]) -> list[int]:
        """The last token and its drafts in one call: those that are the likeliest, and the one after."""
        session, slot = self.session, request.slot
        start = session.positions[slot]
        session.verify({slot: [request.tokens[start], *drafts]})
        likeliest = session.next_tokens
        right = next((i for i, draft in enumerate(drafts) if draft != likeliest[i]), len(drafts))
        session.take_back(len(drafts) - right, slot)
        request.tokens += likeliest[: right + 1]
        return likeliest[: right + 1]


def allow(logits: Tensor, requests: Sequence[Request], names: Sequence[str], allowed: Any) -> None:
    """Let only tokens through that a grammar allows: bit i of row j of `allowed` (numpy int32
    [rows, vocab / 32]) is token i of request names[j]. Requests without a grammar are not among the names.
    """
    rows = dict(zip(names, allowed, strict=True))
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    for i, request in enumerate(requests):
        if request.name in rows:
            words = torch.tensor(rows[request.name], dtype=torch.int32, device=logits.device)
            fits = (words[:, None] >> bits & 1).flatten()[: logits.shape[1]].bool()
            logits[i].masked_fill_(~fits, -torch.inf)
