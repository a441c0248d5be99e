"""`dsv4c check PLAN`: certificates of a plan's rewrites; `--inject`: mistakes that they must notice;
`--device`: its kernels on the GPU here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dsv4c.buckets import Bucket
from dsv4c.cache import cache_folder
from dsv4c.certify.certificates import certify
from dsv4c.certify.defects import inject, totals
from dsv4c.certify.finding import Certificate, to_dict
from dsv4c.cli.console import note, print_json, print_table, progress_bar
from dsv4c.cli.options import CONFIG_HELP, JsonOption, PassOption
from dsv4c.cli.subject import Asked, ask
from dsv4c.compiler.device import Checked, check_kernels
from dsv4c.compiler.job import rules_of
from dsv4c.compiler.request import Request
from dsv4c.compiler.sharding import certify_shard
from dsv4c.config import load_config
from dsv4c.errors import ConfigError, GraphError
from dsv4c.models.drafting import with_dspark
from dsv4c.passes.work import Match
from dsv4c.plan.folder import load

EVERY_RULE = (("deepseek-v4-flash", "official"), ("deepseek-v4-flash", "nvfp4-experts-w4a4"))
"""Configs and recipes in whose sampled decode steps every built-in rule applies, but those of drafts, on rows
of several blocks each: a block that begins late is no mistake that could show in a row of one block.
"""

SubjectOption = Annotated[
    str | None,
    typer.Argument(
        metavar="PLAN|CONFIG",
        help=f"A plan folder, or: {CONFIG_HELP} May be left out with --inject: every built-in rule.",
        show_default=False,
    ),
]
InjectOption = Annotated[
    bool, typer.Option("--inject", help="Put catalogued mistakes into every rule; all must be caught.")
]
DeviceOption = Annotated[
    bool, typer.Option("--device", help="Run every kernel of a GPU plan on this machine's GPU instead.")
]
BucketsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--bucket", help="With --device: a bucket to check, or a kind.", metavar="NAME", show_default="all"
    ),
]
CachedOption = Annotated[
    bool, typer.Option("--cached", help="Believe what is kept from before, evaluate only what is new.")
]
CacheOption = Annotated[
    Path | None,
    typer.Option(help="Folder that keeps certificates.", show_default="the user's cache", metavar="DIR"),
]


def register(app: typer.Typer) -> None:
    app.command("check")(check_command)


def check_command(
    subject: SubjectOption = None,
    inject: InjectOption = False,
    device: DeviceOption = False,
    bucket: BucketsOption = None,
    cached: CachedOption = False,
    cache: CacheOption = None,
    extra: PassOption = None,
    json: JsonOption = False,
) -> None:
    """Check every way a rule applied: the nodes it replaced and the fused op agree on hard inputs.

    All are evaluated again, which takes seconds, and compared with the certificates in the plan. With
    --device the same is asked of the plan's kernels: each leaves in the GPU's memory what its nodes mean, on
    hard operands and random weights; no checkpoint is needed.
    Exit code 3 if one does not, differs from the certificate in the plan, or an injected mistake survives.

    Examples:

      dsv4c check tiny.plan

      dsv4c check --inject --json

      dsv4c check flash.plan --device
    """
    if device and subject is not None and not inject:
        _device(subject, bucket or (), extra, json)
        return
    if device or bucket:
        raise ConfigError("check: --device takes a plan, and no --inject; --bucket is for --device")
    if inject:
        _inject(subject, extra, json)
        return
    if subject is None:
        raise ConfigError("check: name a plan or a config, or give --inject")
    asked = ask(subject, extra=extra)
    folder = cache_folder(cache) / "certificates"
    forms = tuple(dict.fromkeys(asked.job.firsts().values()))
    with progress_bar("check") as progress:
        found = certify(_matches(asked, forms), folder=folder, fresh=not cached, progress=progress)
    found.all += certify_shard(asked.job, folder, fresh=not cached)
    changed = _changed(asked, found.all)
    if json:
        print_json(
            {
                "certificates": [to_dict(c) for c in found.all],
                "failed": [c.rule for c in found.failed],
                "changed": changed,
                "computed": found.computed,
                "seconds": round(found.seconds, 3),
            }
        )
    else:
        _print(subject, found.all)
        print(f"{len(found.all)} certificates, {found.computed} evaluated now, {found.seconds:.2f} s")
    for wrong in found.failed:
        note(f"different: {wrong.rule} on {', '.join(wrong.operands)}: {wrong.reason}")
    for line in changed:
        note(f"changed: {line}")
    if found.failed or changed:
        raise GraphError(
            f"{subject}: {len(found.failed)} rewrites differ, {len(changed)} certificates changed"
        )


def _device(subject: str, buckets: Sequence[str], extra: list[str] | None, json: bool) -> None:
    rules_of(extra or ())  # graphs name their fused ops
    plan = load(subject)
    began = time.perf_counter()
    found: list[Checked] = []
    with progress_bar("check") as progress:
        for each in check_kernels(plan, buckets):
            found.append(each)
            if progress is not None:
                progress("kernels", len({name for c in found for name in c.kernels}), len(plan.kernels))
    seconds = time.perf_counter() - began
    wrong = [each for each in found if not each.holds]
    if json:
        rows = [each.to_dict() for each in found]
        print_json({"checked": rows, "failed": len(wrong), "seconds": round(seconds, 3)})
    else:
        table = Table("bucket", "node", "op", "turns", "worst", "limit", "result", "operands", title=subject)
        for each in found:
            worst = each.worst
            cells = (f"{worst.far:.2g}", f"{worst.limit:.2g}", worst.result, each.pattern)
            table.add_row(each.bucket, each.nodes[0], escape(each.op), str(each.count), *cells)
        print_table(table)
        kernels = {name for each in found for name in each.kernels}
        print(
            f"{len(kernels)} of {len(plan.kernels)} kernels in {len(found)} kinds of turns, {seconds:.1f} s"
        )
    for each in wrong:
        where = f"{', '.join(each.nodes)} in {each.bucket} ({', '.join(each.kernels)})"
        note(f"different: {where}, {each.pattern} operands: {each.worst}")
    if wrong:
        raise GraphError(
            f"{subject}: {len(wrong)} of {len(found)} kinds of turns are not what their nodes mean"
        )


def _matches(asked: Asked, buckets: tuple[Bucket, ...]) -> list[Match]:
    folds = [asked.job.compiled(bucket).context.fold for bucket in buckets]
    return [match for fold in folds if fold is not None for match in fold.matches]


def _of_step(asked: Asked) -> list[Match]:
    return _matches(asked, (asked.job.decode,))


def _every_rule(extra: list[str] | None) -> list[Match]:
    """Where every built-in rule applies: in steps, and in a round what is not in those."""
    steps = [ask(config, recipe=recipe, sampled=True, extra=extra) for config, recipe in EVERY_RULE]
    found = [match for each in steps for match in _of_step(each)]
    known = {match.op.name for match in found}
    model = with_dspark(load_config(EVERY_RULE[0][0]))
    job = Request(model, draft="dspark", sampled=True, rules=rules_of(extra or ())).job()
    rounds = _matches(Asked(model.name, job, None), (job.bucket("round"),))
    return found + [match for match in rounds if match.op.name not in known]


def _changed(asked: Asked, found: list[Certificate]) -> list[str]:
    """Certificates of the plan that are not what is found now."""
    if asked.plan is None:
        return []
    now = {(c.op, c.operands): c for c in found}
    lines = []
    for stored in asked.plan.certificates:
        made = now.get((stored["op"], tuple(stored["operands"])))
        if made is None:
            lines.append(f"{stored['rule']} on {', '.join(stored['operands'])} does not apply any more")
        elif (made.kind, made.worst) != (stored["kind"], stored["worst"]):
            old = f"{stored['kind']} {stored['worst']:g}"
            lines.append(f"{made.rule}: {old} in the plan, {made.kind} {made.worst:g} now")
    return lines


def _print(subject: str, certificates: list[Certificate]) -> None:
    table = Table(title=f"{subject}: both sides of every rewrite")
    table.add_column("rule", no_wrap=True)
    table.add_column("result")
    for heading in ("worst", "patterns", "applied"):
        table.add_column(heading, justify="right")
    table.add_column("first operand")
    for c in certificates:
        operand = escape(c.operands[0]) if c.operands else ""
        worst = f"{c.worst:g}" if c.worst else ""
        table.add_row(c.rule, c.kind, worst, str(len(c.patterns)), str(c.count), operand)
    print_table(table)


def _inject(subject: str | None, extra: list[str] | None, json: bool) -> None:
    kills = inject(_every_rule(extra) if subject is None else _of_step(ask(subject, extra=extra)))
    found: dict[str, Any] = totals(kills)
    if json:
        rows = [{"rule": k.rule, "defect": k.defect, "at": k.at, "caught_by": k.caught_by} for k in kills]
        print_json(found | {"defects": rows})
    else:
        table = Table("rule", "defect", "at", "caught by", title="Injected mistakes")
        for k in kills:
            table.add_row(k.rule, k.defect, k.at, k.caught_by or "NOTHING: it survived")
        print_table(table)
        print(f"{found['injected']} injected, {found['caught']} caught, {len(found['survivors'])} survived")
    if found["survivors"]:
        raise GraphError(f"{len(found['survivors'])} mistakes survived: {'; '.join(found['survivors'][:5])}")
