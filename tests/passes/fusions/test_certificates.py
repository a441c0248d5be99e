"""Rewrites of calls of every shape are certified, and what could be wrong about slots is seen."""

from __future__ import annotations

import pytest

from dsv4c.buckets import Bucket
from dsv4c.certify.certificates import certify
from dsv4c.certify.defects import inject, totals
from tests.passes.fusions.cases import DECODE, PREFILL, VERIFY, folded

STATEFUL = {"attention", "compressor", "indexer", "kv_norm_rope_store"}


@pytest.mark.parametrize("bucket", [DECODE, VERIFY, PREFILL], ids=lambda bucket: bucket.name)
@pytest.mark.parametrize("recipe", ["fp32", "official"])
def test_every_application_is_bit_exact(recipe: str, bucket: Bucket, tmp_path) -> None:
    _, report = folded("tiny", recipe, bucket)
    found = certify(report.matches, folder=tmp_path)
    assert {c.kind for c in found.all} == {"bit-exact"}
    assert {c.rule for c in found.all} >= STATEFUL


@pytest.mark.parametrize("bucket", [DECODE, VERIFY, PREFILL], ids=lambda bucket: bucket.name)
def test_a_wrong_slot_is_seen_in_every_op_with_state(bucket: Bucket) -> None:
    _, report = folded("tiny", "official", bucket)
    found = inject([match for match in report.matches if match.op.name in STATEFUL])
    assert totals(found)["survivors"] == []
    rules = {
        defect: {kill.rule for kill in found if kill.defect == defect} for defect in {k.defect for k in found}
    }
    assert rules["wrong slot"] == STATEFUL
    assert rules["wrong place"] == {"compressor", "kv_norm_rope_store"}
    beside = {"compressor", "kv_norm_rope_store"} if bucket.keeps_beside else set()
    assert rules.get("forget the ring", set()) == beside
