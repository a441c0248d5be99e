"""Sessions: the arena changes nothing, requests are checked before anything moves, state can be kept."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import dsv4c
from dsv4c.errors import CheckpointError, PlanError, SessionError
from dsv4c.ir.text import parse_graph
from dsv4c.models.synth import synthesize
from dsv4c.numerics.codec import Quantized, Value, nan_fill, view
from dsv4c.plan.folder import Plan
from dsv4c.plan.records import Launch, Place
from dsv4c.reference import interpret
from dsv4c.runtime.checkpoint import Checkpoint
from dsv4c.runtime.cpu import results_of
from dsv4c.runtime.parameter import ParamRecord
from dsv4c.runtime.session import Session
from tests.runtime.conftest import BATCH, CHUNK, CONTEXT

PROMPT = [(7 * i * i + 3 * i + 1) % 512 for i in range(61)]


@pytest.fixture(scope="module")
def bound(plan: Plan, checkpoint: Path) -> Session:
    return plan.bind(checkpoint)


@pytest.fixture
def session(bound: Session) -> Session:
    bound.reset()
    return bound


def bits(value: Value) -> list[Tensor]:
    parts = value.parts if isinstance(value, Quantized) else (value,)
    return [part.contiguous().view(-1).view(torch.uint8).clone() for part in parts]


def same(a: Value, b: Value) -> bool:
    """Equal bit for bit, NaN included."""
    return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


# --- the arena ---


class Interpreter:
    """Runs a plan's graphs plainly: no arena, no launch order, state as separate tensors."""

    def __init__(self, plan: Plan, checkpoint: Path) -> None:
        self.graphs = {name: parse_graph(plan.graph_text(name)) for name in plan.buckets}
        self.params: dict[str, Value] = {}
        records = [ParamRecord.from_json(record) for record in plan.weights]
        Checkpoint.open(checkpoint).load(records, self._keep)
        self.states: dict[str, Value] = {}
        for slot in plan.state:
            value = view(torch.zeros(slot.type.extent, dtype=torch.uint8), slot.type)
            nan_fill(value)
            self.states[slot.name] = value
        self.states["position"].zero_()
        if plan.load is not None:  # what is computed once, from the weights
            graph = parse_graph(plan.files[plan.load.graph].decode())
            given = {p.name: self.params[p.name] for p in graph.params}
            made = interpret(graph, {}, {}, given)
            self.params |= {graph.outputs[label].name: value for label, value in made.items()}

    def _keep(self, name: str, value: Value) -> None:
        self.params[name] = value.map(torch.clone) if isinstance(value, Quantized) else value.clone()

    def run(self, bucket: str, inputs: dict[str, Tensor]) -> tuple[dict[str, Value], dict[str, Value]]:
        """Outputs by label, and every result by name."""
        graph, seen = self.graphs[bucket], {}
        states = {s.name: self.states[s.name] for s in graph.states}
        params = {p.name: self.params[p.name] for p in graph.params}

        def keep(name: str, value: Value) -> None:
            seen[name] = value.map(torch.clone) if isinstance(value, Quantized) else value.clone()

        return interpret(graph, inputs, states, params, watch=keep), seen


def steps(plan: Plan) -> list[tuple[str, dict[str, Tensor]]]:
    """Calls of every bucket: a full and a padded chunk, decode with an idle row, verify, a draft, rounds."""

    def rows(tokens: list[int], lengths: list[int], slots: list[int]) -> dict[str, Tensor]:
        given = {"tokens": tokens, "lengths": lengths, "slots": slots}
        return {name: torch.tensor(values, dtype=torch.int32) for name, values in given.items()}

    chunk = PROMPT[:CHUNK]
    return [
        ("prefill-24", rows(chunk, [CHUNK], [1])),
        ("prefill-24", rows(chunk, [5], [1])),
        ("decode-3", rows(PROMPT[:BATCH], [1, 0, 1], [2, -1, 1])),
        ("prefill-24", rows(chunk, [5], [0])),
        ("verify-1x4", rows(PROMPT[:4], [3], [2])),
        ("decode-3", rows(PROMPT[:BATCH], [1, 1, 1], [0, 1, 2])),
        ("draft-1", rows(chunk[:1], [1], [1])),
        ("round-3x2", rows(PROMPT[:BATCH], [1, 0, 1], [2, -1, 0])),
    ]


