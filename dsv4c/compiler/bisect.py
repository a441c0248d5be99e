"""Finds the rewrite that changed a plan's results: every launch against the nodes it stands for.

Each step runs the plan on the CPU and keeps every value. Then, by provenance, the unfused nodes behind each
launch run on the operands that it had. What differs beyond its certificate is a suspect; suspects are
replaced by their unfused nodes, one by one, until the plan's results are right.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4c.compiler.job import Job
from dsv4c.errors import PlanError, SessionError
from dsv4c.ir.graph import Builder, Graph, Node
from dsv4c.ir.ops.shape import Reshape
from dsv4c.ir.text import parse_graph, print_graph
from dsv4c.publish import published

if TYPE_CHECKING:
    from dsv4c.numerics.codec import Value
    from dsv4c.passes.compare import Finding
    from dsv4c.plan.records import Launch, Plan

OPERANDS = "operands.safetensors"
"""A reproducer's file of values."""

Bounds = Mapping[tuple[str, tuple[str, ...]], "Finding"]
"""What the certificates allow, by op with attributes and types of its operands."""


@dataclass(frozen=True)
class Suspect:
    """A launch whose results are not those of its nodes: where, and how far off."""

    step: int
    node: str
    rule: str
    kind: str
    worst: float
    allowed: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What was found. `right`: were the plan's outputs right? `switched_off` are the nodes whose rewrites
    were taken back, and `gone` says that the outputs are right without these.
    """

    steps: int
    launches: int
    right: bool
    suspects: tuple[Suspect, ...]
    switched_off: tuple[str, ...]
    gone: bool

    @property
    def culprit(self) -> Suspect | None:
        return self.suspects[0] if self.suspects else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"rules": self.rules}

    @property
    def rules(self) -> list[str]:
        by_node = {s.node: s.rule for s in self.suspects}
        return list(dict.fromkeys(by_node[n] for n in self.switched_off))


@dataclass
class _Step:
    """One decode step of the plan: what every name held when it was made, and the unfused graph's values."""

    inputs: dict[str, Value]
    states: dict[str, Value]
    made: dict[str, Value]
    unfused: dict[str, Value]
    outputs: dict[str, Value]


