"""Finds the rewrite that changed a plan's results: every node against the unfused nodes that it stands for.

The plan runs step by step on its own target. After each launch, the unfused nodes behind it run by their
meaning, on the host, on the operands that the launch had. What differs by more than a certificate, or a
kernel's own rounding, allows is a suspect; suspects' results are replaced by those of their unfused nodes,
one after the other, until the plan's outputs are right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4c.certify.certificates import certify
from dsv4c.certify.compare import compare
from dsv4c.certify.finding import BIT_EXACT, DIFFERENT, ORDER, Finding, to_dict
from dsv4c.certify.rounding import OUTPUTS, beyond, distance
from dsv4c.codegen.bodies import body_text
from dsv4c.compiler.job import Job
from dsv4c.compiler.turns import Turn, turns_of
from dsv4c.errors import PlanError, SessionError
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Builder, Graph, Node
from dsv4c.ir.graph import Value as Variable
from dsv4c.ir.text import parse_graph, print_graph, print_op
from dsv4c.models.weights import records, sources
from dsv4c.numerics.codec import Quantized, Value, parts_of, view
from dsv4c.passes.tidy import repeated
from dsv4c.plan.folder import Plan
from dsv4c.plan.records import BodyCode, Launch
from dsv4c.publish import published
from dsv4c.reference.interpret import clone, interpret
from dsv4c.runtime.checkpoint import Checkpoint
from dsv4c.runtime.executor import Executor, states_of
from dsv4c.runtime.parameter import ParamRecord
from dsv4c.types import parse_type

VALUES, REPORT, BEFORE, BODY = "values.safetensors", "report.json", "before.txt", "body.txt"
REPRODUCER = (VALUES, REPORT, BEFORE, BODY, "graph.txt", "reproduce.py")
"""Files of a reproducer."""

Bounds = Mapping[tuple[str, tuple[str, ...]], Finding]
"""What the certificates allow, by op with attributes and types of its operands."""


@dataclass(frozen=True)
class Suspect:
    """A node whose results are not those of its unfused nodes: where, and how far off. `beside` are rules of
    nodes that its launches compute, too, and whose results nobody sees: any of them may be at fault.
    """

    step: int
    node: str
    rule: str
    kind: str
    worst: float
    allowed: str
    reason: str
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What was found. `right`: were the plan's outputs right? `switched_off` are the nodes whose results were
    replaced, and `gone` says that the outputs are right without these.
    """

    steps: int
    nodes: int
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
        by_node = {s.node: (s.rule, *s.beside) for s in self.suspects}
        return list(dict.fromkeys(rule for n in self.switched_off for rule in by_node[n]))


@dataclass(frozen=True)
class _Step:
    """One call of the bucket: its inputs, the state that it found, and what the unfused graph makes of both.
    All on the host.
    """

    inputs: Mapping[str, Tensor]
    state: Tensor
    outputs: Mapping[str, Value]


@dataclass
class _Held:
    """Where a running step's values are, apart from the executor: its inputs, states as it found them, and
    what it has written to them since, by name.
    """

    inputs: Mapping[str, Tensor]
    states: Mapping[str, Value]
    written: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class _Compared:
    """A node's results beside those of its unfused nodes, by name, and the operands of both."""

    node: Node
    unfused: Graph
    operands: Mapping[str, Value]
    expected: Mapping[str, Value]
    found: Mapping[str, Value]  # those of its turn that are in memory
    off: bool

    @property
    def overwritten(self) -> dict[str, Value]:
        """What the states that it overwrites held, by the results' names."""
        aliases = self.node.op.alias.items()
        return {self.node.outputs[r].name: self.operands[self.node.inputs[o].name] for r, o in aliases}


