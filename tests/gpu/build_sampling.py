"""Cross-compile what `check_sampling.py` runs: python -m tests.gpu.build_sampling [--layers 6].

Writes to build/gpu/sampling: the kernels that choose a token, for the recorded cases and for many draws, with
cases.json; a tiny plan that samples, and its like for the CPU; one of Flash's first layers in full width.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.plans import first_layers
from dsv4c.arch import ARCHS
from dsv4c.codegen.build import Source, build
from dsv4c.codegen.kernels import KERNELS
from dsv4c.codegen.registry import choose, request_of
from dsv4c.compiler.compile import compile
from dsv4c.config import save_config
from dsv4c.ir.op import Op
from dsv4c.ir.ops.sample import Draw, Penalize, TokenProbabilities
from dsv4c.ir.text import print_graph
from dsv4c.passes.fusions.sampler import Sampler
from tests.codegen.primitives import graph_of
from tests.gpu.check_sampling import DRAWS, FOLDER

SAMPLER = (
    "f32[N,{v}]",
    *["i32[N]"] * 4,
    "i32[{s},{c}]",
    "i32[{s}]",
    "f32[{s},7]",
    "i32[{s},2]",
    "i32[{s},8]",
)
CASES: dict[str, tuple[Op, tuple[str, ...], int]] = {
    "penalize": (Penalize(), ("f32[N,1000]", "i32[N,256]", "i32[N]", "i32[N]", "i32[N]", "f32[N,7]"), 4),
    "token_probabilities": (TokenProbabilities(), ("f32[N,1000]", "i32[N]", "f32[N,7]"), 4),
    "draw": (Draw(), ("f32[N,7]", "i32[N]", "i32[N]", "i32[1]", "i32[1,2]"), DRAWS),
    **{
        f"sampler-{vocabulary}x{rows}": (
            Sampler(),
            tuple(text.format(v=vocabulary, s=slots, c=capacity) for text in SAMPLER),
            rows,
        )
        for vocabulary, rows, slots, capacity in (
            (8, DRAWS, 1, 512),
            (1000, 4, 4, 509),
            (129280, 1, 2, 131072),
            (129280, 8, 16, 512),
        )
    },
}


def kernels(folder: Path, store: Path, target: str) -> None:
    made = []
    for name, (op, types, rows) in CASES.items():
        graph = graph_of(op, types, rows)
        request, values = request_of(graph.nodes, ARCHS[target], {}, {})
        (launch,) = choose(request, KERNELS)
        made.append((name, graph, launch, values))
    sources = [Source(launch.emission.symbol, launch.emission.source) for _, _, launch, _ in made]
    described = []
    for (name, graph, launch, values), kernel in zip(made, build(sources, target, store), strict=True):
        emission = launch.emission
        (folder / f"{name}.cubin").write_bytes(kernel.cubin)
        described.append(
            {
                "name": name,
                "graph": print_graph(graph),
                "cubin": f"{name}.cubin",
                "symbol": emission.symbol,
                "grid": emission.grid,
                "block": emission.block,
                "shared": emission.shared,
                "cluster": emission.cluster,
                "parameters": [[values[b.value].name, b.component] for b in launch.bindings],
            }
        )
    (folder / "cases.json").write_text(json.dumps(described))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="sm_90a", choices=ARCHS)
    parser.add_argument("--store", type=Path, default=Path("build/store"))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--layers", type=int, default=6, help="of Flash; 0 for no such plan")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    kernels(options.folder, options.store, options.target)
    # In fp32, where both targets' logits agree: in other recipes roundings decide which token a seed draws.
    tiny = {
        "recipe": "fp32",
        "batch": (1, 4),
        "verify": 1,
        "max_context": 256,
        "chunk": 8,
        "sampled": True,
        "certify": False,
    }
    for target in (options.target, "cpu"):
        print(
            compile("tiny", target=target, **tiny).save(
                options.folder / f"tiny-{target}.plan", overwrite=True
            )
        )
    if options.layers:
        config = first_layers("deepseek-v4-flash", options.layers)
        save_config(config, options.folder)
        plan = compile(
            config, target=options.target, batch=1, verify=1, max_context=8448, sampled=True, certify=False
        )
        print(plan.save(options.folder / "flash.plan", overwrite=True))


if __name__ == "__main__":
    main()
