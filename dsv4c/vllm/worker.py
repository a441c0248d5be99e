"""The worker that vLLM is given: `--worker-cls dsv4c.vllm.worker.PlanWorker`, as `dsv4c serve` does.

A block of vLLM's cache is as long as the context, so each request needs one, and nobody is preempted. It is
counted, not filled: the plan's slots are the worker's own.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    AsyncModelRunnerOutput,
    DraftTokenIds,
    LogprobsLists,
    LogprobsTensors,
    ModelRunnerOutput,
)
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from dsv4c.plan.folder import Plan, load
from dsv4c.runtime.session import Session
from dsv4c.vllm.drafts import Drafter
from dsv4c.vllm.metrics import Metrics
from dsv4c.vllm.options import check_config
from dsv4c.vllm.sampler import of_prompt, sample, spread
from dsv4c.vllm.steps import Step, Steps, allow

logger = init_logger(__name__)


class PlanWorker(WorkerBase):  # type: ignore[misc]
    """A session behind vLLM's scheduler."""

    steps: Steps

    def __init__(self, *args: Any, shared_worker_lock: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pending: Step | None = None
        self._drafts: DraftTokenIds | None = None
        self._metrics = Metrics()

    # --- the start ---

    def init_device(self) -> None:
        self.plan = self.load_plan()
        check_config(self.vllm_config, self.plan)
        self.device = torch.device("cpu" if self.plan.target == "cpu" else f"cuda:{self.local_rank}")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.sampler = Sampler(self.model_config.logprobs_mode)

    def load_plan(self) -> Plan:
        """The plan that `--additional-config '{"plan": FOLDER}'` names."""
        return load(self.vllm_config.additional_config["plan"])

    def load_session(self) -> Session:
        """The plan bound to the checkpoint."""
        return self.plan.bind(self.model_config.model)

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        session, speculates = self.load_session(), self.speculative_config
        drafter: Drafter | None = None
        if speculates is not None:
            drafter = resolve_obj_by_qualname(speculates.model)(session, speculates.num_speculative_tokens)
        self.steps = Steps(session, self.model_config.seed or 0, drafter)
        logger.info("plan %s on %s: %d slots of %d tokens", *self._about(session))

    def _about(self, session: Session) -> tuple[str, torch.device, int, int]:
        return session.plan.name, session.device, session.slots, session.max_context

    def get_kv_cache_spec(self) -> dict[str, FullAttentionSpec]:
        return {"slot": self._block}

    @property
    def _block(self) -> FullAttentionSpec:
        context = int(self.plan.deployment["max_context"])
        return FullAttentionSpec(block_size=context, num_kv_heads=1, head_size=1, dtype=torch.uint8)

    def determine_available_memory(self) -> int:
        """Bytes of the blocks that vLLM counts with: one for each slot, and one that it keeps for itself."""
        return int((int(self.plan.deployment["slots"]) + 1) * self._block.page_size_bytes)

    def get_supported_kv_cache_layouts(self) -> list[str]:
        return ["LBNHC"]

    def set_kv_cache_layout(self, *layout: Any) -> None:
        """There is no cache to lay out."""

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Nothing to allocate: the slots are there."""

    def compile_or_warm_up_model(self) -> CompilationTimes:
        return CompilationTimes(0.0, 0.0)

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def update_max_model_len(self, max_model_len: int) -> None:
        """The plan's context is what it is; vLLM refuses what does not fit."""

    # --- a step ---

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any) -> ModelRunnerOutput | None:
        self._pending = self.steps.step(scheduler_output)
        self._metrics.count(self.steps.slots)
        return EMPTY_MODEL_RUNNER_OUTPUT if self._pending is None else None

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        step, self._pending = self._pending, None
        if step is None:
            return EMPTY_MODEL_RUNNER_OUTPUT
        chances = None
        if step.logits is not None:
            if grammar_output is not None:
                names = grammar_output.structured_output_request_ids
                allow(step.logits, step.waiting, names, grammar_output.grammar_bitmask)
            tokens, found = sample(self.sampler, step.logits, step.waiting)
            self.steps.chosen(step, tokens)
            chances = None if found is None else spread(found, step.waiting, step.order)
        if self.steps.drafter is not None:
            self.steps.take(step)
            drafts = self.steps.drafts(step)
            self._drafts = DraftTokenIds(list(drafts), list(drafts.values()))
            step.said.clear()
        prompts = {r.name: of_prompt(step.rows[r.name], r) for r in step.order if r.name in step.rows}
        output = PlanOutput(self.steps, step, chances, prompts)
        return output if self.scheduler_config.async_scheduling else output.get_output()

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        drafts, self._drafts = self._drafts, None
        return drafts

    def synchronize_device(self) -> None:
        self.steps.session.wait()

    def check_health(self) -> None:
        """A worker that does not answer is noticed by vLLM itself."""

    def shutdown(self) -> None:
        if hasattr(self, "steps"):
            del self.steps


class PlanOutput(AsyncModelRunnerOutput):  # type: ignore[misc]
    """A step's tokens, once somebody needs them."""

    def __init__(
        self,
        steps: Steps,
        step: Step,
        chances: LogprobsLists | None,
        prompts: dict[str, LogprobsTensors],
    ) -> None:
        self._steps, self._step, self._chances, self._prompts = steps, step, chances, prompts

    def get_output(self) -> ModelRunnerOutput:
        said = self._steps.take(self._step)
        return ModelRunnerOutput(
            req_ids=list(said),
            req_id_to_index={name: i for i, name in enumerate(said)},
            sampled_token_ids=list(said.values()),
            logprobs=self._chances,
            prompt_logprobs_dict={name: self._prompts.get(name) for name in said},
        )

    def get_kv_connector_output(self) -> None:
        """There is none; newer versions ask."""
