"""Runs a plan on several NVIDIA GPUs of this machine: one thread of one process launches every rank's graph,
or a process for each its own (`dsv4c.runtime.processes`).

Ranks keep in step by themselves: their kernels wait for each other's words (`dsv4c.exchange`), so the host
may be as far ahead as it likes. A rank that gets no words gives up after the time limit, and says at which
exchange.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from dsv4c.errors import PlanError
from dsv4c.exchange import (
    EPOCH,
    INBOXES,
    LIMIT,
    MOST_EPOCHS,
    RANK,
    REGION,
    SITE_BITS,
    SITES,
    STATUS,
    STATUS_EPOCHS,
    TILE_FLAGS,
    TILED,
    TILES,
    TURNS,
    Layout,
    given_up,
    layout_of,
    tiled_region,
)
from dsv4c.numerics.codec import Value
from dsv4c.plan.folder import Plan
from dsv4c.runtime import driver
from dsv4c.runtime.cuda import POISON, BoundProgram, CudaExecutor, Device, check_device, stream
from dsv4c.runtime.executor import Watch, said_by, share
from dsv4c.runtime.processes import World, check_alike, devices_of
from dsv4c.threads import processes

T = TypeVar("T")

GUARD = 1.0  # seconds that a rank waits for another
APART = 10.0  # and for one of another process, whose host is as late as it likes
BLOCKS = ("exchange", "tiles")  # that others reach


def cuda_executor(
    plan: Plan,
    weights: Sequence[Tensor],
    *,
    poison: bool = False,
    limit: float | None = None,
    world: World | None = None,
) -> CudaExecutor | CudaRanks:
    """What runs a plan on GPUs; `weights` are the block of weights of every rank, on its device, or with
    `world` that of this process's rank. `limit`: seconds that a rank waits for another.
    """
    if plan.ranks == 1:
        (block,) = weights
        return CudaExecutor(plan, block, poison=poison)
    return CudaRanks(plan, weights, poison=poison, limit=limit, world=world)


def check_devices(plan: Plan, world: World | None = None) -> None:
    """Raise PlanError unless this machine's GPUs can run the plan: one for each rank, alike, with memory for
    it, and each within reach of the others. Of a `world` every process looks at its own.
    """
    if plan.ranks == 1:
        check_device(plan, Device.current())
        return
    if world is None and processes() > 1:
        raise PlanError(
            f"plan {plan.name}: this is one of {processes()} processes (WORLD_SIZE), as torchrun starts "
            f"them; here one process runs all {plan.ranks} ranks: start it once, without torchrun"
        )
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there < plan.ranks:
        raise PlanError(
            f"plan {plan.name} has {plan.ranks} ranks, torch can use {there} GPUs of this machine; run where "
            f"there are as many, or compile with --ranks {max(there, 1)}"
        )
    devices = {rank: Device.number(number) for rank, number in devices_of(plan, world).items()}
    for rank, device in devices.items():
        check_device(plan, replace(device, name=f"GPU {rank}, {device.name},"))
    check_alike(plan, [device.name for device in devices.values()])
    for a in devices_of(plan, world).values():
        for b in range(plan.ranks):
            if a != b and not torch.cuda.can_device_access_peer(a, b):
                raise PlanError(
                    f"plan {plan.name}: GPU {a} cannot reach the memory of GPU {b}, which ranks exchange "
                    "values through; choose GPUs that can (nvidia-smi topo -p2p r)"
                )


def sites_of(plan: Plan) -> dict[str, list[int]]:
    """The launches of every bucket that are exchanges, in order."""
    return {
        name: [i for i, launch in enumerate(program.launches) if launch.exchanges]
        for name, program in plan.buckets.items()
    }


def alone(plan: Plan, weights: Tensor, rank: int) -> CudaExecutor:
    """One rank of a plan by itself, on one GPU, for timing: what it waits for is there already, zeros, and
    what it gives others lands where nobody looks. It computes nothing of use. Raises PlanError for a rank
    that the plan has not.
    """
    if plan.ranks == 1 or not 0 <= rank < plan.ranks:
        raise PlanError(
            f"plan {plan.name} has {plan.ranks} ranks, from 0 on; there is no rank {rank} to time"
        )
    executor = CudaExecutor(plan, weights, device=weights.device)
    answer_at_once(plan, rank, executor.blocks["exchange"], executor.blocks["tiles"])
    return executor


def answer_at_once(plan: Plan, rank: int, exchange: Tensor, tiles: Tensor, word: int = 0) -> None:
    """Make a rank's blocks such that no exchange waits: all have number 0, and are there for all, each value
    of 4 bytes `word`. Whatever rank gives something gives it to these blocks.
    """
    layout = layout_of(plan.ranks, max(map(len, sites_of(plan).values())), plan.blocks["exchange"])
    inboxes = [exchange.data_ptr() + layout.inbox] * plan.ranks
    exchange.copy_(_header(plan, layout, rank, inboxes, [tiles.data_ptr()] * plan.ranks, GUARD))
    _word(exchange, EPOCH).fill_(1)
    exchange[SITES : layout.inbox].zero_()
    exchange[layout.inbox :].view(torch.int64).fill_(1 << SITE_BITS + 32 | word)
    tiles.view(torch.int32).fill_(word)
    for flags in _tile_flags(plan, tiles):
        flags.fill_(1 << SITE_BITS)


def words_of(plan: Plan, exchange: Tensor, rank: int) -> Tensor:
    """Those that a rank has given to such a block, i64, in their order."""
    layout = layout_of(plan.ranks, max(map(len, sites_of(plan).values())), plan.blocks["exchange"])
    at = layout.inbox + (TURNS // 2 * plan.ranks + rank) * layout.region
    return exchange[at : at + layout.region].view(torch.int64)


def as_words(values: Tensor) -> Tensor:
    """Values of 4 bytes, i32, as words of the exchange that such a block is in."""
    return values.long() & 0xFFFFFFFF | 1 << SITE_BITS + 32


def become(rank: int, exchange: Tensor) -> None:
    """Let the kernels on such a block be another rank's."""
    _word(exchange, RANK).fill_(rank)


