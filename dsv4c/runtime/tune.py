"""Which of a plan's variants is faster, on one GPU: the whole step with each, and as planned, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4c.arch import ARCHS
from dsv4c.plan.folder import Plan
from dsv4c.plan.variants import Variant, Variants
from dsv4c.runtime.bench import Clock, fill_caches, random_executor
from dsv4c.runtime.cuda import CudaExecutor

Progress = Callable[[str, int, int], None]
REPLAYS = 5  # of a step in a turn, of which the median counts


@dataclass(frozen=True)
class Timed:
    """A variant beside the plan's own kernel: microseconds of the whole step, medians of all rounds, and the
    median and quartiles of the rounds' ratios. `same`: both gave the same logits, bit for bit.
    """

    variant: Variant
    us: float
    planned_us: float
    ratio: float
    quartiles: tuple[float, float]
    same: bool


def measure(
    variants: Variants, *, position: int = 8192, rounds: int = 5, progress: Progress | None = None
) -> Iterator[Timed]:
    """Time every variant on this machine's GPU, on random weights. Raises PlanError if it cannot run them."""
    plan = variants.plan
    base = random_executor(plan)
    assert isinstance(base, CudaExecutor), "one rank"
    bucket = plan.program("decode").shape.name
    seed_caches(base)
    clock = Clock(base, bucket, position, REPLAYS)
    for number, variant in enumerate(variants.variants):
        if progress is not None:
            progress(f"{variant.kernel}: {variant.cut}", number, len(variants.variants))
        made = _executor(variants.with_variant(variant), base)
        other = Clock(made, bucket, position, REPLAYS)
        pairs = [_turn(clock, other, swapped=i % 2 == 1) for i in range(rounds)]
        low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
        yield Timed(
            variant,
            statistics.median(b for _, b in pairs),
            statistics.median(a for a, _ in pairs),
            middle,
            (low, high),
            torch.equal(_logits(base, bucket), _logits(made, bucket)),
        )


def card(plan: Plan) -> str:
    """The GPU as tables call it: what kernels are planned for, or the driver's name of another."""
    name, gpu = torch.cuda.get_device_name(), ARCHS[plan.target].gpu
    return gpu if gpu in name else name.removeprefix("NVIDIA ").split()[0]


def _executor(plan: Plan, base: CudaExecutor) -> CudaExecutor:
    """The plan on the same weights."""
    executor = CudaExecutor(plan, base.blocks["weights"])
    seed_caches(executor)
    return executor


def seed_caches(executor: CudaExecutor) -> None:
    """The same random caches for every executor."""
    torch.cuda.manual_seed(0)
    fill_caches(executor)


def _turn(planned: Clock, other: Clock, *, swapped: bool) -> tuple[float, float]:
    """Microseconds of both steps, the other first if swapped."""
    clocks = (other, planned) if swapped else (planned, other)
    first, second = (_step(clock) for clock in clocks)
    return (second, first) if swapped else (first, second)


def _step(clock: Clock) -> float:
    program = clock.executor.plan.buckets[clock.bucket]
    end = len(program.launches)
    return clock.prefixes([end])[end]


def _logits(executor: CudaExecutor, bucket: str) -> Tensor:
    """Of one step from the same caches."""
    seed_caches(executor)
    Clock(executor, bucket, 0, 1).prefixes([len(executor.plan.buckets[bucket].launches)])
    return executor.programs[bucket].outputs["logits"].clone()
