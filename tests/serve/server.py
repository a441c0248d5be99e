"""A tiny checkpoint, its plans, and servers over them: `dsv4c serve` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from dsv4c.compiler.compile import compile
from dsv4c.config import ModelConfig, load_config
from dsv4c.models.synth import synthesize
from dsv4c.plan.folder import load
from dsv4c.runtime.generate import generate
from dsv4c.runtime.session import Session
from tests.words import write_tokenizer

CONTEXT = 1536
OPTIONS: dict[str, Any] = {"max_context": CONTEXT, "batch": (1, 2, 4), "chunk": 64, "certify": False}
SLOTS = 4
PORT = 8437


SAMPLED = OPTIONS | {"sampled": True, "logits": "last"}


def prepare(root: Path) -> Path:
    """The folder with `weights`, `drafting.plan`, and `plain.plan`, made once."""
    weights = root / "weights"
    if not (root / "plain.plan").exists():
        _checkpoint(load_config("tiny"), weights)
        compile(weights, draft="mtp", draft_tokens=3, **SAMPLED).save(root / "drafting.plan")
        compile(weights, **SAMPLED).save(root / "plain.plan")
    return root


def prepare_ranks(root: Path) -> Path:
    """The folder with `weights` that two ranks divide, and `plain.plan` for so many, made once."""
    if not (root / "plain.plan").exists():
        _checkpoint(replace(load_config("tiny"), moe_intermediate_size=256), root / "weights")
        compile(root / "weights", ranks=2, **SAMPLED).save(root / "plain.plan")
    return root


def _checkpoint(config: ModelConfig, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    synthesize(config, folder, 1)
    write_tokenizer(folder)


@cache
def session_of(root: Path) -> Session:
    return load(root / "plain.plan").bind(root / "weights")


def alone(root: Path, prompt: list[int], count: int) -> list[int]:
    """What a session says, as `dsv4c run` asks it."""
    session_of(root).reset()
    return generate(session_of(root), prompt, new=count)[1]


def run_tokens(root: Path, prompt: list[int], count: int) -> list[int]:
    """What `dsv4c run` says."""
    asked = ["--tokens", ",".join(map(str, prompt)), "--max-new-tokens", str(count)]
    said = dsv4c("run", str(root / "plain.plan"), "--weights", str(root / "weights"), *asked)
    return [int(token) for token in said.stdout.strip().splitlines()[-1].split(",")]


def dsv4c(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, to its end."""
    command = [sys.executable, "-m", "dsv4c", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@contextmanager
def serving(root: Path, plan: str, *options: str, log: Path, **environment: str) -> Iterator[int]:
    """A server over a plan, healthy; yields its process id."""
    command = [sys.executable, "-m", "dsv4c", "serve", str(root / plan), "--weights", str(root / "weights")]
    command += ["--name", "tiny", "--port", str(PORT), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"} | environment
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            wait_healthy(server, log)
            yield server.pid
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:  # one that is still loading does not listen
                server.kill()
                server.wait()


def wait_healthy(server: subprocess.Popen[bytes], log: Path, seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"the server has ended with {server.returncode}:\n{log.read_text()[-4000:]}")
        try:
            fetch("/health")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
        else:
            return
    raise SystemExit(f"the server is not healthy after {seconds:.0f} s:\n{log.read_text()[-4000:]}")


def fetch(path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=10) as answer:
        return answer.read().decode()


def metric(name: str) -> float:
    """The sum of a figure's samples on /metrics."""
    lines = [line for line in fetch("/metrics").splitlines() if line.startswith(name)]
    assert lines, f"no {name} on /metrics"
    return sum(float(line.split()[-1]) for line in lines)


def complete(prompt: list[int], count: int, **options: Any) -> dict[str, Any]:
    """One greedy completion of ids, whatever ends it; the answer as it is."""
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
    body = json.dumps(asked | {"return_token_ids": True} | options).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)
