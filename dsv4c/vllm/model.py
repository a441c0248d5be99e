"""What vLLM asks of a model class before any worker exists."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class PlanModel(nn.Module):
    """Stands for a plan where vLLM looks up what a model can do: generate text. It is never built; the worker
    runs the plan itself.
    """

    def __init__(self, *, vllm_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        raise NotImplementedError(
            "a plan is run by its worker; give --worker-cls dsv4c.vllm.worker.PlanWorker"
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        raise NotImplementedError

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        raise NotImplementedError
