"""What a slot holds: rows of every state, copied from slot to slot, written to a file and read back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv4c.errors import SessionError
from dsv4c.numerics.codec import Value, parts_of
from dsv4c.plan.folder import Plan
from dsv4c.publish import published

FORMAT, SCHEMA = "dsv4c-state", "3"
REACHED = ".reached"  # ends the name of the array that says how far a slot's buffers were ever written


@dataclass(frozen=True)
class Saved:
    """The rows of some slots, by state: uint8 [slots, bytes of a row]."""

    rows: Mapping[str, Tensor]

    def put(self, states: Mapping[str, Value], slots: Sequence[int]) -> None:
        """Write them to these slots, in order."""
        for name, part in _parts(states):
            for row, slot in zip(self.rows[name], slots, strict=True):
                _bytes(part[slot]).copy_(row)

    def held(self, name: str) -> list[int]:
        """Tokens that each slot holds, as the state of that name counts them."""
        return self._counts(f"{name}.0")

    def reached(self, name: str) -> list[int]:
        """The furthest token that each slot's buffers were given."""
        return self._counts(f"{name}{REACHED}")

    def _counts(self, name: str) -> list[int]:
        return self.rows[name].contiguous().view(torch.int32).flatten().tolist()


def copy_slot(states: Mapping[str, Value], source: int, target: int) -> None:
    """Let one slot hold what another holds."""
    for _, part in _parts(states):
        part[target].copy_(part[source])


def write(
    path: Path,
    plan: Plan,
    states: Mapping[str, Value],
    slots: Sequence[int],
    reached: Mapping[str, Sequence[int]],
) -> Path:
    """Write the rows of these slots to a safetensors file, whole or not at all, and return its path.

    `reached` are the furthest tokens of all slots by the state that counts them. Raises SessionError if the
    file cannot be written.
    """
    rows = {n: torch.stack([_bytes(part[s]).cpu() for s in slots]) for n, part in _parts(states)}
    for name, furthest in reached.items():
        counts = torch.tensor([[furthest[s]] for s in slots], dtype=torch.int32)
        rows[f"{name}{REACHED}"] = counts.view(torch.uint8)
    metadata = {"format": FORMAT, "schema": SCHEMA, "plan": plan.digest, "sha256": _digest(rows)}
    try:
        with published(path) as made:
            save_file(rows, made, metadata)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SessionError(f"{path}: the state cannot be written: {reason}") from None
    return path


def read(path: Path, plan: Plan, states: Mapping[str, Value], slots: int) -> Saved:
    """The rows of `slots` slots. Raises SessionError for a file that is damaged, of another plan or of
    another number of slots.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("schema") != SCHEMA:
                raise SessionError(f"{path}: is no saved state of this version of dsv4c")
            if metadata.get("plan") != plan.digest:
                raise SessionError(
                    f"{path}: was saved with another plan ({metadata.get('plan', '?')[:12]}) than this "
                    f"one ({plan.digest[:12]}); load the plan it was saved with"
                )
            rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        raise SessionError(f"{path}: cannot be read as a saved state: {error}") from None
    positions = [s.name for s in plan.state if s.name.endswith("position")]
    wanted = {name: [slots, _bytes(part[0]).numel()] for name, part in _parts(states)}
    wanted |= {f"{name}{REACHED}": wanted[f"{name}.0"] for name in positions}
    found = {name: list(value.shape) for name, value in rows.items()}
    if found != wanted or any(value.dtype != torch.uint8 for value in rows.values()):
        held = next((shape[0] for shape in found.values() if shape), 0)
        raise SessionError(
            f"{path}: holds {held} slots in {len(found)} arrays, expected {slots} in {len(wanted)}"
        )
    if metadata.get("sha256") != _digest(rows):
        raise SessionError(f"{path}: is damaged: its bytes are not those that were saved")
    saved = Saved(rows)
    limit = int(plan.deployment["max_context"])
    for name in positions:
        held, reached = saved.held(name), saved.reached(name)
        if any(not 0 <= h <= r <= limit for h, r in zip(held, reached, strict=True)):
            raise SessionError(f"{path}: is damaged: {name} is {held}, its slots have reached {reached}")
    return saved


def _parts(states: Mapping[str, Value]) -> Iterator[tuple[str, Tensor]]:
    """Every array of every state, by name, slots first."""
    for name, value in states.items():
        for i, part in enumerate(parts_of(value).values()):
            yield f"{name}.{i}", part


def _bytes(row: Tensor) -> Tensor:
    """A row's bytes, sharing its memory."""
    return row.reshape(-1).view(torch.uint8)


def _digest(rows: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(rows):
        found.update(name.encode())
        found.update(rows[name].contiguous().numpy().tobytes())
    return found.hexdigest()
