"""What a command is asked about: a config, a plan, or one stage of either (`tiny.plan@fold`)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from dsv4c.cli.options import COMPLETE_MODEL, CONFIG_HELP, first_given, sizes
from dsv4c.compiler.job import Compiled, Job, job_of, rules_of
from dsv4c.compiler.request import Request
from dsv4c.errors import ConfigError
from dsv4c.ir.graph import Graph
from dsv4c.ir.text import parse_graph
from dsv4c.plan.folder import PLAN_FILE, Plan, load

DEPLOYMENT = ("target", "recipe", "batch", "max_context", "chunk", "ranks")
"""Parameters of a config's deployment; a plan has settled them."""

Subject = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG|PLAN",
        help=f"{CONFIG_HELP} Or a plan folder.",
        show_default=False,
        autocompletion=COMPLETE_MODEL,
    ),
]


@dataclass(frozen=True)
class Asked:
    """A subject and what it is made from; `plan` is None for a config."""

    name: str
    job: Job
    plan: Plan | None

    def compiled(self, bucket: str) -> Compiled:
        """The stages of a bucket, made now. Raises GraphError for one that there is not."""
        return self.job.compiled(self.job.bucket(bucket))

    def stage(self, bucket: str, stage: str | None) -> Graph:
        """The graph after that stage; the last one's, as it was stored, for None."""
        if stage is None and self.plan is not None:
            return parse_graph(self.plan.graph_text(bucket))
        compiled = self.compiled(bucket)
        return compiled.graph if stage is None else compiled.after(stage)


def ask(
    subject: str,
    *,
    bucket: str = "decode",
    extra: Iterable[str] | None = None,
    batch: str | None = None,
    chunk: str | None = None,
    **options: Any,
) -> Asked:
    """Read a plan folder, or a config as it would be compiled with these options and the bucket.

    Raises ConfigError, PlanError, GraphError.
    """
    rules = rules_of(extra or ())
    if is_plan(subject):
        plan = load(subject)
        return Asked(subject, job_of(plan, rules), plan)
    request = Request(
        subject,
        batch=sizes("--batch", batch),
        chunk=sizes("--chunk", chunk),
        draft="auto" if bucket.startswith(("draft", "round")) else "off",
        rules=rules,
        **options,
    )
    return Asked(subject, request.job(), None)


def ask_with(context: typer.Context, subject: str) -> Asked:
    """`ask` with the options that the running command has for a bucket and for a config's deployment."""
    given = context.params
    options = {name: given[name] for name in DEPLOYMENT if name in given}
    return ask(subject, bucket=given["bucket"], extra=given["extra"], **options)


def refuse_decided(context: typer.Context, *subjects: str) -> None:
    """Raises ConfigError for an option that only a config can take, where every subject is a plan."""
    given = first_given(context, DEPLOYMENT) if all(map(is_plan, subjects)) else None
    if given is not None:
        raise ConfigError(f"{subjects[0]}: a plan has decided {given}; leave it out, or name a config")


def is_plan(subject: str) -> bool:
    """Is it a plan's folder? One that may not be entered is none, and its reader will say so."""
    return os.path.exists(os.path.join(subject, PLAN_FILE))


def split_stage(text: str) -> tuple[str, str | None]:
    """`a.plan@fold` as subject and stage."""
    subject, at, stage = text.rpartition("@")
    return (subject, stage) if at and not os.path.exists(text) else (text, None)
