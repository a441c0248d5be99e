"""A plan's graphs lowered once more, and its kernels built once more: both must give what the plan holds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dsv4c.codegen import build as kernels
from dsv4c.codegen.contributed import installed, origin
from dsv4c.codegen.lower import Folded, Lowered, lower
from dsv4c.codegen.targets import Target, target_of
from dsv4c.compiler.assemble import sizes_of, unused_of, weights_of
from dsv4c.compiler.job import job_of
from dsv4c.cuts import Cut
from dsv4c.errors import BuildError, Dsv4cError, GraphError
from dsv4c.ir.graph import Graph, Node
from dsv4c.ir.text import parse_graph
from dsv4c.ir.verify import verify
from dsv4c.passes.pipeline import Contributions
from dsv4c.plan.check import Violation, programs
from dsv4c.plan.folder import Plan
from dsv4c.plan.records import KernelCode, Launch, Program


def differences(plan: Plan, rules: Contributions) -> Iterator[Violation]:
    """Where the plan is not what its graphs are lowered to: launches, places, weights, bodies, figures."""
    try:
        job = job_of(plan, rules)
        own: Mapping[str, tuple[object, object]] = {
            "name": (plan.name, job.config.name),
            "config_digest": (plan.config_digest, job.config.digest),
            "config": (plan.config, job.config.to_dict()),
        }
        wrong = [field for field, (found, made) in own.items() if found != made]
        if wrong:
            yield Violation("lowered", "", f"{', '.join(wrong)}: not what its config makes")
            return
        lowered, target = lowered_again(plan)
    except (Dsv4cError, KeyError, TypeError, UnicodeDecodeError) as error:
        yield Violation("lowered", "", f"cannot be lowered again: {error}")
        return
    wanted: Mapping[str, tuple[object, object]] = {
        "blocks": (plan.blocks, lowered.blocks),
        "state": (plan.state, lowered.state),
        "weights": (plan.weights, weights_of(job.config, job.recipe, lowered)),
        "unused": (plan.unused, unused_of(job.config, lowered)),
        "report.buckets": (plan.report.get("buckets"), sizes_of(lowered)),
        "report.kernels": (plan.report.get("kernels"), len(plan.kernels)),
    }
    for field, (found, made) in wanted.items():
        if found != made:
            yield Violation("lowered", "", f"{field}: {_first_difference(found, made)}")
    written = {key: source.text.encode() for key, source in target.sources.items()}
    sources = {
        key: written.get(key) if record["edited"] else plan.files.get(record["source"])
        for key, record in plan.kernels.items()
    }
    made_programs = dict(lowered.programs) | ({"load": lowered.load} if lowered.load is not None else {})
    for name, program in programs(plan).items():
        again, called = made_programs[name], lowered.graphs[name].name
        if called != (f"{plan.name}.{name}" if program.bucket is not None else name):
            yield Violation("lowered", "", f"its graph is called {called}", name)
        for v in _program(program, again, sources, written):
            yield replace(v, bucket=name)
    texts = lowered.files | target.bodies.files
    for name, content in plan.files.items():
        if not name.startswith("kernels/") and texts.get(name) != content:
            yield Violation("lowered", "", f"{name} is not what this version of dsv4c writes")


def lowered_again(plan: Plan) -> tuple[Lowered, Target]:
    """Raises GraphError for graphs that cannot be read, BuildError for what no code takes, or naming who gave
    kernels and is not installed.
    """

    def keep(graph: Graph, nodes: Sequence[Node], given_back: frozenset[str]) -> Graph:
        raise BuildError(f"at {nodes[0].name}: no code takes {nodes[0].op.name}")

    graphs = {
        name: verify(parse_graph(plan.files[program.graph].decode()))
        for name, program in programs(plan).items()
    }
    cuts: Any = plan.report.get("cuts", {})
    if not isinstance(cuts, Mapping):
        raise GraphError(f"report.cuts is {cuts!r:.80}, expected kernels and how they are cut")
    target = target_of(plan.target, {key: Cut.of(cut, f"report.cuts.{key}") for key, cut in cuts.items()})
    here = {(o["name"], o["source"]) for o in map(origin, installed())}
    given = [o for o in plan.contributed if o["kind"] == "kernel"]
    gone = [f"{o['name']} of {o['source']}" for o in given if (o["name"], o["source"]) not in here]
    if gone:
        raise BuildError(f"it was compiled with {', '.join(gone)}: is that installed?")
    folded = [Folded(p.shape, graphs[name], graphs.get("load"), keep) for name, p in plan.buckets.items()]
    return lower(folded, target.coder, target.bodies, ranks=int(plan.deployment["ranks"])), target


def _program(
    program: Program,
    made: Program,
    sources: Mapping[str, bytes | None],
    written: Mapping[str, bytes],
) -> Iterator[Violation]:
    """Kernels are the same where their sources are; of edited ones, where those that they replace are."""
    for field in fields(Program):
        found, wanted = getattr(program, field.name), getattr(made, field.name)
        if field.name != "launches" and found != wanted:
            yield Violation("lowered", "", f"{field.name}: {_first_difference(found, wanted)}")
    if len(program.launches) != len(made.launches):
        yield Violation(
            "lowered", "", f"has {len(program.launches)} launches, its graph gives {len(made.launches)}"
        )
        return
    foreign: set[str] = set()
    for launch, again in zip(program.launches, made.launches, strict=True):
        code = again.code
        if isinstance(launch.code, KernelCode) and isinstance(code, KernelCode):
            kernel = launch.code.kernel
            if sources.get(kernel) != written[code.kernel] and kernel not in foreign:
                foreign.add(kernel)
                text = f"kernel {kernel} is not what this version of dsv4c writes for its nodes"
                yield Violation("lowered", launch.name, text)
            again = replace(again, code=replace(code, kernel=kernel))
        for field in fields(Launch):
            found, wanted = getattr(launch, field.name), getattr(again, field.name)
            if found != wanted:
                yield Violation("lowered", launch.name, f"{field.name}: {_first_difference(found, wanted)}")


def _first_difference(found: Any, wanted: Any) -> str:
    """The first entry that differs, cut to a line."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        key = next(
            (k for k in [*wanted, *found] if k not in found or k not in wanted or found[k] != wanted[k]), ""
        )
        return f"{key} is {found.get(key)!r:.150}, its graph gives {wanted.get(key)!r:.150}"
    if isinstance(found, tuple) and isinstance(wanted, tuple) and len(found) == len(wanted):
        number = next(i for i, (one, two) in enumerate(zip(found, wanted, strict=True)) if one != two)
        return f"{number} is {found[number]!r:.150}, its graph gives {wanted[number]!r:.150}"
    return f"{found!r:.150}, its graph gives {wanted!r:.150}"