class Bisection:
    """A plan bound to weights, beside the graph that its rules found, for a decode bucket.

    `executor` is what runs the plan; by default it is bound to `weights` on its target. Raises PlanError for
    a plan without fold, SessionError for wrong tokens.
    """

    def __init__(
        self,
        plan: Plan,
        weights: str | Path,
        tokens: Sequence[int],
        job: Job,
        *,
        bucket: str = "decode",
        executor: Executor | None = None,
    ) -> None:
        vocabulary, room = int(plan.config["vocab_size"]), int(plan.deployment["max_context"])
        wrong = [t for t in tokens if not 0 <= t < vocabulary]
        if not tokens or wrong or len(tokens) > room:
            what = f"token {wrong[0]}" if wrong else f"{len(tokens)} tokens"
            raise SessionError(f"{what}: give 1 to {room} tokens from 0 to {vocabulary - 1}")
        if plan.ranks > 1:
            raise PlanError(
                f"plan {plan.name} has {plan.ranks} ranks, which hold parts of values; bisect a plan for one"
            )
        self.plan, self.job, self.tokens = plan, job, tuple(tokens)
        self.program = plan.program(bucket)
        self.bucket = self.program.shape
        if self.bucket.kind != "decode":
            raise PlanError(f"bucket {self.bucket.name} does not decode; bisect a decode bucket of the plan")
        passes = [p.name for p in job.line.passes]
        if "fold" not in passes:
            raise PlanError(f"plan {plan.name} was compiled without fold; there is no rewrite to bisect")
        before = passes[passes.index("fold") - 1] if passes.index("fold") else "build"
        self.unfused = job.compiled(self.bucket, stop_after=before).graph
        self.graph = parse_graph(plan.graph_text(self.bucket.name))
        self.turns = {t.launches[-1].name: t for t in turns_of(self.graph, self.program.launches)}
        self.executor = plan.bind(weights).executor if executor is None else executor
        self.params = _load(self.unfused, job, weights)
        self.exact = True  # so far nothing was found that may differ within a bound
        self._same = {v.name: first.name for v, first in repeated(self.unfused).items()}
        self._behind: dict[str, Graph | None] = {}
        self._evidence: _Compared | None = None  # of the first suspect

    # --- running ---

    def _call(self, step: _Step, look: Callable[[_Held, Turn], None]) -> dict[str, Value]:
        """One call on a step's inputs and the state that it found; `look` is called after the last launch of
        every turn. Returns the plan's outputs.
        """
        self.executor.blocks["state"].copy_(step.state)
        held = _Held(step.inputs, states_of(self.plan, {"state": step.state}))

        def watch(launch: Launch) -> None:
            if (turn := self.turns.get(launch.name)) is not None:
                look(held, turn)

        outputs = self.executor.run(self.bucket.name, step.inputs, watch)
        return {label: _on_host(value) for label, value in outputs.items()}

    def _step(self, token: int) -> _Step:
        """A step from here on, the same token in every sequence."""
        rows = self.bucket.sequences
        inputs = {
            "tokens": torch.full((rows,), token, dtype=torch.int32),
            "lengths": torch.ones(rows, dtype=torch.int32),
            "slots": torch.arange(rows, dtype=torch.int32),
        }
        state = self.executor.blocks["state"].to("cpu", copy=True)
        own = states_of(self.plan, {"state": state.clone()})
        outputs = interpret(self.unfused, inputs, own, self.params)
        return _Step(inputs, state, {label: clone(value) for label, value in outputs.items()})

    def _read(self, name: str) -> Value:
        return _on_host(self.executor.value(self.bucket.name, name))

    def _write(self, name: str, value: Value) -> None:
        target = self.executor.value(self.bucket.name, name)
        for to, part in zip(parts_of(target).values(), parts_of(value).values(), strict=True):
            to.copy_(part)

    # --- a node against its unfused nodes ---

    def before(self, node: Node) -> Graph | None:
        """The unfused nodes between a node's operands and its results as a graph, operands as inputs, all by
        name; None where no pass before fold knew the results.
        """
        if node.name not in self._behind:
            self._behind[node.name] = self._before(node)
        return self._behind[node.name]

    def _before(self, node: Node) -> Graph | None:
        known = self.unfused.by_name
        results = [v.name for v in node.outputs if v.name in known]
        if not results:
            return None
        given = {self._first(v.name): v.name for v in node.inputs}
        needed = {known[name] for name in results}
        behind: list[Node] = []
        for each in reversed(self.unfused.nodes):
            if not needed.isdisjoint(each.outputs):
                behind.insert(0, each)
                needed.update(v for v in each.inputs if self._first(v.name) not in given)
        builder = Builder(f"{node.op.name}.before")
        values: dict[str, Variable] = {}
        for each in behind:
            for v in each.inputs:
                name = given.get(self._first(v.name), v.name)
                if name not in values:
                    values[name] = builder.input(name, v.type)
                values[v.name] = values[name]
            operands = tuple(values[v.name] for v in each.inputs)
            names = [v.name for v in each.outputs]
            made = builder.emit(each.op, operands, names=names, scope=each.scope)
            values |= dict(zip(names, made, strict=True))
        return builder.finish({name: values[name] for name in results})

    def _first(self, name: str) -> str:
        """The value that this one of the unfused graph was merged with, or itself."""
        return self._same.get(name, name)

    def compare(self, turn: Turn, held: _Held, off: Iterable[str] = ()) -> list[_Compared]:
        """What a turn's launches have left in memory beside what its unfused nodes make of the same operands.

        A node reads what an earlier one of its turn left in memory, or else, and where that one is `off`,
        what the unfused nodes make. Nodes that read such a result are off, too.
        """
        found = {v.name: self._read(v.name) for v in turn.written}
        made, replaced, without = dict(found), set[str](), set(off)
        compared = []
        for node in turn.nodes:
            graph = self.before(node)
            if graph is None:
                continue
            names = dict.fromkeys([v.name for v in (*graph.inputs, *node.inputs)])
            operands = {name: self._operand(name, held, made) for name in names}
            given = {v.name: clone(operands[v.name]) for v in graph.inputs}
            expected = interpret(graph, given, {}, {})
            is_off = node.name in without or not replaced.isdisjoint(names)
            compared.append(_Compared(node, graph, operands, expected, found, is_off))
            made = made | expected if is_off else expected | made
            replaced |= expected.keys() if is_off else set()
        held.written |= {v.name: made[v.name] for v in turn.written if v in self.graph.root_of}
        return compared

    def _operand(self, name: str, held: _Held, made: Mapping[str, Value]) -> Value:
        for values in (made, held.inputs, held.written, held.states, self.params):
            if name in values:
                return values[name]
        return self._read(name)

    # --- looking for the fault ---

    def run(self, bounds: Bounds | None = None) -> Verdict:
        """Compare every node of every step, then switch suspects off. `bounds`: by default those of the
        certificates, which are looked up only when something is not bit-exact.
        """
        suspects: dict[str, Suspect] = {}

        def look(held: _Held, turn: Turn) -> None:
            for compared in self.compare(turn, held):
                if compared.node.name not in suspects and (
                    found := self._judge(len(steps), compared, bounds)
                ):
                    suspects[found.node] = replace(found, beside=tuple(_unseen(turn, compared.node)))
                    self._evidence = self._evidence or compared

        steps: list[_Step] = []
        outputs = []
        self._evidence = None
        self.executor.clear()
        for token in self.tokens:
            step = self._step(token)
            outputs.append(self._call(step, look))
            steps.append(step)
        right = all(self._right(step, made) for step, made in zip(steps, outputs, strict=True))
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
        nodes = sum(len(turn.nodes) for turn in self.turns.values())
        return Verdict(len(steps), nodes, right, tuple(suspects.values()), tuple(off), gone)

    def _judge(self, step: int, compared: _Compared, bounds: Bounds | None) -> Suspect | None:
        """A suspect, if the results in memory are further off than they may be."""
        node = compared.node
        expected = {name: value for name, value in compared.expected.items() if name in compared.found}
        results = [compared.found[name] for name in expected]
        difference = compare(list(expected.values()), results, node.name)
        if difference.kind == BIT_EXACT:
            return None
        known = self.certified if bounds is None else bounds
        allowed = known.get(key(node), Finding(BIT_EXACT, 0.0, ""))
        reason = difference.reason
        within = (ORDER.index(difference.kind), difference.worst) <= (
            ORDER.index(allowed.kind),
            allowed.worst,
        )
        if not within and self.plan.target != "cpu":
            reason = beyond(node, expected, compared.found, compared.overwritten)
            within = not reason
        if within:
            self.exact = False
            return None
        return Suspect(step, node.name, node.op.name, difference.kind, difference.worst, allowed.kind, reason)

    @cached_property
    def certified(self) -> Bounds:
        """The plan's certificates, or new ones for a plan without."""
        stored: Iterable[Mapping[str, Any]] = self.plan.certificates
        if not stored:
            fold = self.job.compiled(self.bucket, stop_after="fold").context.fold
            stored = [to_dict(c) for c in certify(fold.matches if fold is not None else ()).all]
        return {
            (c["op"], tuple(c["operands"])): Finding(c["kind"], c["worst"], "")
            for c in stored
            if c["kind"] != DIFFERENT  # a rule known to be wrong excuses nothing
        }

    def _right(self, step: _Step, outputs: Mapping[str, Value]) -> bool:
        """Bit-exact, or where nodes may differ within bounds, what these may add up to."""
        pairs = [(step.outputs[label], found) for label, found in outputs.items() if label in step.outputs]
        if compare([a for a, _ in pairs], [b for _, b in pairs], "outputs").kind == BIT_EXACT:
            return True
        floats = [
            (a, b) for a, b in pairs if parts_of(a)["data"].is_floating_point()
        ]  # the rest follows from these
        return not self.exact and all(distance(a, b) <= OUTPUTS for a, b in floats)

    def replay(self, steps: Sequence[_Step], off: Iterable[str]) -> bool:
        """Are the outputs right when the nodes of `off` give what their unfused nodes give?"""
        without = set(off)

        def look(held: _Held, turn: Turn) -> None:
            if without.isdisjoint(node.name for node in turn.nodes):
                states = (v.name for v in turn.written if v in self.graph.root_of)
                held.written |= {name: self._read(name) for name in states}
                return
            for compared in self.compare(turn, held, without):
                for name in compared.expected.keys() & compared.found.keys() if compared.off else ():
                    self._write(name, compared.expected[name])

        return all(self._right(step, self._call(step, look)) for step in steps)

    # --- the reproducer ---

    def reproduce(self, verdict: Verdict, folder: Path) -> None:
        """Write the culprit as a folder that needs neither plan nor weights. Raises PlanError."""
        culprit, evidence = verdict.culprit, self._evidence
        if culprit is None or evidence is None:
            raise PlanError("nothing to reproduce: no node differs from its unfused nodes")
        node = evidence.node
        found = {
            f"found.{name}": evidence.found[name] for name in evidence.expected if name in evidence.found
        }
        types = {v.name: str(v.type) for v in (*evidence.unfused.inputs, *node.inputs)}
        types |= {f"found.{v.name}": str(v.type) for v in node.outputs}
        report = {
            "rule": culprit.rule,
            "node": culprit.node,
            "step": culprit.step,
            "tokens": list(self.tokens),
            "found": asdict(culprit),
            "target": self.plan.target,
            "pipeline": self.plan.pipeline,
            "recipe": self.plan.recipe,
            "op": print_op(node.op),
            "operands": [v.name for v in node.inputs],
            "results": [v.name for v in node.outputs],
            "types": types,
            "switched_off": list(verdict.switched_off),
        }
        files = {
            BEFORE: print_graph(evidence.unfused),
            "graph.txt": print_graph(self.unfused),
            REPORT: json.dumps(report, indent=1) + "\n",
            "reproduce.py": SCRIPT,
        }
        if (body := self._body(node)) is not None:
            files[BODY] = body
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with published(folder, keep=lambda name: name not in REPRODUCER) as made:
                made.mkdir()
                for name, text in files.items():
                    (made / name).write_text(text, encoding="utf-8")
                _save({**evidence.operands, **found}, types, made / VALUES)
        except OSError as error:
            raise PlanError(f"{folder}: cannot be written: {error.strerror or error}") from None

    def _body(self, node: Node) -> str | None:
        """The body of a fused node, the plan's own where it has one."""
        if not isinstance(node.op, Fused):
            return None
        code = next(launch.code for launch in self.program.launches if node.name in launch.nodes)
        if isinstance(code, BodyCode):
            return self.plan.files[code.body].decode()
        return body_text(node.op, tuple(v.type for v in node.inputs))


