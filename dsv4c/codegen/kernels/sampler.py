"""The sampler: a token of each row, by its slot's knobs and history, in one launch of a cluster per row."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Emission, Parameter, compose, floor_text
from dsv4c.codegen.kernels.formats import holds
from dsv4c.codegen.lib.geometry import Sampling, Spread
from dsv4c.codegen.registry import Answer, No, Request, kernel, launchable
from dsv4c.errors import BuildError
from dsv4c.ir.ops.sample import KNOBS, STOPS
from dsv4c.passes.fusions.sampler import Sampler
from dsv4c.types import F32

RESULTS = ("chosen", "said", "going", "history")
THREADS = 512  # of a CTA
MOST_EACH = 16224  # columns of a CTA: a thread holds 32, and what half the lanes weigh adds up in 32 bits
WIDE_ROWS = 4  # each with a cluster of 16 CTAs; of more such clusters some would wait for others

WHAT = """\
The next token of each of N rows, by the knobs of its slot, and what was said in the slot's history.

    x       = logits, lowered by penalties of what the history has up to the row's position
    p       = exp((x - max x) / temperature) of the top_k largest, of those the top_p share, at least min_p
    next    = the first column whose p, summed from 0 on, exceed philox(seed, position + 1 - origin) of all
    said    = next, -1 where length is 0;  going = 0 after a stop, else length"""


@dataclass(frozen=True)
class SamplerSpec:
    """logits f32[rows, vocabulary]; tokens, lengths, positions, slots i32[rows]; history i32[S, capacity],
    origin i32[S], knobs f32[S, 7], seeds i32[S, 2], stops i32[S, 8] -> chosen, said, going i32[rows].
    """

    rows: int
    vocabulary: int
    capacity: int


def emit_sampler(spec: SamplerSpec, arch: Arch) -> Emission:
    """The kernel of a spec. Raises BuildError for vocabularies that no cluster holds."""
    n = spec.vocabulary
    if n % 4:
        raise BuildError(f"sampler of {n} tokens: want a multiple of 4, for 16-byte loads")
    widest = 16 if spec.rows <= WIDE_ROWS or n > 8 * MOST_EACH else 8
    ctas = next(c for c in (16, 8, 4, 2) if c == 2 or (c <= widest and n >= 512 * c))
    t = Spread(n, ctas, min(THREADS, -(-n // (4 * ctas * 32)) * 32))
    if t.each > MOST_EACH:
        raise BuildError(f"sampler of {n} tokens: a CTA of {ctas} has {t.each}, more than {MOST_EACH}")
    types = {
        "logits": f"f32[N,{n}]",
        "tokens": "i32[N]",
        "lengths": "i32[N]",
        "positions": "i32[N], -1 for none",
        "slots": "i32[N]",
        "history": f"i32[S,{spec.capacity}]",
        "origin": "i32[S]",
        "knobs": f"f32[S,{len(KNOBS)}]",
        "seeds": "i32[S,2]",
        "stops": f"i32[S,{STOPS}]",
        "chosen": "i32[N]",
        "said": "i32[N]",
        "going": "i32[N]",
    }
    return compose(
        "sampler",
        WHAT,
        {Parameter(name): type_ for name, type_ in types.items()},
        f"Launch: a cluster of {t.ctas} CTAs x {t.threads} threads per row, {t.each} columns each; "
        f"{t.shared} B shared each.\n{floor_text(4 * n, arch, 'row')}",
        (
            "ptx.launch_dependents()",
            f"s = ptx.shared({t.shared})",
            "at = sampler.enter(SPEC, s)",
            "ptx.wait()",
            "sampler.choose(SPEC, m, s, at)",
        ),
        threads=t.threads,
        grid=(f"rows * {ctas}", 1, 1),
        sizes={"rows": spec.rows},
        cluster=ctas,
        spec=Sampling(t, spec.capacity, len(KNOBS), STOPS),
    )


# Binding ----------------------------------------------------------------------------------------------------


@kernel(Sampler)
def sampler(request: Request) -> Answer:
    call = request.call
    x = call.operands
    logits, history = request.types[x["logits"]], request.types[x["history"]]
    if not holds(logits, F32):
        return No(f"takes logits of f32, not {logits}")
    if len(call.made) != len(RESULTS):
        return No(f"writes {', '.join(RESULTS)}, of which somebody reads {len(call.made)}")
    rows, vocabulary = logits.shape
    spec = SamplerSpec(rows, vocabulary, history.shape[1])
    made = {RESULTS[place]: number for place, number in call.made.items()}
    return [launchable(request, emit_sampler(spec, request.arch), {**made, **x})]