def test_a_plan_in_its_poisoned_arena_equals_plain_interpretation(plan: Plan, checkpoint: Path) -> None:
    """Every result of every launch, and all state afterwards, bit for bit."""
    executor = plan.bind(checkpoint, poison=True).executor
    plain = Interpreter(plan, checkpoint)
    called = steps(plan)
    assert {name for name, _ in called} == set(plan.buckets)
    for bucket, inputs in called:
        outputs_wanted, wanted = plain.run(bucket, inputs)
        wrong = []

        def compare(launch: Launch, bucket: str = bucket, wanted: dict = wanted, wrong: list = wrong) -> None:
            for name in results_of(launch):
                if not same(executor.value(bucket, name), wanted[name]):
                    wrong.append(name)

        outputs = executor.run(bucket, inputs, compare)
        assert wrong == [], bucket
        for label, value in outputs.items():
            assert same(value, outputs_wanted[label]), label
    for name, value in plain.states.items():
        assert same(executor.states[name], value), name


def test_poison_changes_nothing(plan: Plan, checkpoint: Path, session: Session) -> None:
    poisoned = plan.bind(checkpoint, poison=True)
    for s in (session, poisoned):
        s.prefill(PROMPT, slot=2)
    assert torch.equal(session.prefill(PROMPT), poisoned.prefill(PROMPT))
    a, b = session.decode([5, None, 6]), poisoned.decode([5, None, 6])
    assert same(a, b)
    assert a[[0, 2]].isfinite().all()


def with_values(plan: Plan, values: dict[str, Place]) -> Plan:
    """The plan with other places of the decode step's values."""
    program = plan.program("decode")
    return replace(plan, buckets={**plan.buckets, program.shape.name: replace(program, values=values)})


def test_a_wrong_lifetime_shows(plan: Plan, checkpoint: Path, session: Session) -> None:
    """A value that is put on another one's bytes while both are needed changes the logits."""
    program = plan.program("decode")

    def in_arena(launch: Launch) -> dict[int, str]:
        operands = (a for a in launch.arguments if (a.component, a.access) == ("data", "r"))
        return {a.offset: a.value for a in operands if a.space == "arena"}

    reader = next(launch for launch in program.launches if len(in_arena(launch)) > 1)
    (offset, _), (_, late), *_ = in_arena(reader).items()
    values = {**program.values, late: replace(program.values[late], offset=offset)}
    broken = with_values(plan, values)
    right = session.decode([5, 6, 7])
    assert not torch.equal(broken.bind(checkpoint).decode([5, 6, 7]), right)


def test_a_launch_that_gives_another_shape_is_refused(plan: Plan, checkpoint: Path) -> None:
    program = plan.program("decode")
    name = program.outputs["logits"]
    place = program.values[name]
    broken = with_values(
        plan, {**program.values, name: replace(place, type=place.type.with_shape((BATCH, 511)))}
    )
    with pytest.raises(PlanError, match=r"gave torch\.float32\[3, 512\], the plan has room for .*\[3, 511\]"):
        broken.bind(checkpoint).decode([1, 2, 3])


def test_an_offset_outside_of_the_arena_is_refused(plan: Plan, checkpoint: Path) -> None:
    program = plan.program("decode")
    name = program.outputs["logits"]
    broken = with_values(plan, {**program.values, name: replace(program.values[name], offset=1 << 30)})
    with pytest.raises(PlanError, match="a value has no place"):
        broken.bind(checkpoint).decode([1, 2, 3])


# --- the model's memory ---


@pytest.fixture(scope="module", params=["fp32", "official"])
def single(checkpoint: Path, request: pytest.FixtureRequest) -> Session:
    """One sequence under a plain and a quantized recipe."""
    return dsv4c.compile(checkpoint, recipe=request.param, max_context=CONTEXT, chunk=CHUNK).bind(checkpoint)


@pytest.mark.parametrize("sizes", [[61], [1] * 9, [23, 1, 24, 13], [24, 25, 12]])
def test_how_a_prompt_is_cut_does_not_matter(single: Session, sizes: list[int]) -> None:
    session = single
    session.reset()
    whole = session.prefill(PROMPT[: sum(sizes)])
    session.reset()
    rows, start = [], 0
    for size in sizes:
        part = PROMPT[start : start + size]
        rows.append(session.decode(part) if size == 1 else session.prefill(part))
        start += size
    assert torch.equal(torch.cat(rows), whole)
    assert session.positions == [sum(sizes)]