def _unseen(turn: Turn, node: Node) -> Iterator[str]:
    """Rules of the turn's other nodes of which no result is in memory afterwards."""
    for other in turn.nodes:
        if other is not node and isinstance(other.op, Fused) and not set(other.outputs) & set(turn.written):
            yield other.op.name


def key(node: Node) -> tuple[str, tuple[str, ...]]:
    """What a certificate of a node's rewrite goes by."""
    return print_op(node.op), tuple(str(v.type) for v in node.inputs)


def _load(graph: Graph, job: Job, weights: str | Path) -> dict[str, Value]:
    """The parameters of a graph as a checkpoint has them, on the host. Others of the model may be beside
    them. Raises CheckpointError.
    """
    known = [(name, source.stored, False) for name, source in sources(job.config, "release").items()]
    wanted = records(job.config, [(v.name, v.type, job.recipe.rounds(v.name)) for v in graph.params])
    params: dict[str, Value] = {}
    Checkpoint.open(weights).sparing(map(ParamRecord.from_json, records(job.config, known))).load(
        [ParamRecord.from_json(record) for record in wanted],
        lambda name, value: params.__setitem__(name, clone(value)),
    )
    return params


def _on_host(value: Value) -> Value:
    """A copy in host memory."""
    if isinstance(value, Quantized):
        return value.map(lambda part: part.to("cpu", copy=True))
    return value.to("cpu", copy=True)


