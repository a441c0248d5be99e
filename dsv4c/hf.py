"""A plan as a transformers model: `generate`, `pipeline("text-generation")` and streamers take it.

The plan keeps what a sequence has read in its slots, so the cache that transformers hands around only says
which slots its rows have. What needs more than that is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    DeepseekV4Config,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from dsv4c.errors import SessionError
from dsv4c.plan.folder import Plan, load
from dsv4c.runtime.session import Session

REFUSED = {
    "assistant_model": "drafts of another model",
    "prompt_lookup_num_tokens": "drafts from the prompt",
    "prefill_chunk_size": "prompts in portions: the plan has its own",
    "cache_implementation": "caches of transformers: the plan has its own",
    "inputs_embeds": "embeddings in place of ids",
    "output_attentions": "attention weights",
    "output_hidden_states": "hidden states",
    "labels": "a loss: plans are for inference",
}
"""Arguments that a plan cannot follow, and what they ask for."""


class PlanCache:
    """Which slots the rows of a batch are in, and how much of each row was padding."""

    is_compileable = False

    def __init__(self, session: Session, slots: Iterable[int]) -> None:
        self.session, self.slots = session, list(slots)
        self.padding = [0] * len(self.slots)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of a row, padding included."""
        return max(self.session.positions[s] + p for s, p in zip(self.slots, self.padding, strict=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise SessionError("num_beams: beams need copies of sequences at every step; use num_beams=1")


class PlanForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A bound plan. A batch has at most as many rows as the plan has slots, `num_return_sequences` included;
    it begins with fresh slots unless `past_key_values` of an earlier call is given.
    """

    config_class = DeepseekV4Config
    base_model_prefix = "plan"
    main_input_name = "input_ids"

    def __init__(self, config: DeepseekV4Config, session: Session) -> None:
        super().__init__(config)
        self.session = session
        self.anchor = nn.Parameter(torch.zeros(1, device=session.device), requires_grad=False)

    @classmethod
    def from_plan(cls, plan: Plan | str | Path, weights: str | Path) -> PlanForCausalLM:
        """The model of a plan, or of its folder, and a checkpoint folder. Raises PlanError and
        CheckpointError as `Plan.bind` does.
        """
        session = (plan if isinstance(plan, Plan) else load(plan)).bind(weights)
        model: PlanForCausalLM = cls(AutoConfig.from_pretrained(weights), session).eval()
        if (Path(weights) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(weights)
        return model

    def generate(self, *inputs: Any, **options: Any) -> Any:
        """As transformers has it. Raises SessionError, naming the argument, for what a plan cannot do."""
        given = options.get("generation_config")
        for name, what in REFUSED.items():
            if options.get(name, getattr(given, name, None)):
                raise SessionError(f"{name}: a plan does not offer {what}; leave it out")
        beams = options.get("num_beams", getattr(given, "num_beams", None))
        if (beams or 1) > 1:
            raise SessionError(f"num_beams: a plan follows one sequence a row, not {beams} beams; use 1")
        return super().generate(*inputs, **options)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: PlanCache | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        if past_key_values is not None:
            input_ids = input_ids[:, past_key_values.get_seq_length() :]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": True,
        }

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: PlanCache | None = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits f32 [rows, length or the last `logits_to_keep`, vocab], zeros where the mask is."""
        for name, what in REFUSED.items():
            if options.get(name):
                raise SessionError(f"{name}: a plan does not offer {what}; leave it out")
        rows, length = input_ids.shape
        cache = past_key_values or self._fresh(rows)
        if length == 1 and all(self.session.positions[s] for s in cache.slots):
            tokens = {slot: int(input_ids[i, 0]) for i, slot in enumerate(cache.slots)}
            logits = self.session.decode(tokens)[cache.slots][:, None]
        else:
            read = [self._read(cache, i, input_ids[i], attention_mask) for i in range(rows)]
            logits = torch.stack(read)
        kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        return CausalLMOutputWithPast(logits=logits[:, kept], past_key_values=cache)

    def _fresh(self, rows: int) -> PlanCache:
        if rows > self.session.slots:
            raise SessionError(
                f"{rows} rows, the plan has {self.session.slots} slots; compile with more --slots, or with a "
                "larger --batch"
            )
        for slot in range(rows):
            self.session.reset(slot)
        return PlanCache(self.session, range(rows))

    def _read(self, cache: PlanCache, row: int, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Logits of a row's tokens, zeros for padding, which its slot never sees."""
        kept = ids if mask is None else ids[mask[row, -len(ids) :].bool()]
        cache.padding[row] += len(ids) - len(kept)
        logits = self.session.prefill(kept, cache.slots[row])
        return torch.cat([logits.new_zeros(len(ids) - len(kept), logits.shape[1]), logits])
