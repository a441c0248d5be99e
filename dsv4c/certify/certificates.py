"""Certificates: for every way a rule applied, the matched nodes and the fused op give the same results.

Left, the nodes as the graph had them, with their own wiring and attributes; right, what the fused op means
(its body, or the meaning that replaces it). Both run on adversarial inputs, huge dimensions cut down where
ops allow it. Results are kept by digest, so a second compile pays nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dsv4c.cache import Store, cache_folder
from dsv4c.certify.application import applications, reduce_sizes
from dsv4c.certify.finding import Certificate, from_dict, to_dict
from dsv4c.passes.work import Match


@dataclass
class Certificates:
    """All certificates of a graph, how many were computed now, and the seconds it took."""

    all: list[Certificate] = field(default_factory=list)
    computed: int = 0
    seconds: float = 0.0

    @property
    def failed(self) -> list[Certificate]:
        return [c for c in self.all if not c.holds]


Progress = Callable[[str, int, int], None]


def certify(
    matches: Iterable[Match],
    *,
    folder: Path | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Certificates:
    """A certificate for every distinct application; kept in `folder` (None: the user's cache) by digest.

    The digest is that of the sizes that are evaluated, so another context or batch costs next to nothing.
    `fresh` evaluates again whatever was kept. `progress(rule, done, all)` is called before each. Two
    processes may share the folder.
    """
    started = time.perf_counter()
    store = Store(cache_folder() / "certificates" if folder is None else folder)
    result = Certificates()
    wanted = list(applications(matches))
    for done, applied in enumerate(wanted):
        if progress is not None:
            progress(f"certificate of {applied.rule}", done, len(wanted))
        reduced = reduce_sizes(applied)
        kept = None if fresh else _load(store, reduced.digest)
        if kept is None:
            # Loads torch, which a compile whose certificates are all kept never needs.
            from dsv4c.certify.evaluate import evaluated

            kept = evaluated(reduced)
            result.computed += 1
            _save(store, kept)
        result.all.append(kept.of_all_sizes(applied))
    result.seconds = time.perf_counter() - started
    return result


def _load(store: Store, digest: str) -> Certificate | None:
    content = store.get(digest)
    return None if content is None else from_dict(json.loads(content))


def _save(store: Store, certificate: Certificate) -> None:
    store.put(certificate.digest, json.dumps(to_dict(certificate)).encode())
