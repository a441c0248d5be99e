"""A platform that is only this machine's host: for a vLLM that is built for GPUs where there is none."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from vllm.platforms.interface import Platform, PlatformEnum

from dsv4c.runtime.bind import machine_memory


class HostPlatform(Platform):  # type: ignore[misc]
    """Runs CPU plans. It takes the place of every other platform, for every model of the environment."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    dispatch_key = "CPU"
    simple_compile_backend = "eager"

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "cpu"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return machine_memory("cpu")

    @classmethod
    def import_kernels(cls) -> None:
        """There are none. Shutting down, vLLM empties the accelerator's cache, which torch refuses here."""
        torch.accelerator.empty_cache = torch.accelerator.empty_host_cache = lambda: None

    @classmethod
    def inference_mode(cls) -> AbstractContextManager[None]:
        return torch.inference_mode()

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def verify_quantization(cls, quant: str) -> None:
        """A plan has its own numerics."""
