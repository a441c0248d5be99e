"""Where something stands in a model, by its name: the one place that knows how such names are built.

The scope of a node and the name of a parameter, state or result are spelled alike: `layers.3.attn.wq_a` is
`attn.wq_a` of the third layer of the block `layers`, `mtp.0` a draft block, `embed` outside of all layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

LAYERS, MTP = "layers", "mtp"
SUBLAYERS = ("attn", "ffn")

_LAYER = re.compile(rf"({LAYERS}|{MTP})\.(0|[1-9][0-9]*)(?:\.|$)")


@dataclass(frozen=True, slots=True)
class Scope:
    """`block` is "layers", "mtp", or "" outside of layers, where `number` is 0; `path` is the name inside the
    layer. `str` gives the name back.
    """

    block: str
    number: int
    path: str = ""

    @staticmethod
    @lru_cache(maxsize=1 << 16)
    def of(name: str) -> Scope:
        """What a name says."""
        match = _LAYER.match(name)
        return Scope(match[1], int(match[2]), name[match.end() :]) if match else Scope("", 0, name)

    @property
    def layer(self) -> str:
        """The layer's own name, `layers.3`; "" outside of layers."""
        return f"{self.block}.{self.number}" if self.block else ""

    @property
    def draft(self) -> bool:
        """Is it of a draft block? Checkpoints may lack those, and most plans do not need them."""
        return self.block == MTP

    @property
    def role(self) -> str:
        """The path inside its sublayer: `wq_a`, `indexer.wq_b`, `experts.w1`."""
        first, _, rest = self.path.partition(".")
        return rest if first in SUBLAYERS else self.path

    @property
    def leaf(self) -> str:
        """The last part of the path: `w1`."""
        return self.path.rpartition(".")[2]

    def __str__(self) -> str:
        return ".".join(filter(None, (self.layer, self.path)))
