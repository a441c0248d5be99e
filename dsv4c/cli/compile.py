"""`dsv4c compile CONFIG`: a config becomes a plan folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv4c.buckets import ROWS
from dsv4c.cli.console import note, print_json, progress_bar, size, write_text
from dsv4c.cli.options import (
    COMPLETE_MODEL,
    COMPLETE_RULE,
    CONFIG_HELP,
    BatchOption,
    ChunkOption,
    ContextOption,
    Draft,
    JsonOption,
    Logits,
    OverwriteOption,
    PassOption,
    RanksOption,
    RecipeOption,
    TargetOption,
    first_given,
    no_drafts,
    sizes,
)
from dsv4c.compiler.compile import compile
from dsv4c.compiler.job import Compiled, Job, Saved, read_saved, rules_of, stop
from dsv4c.compiler.limits import least_memory
from dsv4c.compiler.request import Request, cuts_of
from dsv4c.errors import ConfigError, GraphError
from dsv4c.ir.text import print_graph
from dsv4c.plan.folder import Plan, check_target

ConfigOrNothing = Annotated[
    str | None,
    typer.Argument(
        metavar="CONFIG",
        help=f"{CONFIG_HELP} Left out with --resume.",
        show_default=False,
        autocompletion=COMPLETE_MODEL,
    ),
]

OutputOption = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Folder to write.", show_default="NAME.plan", metavar="DIR"),
]
SlotsOption = Annotated[
    int | None,
    typer.Option(help="Sequences whose state a plan holds.", min=1, show_default="the largest batch"),
]
VerifyOption = Annotated[
    int | None,
    typer.Option(
        help=f"Tokens of one sequence that a verify step takes, 1 for no such bucket; {ROWS} at most.",
        min=1,
        show_default="4",
    ),
]
LogitsOption = Annotated[
    Logits | None,
    typer.Option(
        help="Of every token of a prompt's chunk, or of its last.",
        show_default=f"all; on a GPU last in chunks of more than {ROWS}",
    ),
]
DraftOption = Annotated[
    Draft,
    typer.Option(help="Rounds that draft tokens, too: by what the checkpoint has (auto), or given ones."),
]
DraftTokensOption = Annotated[
    int | None,
    typer.Option(help="Tokens drafted in a round.", metavar="K", show_default="1, of DSpark 3"),
]
ConfidenceOption = Annotated[
    bool,
    typer.Option(
        "--draft-confidence",
        help="DSpark's confidence may say how many drafts of a round are judged.",
    ),
]
SampledOption = Annotated[
    bool,
    typer.Option(
        "--sampled",
        help="Decode steps draw the next token as each sequence asks, in place of taking the likeliest.",
    ),
]
RequireOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Fail where no kernel takes what the rule fused, in place of unfolding it.",
        metavar="RULE",
        show_default=False,
        autocompletion=COMPLETE_RULE,
    ),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of compiled kernels and certificates.", show_default="the user's cache", metavar="DIR"
    ),
]
DisableOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Leave a rule out, `all` for every one.",
        metavar="RULE",
        show_default=False,
        autocompletion=COMPLETE_RULE,
    ),
]
EnableOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Take a rule back that is left out.",
        metavar="RULE",
        show_default=False,
        autocompletion=COMPLETE_RULE,
    ),
]
ExpectOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Fail unless the rule applied N times in a decode step.", metavar="RULE=N", show_default=False
    ),
]
PipelineOption = Annotated[
    str | None,
    typer.Option(
        help="The passes, as the figures of a plan spell them: `quantize{recipe=official},fold,...`.",
        metavar="SPEC",
        show_default=False,
    ),
]
StopOption = Annotated[
    str | None,
    typer.Option(
        help="Write the graphs after that pass as text to -o FILE, and stop.",
        metavar="PASS",
        show_default=False,
    ),
]
ResumeOption = Annotated[
    Path | None,
    typer.Option(help="Go on from such a file, edited or not.", metavar="FILE", show_default=False),
]
DumpOption = Annotated[
    Path | None,
    typer.Option(
        help="Write the decode graph after every pass: 00-build.txt, 01-quantize.txt, ...",
        metavar="DIR",
        show_default=False,
    ),
]
KernelsOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of edited kernel files: each takes the place of the generated one of its name, as "
        "PLAN/kernels/NAME.py has it. They are code, which is run to build the kernel.",
        metavar="DIR",
        show_default=False,
    ),
]
TunedOption = Annotated[
    Path | None,
    typer.Option(
        help="Table of how kernels are cut, which `dsv4c tune` wrote, in place of dsv4c's own.",
        metavar="FILE",
        show_default=False,
    ),
]
CertifyOption = Annotated[
    bool,
    typer.Option(
        "--certify/--no-certify",
        help="Store a certificate of every way a rule applied: both sides evaluated on adversarial inputs. "
        "They are kept, so only what is new costs time (2 to 90 s for all).",
    ),
]


DECIDED = (
    "target",
    "recipe",
    "batch",
    "max_context",
    "chunk",
    "slots",
    "verify",
    "logits",
    "draft",
    "draft_tokens",
    "draft_confidence",
    "sampled",
    "ranks",
    "pipeline",
    "disable",
    "enable",
)
"""Parameters that a stopped compile has settled."""


def register(app: typer.Typer) -> None:
    app.command("compile")(compile_command)


def compile_command(
    context: typer.Context,
    config: ConfigOrNothing = None,
    output: OutputOption = None,
    target: TargetOption = "cpu",
    recipe: RecipeOption = "official",
    batch: BatchOption = None,
    slots: SlotsOption = None,
    max_context: ContextOption = 4096,
    verify: VerifyOption = None,
    chunk: ChunkOption = None,
    logits: LogitsOption = None,
    draft: DraftOption = Draft.OFF,
    draft_tokens: DraftTokensOption = None,
    draft_confidence: ConfidenceOption = False,
    sampled: SampledOption = False,
    ranks: RanksOption = 1,
    disable: DisableOption = None,
    enable: EnableOption = None,
    extra: PassOption = None,
    expect: ExpectOption = None,
    require_fused: RequireOption = None,
    pipeline: PipelineOption = None,
    stop_after: StopOption = None,
    resume: ResumeOption = None,
    dump_stages: DumpOption = None,
    kernels: KernelsOption = None,
    tuned: TunedOption = None,
    certify: CertifyOption = True,
    cache: CacheOption = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Compile a model to a plan: a folder of plain data that `dsv4c run` executes.

    Examples:

      dsv4c compile tiny -o tiny.plan

      dsv4c compile ./my-checkpoint --batch 1,4 --max-context 8192 --chunk 64,512

      dsv4c compile deepseek-v4-flash --recipe nvfp4-experts --json

      dsv4c compile tiny --disable all --enable sinkhorn --expect sinkhorn=12

      dsv4c compile tiny --stop-after fold -o x.ir; dsv4c compile --resume x.ir -o tiny.plan

      dsv4c compile tiny --target sm_90a --kernels my-kernels/
    """
    rules, expected = rules_of(extra or ()), counts(expect or ())
    if config is None and resume is None:
        raise ConfigError("Missing argument 'CONFIG' (or --resume FILE)")
    asked: Request | Saved
    if resume is not None:
        given = f"{config}" if config is not None else first_given(context, DECIDED)
        if given is not None:
            raise ConfigError(
                f"compile: --resume {resume} has decided {given}; leave it out, or compile anew"
            )
        if stop_after is not None:
            raise ConfigError("compile: --stop-after and --resume are for different calls; give one")
        saved = read_saved(_read(resume), str(resume))
        cuts = None if tuned is None else cuts_of(tuned, saved.deployment.target)
        asked = replace(saved, rules=rules, expected=expected, kernels=kernels, cuts=cuts)
    else:
        assert config is not None
        asked = Request(
            config,
            target=target,
            recipe=recipe,
            batch=sizes("--batch", batch),
            slots=slots,
            max_context=max_context,
            verify=verify,
            chunk=sizes("--chunk", chunk),
            logits=None if logits is None else logits.value,
            draft=draft.value,
            draft_tokens=draft_tokens,
            draft_confidence=draft_confidence,
            sampled=sampled,
            ranks=ranks,
            pipeline=pipeline,
            rules=rules,
            disable=disable or (),
            enable=enable or (),
            expected=expected,
            require_fused=require_fused or (),
            kernels=kernels,
            tuned=tuned,
        )
    job = asked.job()
    if stop_after is not None:
        _stop(job, stop_after, output, overwrite, json)
        return
    folder = output or Path(f"{job.config.name}.plan")
    check_target(folder, overwrite=overwrite)
    dump = _dumper(dump_stages, job.decode.name) if dump_stages is not None else None

    def inspect(name: str, compiled: Compiled) -> None:
        memory = least_memory(job, compiled.graph)
        if name == job.decode.name and not memory.fits:
            note(f"warning: {memory}")
        if dump is not None:
            dump(name, compiled)

    with progress_bar("compile") as progress:
        plan = compile(job, certify=certify, inspect=inspect, cache=cache, progress=progress)
    plan.save(folder, overwrite=overwrite)
    for warning in plan.report.get("warnings", ()):
        note(f"warning: {warning}")
    for remark in (*job.config.notes, *plan.report.get("notes", ())):
        note(f"note: {remark}")
    if draft is Draft.AUTO and not job.deployment.drafts:
        note(f"note: {no_drafts(job.config)}")
    if json:
        print_json({"plan": str(folder)} | figures(plan))
    else:
        print(f"{folder}: {plan.name} for {plan.target}, recipe {plan.recipe}")
        print(describe(plan), end="")


