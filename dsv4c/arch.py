"""What a GPU is: the facts that decide which kernels it gets, how these are cut, and which plans it runs."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.cuts import PLANNED, Cut


@dataclass(frozen=True)
class Arch:
    """One architecture, with the figures of the `gpu` that kernels are planned for. Shared memory in bytes.

    read_bandwidth: bytes per second that it reads in its best grid, the floor of a kernel's time. bf16_flops,
    fp8_flops: operations per second of its tensor cores on dense operands, as specified.
    converts_e2m1: has conversions of e2m1, which decide how FP4 codes are packed. tensor_memory: has tcgen05.
    run_here: plans have run on it. cuts: of kernels by key, where another one than planned was measured to be
    faster on the `gpu`.
    """

    name: str  # as the compiler calls it; its "a": no later architecture runs the code
    gpu: str
    capability: tuple[int, int]
    sms: int
    shared_per_sm: int  # of which each resident CTA loses SYSTEM_SHARED
    shared_per_cta: int
    read_bandwidth: float
    bf16_flops: float
    fp8_flops: float
    converts_e2m1: bool
    tensor_memory: bool
    run_here: bool
    memory: int  # bytes, as nvidia-smi tells them
    cuts: tuple[tuple[str, Cut], ...] = ()

    def floor_us(self, nbytes: int) -> float:
        """Microseconds that reading `nbytes` takes at least."""
        return nbytes / self.read_bandwidth * 1e6

    def cut_of(self, key: str) -> Cut:
        """How a kernel of that key is cut."""
        return dict(self.cuts).get(key, PLANNED)

    def shared_of(self, resident: int) -> int:
        """Bytes of shared memory that a CTA may use where `resident` of them are to fit an SM."""
        return min(self.shared_per_cta, self.shared_per_sm // resident - SYSTEM_SHARED)


SYSTEM_SHARED = 1024

SM_90A = Arch(
    name="sm_90a",
    gpu="H200",
    capability=(9, 0),
    sms=132,
    shared_per_sm=228 * 1024,
    shared_per_cta=227 * 1024,
    read_bandwidth=4.45e12,
    bf16_flops=989e12,
    fp8_flops=1979e12,
    converts_e2m1=False,
    tensor_memory=False,
    run_here=True,
    memory=143_771 << 20,
)

SM_100A = Arch(
    name="sm_100a",
    gpu="B200",
    capability=(10, 0),
    sms=148,
    shared_per_sm=228 * 1024,
    shared_per_cta=227 * 1024,
    read_bandwidth=8.0e12,  # as specified, not measured
    bf16_flops=2250e12,
    fp8_flops=4500e12,
    converts_e2m1=True,
    tensor_memory=True,
    run_here=False,
    memory=183_359 << 20,
)

ARCHS = {arch.name: arch for arch in (SM_90A, SM_100A)}
"""By the name of the target."""
