"""The layer schedule: which attention and which router every block has. Standard library only.

A config's `compress_ratios` and `num_hash_layers`, spelled out one block at a time for the model builder, the
weight inventory and the viewer to read alike.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from dsv4c.config import ModelConfig
from dsv4c.scope import LAYERS, MTP, Scope


class LayerKind(enum.Enum):
    """Attention by compress ratio: sliding window alone, or with sparsely or heavily compressed entries."""

    SWA = 0
    CSA = 4
    HCA = 128

    def __str__(self) -> str:
        return self.name


class RouterKind(enum.Enum):
    """How a layer picks its experts: by token id from a frozen table, or by biased scores."""

    HASH = "hash"
    DENSE = "dense"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class LayerPlan:
    """One transformer block. `prefix` is where its parameters, states and graph scope live."""

    index: int
    attention: LayerKind
    router: RouterKind
    prefix: str

    @property
    def ratio(self) -> int:
        """Tokens per compressed entry; 0 when nothing is compressed."""
        return self.attention.value

    @property
    def has_compressor(self) -> bool:
        return self.attention is not LayerKind.SWA

    @property
    def has_indexer(self) -> bool:
        return self.attention is LayerKind.CSA

    @property
    def overlaps(self) -> bool:
        """Does an entry pool the previous window too? Then its compressor projects to two halves."""
        return self.attention is LayerKind.CSA

    @property
    def label(self) -> str:
        """Equal labels build equal layers: `CSA+hash`."""
        return f"{self.attention}+{self.router}"


def layer_plans(config: ModelConfig) -> tuple[LayerPlan, ...]:
    """The main layers, first to last."""
    return tuple(
        LayerPlan(
            index=index,
            attention=LayerKind(ratio),
            router=RouterKind.HASH if index < config.num_hash_layers else RouterKind.DENSE,
            prefix=Scope(LAYERS, index).layer,
        )
        for index, ratio in enumerate(config.compress_ratios)
    )


def draft_plans(config: ModelConfig) -> tuple[LayerPlan, ...]:
    """The MTP blocks, or DSpark's stages: ordinary sliding-window layers with a scored router."""
    return tuple(
        LayerPlan(index, LayerKind.SWA, RouterKind.DENSE, prefix=Scope(MTP, index).layer)
        for index in range(config.mtp_layers + config.dspark_stages)
    )