class Bisection:
    """A plan for the CPU with its weights, and the graph that its rules found.

    Raises PlanError for a plan that is not for the CPU or has no fold, SessionError for wrong tokens.
    """

    def __init__(self, plan: Plan, weights: str | Path, tokens: Sequence[int], job: Job) -> None:
        from dsv4c.plan.records import Launch
        from dsv4c.runtime.cpu import CpuExecutor

        if plan.target != "cpu":
            raise PlanError(
                f"plan {plan.name} is for {plan.target}; compile it for cpu to bisect its rewrites"
            )
        vocabulary, room = int(plan.config["vocab_size"]), int(plan.deployment["max_context"])
        wrong = [t for t in tokens if not 0 <= t < vocabulary]
        if not tokens or wrong or len(tokens) > room:
            what = f"token {wrong[0]}" if wrong else f"{len(tokens)} tokens"
            raise SessionError(f"{what}: give 1 to {room} tokens from 0 to {vocabulary - 1}")
        self.plan, self.job, self.tokens = plan, job, tuple(tokens)
        self.bucket = plan.bucket("decode")
        names = [p.name for p in job.line.passes]
        if "fold" not in names:
            raise PlanError(f"plan {plan.name} was compiled without fold; there is no rewrite to bisect")
        before = names[names.index("fold") - 1] if names.index("fold") else "build"
        self.unfused = job.bucket("decode", stop_after=before).graph
        self.launches: list[Launch] = [x for x in self.bucket.launches if isinstance(x, Launch)]
        self.views: dict[str, list[Node]] = {}
        for node in parse_graph(plan.graph_text("decode")).nodes:
            if isinstance(node.op, Reshape):
                self.views.setdefault(node.inputs[0].name, []).append(node)
        self.makers = {v.name: n for n in self.unfused.nodes for v in n.outputs}
        executor = plan.bind(weights).executor
        assert isinstance(executor, CpuExecutor)
        self.executor = executor
        self.exact = True  # so far no launch was found that may differ within a bound

    # --- running ---

    def steps(self) -> list[_Step]:
        """Decode the tokens one by one, in every sequence the same."""
        for value in self._positions():
            value.zero_()
        return [self._step(token) for token in self.tokens]

    def _positions(self) -> list[Any]:
        states = self.executor.states
        return [states[name] for name in ("position", "mtp.position") if name in states]

    def _step(self, token: int) -> _Step:
        import torch

        from dsv4c.reference.interpret import clone, interpret

        rows, sequences = self.bucket.tokens, self.bucket.sequences
        inputs: dict[str, Any] = {
            "tokens": torch.full((rows,), token, dtype=torch.int32),
            "lengths": torch.ones(sequences, dtype=torch.int32),
        }
        used = {v.name for v in self.unfused.states}
        states = {name: clone(v) for name, v in self.executor.states.items() if name in used}
        own = {name: clone(v) for name, v in states.items()}
        made: dict[str, Value] = {}
        self.executor.run("decode", inputs, watch=lambda name, v: self._enter(name, clone(v), made))
        unfused: dict[str, Value] = {}
        outputs = interpret(
            self.unfused,
            inputs,
            own,
            self.params(self.unfused),
            watch=lambda name, v: unfused.__setitem__(name, clone(v)),
        )
        kept = {label: clone(v) for label, v in outputs.items()}
        return _Step(dict(inputs), states, made, unfused, kept)

    def params(self, graph: Graph) -> dict[str, Value]:
        """Weights of the plan that `graph` reads."""
        from dsv4c.numerics.codec import view

        offsets = {record["name"]: int(record["offset"]) for record in self.plan.weights}
        missing = [v.name for v in graph.params if v.name not in offsets]
        if missing:
            raise PlanError(f"plan {self.plan.name} holds no weight {missing[0]}, which its rules start from")
        return {v.name: view(self.executor.weights, v.type, offsets[v.name]) for v in graph.params}

    # --- one launch against its nodes ---

    def members(self, launch: Launch) -> list[Node]:
        """The unfused nodes behind a launch, in order; empty for one that no pass before fold knew."""
        wanted = {self.makers[n] for n in (*launch.origin, *launch.outputs) if n in self.makers}
        return [node for node in self.unfused.nodes if node in wanted]

    def before(self, launch: Launch) -> Graph | None:
        """Those nodes as a graph: what they read as inputs, the launch's results as outputs, all by name."""
        nodes = self.members(launch)
        made = {v.name for n in nodes for v in n.outputs}
        results = [name for name in launch.outputs if name in made]
        if not nodes or not results:
            return None
        builder = Builder(f"{launch.op}.before")
        read = {v.name: v for n in nodes for v in n.inputs if v.name not in made}
        values = {v: builder.input(name, v.type) for name, v in read.items()}
        by_name = {v.name: v for v in values.values()}
        for node in nodes:
            operands = tuple(by_name[v.name] for v in node.inputs)
            names = [v.name for v in node.outputs]
            for v in builder.emit(node.op, operands, names=names, scope=node.scope):
                by_name[v.name] = v
        return builder.finish({name: by_name[name] for name in results})

    def operands(self, graph: Graph, step: _Step) -> dict[str, Value]:
        """Values for the inputs of `graph` as the plan's step had them."""
        from dsv4c.reference.interpret import clone

        found = {}
        for v in graph.inputs:
            held = (step.made, step.states, step.inputs, self._held(v.name), step.unfused)
            value = next((values[v.name] for values in held if v.name in values), None)
            if value is None:
                raise PlanError(f"%{v.name}: neither the plan nor the unfused graph made it")
            found[v.name] = clone(value)
        return found

    def _held(self, name: str) -> dict[str, Value]:
        """A weight, or what was computed from weights when they were loaded."""
        slot = self.bucket.values.get(name)
        if slot is not None and slot.space == "weights":
            return {name: self.executor.value(slot, 0, self.bucket.sequences)}
        record = next((r for r in self.plan.weights if r["name"] == name), None)
        if record is None:
            return {}
        from dsv4c.numerics.codec import view
        from dsv4c.types import parse_type

        return {name: view(self.executor.weights, parse_type(record["type"]), int(record["offset"]))}

    def compare(self, launch: Launch, step: _Step) -> Finding | None:
        """The launch's results against those of its nodes on the same operands; None where it has none."""
        from dsv4c.passes.compare import compare
        from dsv4c.reference import interpret

        graph = self.before(launch)
        if graph is None:
            return None
        expected = interpret(graph, self.operands(graph, step), {}, {})
        return compare(list(expected.values()), [step.made[name] for name in expected], launch.name)

    # --- looking for the fault ---

    def run(self, bounds: Bounds | None = None) -> Verdict:
        """Compare every launch of every step, then switch suspects off. `bounds`: by default those of the
        certificates, which are looked up only when something is not bit-exact.
        """
        from dsv4c.passes.compare import BIT_EXACT, ORDER, Finding

        steps = self.steps()
        suspects: dict[str, Suspect] = {}
        exact = Finding(BIT_EXACT, 0.0, "")
        for number, step in enumerate(steps):
            for launch in self.launches:
                found = None if launch.name in suspects else self.compare(launch, step)
                if found is None or found.kind == BIT_EXACT:
                    continue
                bounds = self.certified() if bounds is None else bounds
                allowed = bounds.get(self.key(launch), exact)
                if (ORDER.index(found.kind), found.worst) > (ORDER.index(allowed.kind), allowed.worst):
                    suspects[launch.name] = Suspect(
                        number, launch.name, launch.op, found.kind, found.worst, allowed.kind, found.reason
                    )
                else:
                    self.exact = False
        right = all(self._right(step.outputs, self._outputs(step)) for step in steps)
        off: list[str] = []
        gone = right
        for name in suspects if not right else ():
            off.append(name)
            if self.replay(steps, off):
                gone = True
                break
        for name in list(off) if gone else ():  # was each of them needed?
            fewer = [n for n in off if n != name]
            if fewer and self.replay(steps, fewer):
                off = fewer
        return Verdict(len(steps), len(self.launches), right, tuple(suspects.values()), tuple(off), gone)

    def key(self, launch: Launch) -> tuple[str, tuple[str, ...]]:
        op = f"{launch.op} {{{launch.attributes}}}" if launch.attributes else launch.op
        return op, tuple(str(self.bucket.values[n].type) for n in launch.inputs)

    def certified(self) -> Bounds:
        """The plan's certificates, or new ones for a plan without."""
        from dsv4c.passes.certify import certify, to_dict
        from dsv4c.passes.compare import DIFFERENT, Finding

        stored: Iterable[Mapping[str, Any]] = self.plan.certificates
        if not stored:
            fold = self.job.bucket("decode", stop_after="fold").context.fold
            stored = [to_dict(c) for c in certify(fold.matches if fold is not None else ()).all]
        return {
            (c["op"], tuple(c["operands"])): Finding(c["kind"], c["worst"], "")
            for c in stored
            if c["kind"] != DIFFERENT  # a rule known to be wrong excuses nothing
        }

    def _outputs(self, step: _Step) -> dict[str, Value]:
        return {
            label: step.made.get(name, step.states.get(name, step.outputs[label]))
            for label, name in self.bucket.outputs.items()
            if label in step.outputs
        }

    def _right(self, expected: Mapping[str, Value], found: Mapping[str, Value]) -> bool:
        """Bit-exact, or where launches may differ within bounds, what that may do to results."""
        from dsv4c.passes.compare import BIT_EXACT, DIFFERENT, compare

        labels = [label for label in expected if label in found]
        kind = compare([expected[k] for k in labels], [found[k] for k in labels], "outputs").kind
        return kind == BIT_EXACT or (not self.exact and kind != DIFFERENT)

    def replay(self, steps: Sequence[_Step], off: Iterable[str]) -> bool:
        """Are the outputs right when the launches of `off` run as their unfused nodes?"""
        from dsv4c.reference.interpret import clone, interpret
        from dsv4c.runtime.cpu import meaning_of

        without = set(off)
        for step in steps:
            values: dict[str, Value] = {}
            for name, value in {**step.inputs, **step.states}.items():
                self._enter(name, clone(value), values)
            for launch in self.launches:
                graph = self.before(launch) if launch.name in without else None
                if graph is not None:
                    known = {v.name: values[v.name] for v in graph.inputs if v.name in values}
                    for name, value in interpret(graph, self.operands(graph, step) | known, {}, {}).items():
                        self._enter(name, value, values)
                    continue
                operands = [(values if n in values else self._held(n))[n] for n in launch.inputs]
                result = meaning_of(self.plan, launch)(*operands)
                results = result if type(result) is tuple else (result,)
                for name, value in zip(launch.outputs, results, strict=True):
                    self._enter(name, value, values)
            found = {
                k: values[n] for k, n in self.bucket.outputs.items() if k in step.outputs and n in values
            }
            if not self._right(step.outputs, found):
                return False
        return True

    def _enter(self, name: str, value: Value, values: dict[str, Value]) -> None:
        """A result, and all that is the same bytes in another shape, which no launch makes."""
        from dsv4c.reference import run

        values[name] = value
        for node in self.views.get(name, ()):
            self._enter(node.name, run(node.op, value), values)  # type: ignore[arg-type]

    # --- the reproducer ---

    def reproduce(self, verdict: Verdict, folder: Path) -> None:
        """Write the culprit as a folder that needs neither plan nor weights. Raises PlanError."""
        culprit = verdict.culprit
        if culprit is None:
            raise PlanError("nothing to reproduce: no launch differs from its nodes")
        launch = next(x for x in self.launches if x.name == culprit.node)
        step = self.steps()[culprit.step]
        graph = self.before(launch)
        assert graph is not None
        given = self.operands(graph, step)
        given |= {n: v for n, v in self._launch_operands(launch, step).items() if n not in given}
        types = {n: str(self.bucket.values[n].type) for n in launch.inputs}
        types |= {v.name: str(v.type) for v in graph.inputs}
        report = {
            "rule": culprit.rule,
            "node": culprit.node,
            "step": culprit.step,
            "tokens": list(self.tokens),
            "found": asdict(culprit),
            "pipeline": self.plan.pipeline,
            "recipe": self.plan.recipe,
            "attributes": launch.attributes,
            "operands": list(launch.inputs),
            "results": list(launch.outputs),
            "types": types,
            "switched_off": list(verdict.switched_off),
        }
        files = {
            "before.txt": print_graph(graph),
            "graph.txt": print_graph(self.unfused),
            "report.json": json.dumps(report, indent=1) + "\n",
            "reproduce.py": SCRIPT,
        }
        if launch.body:
            files["after.txt"] = self.plan.files[launch.body].decode()
        else:
            files["after.txt"] = files["before.txt"]
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with published(folder, keep=lambda name: name not in {*files, OPERANDS}) as made:
                made.mkdir()
                for name, text in files.items():
                    (made / name).write_text(text, encoding="utf-8")
                _save(given, types, made / OPERANDS)
        except OSError as error:
            raise PlanError(f"{folder}: cannot be written: {error.strerror or error}") from None

    def _launch_operands(self, launch: Launch, step: _Step) -> dict[str, Value]:
        held = {**step.inputs, **step.states, **step.made}
        return {n: (held if n in held else self._held(n))[n] for n in launch.inputs}


