"""Edits of a plan.json, each of a kind: a field's path and what is done to it, with digests made right again.

A path names fields, `*` for names of a map and `[]` for elements of a list. Classes of edits: out of range,
swapped (with another value of that path), missing, extra, foreign (of another type), stale (of another plan).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MAPS = frozenset({"files", "kernels", "buckets", "values", "sources", "parts", "outputs", "rules"})
"""Fields whose keys are names, one like the other."""

Steps = tuple[str | int, ...]
Edit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Kind:
    """A field's path and a class of edits."""

    path: str
    edit: str

    def __str__(self) -> str:
        return f"{self.path} {self.edit}"


def places(data: Any) -> dict[str, list[Steps]]:
    """Every path of the data, with where it is."""
    found: dict[str, list[Steps]] = {}

    def walk(value: Any, path: tuple[str, ...], steps: Steps) -> None:
        found.setdefault(".".join(path), []).append(steps)
        if isinstance(value, Mapping):
            names = bool(path) and path[-1] in MAPS and path[:1] != ("config",)
            for key, item in value.items():
                walk(item, (*path, "*" if names else key), (*steps, key))
        elif isinstance(value, list):
            for number, item in enumerate(value):
                walk(item, (*path, "[]"), (*steps, number))

    walk(data, (), ())
    del found[""]
    return found


def edits(data: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[Kind, Edit]]:
    """Every kind once; `other` is the plan.json that stale values are of."""
    elsewhere = places(other)
    for path, where in places(data).items():
        steps = where[len(where) // 2]
        value = at(data, steps)
        yield Kind(path, "missing"), _remover(steps)
        yield Kind(path, "foreign"), _setter(steps, _foreign(value))
        for name, wild in _out_of_range(value).items():
            yield Kind(path, name), _setter(steps, wild)
        if isinstance(value, dict | list) and value:
            yield Kind(path, "extra"), _setter(steps, _extended(value))
        twin = next((s for s in where if at(data, s) != value), None)
        if twin is not None and not _inside(steps, twin) and not _inside(twin, steps):
            yield Kind(path, "swapped"), _swapper(steps, twin)
        old = [at(other, s) for s in elsewhere.get(path, ())]
        stale = next((v for v in old if v != value), None)
        if stale is not None:
            yield Kind(path, "stale"), _setter(steps, stale)


def at(data: Any, steps: Steps) -> Any:
    for step in steps:
        data = data[step]
    return data


def _inside(one: Steps, two: Steps) -> bool:
    return two[: len(one)] == one


def _foreign(value: Any) -> Any:
    """Of another type than any reader expects."""
    return {"foreign": [value]} if not isinstance(value, dict) else [[value]]


def _out_of_range(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"out of range": not value}
    if isinstance(value, int):
        return {"out of range": value + 10**6, "below range": -1, "beyond range": 1 << 62}
    if isinstance(value, float):
        return {"out of range": -value - 1e9}
    if isinstance(value, str):
        return {"out of range": f"{value}x", "below range": ""}
    return {"out of range": type(value)()} if value else {}


def _extended(value: Any) -> Any:
    if isinstance(value, list):
        return [*value, copy.deepcopy(value[-1])]
    return {**value, "another": copy.deepcopy(next(iter(value.values())))}


def _setter(steps: Steps, value: Any) -> Edit:
    def edit(data: dict[str, Any]) -> None:
        at(data, steps[:-1])[steps[-1]] = copy.deepcopy(value)

    return edit


def _remover(steps: Steps) -> Edit:
    def edit(data: dict[str, Any]) -> None:
        del at(data, steps[:-1])[steps[-1]]

    return edit


def _swapper(one: Steps, two: Steps) -> Edit:
    def edit(data: dict[str, Any]) -> None:
        first, second = at(data, one), at(data, two)
        at(data, one[:-1])[one[-1]], at(data, two[:-1])[two[-1]] = second, first

    return edit