def test_slots_do_not_see_each_other(session: Session, checkpoint: Path) -> None:
    alone = [session.prefill(PROMPT[:30], slot=1), session.decode([None, 9, None])[1:2]]
    session.reset()
    session.prefill(PROMPT[20:], slot=0)
    session.prefill(PROMPT[5:9], slot=2)
    first = session.prefill(PROMPT[:30], slot=1)
    step = session.decode([4, 9, None])
    assert torch.equal(first, alone[0])
    assert torch.equal(step[1:2], alone[1])
    assert step[2].isnan().all()
    assert session.positions == [42, 31, 4]


def test_an_idle_slot_keeps_its_state(session: Session) -> None:
    session.prefill(PROMPT[:10], slot=1)
    before = {n: [p[1].clone() for p in _parts(v)] for n, v in session.executor.states.items()}
    session.decode([3, None, 4])
    for name, value in session.executor.states.items():
        for old, part in zip(before[name], _parts(value), strict=True):
            assert same(part[1], old), name


def _parts(value: Value) -> tuple[Tensor, ...]:
    return value.parts if isinstance(value, Quantized) else (value,)


def test_reset_forgets_one_slot_or_all(session: Session) -> None:
    fresh = session.prefill(PROMPT[:12], slot=0)
    session.prefill(PROMPT[:7], slot=1)
    session.reset(0)
    assert session.positions == [0, 7, 0]
    assert torch.equal(session.prefill(PROMPT[:12], slot=0), fresh)
    session.reset()
    assert session.positions == [0, 0, 0]


def test_streams_and_next_tokens_belong_to_the_last_call(
    session: Session, plan: Plan, checkpoint: Path
) -> None:
    new = plan.bind(checkpoint)
    with pytest.raises(SessionError, match="no streams yet"):
        _ = new.streams
    with pytest.raises(SessionError, match="no next tokens yet"):
        _ = new.next_tokens
    logits = session.prefill(PROMPT[:30])
    assert session.streams.shape == (30, *plan.program("decode").values["streams"].type.shape[1:])
    assert session.next_tokens == logits.argmax(1).tolist()
    kept = session.streams.clone()
    session.decode([1, None, None])
    assert session.streams.shape[0] == BATCH
    assert len(session.next_tokens) == BATCH
    assert not torch.equal(session.streams[:1], kept[:1])


def test_logits_are_not_overwritten_by_the_next_call(session: Session) -> None:
    logits = session.prefill(PROMPT[:5])
    kept = logits.clone()
    session.prefill(PROMPT[5:20])
    assert torch.equal(logits, kept)


# --- refusals ---

REFUSED = {
    "id too large": (lambda s: s.prefill([1, 2, 512]), r"token 2 is 512, out of range; .* 0 to 511"),
    "id negative": (lambda s: s.prefill([-1]), "token 0 is -1, out of range"),
    "id no number": (lambda s: s.prefill(["a"]), "token 0 is 'a', expected a token id"),
    "id a bool": (lambda s: s.prefill([True]), "token 0 is True, expected a token id"),
    "id a fraction": (
        lambda s: s.decode([torch.tensor(1.5), None, None]),
        r"token 0 is tensor\(1.5000\), exp",
    ),
    "prompt a number": (
        lambda s: s.prefill(5),
        r"the prompt is 5, expected token ids in a row, \[3, 17, 5\]",
    ),
    "prompts in rows": (
        lambda s: s.prefill(torch.ones(2, 2, dtype=torch.int32)),
        "expected token ids in a row",
    ),
    "decode of a number": (lambda s: s.decode(5), r"decode got 5, expected a token per slot"),
    "empty prompt": (lambda s: s.prefill([]), "the prompt is empty"),
    "no such slot": (lambda s: s.prefill([1], slot=3), r"no slot 3; this plan has 0 to 2"),
    "negative slot": (lambda s: s.prefill([1], slot=-1), "no slot -1"),
    "reset of none": (lambda s: s.reset(5), "no slot 5"),
    "prompt too long": (
        lambda s: s.prefill([1] * (CONTEXT - 9)),
        rf"slot 0 holds 10 tokens; {CONTEXT - 9} more exceed the context of {CONTEXT}",
    ),
    "too few to decode": (lambda s: s.decode([1]), "one token per slot, 3 in all, got 1"),
    "nothing to decode": (lambda s: s.decode([None] * 3), "no token for any slot"),
    "decode out of range": (lambda s: s.decode([1, None, 9999]), "token 2 is 9999, out of range"),
    "full slot": (lambda s: s.decode([1, None, 1]), rf"slot 2 holds {CONTEXT} tokens; 1 more exceed"),
    "a draft out of range": (lambda s: s.draft({0: 512}), "token 0 is 512, out of range"),
    "drafts that nobody judges": (lambda s: s.accept({0: [1, 2]}), "no bucket of the plan judges as many"),
}


