"""Cross-compile what `check_rows.py` runs: python -m tests.gpu.build_rows.

Writes to the folder build/gpu/rows: a kernel for every primitive of `tests.codegen.primitives` in batches of
1, 2, 3 and 8 and for random bodies, with `cases.json`; and tiny plans that lean on generated kernels, with
`plans.json`: every rule left out alone, all of them, all recipes, the draft block, odd shapes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsv4c.arch import ARCHS, Arch
from dsv4c.codegen.build import Source, build
from dsv4c.codegen.kernels.rows import Built, kernel_of, primitives
from dsv4c.codegen.registry import No
from dsv4c.compiler.compile import compile
from dsv4c.compiler.job import rules_of
from dsv4c.config import ModelConfig, load_config
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Graph
from dsv4c.ir.text import print_graph
from dsv4c.passes.fusions import FUSIONS
from dsv4c.passes.fusions.q_norm_rope import QNormRope
from dsv4c.passes.fusions.rmsnorm_quantize import RmsnormQuantize
from dsv4c.passes.fusions.sinkhorn import Sinkhorn
from dsv4c.types import BF16, FP8_ROW, parse_type
from tests.codegen.gated_up import GatedUp
from tests.codegen.primitives import BATCHES, PRIMITIVES, graph_of, random_bodies
from tests.codegen.products import NAMES, RULES, WIDE
from tests.goldens import golden_case

FOLDER = Path("build/gpu/rows")
SMALL = {"batch": 1, "verify": 1, "chunk": 1, "max_context": 512}
PLAIN = {"linear_format": "bf16", "expert_format": "bf16"}
ODD: dict[str, dict[str, Any]] = {
    "hidden384": {"hidden_size": 384},
    "heads": {"num_attention_heads": 6, "head_dim": 192, "o_groups": 3, "num_experts_per_tok": 3},
    "experts": {"hidden_size": 640, "n_routed_experts": 12, "moe_intermediate_size": 384, "vocab_size": 500},
    "narrow": PLAIN | {"hidden_size": 200, "moe_intermediate_size": 88, "q_lora_rank": 72, "o_lora_rank": 40},
}
"""Changes of the built-in tiny model that no tuned family was made for."""


@dataclass(frozen=True)
class Case:
    """A plan to compile: of a recorded case, or of a changed tiny model with random weights."""

    name: str
    model: str | ModelConfig
    options: dict[str, Any]
    logits: str = ""  # the recorded ones to compare with


def cases() -> Iterator[Case]:
    """Every plan."""
    official = "official-quant"
    for rule in FUSIONS:
        yield Case(f"no-{rule.name}", official, {**SMALL, "disable": [rule.name]}, "logits")
    yield Case("no-rules", official, {**SMALL, "batch": (1, 3), "chunk": 8, "disable": ["all"]}, "logits")
    yield Case("no-rules-bf16", official, {**SMALL, "recipe": "bf16", "disable": ["all"]})
    yield Case("no-rules-fp32", "fp32", {**SMALL, "recipe": "fp32", "disable": ["all"]}, "logits")
    yield Case("fp32", "fp32", {**SMALL, "recipe": "fp32", "batch": (1, 8), "chunk": 8}, "logits")
    yield Case("bf16", official, {**SMALL, "recipe": "bf16"}, "logits_weight_only")
    for recipe in ("nvfp4-experts", "nvfp4-experts-w4a4", "nvfp4"):
        logits = "logits" if recipe == "nvfp4-experts" else ""
        for name, disable in ((recipe, []), (f"no-rules-{recipe}", ["all"])):
            options = {**SMALL, "recipe": recipe, "disable": disable}
            yield Case(name, "nvfp4-experts", options, logits)
    contributed = rules_of(["tests.codegen.gated_up:GatedUp"])
    own = {"disable": ["swiglu", "hash_swiglu"], "rules": contributed, "require_fused": ["gated_up"]}
    yield Case("contributed", official, {**SMALL, **own}, "logits")
    tiny = load_config("tiny")
    wide = replace(tiny, name="wide", **WIDE)
    around = {
        "disable": [fusion.name for fusion in FUSIONS],
        "rules": rules_of(RULES),
        "require_fused": NAMES,
    }
    for name, sizes in (("products", {"batch": (1, 3), "chunk": 12}), ("products-8", {"batch": (1, 8)})):
        yield Case(name, wide, {**SMALL, **around, **sizes})
    yield Case("fp8-experts", replace(tiny, expert_format="fp8"), SMALL)
    for name, changes in ODD.items():
        recipes = ("bf16", "fp32") if "linear_format" in changes else ("official", "bf16", "fp32")
        for recipe in recipes:
            options = {**SMALL, "recipe": recipe, "batch": (1, 2)}
            yield Case(f"{name}-{recipe}", replace(tiny, name=name, **changes), options)


FUSED: tuple[tuple[Fused, tuple[str, ...]], ...] = (
    (RmsnormQuantize(eps=1e-6, format=FP8_ROW), ("bf16[N,4096]", "bf16[4096]")),
    (RmsnormQuantize(eps=1e-6, format=FP8_ROW), ("bf16[N,7168]", "bf16[7168]")),
    (Sinkhorn(iterations=20, eps=1e-6), ("f32[N,4,4]",)),
    (QNormRope(eps=1e-6, precision=BF16), ("bf16[N,64,512]", "i32[N]", "f32[32]")),
    (GatedUp(limit=10.0), ("bf16[N,2048]", "bf16[N,2048]")),
)
"""Fused ops of the release's sizes as generated kernels."""
DRAFTS = {"draft-fp32": ("fp32", "fp32"), "draft-dspark": ("dspark-fp32", "fp32")}
"""Plans with what drafts: recorded case and recipe. Each has one for the CPU beside it."""


