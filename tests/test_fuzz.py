"""Every parser on inputs that nobody meant: an answer or an error of its own, soon (`-m slow`: 100,000)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv4c
from dsv4c.plan.folder import Plan
from tests.fuzzing import Target, check, mutated, targets

NAMES = (
    *("json", "type", "attribute", "graph", "config", "header", "header json", "index", "plan"),
    *("saved", "pipeline", "tokens", "counts", "state"),
)
MANY = 100_000


@pytest.fixture(scope="module")
def parsers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    plan: Plan = dsv4c.compile("tiny", max_context=128, certify=False)
    found = targets(tmp_path_factory.mktemp("fuzz"), plan)
    assert tuple(found) == NAMES
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_corpus_itself_is_read(name: str, parsers: dict[str, Target]) -> None:
    for data in parsers[name].corpus[:1]:
        parsers[name].run(data)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 40))
def test_a_parser_answers_or_refuses(name: str, parsers: dict[str, Target], seed: int) -> None:
    check(parsers[name], mutated(parsers[name], seed))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_parser_answers_or_refuses_many(
    name: str, parsers: dict[str, Target], capsys: pytest.CaptureFixture[str]
) -> None:
    slowest = max(check(parsers[name], mutated(parsers[name], seed)) for seed in range(MANY))
    with capsys.disabled():
        print(f"\n{name}: {MANY:,} inputs, the slowest took {slowest:.3f} s")
