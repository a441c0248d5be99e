"""The pipeline, a list to read aloud. Passes say what they require and establish; every graph is verified.

A wrong order is an error when a pipeline is built. `str(pipeline)` is its spec; `parse_pipeline` reads it.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from dsv4c.errors import GraphError, contributed, listed
from dsv4c.ir.fused import Fused, refusal
from dsv4c.ir.graph import Graph
from dsv4c.ir.verify import verify
from dsv4c.passes.base import Context, Pass, parse_spec, split_specs
from dsv4c.passes.fold import FoldReport, Rule, fold
from dsv4c.passes.fusions import FUSIONS
from dsv4c.passes.prepack import prepack
from dsv4c.passes.quantize import quantize
from dsv4c.passes.recipes import recipe_named
from dsv4c.passes.shard import shard
from dsv4c.passes.tidy import tidy

GROUP = "dsv4c.passes"
"""Entry points of this group contribute passes and rules."""

OURS = "dsv4c"


@dataclass(frozen=True)
class Quantize(Pass):
    """Values and weights take the formats of a recipe."""

    name: ClassVar[str] = "quantize"
    establishes: ClassVar = frozenset({"formats"})
    recipe: str

    def run(self, graph: Graph, context: Context) -> Graph:
        return quantize(graph, recipe_named(self.recipe))


@dataclass(frozen=True)
class Shard(Pass):
    """Weights are cut over ranks, each of which runs the same graph; exchanges where whole values are wanted.

    On primitives, whose placements have one rule each.
    """

    name: ClassVar[str] = "shard"
    requires: ClassVar = frozenset({"formats"})  # parts are whole blocks
    establishes: ClassVar = frozenset({"ranks"})
    follows: ClassVar[str] = "quantize"
    ranks: int

    def run(self, graph: Graph, context: Context) -> Graph:
        return shard(graph, self.ranks)


@dataclass(frozen=True)
class Fold(Pass):
    """Fused ops take the place of their bodies. `rules`: the only ones to try; `without`: those to leave out.

    Warns of a rule that matched nothing, and raises GraphError where a count differs from `context.expected`.
    """

    name: ClassVar[str] = "fold"
    requires: ClassVar = frozenset({"formats"})  # bodies contain quantize
    establishes: ClassVar = frozenset({"fused"})
    rules: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def chosen(self, known: Mapping[str, Rule]) -> list[Rule]:
        for name in (*self.rules, *self.without):
            if name not in known:
                raise GraphError(f"fold: no rule is named {name!r}; there are: {listed(known, name)}")
        return [r for n, r in known.items() if n not in self.without and (not self.rules or n in self.rules)]

    def run(self, graph: Graph, context: Context) -> Graph:
        chosen = self.chosen(context.rules)
        folded, report = fold(graph, chosen)
        context.fold = report
        for rule in chosen:
            if rule.name not in context.expected and surprising(rule, report):
                ended = refusal(rule.op)
                context.warnings.append(
                    f"{graph.name}: the rule {rule.name} matched nothing; "
                    + (f"a way through its body ended at {ended}; " if ended else "")
                    + f"ask why-not {rule.name}"
                )
        for name, count in context.expected.items():
            found = report.counts.get(name)
            if found != count:
                state = "was not tried" if found is None else f"matched {found} times"
                raise GraphError(f"{graph.name}: the rule {name} {state}, expected {count}")
        return folded


def _graph(made: object) -> Graph:
    """What a pass gave. Raises GraphError for what is no graph."""
    if not isinstance(made, Graph):
        raise GraphError(
            f"`run` returned {type(made).__name__}; expected the graph that it made, or the one it was given"
        )
    return made


def surprising(rule: Rule, report: FoldReport) -> bool:
    """Did the rule match nothing where something was to be expected? `Fused.optional` and `unless` say."""
    found = report.rules[rule.name]
    if found.matched or (rule.op.optional and not found.tried):
        return False
    return not any(other in report.rules and report.rules[other].matched for other in rule.op.unless)


@dataclass(frozen=True)
class Prepack(Pass):
    """What depends on weights alone moves to load time."""

    name: ClassVar[str] = "prepack"
    requires: ClassVar = frozenset({"formats"})  # a weight has to have its format before it is packed
    follows: ClassVar[str] = "fold"

    def run(self, graph: Graph, context: Context) -> Graph:
        main, load = prepack(graph)
        context.prepack = None if load is None else verify(load)
        return main


@dataclass(frozen=True)
class Tidy(Pass):
    """Equal nodes become one, dead ones go."""

    name: ClassVar[str] = "tidy"
    establishes: ClassVar = frozenset({"tidy"})

    def run(self, graph: Graph, context: Context) -> Graph:
        return tidy(graph)


PIPELINE: tuple[Pass, ...] = (Quantize("official"), Fold(), Prepack(), Tidy())

BUILT_IN: dict[str, type[Pass]] = {p.name: type(p) for p in (*PIPELINE, Shard(2))}


@dataclass(frozen=True)
class Stage:
    """One pass that ran: the graph after it, and seconds."""

    name: str
    graph: Graph
    seconds: float


@dataclass(frozen=True)
class Pipeline:
    """Passes in an order that works. Raises GraphError for one that does not."""

    passes: tuple[Pass, ...] = PIPELINE
    given: frozenset[str] = frozenset()  # facts that hold before the first pass

    def __post_init__(self) -> None:
        holds = set(self.given)
        makers = {fact: p.name for p in (*PIPELINE, *self.passes) for fact in p.establishes}
        for i, p in enumerate(self.passes):
            missing = sorted(p.requires - holds)
            if missing:
                fact = missing[0]
                earlier = [q.name for q in self.passes[:i] if fact in q.spoils]
                spoiled = f" and {earlier[-1]} undid it" if earlier and fact in _made(self.passes[:i]) else ""
                raise GraphError(
                    f"pipeline {self}: {p.name} requires {fact!r}, which {makers.get(fact, 'no pass')} "
                    f"establishes{spoiled}; put {makers.get(fact, 'such a pass')} before {p.name}"
                )
            holds = (holds - p.spoils) | p.establishes

    def __str__(self) -> str:
        return ",".join(p.spec for p in self.passes)

    def run(
        self,
        graph: Graph,
        context: Context,
        *,
        stop_after: str | None = None,
        watch: Callable[[Stage], None] | None = None,
    ) -> list[Stage]:
        """Run the passes, verifying every graph; stages in order, the last one's graph is the result.

        Raises GraphError, naming the pass, where one fails or leaves an ill-formed graph.
        """
        if stop_after is not None:
            self.position(stop_after)
        stages: list[Stage] = []
        for p in self.passes:
            started = time.perf_counter()
            with contributed(f"pass {p.name}"):
                after = p.run(graph, context)
            try:
                graph = after if after is graph else verify(_graph(after))
            except GraphError as error:
                raise GraphError(f"pass {p.name}: {error}") from error
            stages.append(Stage(p.name, graph, time.perf_counter() - started))
            if watch is not None:
                watch(stages[-1])
            if p.name == stop_after:
                break
        return stages

    def position(self, name: str) -> int:
        for i, p in enumerate(self.passes):
            if p.name == name:
                return i
        names = [p.name for p in self.passes]
        raise GraphError(f"no pass is named {name!r} in the pipeline; there are: {listed(names, name)}")

    def after(self, name: str) -> Pipeline:
        """The passes behind `name`, for a graph that was saved there (and perhaps edited)."""
        i = self.position(name) + 1
        return Pipeline(self.passes[i:], self.given | _made(self.passes[:i]))

    def with_pass(self, new: Pass) -> Pipeline:
        """With `new` right behind the pass that it follows."""
        i = self.position(new.follows) + 1
        return replace(self, passes=(*self.passes[:i], new, *self.passes[i:]))

    def with_options(self, name: str, **options: Any) -> Pipeline:
        """With other options for the pass of that name."""
        i = self.position(name)
        changed = replace(self.passes[i], **options)
        return replace(self, passes=(*self.passes[:i], changed, *self.passes[i + 1 :]))


def _made(passes: Sequence[Pass]) -> frozenset[str]:
    return frozenset(fact for p in passes for fact in p.establishes)


def parse_pipeline(text: str, known: Mapping[str, type[Pass]] | None = None) -> Pipeline:
    """`str(Pipeline)` read back. Raises GraphError."""
    known = BUILT_IN if known is None else known
    return Pipeline(tuple(parse_spec(part, known) for part in split_specs(text)))


# --- contributions of other packages ---


@dataclass(frozen=True)
class Contributions:
    """Passes and rules by name, and where each that is not built in comes from: `--pass module:object` or the
    package.
    """

    passes: Mapping[str, type[Pass]]
    rules: Mapping[str, Rule]
    instances: tuple[Pass, ...] = ()  # given as objects, to be put into the pipeline
    sources: Mapping[str, str] = field(default_factory=dict)

    def origin(self, name: str) -> dict[str, str]:
        """Who contributed a pass or rule, and the file and line that it is written in, as plan data."""
        kind = "rule" if name in self.rules else "pass"
        written = self.rules[name].op if kind == "rule" else self.passes[name]
        return {"name": name, "kind": kind, "source": self.sources[name], "at": place_of(written)}

    def rule(self, name: str) -> Rule:
        if name not in self.rules:
            raise GraphError(f"no rule is named {name!r}; there are: {listed(self.rules, name)}")
        return self.rules[name]


def contributions(objects: Iterable[tuple[str, Any]] = ()) -> Contributions:
    """Built-in passes and rules, and those of (source, object) pairs.

    An object is a Pass (class or instance), a Rule, a fused op, a module or a sequence of these. Raises
    GraphError when two sources use one name.
    """
    passes: dict[str, tuple[str, type[Pass]]] = {n: (OURS, p) for n, p in BUILT_IN.items()}
    rules: dict[str, tuple[str, Rule]] = {r.name: (OURS, r) for r in map(as_rule, FUSIONS)}
    instances: list[Pass] = []
    for source, given in objects:
        for item in _flatten(source, given):
            table: dict[str, Any] = rules if isinstance(item, Rule) else passes
            kept = item if isinstance(item, Rule | type) else type(item)
            other = table.get(item.name)
            if other is not None and other[1] != kept:
                raise GraphError(f"{source} and {other[0]} both contribute {item.name!r}; rename one")
            table[item.name] = (source, kept)
            if isinstance(item, Pass):
                instances.append(item)
    return Contributions(
        {n: p for n, (_, p) in passes.items()},
        {n: r for n, (_, r) in rules.items()},
        tuple(instances),
        {n: source for n, (source, _) in (*passes.items(), *rules.items()) if source != OURS},
    )


def place_of(written: type | Callable[..., Any]) -> str:
    """`package/module.py:12`: the same on every machine that has the package."""
    module = sys.modules.get(written.__module__)
    file = Path(getattr(module, "__file__", None) or f"{written.__module__}.py")
    levels = written.__module__.count(".") + 1 + (file.stem == "__init__")
    place = "/".join(file.parts[-levels:])
    try:
        return f"{place}:{inspect.getsourcelines(written)[1]}"
    except OSError:  # made by a program, or shipped without its source
        return place


def as_rule(given: Rule | type[Fused]) -> Rule:
    return given if isinstance(given, Rule) else Rule(given)


def _flatten(source: str, given: Any) -> list[Rule | Pass | type[Pass]]:
    if isinstance(given, Rule | Pass):
        return [given]
    if isinstance(given, type) and issubclass(given, Fused):
        return [Rule(given)]
    if isinstance(given, type) and issubclass(given, Pass):
        needs = [f.name for f in fields(given) if f.default is f.default_factory]
        return [given] if needs else [given()]
    if isinstance(given, ModuleType):
        own = [v for v in vars(given).values() if getattr(v, "__module__", "") == given.__name__]
        kinds = [v for v in own if isinstance(v, type) and issubclass(v, Fused | Pass)]
        rules = [v for v in vars(given).values() if isinstance(v, Rule)]
        if not kinds and not rules:
            raise GraphError(f"{source} contributes nothing; expected a pass, a rule or a fused op in it")
        guarded = {r.op for r in rules}
        return [*rules, *(item for v in kinds if v not in guarded for item in _flatten(source, v))]
    if isinstance(given, Sequence) and not isinstance(given, str):
        return [item for part in given for item in _flatten(source, part)]
    raise GraphError(
        f"{source} contributes {given!r}; expected a pass, a rule, a fused op, or several in a module"
    )


def load_object(name: str) -> tuple[str, Any]:
    """`package.module:object` (or a module) imported, as a contribution. Raises GraphError."""
    module, _, attribute = name.partition(":")
    try:
        with contributed(f"--pass {name}"):
            found: Any = import_module(module)
        for part in filter(None, attribute.split(".")):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise GraphError(f"--pass {name}: {error}; expected MODULE:OBJECT") from None
    return f"--pass {name}", found


def installed() -> list[tuple[str, Any]]:
    """Passes and rules of installed packages, in order of their names. Raises GraphError naming a broken
    entry point.
    """
    found = []
    for entry, given in loaded_entries(GROUP):
        package = entry.name if entry.dist is None else f"package {entry.dist.name}"
        found.append((f"{package} ({entry.value})", given))
    return found


def loaded_entries(group: str) -> Iterator[tuple[EntryPoint, Any]]:
    """Entry points of a group by name, with what they load. Raises GraphError naming a broken one."""
    for entry in sorted(entry_points(group=group), key=lambda e: (e.name, e.value)):
        try:
            yield entry, entry.load()
        except (ImportError, AttributeError) as error:
            raise GraphError(
                f"the entry point {entry.name} = {entry.value!r} of {group} cannot be loaded: {error}"
            ) from None
