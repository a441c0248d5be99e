"""Eight clients at random: arrivals, lengths, disconnects. No slot lost, no answer mixed, memory flat.

    python -m tests.serve.traffic FOLDER --minutes 30 [--host-platform]

FOLDER is what `tests.serve.check` has made. Prompts recur, half of the conversations go on, and half of the
answers are drawn with a seed. Every answer, and what was heard of those that were left, is compared with what
the prompt and the seed said before; once the server has ended, all that was greedy is compared with what a
session finds likeliest, as `dsv4c run` does. Memory of the server's processes is looked at after a tenth of
the time, and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import openai

from tests.serve.server import PORT, SLOTS, metric, prepare, serving, session_of

CLIENTS, GROWTH = 8, 1.10
OPENINGS = [[token] * count for token in (20, 77, 310) for count in (1, 3, 40, 130)]
SEEDS = (None, 5)

Asked = tuple[tuple[int, ...], int | None]
"""A prompt, and the seed of a drawn answer; None where it is greedy."""


class Traffic:
    """The clients, and what they have seen."""

    def __init__(self, seconds: float) -> None:
        self.client = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", timeout=600, max_retries=0
        )
        self.known: dict[Asked, list[int]] = {}
        self.answers = self.compared = self.aborted = 0
        self.end = time.monotonic() + seconds

    async def run(self) -> None:
        await asyncio.gather(*(self._customer(random.Random(seed)) for seed in range(CLIENTS)))

    async def _customer(self, chance: random.Random) -> None:
        prompt: list[int] = []
        while time.monotonic() < self.end:
            await asyncio.sleep(chance.expovariate(2.0))
            if not prompt or len(prompt) > 300 or chance.random() < 0.5:
                prompt, seed = chance.choice(OPENINGS), chance.choice(SEEDS)
            count = chance.choice((1, 16, 48))
            if chance.random() < 0.25:
                await self._abort(prompt, seed, count, chance.randrange(4))
            else:
                prompt = [*prompt, *await self._ask(prompt, seed, count), 9]

    async def _ask(self, prompt: list[int], seed: int | None, count: int) -> list[int]:
        made = await self.client.completions.create(**self._asked(prompt, seed, count))
        said: list[int] = made.choices[0].model_extra["token_ids"]
        assert len(said) == count
        self._compare(prompt, seed, said)
        self.answers += 1
        return said

    async def _abort(self, prompt: list[int], seed: int | None, count: int, events: int) -> None:
        """Leave after so many events of a stream."""
        stream = await self.client.completions.create(stream=True, **self._asked(prompt, seed, 100 + count))
        said: list[int] = []
        for _ in range(events):
            said += (await anext(aiter(stream))).choices[0].model_extra["token_ids"]
        await stream.close()
        self._compare(prompt, seed, said)
        self.aborted += 1

    def _compare(self, prompt: list[int], seed: int | None, said: list[int]) -> None:
        asked = tuple(prompt), seed
        before = self.known.get(asked, [])
        shared = min(len(before), len(said))
        if said[:shared] != before[:shared]:
            raise SystemExit(f"{prompt}, seed {seed}: said {said}, before {before}")
        self.compared += shared > 0
        self.known[asked] = max(before, said, key=len)

    def _asked(self, prompt: list[int], seed: int | None, count: int) -> dict[str, Any]:
        return {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": count,
            "temperature": 0 if seed is None else 1,
            "seed": seed,
            "extra_body": {"ignore_eos": True, "return_token_ids": True},
        }


def memory(process: int) -> int:
    """Bytes that a process and its children hold."""
    found = subprocess.run(
        ["ps", "-o", "rss=", "--ppid", str(process), "--pid", str(process)],
        capture_output=True,
        text=True,
        check=True,
    )
    return 1024 * sum(map(int, found.stdout.split()))


async def watched(traffic: Traffic, process: int) -> tuple[int, int]:
    seconds = traffic.end - time.monotonic()
    clients = asyncio.create_task(traffic.run())
    await asyncio.wait([clients], timeout=seconds / 10)
    early = memory(process)
    await clients
    return early, memory(process)


def check_greedy(root: Path, known: dict[Asked, list[int]]) -> int:
    """What was said greedily against the likeliest tokens of a session that reads prompts and answers anew.
    Returns how many tokens were compared. A conversation is read once, with all of its answers.
    """
    session = session_of(root)
    left = {prompt: said for (prompt, seed), said in known.items() if seed is None and said}
    compared = 0
    for whole in sorted(((*prompt, *said) for prompt, said in left.items()), key=len, reverse=True):
        answers = {p: s for p, s in left.items() if whole[: len(p) + len(s)] == (*p, *s)}
        if not answers:
            continue
        session.reset()
        session.prefill(whole[:-1])
        likeliest = session.next_tokens
        for prompt, said in answers.items():
            found = likeliest[len(prompt) - 1 :][: len(said)]
            if found != said:
                raise SystemExit(f"{list(prompt)}: said {said}, a session alone {found}")
            compared += len(said)
            del left[prompt]
    return compared


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--host-platform", action="store_true")
    given = parser.parse_args()
    root = prepare(given.folder)
    options = ["--host-platform"] if given.host_platform else []
    with serving(root, "plain.plan", *options, log=root / "traffic.log") as process:
        traffic = Traffic(60 * given.minutes)
        early, late = asyncio.run(watched(traffic, process))
        for _ in range(100):
            if metric("vllm:num_requests_running") == 0 and metric("dsv4c:slots_free") == SLOTS:
                break
            time.sleep(0.2)
        left = {n: metric(f"vllm:num_requests_{n}") for n in ("running", "waiting")}
        assert not any(left.values()), left
        assert metric("dsv4c:slots_free") == SLOTS, f"{metric('dsv4c:slots_free')} of {SLOTS} slots are free"
        assert late < GROWTH * early, f"{early} bytes became {late}"
        read, reused = (metric(f"dsv4c:prompt_tokens_{n}_total") for n in ("read", "reused"))
    print(
        f"{given.minutes:g} minutes, {CLIENTS} clients: {traffic.answers} answers, {traffic.aborted} left; "
        f"{traffic.compared} compared with one before; {read:.0f} prompt tokens read, {reused:.0f} reused; "
        f"all {SLOTS} slots free; {early / 2**20:.0f} MiB, at the end {late / 2**20:.0f} MiB",
        flush=True,
    )
    compared = check_greedy(root, traffic.known)
    print(f"{compared} greedy tokens are what a session alone finds likeliest")


if __name__ == "__main__":
    main()
