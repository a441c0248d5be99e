"""Eight clients at random: arrivals, lengths, disconnects. No slot lost, no answer mixed, memory flat.

    python -m tests.serve.traffic FOLDER --minutes 30 [--host-platform]

FOLDER is what `tests.serve.check` has made. Every answer is compared with what its prompt said before; half
of the conversations go on. Memory of the server's processes is looked at after a tenth of the time, and at
the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import openai

from tests.serve.server import PORT, metric, prepare, serving

CLIENTS, GROWTH = 8, 1.10


class Traffic:
    """The clients, and what they have seen."""

    def __init__(self, seconds: float) -> None:
        self.client = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", timeout=600, max_retries=0
        )
        self.known: dict[str, list[int]] = {}
        self.answers = self.compared = self.aborted = 0
        self.end = time.monotonic() + seconds

    async def run(self) -> None:
        await asyncio.gather(*(self._customer(random.Random(seed)) for seed in range(CLIENTS)))

    async def _customer(self, chance: random.Random) -> None:
        prompt: list[int] = []
        while time.monotonic() < self.end:
            await asyncio.sleep(chance.expovariate(2.0))
            if not prompt or len(prompt) > 300 or chance.random() < 0.5:
                prompt = [chance.randrange(20, 500)] * chance.choice((1, 3, 40, 130))
            count = chance.choice((1, 4, 16, 48))
            if chance.random() < 0.25:
                await self._abort(prompt, count, chance)
            else:
                said = await self._ask(prompt, count)
                prompt = [*prompt, *said, chance.randrange(20, 500)]

    async def _ask(self, prompt: list[int], count: int) -> list[int]:
        made = await self.client.completions.create(**self._asked(prompt, count))
        said: list[int] = made.choices[0].model_extra["token_ids"]
        assert len(said) == count
        before = self.known.setdefault(json.dumps(prompt), said)
        shared = min(len(before), len(said))
        assert said[:shared] == before[:shared], f"another answer to {prompt}"
        self.compared += before is not said
        self.known[json.dumps(prompt)] = max(before, said, key=len)
        self.answers += 1
        return said

    async def _abort(self, prompt: list[int], count: int, chance: random.Random) -> None:
        """Leave after a few events of a stream, or before the first."""
        stream = await self.client.completions.create(stream=True, **self._asked(prompt, 100 + count))
        for _ in range(chance.randrange(4)):
            await anext(aiter(stream))
        await stream.close()
        self.aborted += 1

    def _asked(self, prompt: list[int], count: int) -> dict[str, Any]:
        extra = {"ignore_eos": True, "return_token_ids": True}
        return {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": count,
            "temperature": 0,
            "extra_body": extra,
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
            if metric("vllm:num_requests_running") == metric("vllm:num_requests_waiting") == 0:
                break
            time.sleep(0.2)
        assert metric("vllm:num_requests_running") == 0
        assert late < GROWTH * early, f"{early} bytes became {late}"
        read, reused = (metric(f"dsv4c:prompt_tokens_{n}_total") for n in ("read", "reused"))
    print(
        f"{given.minutes:g} minutes, {CLIENTS} clients: {traffic.answers} answers, {traffic.compared} "
        f"compared with one before, {traffic.aborted} aborted; {read:.0f} prompt tokens read, "
        f"{reused:.0f} reused; {early / 2**20:.0f} MiB, at the end {late / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()
