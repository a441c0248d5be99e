"""Which of a plan's variants is faster, on one GPU: the whole step with each, and as planned, in turns. Of a
plan for several ranks it is the first, by itself.
"""

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
from dsv4c.runtime.ranks import alone

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
    variants: Variants,
    *,
    position: int = 8192,
    rounds: int = 5,
    anew: bool = False,
    progress: Progress | None = None,
) -> Iterator[Timed]:
    """Time every variant on this machine's GPU, on random weights. `anew`: both plans get blocks of their own
    in every round, since where these lie moves a step by 0.4 % (H200, 2026-11-30: a plan beside itself).
    Raises PlanError if the GPU cannot run the plan.
    """
    plan = variants.plan
    base = random_executor(plan, 0 if plan.ranks > 1 else None)
    assert isinstance(base, CudaExecutor), "one rank, or one alone"
    for number, variant in enumerate(variants.variants):
        if progress is not None:
            progress(f"{variant.kernel}: {variant.cut}", number, len(variants.variants))
        pairs: list[tuple[float, float]] = []
        clocks = _clocks(variants, variant, base, position, swapped=number % 2 == 1)
        for i in range(rounds):
            if anew and i:
                clocks = _clocks(variants, variant, base, position, swapped=i % 2 == 1)
            pairs.append(_turn(*clocks, swapped=i % 2 == 1))
        low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
        planned, made = (_logits(clock) for clock in clocks)
        yield Timed(
            variant,
            statistics.median(b for _, b in pairs),
            statistics.median(a for a, _ in pairs),
            middle,
            (low, high),
            torch.equal(planned, made),
        )


def _clocks(
    variants: Variants, variant: Variant, base: CudaExecutor, position: int, *, swapped: bool
) -> tuple[Clock, Clock]:
    """Clocks of the plan as it is and with the variant, made in this order, or swapped."""
    plans = variants.plan, variants.with_variant(variant)
    bucket = variants.plan.program("decode").shape.name
    made: dict[int, Clock] = {}
    for which in (1, 0) if swapped else (0, 1):
        made[which] = Clock(_executor(plans[which], base), bucket, position, REPLAYS)
    return made[0], made[1]


def card(plan: Plan) -> str:
    """The GPU as tables call it: what kernels are planned for, or the driver's name of another."""
    name, gpu = torch.cuda.get_device_name(), ARCHS[plan.target].gpu
    return gpu if gpu in name else name.removeprefix("NVIDIA ").split()[0]


def _executor(plan: Plan, base: CudaExecutor) -> CudaExecutor:
    """The plan on the same weights."""
    weights = base.blocks["weights"]
    executor = alone(plan, weights, 0) if plan.ranks > 1 else CudaExecutor(plan, weights)
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


def _logits(clock: Clock) -> Tensor:
    """Of one step from the same caches."""
    executor = clock.executor
    assert isinstance(executor, CudaExecutor)
    seed_caches(executor)
    Clock(executor, clock.bucket, 0, 1).prefixes([len(executor.plan.buckets[clock.bucket].launches)])
    return executor.programs[clock.bucket].outputs["logits"].clone()
