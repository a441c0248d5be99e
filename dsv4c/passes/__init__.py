"""Passes: Graph -> Graph, one verb per file; `pipeline` holds the ordered list."""
