"""`make serve-test`: a tiny plan served by vLLM over HTTP, asked by the openai client.

    python -m tests.serve.check FOLDER [--host-platform] [--only NAME ...]

Needs an environment with vLLM and openai (`tests/serve/environment.sh` makes one). Each check prints a line,
and asserts what it says.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import vllm

from tests.serve.server import (
    CONTEXT,
    PORT,
    alone,
    complete,
    dsv4c,
    metric,
    prepare,
    prepare_ranks,
    run_tokens,
    serving,
)

PROMPTS = [[3, 17, 5], [7, 9], list(range(20, 150)), [200, 201, 202, 203], [11], [300] * 70]
CHAT = [{"role": "user", "content": "hi"}]
PLAIN = {"chat_template_kwargs": {"thinking": False}}
client: openai.AsyncOpenAI
root: Path

Check = Callable[[], Awaitable[str]]
CHECKS: list[Check] = []


def check(made: Check) -> Check:
    CHECKS.append(made)
    return made


async def ids(prompt: list[int], count: int = 12, **options: Any) -> list[int]:
    """The ids of a greedy completion."""
    more = {"return_token_ids": True, "ignore_eos": True} | options.pop("extra_body", {})
    settings = {"temperature": 0} | options
    made = await client.completions.create(
        model="tiny", prompt=prompt, max_tokens=count, extra_body=more, **settings
    )
    return made.choices[0].model_extra["token_ids"]


@check
async def tokens_equal_run() -> str:
    assert await ids(PROMPTS[0], 8) == run_tokens(root, PROMPTS[0], 8)
    for prompt in PROMPTS:
        assert await ids(prompt, 8) == alone(root, prompt, 8)
    return f"tokens of {len(PROMPTS)} prompts are those of dsv4c run"


@check
async def company() -> str:
    alone = [await ids(prompt, 24) for prompt in PROMPTS]
    together = await asyncio.gather(*(ids(prompt, 24) for prompt in PROMPTS))
    assert together == alone
    return "six requests on four slots say what each says alone"


@check
async def abort_frees() -> str:
    async def begin(prompt: list[int]) -> Any:
        return await client.completions.create(
            model="tiny", prompt=prompt, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )

    streams = [await begin([5, i]) for i in range(4)]
    for stream in streams:
        await anext(aiter(stream))
        await stream.close()
    started = time.monotonic()
    await asyncio.gather(*(ids(prompt, 4) for prompt in PROMPTS[:4]))
    waited = time.monotonic() - started
    for _ in range(50):
        if metric("dsv4c:slots_free") == 4 and metric("vllm:num_requests_running") == 0:
            break
        await asyncio.sleep(0.2)
        await ids([4], 1)  # a step, after which figures are as they are
    assert metric("dsv4c:slots_free") == 4
    assert metric("vllm:num_requests_running") == 0
    return f"four streams closed, four slots free again, four answers in {waited:.1f} s"


@check
async def seeds() -> str:
    drawn = {"temperature": 1.0, "seed": 5}
    first, again = await ids([3, 17, 5], 12, **drawn), await ids([3, 17, 5], 12, **drawn)
    other = await ids([3, 17, 5], 12, temperature=1.0, seed=6)
    assert first == again != other
    chances = {"extra_body": {"logprobs": 1}}
    host = [await ids([3, 17, 5], 12, **drawn, **chances) for _ in range(2)]
    assert host[0] == host[1]
    return "the same seed says the same, by the plan's sampler and by vLLM's; another one, something else"


@check
async def several() -> str:
    prompt = list(range(40, 140))
    made = complete(prompt, 10, temperature=1.0, seed=5, n=2)
    both = [choice["token_ids"] for choice in made["choices"]]
    assert both == [await ids(prompt, 10, temperature=1.0, seed=5 + i) for i in range(2)]
    assert both[0] != both[1]
    return "n = 2 is two answers, of seeds 5 and 6"


@check
async def chances() -> str:
    made = await client.completions.create(
        model="tiny",
        prompt=[3, 17, 5],
        max_tokens=4,
        temperature=0,
        logprobs=3,
        extra_body={"return_tokens_as_token_ids": True},  # texts of tokens may be the same
    )
    found = made.choices[0].logprobs
    for chosen, best in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert abs(chosen - max(best.values())) < 1e-5
    listed = complete([3, 17, 5], 4, allowed_token_ids=[30, 31, 32])["choices"][0]["token_ids"]
    assert set(listed) <= {30, 31, 32}
    biased = complete([3, 17, 5], 4, logit_bias={"44": 100})["choices"][0]["token_ids"]
    assert biased == [44] * 4
    prompt = complete([3, 17, 5], 1, prompt_logprobs=1)["choices"][0]["prompt_logprobs"]
    assert prompt[0] is None
    assert len(prompt) == 3
    return "log-probabilities of greedy tokens are the best; listed, biased, and of the prompt"


@check
async def schema() -> str:
    wanted = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "ok": {"type": "boolean"}},
        "required": ["a", "ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": wanted, "strict": True}}
    made = await client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=400, seed=2, response_format=form, extra_body=PLAIN
    )
    found = json.loads(made.choices[0].message.content)
    assert set(found) == {"a", "ok"}
    assert isinstance(found["a"], int)
    assert isinstance(found["ok"], bool)
    return f"JSON schema: {found}"


@check
async def tools_and_reasoning() -> str:
    parameters = {
        "type": "object",
        "properties": {"b": {"type": "boolean"}},
        "required": ["b"],
        "additionalProperties": False,
    }
    tool = {"name": "f", "description": "d", "strict": True, "parameters": parameters}
    made = await client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        tools=[{"type": "function", "function": tool}],
        tool_choice="required",
        max_tokens=200,
        seed=3,
        extra_body=PLAIN,
    )
    call = made.choices[0].message.tool_calls[0]  # a random model may add others
    assert call.function.name == "f"
    assert isinstance(json.loads(call.function.arguments)["b"], bool)
    thought = await client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        max_tokens=10,
        temperature=0,
        extra_body={"chat_template_kwargs": {"thinking": True}},
    )
    message = thought.choices[0].message
    assert not message.content
    assert message.model_extra.get("reasoning") or message.model_extra.get("reasoning_content")
    return f"a call parsed: f({call.function.arguments}); reasoning apart from the answer"


@check
async def context() -> str:
    prompt = [5] * (CONTEXT - 1)
    assert len(await ids(prompt, 1)) == 1
    full = complete([5] * (CONTEXT - 20), 20)
    assert len(full["choices"][0]["token_ids"]) == 20
    for prompt in ([5] * CONTEXT, [5] * (CONTEXT + 1)):
        try:
            await ids(prompt, 1)
        except openai.BadRequestError:
            continue
        raise AssertionError(f"{len(prompt)} tokens were taken")
    return f"prompts of {CONTEXT - 1} tokens are answered, {CONTEXT} and {CONTEXT + 1} refused"


@check
async def second_turn() -> str:
    first = list(range(20, 320))
    said = await ids(first, 8)
    before = metric("dsv4c:prompt_tokens_read"), metric("dsv4c:prompt_tokens_reused")
    second = [*first, *said, 5, 6, 7]
    answer = await ids(second, 8)
    read = metric("dsv4c:prompt_tokens_read") - before[0]
    reused = metric("dsv4c:prompt_tokens_reused") - before[1]
    assert answer == alone(root, second, 8)
    assert reused == len(first) + len(said) - 1
    assert read == len(second) - reused
    return f"the second turn reads {read:.0f} of {len(second)} tokens and says what a fresh one says"


OF_RANKS = [tokens_equal_run, company, abort_frees, seeds, second_turn]
"""What is asked of a plan for two ranks, too."""


async def drafts() -> str:
    for prompt in PROMPTS[:3]:
        assert await ids(prompt, 40) == alone(root, prompt, 40)
    drawn = {"temperature": 1.0, "seed": 5}
    assert await ids([3, 17, 5], 12, **drawn) == await ids([3, 17, 5], 12, **drawn)
    proposed, accepted = (metric(f"vllm:spec_decode_num_{n}_tokens_total") for n in ("draft", "accepted"))
    assert proposed > 0
    return f"drafts change nothing: {proposed:.0f} proposed, {accepted:.0f} accepted"


def refusals() -> None:
    """What is wrong is said before anything is loaded."""
    plan, weights = str(root / "plain.plan"), str(root / "weights")
    other = root / "other"
    other.mkdir(exist_ok=True)
    config = json.loads((root / "weights" / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))
    for name in ("tokenizer.json", "model.safetensors"):
        if not (other / name).exists():
            (other / name).symlink_to((root / "weights" / name).resolve())
    cases = [
        ([plan, "--weights", str(other)], 4, "checkpoint of another model"),
        ([str(root / "weights"), "--weights", weights], 2, "is no plan"),
        ([str(root)], 2, "neither a plan nor a checkpoint"),
        (
            [plan, "--weights", weights, "-tp", "2"],
            2,
            "-tp, --tensor-parallel-size): plan weights is compiled",
        ),
        ([plan, "--weights", weights, "--", "-dp", "2"], 2, "--data-parallel-size 2: one worker runs a plan"),
        ([plan, "--weights", weights, "--", "--block-size", "16"], 2, "--block-size: is decided"),
    ]
    for arguments, code, message in cases:
        found = dsv4c("serve", *arguments)
        assert found.returncode == code, (arguments, found.returncode, found.stderr)
        assert message in found.stderr, (message, found.stderr)
    print(f"{len(cases)} mistakes are said before anything is loaded", flush=True)


async def ask(checks: list[Check]) -> None:
    global client
    address = f"http://127.0.0.1:{PORT}/v1"
    async with openai.AsyncOpenAI(base_url=address, api_key="none", timeout=300) as client:
        for each in checks:
            started = time.monotonic()
            print(f"{await each()} ({time.monotonic() - started:.1f} s)", flush=True)


def with_drafts(platform: list[str]) -> None:
    """Drafts of somebody else, and the plan's own."""
    oracle = {"method": "custom_class", "model": "tests.serve.oracle.Oracle", "num_speculative_tokens": 3}
    more = ["--no-ahead", "--", "--speculative-config", json.dumps(oracle)]
    known = {" ".join(map(str, p)): alone(root, p, 44) for p in PROMPTS[:3]}
    (root / "known.json").write_text(json.dumps(known))
    environment = {"DSV4C_KNOWN": str(root / "known.json")}
    with serving(root, "plain.plan", *platform, *more, log=root / "oracle.log", **environment):
        asyncio.run(ask([drafts]))
    with serving(root, "drafting.plan", *platform, "--draft", "mtp", log=root / "drafting.log"):
        asyncio.run(ask([drafts]))


def with_ranks(platform: list[str]) -> None:
    """A plan for two ranks, which one worker drives, whatever vLLM's option says."""
    global root
    root = prepare_ranks(root / "ranks")
    with serving(root, "plain.plan", *platform, "--", "-tp", "2", log=root / "plain.log"):
        print("with two ranks, -tp 2:", flush=True)
        asyncio.run(ask(OF_RANKS))


OTHERS = {"drafts": with_drafts, "ranks": with_ranks}


def main() -> None:
    global root
    names = [*(each.__name__ for each in CHECKS), *OTHERS]
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host-platform", action="store_true")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME")
    given = parser.parse_args()
    root = prepare(given.folder)
    platform = ["--host-platform"] if given.host_platform else []
    print(f"vLLM {vllm.__version__}", flush=True)
    if not given.only:
        refusals()
    wanted = given.only or names
    if chosen := [each for each in CHECKS if each.__name__ in wanted]:
        with serving(root, "plain.plan", *platform, log=root / "plain.log"):
            asyncio.run(ask(chosen))
    for name, others in OTHERS.items():
        if name in wanted:
            others(platform)
    print("all is well", flush=True)


if __name__ == "__main__":
    main()
