"""`dsv4c run PLAN --weights DIR --tokens ...`: a prompt in, tokens and logits out."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from dsv4c.cli.console import note, print_json, progress_bar
from dsv4c.cli.options import JsonOption, PlanArgument
from dsv4c.errors import SessionError
from dsv4c.plan.folder import load
from dsv4c.runtime.generate import check_file, generate, save_logits
from dsv4c.threads import leads

WeightsOption = Annotated[
    Path,
    typer.Option(
        help="Checkpoint folder, or a .safetensors file.", metavar="DIR", show_default=False, readable=False
    ),
]
TokensOption = Annotated[
    str, typer.Option(help="The prompt: token ids, separated by commas.", metavar="IDS", show_default=False)
]
ForceTokensOption = Annotated[
    str,
    typer.Option(
        "--force", help="Tokens to decode one by one after the prompt.", metavar="IDS", show_default=False
    ),
]
NewOption = Annotated[
    int, typer.Option(help="Tokens to generate after those, the likeliest one each time.", min=0)
]
LogitsOption = Annotated[
    Path | None,
    typer.Option(
        help="Write `logits`, f32 [prompt and forced tokens, vocab], row i after token i.",
        metavar="FILE",
        show_default=False,
    ),
]
PoisonOption = Annotated[
    bool, typer.Option("--poison", help="Fill the arena with NaN before every step, to find stale reads.")
]


def register(app: typer.Typer) -> None:
    app.command("run")(run_command)


def run_command(
    plan: PlanArgument,
    weights: WeightsOption,
    tokens: TokensOption,
    force: ForceTokensOption = "",
    max_new_tokens: NewOption = 0,
    logits: LogitsOption = None,
    poison: PoisonOption = False,
    json: JsonOption = False,
) -> None:
    """Run a plan: prefill the prompt, decode the forced tokens, then generate greedily.

    Examples:

      dsv4c run tiny.plan --weights tiny-weights --tokens 3,17,5 --max-new-tokens 8

      dsv4c run tiny.plan --weights tiny-weights --tokens 3,17 --force 5,9 --logits out.safetensors
    """
    prompt, forced = token_ids(tokens, "--tokens"), token_ids(force, "--force")
    if logits is not None:
        check_file(logits)
    compiled = load(plan)
    with progress_bar("weights", bytes_counted=True) as progress:
        session = compiled.bind(weights, progress=progress, poison=poison)
    note(f"weights: {session.loaded}")
    started = time.perf_counter()
    with progress_bar("run") as progress:
        rows, generated = generate(session, prompt, forced, max_new_tokens, progress=progress)
    seconds = time.perf_counter() - started
    if logits is not None and leads():
        save_logits(logits, rows)
    top = rows[-1].topk(min(5, rows.shape[1]))
    if json:
        print_json(
            {
                "tokens": prompt + forced,
                "generated": generated,
                "positions": session.positions,
                "top": [{"token": int(t), "logit": float(v)} for v, t in zip(*top, strict=True)],
                "logits": str(logits) if logits else None,
                "seconds": round(seconds, 4),
            }
        )
        return
    if generated:
        print(",".join(map(str, generated)))
    else:
        likely = ", ".join(f"{int(t)} ({float(v):.3f})" for v, t in zip(*top, strict=True))
        print(f"likeliest after {len(rows)} token{'s' * (len(rows) != 1)}: {likely}")
    if logits is not None:
        print(f"{logits}: logits f32 {list(rows.shape)}")


def token_ids(text: str, option: str) -> list[int]:
    """Token ids from comma-separated text. Raises SessionError naming what is no number."""
    ids = []
    for part in map(str.strip, text.split(",") if text.strip() else []):
        if not re.fullmatch(r"-?[0-9]{1,20}", part):
            raise SessionError(f"{option}: {part!r} is no token id; expected numbers like 3,17,5")
        ids.append(int(part))
    return ids
