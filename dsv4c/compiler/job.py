"""The graphs of a compile, stage by stage: made, made again from a plan, stopped, saved and resumed.

A plan stores what decided it, not its stages; `job_of(plan)` makes them again, which takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dsv4c import strict_json
from dsv4c.config import Deployment, ModelConfig
from dsv4c.errors import ConfigError, GraphError
from dsv4c.ir.graph import Graph
from dsv4c.ir.text import parse_graph, print_graph
from dsv4c.ir.verify import verify
from dsv4c.models.deepseek_v4 import Mode, build
from dsv4c.passes.base import Context
from dsv4c.passes.memory import MemoryPlan
from dsv4c.passes.pipeline import (
    Contributions,
    Fold,
    Pipeline,
    Stage,
    contributions,
    installed,
    load_object,
    parse_pipeline,
)
from dsv4c.passes.recipes import Recipe, recipe_named
from dsv4c.passes.schedule import Schedule

if TYPE_CHECKING:
    from dsv4c.plan.records import Plan

ALL = "all"
"""In place of a rule's name: every rule."""

BUILD = "build"
"""Name of the stage before the first pass: the paper's operations."""

FIRST_LINE = "# dsv4c graphs of a compile that stopped after "
END = "## end\n"
"""Last line of a stopped compile; a file without it was cut off."""


@dataclass(frozen=True)
class Compiled:
    """One bucket after its pipeline: the graph it began with, and what the passes left, stage by stage."""

    context: Context
    stages: Sequence[Stage]
    start: Graph
    begins: str = BUILD  # the stage that `start` is

    @property
    def graph(self) -> Graph:
        return self.stages[-1].graph if self.stages else self.start

    @property
    def schedule(self) -> Schedule:
        if self.context.schedule is None:
            raise GraphError("pipeline: no pass schedules launches; a plan needs schedule and memory")
        return self.context.schedule

    @property
    def memory(self) -> MemoryPlan:
        if self.context.memory is None:
            raise GraphError("pipeline: no pass plans memory; a plan needs schedule and memory")
        return self.context.memory

    @property
    def named(self) -> list[tuple[str, Graph]]:
        """(stage, graph) from the first, the paper's operations, to the last pass's; names are distinct."""
        found: dict[str, Graph] = {self.begins: self.start}
        for stage in self.stages:
            name, n = stage.name, 1
            while name in found:
                n += 1
                name = f"{stage.name}-{n}"
            found[name] = stage.graph
        return list(found.items())

    def after(self, name: str) -> Graph:
        """The graph after that stage. Raises GraphError naming the stages there are."""
        found = dict(self.named)
        if name not in found:
            raise GraphError(f"no stage is named {name!r}; there are: {', '.join(found)}")
        return found[name]


@dataclass(frozen=True)
class Job:
    """Everything that decides a compile's graphs."""

    config: ModelConfig
    deployment: Deployment
    recipe: Recipe
    line: Pipeline
    rules: Contributions
    modes: tuple[Mode, ...]
    expected: Mapping[str, int] = field(default_factory=dict)

    def context(self, mode: str) -> Context:
        expected = self.expected if mode == "decode" else {}
        return Context(rules=self.rules.rules, expected=expected, parallel=self.deployment.target != "cpu")

    def built(self, mode: Mode) -> Graph:
        """The paper's operations for a bucket."""
        return verify(build(self.config, self.deployment, mode, self.recipe.activation))

    def bucket(
        self,
        mode: Mode,
        *,
        graph: Graph | None = None,
        stop_after: str | None = None,
        watch: Callable[[Stage], None] | None = None,
    ) -> Compiled:
        """Run the pipeline over one bucket, `graph` if it is built already. Raises GraphError."""
        context = self.context(mode)
        start = self.built(mode) if graph is None else graph
        if stop_after == BUILD:
            return Compiled(context, [], start)
        return Compiled(context, self.line.run(start, context, stop_after=stop_after, watch=watch), start)


def rules_of(objects: Iterable[str] = ()) -> Contributions:
    """Passes and rules: built in, of installed packages, and of `module:object` names. Raises GraphError."""
    return contributions([*installed(), *map(load_object, objects)])


