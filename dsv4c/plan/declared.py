"""What a kernel's source says of its launches that a cubin does not: grid, cluster, dynamic shared memory.

Sources are generated; their last function is the host's, which launches the kernel once. Nothing runs here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

_HOST = re.compile(r"^def host\(\n(.*?)^\):\n(.*)\Z", re.MULTILINE | re.DOTALL)
_PARAMETER = re.compile(r"^    (\w+): (cute\.Pointer|Int32),$", re.MULTILINE)
_THREADS = re.compile(r"^THREADS = (\d{1,5})$", re.MULTILINE)
_SHARED = re.compile(r"\bptx\.shared\((.*?)\)")
_GRID = re.compile(r"^        grid=\[(.*?), (.*?), (.*?)\],$", re.MULTILINE)
_CLUSTER = re.compile(r"^        cluster=\[(\d{1,3}), (\d{1,3}), (\d{1,3})\],$", re.MULTILINE)
_BEHIND_WAIT = re.compile(r"^( +)ptx\.wait\(\)\n\1ptx\.launch_dependents\(\)$", re.MULTILINE)
_WHOLE = re.compile(r"\b(exchange\.(?:sum|join)_(?:rows|tiles))\(")  # gives, takes, meets, lets begin
_WHOLE_BEHIND_WAIT = re.compile(rf"^ +ptx\.wait\(\)\n +{_WHOLE.pattern}", re.MULTILINE)
_TERM = re.compile(r"(\d{1,9})|(\w+)(?: \* (\d{1,9}))?")


SIZES = frozenset({"parts", "rows", "sequences", "vectors"})
"""What the grid of a kernel may count: parts of its work, rows, sequences, or vectors to quantize."""


class SourceError(ValueError):
    """No generated source of a kernel."""


@dataclass(frozen=True, slots=True)
class Declared:
    """Launches of one kernel. parameters: pointers by name, in ABI order. sizes: names that the grid counts
    in. grid: in each direction a name, "" for none, and how many CTAs for each of it. late: its successor
    begins only when its own wait has returned, so that what it waited for is written by then. exchange: of a
    kernel that waits for other ranks, what is wrong with the order in which it does.
    """

    parameters: tuple[str, ...]
    sizes: tuple[str, ...]
    grid: tuple[tuple[str, int], ...]
    block: int
    cluster: tuple[int, int, int]
    shared: int
    waits: bool
    programmatic: bool
    late: bool
    exchange: str = ""

    def grid_of(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(count * sizes[name] if name else count for name, count in self.grid)


@lru_cache(maxsize=512)  # a plan is checked when it is read, when it is verified, and when it is bound
def read_source(text: str) -> Declared:
    """Raises SourceError for what was not generated."""
    host, threads = _HOST.search(text), _THREADS.findall(text)
    if host is None or len(threads) != 1:
        raise SourceError("has no host function, or not one number of threads")
    signature, body = host.groups()
    kinds = _PARAMETER.findall(signature)
    grid, cluster = _GRID.findall(body), _CLUSTER.findall(body)
    if len(grid) != 1 or len(cluster) > 1 or "        block=[THREADS, 1, 1],\n" not in body:
        raise SourceError("does not launch its kernel once, by literals")
    sizes = tuple(name for name, kind in kinds if kind == "Int32")
    shared = _SHARED.findall(text)
    if len(shared) > 1 or not all(size.isascii() and size.isdigit() and len(size) < 10 for size in shared):
        raise SourceError(f"allocates shared memory of {', '.join(shared)[:80]} bytes; expected one number")
    return Declared(
        parameters=tuple(name for name, kind in kinds if kind == "cute.Pointer"),
        sizes=sizes,
        grid=tuple(_term(term, sizes) for term in grid[0]),
        block=int(threads[0]),
        cluster=tuple(map(int, cluster[0])) if cluster else (1, 1, 1),  # type: ignore[arg-type]
        shared=int(shared[0]) if shared else 0,
        waits="ptx.wait()" in text,
        programmatic="        use_pdl=True,\n" in body,
        late=is_late(text),
        exchange=_exchange(text) if "exchange." in text else "",
    )


@lru_cache(maxsize=512)
def is_late(text: str) -> bool:
    """Does a kernel let its successor begin nowhere but right behind its wait?

    A grid's successor begins when every CTA has let it or has ended, and one that waits does neither sooner.
    """
    begins = text.count("ptx.launch_dependents()")
    return 0 < begins == len(_BEHIND_WAIT.findall(text))


def _exchange(text: str) -> str:
    """Waits for predecessors, gives words, gets words: in this order, else what is not."""
    if whole := _WHOLE.findall(text):
        name = whole[0]
        if len(_WHOLE_BEHIND_WAIT.findall(text)) != len(whole):
            return f"its kernel has {name} that is not right behind ptx.wait(): others may wait for it"
        if "ptx.launch_dependents()" in text:
            return f"its kernel has ptx.launch_dependents() beside {name}, which has its own"
        return ""
    steps = ("ptx.wait()", "exchange.push(", "exchange.receive")
    kernel = text[text.index("@cute.kernel") :] if "@cute.kernel" in text else ""
    places = [(kernel.find(step), kernel.rfind(step)) for step in steps]
    for (one, (_, last)), (two, (first, _)) in pairwise(zip(steps, places, strict=True)):
        if not 0 <= last < first:
            wrong = f"its kernel has {two.rstrip('(')} before {one.rstrip('(')}, or lacks one of them"
            return f"{wrong}: ranks could wait for each other forever"
    return ""


def _term(text: str, sizes: tuple[str, ...]) -> tuple[str, int]:
    match = _TERM.fullmatch(text)
    if match is None or (match[2] and match[2] not in set(sizes) & SIZES):
        raise SourceError(f"has a grid of {text[:80]!r}; expected a number, a size, or their product")
    return (match[2], int(match[3] or 1)) if match[2] else ("", int(match[1]))


def divides(cluster: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    """A grid is whole clusters."""
    return math.prod(cluster) > 0 and all(g % c == 0 for c, g in zip(cluster, grid, strict=True))