def test_token_ids_are_integers_of_any_library(session: Session) -> None:
    session.reset()
    rows = session.prefill([3, 17, 5])
    for prompt in (torch.tensor([3, 17, 5]), numpy.array([3, 17, 5]), (numpy.int64(3), torch.tensor(17), 5)):
        session.reset()
        assert torch.equal(session.prefill(prompt), rows)
    chosen = rows[-1].argmax()
    assert session.decode([chosen, None, None]).shape == rows.shape


@pytest.fixture(scope="module")
def busy(bound: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """State in which slot 0 holds ten tokens and slot 2 is full."""
    bound.reset()
    bound.prefill(PROMPT[:10])
    bound.prefill((PROMPT * 3)[:CONTEXT], slot=2)
    return bound.save_state(tmp_path_factory.mktemp("busy") / "state")


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_request_changes_nothing(session: Session, busy: Path, case: str) -> None:
    request, message = REFUSED[case]
    session.load_state(busy)
    before = session.executor.blocks["state"].clone()
    with pytest.raises(SessionError, match=message):
        request(session)
    assert torch.equal(session.executor.blocks["state"], before)
    assert session.positions == [10, 0, CONTEXT]


def test_a_context_can_be_used_to_its_last_token(session: Session) -> None:
    prompt = (PROMPT * 3)[: CONTEXT - 1]
    session.prefill(prompt)
    assert session.decode([3, None, None])[0].isfinite().all()
    assert session.positions[0] == CONTEXT


def test_an_interrupted_step_must_be_reset(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = session.prefill(PROMPT[:5])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session.executor, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.prefill(PROMPT[:5], slot=1)
    monkeypatch.undo()
    for request in (
        lambda: session.prefill([1]),
        lambda: session.decode([1, 1, 1]),
        lambda: session.reset(0),
    ):
        with pytest.raises(SessionError, match=r"an earlier step was interrupted.*call reset\(\)"):
            request()
    with pytest.raises(SessionError, match="interrupted"):
        session.save_state(Path("never"))
    session.reset()
    assert torch.equal(session.prefill(PROMPT[:5]), fresh)


# --- state files ---


def test_a_saved_state_goes_on_where_it_was(
    session: Session, plan: Plan, checkpoint: Path, tmp_path: Path
) -> None:
    session.prefill(PROMPT[:40], slot=1)
    session.prefill(PROMPT[:3], slot=2)
    path = session.save_state(tmp_path / "state.safetensors")
    wanted = session.decode([None, 8, 9])
    other = plan.bind(checkpoint)
    other.load_state(path)
    assert other.positions == [0, 40, 3]
    assert same(other.decode([None, 8, 9]), wanted)
    session.load_state(path)
    assert same(session.decode([None, 8, 9]), wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_foreign_state_is_refused(session: Session, plan: Plan, tmp_path: Path) -> None:
    session.prefill(PROMPT[:4])
    good = session.save_state(tmp_path / "good")
    before = session.executor.blocks["state"].clone()
    rows, (metadata, other) = load_file(good), foreign_metadata(good)
    save_file(rows, tmp_path / "other-plan", metadata | {"plan": "0" * 64})
    save_file(rows, tmp_path / "other-schema", metadata | {"schema": other})
    save_file(rows, tmp_path / "weights")
    save_file({n: r[:-1].clone() for n, r in rows.items()}, tmp_path / "few", metadata)
    save_file({n: r for n, r in rows.items() if n != "position.0"}, tmp_path / "less", metadata)
    flipped = {n: r.clone() for n, r in rows.items()}
    flipped["position.0"][1, 0] ^= 1
    save_file(flipped, tmp_path / "flipped", metadata)
    (tmp_path / "cut").write_bytes(good.read_bytes()[:-100])
    session.export_slot(tmp_path / "one-slot", 0)
    session.executor.states["position"][0] = CONTEXT + 1
    session.save_state(tmp_path / "far")
    session.executor.states["position"][0] = 4
    for name, message in {
        "other-plan": r"was saved with another plan \(000000000000\)",
        "other-schema": "is no saved state of this version",
        "weights": "is no saved state of this version",
        "few": r"holds 2 slots in \d+ arrays, expected 3 in",
        "less": r"holds 3 slots in (\d+) arrays, expected 3 in (?!\1)",
        "one-slot": r"holds 1 slots in \d+ arrays, expected 3 in",
        "flipped": "is damaged: its bytes are not those that were saved",
        "cut": "cannot be read as a saved state",
        "far": rf"is damaged: position is \[{CONTEXT + 1}",
        "absent": "cannot be read as a saved state",
    }.items():
        with pytest.raises(SessionError, match=message):
            session.load_state(tmp_path / name)
        assert torch.equal(session.executor.blocks["state"], before)
        assert session.positions == [4, 0, 0]


def foreign_metadata(path: Path) -> tuple[dict[str, str], str]:
    """A state file's metadata, and a schema that is not its own."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    return metadata, str(int(metadata["schema"]) + 1)


def test_a_state_that_cannot_be_written_leaves_the_old_file(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = session.save_state(tmp_path / "state")
    content = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    session.prefill(PROMPT[:4])
    with pytest.raises(SessionError, match=r"the state cannot be written: .*No space left"):
        session.save_state(path)
    assert path.read_bytes() == content
    with pytest.raises(SessionError, match="cannot be written"):
        session.save_state(tmp_path / "absent" / "state")


# --- binding ---


def test_weights_of_another_model_are_refused_by_name(plan: Plan, tmp_path: Path) -> None:
    narrower = replace(dsv4c.load_config("tiny"), vocab_size=500)
    other = synthesize(narrower, tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="of another model: vocab_size is 500, the plan has 512"):
        plan.bind(other)
    (other / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"embed\.weight in .* is \[500, 256\], expected \[512, 256\]"):
        plan.bind(other)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        plan.bind(tmp_path / "absent")


def test_a_missing_tensor_is_named(plan: Plan, checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["layers.1.attn.wq_a.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors missing: layers\.1\.attn\.wq_a\.weight"):
        plan.bind(tmp_path)


def test_nan_weights_are_named(plan: Plan, checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["layers.2.ffn_norm.weight"][5] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.2\.ffn_norm\.weight is not finite.* at \[5\]"):
        plan.bind(tmp_path)


def test_progress_reaches_the_end(plan: Plan, checkpoint: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    plan.bind(checkpoint, progress=lambda *call: calls.append(call))
    assert {name for name, _, _ in calls} == {w["name"] for w in plan.weights}
    assert calls[-1][1] == calls[-1][2]


def test_plans_that_cannot_run_here_say_so(plan: Plan, checkpoint: Path) -> None:
    if not torch.cuda.is_available():
        device = replace(plan, deployment={**plan.deployment, "target": "sm_90a"})
        with pytest.raises(PlanError, match="compile with --target cpu"):
            device.bind(checkpoint)
    huge = replace(plan, blocks={**plan.blocks, "weights": 1 << 50})
    with pytest.raises(PlanError, match=r"needs 1,125,8.* GB of memory .*this machine has"):
        huge.bind(checkpoint)


def test_a_damaged_weight_record_is_refused(plan: Plan, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "w")
    first, *others = plan.weights
    for lost, error, message in (
        ("components", PlanError, "weight embed: its place in memory cannot be read"),
        ("sources", CheckpointError, "weight record 'embed' cannot be read"),
    ):
        record = {name: value for name, value in first.items() if name != lost}
        with pytest.raises(error, match=message):
            replace(plan, weights=(record, *others)).bind(tmp_path / "w")
