"""Sampling on a GPU: python -m tests.gpu.check_sampling [--weights DIR].

The recorded probabilities within 1e-6; 200,000 draws by their frequencies, and as the reference draws them;
tokens of a tiny plan, seed for seed those of the CPU's while logits agree, in any slot and company, up to a
stop; then answers of Flash's first layers, timed beside bare steps. Needs torch, cuda-bindings, tokenizers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Generator, Tensor

from dsv4c.cli.generate import answer
from dsv4c.config import load_config
from dsv4c.models.synth import synthesize
from dsv4c.plan.folder import load
from dsv4c.reference.interpret import interpret
from dsv4c.reference.sample import philox
from dsv4c.runtime.answer import Done
from dsv4c.runtime.bench import Clock, random_executor
from dsv4c.runtime.sampling import Sampling
from dsv4c.runtime.session import Session
from tests.goldens import golden_case
from tests.gpu.check_rows import Kernel
from tests.gpu.kernels import measure
from tests.words import write_tokenizer

FOLDER = Path("build/gpu/sampling")
DRAWS = 4000  # rows of a call
ANSWER = 2000
CHUNK = 64
ROUNDS = 9
CHAIN = 50


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


SETTINGS = (
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_p=0.95),
    Sampling(temperature=1.3, top_k=50, top_p=0.9),
    Sampling(temperature=0.6, min_p=0.05),
    Sampling(temperature=1.0, top_k=40, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.1),
    Sampling(temperature=2.0, top_p=0.5, repetition_penalty=0.8, frequency_penalty=-0.2),
    Sampling(temperature=0.01, top_k=3, top_p=0.999, min_p=0.3),
)
LONG = (8_000, 131_000)  # positions
LOGITS = ("flat", "peaked", "equal", "few", "huge", "broken")


def sampler_operands(kernel: Kernel, logits: str, generator: Generator) -> list[Tensor]:
    """What a session hands to a sampler: a slot of its own for every row; of eight rows the last is idle."""
    rows, vocabulary = kernel.graph.inputs[0].type.shape
    slots, capacity = kernel.graph.inputs[5].type.shape

    def some(least: int, most: int, *shape: int) -> Tensor:
        return torch.randint(least, most, shape, generator=generator, dtype=torch.int32)

    x = torch.randn(rows, vocabulary, generator=generator) * 3
    if logits == "peaked":
        x[:, some(0, vocabulary, 20).long()] += 12
    elif logits == "equal":
        x = (x / 3).round()
    elif logits == "few":
        x[:, some(0, vocabulary, vocabulary - vocabulary // 8).long()] = -torch.inf
    elif logits == "huge":
        x = x * 1e4
    elif logits == "broken":
        x[0, 3], x[-1] = torch.nan, -torch.inf
    slot = torch.randperm(slots, generator=generator)[:rows].to(torch.int32)
    position, length = some(0, capacity, rows), torch.ones(rows, dtype=torch.int32)
    if rows == 8:
        slot[-1], position[-1], length[-1] = 0, -1, 0
    knobs = torch.tensor([SETTINGS[(i + int(some(0, 8, 1))) % 8].knobs for i in range(slots)])
    said = some(0, min(vocabulary, 300), slots, capacity)
    origin, seeds = some(0, 40, slots), some(-(1 << 31), (1 << 31) - 1, slots, 2)
    stops = some(-1, vocabulary, slots, 8)
    return [x, some(0, vocabulary, rows), length, position, slot, said, origin, knobs, seeds, stops]


def check_sampler(kernel: Kernel, calls: int) -> None:
    """Every result as the reference has it, and what a token is does not depend on the rows beside it."""
    generator, rows = torch.Generator().manual_seed(calls), 0
    for call in range(calls):
        given = sampler_operands(kernel, LOGITS[call % len(LOGITS)], generator)
        copies = {v.name: x.clone() for v, x in zip(kernel.graph.inputs, given, strict=True)}
        expected = list(interpret(kernel.graph, copies, {}, {}).values())
        found = kernel.run(list(given))
        for name, a, b in zip(("chosen", "said", "going", "history"), expected, found, strict=True):
            assert isinstance(a, Tensor)
            assert isinstance(b, Tensor)
            assert torch.equal(a, b), (kernel.name, call, name, a, b, given[4], given[7])
        rows += len(given[0])
    print(f"{kernel.name}: {rows} tokens of {calls} calls, each the reference's, its history and its stops")


def check_frequencies(kernel: Kernel) -> None:
    """200,000 draws of the sampler from eight tokens, of which top-k and top-p leave five."""
    p = torch.tensor([0.25, 0.0005, 0.2, 0.001, 0.15, 0.1, 0.0985, 0.2])
    ones, zeros = torch.ones(DRAWS, dtype=torch.int32), torch.zeros(DRAWS, dtype=torch.int32)
    knobs = torch.tensor([Sampling(temperature=1.0, top_k=6, top_p=0.8).knobs])
    stops, counts = torch.tensor([[2, *[-1] * 7]], dtype=torch.int32), torch.zeros(8)
    for call in range(200_000 // DRAWS):
        at = torch.arange(call * DRAWS, (call + 1) * DRAWS, dtype=torch.int32)
        history = torch.zeros(1, 512, dtype=torch.int32)
        seeds = torch.tensor([[3, 5]], dtype=torch.int32)
        logits = p.log().expand(DRAWS, -1)
        given = [logits, zeros, ones, at, zeros, history, zeros[:1], knobs, seeds, stops]
        chosen, said, going = (x for x in kernel.run(list(given))[:3] if isinstance(x, Tensor))
        assert torch.equal(said, chosen)
        assert torch.equal(going, (chosen != 2).to(torch.int32))
        counts += torch.bincount(chosen.long(), minlength=8)
    kept = torch.tensor([0, 2, 4, 7])
    assert counts[kept].sum() == counts.sum(), counts
    wanted = p[kept] / p[kept].sum() * counts.sum()
    chi_square = float(((counts[kept] - wanted) ** 2 / wanted).sum())
    assert chi_square < 16.27, chi_square  # one in a thousand of 3 degrees of freedom
    print(f"{kernel.name}: {int(counts.sum()):,} draws, chi-square {chi_square:.1f} of 16.3")


def time_sampler(kernel: Kernel) -> None:
    """Microseconds of a launch in a chain, its logits in L2, as the head leaves them; with penalties also
    where more was said before.
    """
    generator = torch.Generator().manual_seed(1)
    vocabulary, capacity = kernel.graph.inputs[0].type.shape[1], kernel.graph.inputs[5].type.shape[1]
    for how in SETTINGS[:6]:
        penalized = any(how.knobs[4:])
        for logits, at in [("flat", 500), ("peaked", 500), *[("flat", n) for n in LONG if penalized]]:
            if at >= capacity:
                continue
            given = sampler_operands(kernel, logits, generator)
            given[3][:], given[6][:] = at, at // 2
            given[5] = torch.randint(0, vocabulary, given[5].shape, generator=generator, dtype=torch.int32)
            given[7] = torch.tensor([how.knobs]).expand(len(given[7]), -1)
            launch = kernel.launch(list(given))
            plain, programmatic = (measure([launch] * CHAIN, edge) / CHAIN for edge in (False, True))
            print(
                f"{kernel.name}, {logits}, position {at:,}, {how}: {plain:.2f} us, "
                f"programmatic edges {programmatic:.2f}"
            )


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
        print(f"synth: {time.perf_counter() - started:.0f} s", flush=True)
    write_tokenizer(weights)
    plan = load(folder / "flash.plan")
    session = plan.bind(weights)
    print(f"flash: weights {session.loaded}", flush=True)
    decode = plan.program("decode")
    clock = Clock(random_executor(plan), decode.shape.name, ANSWER // 2, 31)
    whole = len(decode.launches)

    def step() -> float:
        return clock.prefixes([whole])[whole]

    answered(session, 0)
    made = [(answered(session, seed), step()) for seed in range(ROUNDS)]
    ratios = [1e6 / done.tokens_per_second / us for done, us in made]
    done, us = sorted(made, key=lambda pair: pair[0].tokens_per_second)[ROUNDS // 2]
    print(
        f"flash: {len(done.ids)} tokens, first after {done.seconds_to_first:.3f} s, "
        f"{done.tokens_per_second:.1f} tokens/s; a token of `generate` takes {statistics.median(ratios):.3f} "
        f"of a step of `bench` ({us:.1f} us), {ROUNDS} rounds, {min(ratios):.3f} to {max(ratios):.3f}"
    )
    each = check_chunks(session)
    print(f"flash: in chunks of {CHUNK} without a wait {each:.1f} us a token, {each / us:.3f} of a step")
    session.wait()
    started = time.perf_counter()
    session.enqueue(256, [0])
    session.wait()
    print(f"flash: steps that nobody listens to {(time.perf_counter() - started) / 256e-6:.1f} us each")


def answered(session: Session, seed: int) -> Done:
    """An answer as the command gives it, to nowhere."""
    how = Sampling(temperature=1.0, top_p=0.95, seed=seed)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return answer(session.generate("Hello", sampling=how, max_new_tokens=ANSWER), json=False, ids=False)


def check_chunks(session: Session) -> float:
    """Microseconds a token of 2,048, each chunk enqueued before the one ahead is read, where torch raises at
    whatever would make the host wait.
    """
    session.reset(0)
    session.prefill([3, 17], 0)
    session.choose(0, Sampling(temperature=1.0, top_p=0.95, seed=1))
    session.settle(session.say(CHUNK, {0: 5}))
    said: list[int] = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        started = time.perf_counter()
        ahead = session.say(CHUNK, slots=[0])
        for _ in range(ANSWER // CHUNK):
            ahead, before = session.say(CHUNK, slots=[0]), ahead
            said += session.settle(before)[0]
        said += session.settle(ahead)[0]
        spent = time.perf_counter() - started
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(said) == (ANSWER // CHUNK + 1) * CHUNK
    return 1e6 * spent / len(said)


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
    check_frequencies(kernels[f"sampler-8x{DRAWS}"])
    check_sampler(kernels["sampler-1000x4"], 120)
    for rows in (1, 8):
        check_sampler(kernels[f"sampler-129280x{rows}"], 18)
        time_sampler(kernels[f"sampler-129280x{rows}"])
    check_tiny(options.folder)
    if options.weights is not None:
        check_flash(options.folder, options.weights)


if __name__ == "__main__":
    main()
