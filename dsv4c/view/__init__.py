"""Views of a graph: text, DOT, SVG, one HTML file, Model Explorer JSON, and what differs between two graphs."""