# Kernels ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rebuilt:
    """Kernels built again from their sources, by their names.

    differing: cubin or PTX is not what the source gives. not_built: the source is not what this version of
    dsv4c generates for the plan's graphs, but edited, or of another; it is code that a plan's reader has not
    chosen to run. toolchain: what built the others.
    """

    built: int
    differing: tuple[str, ...]
    not_built: tuple[str, ...]
    toolchain: str


def rebuild(plan: Plan, progress: Callable[[int, int, Any], None] | None = None) -> Rebuilt:
    """Build every kernel of the plan whose source was generated, in a store of its own. Raises BuildError for
    a source that does not compile, and GraphError.
    """
    _, target = lowered_again(plan)
    records = {
        key: plan.kernels[key]
        for key, source in target.sources.items()
        if key in plan.kernels and plan.files[plan.kernels[key]["source"]] == source.text.encode()
    }
    sources = [target.sources[key] for key in records]
    with tempfile.TemporaryDirectory(prefix="dsv4c-rebuild-") as store:
        made = kernels.build(sources, plan.target, Path(store), progress=progress)
    pairs = list(zip(records.items(), made, strict=True))
    return Rebuilt(
        built=len(made),
        differing=tuple(
            key
            for (key, record), again in pairs
            if (again.cubin, again.ptx.encode()) != (plan.files[record["cubin"]], plan.files[record["ptx"]])
        ),
        not_built=tuple(key for key in plan.kernels if key not in records),
        toolchain=kernels.toolchain(),
    )
