"""A checkpoint on several GPUs: python -m tests.gpu.check_ranks_load PLAN CHECKPOINT [--beside PLAN].

Binds the plan of several ranks to the checkpoint and says at which rate. Of some layers, what lies on every
GPU must be, byte for byte, what the same parts are when the host puts them together. With `--beside`, another
plan of the model, on one GPU or on the CPU, logits of both are compared: they differ as sums in another order
do. Says what the whole of a model would take at this rate.

A small model on the CPU, one rank against two, 44 tokens: at most 2.4e-7 apart in `fp32` and 0.0095 in
`bf16`; in `official` half of them 0.045, one in twenty 0.34 and one 0.52, where a code or a choice of experts
flips and what is behind it follows. So of recipes that quantize rows the median is bounded, and of others
every token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsv4c.config import load_config
from dsv4c.exchange import MOST_ROWS
from dsv4c.models.weights import inventory
from dsv4c.plan.folder import Plan, load
from dsv4c.runtime.bind import check
from dsv4c.runtime.ranks import CudaRanks
from dsv4c.runtime.residence import Loaded, load_weights
from dsv4c.runtime.session import Session
from dsv4c.scope import LAYERS, Scope
from tests.gpu.check_ranks import prompt_of

STEPS = 4  # after the prompt
BOUNDS = {"fp32": 1e-5, "bf16": 0.02}  # of every token's logits: |a - b| / |b|
QUANTIZED = 0.3  # of the median; unrelated logits are 1.2 to 1.4 apart


def differing(plan: Plan, checkpoint: Path, blocks: Sequence[Tensor], layers: Sequence[int]) -> list[str]:
    """Weights of some layers, and those outside of layers, whose bytes on some GPU are not the host's."""
    opened, residents = check(plan, checkpoint)
    places = {resident.record.name: Scope.of(resident.record.name) for resident in residents}
    chosen = [
        resident
        for resident in residents
        if places[resident.record.name].block != LAYERS or places[resident.record.name].number in layers
    ]
    wanted = [torch.empty(plan.blocks["weights"], dtype=torch.uint8) for _ in blocks]
    reader = opened.sparing(resident.record for resident in residents)
    load_weights(reader, chosen, dict(enumerate(wanted)))
    found = []
    for resident in chosen:
        for rank, (block, host) in enumerate(zip(blocks, wanted, strict=True)):
            for name, offset, nbytes in resident.components:
                part = slice(offset, offset + nbytes)
                if not torch.equal(block[part].cpu(), host[part]):
                    found.append(f"{resident.record.name}.{name} of rank {rank}")
    return found


def first_logits(session: Session, length: int) -> Tensor:
    """Of a prompt's tokens, of a long one's last alone, and of some after them."""
    prompt = prompt_of(length, session.vocab_size)
    rows = [session.prefill(prompt, logits="all" if length <= MOST_ROWS else "last")]
    return torch.cat([*rows, *(session.decode([token])[:1] for token in prompt[:STEPS])]).cpu()


def main() -> int:
    """Bind, compare, tell; the exit code counts what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--beside", type=Path, help="another plan of the model, for one GPU or the CPU")
    parser.add_argument("--prompt", type=int, default=8, help="tokens whose logits are compared")
    parser.add_argument("--whole", default="deepseek-v4-flash", help="the model whose time is computed")
    parser.add_argument("--layers", default="3,4", help="layers whose bytes are compared")
    parser.add_argument("--workers", type=int, help="threads that read")
    asked = parser.parse_args()
    plan = load(asked.plan)
    began = time.perf_counter()
    session = plan.bind(asked.checkpoint, workers=asked.workers)
    session.wait()
    assert isinstance(session.executor, CudaRanks)
    assert isinstance(session.loaded, Loaded)
    print(f"{plan.name}, {plan.ranks} ranks: {session.loaded}; bound in {time.perf_counter() - began:.1f} s")
    whole = sum(spec.nbytes for spec in inventory(load_config(asked.whole), "release"))
    seconds = whole * session.loaded.seconds / session.loaded.nbytes
    print(f"the whole of {asked.whole}, {whole / 1e9:.1f} GB, would take {seconds:.0f} s", flush=True)
    failed = 0
    layers = [int(number) for number in asked.layers.split(",") if number]
    blocks = [rank.blocks["weights"] for rank in session.executor.ranks]
    wrong = differing(plan, asked.checkpoint, blocks, layers)
    print(f"  {'WRONG' if wrong else 'ok':6} bytes of layers {asked.layers}: {len(wrong)} differ {wrong[:4]}")
    failed += bool(wrong)
    if asked.beside is not None:
        several, other = (
            first_logits(bound, asked.prompt)
            for bound in (session, load(asked.beside).bind(asked.checkpoint))
        )
        apart = [float((a - b).norm() / b.norm()) for a, b in zip(several, other, strict=True)]
        same = int((several.argmax(1) == other.argmax(1)).sum())
        middle = statistics.median(apart)
        right = max(apart) <= BOUNDS[plan.recipe] if plan.recipe in BOUNDS else middle <= QUANTIZED
        verdict = "ok" if right else "WRONG"
        print(
            f"  {verdict:6} logits beside {asked.beside.name}: {middle:.2g}, at most {max(apart):.2g} apart"
        )
        print(f"         {' '.join(f'{a:.2g}' for a in apart)}; {same} of {len(other)} choose the same")
        failed += not right
    return failed


if __name__ == "__main__":
    sys.exit(main())
