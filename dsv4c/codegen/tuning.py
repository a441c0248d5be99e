"""How kernels may be cut otherwise than planned (`dsv4c tune`).

A kernel is known by its key: its name and a digest of what it computes and for which architecture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import combinations, product

from dsv4c.arch import Arch
from dsv4c.codegen.emit import Emission, Tuned
from dsv4c.cuts import PLANNED, Cut
from dsv4c.errors import BuildError

CHOICES = {"rounds": range(1, 11), "stages": range(2, 9), "early": range(1, 5), "ahead": range(1, 9)}


def tuned(emit: Callable[[Cut], Emission], arch: Arch, name: str, *spec: object) -> Emission:
    """The kernel of a spec, cut as was measured to be fastest on `arch.gpu`, or as planned."""
    digest = hashlib.sha256(f"{arch.name} {spec!r}".encode()).hexdigest()[:12]
    key = f"{name}-{digest}"
    cut = arch.cut_of(key)
    return replace(emit(cut), tuned=Tuned(key, cut, partial(_others, emit)))


def _others(emit: Callable[[Cut], Emission]) -> Iterator[tuple[Cut, Emission]]:
    """Cuts with a text of their own, one choice changed, then two; weights lie as they do."""
    planned = emit(PLANNED)
    seen = {planned.source}
    for count in (1, 2):
        for names in combinations(CHOICES, count):
            for values in product(*(CHOICES[name] for name in names)):
                cut = Cut(**dict(zip(names, values, strict=True)))
                try:
                    made = emit(cut)
                except BuildError:  # it does not fit
                    continue
                same = made.packing == planned.packing and made.parameters == planned.parameters
                if same and made.source not in seen:
                    seen.add(made.source)
                    yield cut, made
