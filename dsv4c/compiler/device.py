"""Every kernel of a GPU plan against the reference, on hard operands: the last mile of its certificates.

Launches that compute together run alone, in memory of their own: a plan may be larger than the device. What
they leave there is compared with what their nodes mean on the same operands. Weights are random; caches and
activations adversarial (`dsv4c.certify.adversarial`); integers what the graph makes of the call's tokens,
so that positions, slots and selections are such as kernels meet. Launches that differ in nothing but places
and layers are run once.

Of a plan for several ranks one GPU is each of them in turn. The words of the others are put where a launch
waits for them, and those that it gives are compared with what they say; tiles that a rank gives are there
when the others run for the second time, and are NaN before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsv4c.certify.adversarial import FIRST_POSITIONS, expert_numbers, floats, weight
from dsv4c.certify.evaluate import PATTERNS
from dsv4c.certify.rounding import Apart, apart, integers
from dsv4c.compiler.turns import Turn, turns_of
from dsv4c.errors import PlanError
from dsv4c.exchange import MOST_ROWS
from dsv4c.ir.graph import Graph, Kind, Node
from dsv4c.ir.graph import Value as Variable
from dsv4c.ir.text import parse_graph
from dsv4c.numerics.codec import Quantized, Value, dequantize, parts_of
from dsv4c.passes.memory import aligned
from dsv4c.plan.folder import Plan
from dsv4c.plan.records import SPACES, Argument, Launch, Place, Program
from dsv4c.reference import run
from dsv4c.reference.interpret import clone
from dsv4c.runtime import driver
from dsv4c.runtime.cuda import POISON, BoundProgram, Device, Libraries, check_architecture
from dsv4c.runtime.ranks import BLOCKS, answer_at_once, as_words, become, words_of
from dsv4c.runtime.residence import Resident

WARM, COLD = (0.7, 20.0, 0.9, 0.02, 1.1, 0.5, 0.25), (0.0,) * 7
"""How slots are sampled, in turn (`dsv4c.ir.ops.sample.KNOBS`)."""

NAN = 0x7FFFFFFF
"""The bits of an f32 and of two bf16 that are none of anybody's."""

LARGEST = 24.0
"""Root mean square of a row of operands: beyond what models have, f32 sums of a router's scores underflow."""


@dataclass(frozen=True)
class Checked:
    """Launches of some nodes, on every pattern: their result that comes nearest to its bound or goes farthest
    beyond it. `count` turns of the plan are such.
    """

    bucket: str
    kernels: tuple[str, ...]
    op: str
    nodes: tuple[str, ...]
    count: int
    pattern: str
    worst: Apart

    @property
    def holds(self) -> bool:
        return self.worst.within

    def to_dict(self) -> dict[str, Any]:
        return {
            "bucket": self.bucket,
            "kernels": list(self.kernels),
            "op": self.op,
            "nodes": list(self.nodes),
            "count": self.count,
            "pattern": self.pattern,
            "result": self.worst.result,
            "error": self.worst.far,
            "limit": self.worst.limit,
            "holds": self.holds,
        }


def check_kernels(plan: Plan, buckets: Iterable[str] = (), *, device: str = "cuda") -> Iterator[Checked]:
    """Check the kernels of some buckets, by default of all, each as it is done.

    Raises PlanError for a plan that this machine's GPU cannot run, DriverError naming nodes that fail there.
    """
    if not plan.kernels:
        raise PlanError(f"plan {plan.name} is for {plan.target}, which has no kernels; compile for sm_90a")
    if device == "cuda":
        check_architecture(plan, Device.current())
    found: dict[object, list[tuple[Program, Graph, Turn]]] = {}
    for name in dict.fromkeys(buckets or plan.buckets):
        program = plan.program(name)
        graph = parse_graph(plan.graph_text(program.shape.name))
        for turn in turns_of(graph, program.launches):
            found.setdefault(_likeness(turn, program), []).append((program, graph, turn))
    libraries = Libraries(plan)
    load = None if plan.load is None else parse_graph(plan.files[plan.load.graph].decode())
    torch.empty(0, device=device)  # a context, which kernels are loaded into
    with torch.inference_mode(), torch.device(device):
        for alike in found.values():
            program, graph, turn = alike[0]
            alone = Alone(plan, program, graph, turn, load, libraries)
            results = [(pattern, a) for pattern in PATTERNS for a in alone.check(pattern)]
            pattern, worst = max(results, key=lambda r: (not r[1].within, _nearness(r[1])))
            yield Checked(
                program.shape.name,
                tuple(dict.fromkeys(launch.kernel.kernel for launch in turn.launches)),
                turn.launches[0].op,
                tuple(node.name for node in turn.nodes),
                len(alike),
                pattern,
                worst,
            )


