"""Which key of a config a GPU target has no kernels for: whose change alone leaves nothing refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace

from dsv4c.codegen.lower import Folded, lower
from dsv4c.codegen.targets import target_of
from dsv4c.compiler.job import Job
from dsv4c.config import ModelConfig, load_config
from dsv4c.errors import BuildError, ConfigError, GraphError


def blamed(job: Job, error: BuildError) -> BuildError:
    """`error`, a refusal of the lowering, with the key at fault where there is one.

    Keys whose value the refusal names are tried with values that kernels like better, on a model with one
    layer of each kind. Where a built-in model is refused, too, it is the recipe or the deployment.
    """
    if not _lowers(replace(job, config=load_config("tiny"))):
        return error
    small = one_layer_of_each_kind(job.config)
    for name, value in _named(small, str(error)):
        for other in _rounder(value):
            try:
                config = replace(small, **{name: other})  # type: ignore[arg-type]
            except ConfigError:  # other keys would have to change, too
                continue
            if _lowers(replace(job, config=config)):
                return BuildError(
                    f"{error}\n  the cause is {name} of the config, {value}: with {other} there are kernels "
                    "for all layers; compile for cpu, or change the model"
                )
    return error


def one_layer_of_each_kind(config: ModelConfig) -> ModelConfig:
    """The model with every pair of attention and router once, and no MTP block."""
    hashed = tuple(dict.fromkeys(config.compress_ratios[: config.num_hash_layers]))
    dense = tuple(dict.fromkeys(config.compress_ratios[config.num_hash_layers :]))
    return replace(
        config,
        num_layers=len(hashed) + len(dense),
        num_hash_layers=len(hashed),
        compress_ratios=hashed + dense,
        mtp_layers=0,
    )


def _lowers(job: Job) -> bool:
    """Do all launches of a decode step find kernels, fused as they are?"""
    target = target_of(job.deployment.target)
    bucket = job.decode
    try:
        compiled = job.compiled(bucket)
        graph = compiled.graph
        folded = Folded(bucket, graph, compiled.context.prepack, lambda *_: graph)
        lower([folded], target.coder, target.bodies, frozenset(node.op.name for node in graph.nodes))
    except (BuildError, GraphError):
        return False
    return True


def _named(config: ModelConfig, text: str) -> Iterator[tuple[str, int]]:
    """Sizes of the model that the refusal names: first those of its reasons, which come last. Then those that
    are no power of two: unfolded, an op may be refused for what its parts do not name.
    """
    numbers = list(dict.fromkeys(map(int, reversed(re.findall(r"\d{1,12}", text)))))
    sizes = {f.name: getattr(config, f.name) for f in fields(config) if f.type == "int"}
    named = [(name, value) for name, value in sizes.items() if value > 1 and value in numbers]
    yield from sorted(named, key=lambda item: numbers.index(item[1]))
    yield from (item for item in sizes.items() if item not in named and item[1] & (item[1] - 1))


def _rounder(value: int) -> list[int]:
    """Powers of two and multiples of blocks around a size."""
    below, above = 1 << (value - 1).bit_length() - 1, 1 << value.bit_length()
    multiples = [-(-value // step) * step for step in (8, 128, 256)]
    return [n for n in dict.fromkeys((1 << (value - 1).bit_length(), *multiples, below, above)) if n != value]
