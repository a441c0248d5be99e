"""Every value of a plan's decode graph at some steps of a recorded run, by the reference: python -m
tests.gpu.dump_reference PLAN CASE [--steps 0,5].

Writes the file that `run_plan.py --reference` compares a device with, launch by launch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch import Tensor

import dsv4c.passes.fusions  # noqa: F401, registers the fused ops
from dsv4c.ir.text import parse_graph
from dsv4c.reference.interpret import clone, interpret
from dsv4c.runtime.checkpoint import Checkpoint
from dsv4c.runtime.codec import Quantized, Value, dequantize, view
from dsv4c.runtime.parameter import ParamRecord
from dsv4c.runtime.plan import load
from tests.goldens import recorded
from tests.interpreted import padded


def plain(value: Value) -> Tensor:
    """As f32, or the integers."""
    if isinstance(value, Quantized):
        return dequantize(value)
    return value.float() if value.is_floating_point() else value


def main() -> None:
    """Run the reference up to the last of the steps, keep what the wanted ones make."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("case")
    parser.add_argument("--run", default="main")
    parser.add_argument("--steps", default="0,5")
    parser.add_argument("--out", type=Path, default=Path("build/reference.safetensors"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan, case = load(options.plan), recorded(options.case)
    graph = parse_graph(plan.graph_text())
    params: dict[str, Value] = dict(load_safetensors(plan.files[plan.constants["file"]]))
    Checkpoint.open(case.folder).load(
        [ParamRecord.from_json(record) for record in plan.weights],
        lambda name, value: params.__setitem__(name, clone(value)),
    )
    states = {s.name: view(torch.zeros(s.type.extent, dtype=torch.uint8), s.type) for s in graph.states}
    wanted = [int(step) for step in options.steps.split(",")]
    kept: dict[str, Tensor] = {}
    for step, token in enumerate(case.run(options.run).ids[: max(wanted) + 1]):
        made: dict[str, Tensor] = {}
        interpret(graph, padded([token], 1), states, params, watch=_keeper(made, step in wanted))
        kept |= {f"{step}/{name}": value for name, value in made.items()}
    save_file(kept, options.out, {"run": options.run})
    print(f"{options.out}: {len(kept)} values of steps {options.steps}")


def _keeper(made: dict[str, Tensor], wanted: bool):  # type: ignore[no-untyped-def]
    def keep(name: str, value: Value) -> None:
        if wanted:
            made[name] = plain(value).clone().contiguous()

    return keep


if __name__ == "__main__":
    main()