def counts(expected: Iterable[str]) -> dict[str, int]:
    """RULE=N options as data. Raises GraphError."""
    found = {}
    for text in expected:
        rule, _, number = text.partition("=")
        if not rule or not re.fullmatch(r"[0-9]{1,9}", number):
            raise GraphError(f"--expect {text[:80]}: expected a rule and a number, sinkhorn=86")
        found[rule] = int(number)
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise GraphError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise GraphError(f"{path}: is not text at byte {error.start}; expected a stopped compile") from None


def _stop(job: Job, after: str, output: Path | None, overwrite: bool, json: bool) -> None:
    """With `json` the graphs go to stdout inside of it, unless they have a file."""
    if output is not None and output.exists() and not overwrite:
        raise GraphError(f"{output}: exists; give another file, or --overwrite to replace it")
    saved = stop(job, after)
    nodes = {mode: len(graph.nodes) for mode, graph in saved.graphs.items()}
    if output is not None or not json:
        write_text(output, saved.text(), GraphError)
    if output is not None:
        counts = ", ".join(f"{mode} {count:,} nodes" for mode, count in nodes.items())
        note(f"{output}: {counts} after {after}; edit it, then dsv4c compile --resume {output}")
    if json:
        graphs = {} if output is not None else {"graphs": saved.text()}
        print_json({"after": after, "file": str(output) if output else None, "nodes": nodes} | graphs)


