"""What a plan consists of: places of values, launches, and a program per bucket. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dsv4c.buckets import Bucket
from dsv4c.errors import PlanError
from dsv4c.types import Type

Space = Literal["arena", "state", "weights", "constants", "input", "exchange", "tiles"]

SPACES: tuple[Space, ...] = ("weights", "state", "constants", "arena", "input", "exchange", "tiles")
"""The blocks of bytes that a plan's values lie in. All buckets share them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value lives: `offset` bytes into a block."""

    type: Type
    space: Space
    offset: int


@dataclass(frozen=True, slots=True)
class Box:
    """What one copy of a kernel takes of an array: `box` elements of `element` bytes along each axis, of
    `sizes`, innermost first; `strides` are the bytes between neighbors on the others. Outside are zeros.
    `swizzled`: of rows of 128 bytes, eight 16-byte pieces each, piece p of row r comes to place p ^ r % 8.
    """

    element: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzled: bool = False

    @property
    def extent(self) -> int:
        """Bytes from the first element to the end of the last."""
        far = sum((n - 1) * stride for n, stride in zip(self.sizes[1:], self.strides, strict=True))
        return self.sizes[0] * self.element + far

    @property
    def sound(self) -> bool:
        """Whether it is one that drivers make tensor maps of."""
        rank, inner = len(self.sizes), sum(self.box[:1]) * self.element
        return (
            self.element in (1, 2, 8)
            and 1 <= rank <= 5
            and (len(self.strides), len(self.box)) == (rank - 1, rank)
            and all(n >= 1 for n in self.sizes)
            and all(n >= 16 and n % 16 == 0 for n in self.strides)
            and all(1 <= n <= 256 for n in self.box)
            and (inner == 128 if self.swizzled else inner % 16 == 0)
        )


@dataclass(frozen=True, slots=True)
class Argument:
    """One array of a launch: `offset` bytes into a block, where `component` of `value` has `nbytes` bytes.

    access: "r", "w", "rw", or "early" for what is read before a kernel waits, though no weight. With a `box`
    the kernel gets the address of a tensor map of the array, which the driver makes, in place of its own.
    """

    space: Space
    offset: int
    value: str
    component: str
    nbytes: int
    access: str
    box: Box | None = None


@dataclass(frozen=True, slots=True)
class BodyCode:
    """Code of the CPU target: an op by its text. `body` is the file that spells out a fused op in primitives,
    empty for a primitive. Arguments are the operands (access "r") and then the results, in order.
    """

    attributes: str  # as in the graph's text, without braces
    body: str = ""


@dataclass(frozen=True, slots=True)
class KernelCode:
    """Code of a GPU target: a kernel of the plan. Sizes in CTAs, threads and bytes; arguments in ABI order.

    `waits`: the kernel waits for its predecessors before it touches what they write; `programmatic`: it may
    therefore start while those that its launch is behind still run.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: int
    cluster: tuple[int, int, int]
    shared: int
    programmatic: bool
    waits: bool


@dataclass(frozen=True, slots=True)
class Launch:
    """Code on bytes of the plan's blocks, for the graph's `nodes`, whose ops `op` joins with " + ".

    `after` are the launches of the program that it is behind.
    """

    name: str
    op: str
    nodes: tuple[str, ...]
    scope: str
    code: BodyCode | KernelCode
    arguments: tuple[Argument, ...]
    after: tuple[int, ...]

    @property
    def exchanges(self) -> bool:
        """Does its kernel wait for other ranks?"""
        return any(a.space == "exchange" for a in self.arguments)

    @property
    def kernel(self) -> KernelCode:
        """Its kernel. Raises PlanError for a launch of the CPU target."""
        if not isinstance(self.code, KernelCode):
            raise PlanError(f"launch {self.name} has no kernel: its code is for the CPU; compile it again")
        return self.code


@dataclass(frozen=True)
class Program:
    """One bucket, or what is computed once from the weights (`bucket` None): launches in order."""

    graph: str  # file with the graph's text
    bucket: Bucket | None
    values: Mapping[str, Place]
    arena_bytes: int
    inputs: tuple[str, ...]
    outputs: Mapping[str, str]
    launches: tuple[Launch, ...]

    @property
    def shape(self) -> Bucket:
        """Its bucket. Raises TypeError for the program that runs at load."""
        if self.bucket is None:
            raise TypeError(f"{self.graph}: runs once at load, and is no bucket's")
        return self.bucket


@dataclass(frozen=True, slots=True)
class StateSlot:
    """A buffer kept between calls; its first dimension counts slots, one per sequence."""

    name: str
    type: Type
    offset: int
