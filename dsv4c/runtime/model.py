"""Is a checkpoint of the plan's model? Shapes alone do not tell: its config does, where it has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4c.config import ModelConfig, load_config
from dsv4c.errors import CheckpointError
from dsv4c.plan.folder import Plan

BESIDE = frozenset({"name", "notes", "mtp_layers", "bos_token_id", "eos_token_id"})
"""Fields that nothing a plan runs depends on; MTP tensors are looked for where a plan needs them."""

DSPARK = "dspark_"
"""Begins fields on which those plans depend that draft."""

RECAST = {"mxfp4", "nvfp4"}  # each is read as the other, or refused by name where that would round


def check_model(plan: Plan, weights: Path) -> None:
    """Raise CheckpointError if the config beside the weights, a folder or a file, is of another model.

    ConfigError if it is the config of none.
    """
    try:
        folder = weights if weights.is_dir() else weights.parent
        if not (folder / "config.json").is_file():
            return
    except OSError as error:
        raise CheckpointError(f"{weights}: cannot be read: {error.strerror}") from None
    ours, theirs = ModelConfig.from_dict(plan.config).to_dict(), load_config(folder).to_dict()
    if {ours["expert_format"], theirs["expert_format"]} <= RECAST:
        theirs["expert_format"] = ours["expert_format"]
    drafts = any(program.shape.drafts for program in plan.buckets.values())
    differing = [
        key
        for key in ours
        if ours[key] != theirs[key] and key not in BESIDE and (drafts or not key.startswith(DSPARK))
    ]
    if differing:
        found = (f"{key} is {_short(theirs[key])}, the plan has {_short(ours[key])}" for key in differing[:5])
        raise CheckpointError(
            f"{weights}: is the checkpoint of another model: {'; '.join(found)}; give the plan's own"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
