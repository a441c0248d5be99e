"""Models that draft, and whether rounds of theirs pay, by the weights that they read.

Steps of few rows wait for weights, so a call takes as long as its bytes. Every row reads experts of its own,
as in `dsv4c roofline --draft`, whose floors have what else moves, too: these are within some percent of them.
"""

from __future__ import annotations

from dataclasses import replace

from dsv4c.config import ModelConfig
from dsv4c.models.layout import Param, layout
from dsv4c.models.weights import stored_format
from dsv4c.types import DType, QuantType, TensorType

HELD = {
    "mtp": tuple(0.7**n for n in range(1, 8)),
    "dspark": (0.83, 0.64, 0.46, 0.32, 0.23),
}
"""In which share of rounds one draft holds, two, and so on: of MTP seven in ten behind one that holds, of
DSpark as was published of agents' traffic with DeepSeek-V4-Flash-0731."""


def with_dspark(config: ModelConfig) -> ModelConfig:
    """A model with DSpark's stages as the releases have them, behind its last three layers."""
    last = config.num_layers
    return replace(
        config,
        mtp_layers=0,
        dspark_stages=3,
        dspark_block_size=5,
        dspark_noise_token_id=config.vocab_size - 481,
        dspark_target_layers=tuple(range(last - 3, last)),
        dspark_markov_rank=256,
    )


def gain(config: ModelConfig, drafts: int, sequences: int) -> float:
    """How many times as fast as plain steps of so many sequences their rounds are, if drafts hold so often.

    The model must have something that drafts, and no fewer rows than `drafts`.
    """
    said = 1 + sum(HELD[config.drafts_with][:drafts])
    judged = _read(config, sequences * (1 + drafts))
    return said * _read(config, sequences) / (judged + _drafted(config, drafts, sequences))


def worth(config: ModelConfig, drafts: int) -> float:
    """From which probability to be said on a draft of one sequence is worth judging: the bytes that its row
    reads over those that a token takes in rounds of so many, if drafts hold so often.
    """
    step = _read(config, 1)
    return (_read(config, 2) - step) / step * gain(config, drafts, 1)


def _read(config: ModelConfig, rows: int) -> float:
    """Bytes of the model's weights that a call of so many rows reads."""
    return sum(_bytes(config, p, rows) for p in layout(config) if not p.place.draft)


def _drafted(config: ModelConfig, drafts: int, sequences: int) -> float:
    """Bytes of weights that drafting reads: of MTP all that it has and the head, once a draft; of DSpark once
    for a block of rows, but the part that biases a draft by the one before.
    """
    total = 0.0
    for param in layout(config):
        if not param.place.draft and param.name != "head":
            continue
        chained = not config.dspark_stages or "markov_head" in param.name
        rows = sequences if chained else sequences * config.dspark_block_size
        total += _bytes(config, param, rows) * (drafts if chained else 1)
    return total


def _bytes(config: ModelConfig, param: Param, rows: int) -> float:
    """Bytes that so many rows read of a parameter; rows of a table are next to none."""
    if param.name == "embed" or param.storage == "i64" or param.place.leaf == "markov_w1":
        return 0.0
    format = stored_format(config, "release", param)
    stored = TensorType(format, param.shape) if isinstance(format, DType) else QuantType(format, param.shape)
    share = rows * config.num_experts_per_tok / config.n_routed_experts if param.storage == "expert" else 1.0
    return stored.nbytes * min(share, 1.0)
