"""Families know what they take: every attribute of an op decides something, or the op is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any
from unittest import mock

import pytest

from dsv4c.codegen import select
from dsv4c.codegen.kernels import KERNELS
from dsv4c.codegen.registry import Kernel, Launchable, Request, choose, takes
from dsv4c.errors import BuildError, GraphError
from dsv4c.ir.op import Op
from dsv4c.passes.fusions.attention import Attention
from dsv4c.passes.fusions.compressor import Compressor
from dsv4c.types import BF16, F32, FP8_ROW, NVFP4_ROW, DType, QuantFormat
from tests.codegen.lowered import TUNED, gpu_plan

Answers = dict[Request, tuple[Kernel, tuple[Launchable, ...]]]

SIZES = {"batch": 2, "verify": 2, "chunk": 16, "certify": False}
IDLE = {(Compressor, "beside")}  # how much room copies have that no kernel makes


@pytest.fixture(scope="module")
def answers() -> Answers:
    """What families answered, in plans of several recipes."""
    asked: list[Request] = []

    def watch(request: Request, known: tuple[Kernel, ...]) -> tuple[Launchable, ...]:
        asked.append(request)
        return choose(request, known)

    with mock.patch.object(select, "choose", watch):
        for recipe in ("official", "nvfp4", "bf16"):
            gpu_plan(recipe=recipe, **SIZES)
        gpu_plan(disable=("q_norm_quantize",), **SIZES)
        gpu_plan(recipe="bf16", ranks=2, **SIZES)
    found: Answers = {}
    for request in dict.fromkeys(asked):
        for candidate in TUNED:
            if (answer := answer_of(candidate, request)) is not None:
                found[request] = candidate, answer
                break
    return found


def answer_of(candidate: Kernel, request: Request) -> tuple[Launchable, ...] | None:
    try:
        return choose(request, (candidate,))
    except BuildError:
        return None


def others(value: Any) -> Iterator[Any]:
    """Other values of an attribute."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield value * 2 + 1
    elif isinstance(value, DType):
        yield F32 if value is BF16 else BF16
    elif isinstance(value, QuantFormat):
        yield None
        yield FP8_ROW if value == NVFP4_ROW else NVFP4_ROW
    elif value is None:
        yield FP8_ROW
        yield NVFP4_ROW
    elif isinstance(value, tuple):
        yield tuple(next(others(v)) for v in value)
    else:
        raise AssertionError(f"no other value of {value!r}")


def at_default(op: Op) -> set[str]:
    return {f.name for f in fields(op) if getattr(op, f.name) == f.default}  # type: ignore[arg-type]


def with_op(request: Request, old: Op, new: Op) -> Request:
    calls = tuple(replace(call, op=new) if call.op is old else call for call in request.calls)
    return replace(request, calls=calls)


def shows_in_types(request: Request, old: Op, new: Op) -> bool:
    """Would the results be others?"""
    call = next(call for call in request.calls if call.op is old)
    given = tuple(request.types[i] for i in call.inputs)
    try:
        return new.results(given) != old.results(given)
    except (GraphError, AttributeError, AssertionError, TypeError):  # no such op can be
        return True


def test_every_family_is_asked(answers: Answers) -> None:
    """But those of other models and targets."""
    elsewhere = {"blockscaled", "pick_draft", "sampler", "experts_down", "hash_swiglu"}
    found = {candidate.name for candidate, _ in answers.values()}
    assert {candidate.name for candidate in TUNED} - found <= elsewhere


def test_what_a_family_does_not_name_it_refuses(answers: Answers) -> None:
    for request, (candidate, _) in answers.items():
        for op in {call.op for call in request.calls}:
            for field in fields(op):  # type: ignore[arg-type]
                if field.name == "keep" or field.name in op.geometry:
                    continue
                taken = tuple(
                    replace(t, attributes=t.attributes - {field.name}) if t.op is type(op) else t
                    for t in candidate.takes
                )
                blind = replace(candidate, takes=taken)
                value = getattr(op, field.name)
                if value == field.default:
                    assert not blind.ignored(request)
                else:
                    with pytest.raises(BuildError, match=f"does not know {field.name} of {op.name}"):
                        choose(request, (blind,))


def test_what_a_family_names_decides_something(answers: Answers) -> None:
    """Another value is refused, shows in the results' types, or makes another launch."""
    named = {(c, t.op, name) for c, _ in answers.values() for t in c.takes for name in t.attributes}
    asked = {(c, type(call.op)) for request, (c, _) in answers.items() for call in request.calls}
    idle = {(c, op, name) for c, op, name in named if (c, op) in asked and (op, name) not in IDLE}
    for request, (candidate, answer) in answers.items():
        for op in {call.op for call in request.calls}:
            for name in {n for c, o, n in idle if c is candidate and o is type(op)}:
                for value in others(getattr(op, name)) if name not in at_default(op) else ():
                    new = replace(op, **{name: value})  # type: ignore[type-var]
                    if (
                        shows_in_types(request, op, new)
                        or answer_of(candidate, with_op(request, op, new)) != answer
                    ):
                        idle.discard((candidate, type(op), name))
    assert {(c.name, op.name, name) for c, op, name in idle} == set()


def without(answer: tuple[Launchable, ...], number: int) -> list[Launchable]:
    """An answer that forgets a value."""
    return [replace(x, bindings=tuple(b for b in x.bindings if b.value != number)) for x in answer]


def test_operands_and_results_that_a_family_forgets_it_refuses(answers: Answers) -> None:
    for request, (candidate, answer) in answers.items():
        read = {i for call in request.calls for i in call.inputs}
        made = {i for call in request.calls for i in call.outputs}
        for call in request.calls:
            for name, number in call.operands.items():
                if number not in made and (type(call.op), name) != (Compressor, "owners"):
                    forgets = replace(candidate, ask=lambda _, n=number: without(answer, n))  # noqa: B023
                    with pytest.raises(BuildError, match=r"does not read \w+ of"):
                        choose(request, (forgets,))
            for place, number in enumerate(call.outputs):
                if number not in read and place not in call.op.alias:
                    forgets = replace(candidate, ask=lambda _, n=number: without(answer, n))  # noqa: B023
                    with pytest.raises(BuildError, match=r"does not make result \d of"):
                        choose(request, (forgets,))


def test_an_op_with_more_than_its_family_knows_gets_a_generated_kernel() -> None:
    """As an attribute that is new in the op. Without one the reason is told."""
    knows = takes(Attention, "eps", "precision", "scale", "groups", "format", "ratio")
    blind = [replace(k, takes=(knows,)) if k.name == "attention" else k for k in KERNELS]
    one = {"batch": 1, "verify": 1, "chunk": 1, "certify": False}
    with mock.patch.object(select, "KERNELS", tuple(blind)):
        plan = gpu_plan(**one)
    names = {name.rpartition("_")[0] for name in plan.kernels}
    assert "attention" in names
    assert not {"attention_swa", "attention_csa", "attention_hca"} & names
    tuned = tuple(k for k in blind if k.ops)
    with (
        mock.patch.object(select, "KERNELS", tuned),
        pytest.raises(BuildError, match="attention: does not know window of attention, which is 128"),
    ):
        gpu_plan(**one)


def test_an_attribute_that_an_op_has_not_is_refused() -> None:
    with pytest.raises(BuildError, match="attention has no attribute limits that a kernel could know"):
        takes(Attention, "window", "limits")
