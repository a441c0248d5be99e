"""Every primitive on operands that show what it does, and random bodies on rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from dsv4c.ir.graph import Builder, Graph, Value
from dsv4c.ir.op import Op
from dsv4c.ir.ops.attention import (
    AttentionScores,
    AttentionValues,
    Gather,
    SinkSoftmax,
    VisibleEntries,
    WindowIndex,
)
from dsv4c.ir.ops.compress import AddPositionBias, CompletedEntries, CompressPool
from dsv4c.ir.ops.draft import Accept, Candidates, DraftRows, Preceding, Stop, Trusted
from dsv4c.ir.ops.hyper import CollapseStreams, ExpandStreams, MixStreams, SpreadStreams
from dsv4c.ir.ops.index import IndexScores, TopK
from dsv4c.ir.ops.linear import ExpertLinear, GroupedLinear, Linear
from dsv4c.ir.ops.math import Add, Cast, Clamp, Mul, Scale, Shift, Sigmoid, Silu, SqrtSoftplus, Sum
from dsv4c.ir.ops.moe import Embedding, Present, TakeAlong
from dsv4c.ir.ops.norm import Normalize, RmsNorm, RsqrtMeanSquare, Softmax
from dsv4c.ir.ops.quant import Dequantize, Hadamard, Quantize
from dsv4c.ir.ops.rope import Rope, RopeFrequencies
from dsv4c.ir.ops.sample import Argmax, Draw, Emit, LastRows, Penalize, TokenProbabilities
from dsv4c.ir.ops.shape import Concat, Reshape, Slice
from dsv4c.ir.ops.state import Advance, CacheExtend, CacheWrite, Owners, Positions
from dsv4c.types import BF16, F16, F32, FP8_ROW, I32, KV_FP8, MXFP4, NVFP4_ROW, TensorType, parse_type

BATCHES = (1, 2, 3, 8)
KV, KEYS = "q[e4m3,ue8m0,1x64,tail=64]", "q[e2m1,ue8m0,1x32]"
ROW, WEIGHT, PAIRS = "q[e4m3,ue8m0,1x128]", "q[e4m3,ue8m0,128x128]", "q[e2m1,e4m3,1x16,tensor]"
PAIR_ROWS = "q[e2m1,e4m3,1x16,row]"

PRIMITIVES: Sequence[tuple[Op, tuple[str, ...]]] = (
    (Add(), ("f32[N,4,96]", "f32[N,4,96]")),
    (Add(), ("bf16[N,384]", "f32[384]")),
    (Mul(), ("bf16[N,3,128]", "bf16[N,3,128]")),
    (Mul(), ("f32[N,3,128]", "f32[N,3,1]")),
    (Scale(1.7), ("bf16[N,384]",)),
    (Shift(1e-6), ("f32[N,384]",)),
    (Clamp(None, 7.0), ("bf16[N,384]",)),
    (Clamp(-7.0, 7.0), ("f32[N,384]",)),
    (Silu(), ("f32[N,384]",)),
    (Silu(), ("bf16[N,384]",)),
    (Sigmoid(), ("f32[N,384]",)),
    (SqrtSoftplus(), ("f32[N,384]",)),
    (Cast(BF16), ("f32[N,384]",)),
    (Cast(F32), ("bf16[N,384]",)),
    (Cast(F16), ("f32[N,384]",)),
    (Cast(F32), ("i32[N,7]",)),
    (Sum(1, F32), ("bf16[N,6,384]",)),
    (Sum(-1, BF16), ("f32[N,384]",)),
    (RmsNorm(1e-6), ("bf16[N,384]", "bf16[384]")),
    (RmsNorm(1e-6), ("f32[N,200]", "f32[200]")),
    (RmsNorm(1e-6), ("bf16[N,4096]", "bf16[4096]")),
    (RmsNorm(1e-6, BF16), ("bf16[N,4,128]",)),
    (RsqrtMeanSquare(1e-6), ("bf16[N,1024]",)),
    (Normalize(-1, 0.0), ("f32[N,6]",)),
    (Normalize(-2, 1e-6), ("f32[N,4,4]",)),
    (Softmax(-1), ("f32[N,4,4]",)),
    (Softmax(-1), ("f32[N,1000]",)),
    (Quantize(FP8_ROW), ("bf16[N,384]",)),
    (Quantize(FP8_ROW), ("f32[N,2,200]",)),
    (Quantize(KV_FP8), ("bf16[N,512]",)),
    (Quantize(MXFP4), ("bf16[N,4,128]",)),
    (Quantize(NVFP4_ROW), ("bf16[N,384]",)),
    (Quantize(NVFP4_ROW), ("bf16[N,384]", "f32[N,3]")),
    (Dequantize(BF16), (f"{ROW}[N,384]",)),
    (Dequantize(BF16), (f"{KV}[N,5,512]",)),
    (Dequantize(F32), (f"{PAIR_ROWS}[N,384]",)),
    (Dequantize(BF16), (f"{WEIGHT}[200,200]",)),
    (Hadamard(), ("bf16[N,4,128]",)),
    (RopeFrequencies(10000.0, 64, 1.0, 65536, 32.0, 1.0), ()),
    (RopeFrequencies(160000.0, 64, 16.0, 65536, 32.0, 1.0), ()),
    (Rope(), ("bf16[N,4,128]", "i32[N]", "f32[32]")),
    (Rope(inverse=True, stride=4), ("f32[N,64]", "i32[N]", "f32[32]")),
    (ExpandStreams(4), ("bf16[N,384]",)),
    (CollapseStreams(BF16), ("bf16[N,4,384]", "f32[N,4]")),
    (MixStreams(), ("bf16[N,4,384]", "f32[N,4,4]")),
    (SpreadStreams(), ("bf16[N,384]", "f32[N,4]")),
    (CompletedEntries(4, 1), ("i32[N]", "i32[N]")),
    (CompletedEntries(4, 8), ("i32[8N]", "i32[8N]")),
    (CompressPool(4, True, 1), ("f32[3,15,256]", "f32[3,15,256]", "i32[N]", "i32[N]")),
    (CompressPool(128, False, 1), ("f32[3,135,128]", "f32[3,135,128]", "i32[N]", "i32[N]")),
    (AddPositionBias(), ("f32[N,256]", "f32[4,256]", "i32[N]")),
    (IndexScores(4), (f"{KEYS}[N,8,128]", f"{KEYS}[3,64,128]", "bf16[N,8]", "i32[N]", "i32[N]")),
    (IndexScores(4), ("f32[N,8,128]", "f32[3,64,128]", "f32[N,8]", "i32[N]", "i32[N]")),
    (TopK(8), ("f32[N,300]",)),
    (TopK(2000), ("f32[N,1500]",)),
    (Embedding(), ("bf16[512,384]", "i32[N]")),
    (Embedding(), ("i32[512,6]", "i32[N]")),
    (TakeAlong(), ("f32[N,64]", "i32[N,6]")),
    (TakeAlong(), ("f32[64]", "i32[N,6]")),
    (LastRows(), ("bf16[4N,384]", "i32[N]")),
    (Argmax(), ("f32[N,5000]",)),
    (Argmax(), ("bf16[N,77]",)),
    (Penalize(), ("f32[N,1000]", "i32[3,96]", "i32[N]", "i32[N]", "i32[3]", "f32[3,7]")),
    (TokenProbabilities(), ("f32[N,1000]", "i32[N]", "f32[3,7]")),
    (Draw(), ("f32[N,1000]", "i32[N]", "i32[N]", "i32[3]", "i32[3,2]")),
    (Emit(), ("i32[N]", "i32[N]", "i32[N]", "i32[3,8]")),
    (Preceding(), ("bf16[3,16,384]", "bf16[N,384]", "i32[N]", "i32[N]")),
    (DraftRows(5, 0, 7), ("i32[N]", "i32[N]", "i32[N]", "i32[11]")),
    (DraftRows(1, -1, 0), ("i32[N]", "i32[N]", "i32[N]", "i32[11]")),
    (Candidates(), ("i32[N]", "i32[3N]", "i32[N]")),
    (Trusted(), ("i32[N]", "f32[3N,1]", "i32[N]", "f32[3]")),
    (Present(), ("f32[N,6]", "i32[N]")),
    (Accept(), ("i32[4N]", "i32[4N]", "i32[N]")),
    (Stop(), ("i32[4N]", "i32[4N]", "i32[N]", "i32[N]", "i32[3,8]")),
    (Reshape((-1, 96)), ("bf16[N,384]",)),
    (Slice(1, 1, 3), ("f32[N,4,7]",)),
    (Slice(-1, 5, 300), ("bf16[N,384]",)),
    (Concat(1), ("bf16[N,4,64]", "bf16[N,7,64]")),
    (Concat(0), (f"{ROW}[N,2,200]", f"{ROW}[3,2,200]")),
    (CacheWrite(), (f"{KV}[3,135,512]", f"{KV}[N,512]", "i32[N]", "i32[N]")),
    (CacheWrite(), ("f32[3,5,256]", "f32[N,256]", "i32[N]", "i32[N]")),
    (CacheExtend(24, 6), (f"{KV}[3,15,512]", f"{KV}[6N,512]", "i32[6N]", "i32[6N]")),
    (Positions(3), ("i32[11]", "i32[N]", "i32[N]")),
    (Owners(3), ("i32[N]",)),
    (Advance(), ("i32[11]", "i32[N]", "i32[N]")),
    (Linear(F32), ("f32[N,384]", "f32[24,384]")),
    (Linear(BF16), ("bf16[N,384]", "bf16[200,384]")),
    (Linear(BF16), ("bf16[N,384]", f"{WEIGHT}[200,384]")),
    (Linear(BF16), (f"{ROW}[N,384]", f"{WEIGHT}[200,384]")),
    (Linear(BF16), (f"{ROW}[N,200]", f"{WEIGHT}[70,200]")),
    (Linear(BF16), (f"{PAIR_ROWS}[N,384]", f"{PAIRS}[200,384]")),
    (GroupedLinear(BF16), (f"{ROW}[N,2,256]", f"{WEIGHT}[2,128,256]")),
    (GroupedLinear(F32), ("f32[N,2,256]", "f32[2,128,256]")),
    (ExpertLinear(BF16), (f"{ROW}[N,256]", f"{KEYS}[8,128,256]", "i32[N,6]")),
    (ExpertLinear(BF16), (f"{PAIR_ROWS}[N,6,256]", f"{PAIRS}[8,128,256]", "i32[N,6]")),
    (ExpertLinear(F32), ("f32[N,256]", "f32[8,128,256]", "i32[N,6]")),
    (WindowIndex(128), ("i32[N]",)),
    (VisibleEntries(4, 64), ("i32[N]",)),
    (Gather(), (f"{KV}[3,135,512]", "i32[N,40]", "i32[N]")),
    (Gather(), ("bf16[3,135,128]", "i32[N,40]", "i32[N]")),
    (AttentionScores(0.08), ("bf16[N,4,512]", "bf16[N,40,512]", "i32[N,40]")),
    (SinkSoftmax(BF16), ("f32[N,4,40]", "f32[4]")),
    (SinkSoftmax(F32), ("f32[N,4,700]", "f32[4]")),
    (AttentionValues(), ("bf16[N,4,40]", "f32[N,4]", "bf16[N,40,512]")),
)


def graph_of(op: Op, types: Sequence[str], rows: int) -> Graph:
    """One primitive on operands of these types; nN in a type is n times `rows`."""
    builder = Builder(op.name)
    values = [builder.input(f"x{i}", parse_type(_sized(text, rows))) for i, text in enumerate(types)]
    with builder:
        made = op(*values)
    results = made if isinstance(made, tuple) else (made,)
    return builder.finish({str(i): v for i, v in enumerate(results)})


def _sized(text: str, rows: int) -> str:
    head, bracket, shape = text.rpartition("[")
    sizes = [str(rows * int(n[:-1] or 1)) if n.endswith("N") else n for n in shape[:-1].split(",")]
    return f"{head}{bracket}{','.join(sizes)}]"


# Random bodies ----------------------------------------------------------------------------------------------


def random_body(random: Random, rows: int) -> Graph:
    """A body of row-local ops: three to twelve of them on rows of one or two dimensions, all their unread
    results given back.
    """
    width = random.choice((64, 128, 256, 384))
    dtype = random.choice((F32, BF16))
    builder = Builder("body")
    body = _Body(random, builder, rows, width)
    with builder:
        body.values.append(builder.input("x", TensorType(dtype, (rows, width))))
        if random.random() < 0.6:
            streams = random.choice((2, 3, 4))
            body.values.append(builder.input("s", TensorType(dtype, (rows, streams, width))))
        for _step in range(random.randint(3, 12)):
            body.step()
    read = {v for node in builder.nodes for v in node.inputs}
    unread = [v for node in builder.nodes for v in node.outputs if v not in read]
    return builder.finish({str(i): v for i, v in enumerate(unread)})


class _Body:
    """What a random body has so far: plain float values with a row for each of `rows`."""

    def __init__(self, random: Random, builder: Builder, rows: int, width: int) -> None:
        self.random, self.builder, self.rows, self.width = random, builder, rows, width
        self.values: list[Value] = []

    def step(self) -> None:
        """One more op, on values of its kind if there are any."""
        makers = [
            self.unary,
            self.unary,
            self.binary,
            self.norm,
            self.reduce,
            self.quantized,
            self.rotated,
            self.streams,
            self.reshaped,
            self.looked_up,
            self.small_matrix,
        ]
        made = self.random.choice(makers)(self.random.choice(self.values))
        if made is not None:
            self.values.append(made)

    def _given(self, type_: TensorType) -> Value:
        """An operand of that type: one there is, or a new one."""
        known = [v for v in self.builder.inputs if v.type == type_]
        if known:
            return self.random.choice(known)
        return self.builder.input(f"a{len(self.builder.inputs)}", type_)

    def _read_whole(self, type_: TensorType) -> Value:
        """The same, or what is computed of it, which is one for all rows where it is."""
        operand, op = self._given(type_), self.random.choice((None, Silu(), Scale(0.75)))
        made: Value = operand if op is None else op(operand)
        return made

    def unary(self, x: Value) -> Any:
        ops: list[Op] = [Silu(), Sigmoid(), SqrtSoftplus(), Scale(0.75), Shift(0.5), Clamp(-3.0, None)]
        ops += [Cast(self.random.choice((F32, BF16)))]
        return self.random.choice(ops)(x)

    def binary(self, x: Value) -> Any:
        op = self.random.choice((Add(), Mul()))
        shape, dtype = x.type.shape, x.type.components[0].dtype
        others = [v for v in self.values if v.type == x.type]
        kinds = [shape[-1:], (*shape[:-1], 1)]
        if len(shape) > 2:
            kinds.append((1, *shape[1:]))
        other = (
            self.random.choice(others)
            if self.random.random() < 0.6
            else self._read_whole(TensorType(dtype, self.random.choice(kinds)))
        )
        return op(x, other)

    def norm(self, x: Value) -> Any:
        if self.random.random() < 0.3:
            return RmsNorm(1e-6, BF16)(x)
        dtype = x.type.components[0].dtype
        return RmsNorm(1e-6)(x, self._read_whole(TensorType(dtype, x.type.shape[-1:])))

    def reduce(self, x: Value) -> Any:
        axis = -1 if len(x.type.shape) < 3 else self.random.choice((-1, 1))
        if x.type.components[0].dtype is not F32:
            x = Cast(F32)(x)
        ops: list[Op] = [Softmax(axis), Softmax(-1)]
        if len(x.type.shape) > 2:
            ops.append(Sum(axis, self.random.choice((F32, BF16))))
        if self.random.random() < 0.3:
            return Mul()(x, RsqrtMeanSquare(1e-6)(x))
        return self.random.choice(ops)(x)

    def quantized(self, x: Value) -> Any:
        """Quantized for who wants it, and perhaps read again."""
        if x.type.shape[-1] % 32:
            return None
        q = Quantize(self.random.choice((FP8_ROW, MXFP4, NVFP4_ROW)))(x)
        return Dequantize(self.random.choice((F32, BF16)))(q) if self.random.random() < 0.5 else None

    def rotated(self, x: Value) -> Any:
        if x.type.shape[-1] < 64 or self.random.random() < 0.3:
            return Hadamard()(x) if x.type.shape[-1] in (64, 128, 256) else None
        positions = self._given(TensorType(I32, (self.rows,)))
        frequencies = self._given(TensorType(F32, (32,)))
        return Rope(inverse=self.random.random() < 0.5)(x, positions, frequencies)

    def streams(self, x: Value) -> Any:
        rows = self.rows
        if len(x.type.shape) == 2:
            if self.random.random() < 0.5:
                return ExpandStreams(3)(x)
            return SpreadStreams()(x, self._given(TensorType(F32, (rows, 4))))
        if len(x.type.shape) != 3:
            return None
        count = x.type.shape[1]
        if self.random.random() < 0.5:
            return CollapseStreams(BF16)(x, self._given(TensorType(F32, (rows, count))))
        return MixStreams()(x, self._given(TensorType(F32, (rows, count, count))))

    def reshaped(self, x: Value) -> Any:
        shape = x.type.shape
        if self.random.random() < 0.5 and len(shape) == 3:
            return Reshape((-1, shape[1] * shape[2]))(x)
        if self.random.random() < 0.5 and shape[-1] % 2 == 0 and len(shape) == 2:
            return Reshape((-1, 2, shape[-1] // 2))(x)
        axis = self.random.randrange(1, len(shape))
        stop = self.random.randint(1, shape[axis])
        return Slice(axis, self.random.randrange(stop), stop)(x)

    def looked_up(self, x: Value) -> Any:
        dtype = x.type.components[0].dtype
        table = self._given(TensorType(dtype, (50, x.type.shape[-1])))
        row = Embedding()(table, self._given(TensorType(I32, (self.rows,))))
        return (
            Add()(x, row) if len(x.type.shape) == 2 else Concat(1)(x, Reshape((-1, 1, x.type.shape[-1]))(row))
        )

    def small_matrix(self, x: Value) -> Any:
        dtype = x.type.components[0].dtype
        return Linear(F32)(x, self._given(TensorType(dtype, (24, x.type.shape[-1]))))


def random_bodies(count: int, seed: int) -> Iterator[tuple[int, Graph]]:
    """So many of them, each by a seed of its own, over one to eight rows."""
    for i in range(count):
        random = Random(seed * 10_007 + i)
        yield i, random_body(random, random.choice(BATCHES))
