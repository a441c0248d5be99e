"""The graphs of a compile, stage by stage: made, made again from a plan, stopped, saved and resumed.

A plan stores what decided it, not its stages; `job_of(plan)` makes them again, which takes seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsv4c import strict_json
from dsv4c.buckets import Bucket
from dsv4c.codegen.lower import Folded
from dsv4c.config import Deployment, ModelConfig
from dsv4c.cuts import Cut
from dsv4c.errors import ConfigError, GraphError, listed
from dsv4c.ir.graph import Graph, Node
from dsv4c.ir.resize import resized
from dsv4c.ir.text import parse_graph, print_graph
from dsv4c.ir.verify import verify
from dsv4c.models.deepseek_v4 import build
from dsv4c.models.rows import POOL_TILE, WINDOW_TILE
from dsv4c.passes.base import Context
from dsv4c.passes.expand import unfold
from dsv4c.passes.fold import fold
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
from dsv4c.passes.tidy import tidy
from dsv4c.passes.work import Match
from dsv4c.plan.folder import Plan

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
            raise GraphError(f"no stage is named {name!r}; there are: {listed(found, name)}")
        return found[name]


@dataclass(frozen=True)
class Job:
    """Everything that decides a plan. `saved` is the stopped compile that it goes on from.

    `expected` counts of applications must hold for the smallest decode bucket; rules of `require_fused` must
    find a kernel wherever they apply. `kernels` is a folder of edited kernel files. `cuts` are how kernels
    are cut, by key, in place of what dsv4c has measured.
    """

    config: ModelConfig
    deployment: Deployment
    recipe: Recipe
    line: Pipeline
    rules: Contributions
    expected: Mapping[str, int] = field(default_factory=dict)
    require_fused: frozenset[str] = frozenset()
    kernels: Path | None = None
    cuts: Mapping[str, Cut] | None = None
    saved: Saved | None = None

    def bucket(self, name: str) -> Bucket:
        """A bucket by its name, or the smallest of a kind. Raises GraphError listing those there are."""
        found = [b for b in self.deployment.buckets if name in (b.name, b.kind)]
        if not found:
            known = ", ".join(b.name for b in self.deployment.buckets)
            raise GraphError(f"{self.config.name}: there is no bucket {name!r}, only {known}")
        return min(found, key=lambda bucket: bucket.rows)

    @property
    def decode(self) -> Bucket:
        """The smallest decode bucket, which figures speak of."""
        return self.bucket("decode")

    def built(self, bucket: Bucket) -> Graph:
        """The paper's operations for a bucket."""
        own_head = self.recipe.copies_head
        return verify(build(self.config, self.deployment, bucket, self.recipe.activation, own_head=own_head))

    def start(self, bucket: Bucket) -> Graph:
        """The graph that the passes begin with: built now, or kept when the compile stopped."""
        return self.built(bucket) if self.saved is None else self.saved.graphs[bucket.name]

    def compiled(
        self,
        bucket: Bucket,
        *,
        start: Graph | None = None,
        stop_after: str | None = None,
        watch: Callable[[Stage], None] | None = None,
    ) -> Compiled:
        """Run the pipeline, or what is left of it, over one bucket; `start` if it is made already.

        Raises GraphError.
        """
        context = Context(
            rules=self.rules.rules,
            expected=self.expected if bucket == self.decode else {},
            prepack=None if self.saved is None else self.saved.loads.get(bucket.name),
        )
        begins = BUILD if self.saved is None else self.saved.after
        graph = self.start(bucket) if start is None else start
        passes = Pipeline(()) if stop_after == BUILD else self.line
        stop = None if stop_after == BUILD else stop_after
        return Compiled(context, passes.run(graph, context, stop_after=stop, watch=watch), graph, begins)

    def firsts(self) -> dict[Bucket, Bucket]:
        """For every bucket the one whose graph it has, but for sizes: the first, decode steps before others,
        of those that run the model over what they are given and give logits of the same rows; either such as
        write to rings before they read them, or such as keep rows beside them, in copies that differ by whole
        tiles. Buckets that draft or judge, and those of a compile that goes on, have graphs of their own.
        """
        found: dict[tuple[object, ...], Bucket] = {}
        firsts = {}
        for b in sorted(self.deployment.buckets, key=lambda bucket: (bucket.kind != "decode", bucket.rows)):
            own = self.saved is not None or not b.is_main
            beside = b.tokens % math.lcm(WINDOW_TILE, POOL_TILE) if b.keeps_beside else None
            firsts[b] = found.setdefault((b,) if own else (b.logits, b.sampled, beside), b)
        return {b: firsts[b] for b in self.deployment.buckets}

    def resized(self, graph: Graph, bucket: Bucket) -> Graph:
        """The graph of another bucket that has the same form."""
        sizes = {"tokens": bucket.rows, "lengths": bucket.sequences, "slots": bucket.sequences}
        inputs = {
            v.name: v.type.with_shape((sizes.get(v.name, bucket.rows), *v.type.shape[1:]))
            for v in graph.inputs
        }
        name = f"{self.config.name}.{bucket.name}"
        return verify(resized(graph, name, inputs, bucket.tokens))

    def folded(self, bucket: Bucket, first: Bucket, compiled: Compiled, again: list[Match]) -> Folded:
        """A bucket to lower, with the graph of the first one of its form. Where nodes are given back to their
        parts and those folded again, the places where rules apply then join `again`.
        """

        def unfold(graph: Graph, nodes: Sequence[Node], without: frozenset[str]) -> Graph:
            graph, matches = self.unfolded(graph, nodes, without)
            again.extend(matches)
            return graph

        graph = compiled.graph if bucket == first else self.resized(compiled.graph, bucket)
        return Folded(bucket, graph, compiled.context.prepack, unfold)

    def unfolded(
        self, graph: Graph, nodes: Sequence[Node], without: frozenset[str]
    ) -> tuple[Graph, list[Match]]:
        """`graph` with the bodies of these nodes, folded again by the rules that are on, less some ops; and
        where those applied.
        """
        line = self.line if self.saved is None else parse_pipeline(self.saved.pipeline, self.rules.passes)
        chosen = [
            rule
            for p in line.passes
            if isinstance(p, Fold)
            for rule in p.chosen(self.rules.rules)
            if rule.op.name not in without
        ]
        again, report = fold(unfold(graph, nodes), chosen)
        return verify(tidy(again)), report.matches


