"""Buckets by name, and what follows from their shape."""

from __future__ import annotations

import pytest

from dsv4c.buckets import ROWS, Bucket, bucket_named

NAMED = {
    "round-1x4.trusts": Bucket("round", 1, 4, trusts=True),
    "accept-2x4.sampled.trusts": Bucket("accept", 2, 4, sampled=True, trusts=True),
    "decode-1": Bucket("decode"),
    "decode-8": Bucket("decode", 8),
    "verify-1x4": Bucket("verify", 1, 4),
    "verify-2x8.last": Bucket("verify", 2, ROWS, "last"),
    "prefill-64": Bucket("prefill", tokens=64),
    "prefill-3x64.last": Bucket("prefill", 3, 64, "last"),
    "draft-64": Bucket("draft", tokens=64),
    "draft-2x4": Bucket("draft", 2, 4),
}


@pytest.mark.parametrize("name", NAMED)
def test_names(name: str) -> None:
    assert NAMED[name].name == name
    assert bucket_named(name) == NAMED[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("decode", "'decode' names no bucket; expected decode-8, verify-1x4, prefill-64 or draft-3"),
        ("train-8", "'train-8' names no bucket; expected"),
        ("decode-0", "'decode-0' names no bucket; expected"),
        ("decode-2x1", "'decode-2x1' names no bucket; decode-1 is how it is written"),
        ("prefill-1x64", "'prefill-1x64' names no bucket; prefill-64 is how it is written"),
        ("decode-8.first", "'decode-8.first' names no bucket; expected"),
    ],
)
def test_what_names_no_bucket(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bucket_named(name)


def test_what_follows_from_the_shape() -> None:
    bucket = Bucket("prefill", 3, ROWS)
    assert bucket.rows == 24
    assert not bucket.keeps_beside
    assert Bucket("prefill", tokens=ROWS + 1).keeps_beside
    assert (bucket.is_main, Bucket("draft").is_main) == (True, False)
    assert (bucket.given, Bucket("round", 2, 3).given) == (24, 2)
