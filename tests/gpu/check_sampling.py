"""Sampling on a GPU: python -m tests.gpu.check_sampling [--weights DIR].

The recorded probabilities within 1e-6; 200,000 draws by their frequencies, and as the reference draws them;
tokens of a tiny plan, seed for seed those of the CPU's while logits agree, in any slot and company, up to a
stop; then answers of Flash's first layers, timed beside bare steps. Needs torch, cuda-bindings, tokenizers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dsv4c.config import load_config
from dsv4c.models.synth import synthesize
from dsv4c.plan.folder import load
from dsv4c.reference.sample import philox
from dsv4c.runtime.answer import Done
from dsv4c.runtime.sampling import Sampling
from tests.goldens import golden_case
from tests.gpu.check_rows import Kernel
from tests.words import write_tokenizer

FOLDER = Path("build/gpu/sampling")
DRAWS = 4000  # rows of a call
ANSWER = 2000
ROUNDS = 9


def check_recorded(kernels: dict[str, Kernel]) -> None:
    case = json.loads((golden_case("sampling") / "case.json").read_text())
    expected = load_file(golden_case("sampling") / "expected.safetensors")
    said = case["previous_ids"]
    history = torch.zeros(4, 256, dtype=torch.int32)
    for row, ids in enumerate(said):
        history[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    at = torch.tensor([len(ids) - 1 for ids in said], dtype=torch.int32)
    slots, origin = torch.arange(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    worst = 0.0
    for given in case["parameter_sets"]:
        knobs = torch.tensor([Sampling(**{n: given[n][row] for n in names}).knobs for row in range(4)])
        (lowered,) = kernels["penalize"].run([expected["logits"], history, at, slots, origin, knobs])
        (found,) = kernels["token_probabilities"].run([lowered, slots, knobs])
        assert isinstance(found, Tensor)
        off = float((found.double() - expected[f"probs.{given['name']}"]).abs().max())
        assert off <= case["tolerance"]["probs_abs"], (given["name"], off)
        assert (found > 0).sum(1).tolist() == expected[f"kept.{given['name']}"].tolist(), given["name"]
        worst = max(worst, off)
    print(f"recorded: {len(case['parameter_sets'])} sets, worst {worst:.1e} of 1e-6")


def check_draws(kernel: Kernel) -> None:
    p = torch.tensor([0.25, 0.0, 0.2, 0.001, 0.149, 0.1, 0.3])
    sums = (p.double() * 2.0**40).floor().cumsum(0)
    rows, zeros = p.expand(DRAWS, -1), torch.zeros(DRAWS, dtype=torch.int32)
    seeds, counts = torch.tensor([[3, 5]], dtype=torch.int32), torch.zeros(len(p))
    for call in range(200_000 // DRAWS):
        at = torch.arange(call * DRAWS, (call + 1) * DRAWS, dtype=torch.int32)
        (drawn,) = kernel.run([rows, at, zeros, zeros[:1], seeds])
        number = (philox(seeds.expand(DRAWS, -1), at + 1) + 0.5) * 2.0**-32
        wanted = torch.searchsorted(sums, number * sums[-1], right=True)
        assert isinstance(drawn, Tensor)
        assert torch.equal(drawn.long(), wanted)
        counts += torch.bincount(drawn.long(), minlength=len(p))
    kept = p > 0
    chi_square = float(((counts - p * counts.sum()) ** 2 / (p * counts.sum()))[kept].sum())
    assert chi_square < 22.46, chi_square
    print(f"draws: {int(counts.sum()):,}, each the reference's, chi-square {chi_square:.1f} of 22.5")


def check_tiny(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        weights = synthesize(load_config("tiny"), Path(scratch) / "weights", 1)
        device = load(folder / "tiny-sm_90a.plan").bind(weights)
        host = load(folder / "tiny-cpu.plan").bind(weights)
    how = Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.2, seed=7)
    found = []
    for session in (device, host):
        session.prefill([3, 17])
        session.choose(0, how)
        found.append(session.settle(session.say(16, {0: 5}))[0])
    same = next((i for i, (a, b) in enumerate(zip(*found, strict=True)) if a != b), 16)
    print(f"tiny: the first {same} of 16 tokens as on the CPU")
    assert same == 16
    device.reset()
    device.prefill([9, 9, 9], 0)
    device.prefill([3, 17], 3)
    stop = next(i for i, token in enumerate(found[0]) if i > 4 and token not in found[0][:i])
    device.choose(0, Sampling(temperature=2.0, seed=1))
    device.choose(3, how, [found[0][stop]])
    first = device.say(4, {0: 1, 3: 5})
    rest = device.say(12, slots=[3, 0])
    said = [device.settle(first)[3], device.settle(rest)]
    assert said[0] + said[1][3] == found[0][: stop + 1]
    assert len(said[1][0]) == 12
    assert device.positions == [19, 0, 0, 3 + stop]
    print(f"tiny: in another slot and company the same, up to its stop at token {stop}")


def check_flash(folder: Path, weights: Path) -> None:
    if not weights.exists():
        started = time.perf_counter()
        synthesize(load_config(folder / "config.json"), weights, 1)
        print(f"synth: {time.perf_counter() - started:.0f} s")
    write_tokenizer(weights)
    session = load(folder / "flash.plan").bind(weights)
    warm = Sampling(temperature=1.0, top_p=0.95, seed=1)
    answer = session.generate("Hello", sampling=warm, max_new_tokens=ANSWER)
    done = next(event for event in answer if isinstance(event, Done))
    print(
        f"flash: {len(done.ids)} tokens, {done.reason}, first after {done.seconds_to_first:.3f} s, "
        f"{done.tokens_per_second:.1f} tokens/s"
    )
    ratios = []
    for round_ in range(ROUNDS):
        how = Sampling(temperature=1.0, seed=round_)
        (made,) = (
            e for e in session.generate("Hello", sampling=how, max_new_tokens=256) if isinstance(e, Done)
        )
        each = 1 / made.tokens_per_second
        session.reset(0)
        session.prefill([3], 0)
        session.wait()
        started = time.perf_counter()
        session.enqueue(256, [0])
        session.wait()
        ratios.append(each / ((time.perf_counter() - started) / 256))
    print(
        f"flash: a token of `generate` takes {statistics.median(ratios):.3f} of a bare step, {ROUNDS} rounds"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--weights", type=Path, help="of Flash's first layers, made where there are none")
    options = parser.parse_args()
    torch.zeros(1, device="cuda")
    print(torch.cuda.get_device_name())
    described = json.loads((options.folder / "cases.json").read_text())
    kernels = {entry["name"]: Kernel(entry, options.folder) for entry in described}
    check_recorded(kernels)
    check_draws(kernels["draw"])
    check_tiny(options.folder)
    if options.weights is not None:
        check_flash(options.folder, options.weights)


if __name__ == "__main__":
    main()
