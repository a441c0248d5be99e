"""Kernels at a step's ends: embedding, last rows, argmax, positions. The head's norm is in `hyper_norm`."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Emission, Parameter, compose, floor_text
from dsv4c.codegen.kernels.formats import holds
from dsv4c.codegen.lib.slices import STREAMS, Draft, Embedding, Largest, LastRow, Run
from dsv4c.codegen.registry import Answer, No, Request, kernel, launchable, takes
from dsv4c.errors import BuildError
from dsv4c.ir.ops.sample import Argmax, LastRows
from dsv4c.ir.ops.state import Advance, Positions
from dsv4c.passes.fusions.drafts import PickDraft
from dsv4c.passes.fusions.embed import Embed
from dsv4c.types import BF16, F32


@dataclass(frozen=True)
class EmbedSpec:
    """table bf16[vocabulary, hidden], ids i32[rows] -> x bf16[rows, 4, hidden]."""

    rows: int
    hidden: int


@dataclass(frozen=True)
class LastRowsSpec:
    """x bf16[sequences * tokens, hidden], lengths i32[sequences] -> y bf16[sequences, hidden]."""

    sequences: int
    tokens: int
    hidden: int


@dataclass(frozen=True)
class ArgmaxSpec:
    """logits f32[rows, vocabulary] -> token i32[rows]."""

    rows: int
    vocabulary: int


@dataclass(frozen=True)
class PickDraftSpec:
    """base f32[sequences, block, vocabulary], bias f32[sequences, vocabulary] -> token i32[sequences], of the
    largest sum with row `step`. By flag: the sums as `logits`; known bf16[sequences, width], the rows of
    `table` that the tokens name, where it has a `width`.
    """

    sequences: int
    block: int
    step: int
    vocabulary: int
    width: int = 0
    logits: bool = True


@dataclass(frozen=True)
class AdvanceSpec:
    """start i32[S], slots, lengths i32[sequences]: start[slots] += lengths in place, where there are any."""

    sequences: int


@dataclass(frozen=True)
class PositionsSpec:
    """start i32[S], slots, lengths i32[sequences] -> positions and their slots, i32[sequences * tokens] each.

    Positions are start[slot] and on, -1 from `lengths` on, where slots are 0. A sequence of length 0 may have
    any slot, -1 too.
    """

    sequences: int
    tokens: int = 1


def emit_embed(spec: EmbedSpec) -> Emission:
    """The embedding's copy. Raises BuildError unless rows are whole 16-byte pieces.

    It lets its successor begin behind its wait: launches behind it may read where rows are before theirs.
    """
    if spec.hidden % 8:
        raise BuildError(f"embedding of {spec.hidden} columns: want a multiple of 8, for 16-byte copies")
    e = Embedding(spec.hidden, STREAMS, threads=min(128, -(-spec.hidden // 256) * 32))
    ctas = -(-spec.hidden // (8 * e.threads))
    return compose(
        "embed",
        f"Embedding: the row of each of N tokens, copied to {STREAMS} streams.",
        {
            Parameter("table"): f"bf16[*,{spec.hidden}]",
            Parameter("ids"): "i32[N]",
            Parameter("x"): f"bf16[N,{STREAMS},{spec.hidden}]",
        },
        f"Launch: {ctas} CTAs x {e.threads} threads per token, 8 columns each.\n"
        f"Reads {2 * spec.hidden} B and writes {2 * STREAMS * spec.hidden} B per token.",
        ("ptx.wait()", "ptx.launch_dependents()", "embed.copy_row(SPEC, m)"),
        threads=e.threads,
        grid=(ctas, "rows", 1),
        sizes={"rows": spec.rows},
        spec=e,
    )


def emit_last_rows(spec: LastRowsSpec) -> Emission:
    """The copy of rows. Raises BuildError unless they are whole 16-byte pieces."""
    if spec.hidden % 8:
        raise BuildError(f"last rows of {spec.hidden} columns: want a multiple of 8, for 16-byte copies")
    pieces = spec.hidden // 8
    r = LastRow(spec.tokens, spec.hidden, threads=min(256, -(-pieces // 32) * 32))
    ctas, several = -(-pieces // r.threads), "s" if spec.tokens > 1 else ""
    return compose(
        "last_rows",
        f"The last of up to {spec.tokens} row{several} of each of B sequences, copied; zeros where there is "
        "none.",
        {
            Parameter("x"): f"bf16[B * {spec.tokens},{spec.hidden}]",
            Parameter("lengths"): "i32[B]",
            Parameter("y"): f"bf16[B,{spec.hidden}]",
        },
        f"Launch: {ctas} CTAs x {r.threads} threads per sequence, 16 bytes each.",
        ("ptx.launch_dependents()", "ptx.wait()", "last_rows.copy_row(SPEC, m)"),
        threads=r.threads,
        grid=(ctas, "sequences", 1),
        sizes={"sequences": spec.sequences},
        spec=r,
    )


def emit_argmax(spec: ArgmaxSpec, arch: Arch) -> Emission:
    """The argmax: a cluster per row."""
    c = cut_logits(spec.vocabulary)
    return compose(
        "argmax",
        f"The next token: column of the largest of {c.columns} logits, the lowest on ties, of each row.",
        {Parameter("logits"): f"f32[N,{c.columns}]", Parameter("token"): "i32[N]"},
        _launch(c, "row", 4, arch),
        _stages(c.shared, "SPEC", "argmax.choose"),
        threads=c.threads,
        grid=(f"rows * {c.ctas}", 1, 1),
        sizes={"rows": spec.rows},
        cluster=c.ctas,
        spec=c,
    )


def emit_pick_draft(spec: PickDraftSpec, arch: Arch) -> Emission:
    """The choice of a draft: a cluster per sequence. Raises BuildError unless rows of the table are whole
    16-byte pieces.
    """
    if spec.width % 8:
        raise BuildError(f"a table of {spec.width} columns: want a multiple of 8, for 16-byte copies")
    c, n = cut_logits(spec.vocabulary), spec.vocabulary
    known = ";  known = table[token]" if spec.width else ""
    return compose(
        "pick_draft",
        f"A draft: of {n} biased logits the largest one's column, the lowest on ties, of each sequence.\n\n"
        f"    logits = base[:, {spec.step}] + bias;  token = argmax(logits){known}",
        {
            Parameter("base"): f"f32[N,{spec.block},{n}]",
            Parameter("bias"): f"f32[N,{n}]",
            Parameter("table"): f"bf16[*,{spec.width}]" if spec.width else None,
            Parameter("logits"): f"f32[N,{n}]" if spec.logits else None,
            Parameter("token"): "i32[N]",
            Parameter("known"): f"bf16[N,{spec.width}]" if spec.width else None,
        },
        _launch(c, "sequence", 8, arch),
        _stages(c.shared, "SPEC.cut", "pick_draft.choose"),
        threads=c.threads,
        grid=(f"rows * {c.ctas}", 1, 1),
        sizes={"rows": spec.sequences},
        cluster=c.ctas,
        spec=Draft(c, spec.block, spec.step, spec.width),
    )


def cut_logits(vocabulary: int) -> Largest:
    """A cluster for a row of logits: of as many CTAs as there is work for."""
    pieces = vocabulary // (1 if vocabulary % 4 else 4)
    ctas = next(c for c in (16, 8, 4, 2) if c == 2 or pieces >= 128 * c)
    return Largest(vocabulary, ctas, threads=min(512, -(-pieces // (32 * ctas)) * 32))


def _launch(c: Largest, each: str, read: int, arch: Arch) -> str:
    return (
        f"Launch: a cluster of {c.ctas} CTAs x {c.threads} threads per {each}, {c.width} columns each; "
        f"{c.shared} B shared each.\n{floor_text(read * c.columns, arch, each)}"
    )


def _stages(shared: int, cut: str, choose: str) -> tuple[str, ...]:
    return (
        "ptx.launch_dependents()",
        f"s = ptx.shared({shared})",
        f"at = head.enter({cut}, s)",
        "ptx.wait()",
        f"{choose}(SPEC, m, s, at)",
    )


def emit_positions(spec: PositionsSpec) -> Emission:
    """The positions of a step's tokens."""
    p = Run(spec.tokens, threads=min(256, -(-spec.tokens // 32) * 32))
    several = "s" if spec.tokens > 1 else ""
    return compose(
        "positions",
        f"Positions of {spec.tokens} token{several} of each of B sequences, and their slots: start + t, -1 "
        "from lengths on.",
        {
            Parameter("start"): "i32[S]",
            Parameter("slots"): "i32[B], of S; any for a length of 0",
            Parameter("lengths"): "i32[B]",
            Parameter("positions"): f"i32[B * {spec.tokens}]",
            Parameter("row_slots"): f"i32[B * {spec.tokens}], 0 where there is no position",
        },
        f"Launch: {p.ctas} CTA{'s' if p.ctas > 1 else ''} of {p.threads} threads per sequence.",
        ("ptx.launch_dependents()", "ptx.wait()", "positions.count(SPEC, m)"),
        threads=p.threads,
        grid=("sequences", p.ctas, 1),
        sizes={"sequences": spec.sequences},
        spec=p,
    )


def emit_advance(spec: AdvanceSpec) -> Emission:
    """The positions' update."""
    return compose(
        "advance",
        "Positions move on: start += lengths of each of B sequences at its slot, in place. Last of a step.",
        {
            Parameter("start"): "i32[S]",
            Parameter("slots"): "i32[B], of S; any for a length of 0",
            Parameter("lengths"): "i32[B]",
        },
        "Launch: one CTA of 32 threads per sequence.",
        ("ptx.launch_dependents()", "ptx.wait()", "positions.advance(m)"),
        threads=32,
        grid=("sequences", 1, 1),
        sizes={"sequences": spec.sequences},
        record="positions.Advanced",
    )


# Binding ----------------------------------------------------------------------------------------------------


@kernel(takes(Positions, "tokens"))
def positions(request: Request) -> Answer:
    call = request.call
    assert isinstance(call.op, Positions)
    at, row_slots = call.outputs
    spec = PositionsSpec(request.types[call.operands["lengths"]].shape[0], call.op.tokens)
    values = {**call.operands, "positions": at, "row_slots": row_slots}
    return [launchable(request, emit_positions(spec), values)]


@kernel(takes(Embed, "streams"))
def embed(request: Request) -> Answer:
    call = request.call
    assert isinstance(call.op, Embed)
    x = call.operands
    table = request.types[x["table"]]
    if not holds(table, BF16):
        return No(f"copies rows of bf16, the table is {table}")
    if call.op.streams != STREAMS:
        return No(f"copies to {STREAMS} streams, not {call.op.streams}")
    spec = EmbedSpec(request.types[x["tokens"]].shape[0], table.shape[1])
    values = {"table": x["table"], "ids": x["tokens"], "x": call.outputs[0]}
    return [launchable(request, emit_embed(spec), values)]


@kernel(LastRows)
def last_rows(request: Request) -> Answer:
    x, y = request.call.operands, request.call.outputs[0]
    rows, lengths = request.types[x["x"]], request.types[x["lengths"]]
    if not holds(rows, BF16) or len(rows.shape) != 2:
        return No(f"copies rows bf16[N,H], not {rows}")
    sequences = lengths.shape[0]
    spec = LastRowsSpec(sequences, rows.shape[0] // sequences, rows.shape[1])
    return [launchable(request, emit_last_rows(spec), {**x, "y": y})]


@kernel(Argmax)
def argmax(request: Request) -> Answer:
    call = request.call
    logits = request.types[call.inputs[0]]
    if not holds(logits, F32) or len(logits.shape) != 2:
        return No(f"takes logits f32[N,V], not {logits}")
    values = {"logits": call.inputs[0], "token": call.outputs[0]}
    return [launchable(request, emit_argmax(ArgmaxSpec(*logits.shape), request.arch), values)]


@kernel(takes(PickDraft, "step"))
def pick_draft(request: Request) -> Answer:
    call = request.call
    assert isinstance(call.op, PickDraft)
    x, made = call.operands, call.made
    base, bias = request.types[x["base"]], request.types[x["bias"]]
    if not holds(base, F32) or not holds(bias, F32):
        return No(f"adds logits f32, not {base} and {bias}")
    table = request.types[x["table"]] if "table" in x else None
    if table is not None and not holds(table, BF16):
        return No(f"copies rows of bf16, the table is {table}")
    sequences, block, vocabulary = base.shape
    width = 0 if table is None or 2 not in made else table.shape[1]
    spec = PickDraftSpec(sequences, block, call.op.step, vocabulary, width, 0 in made)
    values = {**x, **{name: made[i] for i, name in enumerate(("logits", "token", "known")) if i in made}}
    return [launchable(request, emit_pick_draft(spec, request.arch), values)]


@kernel(Advance)
def advance(request: Request) -> Answer:
    x = request.call.operands
    spec = AdvanceSpec(request.types[x["lengths"]].shape[0])
    return [launchable(request, emit_advance(spec), x)]
