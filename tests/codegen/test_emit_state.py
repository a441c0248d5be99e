"""State writes of chunks without a device: text, launch facts, a cubin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dsv4c.codegen.build import Source, build
from dsv4c.codegen.kernels.riders import CompressSpec, KvStoreSpec
from dsv4c.codegen.kernels.state import StateSpec, emit_state
from dsv4c.config import load_config
from dsv4c.errors import BuildError
from tests.codegen.lowered import gpu_plan
from tests.conftest import Golden

EXTEND = KvStoreSpec(128, "fp8", 144, 1e-6, capacity=208, tokens=70)
ENTRIES = CompressSpec("compress", 128, "fp8", 4, True, 16, 64, 1e-6, tokens=70, half="entries")
KEYS = replace(ENTRIES, name="index", format="mxfp4", hadamard=True)


def test_a_chunks_state_in_two_launches(golden: Golden, tmp_path: Path) -> None:
    state = emit_state(StateSpec("state", 140, (EXTEND, KEYS)))
    rings = emit_state(StateSpec("rings", 140, tuple(replace(r, half="rings") for r in (ENTRIES, KEYS))))
    golden(rings.source, "kernels/rings.py.txt")
    assert state.grid == (2 * (208 + 18), 1, 1)  # rows of the copies, entries that may be completed
    assert rings.grid == (2 * (16 + 16), 1, 1)  # of each sequence the tokens that stay
    for emission in (state, rings):
        (kernel,) = build([Source(emission.symbol, emission.source)], "sm_90a", tmp_path)
        assert kernel.resources.stack == 0
        assert kernel.ptx.count("griddepcontrol.launch_dependents") == 1


def test_rings_hold_what_the_tokens_of_one_launch_pool() -> None:
    """Unless entries and rings are launches of their own."""
    with pytest.raises(BuildError, match="want a ring of 77 rows, got 16"):
        emit_state(StateSpec("state", 140, (replace(ENTRIES, half=""),)))


def test_of_rows_for_one_place_the_last_one_stays(tmp_path: Path) -> None:
    """Which rings of what drafts have, that no copy stands beside, where a chunk is longer than they are."""
    few, many = (KvStoreSpec(128, "fp8", 144, 1e-6, crowded=rows) for rows in (0, 256))
    texts = [emit_state(StateSpec("state", 256, (spec,))).source for spec in (few, many)]
    assert "crowded=" not in texts[0]
    assert "crowded=256" in texts[1]
    (kernel,) = build([Source("state_0", texts[1])], "sm_90a", tmp_path)
    assert kernel.resources.stack == 0
    config = replace(load_config("tiny"), num_layers=1, compress_ratios=(0,), num_hash_layers=1)
    plan = gpu_plan(config, batch=1, chunk=(8, 256), draft="mtp", max_context=512, certify=False)
    found = {
        name
        for name, program in plan.buckets.items()
        for launch in program.launches
        if b"crowded=256" in plan.files.get(f"kernels/{launch.kernel.kernel}.py", b"")
    }
    assert found == {"prefill-256.last"}