def job_of(plan: Plan, rules: Contributions | None = None) -> Job:
    """What `plan` was compiled from. `rules` must hold what it was given by `--pass`. Raises GraphError."""
    known = rules_of() if rules is None else rules
    return Job(
        ModelConfig.from_dict(plan.config),
        Deployment(**plan.deployment),
        recipe_named(plan.recipe),
        parse_pipeline(plan.pipeline, known.passes),
        known,
        tuple(plan.buckets),  # type: ignore[arg-type]
    )


def choose_rules(
    line: Pipeline, rules: Contributions, disable: Iterable[str] = (), enable: Iterable[str] = ()
) -> Pipeline:
    """`line` without the rules of `disable` ("all": every one), with those of `enable` after all.

    Raises GraphError for a rule that there is not.
    """
    on, off = list(enable), list(disable)
    for name in (*on, *off):
        if name != ALL:
            rules.rule(name)
    if not on and not off:
        return line
    old = line.passes[line.position("fold")]
    assert isinstance(old, Fold)
    chosen = old.rules or tuple(rules.rules)
    left = set(old.without) | set(rules.rules if ALL in off else off) | (set(rules.rules) - set(chosen))
    left -= set(rules.rules if ALL in on else on)
    without = tuple(name for name in rules.rules if name in left)
    return line.with_options("fold", rules=(), without=without)


# --- stopping and resuming ---


@dataclass(frozen=True)
class Saved:
    """A compile that stopped after a pass: its graphs, those that run at load, and what it was asked for."""

    after: str
    config: ModelConfig
    deployment: Deployment
    recipe: str
    pipeline: str
    counts: Mapping[str, int]  # applications by rule in the decode bucket, if fold ran
    graphs: Mapping[str, Graph]
    loads: Mapping[str, Graph] = field(default_factory=dict)

    def text(self) -> str:
        """Two lines of comment, then every graph under a line `## bucket MODE` or `## load MODE`, and END."""
        asked = {
            "config": self.config.to_dict(),
            "deployment": asdict(self.deployment),
            "recipe": self.recipe,
            "pipeline": self.pipeline,
            "counts": dict(self.counts),
        }
        parts = [f"{FIRST_LINE}{self.after}\n# {json.dumps(asked)}\n"]
        parts += [f"## bucket {mode}\n{print_graph(graph)}" for mode, graph in self.graphs.items()]
        parts += [f"## load {mode}\n{print_graph(graph)}" for mode, graph in self.loads.items()]
        return "".join([*parts, END])

    def job(self, rules: Contributions | None = None, expected: Mapping[str, int] | None = None) -> Job:
        """What is left to do. Raises GraphError for counts that are expected of a fold that is over."""
        known = rules_of() if rules is None else rules
        for name in expected or ():
            known.rule(name)
        line = parse_pipeline(self.pipeline, known.passes)
        rest = line if self.after == BUILD else line.after(self.after)
        if expected and all(p.name != "fold" for p in rest.passes):
            raise GraphError(
                f"fold ran before the stop after {self.after}; expect counts of a compile that folds"
            )
        modes: tuple[Mode, ...] = tuple(self.graphs)  # type: ignore[arg-type]
        return Job(
            self.config, self.deployment, recipe_named(self.recipe), rest, known, modes, expected or {}
        )


def stop(job: Job, after: str) -> Saved:
    """Run every bucket's pipeline up to `after` ("build": no pass). Raises GraphError."""
    placed = {mode: job.bucket(mode, stop_after=after) for mode in job.modes}
    decode = placed["decode"].context
    return Saved(
        after,
        job.config,
        job.deployment,
        job.recipe.name,
        str(job.line),
        decode.fold.counts if decode.fold is not None else {},
        {mode: p.graph for mode, p in placed.items()},
        {mode: p.context.prepack for mode, p in placed.items() if p.context.prepack is not None},
    )


def resume(job: Job, saved: Saved, mode: Mode, watch: Callable[[Stage], None] | None = None) -> Compiled:
    """One bucket's passes behind the one that `saved` stopped after. Raises GraphError."""
    context = replace(job.context(mode), prepack=saved.loads.get(mode))
    start = saved.graphs[mode]
    return Compiled(context, job.line.run(start, context, watch=watch), start, saved.after)