def _save(values: Mapping[str, Value], types: Mapping[str, str], path: Path) -> None:
    """Every value as the bytes of its type."""
    import torch
    from safetensors.torch import save_file

    from dsv4c.numerics.codec import Quantized, view
    from dsv4c.types import parse_type

    blocks = {}
    for name, value in values.items():
        type_ = parse_type(types[name])
        block = torch.zeros(type_.nbytes, dtype=torch.uint8)
        target = view(block, type_)
        to = target.parts if isinstance(target, Quantized) else (target,)
        given = value.parts if isinstance(value, Quantized) else (value,)
        for a, b in zip(to, given, strict=True):
            a.copy_(b)
        blocks[name] = block
    save_file(blocks, path)


def rerun(folder: Path) -> Finding:
    """What `reproduce.py` does: both sides of a reproducer on its operands."""
    from safetensors.torch import load_file

    from dsv4c.numerics.codec import view
    from dsv4c.passes.compare import compare
    from dsv4c.reference import interpret
    from dsv4c.reference.interpret import clone
    from dsv4c.types import parse_type

    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    blocks = load_file(folder / OPERANDS)
    values = {n: view(block, parse_type(report["types"][n])) for n, block in blocks.items()}
    before = parse_graph((folder / "before.txt").read_text(encoding="utf-8"))
    after = parse_graph((folder / "after.txt").read_text(encoding="utf-8"))
    expected = interpret(before, {v.name: clone(values[v.name]) for v in before.inputs}, {}, {})
    names = [v.name for v in after.inputs]
    given = {n: clone(values[o]) for n, o in zip(names, report["operands"], strict=True)}
    made = dict(zip(report["results"], interpret(after, given, {}, {}).values(), strict=True))
    return compare(list(expected.values()), [made[n] for n in expected], report["node"])


SCRIPT = '''"""Runs both sides of one rewrite on the operands that showed the fault: python reproduce.py"""

from pathlib import Path

from dsv4c.compiler.bisect import rerun

found = rerun(Path(__file__).parent)
print(f"{found.kind}, worst {found.worst:g}: {found.reason or 'both sides agree'}")
raise SystemExit(found.kind != "bit-exact")
'''
