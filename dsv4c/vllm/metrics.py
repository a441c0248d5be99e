"""The worker's own figures, beside vLLM's on /metrics.

vLLM's server shows what other processes count if PROMETHEUS_MULTIPROC_DIR names a folder, as `dsv4c serve`
sees to.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from dsv4c.vllm.slots import Slots

READ = Counter("dsv4c:prompt_tokens_read", "Tokens of prompts that were computed.")
REUSED = Counter("dsv4c:prompt_tokens_reused", "Tokens of prompts that a slot held already.")
FREE = Gauge("dsv4c:slots_free", "Slots without a request.", multiprocess_mode="livesum")


class Metrics:
    """Passes on what has changed."""

    def __init__(self) -> None:
        self._read = self._reused = 0

    def count(self, slots: Slots) -> None:
        if slots.read > self._read or slots.reused > self._reused:
            READ.inc(slots.read - self._read)
            REUSED.inc(slots.reused - self._reused)
            self._read, self._reused = slots.read, slots.reused
        FREE.set(slots.free)
