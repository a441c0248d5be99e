"""A config that a GPU target has no kernels for: the refusal names its key."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsv4c.compiler import blame
from dsv4c.compiler.blame import one_layer_of_each_kind
from dsv4c.config import load_config
from dsv4c.errors import BuildError
from tests.codegen.lowered import gpu_plan


@pytest.mark.parametrize(
    ("key", "value"),
    [("vocab_size", 513), ("hidden_size", 384), ("head_dim", 192), ("hc_mult", 3), ("index_n_heads", 3)],
)
def test_the_key_is_named(key: str, value: int) -> None:
    config = replace(load_config("tiny"), **{key: value})
    with pytest.raises(BuildError, match=rf"the cause is {key} of the config, {value}: with \d+ there are"):
        gpu_plan(config, certify=False)


def test_a_recipe_is_not_blamed_on_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []
    lowers = blame._lowers
    monkeypatch.setattr(blame, "_lowers", lambda job: tried.append(job) or lowers(job))
    with pytest.raises(BuildError) as error:
        gpu_plan("tiny", recipe="fp32", certify=False)
    assert "the cause is" not in str(error.value)
    assert len(tried) == 1


def test_one_layer_of_each_kind() -> None:
    flash = one_layer_of_each_kind(load_config("deepseek-v4-flash"))
    assert (flash.num_layers, flash.num_hash_layers, flash.mtp_layers) == (4, 2, 0)
    assert set(flash.compress_ratios) == {0, 4, 128}
