"""What a pass is: a frozen dataclass whose fields are its options, what it needs and gives, and `run`.

`spec` and `parse_spec` are its text form, `fold{without=sinkhorn+indexer}`, without options at their default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from dsv4c.errors import GraphError, listed
from dsv4c.ir.graph import Graph

if TYPE_CHECKING:
    from dsv4c.passes.fold import FoldReport, Rule


@dataclass
class Context:
    """What passes share besides the graph: given to a run, and filled by it."""

    rules: Mapping[str, Rule] = field(default_factory=dict)  # all that may fold, by name, in order
    expected: Mapping[str, int] = field(default_factory=dict)  # applications that a rule must have
    fold: FoldReport | None = None
    prepack: Graph | None = (
        None  # run once, when weights are loaded; its outputs are params of the main graph
    )
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pass:
    """Base of passes. Subclass it with @dataclass(frozen=True).

    Fields are options: str, int, bool or tuple[str, ...]. `requires` and `establishes` name facts about the
    graph; `spoils` names facts that no longer hold after it.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    spoils: ClassVar[frozenset[str]] = frozenset()
    follows: ClassVar[str] = "fold"
    """Where `--pass` puts it: right behind this pass."""

    def run(self, graph: Graph, context: Context) -> Graph:
        """A new graph; what does not fit in one goes to `context`. Raises GraphError."""
        raise NotImplementedError(f"{type(self).__name__} declares no run")

    @property
    def spec(self) -> str:
        """As a pipeline's text has it: the name, and in braces the options that are not the default."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        if not options:
            return self.name
        return f"{self.name}{{{','.join(f'{k}={_print(v)}' for k, v in options.items())}}}"


def _print(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(value) if isinstance(value, tuple) else str(value)


def _read(text: str, kind: str) -> Any:
    if "tuple" in kind:
        return tuple(part for part in text.split("+") if part)
    if kind == "bool" and text in ("true", "false"):
        return text == "true"
    if kind == "int" and re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    if kind == "str":
        return text
    raise GraphError(f"cannot read {text!r} as {kind}")


def split_specs(text: str) -> Iterator[str]:
    """The passes of a spec string: split at commas outside of braces."""
    depth = start = 0
    for i, c in enumerate(text):
        depth += (c == "{") - (c == "}")
        if c == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    yield text[start:].strip()


def parse_spec(text: str, known: Mapping[str, type[Pass]]) -> Pass:
    """One pass from its spec. Raises GraphError for an unknown pass or option, listing those there are."""
    match = re.fullmatch(r"([A-Za-z0-9_-]+)(?:\{(.*)\})?", text)
    if match is None or match[1] not in known:
        there = listed(known, match[1] if match is not None else text[:80])
        raise GraphError(f"pipeline: no pass is written {text[:80]!r}; there are: {there}")
    cls = known[match[1]]
    kinds = {f.name: str(f.type) for f in fields(cls)}
    options: dict[str, Any] = {}
    for option in filter(None, (match[2] or "").split(",")):
        name, equals, value = option.partition("=")
        if name not in kinds or not equals:
            raise GraphError(
                f"pipeline: {cls.name} has no option {option!r}; it has: {', '.join(kinds) or 'none'}"
            )
        try:
            options[name] = _read(value, kinds[name])
        except GraphError as error:
            raise GraphError(f"pipeline: {cls.name}.{name}: {error}") from None
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    for name in sorted(needed - options.keys()):
        raise GraphError(f"pipeline: {cls.name} needs its {name}: {cls.name}{{{name}=...}}")
    return cls(**options)
