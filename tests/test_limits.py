"""What a target has no kernels for: all of it at once, by the keys of the config."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsv4c.arch import SM_90A
from dsv4c.compiler import limits as subject
from dsv4c.compiler.limits import Obstacle, limits, memory_of, one_layer_of_each_kind
from dsv4c.compiler.request import Request
from dsv4c.config import load_config
from dsv4c.errors import BuildError
from tests.codegen.lowered import gpu_plan
from tests.commands import command

SMALL = {"max_context": 256, "batch": 1, "verify": 1, "chunk": 8}
ODD = {"vocab_size": 513, "hc_mult": 3}


@pytest.fixture(scope="module")
def found() -> subject.Limits:
    return limits(Request(replace(load_config("tiny"), **ODD), target="sm_90a", **SMALL))


def test_every_obstacle_is_told_with_a_value_that_is_none(found: subject.Limits) -> None:
    assert {o.key: o.value for o in found.obstacles} == ODD
    mended = replace(load_config("tiny"), **{o.key: o.instead for o in found.obstacles})
    again = limits(Request(mended, target="sm_90a", **SMALL))
    assert again.obstacles == ()
    assert all(reason.startswith("no kernel for ") for o in found.obstacles for reason in o.reasons)


@pytest.mark.parametrize(("key", "value"), [("hidden_size", 384), ("index_n_heads", 3)])
def test_compile_names_the_key(key: str, value: int) -> None:
    config = replace(load_config("tiny"), **{key: value})
    with pytest.raises(BuildError, match=rf"the cause is {key} is {value}, with \d+ there are kernels"):
        gpu_plan(config, certify=False)


def test_compile_names_every_key() -> None:
    with pytest.raises(BuildError) as error:
        gpu_plan(replace(load_config("tiny"), **ODD), certify=False)
    assert all(f"the cause is {key} is {value}" in str(error.value) for key, value in ODD.items())


def test_a_recipe_is_not_blamed_on_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []
    refusals = subject._refusals
    monkeypatch.setattr(subject, "_refusals", lambda job: tried.append(job) or refusals(job))
    found = limits(Request("tiny", target="sm_90a", recipe="fp32", batch=(1, 16)))
    bucket, recipe = found.obstacles
    assert "decode-16 has 16 rows" in str(bucket)
    assert (recipe.key, len(tried)) == ("", 2)
    assert str(recipe).startswith("no kernel for embedding")
    assert len(recipe.reasons) > 10


def test_what_fits_and_what_does_not() -> None:
    whole = SM_90A.memory
    assert memory_of("sm_90a", {"weights": whole - 1, "state": 1}).fits
    assert not memory_of("sm_90a", {"weights": whole, "state": 1}).fits
    assert memory_of("cpu", {"weights": 10 * whole}).fits
    flash = limits(Request("deepseek-v4-flash", target="sm_90a", **SMALL))
    assert (flash.obstacles, flash.memory.fits) == ((), False)
    plan = gpu_plan("tiny", certify=False, **SMALL)
    assert limits(Request("tiny", target="sm_90a", **SMALL)).memory.blocks == plan.blocks


def test_the_command(monkeypatch: pytest.MonkeyPatch, found: subject.Limits) -> None:
    monkeypatch.setattr("dsv4c.cli.limits.limits", lambda request: found)
    result = command("limits", "tiny")
    assert result.code == 7
    assert "  obstacle  vocab_size is 513, with" in result.out
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
