"""DeepSeek-V4 as a graph, its weights, and its prompts."""