class CudaRanks:
    """An `Executor` of a `CudaExecutor` for each rank, or with `world` for this process's: `ranks`, beginning
    with rank `first`. `limit`: seconds that a rank waits for another.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Sequence[Tensor],
        *,
        poison: bool = False,
        limit: float | None = None,
        world: World | None = None,
    ) -> None:
        own = plan.ranks if world is None else 1
        if len(weights) != own:
            raise PlanError(f"plan {plan.name} has {own} ranks here, weights of {len(weights)} were given")
        self.plan, self.poison, self.world = plan, poison, world
        self.limit = (GUARD if world is None else APART) if limit is None else limit
        self.first = 0 if world is None else world.rank
        self.devices = [block.device for block in weights]
        self.ranks: list[CudaExecutor] = []
        for block in weights:
            with torch.cuda.device(block.device):
                self.ranks.append(CudaExecutor(plan, block, poison=poison, device=block.device))
        self.blocks, self.states = self.ranks[0].blocks, self.ranks[0].states
        self._sites = sites_of(plan)
        count = max(map(len, self._sites.values()))
        self._layout = layout_of(plan.ranks, count, plan.blocks["exchange"])
        self._epoch = 0
        self._called: dict[int, str] = {}  # buckets by epoch, as a status has it
        self._names = self._told([str(device) for device in self.devices])
        self._connect()
        self.clear()

    def clear(self) -> None:
        self._synchronize("wait for the ranks")
        self._epoch = max(self._told([self._epoch]))  # of processes, whose steps may have failed apart
        for rank in self._each():
            rank.clear()
            _word(rank.blocks["exchange"], STATUS).zero_()
        self._meet("clear the ranks")

    def share(self, names: Iterable[str]) -> None:
        share([rank.states for rank in self.ranks], names)

    def run(
        self, bucket: str, inputs: Mapping[str, Tensor], watch: Watch | None = None
    ) -> Mapping[str, Tensor]:
        self._take(bucket, inputs)
        self.call(bucket, watch)
        return self.ranks[0].programs[bucket].outputs

    def value(self, bucket: str, name: str) -> Value:
        return self.ranks[0].value(bucket, name)

    def repeat(
        self, bucket: str, inputs: Mapping[str, Tensor], count: int, keep: Tensor | None
    ) -> Mapping[str, Tensor]:
        self._take(bucket, inputs)
        outputs = self.ranks[0].programs[bucket].outputs
        for i in range(count):
            for bound in self.bound(bucket) if i else ():
                bound.hand_on()
            self.call(bucket)
            if keep is not None:
                keep[i].copy_(said_by(outputs))
        return outputs

    def wait(self) -> None:
        """Raises DriverError naming the exchange, the layer and the rank that another waited for in vain."""
        self._synchronize("wait for the devices")
        for number, rank in enumerate(self.ranks, self.first):
            status = int(_word(rank.blocks["exchange"], STATUS)) & 0xFFFFFFFF
            if status:
                raise driver.LostRankError(self._lost(number, status))

    @contextmanager
    def naming(self) -> Iterator[None]:
        with self.ranks[0].naming():
            yield

    # --- all ranks together ---

    def bound(self, bucket: str) -> Iterator[BoundProgram]:
        """Every rank's program of a bucket, each with its device the current one."""
        return (rank.programs[bucket] for rank in self._each())

    def begin(self, bucket: str) -> None:
        """A new step: what was exchanged in any other is told from it."""
        self._epoch += 1
        if self._epoch == MOST_EPOCHS:  # flags would come again
            self._synchronize("wait for the ranks")
            for rank in self._each():
                rank.blocks["exchange"][self._layout.inbox :].zero_()
                for flags in _tile_flags(self.plan, rank.blocks["tiles"]):
                    flags.zero_()
            self._meet("clear what was exchanged")
            self._epoch = 1
        self._called[self._epoch % STATUS_EPOCHS] = bucket
        for rank in self._each():
            driver.set_word(rank.blocks["exchange"].data_ptr() + EPOCH, self._epoch, stream())

    def call(self, bucket: str, watch: Watch | None = None) -> None:
        """Enqueue one call on all ranks over what their input blocks hold. With `watch`, or where bound to
        poison, launch by launch.
        """
        self.begin(bucket)
        if watch is None and not self.poison:
            for bound in self.bound(bucket):
                bound.call()
            return
        for bound in self.bound(bucket) if self.poison else ():
            bound.blocks["arena"].fill_(POISON)
        for i, launch in enumerate(self.plan.buckets[bucket].launches):
            for bound in self.bound(bucket):
                bound.start(i)
            for bound in self.bound(bucket):
                bound.finish(i)
            if watch is not None:
                watch(launch)

    def _take(self, bucket: str, inputs: Mapping[str, Tensor]) -> None:
        """On all ranks before any is launched: inputs may lie on one that would then wait for the others."""
        for bound in self.bound(bucket):
            bound.take(inputs)

    def _each(self) -> Iterator[CudaExecutor]:
        for device, rank in zip(self.devices, self.ranks, strict=True):
            with torch.cuda.device(device):
                yield rank

    def _synchronize(self, what: str) -> None:
        for number, _ in enumerate(self._each(), self.first):
            driver.synchronize(f"{what}: rank {number}")

    def _meet(self, what: str) -> None:
        """Wait for all ranks, those of other processes too: none gives what another would not find."""
        self._synchronize(what)
        self._told([what])

    def _told(self, own: list[T]) -> list[T]:
        """Of every rank what its process has of it, in order."""
        return own if self.world is None else [each for part in self.world.gather(own) for each in part]

    def _connect(self) -> None:
        """Let every rank's kernels reach the others, and tell them where."""
        world = self.world
        addresses = self._addresses_here() if world is None else self._addresses_apart(world)
        inboxes = [block + self._layout.inbox for block in addresses["exchange"]]
        for number, rank in enumerate(self.ranks, self.first):
            header = _header(self.plan, self._layout, number, inboxes, addresses["tiles"], self.limit)
            rank.blocks["exchange"].copy_(header)
        self._meet("connect the ranks")

    def _addresses_here(self) -> dict[str, list[int]]:
        """Where all ranks have the blocks that others reach, in one process."""
        contexts = [driver.current_context() for _ in self._each()]
        for a, _ in enumerate(self._each()):
            for b, context in enumerate(contexts):
                if a != b:
                    driver.reach(context, f"let rank {a} reach the memory of rank {b}")
        return {name: [rank.blocks[name].data_ptr() for rank in self.ranks] for name in BLOCKS}

    def _addresses_apart(self, world: World) -> dict[str, list[int]]:
        """The same, as this process sees those of the others."""
        (own,) = self._each()
        blocks = {name: own.blocks[name].data_ptr() for name in BLOCKS}
        exported = world.together(lambda: {n: driver.exported(block) for n, block in blocks.items()})
        told = world.gather(exported)

        def addresses(name: str) -> list[int]:
            found = []
            for peer, theirs in enumerate(told):
                what = f"let rank {world.rank} reach the memory of rank {peer}"
                handle, offset = theirs[name]
                apart = peer != world.rank
                found.append(driver.imported(handle, what) + offset if apart else blocks[name])
            return found

        return world.together(lambda: {name: addresses(name) for name in BLOCKS})

    def _lost(self, number: int, status: int) -> str:
        site, peer, epoch = given_up(status)
        bucket = self._called.get(epoch, "")
        where = f"exchange {site}"
        if bucket and site < len(self._sites[bucket]):
            launch = self.plan.buckets[bucket].launches[self._sites[bucket][site]]
            where = f"exchange {site}, {launch.name}"
        return (
            f"plan {self.plan.name}: {bucket or 'a step'}: {where}: rank {number} ({self._names[number]}) "
            f"waited {self.limit:g} s for rank {peer} ({self._names[peer]}) in vain; see whether that GPU "
            "still runs, then call reset()"
        )