def read_saved(text: str, name: str = "the file") -> Saved:
    """`Saved.text` read back, graphs perhaps edited. Raises GraphError naming the line of a mistake."""
    first, _, rest = text.partition("\n")
    second, _, rest = rest.partition("\n")
    if not first.startswith(FIRST_LINE) or not second.startswith("# {"):
        raise GraphError(f"{name}: holds no stopped compile; expected what `--stop-after PASS -o FILE` wrote")
    if not rest.rstrip().endswith(f"\n{END.strip()}"):
        raise GraphError(f"{name}: is cut off: its last line is not {END.strip()!r}; stop the compile again")
    rest = rest.rstrip().removesuffix(END.strip())
    try:
        asked = strict_json.parse(second[2:])
        config, deployment = ModelConfig.from_dict(asked["config"]), Deployment(**asked["deployment"])
        recipe, pipeline, counts = asked["recipe"], asked["pipeline"], dict(asked["counts"])
        if not (isinstance(recipe, str) and isinstance(pipeline, str)):
            raise TypeError(f"recipe and pipeline are {recipe!r} and {pipeline!r}; expected their names")
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise GraphError(f"{name}: line 2: cannot be read: {error}; leave that line as it was") from None
    graphs: dict[str, dict[str, Graph]] = {"bucket": {}, "load": {}}
    for number, title, lines in _parts(rest):
        kind, _, mode = title.partition(" ")
        if kind not in graphs:
            raise GraphError(f"{name}: line {number}: '## {title}'; expected ## bucket MODE or ## load MODE")
        if mode in graphs[kind]:
            raise GraphError(f"{name}: line {number}: '## {title}' is there twice; remove one")
        try:
            graphs[kind][mode] = verify(parse_graph("\n".join(lines) + "\n"))
        except GraphError as error:
            raise GraphError(f"{name}: {title}, counted from line {number + 1}: {error}") from None
    if "decode" not in graphs["bucket"]:
        raise GraphError(f"{name}: has no decode bucket; a plan cannot be without")
    after = first.removeprefix(FIRST_LINE).strip()
    return Saved(after, config, deployment, recipe, pipeline, counts, graphs["bucket"], graphs["load"])


def _parts(text: str) -> list[tuple[int, str, list[str]]]:
    """(line, title, lines) of what stands under each `## title`; two lines stand before `text`."""
    parts: list[tuple[int, str, list[str]]] = []
    for number, line in enumerate(text.splitlines(), start=3):
        if line.startswith("## "):
            parts.append((number, line[3:].strip(), []))
        elif parts:
            parts[-1][2].append(line)
    return parts


def figures(
    placed: Mapping[str, Compiled],
    job: Job,
    launches: Mapping[str, int] | None = None,
    counts: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The decode bucket in figures: launches by layer, bytes by token, what each rule did.

    `launches` by layer and `counts` of rules stand in where kernels were made, or fold had run before.
    Planned bytes are what the launches read and write, per sequence; compulsory ones are what one sequence
    must move, `dsv4c.models.traffic`. A layer kind has the launches of its largest layer, None without one.
    """
    from dsv4c.models.schedule import LayerKind, layer_plans
    from dsv4c.passes.explain import table
    from dsv4c.view.diff import totals
    from dsv4c.view.text import summarize

    decode = placed["decode"]
    by_layer = launches or decode.schedule.launches
    per_kind: dict[str, int | None] = {str(kind).lower(): None for kind in LayerKind}
    for i, plan in enumerate(layer_plans(job.config)):
        kind = str(plan.attention).lower()
        per_kind[kind] = max(per_kind[kind] or 0, by_layer.get(f"layers.{i}", 0))
    report = decode.context.fold
    rows = [asdict(row) for row in table(report)] if report is not None else []
    for row in rows:
        del row["ms"]  # a plan holds nothing that differs from run to run; its timings have it
    return {
        "launches_per_layer": per_kind,
        "launches_outside_layers": by_layer.get("", 0),
        "planned_bytes_per_token": totals(decode.graph).bytes // job.deployment.batch,
        "compulsory_bytes_per_token": sum(summarize(decode.graph, job.config).bytes_per_token.values()),
        "rules": dict(report.counts if report is not None else counts or {}),
        "passes": rows,
    }
