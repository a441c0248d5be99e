"""Variants of a plan's heaviest kernels, cut in other ways and built, to be timed where there is a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from dsv4c.cache import cache_folder
from dsv4c.compiler.again import lowered_again
from dsv4c.errors import PlanError
from dsv4c.plan.folder import Plan
from dsv4c.plan.records import KernelCode
from dsv4c.plan.variants import Variants

Progress = Callable[[str, int, int], None]


def variants(
    plan: Plan,
    *,
    kernels: int = 4,
    each: int = 24,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Variants:
    """Up to `each` other cuts of the `kernels` that read the most weights in the smallest decode bucket.

    Raises PlanError for a plan without such kernels, or of another version of dsv4c, BuildError for a kernel
    that does not compile.
    """
    _, target = lowered_again(plan)
    weight = Counter[str]()
    for launch in plan.program("decode").launches:
        if isinstance(launch.code, KernelCode):
            weight[launch.code.kernel] += sum(a.nbytes for a in launch.arguments if a.space == "weights")
    if strange := [name for name in weight if name not in target.sources]:
        raise PlanError(
            f"plan {plan.name}: this version of dsv4c has no kernel {strange[0]}; compile the plan again"
        )
    chosen = [name for name, _ in weight.most_common() if name in target.tunable][:kernels]
    if not chosen:
        raise PlanError(f"plan {plan.name} for {plan.target} has no kernel that can be cut otherwise")
    store = cache_folder(cache) / "kernels"
    return Variants(plan, tuple(target.variants(chosen, each, store, progress)))
