"""The KV compressor: keep new rows, pool the windows they finish, normalize, rotate, encode, store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused, Neighborhood, dtype_of
from dsv4c.ir.graph import Node, Value
from dsv4c.ir.op import Rounding
from dsv4c.ir.ops import (
    add_position_bias,
    cache_extend,
    cache_write,
    cast,
    completed_entries,
    compress_pool,
    hadamard,
    quantize,
    rms_norm,
    rope,
)
from dsv4c.ir.ops.compress import CompressPool
from dsv4c.ir.ops.quant import Hadamard
from dsv4c.ir.ops.rope import Rope
from dsv4c.types import F32, QuantType


@fused
class Compressor(Fused):
    """kv, gate f32[N, W] to their rings, finished entries to the cache. Returns cache, kv ring, score ring.

    Rows and entries lie in their slots. With `owners`, the sequence of the call that each row belongs to, the
    windows are pooled from copies of the rings that have room for all rows: `beside` is their capacity.
    `rotated` entries are index keys: under the Hadamard transform.
    """

    rounding = Rounding.ONCE
    optional = True
    literals = ("rms_norm.precision", "rope.inverse")
    anchor = CompressPool
    per_call = "tokens"
    room = "beside"
    example: ClassVar[Mapping[str, Any]] = {
        "entries": "q[e4m3,ue8m0,1x64,tail=64][1,128,512]",
        "gain": "bf16[512]",
    }
    ratio: int
    overlap: bool
    tokens: int
    eps: float
    rotated: bool
    beside: int = 0

    @classmethod
    def propose(cls, anchor: Node, around: Neighborhood) -> Iterable[Mapping[str, Any]]:
        nodes = around.users(anchor.outputs[0])
        while len(nodes) == 1 and not isinstance(nodes[0].op, Rope):
            nodes = around.users(nodes[0].outputs[0])
        after = around.users(nodes[0].outputs[0]) if nodes else ()
        return ({"rotated": any(isinstance(n.op, Hadamard) for n in after)},)

    def body(
        self,
        entries: Value,
        kv_ring: Value,
        score_ring: Value,
        kv: Value,
        gate: Value,
        bias: Value,
        gain: Value,
        positions: Value,
        slots: Value,
        frequencies: Value,
        owners: Value | None = None,
    ) -> tuple[Value, ...]:
        ratio, tokens, capacity = self.ratio, self.tokens, self.beside
        score = add_position_bias(gate, bias, positions)
        done, done_slots = completed_entries(positions, slots, ratio=ratio, tokens=tokens)
        if owners is not None:
            kv_beside = cache_extend(kv_ring, kv, positions, slots, capacity=capacity, tokens=tokens)
            score_beside = cache_extend(score_ring, score, positions, slots, capacity=capacity, tokens=tokens)
            _, places = completed_entries(positions, owners, ratio=ratio, tokens=tokens)
        kv_ring = cache_write(kv_ring, kv, positions, slots)
        score_ring = cache_write(score_ring, score, positions, slots)
        seen = (kv_ring, score_ring, done, done_slots)
        if owners is not None:
            seen = (kv_beside, score_beside, done, places)
        z = compress_pool(*seen, ratio=ratio, overlap=self.overlap, tokens=tokens)
        if dtype_of(gain) != F32:
            z = cast(z, to=dtype_of(gain))
        e = rope(rms_norm(z, gain, eps=self.eps), done, frequencies, stride=ratio)
        if self.rotated:
            e = hadamard(e)
        if isinstance(entries.type, QuantType):
            e = quantize(e, format=entries.type.format)
        return cache_write(entries, e, done, done_slots), kv_ring, score_ring
