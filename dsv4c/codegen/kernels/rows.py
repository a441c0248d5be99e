"""Any op that no tuned family takes: its body, or what it means by itself, as a generated kernel.

A body whose rows do not need each other is one kernel, a CTA per row. A primitive has one for all rows, over
as many CTAs as it has work for, or a CTA per row where its threads must wait for each other. Asked last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Emission, Parameter, render
from dsv4c.codegen.registry import Answer, No, Request, kernel, launchable
from dsv4c.codegen.row_program import (
    ELEMENTWISE,
    MEANINGS,
    NUMBERS,
    Program,
    Unfit,
    place_lines,
    program_of,
    step_lines,
)
from dsv4c.ir.fused import Fused, trace
from dsv4c.ir.graph import Builder, Graph, Value
from dsv4c.ir.op import Op, elements, operand_names
from dsv4c.ir.ops.attention import AttentionScores, SinkSoftmax
from dsv4c.ir.ops.index import IndexScores, TopK
from dsv4c.ir.ops.linear import ExpertLinear, GroupedLinear, Linear
from dsv4c.ir.ops.math import Sum
from dsv4c.ir.ops.norm import Normalize, RmsNorm, RsqrtMeanSquare, Softmax
from dsv4c.ir.ops.quant import Quantize
from dsv4c.ir.ops.sample import Argmax
from dsv4c.passes.expand import expand
from dsv4c.types import DType, GlobalScale, Type

THREADS = 512
WAVES = 2  # CTAs per SM at most of what is spread over the grid
SMALL_WEIGHT = 256 * 1024  # bytes that one CTA may read of a matrix
TOGETHER = (Argmax, Normalize, RmsNorm, RsqrtMeanSquare, SinkSoftmax, Softmax, Sum, TopK)
"""Primitives whose rows are worth a CTA each: its threads reduce together."""
BY_WARP = (AttentionScores, ExpertLinear, GroupedLinear, IndexScores, Linear)
"""Primitives that take a warp for each element of their results."""


@kernel()
def row_program(request: Request) -> Answer:
    if len(request.calls) != 1:
        return No("takes one op per launch")
    call = request.call
    types = tuple(request.types[i] for i in call.inputs)
    graph = primitives(call.op, types)
    if isinstance(call.op, Fused):
        found = _of_body(graph, request.arch)
        if isinstance(found, No):
            return found
        program, ctas = found, 1
    else:
        program, ctas = _of_primitive(graph, request.arch)
    name = request.call.op.name
    emission, bound = emit(name, request.text, program, graph, ctas)
    numbers = {v: n for v, n in zip(graph.inputs, call.inputs, strict=True)}
    numbers |= {v: n for v, n in zip(graph.outputs.values(), call.outputs, strict=True)}
    return [launchable(request, emission, {operand: numbers[v] for operand, v in bound.items()})]


@cache
def primitives(op: Op, types: tuple[Type, ...]) -> Graph:
    """An op on operands of these types, spelled out; its results in order, those that it keeps."""
    if isinstance(op, Fused):
        body = trace(op, types)
        kept = {str(i): v for i, v in enumerate(op.kept(body.results))}
        return expand(Graph(op.name, body.graph.inputs, (), (), body.graph.nodes, kept))
    builder = Builder(op.name)
    names = operand_names(type(op))
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
    shapes = [v.type.shape for v in graph.outputs.values()]
    rows = math.gcd(*(shape[0] if shape else 1 for shape in shapes))
    try:
        program = program_of(graph, rows)
    except Unfit as error:
        return No(str(error))
    if program.shared > arch.shared_per_cta:
        return No(f"a row needs {program.shared} bytes of shared memory, a CTA has {arch.shared_per_cta}")
    return program


def _of_primitive(graph: Graph, arch: Arch) -> tuple[Program, int]:
    """A primitive as a program, and over how many CTAs it is spread."""
    (node,) = graph.nodes
    types = tuple(v.type for v in node.inputs)
    scaled = isinstance(node.op, Quantize) and node.op.format.global_scale is not GlobalScale.NONE
    if scaled or isinstance(node.op, TOGETHER):
        apart = node.op.rows_of(types)
        rows = types[min(apart)].shape[0] if apart else 1
        return program_of(graph, rows), 1
    work = max(elements(v.type) for v in node.outputs) * (32 if isinstance(node.op, BY_WARP) else 1)
    return program_of(graph, 1), max(2, min(WAVES * arch.sms, -(-work // THREADS)))


def emit(
    name: str, what: str, program: Program, graph: Graph, ctas: int
) -> tuple[Emission, dict[str, Value]]:
    """The kernel of a program, and the value that each of its operands is."""
    homes = {v: h for v, h in program.homes.items() if h.offset < 0}
    results = {h.name: v for v, h in homes.items()}
    named = {v: results_name for results_name, v in results.items()}
    outputs = list(graph.outputs.values())
    bound = {}
    for value, home in homes.items():
        owner = value
        if value not in graph.inputs and value not in outputs:  # it is what a result reshapes
            owner = next(o for o in outputs if o in program.views and program.views[o].base is value)
        bound[home.name] = owner
    parameters = tuple(
        Parameter(home.name, component.name) for home in homes.values() for component in home.type.components
    )
    dtypes = [c.dtype for home in homes.values() for c in home.type.components]
    elements_ = {p.name: NUMBERS[d] for p, d in zip(parameters, dtypes, strict=True) if d in NUMBERS}
    places, steps = place_lines(program), [step_lines(program, step) for step in program.steps]
    text = "\n".join((*places, *(line for step in steps for line in step)))
    threads = THREADS if ctas > 1 else _threads(program)
    source = render(
        "row_program.py.jinja",
        name=name,
        what=what,
        signature=list(_signature(program, graph, bound)),
        launch=_launch(program, ctas, threads),
        numbers=sorted({"Int32", "Int64", "Uint8"} | {n for n in NUMBERS.values()}),
        modules=[m for m in MEANINGS if f"{m}." in text or m == "values"],
        threads=threads,
        elements=elements_,
        pointers=[p.name for p in parameters],
        rows=program.rows,
        ctas=ctas,
        shared=program.shared,
        places=places,
        steps=steps,
    )
    shared = program.shared if ctas == 1 else 0
    grid = (program.rows * ctas, 1, 1)
    del named
    return Emission(f"{name}_0", source, grid, threads, shared, parameters), bound


def _threads(program: Program) -> int:
    """As many as a row keeps busy with eight elements each."""
    products = any(not isinstance(s, ELEMENTWISE) and getattr(s, "op", None) in BY_WARP for s in program.steps)
    return THREADS if products else min(THREADS, max(64, -(-program.widest // 256) * 32))


def _signature(program: Program, graph: Graph, bound: dict[str, Value]) -> Iterator[str]:
    for name, value in bound.items():
        arrow = "" if value in graph.inputs else "-> "
        yield f"{arrow}{name}: {value.type}"


def _launch(program: Program, ctas: int, threads: int) -> str:
    if ctas > 1:
        return f"{ctas} CTAs of {threads} threads."
    return f"a CTA of {threads} threads for each of {program.rows} rows; {program.shared} B shared each."


__all__ = ["DType", "row_program"]
