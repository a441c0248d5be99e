"""Rounds against plain steps, token for token: a small model whose drafts hold now and then, drafts that hold
as often as is wished, and drafts made to mislead.

    python -m tests.drafting [--prompts 200] [--head mtp] [--device]

runs many prompts of every kind and prints how often how many drafts held; `--device` on this machine's GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dsv4c
from dsv4c.config import load_config
from dsv4c.models.synth import synthesize
from dsv4c.numerics.codec import parts_of, quantize
from dsv4c.runtime.bind import machine_target
from dsv4c.runtime.sampling import Sampling
from dsv4c.runtime.session import Session
from dsv4c.types import FP8_WEIGHT
from tests.words import CONFIG

Head = Literal["mtp", "dspark"]
VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "num_hash_layers": 1,
    "n_routed_experts": 4,
    "hidden_size": 128,
    "index_topk": 64,
}
DSPARK = {
    "dspark_block_size": 5,
    "dspark_noise_token_id": VOCABULARY - 1,
    "dspark_target_layer_ids": [0, 1, 2],
    "dspark_markov_rank": 64,
}


def learned(folder: Path, head: Head, *, quantized: bool = False, seed: int = 1, ranks: int = 1) -> Path:
    """A random checkpoint of a window layer and one of each compressor, that has learned a little: after a
    token it mostly says its fixed successor, and so does what drafts. Plain, or in the release's formats; of
    sizes that so many ranks divide.
    """
    raw = json.loads(CONFIG.read_text()) | SIZES
    raw["moe_intermediate_size"] *= ranks
    for key in () if quantized else ("quantization_config", "expert_dtype"):
        del raw[key]
    raw |= DSPARK if head == "dspark" else {}
    raw["compress_ratios"] = [0, 4, 128, *[0] * (3 if head == "dspark" else 1)]
    weights = synthesize(load_config(raw), folder, seed)
    file = weights / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(seed)
    embed = torch.randn(VOCABULARY, raw["hidden_size"], generator=generator)
    after = torch.randperm(VOCABULARY, generator=generator)
    tensors["embed.weight"] = 6 * embed
    tensors["head.weight"] = torch.empty_like(embed)
    tensors["head.weight"][after] = embed
    if head == "mtp":
        through = 0.4 * torch.eye(raw["hidden_size"])
        tensors["mtp.0.e_proj.weight"] = through
        if quantized:
            encoded = quantize(through, FP8_WEIGHT)
            tensors["mtp.0.e_proj.weight"], tensors["mtp.0.e_proj.scale"] = encoded.data, encoded.scale
    else:
        known = torch.randn(VOCABULARY, DSPARK["dspark_markov_rank"], generator=generator)  # type: ignore[call-overload]
        names = [f"mtp.2.markov_head.markov_w{i}.weight" for i in (1, 2)]
        tensors[names[0]], tensors[names[1]] = known, torch.empty_like(known)
        tensors[names[1]][after] = 4 * known
        tensors["mtp.2.confidence_head.proj.weight"] *= 0.125  # so that it is sure of little
        for token in range(0, VOCABULARY, 4):  # of some it has learned another
            tensors[names[1]][after[[token, token + 1]]] = tensors[names[1]][after[[token + 1, token]]]
    plain = {"embed.weight", "head.weight"} | {n for n in tensors if "markov" in n or "e_proj.weight" in n}
    made = {n: t.bfloat16() if n in plain and t.dtype is torch.float32 else t for n, t in tensors.items()}
    save_file(made, file, {"format": "pt"})
    return weights


def prompts(count: int, seed: int, longest: int = 40) -> Iterator[list[int]]:
    made = random.Random(seed)
    for _ in range(count):
        yield made.choices(range(VOCABULARY), k=made.randint(1, longest))


def begin(session: Session, prompt: Sequence[int], slot: int = 0) -> None:
    """A slot that has consumed all of a prompt but its last token, the first anchor."""
    session.reset(slot)
    if prompt[:-1]:
        session.prefill(prompt[:-1], slot)


def plainly(session: Session, prompt: Sequence[int], new: int) -> list[int]:
    """What the model says, a token a step."""
    session.reset(0)
    session.prefill(prompt)
    return [session.next_tokens[-1], *session.steps(new - 1, [0])[:, 0].tolist()]


def in_rounds(
    session: Session,
    prompt: Sequence[int],
    new: int,
    sampling: Sampling | None = None,
    least: float = 0.0,
) -> tuple[list[int], Counter[int]]:
    """What it says in rounds, and how many drafts held in how many of them; only those are judged that are
    likely to `least`.
    """
    begin(session, prompt)
    session.trust(0, least)
    if sampling is not None:
        session.choose(0, sampling)
    said: list[int] = []
    held: Counter[int] = Counter()
    first = {0: prompt[-1]}
    while len(said) < new:
        tokens = session.settle(session.say(1, first, [] if first else [0], rounds=True))[0]
        first = {}
        held[len(tokens) - 1] += 1
        said += tokens
    return said[:new], held


Drafter = Callable[[Sequence[int]], list[int]]
"""Drafts, from what the model will say."""


def oracle(share: float, count: int, seed: int) -> Drafter:
    """Drafts each of which is right with that probability."""
    made = random.Random(seed)

    def draft(truth: Sequence[int]) -> list[int]:
        return [token if made.random() < share else wrong(token) for token in truth[:count]]

    return draft


def misleading(count: int, seed: int) -> Drafter:
    """Drafts that repeat, come too early, or are right behind a wrong one."""
    made = random.Random(seed)

    def draft(truth: Sequence[int]) -> list[int]:
        right = list(truth[:count])
        early, first = [*right[1:], wrong(right[-1])], made.randrange(count)
        broken = [wrong(token) if i == first else token for i, token in enumerate(right)]
        return made.choice([early, broken, [right[0]] * count, [0] * count])

    return draft


def wrong(token: int) -> int:
    return (token + 1) % VOCABULARY


def with_given(
    session: Session, prompt: Sequence[int], truth: Sequence[int], new: int, drafter: Drafter, count: int
) -> tuple[list[int], Counter[int]]:
    """What it says where drafts are given, and how many held; `truth` goes beyond the last one."""
    begin(session, prompt)
    said: list[int] = []
    held: Counter[int] = Counter()
    anchor = prompt[-1]
    while len(said) < new:
        tokens = session.accept({0: [anchor, *drafter(truth[len(said) : len(said) + count])]})[0]
        held[len(tokens) - 1] += 1
        said += tokens
        anchor = tokens[-1]
    return said[:new], held


def kept(session: Session, slot: int) -> dict[str, Tensor]:
    """What a slot's positions name, by state: the rows of rings that later tokens look back to, in order, and
    the entries that are complete.
    """
    at = session.positions[slot]
    rows: dict[str, Tensor] = {}
    for name, value in session.executor.states.items():  # type: ignore[attr-defined]
        if name.endswith("position") or name.startswith("sampling."):
            continue
        path = name.rpartition(".")[2]
        for part, of_slots in parts_of(value).items():
            own = of_slots[slot]
            if path in ("entries", "keys"):
                found = own[: at // (4 if ".1." in name else 128)]
            else:
                reach = {"window": 127, "streams": 1}.get(path, 7 if ".1." in name else 127)
                found = own[[p % len(own) for p in range(max(0, at - reach), at)]]
            rows[f"{name}.{part}"] = found.reshape(-1).view(torch.uint8).clone()
    return rows


def compile_for(weights: Path, **options: object) -> Session:
    """A bound plan of a `learned` checkpoint."""
    given: dict[str, object] = {"recipe": "bf16", "max_context": 512, "certify": False, **options}
    return dsv4c.compile(weights, **given).bind(weights)  # type: ignore[arg-type]


def complete(held: Counter[int], count: int) -> bool:
    """Did all drafts hold somewhere, and did each place fail somewhere?"""
    return all(held[n] for n in range(count + 1))


COUNTS: dict[Head, int] = {"mtp": 3, "dspark": 5}


def compare(drafting: Session, judging: Session, head: Head, count: int, new: int) -> int:
    """Many prompts of every kind, their histograms printed. Returns how many kinds said something else than
    steps say, one more where a kind met none of what it is for, and one more where all together let some
    number of drafts never hold. (A kind alone need not have every number: nobody steers a head's own drafts.)
    """
    wrongs, all_held = 0, Counter[int]()
    given = list(prompts(count, 7))
    truth = [plainly(drafting, prompt, new + 8) for prompt in given]
    drafts = COUNTS[head]
    trusts = {"rounds": 0.0} | ({f"judged from {p}": p for p in (0.1, 0.3, 1.0)} if head == "dspark" else {})
    kinds: dict[str, Drafter | None] = {
        **dict.fromkeys(trusts),
        **{f"oracle {share}": oracle(share, drafts, 3) for share in (0.3, 0.7, 1.0)},
        "misleading": misleading(drafts, 5),
    }
    for name, drafter in kinds.items():
        held, equal = Counter[int](), True
        for prompt, wanted in zip(given, truth, strict=True):
            if drafter is None:
                said, own = in_rounds(drafting, prompt, new, least=trusts[name])
            else:
                said, own = with_given(judging, prompt, wanted, new, drafter, drafts)
            equal &= said == wanted[:new]
            held += own
        all_held += held
        full, none = held[drafts] > 0, held[0] > 0
        met = {"oracle 1.0": full and not none, "misleading": none, "judged from 1.0": not set(held) - {0}}
        met |= dict.fromkeys(("judged from 0.1", "judged from 0.3"), none)  # few are sure of all
        wrongs += (not equal) + (not met.get(name, full and none))
        found = "equal" if equal else "DIFFERS"
        print(
            f"{head:7} {name:15} {len(given)} prompts {found}, held {dict(sorted(held.items()))}", flush=True
        )
    if not complete(all_held, drafts):
        wrongs += 1
        print(
            f"{head:7} of 0 to {drafts} drafts some never held: {dict(sorted(all_held.items()))}", flush=True
        )
    return wrongs


def main() -> int:
    """Both heads, compiled here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--head", choices=COUNTS, help="only that one")
    parser.add_argument("--device", action="store_true")
    asked = parser.parse_args()
    sizes = {"target": machine_target() if asked.device else "cpu", "batch": 1, "chunk": 8}
    wrongs = 0
    with tempfile.TemporaryDirectory() as scratch:
        for head, count in COUNTS.items():
            if asked.head not in (None, head):
                continue
            weights = learned(Path(scratch) / head, head)
            own = {**sizes, "draft_tokens": count}
            judging = compile_for(weights, draft="given", **own)
            drafting = compile_for(weights, draft=head, draft_confidence=head == "dspark", **own)
            wrongs += compare(drafting, judging, head, asked.prompts, asked.new)
    return wrongs


if __name__ == "__main__":
    raise SystemExit(main())