def rules_of(objects: Iterable[str] = ()) -> Contributions:
    """Passes and rules: built in, of installed packages, and of `module:object` names. Raises GraphError."""
    return contributions([*installed(), *map(load_object, objects)])


def job_of(plan: Plan, rules: Contributions | None = None) -> Job:
    """What `plan` was compiled from. `rules` must hold what it was given by `--pass`. Raises GraphError."""
    known = rules_of() if rules is None else rules
    for origin in plan.contributed:
        if origin["kind"] != "kernel" and origin["name"] not in known.sources:
            _, given, what = origin["source"].partition("--pass ")
            remedy = f"give --pass {what}" if given else "install it"
            raise GraphError(
                f"plan {plan.name} was compiled with the {origin['kind']} {origin['name']} of "
                f"{origin['source']}, written in {origin['at']}; {remedy}"
            )
    return Job(
        ModelConfig.from_dict(plan.config),
        Deployment.from_dict(plan.deployment),
        recipe_named(plan.recipe),
        parse_pipeline(plan.pipeline, known.passes),
        known,
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
    rules: Contributions | None = None  # what may fold from here on; built-in and installed ones by default
    expected: Mapping[str, int] = field(default_factory=dict)
    kernels: Path | None = None
    cuts: Mapping[str, Cut] | None = None

    def text(self) -> str:
        """Two lines of comment, then every graph under a line `## bucket NAME` or `## load NAME`, and END."""
        asked = {
            "config": self.config.to_dict(),
            "deployment": self.deployment.to_dict(),
            "recipe": self.recipe,
            "pipeline": self.pipeline,
            "counts": dict(self.counts),
        }
        parts = [f"{FIRST_LINE}{self.after}\n# {json.dumps(asked)}\n"]
        parts += [f"## bucket {name}\n{print_graph(graph)}" for name, graph in self.graphs.items()]
        parts += [f"## load {name}\n{print_graph(graph)}" for name, graph in self.loads.items()]
        return "".join([*parts, END])

    def job(self) -> Job:
        """What is left to do. Raises GraphError for counts that are expected of a fold that is over."""
        known = rules_of() if self.rules is None else self.rules
        for name in self.expected:
            known.rule(name)
        line = parse_pipeline(self.pipeline, known.passes)
        rest = line if self.after == BUILD else line.after(self.after)
        if self.expected and all(p.name != "fold" for p in rest.passes):
            raise GraphError(
                f"fold ran before the stop after {self.after}; expect counts of a compile that folds"
            )
        recipe = recipe_named(self.recipe)
        return Job(
            self.config,
            self.deployment,
            recipe,
            rest,
            known,
            self.expected,
            kernels=self.kernels,
            cuts=self.cuts,
            saved=self,
        )


def stop(job: Job, after: str) -> Saved:
    """Run every bucket's pipeline up to `after` ("build": no pass). Raises GraphError."""
    compiled = {b.name: job.compiled(b, stop_after=after) for b in job.deployment.buckets}
    decode = compiled[job.decode.name].context
    return Saved(
        after,
        job.config,
        job.deployment,
        job.recipe.name,
        str(job.line),
        decode.fold.counts if decode.fold is not None else {},
        {name: c.graph for name, c in compiled.items()},
        {name: c.context.prepack for name, c in compiled.items() if c.context.prepack is not None},
    )


def read_saved(text: str, name: str = "the file") -> Saved:
    """`Saved.text` read back, graphs perhaps edited. Raises GraphError naming the line of a mistake."""
    first, _, rest = text.partition("\n")
    second, _, rest = rest.partition("\n")
    if not first.startswith(FIRST_LINE) or not second.startswith("# {"):
        raise GraphError(f"{name}: holds no stopped compile; expected what `--stop-after PASS -o FILE` wrote")
    try:
        asked = strict_json.parse(second[2:])
        config, deployment = ModelConfig.from_dict(asked["config"]), Deployment.from_dict(asked["deployment"])
        recipe, pipeline, counts = asked["recipe"], asked["pipeline"], dict(asked["counts"])
        if not (isinstance(recipe, str) and isinstance(pipeline, str)):
            raise TypeError(f"recipe and pipeline are {recipe!r} and {pipeline!r}; expected their names")
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise GraphError(f"{name}: line 2: cannot be read: {error}; leave that line as it was") from None
    if not rest.rstrip().endswith(f"\n{END.strip()}"):
        raise GraphError(f"{name}: is cut off: its last line is not {END.strip()!r}; stop the compile again")
    rest = rest.rstrip().removesuffix(END.strip())
    graphs: dict[str, dict[str, Graph]] = {"bucket": {}, "load": {}}
    for number, title, lines in _parts(rest):
        kind, _, bucket_name = title.partition(" ")
        if kind not in graphs:
            raise GraphError(f"{name}: line {number}: '## {title}'; expected ## bucket NAME or ## load NAME")
        if bucket_name in graphs[kind]:
            raise GraphError(f"{name}: line {number}: '## {title}' is there twice; remove one")
        try:
            graphs[kind][bucket_name] = verify(parse_graph("\n".join(lines) + "\n"))
        except GraphError as error:
            raise GraphError(f"{name}: {title}, counted from line {number + 1}: {error}") from None
    for bucket in deployment.buckets:
        if bucket.name not in graphs["bucket"]:
            raise GraphError(f"{name}: bucket {bucket.name} is missing, which line 2 names; it was cut off")
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
