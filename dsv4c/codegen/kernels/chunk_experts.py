"""The experts of one MoE layer for many rows: rows listed by expert, then products of the listed rows.

Nothing is sorted but numbers: a product reads its rows of x by number, and writes results where the graph has
them, so that what a row gives does not depend on the others. The routed experts' results are rounded to bf16
and summed in order of choice, as the model does.
"""

from __future__ import annotations

from collections.abc import Mapping

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Emission
from dsv4c.codegen.kernels.chunk_rows import (
    emit_choose_experts,
    emit_list_rows,
    emit_quantize_fp8,
    emit_sum_experts,
)
from dsv4c.codegen.kernels.experts import ExpertsSpec
from dsv4c.codegen.kernels.gemm import FEWEST_ROWS, GemmMatrix, GemmSpec, counted, emit_gemm
from dsv4c.codegen.kernels.quantize import scratch_for
from dsv4c.codegen.registry import Launchable, Request, Scratch, launchable
from dsv4c.numerics.resident import PLAIN
from dsv4c.types import BF16, FP8_ROW, QuantType, TensorType


def takes_many(spec: ExpertsSpec, arch: Arch) -> bool:
    """Whether rows are so many, and of such shapes, that products of listed rows serve them."""
    if spec.batch < FEWEST_ROWS or arch.tensor_memory or spec.packed:
        return False
    return spec.hidden % 128 == 0 and spec.intermediate % 128 == 0 and spec.experts <= 1024


class Launches:
    """The launches of one answer, made one by one; arrays between them, by name, are scratch."""

    def __init__(self, request: Request, spec: ExpertsSpec, values: Mapping[str, int]) -> None:
        self.request, self.spec, self.values = request, spec, values
        self.counted = counted(request)
        self.arrays: dict[str, Scratch] = {}
        self.made: list[Launchable] = []

    @property
    def listed(self) -> int:
        """Rows of the routed experts' results."""
        return self.spec.batch * self.spec.top_k

    def add(self, emission: Emission, operands: Mapping[str, str]) -> None:
        """A launch whose operands are values or scratch of these names."""
        bound, scratch = dict(self.counted), {}
        for operand, name in operands.items():
            if name in self.values:
                bound[operand] = self.values[name]
            else:
                parts = {n: a for n, a in self.arrays.items() if n == name or n.startswith(f"{name}_")}
                for part, array in parts.items():
                    scratch[operand + part.removeprefix(name)] = array
        stage = emission.symbol.removesuffix("_0")
        self.made.append(launchable(self.request, emission, bound, stage=stage, scratch=scratch))
        read = {a.name for a in scratch.values() if a.access == "w"}
        for name, array in self.arrays.items():
            if array.name in read:
                self.arrays[name] = Scratch(array.name, array.nbytes, "r")

    def scratch(self, name: str, type_: TensorType | QuantType) -> None:
        """An array that the next launch that names it writes, others read."""
        self.arrays |= scratch_for(name, type_, "w")

    def numbers(self, name: str, nbytes: int) -> None:
        """The same, of numbers of 4 bytes."""
        self.arrays[name] = Scratch(name, nbytes, "w")

    def list_rows(self, experts: str) -> None:
        """Scratch order and counts: the rows of each expert."""
        spec = self.spec
        self.numbers("order", spec.experts * self.listed * 4)
        self.numbers("counts", spec.experts * 4)
        lister = emit_list_rows("list_rows", spec.batch, spec.top_k, spec.experts, bool(self.counted))
        self.add(lister, {"experts": experts, "order": "order", "counts": "counts"})


def up_launches(
    request: Request,
    spec: ExpertsSpec,
    packings: Mapping[str, str],
    factor: float,
    table: bool,
    values: Mapping[str, int],
) -> list[Launchable]:
    """The gate, the choice, rows by expert, w1, w3 and SwiGLU of routed and shared experts.

    `values` have row and gate, table and tokens or bias, x, experts and perhaps weights, h, shared_h and the
    matrices.
    """
    launches = Launches(request, spec, values)
    counts = bool(launches.counted)
    launches.numbers("logits", spec.batch * spec.experts * 4)
    gate = GemmSpec(
        "router_gate",
        spec.batch,
        spec.hidden,
        (GemmMatrix(("gate",), spec.experts, "logits"),),
        PLAIN,
        False,
        "f32",
        counted=counts,
    )
    launches.add(emit_gemm(gate, request.arch), {"x": "row", "gate": "gate", "logits": "logits"})
    if "weights" not in values:
        launches.numbers("weights", launches.listed * 4)
    chooser = emit_choose_experts(
        "choose_experts", spec.batch, spec.top_k, spec.experts, factor, table, counts
    )
    asked = ("table", "tokens") if table else ("bias",)
    launches.add(chooser, {n: n for n in ("logits", *asked, "experts", "weights")})
    launches.list_rows("experts")
    for prefix, rows in (("", launches.listed), ("shared_", spec.batch)):
        pair = GemmMatrix((f"{prefix}w1", f"{prefix}w3"), spec.intermediate, f"{prefix}h")
        product = GemmSpec(
            f"{prefix}up",
            rows,
            spec.hidden,
            (pair,),
            packings[f"{prefix}w1"],
            spec.quantized,
            counted=counts and bool(prefix),
            limit=spec.limit,
            experts=0 if prefix else spec.experts,
            divide=1 if prefix else spec.top_k,
        )
        lists = () if prefix else ("order", "counts", "weights")
        launches.add(emit_gemm(product, request.arch), {n: n for n in ("x", *pair.names, pair.out, *lists)})
    return launches.made


def down_launches(
    request: Request, spec: ExpertsSpec, packings: Mapping[str, str], values: Mapping[str, int]
) -> list[Launchable]:
    """Rows by expert, hidden rows to FP8, w2 of routed and shared experts, their sum.

    `values` have expert_ids, h, shared_h, the matrices and y.
    """
    launches = Launches(request, spec, values)
    counts = bool(launches.counted)
    launches.list_rows("expert_ids")
    for prefix, rows, each in (("", launches.listed, spec.top_k), ("shared_", spec.batch, 1)):
        name = f"{prefix}h"
        if spec.quantized:
            launches.scratch(f"{prefix}q", QuantType(FP8_ROW, (rows, spec.intermediate)))
            quantizer = emit_quantize_fp8(f"quantize_{name}", rows, spec.intermediate, each, counts)
            launches.add(quantizer, {"x": name, "q": f"{prefix}q"})
            name = f"{prefix}q"
        out = f"{prefix}out"
        launches.scratch(out, TensorType(BF16, (rows, spec.hidden)))
        product = GemmSpec(
            f"{prefix}down",
            rows,
            spec.intermediate,
            (GemmMatrix((f"{prefix}w2",), spec.hidden, out),),
            packings[f"{prefix}w2"],
            spec.quantized,
            counted=counts and bool(prefix),
            experts=0 if prefix else spec.experts,
        )
        lists = () if prefix else ("order", "counts")
        operands = {"x": name, f"{prefix}w2": f"{prefix}w2", out: out, **{n: n for n in lists}}
        launches.add(emit_gemm(product, request.arch), operands)
    summer = emit_sum_experts("sum_experts", spec.batch, spec.top_k, spec.hidden, counts, spec.out)
    launches.add(summer, {"routed": "out", "shared": "shared_out", "y": "y"})
    return launches.made