def graphs(bodies: int, seed: int) -> Iterator[tuple[str, bool, Graph]]:
    """(name, whether it is a body, graph) of every kernel."""
    for number, (op, types) in enumerate(PRIMITIVES):
        batches = BATCHES if any("N" in text for text in types) else (1,)
        for rows in batches:
            yield f"{number}.{op.name}.b{rows}", False, graph_of(op, types, rows)
    for number, graph in random_bodies(bodies, seed):
        yield f"body{number}", True, graph
    for op, types in FUSED:
        for rows in BATCHES:
            graph = primitives(op, tuple(parse_type(text.replace("N", str(rows))) for text in types))
            yield f"fused.{op.name}.{types[0]}.b{rows}", True, graph


def kernels(folder: Path, store: Path, arch: Arch, wanted: Iterable[tuple[str, bool, Graph]]) -> int:
    """Compile and describe them; how many there are."""
    made: list[tuple[str, Graph, Built]] = []
    for name, body, graph in wanted:
        built = kernel_of(graph, body, "body" if body else name.split(".")[1], name, arch)
        assert not isinstance(built, No), f"{name}: {built}"
        made.append((name, graph, built))
    sources = [Source(b.emission.symbol, b.emission.source) for _, _, b in made]
    described = []
    for (name, graph, each), kernel in zip(made, build(sources, arch.name, store), strict=True):
        emission = each.emission
        cubin = f"{kernel.key[:20]}.cubin"
        (folder / cubin).write_bytes(kernel.cubin)
        (folder / f"{kernel.key[:20]}.py").write_text(emission.source)
        described.append(
            {
                "name": name,
                "graph": print_graph(graph),
                "cubin": cubin,
                "symbol": emission.symbol,
                "grid": emission.grid,
                "block": emission.block,
                "shared": emission.shared,
                "cluster": emission.cluster,
                "parameters": [[each.operands[p.operand].name, p.component] for p in emission.parameters],
            }
        )
    (folder / "cases.json").write_text(json.dumps(described))
    return len(described)


def plans(folder: Path, target: str, only: str) -> list[dict[str, Any]]:
    """Compile, save and describe the plans whose names contain `only`."""
    described = []
    for case in cases():
        if only not in case.name:
            continue
        model = golden_case(case.model) if isinstance(case.model, str) else case.model
        plan = compile(model, target=target, certify=False, **case.options)
        print(plan.save(folder / case.name, overwrite=True), flush=True)
        weights = case.model if isinstance(case.model, str) else ""
        described.append({"name": case.name, "weights": weights, "logits": case.logits})
    for name, (model, recipe) in DRAFTS.items():
        if only not in name:
            continue
        for kind in (target, "cpu"):
            options = {
                **SMALL,
                "chunk": 8,
                "recipe": recipe,
                "draft": load_config(golden_case(model)).drafts_with,
            }
            plan = compile(golden_case(model), target=kind, certify=False, **options)
            path = folder / (name if kind == target else f"{name}-cpu")
            print(plan.save(path, overwrite=True), flush=True)
        described.append({"name": name, "weights": model, "logits": "", "draft": True})
    return described


def main() -> None:
    """Emit, build, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="sm_90a", choices=ARCHS)
    parser.add_argument("--store", type=Path, default=Path("build/store"))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--bodies", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kernels", default="", help="those whose names contain one of a,b,...")
    parser.add_argument("--plans", default="", help="those whose names contain this; - for none")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    chosen = tuple(options.kernels.split(","))
    wanted = (each for each in graphs(options.bodies, options.seed) if any(c in each[0] for c in chosen))
    count = kernels(options.folder, options.store, ARCHS[options.target], wanted)
    print(f"{count} kernels in {options.folder}", flush=True)
    described = plans(options.folder, options.target, options.plans) if options.plans != "-" else []
    (options.folder / "plans.json").write_text(json.dumps(described, indent=1))


if __name__ == "__main__":
    main()
