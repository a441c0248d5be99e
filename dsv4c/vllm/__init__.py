"""Plans behind vLLM: it schedules, talks HTTP and streams; weights, state and the step are the plan's.

What vLLM loads by entry points is here. Nothing of it changes how other models are served: the model class
has a name of its own, and the platform is there only for those who ask for it.
"""

from __future__ import annotations

import os

ARCHITECTURE = "Dsv4cPlanForCausalLM"
"""The name under which vLLM knows a plan, whatever the checkpoint's config says."""

PLATFORM = "DSV4C_VLLM_PLATFORM"
"""The variable that asks for the platform, if it is 1."""


def register() -> None:
    """Entry point `vllm.general_plugins`."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, "dsv4c.vllm.model:PlanModel")


def platform() -> str | None:
    """Entry point `vllm.platform_plugins`: lets a vLLM that is built for GPUs run without one."""
    return "dsv4c.vllm.platform.HostPlatform" if os.environ.get(PLATFORM) == "1" else None
