"""Hyper-connection kernels: streams mixed, projected, collapsed and normalized, few rows by a cluster each,
many by two launches.

Every sublayer boundary and the head is one: operands that are there say what is mixed, kept, normalized and
quantized.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Emission, Parameter, compose, floor_text
from dsv4c.codegen.kernels.exchange import EXCHANGE, EXCHANGED, exchanging
from dsv4c.codegen.kernels.formats import holds
from dsv4c.codegen.kernels.quantize import quantize_rows, scratch_for
from dsv4c.codegen.lib.slices import STREAMS, TOGETHER, Batch, Slice
from dsv4c.codegen.registry import (
    Answer,
    Call,
    Launchable,
    No,
    Request,
    Scratch,
    kernel,
    launchable,
    takes,
)
from dsv4c.errors import BuildError
from dsv4c.ir.ops.collective import AllReduce
from dsv4c.passes.fusions.head import Head
from dsv4c.passes.fusions.hyper_norm import HyperNorm, HyperNormFirst
from dsv4c.types import BF16, F32, FP8_ROW, NVFP4_ROW, TensorType

CLUSTER_LIMIT = 16
FEW_ROWS = 16  # up to which each row has a cluster of its own
LONGEST = 8192  # columns of many rows: 8 a thread
WIDTHS = 64, 128  # columns of a CTA that mixes: as many as leave so many CTAs
FEWEST_CTAS = 64
COLLAPSERS = 1536  # threads that an SM must have registers for, 40 each


@dataclass(frozen=True)
class HyperNormSpec:
    """One boundary between sublayers.

    Operands, by flag: x bf16[rows, 4, hidden]; mix: f bf16[rows, hidden], post f32[rows, 4], logits f32[rows,
    4, 4] of the previous boundary; fn f32[24, 4 hidden], base f32[24], scale f32[3] (head: 4, 4 and 1); gain
    bf16[hidden]. Results: keep: x_out like x (may be x itself); unless head: post_out, logits_out; bf16:
    normed bf16[rows, hidden]; fp8: q, the same row quantized (1x128, ue8m0); plain: the row before its norm.
    With `ranks` above 1, f is f32 and this rank's addends: what is mixed is the sum of all, rounded.
    """

    rows: int
    hidden: int
    norm_eps: float
    hc_eps: float
    iterations: int
    mix: bool = True
    keep: bool = True
    head: bool = False
    bf16: bool = True
    fp8: bool = True
    plain: bool = False
    ranks: int = 1
    ctas: int | None = None  # per token; None: as many as fit a cluster
    held: int | None = None  # rows of fn in registers; None: as many as leave room for a predecessor

    def slice(self, arch: Arch) -> Slice:
        """The cut of a row. Raises BuildError when no cluster can hold `fn`."""
        projected = self._projected
        for ctas in [self.ctas] if self.ctas else range(CLUSTER_LIMIT, 1, -1):
            cut = Slice(
                self.hidden,
                ctas,
                projected,
                self.norm_eps,
                self.hc_eps,
                self.iterations if self.mix else 0,
                held=min(projected, self._held(ctas)),
                ranks=self.ranks,
            )
            fits = self.hidden % (128 * ctas) == 0 and cut.width <= 1024 and cut.shared <= arch.shared_per_cta
            if fits:
                return cut
        raise BuildError(
            f"hyper_norm of {self.hidden} columns: no cluster of 2 to {CLUSTER_LIMIT} CTAs cuts them into "
            f"whole groups of 128 with at most 1024 columns and {arch.shared_per_cta} B of fn each"
        )

    def batch(self, arch: Arch) -> Batch:
        """The cut for many rows: a CTA that keeps its columns of fn for each SM at most. Raises BuildError
        for columns that threads cannot share.
        """
        if self.hidden % 128 or self.hidden > LONGEST:
            raise BuildError(
                f"hyper_norm of {self.rows} rows of {self.hidden} columns: want whole groups of 128, at most "
                f"{LONGEST} columns"
            )
        lots = -(-self.rows // TOGETHER)
        wide = [w for w in WIDTHS if self.hidden % w == 0 and self.hidden // w * lots >= FEWEST_CTAS]
        width = max(wide, default=min(WIDTHS))
        return Batch(
            self.hidden,
            self._projected,
            self.norm_eps,
            self.hc_eps,
            self.iterations if self.mix else 0,
            self.rows,
            width,
            turns=-(-lots // max(1, arch.sms // (self.hidden // width))),
        )

    @property
    def _projected(self) -> int:
        """Rows of fn."""
        return STREAMS if self.head else STREAMS * (STREAMS + 2)

    def _held(self, ctas: int) -> int:
        """Registers leave shared memory to the predecessor's weights: fn arrives while those still stream.

        H200, 2026-11-21, between GEMVs of 34 and 17 MB, hidden 4096: 24, 12 and 0 rows held add 3.7, 4.8 and
        5.0 us.
        """
        if self.held is not None:
            return self.held
        threads = self.hidden // ctas
        if threads > 512:
            return 0
        most = 24 if threads <= 256 else 12
        return most - 2 if self.ranks > 1 else most  # waiting for words takes registers


def emit_hyper_norm(spec: HyperNormSpec, arch: Arch) -> Emission:
    """The kernel of one boundary of few rows. Raises BuildError for shapes that no cluster can hold."""
    cut = spec.slice(arch)
    wait = ["ptx.wait()", "hyper.arrived()"]
    if spec.ranks > 1:
        wait = [
            "own, flag, to, here = at.site",
            "ptx.wait()",
            "number, addend, word = hyper.addend(SPEC, m, at)",
            f"exchange.push(to, own, flag, number, word, {spec.ranks})",
            f"total = exchange.receive_sum(m.exchange, here, own, flag, number, addend, {spec.ranks})",
            "hyper.keep_sum(SPEC, s, at, total)",
            "cute.arch.sync_threads()",
        ]
    nbytes = cut.rows * (STREAMS * spec.hidden + 2) * 4 + spec.hidden * 2
    nbytes += spec.hidden * 2 * (STREAMS + spec.mix * (1 if spec.ranks == 1 else 2))
    return compose(
        "hyper_head" if spec.head else "hyper_norm" if spec.mix else "hyper_norm_first",
        _what(spec),
        _operands(spec, cut.rows),
        f"Launch: a cluster of {cut.ctas} CTAs x {cut.threads} threads per token; {cut.shared} B shared "
        f"each.\n{floor_text(nbytes, arch, 'token')}",
        [
            "ptx.launch_dependents()",
            f"s = ptx.shared({cut.shared})",
            "at = hyper.enter(SPEC, m, s)",
            *wait,
            "hyper.cross(SPEC, m, s, at)",
        ],
        threads=cut.threads,
        grid=(f"rows * {cut.ctas}", 1, 1),
        sizes={"rows": spec.rows},
        cluster=cut.ctas,
        spec=cut,
        record="hyper.Operands",
    )


def emit_hyper_batch(spec: HyperNormSpec, arch: Arch) -> tuple[Emission, Emission]:
    """The two kernels of one boundary of many rows: the first mixes and projects, the second collapses;
    between them are `parts`. Raises BuildError for shapes that they do not cut.
    """
    cut, stream = spec.batch(arch), f"bf16[N,4,{spec.hidden}]"
    of = f"{spec.rows} tokens of {STREAMS} streams x {spec.hidden} columns.\n"
    parts = {Parameter("parts"): f"f32[N,{cut.slices},{cut.sums}], of each CTA's columns"}
    operands = _operands(spec, cut.rows)
    mixes = {p: type_ for p, type_ in operands.items() if p.operand in ("x", "f", "post", "logits", "fn")}
    left = ("base", "scale", "gain", "post_out", "logits_out", "normed", "plain", "q")
    leaves = {p: type_ for p, type_ in operands.items() if p.operand in left}
    mix = compose(
        "hyper_mix",
        "\n".join([f"Streams mixed and projected: {of}", _mixing(spec), "    parts   = x' . fn"]),
        {**mixes, Parameter("x_out"): stream if spec.mix or spec.keep else None, **parts},
        f"Launch: {cut.blocks * cut.slices} CTAs x {cut.threads} threads for {cut.width} columns each, of "
        f"{TOGETHER} tokens {cut.turns} times; {cut.shared} B shared each.",
        [
            "ptx.launch_dependents()",
            f"s = ptx.shared({cut.shared})",
            "at = hyper_batch.enter(SPEC, m, s)",
            "ptx.wait()",
            "hyper_batch.project(SPEC, m, s, at)",
        ],
        threads=cut.threads,
        grid=(cut.blocks * cut.slices, 1, 1),
        spec=cut,
        record="hyper_batch.Mixed",
    )
    collapse = compose(
        "hyper_collapse",
        "\n".join([f"Streams collapsed and normalized: {of}", *_collapse(spec, "sum(parts)")]),
        {Parameter("x"): f"{stream}, x'", **parts, **leaves},
        f"Launch: {spec.rows} CTAs x {cut.collapsers} threads; {cut.collapse_shared} B shared each.",
        [
            "ptx.launch_dependents()",
            f"s = ptx.shared({cut.collapse_shared})",
            "ptx.wait()",
            "hyper_batch.collapse(SPEC, m, s)",
        ],
        threads=cut.collapsers,
        grid=(spec.rows, 1, 1),
        resident=COLLAPSERS // cut.collapsers or None,
        spec=cut,
        record="hyper_batch.Collapsed",
    )
    return mix, collapse


def _what(spec: HyperNormSpec) -> str:
    """For people."""
    what = "The head's collapse and norm" if spec.head else "Streams mixed, collapsed and normalized"
    lines = [f"{what}: N tokens of {STREAMS} streams x {spec.hidden} columns.", ""]
    if spec.ranks > 1:
        lines += [
            f"    f       = bf16(the sum of {spec.ranks} ranks' rows, in f32 and in order of the ranks)"
        ]
    return "\n".join([*lines, _mixing(spec), *_collapse(spec, "(x' . fn)")])


def _mixing(spec: HyperNormSpec) -> str:
    """The formula of mixed streams."""
    comb = f"comb = sinkhorn(logits), {spec.iterations} iterations"
    return f"    x'_k    = bf16(post_k f + sum_j comb[j,k] x_j), {comb}" if spec.mix else "    x'      = x"


def _collapse(spec: HyperNormSpec, projections: str) -> list[str]:
    """The formulas of what follows."""
    return [
        f"    m       = {projections} * rsqrt(mean(x'^2) + {spec.norm_eps});  z_i = m_i * scale + base_i",
        f"    a       = bf16(sum_i (sigmoid(z_i) + {spec.hc_eps}) x'_i)",
        f"    normed  = bf16(a * rsqrt(mean(a^2) + {spec.norm_eps}) * gain)",
        *([] if spec.head else ["    post'_k = 2 sigmoid(z_4+k);  logits' = z_8..23"]),
        *(["    q       = normed as e4m3 with one ue8m0 scale per 128"] if spec.fp8 else []),
    ]


def _operands(spec: HyperNormSpec, p: int) -> dict[Parameter, str | None]:
    """Types by parameter, in ABI order; None for what the kernel does without. `p` rows of fn."""
    h = spec.hidden
    early = spec.mix and spec.rows <= FEW_ROWS

    def some(there: bool, text: str) -> str | None:
        return text if there else None

    exchange, site = EXCHANGE
    addends = spec.mix and spec.ranks > 1
    return {
        Parameter("x", early=early): f"bf16[N,4,{h}]",
        Parameter("f"): some(spec.mix, f"f32[N,{h}], this rank's addends" if addends else f"bf16[N,{h}]"),
        exchange: some(addends, EXCHANGED[exchange]),
        site: some(addends, EXCHANGED[site]),
        Parameter("post", early=early): some(spec.mix, "f32[N,4]"),
        Parameter("logits", early=early): some(spec.mix, "f32[N,4,4]"),
        Parameter("fn"): f"f32[{p},{4 * h}]",
        Parameter("base"): f"f32[{p}]",
        Parameter("scale"): f"f32[{1 if spec.head else 3}]",
        Parameter("gain"): f"bf16[{h}]",
        Parameter("x_out"): some(spec.keep, f"bf16[N,4,{h}]"),
        Parameter("post_out"): some(not spec.head, "f32[N,4]"),
        Parameter("logits_out"): some(not spec.head, "f32[N,4,4]"),
        Parameter("normed"): some(spec.bf16, f"bf16[N,{h}]"),
        Parameter("plain"): some(spec.plain, f"bf16[N,{h}]"),
        Parameter("q"): some(spec.fp8, f"e4m3[N,{h}]"),
        Parameter("q", "scale"): some(spec.fp8, f"ue8m0[N,{h // 128}]"),
    }


# Binding ----------------------------------------------------------------------------------------------------


MIXED = takes(HyperNorm, "norm_eps", "hc_eps", "format", "iterations")
HEAD = takes(Head, "norm_eps", "hc_eps", "iterations")


@kernel(MIXED, takes(HyperNormFirst, "norm_eps", "hc_eps", "format"), HEAD)
def hyper_norm(request: Request) -> Answer:
    return _boundary(request, request.call, None)


@kernel(takes(AllReduce, "ranks", "out"), MIXED, HEAD, chained=True)
def summed_hyper_norm(request: Request) -> Answer:
    if len(request.calls) != 2 or not isinstance(request.calls[0].op, AllReduce):
        return No("takes a sum over ranks, and the boundary that mixes it")
    total, boundary = request.calls
    assert isinstance(total.op, AllReduce)
    if boundary.operands.get("f") != total.outputs[0] or request.readers[total.outputs[0]]:
        return No("adds up what the boundary mixes and nobody else reads")
    rows = request.types[total.inputs[0]].shape[0]
    if total.op.out != BF16 or rows > FEW_ROWS:
        return No(f"adds up at most {FEW_ROWS} rows, to {BF16}; here {rows} to {total.op.out}")
    return _boundary(request, boundary, total)


def _boundary(request: Request, call: Call, total: Call | None) -> Answer:
    """A boundary, and the sum over ranks of what it mixes."""
    op, x = call.op, call.operands
    assert isinstance(op, HyperNormFirst | Head)
    streams = request.types[x["streams"]]
    if not holds(streams, BF16) or streams.shape[1] != STREAMS:
        return No(f"mixes {STREAMS} streams of bf16, not {streams}")
    names = ["normed", *(["post_out", "logits_out", "q"] if isinstance(op, HyperNormFirst) else ["plain"])]
    if not isinstance(op, HyperNormFirst) or isinstance(op, HyperNorm):
        names = ["x_out", *names]
    made = {names[place]: number for place, number in call.made.items()}
    if isinstance(op, HyperNormFirst) and op.format not in (None, FP8_ROW, NVFP4_ROW):
        return No(f"quantizes the row to {FP8_ROW} or {NVFP4_ROW}, not {op.format}")
    packed = "q" in made and isinstance(op, HyperNormFirst) and op.format == NVFP4_ROW
    spec = HyperNormSpec(
        rows=streams.shape[0],
        hidden=streams.shape[2],
        norm_eps=op.norm_eps,
        hc_eps=op.hc_eps,
        iterations=op.iterations if isinstance(op, HyperNorm | Head) else 1,
        mix="f" in x,
        keep="x_out" in made,
        head=isinstance(op, Head),
        bf16="normed" in made or packed,
        fp8="q" in made and not packed,
        plain="plain" in made,
        ranks=total.op.ranks if total is not None and isinstance(total.op, AllReduce) else 1,
    )
    values = {**x, "x": x["streams"], "scale": x["scales"], **made}
    if total is not None:
        values["f"] = total.inputs[0]
    words = spec.rows * spec.hidden if total is not None else 0
    row = (spec.rows, spec.hidden)
    coefficients = {"post_out": (spec.rows, STREAMS), "logits_out": (spec.rows, STREAMS, STREAMS)}
    scratch: dict[str, Scratch] = {}  # what nobody reads
    for name, shape in coefficients.items() if not spec.head else ():
        scratch |= scratch_for(name, TensorType(F32, shape), "w") if name not in made else {}
    if packed and "normed" not in made:
        scratch |= {"normed": scratch_for("row", TensorType(BF16, row), "w")["row"]}
    if spec.rows > FEW_ROWS:
        launches = _many(request, spec, values, scratch)
    else:
        emission = emit_hyper_norm(spec, request.arch)
        stage = "norm" if packed else ""
        launches = [exchanging(request, emission, values, words, stage=stage, scratch=scratch)]
    if packed:
        operands = {"x": made["normed"], "q": made["q"]} if "normed" in made else {"q": made["q"]}
        launches.append(quantize_rows(request, operands, row))
    return launches


def _many(
    request: Request, spec: HyperNormSpec, values: dict[str, int], scratch: dict[str, Scratch]
) -> list[Launchable]:
    """The launches of a boundary of many rows. Mixed streams are scratch where nobody keeps them."""
    mix, collapse = emit_hyper_batch(spec, request.arch)
    cut = spec.batch(request.arch)
    made = scratch_for("parts", TensorType(F32, (spec.rows, cut.slices, cut.sums)), "w")
    mixed = {**values, "x": values.get("x_out", values["x"])}
    if spec.mix and not spec.keep:
        made |= scratch_for("x_out", TensorType(BF16, (spec.rows, STREAMS, spec.hidden)), "w")
        del mixed["x"]
    read = {"x" if n == "x_out" else n: Scratch(a.name, a.nbytes, "r") for n, a in made.items()}
    return [
        launchable(request, mix, values, stage="mix", scratch=made),
        launchable(request, collapse, mixed, stage="collapse", scratch={**scratch, **read}, read=("x",)),
    ]
