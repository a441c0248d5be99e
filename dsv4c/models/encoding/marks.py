"""The special tokens of a prompt, by name. What their ids are, the checkpoint's tokenizer file says."""

from __future__ import annotations

BEGIN = "<｜begin▁of▁sentence｜>"
END = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
REMINDER = "<｜latest_reminder｜>"
THINK, THOUGHT = "<think>", "</think>"
DSML = "｜DSML｜"

TASKS = {name: f"<｜{name}｜>" for name in ("action", "query", "authority", "domain", "title", "read_url")}
"""What a message's `task` appends to it."""
