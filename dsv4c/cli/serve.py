"""`dsv4c serve CHECKPOINT|PLAN`: vLLM's server over a plan, with all that it must be told."""

from __future__ import annotations

import json as json_module
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv4c.buckets import ROWS
from dsv4c.cache import cache_folder
from dsv4c.cli.console import note, progress_bar
from dsv4c.cli.generate import (
    CacheOption,
    DraftOption,
    DraftTokensOption,
    RecipeOption,
    SubjectArgument,
    TargetOption,
    WeightsOption,
    check_drafts,
    refuse_given,
    weights_of,
)
from dsv4c.cli.options import Draft, JsonOption
from dsv4c.cli.subject import is_plan
from dsv4c.compiler.kept import kept_plan, kept_plan_folder
from dsv4c.compiler.request import Request
from dsv4c.errors import BuildError, ConfigError
from dsv4c.exchange import MOST_RANKS
from dsv4c.models.encoding.tokenizer import tokenizer_file
from dsv4c.plan.folder import Plan, load
from dsv4c.runtime.bind import check, machine_target
from dsv4c.vllm import PLATFORM
from dsv4c.vllm.options import (
    NEWEST,
    OLDEST,
    refuse_decided,
    refuse_parallel,
    server_options,
    take_parallel,
)

SlotsOption = Annotated[int, typer.Option(help="Sequences at a time, of a plan compiled here.", min=1)]
ContextOption = Annotated[
    int, typer.Option(help="Tokens of prompt and answer, of a plan compiled here.", min=2)
]
HostOption = Annotated[str, typer.Option(help="Address to listen on.", metavar="ADDRESS")]
PortOption = Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)]
NameOption = Annotated[
    str | None, typer.Option(help="The model's name for clients.", show_default="the folder's")
]
AheadOption = Annotated[
    bool, typer.Option("--ahead/--no-ahead", help="Schedule a step while the one before runs.")
]
RanksOption = Annotated[
    int | None,
    typer.Option(
        "--ranks",
        "--tensor-parallel-size",
        "-tp",
        help="GPUs of this machine that run it together, driven by one process.",
        show_default="the plan's, or 1",
        min=1,
        max=MOST_RANKS,
    ),
]
HostPlatformOption = Annotated[
    bool, typer.Option("--host-platform", help="Run CPU plans on a vLLM that is built for GPUs.")
]
DryOption = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, print the command, start nothing.")
]


def register(app: typer.Typer) -> None:
    app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)


def serve(
    context: typer.Context,
    subject: SubjectArgument,
    weights: WeightsOption = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    name: NameOption = None,
    slots: SlotsOption = 4,
    max_context: ContextOption = 4096,
    target: TargetOption = None,
    recipe: RecipeOption = "official",
    ahead: AheadOption = True,
    draft: DraftOption = Draft.OFF,
    draft_tokens: DraftTokensOption = None,
    ranks: RanksOption = None,
    host_platform: HostPlatformOption = False,
    dry_run: DryOption = False,
    cache: CacheOption = None,
    json: JsonOption = False,
) -> None:
    """Serve by vLLM, over the OpenAI API: compile a checkpoint on first use, or take a plan.

    Plan, checkpoint and memory are checked before vLLM starts. Options after -- go to `vllm serve`.

    Examples:

      dsv4c serve ./DeepSeek-V4-Flash --slots 8 --max-context 131072

      dsv4c serve ./DeepSeek-V4-Flash --ranks 2

      dsv4c serve flash.plan --weights ./DeepSeek-V4-Flash -- --api-key secret
    """
    sizes, more = take_parallel(context.args)
    tensor = sizes.pop("tensor", ranks)
    refuse_parallel(**sizes)
    if ranks not in (None, tensor):
        raise ConfigError(f"--ranks {ranks}, and --tensor-parallel-size {tensor} for vLLM; give one")
    refuse_given(draft)
    folder = weights_of(subject, weights)
    tokenizer_file(folder)
    drafting = {"draft": draft.value, "draft_tokens": draft_tokens}
    deployed = {"slots": slots, "max_context": max_context, "ranks": tensor or 1}
    plan, place = _plan(subject, target or machine_target(), recipe, deployed, drafting, cache)
    if tensor not in (None, plan.ranks):
        raise ConfigError(
            f"--ranks {tensor} (-tp, --tensor-parallel-size): plan {plan.name} is compiled for {plan.ranks}; "
            f"leave it out, or compile one with --ranks {tensor}"
        )
    check(plan, folder)
    drafts = 0
    if draft is not Draft.OFF:
        check_drafts(plan, draft, draft_tokens)
        drafts = max((p.shape.tokens for p in plan.buckets.values() if p.shape.kind == "draft"), default=0)
    name = name or folder.resolve().name
    ours = server_options(plan, place, folder, name=name, ahead=ahead, drafts=drafts)
    refuse_decided(more, ours)
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *ours]
    command += ["--host", host, "--port", str(port), *more]
    url = f"http://{host}:{port}/v1"
    if json:
        print(
            json_module.dumps({"url": url, "model": name, "plan": str(place), "command": command}), flush=True
        )
    elif dry_run:
        print(shlex.join(command))
    if dry_run:
        return
    if find_spec("vllm") is None:
        raise BuildError(
            f"vLLM is not installed; run `pip install 'dsv4c[vllm]'` (versions {OLDEST} to {NEWEST}), or "
            "serve in an environment that has it: docs/serve.md"
        )
    metrics = cache_folder(cache) / "serve" / f"metrics-{port}"
    shutil.rmtree(metrics, ignore_errors=True)
    metrics.mkdir(parents=True)
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(metrics)}
    if host_platform:
        environment[PLATFORM] = "1"
    note(f"{url} answers once vLLM is up:")
    note(_curl(url, name))
    sys.stderr.flush()
    os.execve(sys.executable, command, environment)


def _plan(
    subject: str,
    target: str,
    recipe: str,
    deployed: Mapping[str, Any],
    drafting: Mapping[str, Any],
    cache: Path | None,
) -> tuple[Plan, Path]:
    """The plan, and the folder that it is in."""
    if is_plan(subject):
        return load(subject), Path(subject)
    slots = deployed["slots"]
    request = Request(
        subject,
        target=target,
        recipe=recipe,
        batch=sorted({*(n for n in (1, 2, 4, 8) if n < slots), min(slots, 8)}),
        **deployed,
        logits="last",
        sampled=True,
        verify=None if drafting["draft"] == Draft.OFF else ROWS,
        **drafting,
    )
    with progress_bar("compile") as progress:
        plan = kept_plan(request, cache=cache, progress=progress, note=note)
    place = kept_plan_folder(request.job(), cache)
    if not is_plan(str(place)):
        raise ConfigError(f"{place}: the plan could not be kept there; give another --cache")
    return plan, place


def _curl(url: str, name: str) -> str:
    """A question that waits for the server."""
    asked: dict[str, Any] = {"model": name, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    return (
        f"curl --retry 100 --retry-delay 3 --retry-connrefused {url}/chat/completions "
        f"-H 'Content-Type: application/json' -d '{json_module.dumps(asked)}'"
    )
