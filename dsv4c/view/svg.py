"""A graph as SVG, drawn by Graphviz."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dsv4c.errors import GraphError
from dsv4c.ir.graph import Graph
from dsv4c.view.dot import dot


def svg(
    graph: Graph,
    layer: int | str | None = None,
    fold: bool = True,
    bodies: bool = False,
    launches: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """SVG text of `dot(...)`. Raises GraphError when the `dot` program is missing or fails."""
    source = dot(graph, layer, fold, bodies, launches)
    try:
        import graphviz
    except ModuleNotFoundError:
        raise GraphError("drawing needs the Python package graphviz: pip install graphviz") from None
    try:
        return str(graphviz.Source(source).pipe(format="svg", encoding="utf-8"))
    except graphviz.ExecutableNotFound:
        raise GraphError(
            "drawing needs the program `dot`, which is not on PATH: install the package graphviz "
            "(apt-get install graphviz, or brew install graphviz), or write DOT instead (--format dot)"
        ) from None
    except graphviz.CalledProcessError as error:
        raise GraphError(f"`dot` could not draw graph {graph.name}: {error}") from None
