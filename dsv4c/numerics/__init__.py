"""Number formats in bytes: the codecs in PyTorch, and how weights are packed."""
