"""Certificates of a sharded graph: exchanges give what the whole model has, and planted mistakes are seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from dsv4c.certify.evaluate import PATTERNS
from dsv4c.certify.finding import ORDER
from dsv4c.certify.ranks import Given, Region, allowed, certify_ranks, evaluate, regions
from dsv4c.compiler.request import Draft, Request
from dsv4c.compiler.sharding import certify_shard
from dsv4c.config import load_config
from dsv4c.models.drafting import with_dspark
from dsv4c.numerics.codec import Quantized, Value
from tests.passes.test_shard import graphs


@cache
def found(ranks: int, recipe: str = "official") -> tuple[Region, ...]:
    return tuple(regions(*graphs(ranks, recipe), ranks))


def of(kind: str, operand: str = "", ranks: int = 2) -> Region:
    """The first exchange of a kind that reads an operand of that type."""
    return next(
        r
        for r in found(ranks)
        if r.exchange.op.name == kind and any(operand in str(v.type) for v in r.whole.inputs)
    )


@pytest.mark.parametrize(("ranks", "recipe"), [(2, "official"), (4, "fp32")])
def test_every_exchange_holds(ranks: int, recipe: str, tmp_path: Path) -> None:
    made = certify_ranks(*graphs(ranks, recipe), ranks, tmp_path)
    assert [c.reason for c in made if not c.holds] == []
    assert sum(c.count for c in made) == 7
    kinds = {c.op.partition(" ")[0]: c.kind for c in made}
    assert kinds["all_gather"] == "bit-exact"
    assert certify_ranks(*graphs(ranks, recipe), ranks, tmp_path) == made  # kept


def test_a_sum_of_one_product_is_exact_to_its_rounding() -> None:
    """The product of wo_b rounds once in the whole model, too."""
    kinds = {evaluate(of("all_reduce", "[4,128,256]"), pattern, 0).kind for pattern in PATTERNS}
    assert kinds <= {"bit-exact", "reassociation"}


def other_order(given: Given) -> Given:
    return given[::-1]


def twice(given: Given) -> Given:
    return [given[0], given[0], *given[2:]]


def stale(given: Given) -> Given:
    """A rank's words are of another step: it was given other activations."""
    last = dict(given[-1])
    name = next(n for n, v in last.items() if v.shape[0] == 2 and is_float(v))
    value = last[name]
    last[name] = value.map(lambda part: part.flip(0)) if isinstance(value, Quantized) else value.flip(0) * 2
    return [*given[:-1], last]


def is_float(value: Value) -> bool:
    return isinstance(value, Quantized) or value.is_floating_point()


def scale_row_off(given: Given) -> Given:
    """The scales of a rank's rows are those of the rows one block on."""
    first = dict(given[0])
    for name, value in given[0].items():
        other = given[1][name]
        if isinstance(value, Quantized) and not torch.equal(value.scale, other.scale):  # type: ignore[union-attr]
            first[name] = value._replace(scale=other.scale)  # type: ignore[union-attr]
            return [first, *given[1:]]
    raise AssertionError("no scales are cut")


def shared_on_each(given: Given) -> Given:
    """Every rank adds all of the shared expert, as far as that is the first one's part."""
    names = [n for n, v in given[0].items() if len(v.shape) == 2 and v.shape == (256, 256)]
    return [{n: (given[0][n] if n in names else v) for n, v in own.items()} for own in given]


DEFECTS: list[tuple[Callable[[Given], Given], Callable[[], Region]]] = [
    (other_order, lambda: of("all_gather")),
    (twice, lambda: of("all_gather")),
    (twice, lambda: of("all_reduce", "[4,128,256]")),
    (twice, lambda: of("all_reduce", "[8,512,256]")),
    (stale, lambda: of("all_gather")),
    (stale, lambda: of("all_reduce", "[4,128,256]")),
    (stale, lambda: of("all_reduce", "[8,512,256]")),
    (scale_row_off, lambda: of("all_reduce", "[8,512,256]")),
    (shared_on_each, lambda: of("all_reduce", "[8,512,256]")),
]


@pytest.mark.parametrize(("defect", "where"), DEFECTS)
def test_a_planted_defect_is_seen(defect: Callable[[Given], Given], where: Callable[[], Region]) -> None:
    region = where()
    found = (evaluate(region, pattern, seed, defect) for seed, pattern in enumerate(PATTERNS))
    assert any(ORDER.index(finding.kind) > ORDER.index(allowed(region)) for finding in found)


@pytest.mark.parametrize("head", ["mtp", "dspark"])
def test_what_drafts_has_certificates(head: Draft, tmp_path: Path) -> None:
    flash = load_config("deepseek-v4-flash")
    model = flash if head == "mtp" else with_dspark(flash)
    plain, drafting = (
        certify_shard(Request(model, ranks=2, draft=draft).job(), tmp_path) for draft in ("off", head)
    )
    assert all(c.holds for c in drafting)
    assert {c.digest for c in drafting} >= {c.digest for c in plain}
    assert sum(c.count for c in drafting) > sum(c.count for c in plain)
