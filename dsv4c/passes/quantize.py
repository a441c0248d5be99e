"""A recipe applied: weights, GEMM inputs, caches and queries take their formats; each rounding is a node.

What is in its format already stays, so a second time changes nothing.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from dsv4c.errors import GraphError
from dsv4c.ir.graph import Builder, Graph, Kind, Node, Value
from dsv4c.ir.op import Op, expect
from dsv4c.ir.ops.attention import Gather
from dsv4c.ir.ops.index import IndexScores
from dsv4c.ir.ops.moe import TakeAlong
from dsv4c.ir.ops.norm import RmsNorm
from dsv4c.ir.ops.quant import Dequantize, Quantize
from dsv4c.ir.ops.rope import RopeFrequencies
from dsv4c.passes.recipes import Recipe, format_of
from dsv4c.types import F32, QuantFormat, QuantType, TensorType, Type


def quantize(graph: Graph, recipe: Recipe) -> Graph:
    """The same graph in the recipe's formats. Raises GraphError where a format does not fit a shape."""
    return _Quantizer(graph, recipe).run()


class _Quantizer:
    def __init__(self, graph: Graph, recipe: Recipe) -> None:
        self.graph, self.recipe = graph, recipe
        self.builder = Builder(graph.name)
        self.values: dict[Value, Value] = {}
        self.encoded: dict[tuple[Value, QuantFormat, Value | None], Value] = {}
        self.scales: dict[tuple[str, Value], Value] = {}

    def run(self) -> Graph:
        weights = {n.weight for n in self.graph.nodes if n.op.product}
        for value in self.graph.inputs:
            self.values[value] = self.builder.input(value.name, value.type)
        for value in self.graph.states:
            format_ = format_of(self.recipe.state, value.name)
            self.values[value] = self.builder.state(value.name, self.typed(value, format_))
        for value in self.graph.params:
            format_ = format_of(self.recipe.weights, value.name) if value in weights else None
            self.values[value] = self.builder.param(value.name, self.typed(value, format_))
        for node in self.graph.nodes:
            self.visit(node)
        return self.builder.finish({key: self.values[v] for key, v in self.graph.outputs.items()})

    def typed(self, value: Value, format_: QuantFormat | None) -> Type:
        """The type of a value in a format. Raises GraphError, naming it, where its shape forbids that."""
        if format_ is None:
            return value.type
        try:
            return QuantType(format_, value.type.shape)
        except ValueError as error:
            raise GraphError(f"recipe {self.recipe.name}: %{value.name}: {value.type}: {error}") from None

    def check_rotary(self, dims: int) -> None:
        """Caches keep the rotated elements plain: their number is part of a format."""
        for pattern, format_ in self.recipe.state:
            if format_ is not None and format_.tail not in (0, dims):
                raise GraphError(
                    f"recipe {self.recipe.name}: {pattern} keeps {format_.tail} elements of a row in BF16, "
                    f"but the model rotates {dims} (qk_rope_head_dim)"
                )

    def visit(self, node: Node) -> None:
        inputs = [self.values[v] for v in node.inputs]
        op = node.op
        if op.product:
            inputs[0] = self.gemm_input(node, inputs)
        for operand, other in op.same_format.items():
            wanted = inputs[other].type
            if isinstance(wanted, QuantType):
                inputs[operand] = self.encode(inputs[operand], wanted.format, node)
        match op:
            case RopeFrequencies():
                self.check_rotary(op.dims)
            case IndexScores():
                format_ = format_of(self.recipe.queries, self.graph.root_of[node.inputs[1]].name)
                if format_:
                    inputs[0] = self.encode(inputs[0], format_, node)
            case RmsNorm() if len(inputs) == 1:  # the per-head query norm: the only one without a gain
                op = RmsNorm(eps=op.eps, precision=self.recipe.head_norm)
        outputs = self.emit(op, tuple(inputs), [v.name for v in node.outputs], node)
        encoded = isinstance(outputs[0].type, QuantType) and not isinstance(node.outputs[0].type, QuantType)
        if isinstance(op, Gather) and encoded:
            decode = Dequantize(out=self.recipe.activation)
            outputs = self.emit(decode, outputs, [f"{node.name}_plain"], node)
        self.values.update(zip(node.outputs, outputs, strict=True))

    def emit(self, op: Op, inputs: tuple[Value, ...], names: list[str], node: Node) -> tuple[Value, ...]:
        return self.builder.emit(op, inputs, names=names, scope=node.scope)

    def gemm_input(self, node: Node, inputs: list[Value]) -> Value:
        weight = node.weight
        assert weight is not None
        format_ = format_of(self.recipe.activations, weight.name)
        if format_ is None or weight.kind is not Kind.PARAM:
            return inputs[0]
        if isinstance(inputs[0].type, QuantType):
            return self.encode(inputs[0], format_, node)
        static = any(fnmatchcase(weight.name, pattern) for pattern in self.recipe.static_scales)
        scale = self.static_scale(weight, inputs[2], node) if static else None
        return self.encode(inputs[0], format_, node, scale)

    def encode(self, x: Value, format_: QuantFormat, node: Node, scale: Value | None = None) -> Value:
        """`x` in `format_`, encoded once however many nodes read it. GraphError if it is in another."""
        if isinstance(x.type, QuantType):
            expect(
                x.type.format == format_,
                f"recipe {self.recipe.name}: %{x.name} is {x.type}, and {node.name} reads {format_}; "
                f"a graph takes one recipe",
            )
            return x
        key = (x, format_, scale)
        if key not in self.encoded:
            operands = (x,) if scale is None else (x, scale)
            name = self.builder.fresh(f"{x.name}_quantized")
            scope = x.node.scope if x.node else node.scope
            self.encoded[key] = self.builder.emit(
                Quantize(format=format_), operands, names=[name], scope=scope
            )[0]
        return self.encoded[key]

    def static_scale(self, weight: Value, experts: Value, node: Node) -> Value:
        """The checkpoint's activation scale of each chosen expert; w3 shares w1's."""
        stack = weight.name
        name = f"{stack.removesuffix('w3') + 'w1' if stack.endswith('w3') else stack}.input_scale"
        if (name, experts) not in self.scales:
            count = weight.type.shape[0]
            scales = self.builder.param(name, TensorType(F32, (count,)))
            chosen = self.emit(TakeAlong(), (scales, experts), [self.builder.fresh(f"{name}_chosen")], node)
            self.scales[name, experts] = chosen[0]
        return self.scales[name, experts]
