"""Generated kernels on a GPU: python -m tests.gpu.check_rows [PLAN...].

Without a plan: every primitive and the random bodies that `build_rows` compiled, against the reference, which
sums in float64 and rounds once, on adversarial and fresh operands. Codes, indices and copies must be equal,
of other numbers a few ulps are told. With plans: launch by launch against the reference, then recorded runs
within their bounds, or a draft block against the CPU's plan. Needs torch and cuda-bindings, no compiler.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tests.codegen.gated_up
import tests.codegen.products  # noqa: F401, registers its ops
from dsv4c.certify.adversarial import operands_for
from dsv4c.certify.compare import compare
from dsv4c.certify.evaluate import PATTERNS
from dsv4c.certify.finding import (
    APPROXIMATE,
    BIT_EXACT,
    ORDER,
    REASSOCIATION,
    REQUANTIZATION,
    Finding,
)
from dsv4c.ir.graph import Graph
from dsv4c.ir.text import parse_graph
from dsv4c.numerics.codec import Quantized, Value, parts_of, view
from dsv4c.plan.folder import load
from dsv4c.reference.interpret import clone, interpret
from dsv4c.runtime.driver import Launch, Library
from tests.goldens import golden_case, recorded
from tests.gpu.check_layers import Checker
from tests.gpu.kernels import measure, run_once
from tests.gpu.run_plan import Table, check_runs, run_logits

FOLDER = Path("build/gpu/rows")
SMALL = 1e-7  # of a whole result: sums of another order that cancel are many ulps off in a few places
AT = ((0, 5), (126, 4), (383, 2))  # first position and steps: windows wrap, entries of both kinds complete


# Kernels ----------------------------------------------------------------------------------------------------


class Kernel:
    """One compiled kernel and the graph that it computes."""

    def __init__(self, entry: dict[str, Any], folder: Path) -> None:
        self.name: str = entry["name"]
        self.graph: Graph = parse_graph(entry["graph"])
        self.parameters: list[list[str]] = entry["parameters"]
        library = Library((folder / entry["cubin"]).read_bytes(), self.name)
        self.cluster = tuple(entry["cluster"])
        kernel = library.kernel(entry["symbol"], shared=entry["shared"], cluster=self.cluster[0])
        self.shape = (kernel, tuple(entry["grid"]), entry["block"], entry["shared"])
        self._library = library
        self.values: dict[str, Value] = {}
        self.alive: list[dict[str, Value]] = []  # a launch holds addresses, not memory

    def run(self, given: list[Value]) -> list[Value]:
        """Results, on the host; of operands that are written to, what they hold then."""
        run_once(self.launch(given))
        return [on_host(self.values[v.name]) for v in self.graph.outputs.values()]

    def launch(self, given: list[Value]) -> Launch:
        """A launch on these operands, whose memory it keeps; results are poisoned."""
        values = {v.name: on_device(x) for v, x in zip(self.graph.inputs, given, strict=True)}
        for node in self.graph.nodes:
            for i, v in enumerate(node.outputs):
                if i in node.op.alias:
                    values[v.name] = values[node.inputs[node.op.alias[i]].name]
        for v in self.graph.outputs.values():
            if v.name not in values:
                storage = torch.full((v.type.extent,), 0xFF, dtype=torch.uint8, device="cuda")
                values[v.name] = view(storage, v.type)
        self.values = values
        self.alive.append(values)
        addresses = tuple(parts_of(values[name])[part].data_ptr() for name, part in self.parameters)
        return Launch(*self.shape, addresses, self.cluster)


def on_device(value: Value) -> Value:
    return value.map(aligned) if isinstance(value, Quantized) else aligned(value)


def aligned(x: Tensor) -> Tensor:
    return x.contiguous().to("cuda", copy=True)


def on_host(value: Value) -> Value:
    return value.map(lambda x: x.cpu()) if isinstance(value, Quantized) else value.cpu()


def operands(graph: Graph, pattern: str, seed: int) -> list[Value]:
    """Adversarial ones; where places and lengths go together, such that do."""
    given = operands_for(graph, pattern, seed)
    generator = torch.Generator().manual_seed(seed)
    name = graph.nodes[0].op.name if len(graph.nodes) == 1 else ""
    if name in ("positions", "advance"):
        start, slots, _ = given
        assert isinstance(slots, Tensor)
        order = torch.randperm(start.shape[0], generator=generator)[: slots.numel()]
        some = torch.randint(0, 4, slots.shape, generator=generator)
        given = [start, order.to(torch.int32), some.to(torch.int32)]
    elif name in ("last_rows", "owners"):
        assert isinstance(given[-1], Tensor)
        given[-1] = torch.randint(0, 4, given[-1].shape, generator=generator).to(torch.int32)
    elif name in ("penalize", "token_probabilities", "draw"):
        given = sampling(graph, given, generator)
    elif name == "cache_extend":
        assert isinstance(given[2], Tensor)
        tokens = graph.nodes[0].op.tokens  # type: ignore[attr-defined]
        sequences = given[2].numel() // tokens
        first = torch.randint(0, 60, (sequences, 1), generator=generator)
        count = torch.randint(1, tokens + 1, (sequences, 1), generator=generator)
        step = torch.arange(tokens)
        given[2] = torch.where(step < count, first + step, -1).reshape(-1).to(torch.int32)
        slot = torch.arange(sequences)[:, None] % 3
        given[3] = torch.where(step < count, slot, 0).reshape(-1).to(torch.int32)
    return given


def sampling(graph: Graph, given: list[Value], generator: torch.Generator) -> list[Value]:
    """Knobs, positions and probabilities as a session has them: the first slot is greedy."""
    knobs = torch.tensor([[0.0] * 7, [0.7, 20, 0.9, 0.02, 1.3, 0.5, 0.2], [1.1, 0, 0.99, 0, 0.8, 0, -0.3]])
    name, rows = graph.nodes[0].op.name, graph.inputs[0].type.shape[0]
    logits = given[0]
    assert isinstance(logits, Tensor)
    positions = torch.randint(-1, 64, (rows,), generator=generator, dtype=torch.int32)
    if name == "penalize":
        given[2], given[4] = positions, torch.tensor([3, 0, 40], dtype=torch.int32)
    if name == "draw":
        given[0], given[1] = logits.clamp(-20, 20).softmax(-1), positions.clamp(min=9)
        given[3] = torch.tensor([3, 0, 9], dtype=torch.int32)
    else:
        given[-1] = knobs
    return given


def check_kernels(folder: Path, only: str, seeds: int) -> int:
    """How many kernels are wrong."""
    found: dict[str, Counter[str]] = {}
    failures = []
    for entry in json.loads((folder / "cases.json").read_text()):
        if only not in entry["name"]:
            continue
        kernel = Kernel(entry, folder)
        body = kernel.name.startswith(("body", "fused"))
        group = "bodies" if kernel.name.startswith("body") else kernel.name.split(".")[1]
        allowed = REQUANTIZATION if body else REASSOCIATION
        for seed in range(seeds):
            for pattern in PATTERNS:
                given = operands(kernel.graph, pattern, seed)
                copies = {v.name: clone(x) for v, x in zip(kernel.graph.inputs, given, strict=True)}
                expected = list(interpret(kernel.graph, copies, {}, {}).values())
                try:
                    made = kernel.run(given)
                except Exception as error:  # the device is of no use any more: say whose doing it was
                    raise RuntimeError(f"{kernel.name}, {pattern}: {error}") from error
                finding = compare(expected, made, pattern)
                if finding.kind == APPROXIMATE and finding.worst <= SMALL:
                    finding = Finding(REASSOCIATION, finding.worst, finding.reason)
                found.setdefault(group, Counter())[finding.kind] += 1
                if ORDER.index(finding.kind) > ORDER.index(allowed):
                    failures.append(f"{kernel.name}, seed {seed}: {finding.kind}: {finding.reason}")
    for group, kinds in found.items():
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        print(f"{group:24} {told}")
    for failure in failures[:60]:
        print(f"  FAILS {failure}")
    exact = sum(kinds[BIT_EXACT] for kinds in found.values())
    print(f"{sum(map(Counter.total, found.values()))} runs, {exact} bit-exact, {len(failures)} wrong")
    return len(failures)


def time_kernels(folder: Path, only: str) -> None:
    """Microseconds of a launch behind others of its kind, each on operands of its own."""
    for entry in json.loads((folder / "cases.json").read_text()):
        if entry["name"].startswith("fused") and only in entry["name"]:
            kernel = Kernel(entry, folder)
            chain = [kernel.launch(operands(kernel.graph, "random", seed)) for seed in range(64)]
            print(f"{kernel.name:50} {measure(chain, programmatic=True) / len(chain):6.2f} us")


# Plans ------------------------------------------------------------------------------------------------------


def check_plan(folder: Path, entry: dict[str, Any]) -> int:
    """How many results are beyond their limits."""
    path = folder / entry["name"]
    weights = golden_case(entry["weights"]) if entry["weights"] else None
    wrong = check_launches(path, weights)
    if entry["logits"]:
        wrong += check_recorded(path, entry)
    if entry.get("draft"):
        wrong += check_draft(path, golden_case(entry["weights"]))
    return wrong


def check_launches(path: Path, weights: Path | None) -> int:
    """Every launch against the reference, from what the device had before it."""
    torch.manual_seed(1)
    with torch.inference_mode(), torch.device("cuda"):
        checker = Checker(load(path), weights)
        vocabulary = int(checker.executor.plan.config["vocab_size"])
        batch = checker.bound.program.shape.sequences
        for first, steps in AT:
            checker.start(first)
            for step in range(first, first + steps):
                checker.prepare(torch.randint(0, vocabulary, (batch,)).tolist(), step - first)
                checker.step(step)
    beyond = [
        f"  FAILS {name}: {seen.error:.3g} > {seen.limit:.3g}, {seen.differing} differ, at {seen.where}"
        for name, seen in checker.worst.items()
        if not seen.error <= seen.limit or seen.differing
    ]
    worst = max((seen.error for seen in checker.worst.values()), default=0.0)
    print(f"{path.name}: {len(checker.bound.launches)} launches, worst {worst:.3g}, {len(beyond)} beyond")
    print("\n".join(beyond))
    return len(beyond)


def check_recorded(path: Path, entry: dict[str, Any]) -> int:
    """Recorded runs within their bounds."""
    case = recorded(entry["weights"])
    with torch.inference_mode():
        session = load(path).bind(case.folder)
        table = Table()
        if "any" in case.tolerance.get("logits", {}):
            check_runs(session, case, table, entry["logits"])
        else:  # nothing is rounded on the way
            bound = case.tolerance["logits_rel_l2_per_position"]
            for name in ("main", "short"):
                rows = case.distances(f"{name}.logits", run_logits(session, case.run(name)))
                table.add(f"{name}.logits", float(rows.max()), bound)
    return len(table.failures)


def check_draft(path: Path, weights: Path) -> int:
    """Drafts behind a random prompt, on the device and on the CPU."""
    rows = []
    generator = torch.Generator().manual_seed(3)
    vocabulary = int(load(path).config["vocab_size"])
    tokens = torch.randint(0, vocabulary, (14,), generator=generator).tolist()
    for plan in (path, path.with_name(f"{path.name}-cpu")):
        session = load(plan).bind(weights)
        session.prefill(tokens[:-1])
        rows.append(session.draft({0: tokens[-1]})[0].logits.cpu().double())
    far = float(((rows[0] - rows[1]).norm(dim=1) / rows[1].norm(dim=1)).max())
    print(f"{path.name}: draft logits differ by {far:.3g} from the CPU's, allowed 1e-5")
    return int(not far <= 1e-5)


def main() -> int:
    """Check what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plans", nargs="*", help="names of plans; all for every one; none for the kernels")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--only", default="", help="kernels whose names contain this")
    parser.add_argument("--time", action="store_true", help="time fused ops, nobody else on the GPU")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.zeros(1, device="cuda")
    print(torch.cuda.get_device_name(), flush=True)
    if options.time:
        time_kernels(options.folder, options.only)
        return 0
    if not options.plans:
        return int(check_kernels(options.folder, options.only, options.seeds) > 0)
    described = json.loads((options.folder / "plans.json").read_text())
    chosen = [e for e in described if e["name"] in options.plans or options.plans == ["all"]]
    wrong = sum(check_plan(options.folder, entry) for entry in chosen)
    print(f"{len(chosen)} plans, {wrong} results beyond their limits")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
