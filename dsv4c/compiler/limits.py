"""What stands between a config and a plan for a target: every obstacle, as the lowering itself tells them,
and whether the plan fits the card's memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

from dsv4c.arch import ARCHS
from dsv4c.codegen.lower import Lowered, Unfolded, lower, refusals
from dsv4c.codegen.targets import target_of
from dsv4c.compiler.job import Job
from dsv4c.compiler.request import Request
from dsv4c.config import ModelConfig, load_config
from dsv4c.errors import BuildError, ConfigError, GraphError
from dsv4c.ir.graph import Graph


@dataclass(frozen=True)
class Obstacle:
    """Why there is no plan: the `reasons` of the lowering, and the key of the config whose value is at fault,
    with one next to it that is not; no key where it is the recipe or the deployment, or several together.
    """

    reasons: tuple[str, ...]
    key: str = ""
    value: int = 0
    instead: int = 0

    def __str__(self) -> str:
        if self.key:
            return f"{self.key} is {self.value}, with {self.instead} there are kernels"
        more = f"; {len(self.reasons) - 1} more are refused" if len(self.reasons) > 1 else ""
        return f"{self.reasons[0].splitlines()[0]}{more}"


@dataclass(frozen=True)
class Memory:
    """Bytes of a plan by block, and how many the card has (None: the target is no card)."""

    blocks: Mapping[str, int]
    card: int | None

    @property
    def needed(self) -> int:
        return sum(self.blocks.values())

    @property
    def fits(self) -> bool:
        return self.card is None or self.needed <= self.card

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e9:,.3f}" for name, size in self.blocks.items() if size >= 5e5)
        whole = f"{self.needed / 1e9:,.3f} GB ({parts})"
        if self.card is None:
            return whole
        return f"{whole}: {'within' if self.fits else 'more than'} the {self.card / 1e9:,.1f} GB of the card"


def memory_of(target: str, blocks: Mapping[str, int]) -> Memory:
    """The memory of a plan with these blocks."""
    return Memory(blocks, ARCHS[target].memory if target in ARCHS else None)


@dataclass(frozen=True)
class Limits:
    """What `limits` found. unfolded: rules whose ops run part by part, as no kernel takes them whole."""

    job: Job
    obstacles: tuple[Obstacle, ...]
    unfolded: tuple[Unfolded, ...]
    memory: Memory


def limits(request: Request) -> Limits:
    """Every obstacle of a model on a target, together. Raises ConfigError for what is no config, and
    GraphError.
    """
    if not isinstance(request.model, ModelConfig):
        request = replace(request, model=load_config(request.model))
    found = []
    try:
        job = request.job()
    except ConfigError as error:  # a bucket that the target does not do; the others still tell of the model
        found.append(Obstacle((str(error),)))
        job = replace(request, batch=None, slots=None, verify=None, chunk=None, draft="off").job()
    found += obstacles(job)
    lowered = None
    if not found:
        try:
            lowered = _lowered(job)
        except BuildError as error:  # what only larger buckets are refused for
            found.append(Obstacle((str(error),)))
    if lowered is None:
        graph = job.compiled(job.decode, stop_after="quantize").graph
        return Limits(job, tuple(found), (), least_memory(job, graph))
    return Limits(job, tuple(found), lowered.unfolded, memory_of(job.deployment.target, lowered.blocks))


def refused(job: Job, error: BuildError) -> BuildError:
    """`error`, a refusal of the lowering, with every key at fault, where there are some."""
    keys = [f"\n  the cause is {o}" for o in obstacles(job) if o.key]
    if not keys:
        return error
    return BuildError(f"{error}{''.join(keys)}; compile for cpu, or change the model")


def obstacles(job: Job) -> list[Obstacle]:
    """What no kernel takes in a decode step, by the keys of the config that are at fault; of a model with one
    layer of each kind.

    Keys whose value a refusal names are tried with values that kernels like better, one after the other, as
    long as less is refused. What a built-in model is refused for, too, is the recipe's.
    """
    config = one_layer_of_each_kind(job.config)
    left = _refusals(replace(job, config=config))
    if not left:
        return []
    found = []
    if not _refusals(replace(job, config=load_config("tiny"))):
        while left and (step := _better(job, config, left)) is not None:
            name, other, less = step
            gone = tuple(dict.fromkeys(reason for node, reason in left.items() if node not in less))
            found.append(Obstacle(gone or tuple(left.values())[:1], name, getattr(config, name), other))
            config = replace(config, **{name: other})  # type: ignore[arg-type]
            left = less
    if left:
        found.append(Obstacle(tuple(dict.fromkeys(left.values()))))
    return found


Refused = dict[str, str]
"""Reasons by what is refused, the same whatever the sizes."""


def _better(job: Job, config: ModelConfig, left: Refused) -> tuple[str, int, Refused] | None:
    """A key, another value of it, and what is refused then: less than before."""
    for name, value in _named(config, "\n".join(left.values())):
        for other in _rounder(value):
            try:
                changed = replace(config, **{name: other})  # type: ignore[arg-type]
                less = _refusals(replace(job, config=changed))
            except (ConfigError, GraphError):  # other keys would have to change, too
                continue
            if len(less) < len(left):
                return name, other, less
    return None


def _refusals(job: Job) -> Refused:
    """What no code takes of a decode step that keeps nothing for drafts."""
    coder = target_of(job.deployment.target).coder
    main = tuple(bucket for bucket in job.deployment.buckets if bucket.is_main)
    job = replace(job, deployment=replace(job.deployment, buckets=main))
    decode = job.decode
    found = refusals(job.folded(decode, decode, job.compiled(decode), []), coder)
    return {f"{node.op.name} {node.place.path}": reason for node, reason in found.items()}


def _lowered(job: Job) -> Lowered:
    target, firsts = target_of(job.deployment.target), job.firsts()
    compiled = {first: job.compiled(first) for first in dict.fromkeys(firsts.values())}
    buckets = [job.folded(bucket, first, compiled[first], []) for bucket, first in firsts.items()]
    return lower(buckets, target.coder, target.bodies, ranks=job.deployment.ranks)


def least_memory(job: Job, graph: Graph) -> Memory:
    """What a plan takes at least whose decode step is this graph, before anything is lowered."""
    blocks = {
        "weights": sum(p.type.nbytes for p in graph.params),
        "state": sum(s.type.nbytes for s in graph.states),
    }
    return memory_of(job.deployment.target, blocks)


def one_layer_of_each_kind(config: ModelConfig) -> ModelConfig:
    """The model with every pair of attention and router once, and nothing that drafts."""
    hashed = tuple(dict.fromkeys(config.compress_ratios[: config.num_hash_layers]))
    dense = tuple(dict.fromkeys(config.compress_ratios[config.num_hash_layers :]))
    return replace(
        config,
        num_layers=len(hashed) + len(dense),
        num_hash_layers=len(hashed),
        compress_ratios=hashed + dense,
        mtp_layers=0,
        dspark_stages=0,
    )


def _named(config: ModelConfig, text: str) -> Iterator[tuple[str, int]]:
    """Sizes of the model that the refusals name: first those of their reasons, which come last. Then those
    that are no power of two: unfolded, an op may be refused for what its parts do not name.
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
