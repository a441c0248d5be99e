"""Any op that no tuned family takes: its body, or what it means by itself, as a generated kernel.

A body whose rows do not need each other is one kernel, a CTA per row. A primitive has one for all rows, over
as many CTAs as it has work for, or a CTA per row where its threads must wait for each other. Asked last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Emission, Parameter, compose
from dsv4c.codegen.kernels.row_program import (
    MEANINGS,
    NUMBERS,
    Copy,
    Program,
    UnfitError,
    nodes_of,
    place_lines,
    program_of,
    step_lines,
)
from dsv4c.codegen.registry import Answer, No, Request, kernel, launchable
from dsv4c.ir.fused import Fused, trace
from dsv4c.ir.graph import Builder, Graph, Value
from dsv4c.ir.op import Op, elements, operand_names
from dsv4c.ir.ops.attention import AttentionScores, SinkSoftmax
from dsv4c.ir.ops.index import IndexScores, TopK
from dsv4c.ir.ops.linear import ExpertLinear, GroupedLinear, Linear
from dsv4c.ir.ops.math import Sum
from dsv4c.ir.ops.norm import Normalize, RmsNorm, RsqrtMeanSquare, Softmax
from dsv4c.ir.ops.quant import Quantize
from dsv4c.ir.ops.sample import Argmax, Draw, Penalize, TokenProbabilities
from dsv4c.ir.text import print_op
from dsv4c.passes.expand import expand
from dsv4c.types import GlobalScale, QuantFormat, Type

THREADS = 512
WAVES = 2  # CTAs per SM at most of what is spread over the grid
MOST_ELEMENTS = (1 << 31) - 1
SMALL_WEIGHT = 128 * 1024  # bytes that one CTA may read of a matrix
TOGETHER = (
    *(Argmax, Draw, Penalize, TokenProbabilities, TopK),
    *(Normalize, RmsNorm, RsqrtMeanSquare, SinkSoftmax, Softmax, Sum),
)
"""Primitives whose rows are worth a CTA each: its threads reduce together."""
BY_WARP = (AttentionScores, ExpertLinear, GroupedLinear, IndexScores, Linear)
"""Primitives that take a warp for each element of their results."""


@kernel()
def row_program(request: Request) -> Answer:
    if len(request.calls) != 1:
        return No(f"takes one op per launch, not {len(request.calls)}")
    call = request.call
    if call.op.collective:
        return No("a row program knows no other rank")
    graph = primitives(call.op, tuple(request.types[i] for i in call.inputs))
    built = kernel_of(graph, isinstance(call.op, Fused), call.op.name, print_op(call.op), request.arch)
    if isinstance(built, No):
        return built
    numbers = dict(zip((*graph.inputs, *graph.outputs.values()), (*call.inputs, *call.outputs), strict=True))
    operands = {operand: numbers[value] for operand, value in built.operands.items()}
    return [launchable(request, built.emission, operands)]


@dataclass(frozen=True)
class Built:
    """A kernel, and the value of its graph that each operand is."""

    emission: Emission
    operands: Mapping[str, Value]


def kernel_of(graph: Graph, body: bool, name: str, what: str, arch: Arch) -> Built | No:
    """The kernel of a graph of primitives: of a body, a CTA per row, or else of its only node."""
    for node in graph.nodes:
        if isinstance(node.op, Quantize) and not _row_wise(node.op.format):
            return No(f"quantizes rows one by one, which {node.op.format} does not allow")
    one_by_one = {n.weight for n in graph.nodes if isinstance(n.op, ExpertLinear | GroupedLinear)}
    for value in graph.values():
        shape = value.type.shape[-2:] if value in one_by_one else value.type.shape
        if math.prod(shape) > MOST_ELEMENTS:
            return No(f"numbers elements in 32 bits, {value.type} has more than {MOST_ELEMENTS}")
    if body:
        program = _of_body(graph, arch)
        return program if isinstance(program, No) else _emit(name, what, program, graph, 1)
    return _emit(name, what, *_of_primitive(graph, arch))


def _row_wise(format: QuantFormat) -> bool:
    return format.block[0] == 1 and format.global_scale is not GlobalScale.TENSOR


def primitives(op: Op, types: tuple[Type, ...]) -> Graph:
    """An op on operands of these types, spelled out; its results in order, those that it keeps."""
    if isinstance(op, Fused):
        body = trace(op, types)
        kept = {str(i): v for i, v in enumerate(op.kept(body.results))}
        return expand(Graph(op.name, body.graph.inputs, (), (), body.graph.nodes, kept))
    builder = Builder(op.name)
    kind: Any = type(op)
    names = operand_names(kind)
    labels = [names[i] if i < len(names) else f"{names[-1]}_{i}" for i in range(len(types))]
    values = [builder.input(name, type_) for name, type_ in zip(labels, types, strict=True)]
    results = builder.emit(op, tuple(values))
    return builder.finish({str(i): v for i, v in enumerate(results)})


def _of_body(graph: Graph, arch: Arch) -> Program | No:
    """A body as one program, or why not."""
    for node in graph.nodes:
        if node.op.alias:
            return No(f"{node.op.name} writes state, where rows may meet")
        weight = node.weight
        if node.op.product and (weight is None or weight.type.nbytes > SMALL_WEIGHT):
            size = 0 if weight is None else weight.type.nbytes
            return No(f"{node.op.name} reads {size} bytes of weights, too many for one CTA a row")
    results = tuple(graph.outputs.values())
    rows = math.gcd(*(v.type.shape[0] if v.type.shape else 1 for v in results))
    try:
        program = program_of(graph, rows)
        if program.by_row.isdisjoint(results):  # every row would make all of them
            program = program_of(graph, 1)
        elif not program.by_row.issuperset(results):
            return No("some results have rows, others are one for all rows")
    except UnfitError as error:
        return No(str(error))
    if program.shared > arch.shared_per_cta:
        return No(f"a row needs {program.shared} bytes of shared memory, a CTA has {arch.shared_per_cta}")
    return program


def _of_primitive(graph: Graph, arch: Arch) -> tuple[Program, Graph, int]:
    """A primitive as a program, and over how many CTAs it is spread."""
    (node,) = graph.nodes
    types = tuple(v.type for v in node.inputs)
    scaled = isinstance(node.op, Quantize) and node.op.format.global_scale is not GlobalScale.NONE
    if scaled or isinstance(node.op, TOGETHER):
        apart = node.op.rows_of(types)
        return program_of(graph, types[min(apart)].shape[0] if apart else 1), graph, 1
    made = [v for i, v in enumerate(node.outputs) if i not in node.op.alias] or node.inputs[1:]
    work = max(elements(v.type) for v in made) * (32 if isinstance(node.op, BY_WARP) else 1)
    return program_of(graph, 1), graph, max(2, min(WAVES * arch.sms, -(-work // THREADS)))


def _emit(name: str, what: str, program: Program, graph: Graph, ctas: int) -> Built:
    operands = _operands(program, graph)
    outside = [h for h in (*program.homes.values(), *program.given.values()) if h.offset < 0]
    components = [(home.name, c) for home in outside for c in home.type.components]
    parameters = tuple(Parameter(operand, c.name) for operand, c in components)
    numbers = {p.name: NUMBERS.get(c.dtype) for p, (_, c) in zip(parameters, components, strict=True)}
    steps: list[str] = []
    for step in program.steps:
        steps += step_lines(program, step)
        if step is not program.steps[-1] and not isinstance(step, Copy):  # nobody reads what that writes
            steps.append("cute.arch.sync_threads()")
    code = [*place_lines(program), "ptx.wait()", *steps]
    threads, rows, shared = THREADS if ctas > 1 else _threads(program), program.rows, program.shared
    number = "row" if rows > 1 else "block" if ctas > 1 else ""
    if ctas > 1:
        launch = f"Launch: {ctas} CTAs of {threads} threads."
        team = [f"team = values.Team(block * THREADS + thread, {ctas} * THREADS)"]
    else:
        launch = f"Launch: a CTA of {threads} threads for each of {rows} rows; {shared} B shared each."
        team = [f"shared = ptx.shared({shared})", "team = values.Team(thread, THREADS, shared)"]
    emission = compose(
        name,
        "\n".join([what, "", *(f"    {line}" for line in _signature(operands, graph))]),
        dict.fromkeys(parameters, ""),
        launch,
        [
            "ptx.launch_dependents()",
            "thread, _, _ = cute.arch.thread_idx()",
            *([f"{number}, _, _ = cute.arch.block_idx()"] if number else []),
            *team,
            *code,
        ],
        threads=threads,
        grid=(rows * ctas, 1, 1),
        record=None,
        elements={pointer: number for pointer, number in numbers.items() if number},
        meanings=sorted({m for m in MEANINGS if f"{m}." in "\n".join(code)} | {"values"}),
    )
    return Built(emission, operands)


def _operands(program: Program, graph: Graph) -> dict[str, Value]:
    """The values of operands: those that lie outside, or the results that are reshapes of them."""
    known = {*graph.inputs, *graph.outputs.values()}
    shaped = {program.views[v].base: v for v in graph.outputs.values() if v in program.views}
    homes = [(v, h) for v, h in (*program.homes.items(), *program.given.items()) if h.offset < 0]
    return {home.name: v if v in known else shaped[v] for v, home in homes}


def _threads(program: Program) -> int:
    """As many as a row keeps busy with eight elements each; a warp for each element of a product."""
    ops = [node.op for step in program.steps for node in nodes_of(step)]
    if any(isinstance(op, BY_WARP) for op in ops):
        return THREADS
    return min(THREADS, max(64, -(-program.widest // 256) * 32))


def _signature(operands: Mapping[str, Value], graph: Graph) -> Iterator[str]:
    for name, value in operands.items():
        yield f"{'' if value in graph.inputs else '-> '}{name}: {value.type}"