def _save(values: Mapping[str, Value], types: Mapping[str, str], path: Path) -> None:
    """Every value as the bytes of its type."""
    blocks = {}
    for name, value in values.items():
        type_ = parse_type(types[name])
        blocks[name] = torch.zeros(type_.nbytes, dtype=torch.uint8)
        stored = parts_of(view(blocks[name], type_))
        for to, part in zip(stored.values(), parts_of(value).values(), strict=True):
            to.copy_(part)
    save_file(blocks, path)


def rerun(folder: Path) -> tuple[Finding, Finding | None]:
    """What `reproduce.py` does: the unfused nodes on the operands of a reproducer, against what the plan had
    made of them, and against the op's body, if it has one.
    """
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    blocks = load_file(folder / VALUES)
    values = {n: view(block, parse_type(report["types"][n])) for n, block in blocks.items()}

    def run(graph: Graph, operands: Iterable[str]) -> list[Value]:
        given = {v.name: clone(values[name]) for v, name in zip(graph.inputs, operands, strict=True)}
        return list(interpret(graph, given, {}, {}).values())

    before = parse_graph((folder / BEFORE).read_text(encoding="utf-8"))
    expected = dict(zip(before.outputs, run(before, [v.name for v in before.inputs]), strict=True))
    kept = [name for name in expected if f"found.{name}" in values]
    found = compare([expected[n] for n in kept], [values[f"found.{n}"] for n in kept], report["node"])
    if not (folder / BODY).is_file():
        return found, None
    body = parse_graph((folder / BODY).read_text(encoding="utf-8"))
    made = dict(zip(report["results"], run(body, report["operands"]), strict=True))
    return found, compare(list(expected.values()), [made[n] for n in expected], report["node"])


SCRIPT = '''"""One node's unfused nodes again, on the operands that showed the fault: python reproduce.py"""

from pathlib import Path

from dsv4c.compiler.bisect import rerun

found, body = rerun(Path(__file__).parent)
print(f"the plan's results: {found.kind}, worst {found.worst:g} {found.reason}")
if body is not None:
    print(f"its op's body: {body.kind}, worst {body.worst:g} {body.reason}")
raise SystemExit(found.kind != "bit-exact")
'''
