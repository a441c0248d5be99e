"""What vLLM adds to a step, at batch 1, around a stand-in for the GPU: a step of 3 ms without the CPU.

    DSV4C_VLLM_PLATFORM=1 python -m benchmarks.serve_overhead FOLDER [--http] [--ahead]

FOLDER is what `tests.serve.check` has made. Prints the time between tokens less the 3 ms: median of five runs
of 300 tokens. In process, or over HTTP as a stream, which has the client's share, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dsv4c.runtime.sampling import Said
from dsv4c.runtime.session import Session
from dsv4c.vllm import ARCHITECTURE
from dsv4c.vllm.worker import PlanWorker
from tests.serve.server import CONTEXT, PORT, serving

STEP, TOKENS, RUNS = 3e-3, 300, 5


class StandIn(Session):
    """A session whose steps end 3 ms after the one before, on a clock in place of a GPU; its tokens are 7."""

    _until = 0.0

    def prefill(self, tokens: Any, slot: int = 0, *, logits: Any = "all", progress: Any = None) -> Any:
        self._counter.advance(slot, len(tokens))
        return torch.empty(0)

    def say(
        self,
        count: int,
        tokens: Mapping[int, int] | None = None,
        slots: Sequence[int] = (),
        *,
        best: int | None = None,
        rounds: bool = False,
    ) -> Said:
        work = [*(tokens or {}), *slots]
        for slot in work:
            self._counter.enqueue(slot, count)
        self._until = max(self._until, time.perf_counter()) + STEP
        said = Timed(work, torch.full((count, len(work)), 7, dtype=torch.int32), torch.zeros(len(work)))
        said.until = self._until
        return said


class Timed(Said):
    """What is said when its time has come."""

    until = 0.0

    def wait(self) -> list[list[int]]:
        time.sleep(max(0.0, self.until - time.perf_counter() - 2e-4))
        while time.perf_counter() < self.until:
            pass
        return super().wait()


class StandInWorker(PlanWorker):  # type: ignore[misc]
    """The worker, with the stand-in."""

    def load_session(self) -> Session:
        session = super().load_session()
        session.__class__ = StandIn
        return session


def in_process(folder: Path, ahead: bool) -> list[float]:
    """Seconds between tokens, of each run."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder / "weights"),
        tokenizer_mode="deepseek_v4",
        additional_config={"plan": str(folder / "plain.plan")},
        hf_overrides={"architectures": [ARCHITECTURE]},
        worker_cls="benchmarks.serve_overhead.StandInWorker",
        max_model_len=CONTEXT,
        block_size=CONTEXT,
        num_gpu_blocks_override=5,
        max_num_seqs=4,
        enable_prefix_caching=False,
        enforce_eager=True,
        async_scheduling=ahead,
        disable_log_stats=True,
    )

    def seconds(count: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        started = time.perf_counter()
        llm.generate([{"prompt_token_ids": [3, 4]}], sampling, use_tqdm=False)
        return time.perf_counter() - started

    seconds(20)
    return [(seconds(TOKENS + 20) - seconds(20)) / TOKENS for _ in range(RUNS)]


def over_http(folder: Path, ahead: bool) -> list[float]:
    """Seconds between a stream's events, of each run."""
    body = {"model": "tiny", "prompt": [3, 4], "max_tokens": TOKENS, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions",
        json.dumps(body | {"ignore_eos": True}).encode(),
        {"Content-Type": "application/json"},
    )

    def between() -> float:
        with urllib.request.urlopen(request) as answer:
            at = [time.perf_counter() for line in answer if line.startswith(b"data: {")]
        return (at[-1] - at[0]) / (TOKENS - 1)

    options = ["--host-platform", "--ahead" if ahead else "--no-ahead"]
    options += ["--", "--worker-cls", "benchmarks.serve_overhead.StandInWorker"]
    with serving(folder, "plain.plan", *options, log=folder / "overhead.log"):
        between()
        return [between() for _ in range(RUNS)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--http", action="store_true")
    parser.add_argument("--ahead", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    measured = (over_http if given.http else in_process)(given.folder, given.ahead)
    added = [1e3 * (seconds - STEP) for seconds in measured]
    where = "over HTTP" if given.http else "in process"
    how = "a step ahead" if given.ahead else "step by step"
    spread = f"{min(added):.3f} to {max(added):.3f}"
    print(f"{where}, {how}: {statistics.median(added):.3f} ms a token beside the step ({spread})")


if __name__ == "__main__":
    main()
