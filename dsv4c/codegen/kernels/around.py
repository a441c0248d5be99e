"""Fused ops that hold products with large matrices: a GEMV or GEMM, and row programs around it.

A body is cut in three: what rows come from, the products, what becomes of their results. What a GEMV does to
rows on their way in, quantization and RMSNorm, it does here, too; and what follows a product element by
element it does before it stores, as a GEMM does. All else is a launch before or behind, by way of scratch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from dsv4c.codegen.emit import Parameter
from dsv4c.codegen.kernels.formats import WEIGHTS, format_name, holds
from dsv4c.codegen.kernels.gemm import FEWEST_ROWS
from dsv4c.codegen.kernels.gemv import Activations, Epilogue
from dsv4c.codegen.kernels.linear import product, staging
from dsv4c.codegen.kernels.quantize import scratch_for
from dsv4c.codegen.kernels.row_program import (
    NUMBERS,
    Loop,
    UnfitError,
    element_lines,
    live,
    names_of,
    place_lines,
    program_of,
)
from dsv4c.codegen.kernels.rows import SMALL_WEIGHT, kernel_of, primitives
from dsv4c.codegen.registry import Answer, Call, Launchable, No, Request, kernel, launchable
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Builder, Graph, Node, Value
from dsv4c.ir.ops.linear import Linear
from dsv4c.ir.ops.norm import RmsNorm
from dsv4c.ir.ops.quant import Quantize
from dsv4c.ir.text import print_op
from dsv4c.types import BF16, F32, FP8_ROW, QuantFormat, QuantType


@kernel()
def around_products(request: Request) -> Answer:
    if len(request.calls) != 1 or not isinstance(request.call.op, Fused):
        return No("takes a fused op, one per launch")
    graph = primitives(request.call.op, tuple(request.types[i] for i in request.call.inputs))
    return _Launches(request, graph, body_of(graph)).all()


@dataclass(frozen=True)
class Body:
    """`products` of rows with matrices, the nodes `before` that their rows come from, all others `behind`."""

    before: tuple[Node, ...]
    products: tuple[Node, ...]
    behind: tuple[Node, ...]

    @property
    def rows(self) -> tuple[Value, ...]:
        """What the products take, each once."""
        return tuple(dict.fromkeys(node.inputs[0] for node in self.products))


def body_of(graph: Graph) -> Body:
    """How a graph of primitives is cut. Raises UnfitError for one that holds no such products."""
    nodes = live(graph.nodes, graph.outputs.values())
    products = tuple(n for n in nodes if isinstance(n.op, Linear) and n.inputs[1].type.nbytes > SMALL_WEIGHT)
    if not products:
        raise UnfitError("holds no product of rows that is too large for a row program")
    if any(node.op.alias or node.op.collective for node in nodes):
        raise UnfitError("writes no state and knows no other rank")
    if any(n.inputs[1] not in graph.inputs or len(n.inputs[0].type.shape) != 2 for n in products):
        raise UnfitError("multiplies rows [N,K] with matrices that are operands")
    if len({node.inputs[1] for node in products}) < len(products):
        raise UnfitError("multiplies with each matrix once")
    before = live(nodes, [node.inputs[0] for node in products])
    if not set(products).isdisjoint(before):
        raise UnfitError("a product takes what comes of another one")
    behind = (n for n in nodes if n not in before and n not in products)
    return Body(tuple(before), products, tuple(behind))


def part_of(name: str, nodes: Sequence[Node], results: Sequence[Value]) -> tuple[Graph, dict[Value, Value]]:
    """What makes these results of what other nodes make, as a graph; its values, as the nodes have them."""
    needed = live(nodes, results)
    made = {v for node in needed for v in node.outputs}
    read = dict.fromkeys(v for v in (*(v for node in needed for v in node.inputs), *results) if v not in made)
    builder = Builder(name)
    new = {v: builder.input(v.name, v.type) for v in read}
    for node in needed:
        builder.copy(node, new)
    graph = builder.finish({str(i): new[v] for i, v in enumerate(results)})
    return graph, {n: v for v, n in new.items()}


class _Launches:
    """The launches of a body. What is neither operand nor result of the op is numbered behind the request's
    values, until it is bound to scratch.
    """

    def __init__(self, request: Request, graph: Graph, body: Body) -> None:
        self.body, self.given, self.results = body, graph.inputs, tuple(graph.outputs.values())
        call = request.call
        self.numbers = dict(zip(graph.inputs, call.inputs, strict=True))
        self.numbers |= dict(zip(self.results, call.outputs, strict=True))
        nodes = (*body.before, *body.products, *body.behind)
        inner = [v for node in nodes for v in node.outputs if v not in self.numbers]
        self.inner = {len(request.types) + i: v for i, v in enumerate(inner)}
        self.numbers |= {v: number for number, v in self.inner.items()}
        self.names = names_of(self.numbers, taken=("lengths", *(("x",) if self._many(body) else ())))
        self.request = replace(
            request,
            types=(*request.types, *(v.type for v in inner)),
            labels=(*request.labels, *("" for _ in inner)),
            readers=(*request.readers, *(0 for _ in inner)),
        )
        labels = list(self.request.labels)
        for node in body.products:
            w = node.inputs[1]
            if not self._packable(w):
                raise UnfitError(
                    f"multiplies with weights that it has packed, {w.name} lies as its type says"
                )
            labels[self.numbers[w]] = self.names[w]
            self.names[node.outputs[0]] = f"{self.names[w]}_out"
        self.request = replace(self.request, labels=tuple(labels))

    @staticmethod
    def _many(body: Body) -> bool:
        """Are there as many rows as a GEMM takes? It calls them x."""
        return body.products[0].inputs[0].type.shape[0] >= FEWEST_ROWS

    def all(self) -> list[Launchable]:
        """In order. Raises BuildError where a part has no kernel."""
        body = self.body
        made = [v for node in body.before for v in node.outputs]
        wanted = {*self.results, *(v for node in body.behind for v in node.inputs)}
        staged = self._staged_inside() if wanted.isdisjoint(made) else None
        launches: list[Launchable] = []
        if staged is None:
            if given := [v for v in made if v in wanted or v in body.rows]:
                launches += self._program("before", body.before, given)
            staged = [self._staged(*node.inputs) for node in body.products]
        last = [v for node in body.behind for v in node.outputs if v in self.results]
        epilogues = self._epilogues(last, {x.gain for x in staged if x.gain})
        launches += self._products(staged, epilogues or {}, alone=not launches and epilogues is not None)
        if epilogues is None:
            launches += self._program("behind", body.behind, last)
        return [self._bound(launch) for launch in launches]

    def _packable(self, value: Value) -> bool:
        """Whether an operand is a weight that may lie in memory in another form than its type says."""
        number = self.numbers[value]
        return bool(self.request.labels[number]) and number not in self.request.plain

    def _asked(self, inputs: Iterable[Value], outputs: Iterable[Value]) -> Request:
        """The request of a launch that reads and writes these."""
        read, made = (tuple(self.numbers[v] for v in values) for values in (inputs, outputs))
        names = tuple(map(str, read))
        return replace(
            self.request, calls=(Call(self.request.call.op, read, made, names, tuple(range(len(made)))),)
        )

    def _program(self, stage: str, nodes: Sequence[Node], results: Sequence[Value]) -> list[Launchable]:
        """A row program."""
        op, arch = self.request.call.op, self.request.arch
        graph, own = part_of(stage, nodes, results)
        built = kernel_of(graph, True, f"{op.name}_{stage}", f"{print_op(op)}, {stage} its products", arch)
        if isinstance(built, No):
            raise UnfitError(f"{stage} its products: {built.reason}")
        values = {name: self.numbers[own[v]] for name, v in built.operands.items()}
        asked = self._asked((own[v] for v in graph.inputs), results)
        return [launchable(asked, built.emission, values, stage=stage)]

    def _bound(self, launch: Launchable) -> Launchable:
        """The launch with scratch for what is neither operand nor result of the op."""
        scratch, bindings = dict(launch.scratch), []
        for binding in launch.bindings:
            value = None if binding.value is None else self.inner.get(binding.value)
            if value is not None:
                name = self.names[value]
                arrays = scratch_for(name, value.type, binding.access)
                array = arrays[name if binding.component == "data" else f"{name}_{binding.component}"]
                scratch[array.name] = array.nbytes
                binding = replace(binding, access=array.access, value=None, scratch=array.name)
            bindings.append(binding)
        return replace(launch, bindings=tuple(bindings), scratch=scratch)

    # Products -----------------------------------------------------------------------------------------------

    def _products(
        self, staged: Sequence[Activations], epilogues: Mapping[Value, Epilogue], alone: bool
    ) -> Sequence[Launchable]:
        """All products in a launch, or in GEMMs."""
        products = self.body.products
        shapes = {x.type.shape for x in self.body.rows}
        if len(shapes) > 1:
            raise UnfitError(f"multiplies rows of one shape, not {' and '.join(map(str, sorted(shapes)))}")
        named = {name: v for v, name in self.names.items()}
        used = [p.operand for e in epilogues.values() for p in e.parameters]
        used += [name for x in staged for name in (x.name, x.gain) if name]
        made = [*(node.outputs[0] for node in products), *(v for v in self.results if self.names[v] in used)]
        read = [named[name] for name in used if named[name] not in made]
        asked = self._asked([*read, *(node.inputs[1] for node in products)], dict.fromkeys(made))
        answer = product(
            asked,
            self.request.call.op.name,
            [
                (x, self.numbers[node.inputs[1]], self.numbers[node.outputs[0]])
                for x, node in zip(staged, products, strict=True)
            ],
            {name: self.numbers[named[name]] for name in used},
            products[0].inputs[1].type.shape[1],
            stage="" if alone else "product",
            epilogues={self.numbers[y]: epilogue for y, epilogue in epilogues.items()},
        )
        if isinstance(answer, No):
            raise UnfitError(answer.reason)
        return answer

    def _staged(self, x: Value, w: Value) -> Activations:
        """Rows as they lie in memory."""
        answer = staging(self.request, self.names[x], self.numbers[x], self.numbers[w], None)
        if isinstance(answer, No):
            raise UnfitError(answer.reason)
        return answer

    def _staged_inside(self) -> list[Activations] | None:
        """How the products' launch makes all rows of operands; None where it does not."""
        staged: list[Activations] = []
        done: set[Node] = set()
        for node in self.body.products:
            (x, w), format = node.inputs, None
            maker = x.node
            if maker is not None and isinstance(maker.op, Quantize) and len(maker.inputs) == 1:
                done.add(maker)
                x, format = maker.inputs[0], maker.op.format
                maker = x.node
            if maker is not None and isinstance(maker.op, RmsNorm):
                done.add(maker)
                how = self._normalized(maker, w, format)
            elif x in self.given:
                how = staging(self.request, self.names[x], self.numbers[x], self.numbers[w], format)
            else:
                return None
            if isinstance(how, No):
                return None
            staged.append(how)
        return staged if done == set(self.body.before) else None

    def _normalized(self, norm: Node, w: Value, format: QuantFormat | None) -> Activations | No:
        """Rows under a norm that a GEMV computes."""
        assert isinstance(norm.op, RmsNorm)
        plain = format_name(w.type, WEIGHTS) == "bf16"
        if len(norm.inputs) != 2 or norm.op.precision is not F32 or format != (None if plain else FP8_ROW):
            return No("norms with a gain, in f32, quantizes for quantized weights")
        x, gain = norm.inputs
        if x not in self.given or gain not in self.given or not self._packable(gain):
            return No("norms operands, under a weight that it may have as f32")
        if not holds(x.type, BF16) or not holds(gain.type, BF16) or x.type.shape[-1] % 128:
            return No("norms rows of bf16 in blocks of 128")
        kind = "bf16" if plain else "e4m3"
        return Activations(self.names[x], kind, "normalize", gain=self.names[gain], eps=norm.op.eps)

    # Epilogues ----------------------------------------------------------------------------------------------

    def _epilogues(self, last: Sequence[Value], gains: Set[str]) -> dict[Value, Epilogue] | None:
        """What is made of each product by itself, element by element, of operands that lie in memory as their
        types say, unlike weights and `gains` of products; None where more is made of them.
        """
        products = [node.outputs[0] for node in self.body.products]
        sources = {y: frozenset({y}) for y in products}
        for node in self.body.behind:
            come = frozenset().union(*(sources.get(v, frozenset()) for v in node.inputs))
            sources |= dict.fromkeys(node.outputs, come)
        if any(len(sources[v]) != 1 for v in last):
            return None
        weights = {self.names[node.inputs[1]] for node in self.body.products}
        found: dict[Value, Epilogue] = {}
        for y in products:
            if made := [v for v in last if y in sources[v]]:
                epilogue = self._epilogue(y, made, gains | weights)
                if epilogue is None:
                    return None
                found[y] = epilogue
        return found

    def _epilogue(self, y: Value, made: Sequence[Value], others: Set[str]) -> Epilogue | None:
        """What is made of an element of `y`, if that needs no other, nor operands of these names."""
        kept = y in self.results
        graph, own = part_of("epilogue", self.body.behind, [*([y] if kept else []), *made])
        (value,) = (v for v in graph.inputs if own[v] is y)
        try:
            program = program_of(graph, 1, {v: self.names[old] for v, old in own.items()})
        except UnfitError:
            return None
        loop, *more = program.steps
        views = {view.base for view in program.views.values()}
        if more or not isinstance(loop, Loop) or not views <= {*graph.inputs} - {value}:
            return None
        if loop.nodes[0].outputs[0].type.shape != y.type.shape or not others.isdisjoint(
            self.names[own[v]] for v in graph.inputs
        ):
            return None
        homes = {v: home for v, home in program.homes.items() if kept or v is not value}
        program = replace(program, homes=homes)
        name = self.names[y]
        number = f"{name}_i" if kept else name
        assert not isinstance(y.type, QuantType)
        rounded = "value" if y.type.dtype is F32 else f'math.cast(value, to="{y.type.dtype}")'
        return Epilogue(
            tuple(Parameter(home.name) for home in homes.values()),
            tuple(NUMBERS[home.type.components[0].dtype] for home in homes.values()),
            (
                *place_lines(program),
                f"{number} = {rounded}",
                *([f"put({name}, i, {number})"] if kept else []),
                *element_lines(program, loop, {value: number}),
            ),
            f"-> {', '.join(f'{self.names[v]}: {v.type}' for v in made)}",
        )
