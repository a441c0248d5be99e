"""Bisecting on the device: python -m tests.gpu.check_bisect PLAN CASE.

With the plan's own kernels no node may be suspected. Then a launch in the middle of the model leaves its
first result times -1.5, one op after the other: its node, or the one of its launches whose results are seen,
and no other, must be found and switched off, and its rule named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dsv4c.compiler.bisect import Bisection, Verdict
from dsv4c.compiler.job import job_of
from dsv4c.ir.graph import Node
from dsv4c.numerics.codec import parts_of
from dsv4c.plan.folder import load
from dsv4c.plan.records import Launch
from dsv4c.runtime.executor import Executor, Watch
from tests.goldens import golden_case

TOKENS = (3, 17, 5, 9)
FAULTS = ("attention", "q_norm_quantize", "swiglu", "experts_down")


class Faulty:
    """An executor that spoils a node's first result before anybody looks at it; None: spoils nothing."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.plan, self.poison, self.blocks = executor.plan, executor.poison, executor.blocks
        self.clear, self.share, self.wait = executor.clear, executor.share, executor.wait
        self.value, self.repeat, self.naming = executor.value, executor.repeat, executor.naming
        self.spoiled: Node | None = None

    def run(
        self, bucket: str, inputs: Mapping[str, Tensor], watch: Watch | None = None
    ) -> Mapping[str, Tensor]:
        node = self.spoiled
        launches = self.plan.program(bucket).launches
        own = [x for x in launches if node is not None and node.name in x.nodes]
        made = [x for x in own if node is not None and _writes(x, node)]
        last = [x.name for x in made or own][-1:]

        def spoil(launch: Launch) -> None:
            if node is not None and launch.name in last:
                data = parts_of(self.value(bucket, node.outputs[0].name))["data"]
                data.copy_((data.float() * -1.5).to(data.dtype))
            if watch is not None:
                watch(launch)

        return self.executor.run(bucket, inputs, spoil)


def _writes(launch: Launch, node: Node) -> bool:
    return any("w" in a.access and a.value == node.outputs[0].name for a in launch.arguments)


def wrong(verdict: Verdict, node: Node | None) -> str:
    """What is wrong with the verdict, "" if nothing is. Of nodes that launches compute together the one whose
    results are seen is switched off, and the others' rules are named beside its own.
    """
    found = [s.node for s in verdict.suspects]
    if node is None:
        return "" if verdict.right and not found else f"right: {verdict.right}, suspected: {found}"
    expected = not verdict.right and verdict.gone and len(verdict.switched_off) == 1
    named = node.op.name in verdict.rules and found[:1] == list(verdict.switched_off)
    return "" if expected and named else f"{verdict}"


def main() -> int:
    """One line per fault; status 1 if a verdict is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("case", help="the recorded model that the plan was compiled from")
    options = parser.parse_args()
    plan, weights = load(options.plan), golden_case(options.case)
    executor = Faulty(plan.bind(weights).executor)
    search = Bisection(plan, weights, TOKENS, job_of(plan), executor=executor)
    failed = 0
    for op in (None, *FAULTS):
        of_op = [n for n in search.graph.nodes if n.op.name == op]
        executor.spoiled = of_op[len(of_op) // 2] if op is not None else None
        problem = wrong(search.run(), executor.spoiled)
        what = "no fault" if executor.spoiled is None else f"{op} at {executor.spoiled.name}"
        print(f"{what}: {'wrong verdict, ' + problem if problem else 'right verdict'}", flush=True)
        failed += bool(problem)
    print(f"{len(FAULTS) + 1} verdicts, {failed} wrong")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