def _header(
    plan: Plan, layout: Layout, rank: int, inboxes: Sequence[int], tiles: Sequence[int], limit: float
) -> Tensor:
    """The block of a rank before its first step, on the host. `inboxes` and `tiles` are addresses."""
    block = torch.zeros(-(-plan.blocks["exchange"] // 256) * 256, dtype=torch.uint8)
    _word(block, RANK).fill_(rank)
    words = {LIMIT: int(limit * 1e9), REGION: layout.region}
    words |= {TILED: tiled_region(plan.blocks["tiles"], plan.ranks)}
    for first, addresses in ((INBOXES, inboxes), (TILES, tiles)):
        words |= {first + 8 * peer: address for peer, address in enumerate(addresses)}
    for at, value in words.items():
        block[at : at + 8].view(torch.int64).fill_(value)
    for site in range(layout.sites):
        _word(block, layout.site(site)).fill_(site)
    return block


def _tile_flags(plan: Plan, tiles: Tensor) -> Iterator[Tensor]:
    """The flags of every region of a block of tiles, i32."""
    region = tiled_region(plan.blocks["tiles"], plan.ranks)
    for at in range(0, region * TURNS * plan.ranks, region or 1):
        yield tiles[at : at + TILE_FLAGS].view(torch.int32)


def _word(block: Tensor, at: int) -> Tensor:
    """The 32 bits at a byte of a block, as one number."""
    return block[at : at + 4].view(torch.int32)[0]
