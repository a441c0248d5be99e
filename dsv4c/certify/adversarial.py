"""Inputs that find mistakes: zeros and -0, ties of a block's maximum, subnormals, saturation, huge elements,
odd tails, positions at the edges of windows and entries. Deterministic by pattern and seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Graph, Value
from dsv4c.numerics import codec
from dsv4c.numerics.codec import TORCH_DTYPES, quantize, view
from dsv4c.passes.expand import expand
from dsv4c.types import I32, DType, QuantType, TensorType, Type

GROUP = 32  # neighbors that share a profile; blocks of 16, 32, 64 and 128 begin with one
FIRST_POSITIONS = {"mixed": 127, "zeros": 0, "random": 255, "tiny": 1023, "large": 42, "edges": 511}
"""Position of the first token: 4·k - 1 and 128·k - 1 complete an entry of either kind; 42 fills no window."""


def operands_for(graph: Graph, pattern: str, seed: int) -> list[codec.Value]:
    """A value for every input of `graph`, within what its ops accept (indices inside their tables)."""
    plain = expand(graph) if any(isinstance(n.op, Fused) for n in graph.nodes) else graph
    generator = torch.Generator().manual_seed(seed * 1009 + 17)
    return [_value(v, plain, pattern, generator) for v in plain.inputs]


def floats(
    type_: Type, pattern: str, generator: torch.Generator, largest: float | None = None
) -> codec.Value:
    """A value of a type that holds no integers, where torch makes tensors. Rows whose root mean square is
    beyond `largest` are divided by a power of two, so that what is tied or halfway stays so.
    """
    x = _floats(type_.shape, pattern, generator)
    if largest is not None and type_.shape:
        rms = x.square().mean(-1, keepdim=True).sqrt()
        x = x * torch.exp2(-(rms / largest).clamp(min=1.0).log2().ceil())
    return quantize(x, type_.format) if isinstance(type_, QuantType) else x.to(TORCH_DTYPES[type_.dtype])


def weight(type_: Type, generator: torch.Generator) -> codec.Value:
    """A weight of a type that holds no integers, such that rows of numbers around 1 give such again: every
    code of its format alike, scales a few powers of two apart; or normal numbers, around 1 where it has one
    dimension.
    """
    value = view(torch.empty(type_.extent, dtype=torch.uint8), type_)
    if isinstance(value, codec.Quantized):
        data = value.data.view(torch.uint8)
        data.random_(0, 256, generator=generator)
        if value.data.dtype is torch.float8_e4m3fn:
            data.sub_(((data & 0x7F) == 0x7F).to(torch.uint8))  # no NaN
        if value.scale.dtype is torch.uint8:
            low = 118 if value.format.value is DType.E2M1 else 112
            value.scale.random_(low, low + 4, generator=generator)
        else:
            value.scale.copy_(torch.rand(value.scale.shape, generator=generator) + 0.5)
        if value.global_scale is not None:
            value.global_scale.fill_(2.0**-7)
    else:
        wide, center = (0.25, 1.0) if value.ndim < 2 else (value.shape[-1] ** -0.5, 0.0)
        value.copy_(torch.randn(value.shape, generator=generator) * wide + center)
    return value


def expert_numbers(type_: Type, experts: int, generator: torch.Generator) -> Tensor:
    """Rows i32[..., k] of a hash layer's table: k different experts each."""
    rows = torch.rand((*type_.shape[:-1], experts), generator=generator)
    return rows.topk(type_.shape[-1]).indices.to(torch.int32)


def _value(value: Value, graph: Graph, pattern: str, generator: torch.Generator) -> codec.Value:
    type_ = value.type
    if isinstance(type_, TensorType) and type_.dtype is I32:
        return _integers(value, graph, pattern, generator)
    hides = isinstance(type_, QuantType) or _is_weight(value, graph)
    return floats(type_, "random" if pattern == "zeros" and hides else pattern, generator)


def _is_weight(value: Value, graph: Graph) -> bool:
    """An operand that scales or projects others; zeros there would hide what the others do."""
    return any(node.weight is value for node in graph.users[value])


def _floats(shape: tuple[int, ...], pattern: str, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator)
    if pattern == "zeros":
        return torch.zeros(shape)
    if pattern == "tiny":
        x = x * 1e-4
        for place in (0, 32) if shape else ():  # blocks of different sizes even behind a Hadamard transform
            x[..., place::128] = 1e-3
        return x
    if pattern == "large":
        return x * 24.0
    if pattern == "mixed":
        flat = x.reshape(-1)
        groups = flat[: flat.numel() // GROUP * GROUP].view(-1, GROUP)
        for i, make in enumerate(_PROFILES):
            groups[i :: len(_PROFILES)] = make(groups[i :: len(_PROFILES)])
    if pattern == "edges" and shape:
        for width in (16, 128):  # the first element of a block decides its scale, and the neighbors' differ
            first = x[..., ::width]
            first.copy_(first.sign() * 2.0 ** (width // 16 + torch.arange(first.shape[-1]) * 5 % 7))
    return x


def _zero(x: Tensor) -> Tensor:
    return x.sign() * 0.0  # both zeros


def _ties(x: Tensor) -> Tensor:
    return x.sign() * 6.0


def _halfway(x: Tensor) -> Tensor:
    return (x * 16).round() / 16 + 1 / 32


def _subnormal(x: Tensor) -> Tensor:
    return x * 2.0**-130


def _saturating(x: Tensor) -> Tensor:
    return x.sign() * 448.0 * (1 + x.abs())


def _one_huge(x: Tensor) -> Tensor:
    out = x.clone()
    out[:, 0] = 3e4
    return out


def _plain(x: Tensor) -> Tensor:
    return x


_PROFILES = (_plain, _zero, _ties, _plain, _halfway, _subnormal, _plain, _saturating, _one_huge)


def _integers(value: Value, graph: Graph, pattern: str, generator: torch.Generator) -> Tensor:
    assert isinstance(value.type, TensorType)
    shape = value.type.shape
    bounds = list(_bounds(value, graph, set()))
    if bounds:  # indices into a table
        bound = min(bounds)
        if len(shape) < 2 or bound < shape[-1]:
            return torch.randint(0, bound, shape, generator=generator, dtype=torch.int32)
        rows = [torch.randperm(bound, generator=generator)[: shape[-1]] for _ in range(prod(shape[:-1]))]
        return torch.stack(rows).sort(1).values.reshape(shape).to(torch.int32)
    first = FIRST_POSITIONS[pattern]
    count = prod(shape)
    if len(shape) > 1:  # chosen entries: ascending, then none
        row = torch.arange(shape[-1], dtype=torch.int32) * 2
        row[shape[-1] * 3 // 4 :] = -1
        return row.expand(shape).contiguous()
    positions = torch.arange(first, first + count, dtype=torch.int32)
    if count > 4:
        positions[-2:] = -1  # padding
    return positions.reshape(shape)


def _bounds(value: Value, graph: Graph, seen: set[Value]) -> Iterator[int]:
    """Sizes of the tables that `value`, or what is looked up in it, is an index of."""
    if value in seen:
        return
    seen.add(value)
    for node in graph.users[value]:
        for place in (i for i, v in enumerate(node.inputs) if v is value):
            if place in node.op.picks:
                table, dimension = node.op.picks[place]
                yield node.inputs[table].type.shape[dimension]
            elif (result := node.op.hands_on(place)) is not None:
                yield from _bounds(node.outputs[result], graph, seen)