def _nearness(found: Apart) -> float:
    """How much of its bound a result takes."""
    return found.far / found.limit if found.limit else float(found.far > 0)


def _likeness(turn: Turn, program: Program) -> object:
    """Equal for turns whose launches are the same but for places, with ops, types and wiring of nodes."""
    number: dict[str, int] = {}

    def of(name: str) -> int:
        return number.setdefault(name, len(number))

    wiring = [
        (n.op, tuple(of(v.name) for v in n.inputs), tuple(of(v.name) for v in n.outputs)) for n in turn.nodes
    ]
    types = tuple(str(program.values[name].type) for name in number)
    arguments = [tuple((of(a.value), a.component, a.access) for a in x.arguments) for x in turn.launches]
    codes = tuple(replace(launch.kernel, programmatic=False) for launch in turn.launches)
    return codes, tuple(arguments), tuple(wiring), types, program.shape.tokens


class Alone:
    """One turn in memory of its own, with weights in their forms. Where ranks exchange values in it, each has
    activations of its own: it gets the words of the others that an exchange joins, and gives its own.
    """

    def __init__(
        self,
        plan: Plan,
        program: Program,
        graph: Graph,
        turn: Turn,
        load: Graph | None,
        libraries: Libraries,
    ) -> None:
        self.plan, self.program, self.graph, self.turn = plan, program, graph, turn
        self._once = {} if load is None else load.by_name  # what is computed when weights are there
        self._generator = torch.Generator(torch.get_default_device()).manual_seed(17)
        self._made = {v for node in turn.nodes for v in node.outputs}
        self._crossing = next((node.inputs[0] for node in turn.nodes if node.op.collective), None)
        self._tiled = self._crossing is not None and self._crossing.type.shape[0] > MOST_ROWS
        self._ranks = plan.ranks if self._crossing is not None else 1
        self._params: dict[str, Value] = {}
        places = _Places(plan, program, turn)
        blocks = {space: torch.zeros(size, dtype=torch.uint8) for space, size in places.sizes.items()}
        self.bound = BoundProgram(plan, places.program, blocks, libraries)
        residents = {r["name"]: r for r in plan.weights}
        for variable in dict.fromkeys(v for node in turn.nodes for v in node.inputs):
            if program.values[variable.name].space == "weights":
                resident = Resident.from_json(residents[variable.name])
                parts = tuple((n, places.moved("weights", at), size) for n, at, size in resident.components)
                replace(resident, components=parts).store(blocks["weights"], self._param(variable))

    def check(self, pattern: str) -> list[Apart]:
        """Run the launches on operands of a pattern; how far off each of their results is, on every rank."""
        self._generator.manual_seed(PATTERNS.index(pattern) * 1009 + 17)
        given = self._given(pattern)
        inner = self._meant(given, [{} for _ in given]) if self.turn.inner else given
        if self._ranks > 1:
            answer_at_once(self.plan, 0, self._block("exchange"), self._block("tiles"), NAN)
        results, found = list[Apart](), list[dict[Variable, Value]]()
        for _ in range(2 if self._tiled else 1):
            found.clear()
            for rank, own in enumerate(given):
                self._put_words(rank, given)
                found.append(self._run(pattern, rank, own, inner[rank]))
                results += self._gave(rank, own)
        expected = self._meant(given, found)
        for values in zip(given, expected, found, strict=True):
            results += [each for node in self.turn.nodes for each in self._apart(node, *values)]
        return results

    def _block(self, name: str) -> Tensor:
        return self.bound.blocks[name]

    def _put_words(self, rank: int, given: Sequence[Mapping[Variable, Value]]) -> None:
        """What the other ranks give this one."""
        if self._crossing is None or self._tiled:
            return
        for peer, theirs in enumerate(given):
            words = _words(theirs[self._crossing])
            if peer == rank:  # what it gives itself must not lie there already
                words = as_words(torch.full(words.shape, NAN, dtype=torch.int32))
            words_of(self.plan, self._block("exchange"), peer)[: len(words)] = words

    def _gave(self, rank: int, values: Mapping[Variable, Value]) -> Iterator[Apart]:
        """Whether the words that a rank gave are those of the values."""
        if self._crossing is not None and not self._tiled:
            words = _words(values[self._crossing])
            found = words_of(self.plan, self._block("exchange"), rank)[: len(words)]
            wrong = float((found != words).float().mean())
            yield Apart(f"words of {self._crossing.name}", wrong, 0.0)

    def _given(self, pattern: str) -> list[dict[Variable, Value]]:
        """Operands that come from outside, of every rank."""
        choices = [node for node in self.turn.nodes if all(integers(v.type) for v in node.outputs)]
        chosen = {v for node in choices for v in node.inputs}
        operands = dict.fromkeys(v for node in self.turn.nodes for v in node.inputs if v not in self._made)
        found: list[dict[Variable, Value]] = []
        known: dict[Variable, Value] = {}
        for _ in range(self._ranks):
            known = {v: x for v, x in known.items() if v.kind is not Kind.RESULT or integers(v.type)}
            given = {v: self._value(v, pattern, known, chosen=v in chosen) for v in operands}
            if (lengths := self._counts()) is not None and lengths not in given:  # no rows are padding
                given[lengths] = torch.full(lengths.type.shape, self.program.shape.tokens, dtype=torch.int32)
            found.append(given)
        return found

    def _run(
        self, pattern: str, rank: int, given: Mapping[Variable, Value], inner: Mapping[Variable, Value]
    ) -> dict[Variable, Value]:
        """What the launches leave in memory, as one of the ranks."""
        self.bound.blocks["arena"].fill_(POISON)
        for variable, value in given.items():
            self._store(variable, value)
        for variable in self.turn.inner:  # what a launch leaves out of these, the next one does not need
            self._store(variable, inner[variable])
        if self._ranks > 1:
            become(rank, self._block("exchange"))
        self.bound.call()
        driver.synchronize(f"nodes {', '.join(node.name for node in self.turn.nodes)} ({pattern} operands)")
        return {v: clone(self.bound.value(v.name)) for v in (*self.turn.written, *self.turn.inner)}

    def _counts(self) -> Variable | None:
        """How many rows a call has, if the launches read that."""
        read = {a.value for launch in self.turn.launches for a in launch.arguments}
        return next((v for v in self.graph.inputs if v.name == "lengths" and v.name in read), None)

    # --- operands ---

    def _value(
        self, variable: Variable, pattern: str, known: dict[Variable, Value], *, chosen: bool = False
    ) -> Value:
        """An operand that comes from outside; all versions of a state are one. What is `chosen` from is made
        by its own node: kernels believe that nothing is chosen that cannot be seen. What ranks exchange is as
        any other.
        """
        root = self.graph.root_of.get(variable, variable)
        if root in known:
            return known[root]
        once = self._once.get(root.name, root)
        node = once.node if once.node is None or not once.node.op.collective else None
        if once.kind is Kind.PARAM:
            value = self._param(once)
        elif node is not None and (integers(root.type) or node.op.view or chosen or once is not root):
            choice = integers(root.type)
            operands = [clone(self._value(v, pattern, known, chosen=choice)) for v in node.inputs]
            value = dict(zip(node.outputs, _results(node, operands), strict=True))[once]
        elif node is None and integers(root.type):
            value = self._call(root, pattern)
        elif node is None and root.name == "sampling.knobs":
            value = torch.tensor([WARM, COLD]).repeat(root.type.shape[0], 1)[: root.type.shape[0]]
        else:
            value = floats(root.type, pattern, self._generator, LARGEST)
        known[root] = value
        return value

    def _param(self, variable: Variable) -> Value:
        if variable.name not in self._params:
            experts = int(self.plan.config["n_routed_experts"])
            self._params[variable.name] = (
                expert_numbers(variable.type, experts, self._generator)
                if integers(variable.type)
                else weight(variable.type, self._generator)
            )
        return self._params[variable.name]

    def _call(self, variable: Variable, pattern: str) -> Tensor:
        """Integers that a call is given: a sequence in each of the last slots, that begins where the pattern
        says, as far as the context goes. On edges the last sequence has a token less. Others are tokens.
        """
        bucket, shape = self.program.shape, variable.type.shape
        context, slots = int(self.plan.deployment["max_context"]), int(self.plan.deployment["slots"])
        if variable.kind is Kind.STATE and len(shape) == 1:
            first = min(FIRST_POSITIONS[pattern], context - bucket.tokens)
            return (first - torch.arange(*shape, dtype=torch.int32)).clamp(min=0)
        if variable.name == "slots":
            return slots - 1 - torch.arange(*shape, dtype=torch.int32)
        if variable.name == "lengths":
            lengths = torch.full(shape, bucket.tokens, dtype=torch.int32)
            lengths[-1] -= int(pattern == "edges" and bucket.rows > 1)
            return lengths
        vocabulary = int(self.plan.config["vocab_size"])
        return torch.randint(0, vocabulary, shape, dtype=torch.int32, generator=self._generator)

    def _store(self, variable: Variable, value: Value) -> None:
        if variable.name in self.bound.program.values:
            for to, part in zip(
                parts_of(self.bound.value(variable.name)).values(), parts_of(value).values(), strict=True
            ):
                to.copy_(part)

    # --- results ---

    def _meant(
        self, given: Sequence[Mapping[Variable, Value]], found: Sequence[Mapping[Variable, Value]]
    ) -> list[dict[Variable, Value]]:
        """What the nodes mean, on every rank; each reads what launches left of an earlier one's results, if
        it is there.
        """
        expected: list[dict[Variable, Value]] = [{} for _ in given]
        for node in self.turn.nodes:
            operands = [
                [left.get(v, meant.get(v, own.get(v))) for v in node.inputs]
                for own, meant, left in zip(given, expected, found, strict=True)
            ]
            if node.op.collective:
                operands = [[each for own in operands for each in own]] * len(operands)
            for own, meant in zip(operands, expected, strict=True):
                results = _results(node, [clone(o) for o in own if o is not None])
                meant |= zip(node.outputs, results, strict=True)
        return expected

    def _apart(
        self,
        node: Node,
        given: Mapping[Variable, Value],
        expected: Mapping[Variable, Value],
        found: Mapping[Variable, Value],
    ) -> Iterator[Apart]:
        overwritten = {node.outputs[r]: node.inputs[o] for r, o in node.op.alias.items()}
        before = {r.name: given.get(o, expected.get(o)) for r, o in overwritten.items()}
        return apart(
            node,
            {v.name: self._live(v, expected[v], given) for v in node.outputs},
            {v.name: self._live(v, found[v], given) for v in node.outputs if v in found},
            {name: value for name, value in before.items() if value is not None},
        )

    def _live(self, variable: Variable, value: Value, given: Mapping[Variable, Value]) -> Value:
        """A result without padding: launches that read how many rows a chunk has leave the others alone."""
        lengths = next((v for v in given if v.name == "lengths" and v.type.shape == (1,)), None)
        tokens = self.program.shape.tokens
        if lengths is None or variable in self.graph.root_of or variable.type.shape[:1] != (tokens,):
            return value
        count = given[lengths]
        assert isinstance(count, Tensor)
        rows = dequantize(value, torch.float64) if isinstance(value, Quantized) else value
        return rows[: int(count[0])]


