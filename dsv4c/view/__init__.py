"""Views of a graph: text, DOT, SVG, one HTML file, Model Explorer JSON, and how two graphs differ."""
