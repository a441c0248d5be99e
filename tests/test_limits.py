"""What a target has no kernels for: all of it at once, by the keys of the config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dsv4c.arch import SM_90A
from dsv4c.codegen.lower import Part
from dsv4c.codegen.select import Kernels
from dsv4c.compiler import limits as subject
from dsv4c.compiler.compile import compile
from dsv4c.compiler.limits import Obstacle, limits, memory_of, one_layer_of_each_kind
from dsv4c.compiler.request import Request
from dsv4c.config import ModelConfig, load_config
from dsv4c.errors import BuildError
from dsv4c.ir.graph import Graph, Node
from dsv4c.plan.folder import Plan
from tests.codegen.lowered import gpu_plan
from tests.commands import command

SMALL = {"max_context": 256, "batch": 1, "verify": 1, "chunk": 8}
ODD = {"vocab_size": 513, "hidden_size": 384}


class Picky(Kernels):
    """Kernels that do not take what has a size of ODD."""

    def code(
        self, graph: Graph, nodes: Sequence[Node], plain: frozenset[str] = frozenset()
    ) -> tuple[Part, ...]:
        for node in nodes:
            sizes = {n for value in (*node.inputs, *node.outputs) for n in value.type.shape}
            for size in sizes & set(ODD.values()):
                raise BuildError(
                    f"no kernel for {node.op.name}\n  picky: {size} columns: want multiples of 256"
                )
        return super().code(graph, nodes, plain)


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4c.codegen.gpu.Kernels", Picky)


def odd() -> ModelConfig:
    return replace(load_config("tiny"), **ODD)


def test_compile_warns_of_a_card_that_is_too_small_before_it_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "ARCHS", {"sm_90a": replace(SM_90A, memory=1 << 20)})
    monkeypatch.setattr("dsv4c.cli.compile.compile", _stopping(compile))
    result = command(
        *("compile", "tiny", "--target", "sm_90a", "--max-context", 256, "--no-certify", "-o", tmp_path / "p")
    )
    assert result.code == 7
    warning, error = result.err.splitlines()
    assert warning.startswith("warning: 0.0")
    assert warning.endswith("more than the 0.0 GB of the card")
    assert error == "error: no time to build"


def _stopping(compile: Callable[..., Plan]) -> Callable[..., Plan]:
    """`compile` that stops where kernels would be built."""

    def stopped(*given: Any, **options: Any) -> Plan:
        with mock.patch("dsv4c.codegen.build.build", side_effect=BuildError("no time to build")):
            return compile(*given, **options)

    return stopped


@pytest.fixture(scope="module")
def found() -> subject.Limits:
    with mock.patch("dsv4c.codegen.gpu.Kernels", Picky):
        return limits(Request(odd(), target="sm_90a", **SMALL))


@pytest.mark.usefixtures("picky")
def test_every_obstacle_is_told_with_a_value_that_is_none(found: subject.Limits) -> None:
    assert {o.key: o.value for o in found.obstacles} == ODD
    assert all("want multiples of 256" in reason for o in found.obstacles for reason in o.reasons)
    mended = replace(load_config("tiny"), **{o.key: o.instead for o in found.obstacles})
    assert limits(Request(mended, target="sm_90a", **SMALL)).obstacles == ()
    assert found.memory.blocks.keys() == {"weights", "state"}


@pytest.mark.usefixtures("picky")
def test_compile_names_every_key() -> None:
    with pytest.raises(BuildError) as error:
        gpu_plan(odd(), certify=False, **SMALL)
    assert all(f"the cause is {key} is {value}, with " in str(error.value) for key, value in ODD.items())


def test_a_recipe_is_not_blamed_on_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tiny model is refused for, too: no key is tried."""
    monkeypatch.setitem(ODD, "vocab_size", 256)  # a size that it has
    monkeypatch.setattr("dsv4c.codegen.gpu.Kernels", Picky)
    tried: list[object] = []
    refusals = subject._refusals
    monkeypatch.setattr(subject, "_refusals", lambda job: tried.append(job) or refusals(job))
    found = limits(Request("tiny", target="sm_90a", batch=(1, 16), slots=8))
    bucket, recipe = found.obstacles
    assert "slots is 8; expected at least 16" in str(bucket)
    assert (recipe.key, len(tried)) == ("", 2)
    assert len(recipe.reasons) > 1


@pytest.mark.parametrize(
    ("changed", "recipe"),
    [
        ({}, "official"),
        ({"vocab_size": 513, "hc_mult": 3}, "official"),
        ({"hidden_size": 384, "head_dim": 192, "index_n_heads": 3}, "official"),
        ({}, "fp32"),
    ],
)
def test_odd_but_legal_models_have_kernels(changed: dict[str, int], recipe: str) -> None:
    config = replace(load_config("tiny"), **changed)
    assert limits(Request(config, target="sm_90a", recipe=recipe, **SMALL)).obstacles == ()


def test_what_fits_and_what_does_not() -> None:
    whole = SM_90A.memory
    assert memory_of("sm_90a", {"weights": whole - 1, "state": 1}).fits
    assert not memory_of("sm_90a", {"weights": whole, "state": 1}).fits
    assert memory_of("cpu", {"weights": 10 * whole}).fits
    plan = gpu_plan("tiny", certify=False, **SMALL)
    assert limits(Request("tiny", target="sm_90a", **SMALL)).memory.blocks == plan.blocks


def test_the_command(found: subject.Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4c.cli.limits.limits", lambda request: found)
    result = command("limits", "tiny")
    assert result.code == 7
    assert "  obstacle  vocab_size is 513, with" in result.out
    assert "513 columns: want multiples of 256" in result.out
    assert "memory    0." in result.out
    assert result.err == "error: tiny: 2 obstacles to a plan for sm_90a\n"
    data = command("limits", "tiny", "--json").json
    assert [o["key"] for o in data["obstacles"]] == [o.key for o in found.obstacles]
    assert data["memory"]["fits"] is True
    monkeypatch.setattr("dsv4c.cli.limits.limits", lambda request: replace(found, obstacles=()))
    assert command("limits", "tiny").code == 0
    assert str(Obstacle(("one\nmore", "two"))) == "one; 1 more are refused"


def test_one_layer_of_each_kind() -> None:
    flash = one_layer_of_each_kind(load_config("deepseek-v4-flash"))
    assert (flash.num_layers, flash.num_hash_layers, flash.mtp_layers) == (4, 2, 0)
    assert set(flash.compress_ratios) == {0, 4, 128}