def _results(node: Node, operands: list[Value]) -> list[Value]:
    result: Any = run(node.op, *operands)
    return [clone(value) for value in (result if type(result) is tuple else (result,))]


def _words(value: Value) -> Tensor:
    """Rows as words of an exchange."""
    assert isinstance(value, Tensor), "exchanged values are plain numbers"
    return as_words(value.contiguous().view(torch.int32).flatten())


class _Places:
    """The bytes that a turn touches, moved together: sizes of its blocks, and its program on them. What ranks
    exchange stays where it is, since kernels find it by themselves.
    """

    def __init__(self, plan: Plan, program: Program, turn: Turn) -> None:
        arguments = [a for launch in turn.launches for a in launch.arguments]
        named = {a.value for a in arguments}
        for node in turn.nodes:
            for result, operand in node.op.alias.items():
                pair = {node.outputs[result].name, node.inputs[operand].name}
                named |= pair if named & pair else set()
        held = {name: place for name, place in program.values.items() if name in named}
        spans: dict[str, list[tuple[int, int]]] = {space: [] for space in SPACES}
        for place in held.values():
            if place.space != "weights":
                spans[place.space].append((place.offset, place.offset + place.type.extent))
        for a in arguments:
            spans[a.space].append((a.offset, a.offset + a.nbytes))
        for space in BLOCKS:
            spans[space] = [(0, plan.blocks[space])]
        self.sizes: dict[str, int] = {}
        self._spans: dict[str, list[tuple[int, int, int]]] = {}
        for space, found in spans.items():
            self._spans[space], self.sizes[space] = _together(found)
        launches = tuple(self._launch(launch, i) for i, launch in enumerate(turn.launches))
        values = {n: self._place(p) for n, p in held.items() if p.space != "weights"}
        self.program = replace(program, values=values, inputs=(), outputs={}, launches=launches)

    def moved(self, space: str, offset: int) -> int:
        """Where in the turn's block a byte is."""
        return next(to + offset - start for start, end, to in self._spans[space] if start <= offset < end)

    def _place(self, place: Place) -> Place:
        return replace(place, offset=self.moved(place.space, place.offset))

    def _launch(self, launch: Launch, index: int) -> Launch:
        def argument(a: Argument) -> Argument:
            return replace(a, offset=self.moved(a.space, a.offset))

        code = replace(launch.kernel, programmatic=launch.kernel.programmatic and index > 0)
        after = (index - 1,) if index else ()
        return replace(launch, code=code, arguments=tuple(map(argument, launch.arguments)), after=after)


def _together(spans: Iterable[tuple[int, int]]) -> tuple[list[tuple[int, int, int]], int]:
    """(start, end, new start) of the spans, joined where they meet, one after the other, and bytes of all."""
    joined: list[tuple[int, int, int]] = []
    size = 0
    for start, end in sorted(spans):
        if joined and start < joined[-1][1]:
            first, last, to = joined.pop()
            end, start = max(end, last), first
            size = to
        joined.append((start, end, size))
        size += aligned(end - start)
    return joined, max(size, aligned(1))