def _dumper(folder: Path, bucket: str) -> Callable[[str, Compiled], None]:
    """Writes the stages of one bucket as numbered files."""

    def write(name: str, compiled: Compiled) -> None:
        if name != bucket:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GraphError(f"{folder}: cannot be written: {error.strerror}") from None
        for number, (stage, graph) in enumerate(compiled.named):
            write_text(folder / f"{number:02}-{stage}.txt", print_graph(graph), GraphError)
        note(f"{folder}: {len(compiled.named)} stages")

    return write


def figures(plan: Plan) -> dict[str, Any]:
    """A plan in figures, for machines."""
    return {
        "name": plan.name,
        "digest": plan.digest,
        "config_digest": plan.config_digest,
        "deployment": dict(plan.deployment),
        "recipe": plan.recipe,
        "pipeline": plan.pipeline,
        "blocks": dict(plan.blocks),
        **plan.report,
        **({"cache_hits": plan.cache_hits} if plan.kernels else {}),
        **({"edited": edited_kernels(plan)} if edited_kernels(plan) else {}),
        **({"contributed": list(map(dict, plan.contributed))} if plan.contributed else {}),
        "certificates": len(plan.certificates),
        "seconds": {stage: round(seconds, 4) for stage, seconds in stage_seconds(plan).items()},
    }


def edited_kernels(plan: Plan) -> list[str]:
    """Names of the kernels whose text a person changed."""
    return [name for name, record in plan.kernels.items() if record["edited"]]


def stage_seconds(plan: Plan) -> dict[str, float]:
    """Seconds by stage, without those of single rules inside of fold."""
    return {name: seconds for name, seconds in plan.timings.items() if not name.startswith("rule ")}


def kinds(plan: Plan) -> str:
    """Its certificates by class: `all bit-exact`, or how many of each."""
    counts = Counter(str(c["kind"]) for c in plan.certificates)
    if len(counts) == 1:
        return f"all {next(iter(counts))}"
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def describe(plan: Plan) -> str:
    """A plan in figures, to read."""
    deployment, blocks = plan.deployment, plan.blocks
    slots = f"{deployment['slots']} slot" + "s" * (deployment["slots"] != 1)
    lines = [
        f"  {slots} of {deployment['max_context']:,} tokens",
        *([f"  {plan.ranks} ranks, of which each has:"] if plan.ranks > 1 else []),
        f"  weights {size(blocks['weights'])}, state {size(blocks['state'])}, arena {size(blocks['arena'])}",
    ]
    for name, program in plan.buckets.items():
        lines.append(f"  {name:12} {len(program.launches):,} launches, arena {size(program.arena_bytes)}")
    for given in plan.report.get("unfolded", ()):
        lines.append(
            f"  {given['bucket']}: no kernel for {given['nodes']} × {given['op']}, unfolded: "
            f"{given['launches']:+,} launches, {size(given['bytes'])} more"
        )
    if plan.certificates:
        lines.append(f"  {len(plan.certificates)} certificates, {kinds(plan)}")
    if plan.kernels:
        size_of_all = sum(len(content) for content in plan.files.values())
        lines.append(f"  {len(plan.kernels)} kernels for {plan.target}, files {size(size_of_all)}")
    if edited := edited_kernels(plan):
        lines.append(f"  edited kernels: {', '.join(edited)}")
    for given in plan.contributed:
        lines.append(f"  {given['kind']} {given['name']} of {given['source']}")
    if plan.timings:
        lines.append(f"  compiled in {sum(stage_seconds(plan).values()):.2f} s")
    return "\n".join(lines) + "\n"
