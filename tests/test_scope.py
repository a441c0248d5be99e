"""Names and what they say: block, layer, path."""

from __future__ import annotations

import pytest

from dsv4c.config import load_config
from dsv4c.models.layout import layout
from dsv4c.scope import Scope


@pytest.mark.parametrize(
    ("name", "scope", "layer", "role", "leaf"),
    [
        ("layers.3.attn.wq_a", Scope("layers", 3, "attn.wq_a"), "layers.3", "wq_a", "wq_a"),
        (
            "layers.31.attn.indexer.wq_b",
            Scope("layers", 31, "attn.indexer.wq_b"),
            "layers.31",
            "indexer.wq_b",
            "wq_b",
        ),
        ("layers.0.hc_attn_fn", Scope("layers", 0, "hc_attn_fn"), "layers.0", "hc_attn_fn", "hc_attn_fn"),
        ("layers.3.attn", Scope("layers", 3, "attn"), "layers.3", "", "attn"),
        ("layers.3", Scope("layers", 3), "layers.3", "", ""),
        ("mtp.0.e_proj", Scope("mtp", 0, "e_proj"), "mtp.0", "e_proj", "e_proj"),
        ("embed", Scope("", 0, "embed"), "", "embed", "embed"),
        ("", Scope("", 0), "", "", ""),
        ("layers", Scope("", 0, "layers"), "", "layers", "layers"),
        ("layers.x.attn", Scope("", 0, "layers.x.attn"), "", "layers.x.attn", "attn"),
        ("layers.3x.attn", Scope("", 0, "layers.3x.attn"), "", "layers.3x.attn", "attn"),
        ("model.layers.3.attn", Scope("", 0, "model.layers.3.attn"), "", "model.layers.3.attn", "attn"),
        ("mtp.01.norm", Scope("", 0, "mtp.01.norm"), "", "mtp.01.norm", "norm"),
    ],
)
def test_a_name_says_where_it_stands(name: str, scope: Scope, layer: str, role: str, leaf: str) -> None:
    found = Scope.of(name)
    assert found == scope
    assert (found.layer, found.role, found.leaf) == (layer, role, leaf)
    assert str(found) == name


def test_every_parameter_is_in_a_layer_of_its_model_or_in_none() -> None:
    config = load_config("deepseek-v4-flash")
    scopes = [Scope.of(param.name) for param in layout(config)]
    assert {s.number for s in scopes if s.block == "layers"} == set(range(config.num_layers))
    assert {s.number for s in scopes if s.draft} == set(range(config.mtp_layers))
    assert {s.path for s in scopes if not s.block} == {"embed", "head", "norm"} | {
        f"hc_head_{part}" for part in ("fn", "base", "scale")
    }
