"""The block-scaled GEMM family of Blackwell: y[M, N] = x[M, K] w[N, K]^T, both NVFP4, for more than 16 rows.

One CTA per 128 x 128 tile of y, sums in tensor memory. Sums are f32 over all of k before both global scales
multiply them. It assembles for sm_100a; it has not been run on that hardware.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Emission, Parameter, compose
from dsv4c.codegen.lib.geometry import Gemm
from dsv4c.codegen.registry import Answer, No, Request, kernel, launchable, takes
from dsv4c.errors import BuildError
from dsv4c.ir.ops.linear import Linear
from dsv4c.types import BF16, NVFP4, NVFP4_ROW, QuantType

FEWEST_ROWS = 17  # a GEMV serves fewer
STAGES = 4
PACKING = "nvfp4_mma/8x2"


@dataclass(frozen=True)
class BlockScaledSpec:
    """y bf16[rows, columns] = x w^T: x is NVFP4_ROW [rows, k], `w` names the weights, NVFP4 [columns, k]."""

    name: str
    rows: int
    columns: int
    k: int
    w: str = "w"

    @property
    def shape(self) -> Gemm:
        """Tiles and stages."""
        return Gemm(self.rows, self.columns, self.k, STAGES)

    @property
    def weight_bytes(self) -> int:
        """Codes and block scales of w."""
        return self.columns * self.k * 9 // 16


def emit_blockscaled(spec: BlockScaledSpec, arch: Arch) -> Emission:
    """The kernel of a spec. Raises BuildError for shapes and architectures that the family does not cover."""
    if not arch.tensor_memory:
        raise BuildError(f"{spec.name}: is written in tcgen05 instructions, which {arch.name} has not")
    if spec.rows < FEWEST_ROWS:
        raise BuildError(f"{spec.name}: {spec.rows} rows: the GEMM is for more than 16, fewer take a GEMV")
    if spec.k % Gemm.K_TILE:
        raise BuildError(f"{spec.name}: rows of {spec.k} elements: want a multiple of {Gemm.K_TILE}")
    if spec.columns % 8:
        raise BuildError(f"{spec.name}: rows of {spec.columns} results are not a multiple of 16 bytes")
    x, flops = spec.shape, 2e-9 * spec.rows * spec.columns * spec.k
    weight = {"w": f"m_{spec.w}", "w_global_scale": f"m_{spec.w}_global_scale"}
    emission = compose(
        spec.name,
        f"{spec.name}: block-scaled NVFP4 GEMM, {spec.rows} rows, on tcgen05 (sm_100a only; not run on that "
        f"hardware).\n\n    y = bf16(x . {spec.w})",
        {
            Parameter("x"): f"{NVFP4_ROW}[{spec.rows},{spec.k}]",
            Parameter("x", "scale"): "its block scales",
            Parameter("x", "global_scale"): "its global scales, f32[N]",
            Parameter(spec.w): f"{NVFP4}[{spec.columns},{spec.k}], packed with its block scales",
            Parameter(spec.w, "global_scale"): "its global scale, f32[1]",
            Parameter("y"): f"bf16[{spec.rows},{spec.columns}]",
        },
        f"Launch: grid {x.grid[0]} x {x.grid[1]}, block {x.TILE}, {x.shared} B of shared memory, 256 columns "
        f"of tensor memory.\nReads {spec.weight_bytes / 1e6:.1f} MB of weights; {flops:.2f} GFLOP.",
        (
            "ptx.launch_dependents()",
            f"s = ptx.shared({x.shared})",
            "at = blockscaled.enter(SPEC, m, s)",
            "ptx.wait()",
            "blockscaled.gemm(SPEC, m, at)",
        ),
        threads=x.TILE,
        grid=x.grid,
        spec=x,
        given={n: f"m_{n}" for n in ("x", "x_scale", "x_global_scale")} | weight | {"y": "m_y"},
    )
    return replace(emission, packing={spec.w: PACKING})


@kernel(takes(Linear, "out"))
def blockscaled(request: Request) -> Answer:
    """A linear layer of NVFP4 rows and weights, for more rows than a GEMV takes."""
    call = request.call
    x, w = (request.types[i] for i in call.inputs)
    result = request.types[call.outputs[0]]
    quantized = isinstance(x, QuantType) and isinstance(w, QuantType) and len(x.shape) == 2
    if not quantized or (x.format, w.format) != (NVFP4_ROW, NVFP4):  # type: ignore[union-attr]
        return No(f"multiplies rows {NVFP4_ROW}[N,K] with weights {NVFP4}[M,K], not {x} with {w}")
    if isinstance(result, QuantType) or result.dtype is not BF16:
        return No(f"writes bf16, not {result}")
    label = request.labels[call.inputs[1]] or "w"
    spec = BlockScaledSpec(f"{label}_gemm", x.shape[0], w.shape[0], x.shape[1], label)
    values = {"x": call.inputs[0], label: call.inputs[1], "y": call.outputs[0]}
    return [launchable(request, emit_blockscaled(spec, request.arch), values)]
