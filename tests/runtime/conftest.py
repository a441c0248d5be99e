"""A small checkpoint and sessions on it, shared by the tests of plans and sessions."""

from __future__ import annotations

from pathlib import Path

import pytest

import dsv4c
from dsv4c.models.synth import synthesize
from dsv4c.plan.folder import Plan

CONTEXT, CHUNK, BATCH = 160, 24, 3


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the built-in tiny model, with its config."""
    return synthesize(dsv4c.load_config("tiny"), tmp_path_factory.mktemp("tiny") / "weights", seed=7)


@pytest.fixture(scope="session")
def plan(checkpoint: Path) -> Plan:
    """Official numerics, three slots, an odd chunk, a bucket of every kind."""
    return dsv4c.compile(checkpoint, batch=BATCH, max_context=CONTEXT, chunk=CHUNK, draft="mtp")
