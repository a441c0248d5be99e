"""What vLLM must be told so that it fits a plan, and what of its settings does not."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv4c.errors import ConfigError
from dsv4c.plan.folder import Plan
from dsv4c.vllm import ARCHITECTURE

OLDEST, NEWEST = "0.23", "0.33"
"""The versions of vLLM that this is tested with, and those between."""

WORKER = "dsv4c.vllm.worker.PlanWorker"
DRAFTER = "dsv4c.vllm.drafts.PlanDrafter"
OPEN = {"--max-num-batched-tokens", "--worker-cls", "--served-model-name"}
"""Options that are given to vLLM here, and may be given again."""

PROMPT_TOKENS = 512
"""Tokens of prompts that vLLM schedules beside a step's: others' next tokens wait for no more than these."""


def server_options(
    plan: Plan, folder: Path, weights: Path, *, name: str, ahead: bool = True, drafts: int = 0
) -> list[str]:
    """The arguments of `vllm serve` for a plan in `folder`. drafts: of the plan's own, at a time. ahead:
    schedule a step while the one before runs; not with drafts, which are known only after it. Of ranks
    nothing is said: vLLM runs one worker, which drives them all.
    """
    slots, context = int(plan.deployment["slots"]), int(plan.deployment["max_context"])
    options = {
        "served-model-name": name,
        "worker-cls": WORKER,
        "additional-config": json.dumps({"plan": str(folder.resolve())}),
        "hf-overrides": json.dumps({"architectures": [ARCHITECTURE]}),
        "max-model-len": str(context),
        "max-num-seqs": str(slots),
        "max-num-batched-tokens": str(max(PROMPT_TOKENS, slots)),
        "block-size": str(context),
        "num-gpu-blocks-override": str(slots + 1),
        "tokenizer-mode": "deepseek_v4",
        "reasoning-parser": "deepseek_v4",
        "tool-call-parser": "deepseek_v4",
    }
    if drafts:
        speculates = {"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": drafts}
        options["speculative-config"] = json.dumps(speculates)
    flags = ["enable-auto-tool-choice", "enforce-eager", "no-enable-prefix-caching"]
    flags.append("async-scheduling" if ahead and not drafts else "no-async-scheduling")
    pairs = [part for name, value in options.items() for part in (f"--{name}", value)]
    return ["serve", str(weights), *pairs, *(f"--{flag}" for flag in flags)]


def check_config(config: Any, plan: Plan) -> None:
    """Raise ConfigError, naming the option, for settings of vLLM (a VllmConfig) that a plan cannot follow."""
    slots, context = int(plan.deployment["slots"]), int(plan.deployment["max_context"])
    parallel, scheduler = config.parallel_config, config.scheduler_config
    refuse_parallel(
        tensor=parallel.tensor_parallel_size,
        pipeline=parallel.pipeline_parallel_size,
        data=parallel.data_parallel_size,
    )
    speculates = config.speculative_config
    wrong = {
        f"--max-num-seqs is {scheduler.max_num_seqs}, the plan has {slots} slots": scheduler.max_num_seqs
        > slots,
        f"--max-model-len is {config.model_config.max_model_len}, the plan's context {context}": (
            config.model_config.max_model_len > context
        ),
        "--enable-prefix-caching: slots keep their prefixes themselves": (
            config.cache_config.enable_prefix_caching
        ),
        "--enable-lora: a plan has its weights": config.lora_config is not None,
        "--kv-transfer-config: a plan's state has no blocks": config.kv_transfer_config is not None,
        "--logits-processors: only vLLM's own are known": bool(config.model_config.logits_processors),
        "--speculative-config: only method custom_class, whose model is a dsv4c.vllm.drafts.Drafter": (
            speculates is not None and speculates.method != "custom_class"
        ),
        "--async-scheduling: drafts are known only after a step": (
            speculates is not None and scheduler.async_scheduling
        ),
    }
    found = [text for text, is_wrong in wrong.items() if is_wrong]
    if found:
        raise ConfigError(f"vLLM's settings do not fit plan {plan.name}: {'; '.join(found)}")
    if speculates is not None:
        most = max(b.shape.tokens for b in plan.buckets.values() if b.shape.kind == "verify")
        if speculates.num_speculative_tokens + 1 > most:
            raise ConfigError(
                f"{speculates.num_speculative_tokens} drafts: the plan verifies {most} tokens at a time; "
                "compile with a larger --verify, or draft fewer"
            )


PARALLEL = {"tensor": "-tp", "pipeline": "-pp", "data": "-dp"}
"""vLLM's options of several workers, --NAME-parallel-size, and their short names."""


def take_parallel(given: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """What options of vLLM say of several workers, by name in `PARALLEL`, and the options that are left.
    Raises ConfigError for one that is no number.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, short in PARALLEL.items():
        spelled = f"--{name}-parallel-size", f"--{name}_parallel_size"  # vLLM takes both
        parser.add_argument(short, *spelled, type=int, dest=name)
    try:
        found, rest = parser.parse_known_args(given)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name}: {error.message}") from None
    return {name: size for name, size in vars(found).items() if size is not None}, rest


def refuse_parallel(*, tensor: int = 1, pipeline: int = 1, data: int = 1) -> None:
    """Raise ConfigError for several workers of vLLM: one drives all ranks of a plan."""
    if tensor > 1:
        raise ConfigError(
            f"--tensor-parallel-size {tensor}: one worker drives all ranks of a plan; leave it out, as "
            "`dsv4c serve --ranks` does"
        )
    for name, size in (("pipeline", pipeline), ("data", data)):
        if size > 1:
            raise ConfigError(
                f"--{name}-parallel-size {size}: one worker runs a plan; start more servers behind a router"
            )


def refuse_decided(given: Sequence[str], ours: Sequence[str]) -> None:
    """Raise ConfigError for options of vLLM that a plan has decided, in either of vLLM's spellings."""
    decided = {part.partition("=")[0] for part in ours if part.startswith("--")}
    for part in given:
        name = part.partition("=")[0].replace("_", "-")
        if name in decided - OPEN:
            raise ConfigError(f"{name}: is decided by the plan, or by an option of dsv4c serve; leave it out")
