"""Ranks: on the CPU they give what one gives; on GPUs, here without any, they are told where and when."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv4c
from dsv4c.errors import PlanError, SessionError
from dsv4c.exchange import (
    GIVEN_UP,
    INBOXES,
    MOST_EPOCHS,
    SITE_BITS,
    SITES,
    TILE_FLAGS,
    TILED,
    TILES,
    Layout,
    given_up,
    layout_of,
    tiled_region,
)
from dsv4c.models.synth import synthesize
from dsv4c.numerics.codec import dequantize, part_of, parts_of, quantize
from dsv4c.plan.check import check
from dsv4c.plan.folder import Plan
from dsv4c.runtime import cuda, driver, ranks
from dsv4c.runtime.session import Session
from dsv4c.types import FP8_WEIGHT, MXFP4, NVFP4
from tests.codegen.lowered import gpu_plan
from tests.drafting import Head, compile_for, in_rounds, learned, plainly, prompts
from tests.passes.test_shard import wide

HEADS: tuple[Head, ...] = ("mtp", "dspark")
PROMPT = [(7 * i * i + 3 * i + 1) % 512 for i in range(133)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(wide(), tmp_path_factory.mktemp("wide") / "weights", seed=3)


def answers(plan: Plan, checkpoint: Path) -> list[torch.Tensor]:
    """Prefill, verify, decode of two slots, steps by themselves."""
    session = plan.bind(checkpoint, poison=True)
    made = [session.prefill(PROMPT), session.verify({0: [5, 6, 7]})[0], session.prefill(PROMPT[:9], 1)]
    made += [session.decode([9, 11]), session.steps(4).float()]
    session.take_back(2)
    made.append(session.decode([3, None])[:1])
    session.copy_slot(0, 1)
    made.append(session.decode([None, 4])[1:])
    held = [
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for name in session.executor.states  # type: ignore[attr-defined]
        for other in session.executor.by_rank[1:]  # type: ignore[attr-defined]
        for a, b in zip(
            parts_of(session.executor.states[name]).values(),  # type: ignore[attr-defined]
            parts_of(other[name]).values(),
            strict=True,
        )
    ]
    assert all(held), "all ranks hold the same state"
    return made


def compiled(recipe: str, count: int) -> Plan:
    return dsv4c.compile(
        wide(), recipe=recipe, batch=2, max_context=160, chunk=64, ranks=count, certify=False
    )


def test_ranks_give_what_one_gives(checkpoint: Path) -> None:
    one = answers(compiled("fp32", 1), checkpoint)
    plan = compiled("fp32", 4)
    assert check(plan) == []
    for a, b in zip(one, answers(plan, checkpoint), strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-6


def test_ranks_in_the_releases_own_numerics(checkpoint: Path) -> None:
    """Selections may go apart where the sums of experts are rounded at other places; the first row has none
    before it.
    """
    one, two = (compiled("official", n).bind(checkpoint).prefill(PROMPT[:1]) for n in (1, 2))
    assert float((one - two).norm() / one.norm()) < 0.05


@pytest.mark.parametrize("head", HEADS)
def test_rounds_of_ranks_say_what_one_gives_in_steps(head: Head, tmp_path: Path) -> None:
    weights, held = learned(tmp_path / "weights", head), Counter[int]()
    options = {"recipe": "fp32", "batch": 1, "chunk": 64}
    one = compile_for(weights, **options)
    two = compile_for(weights, draft=head, draft_tokens=2, ranks=2, **options)
    assert check(two.plan) == []
    for prompt in prompts(2, 7):
        said, own = in_rounds(two, prompt, 12)
        assert said == plainly(one, prompt, 12)
        held += own
    assert {0, 2} <= held.keys()


@pytest.mark.parametrize("format", [FP8_WEIGHT, MXFP4, NVFP4], ids=str)
@pytest.mark.parametrize(("axis", "of"), [(0, 2), (1, 4), (2, 2)])
def test_parts_of_a_quantized_weight_are_parts_of_its_numbers(format: Any, axis: int, of: int) -> None:
    value = quantize(torch.randn(4, 256, 512, generator=torch.Generator().manual_seed(1)), format)
    whole = dequantize(value, torch.float32)
    for number in range(of):
        part = part_of(value, axis, of, number)
        assert torch.equal(dequantize(part, torch.float32), part_of(whole, axis, of, number))


def test_ranks_share_a_block_of_scales() -> None:
    value = quantize(torch.randn(256, 128, generator=torch.Generator().manual_seed(1)), FP8_WEIGHT)
    scales = [part_of(value, 0, 4, number).scale for number in range(4)]  # type: ignore[union-attr]
    assert [s.tolist() for s in scales] == [value.scale[i : i + 1].tolist() for i in (0, 0, 1, 1)]


def test_a_plan_says_which_part_of_each_weight(checkpoint: Path) -> None:
    plan = compiled("official", 2)
    cuts = {record["name"]: record.get("slice") for record in plan.weights}
    assert cuts["layers.1.attn.wq_a"] is None
    assert cuts["layers.1.attn.wq_b"] == [0, 2]
    assert cuts["layers.1.ffn.experts.w2"] == [2, 2]
    assert cuts["layers.1.ffn.gate"] is None
    with pytest.raises(PlanError, match="has 2 ranks, weights of 1 were given"):
        dsv4c.runtime.cpu.CpuExecutor(plan, torch.zeros(plan.blocks["weights"], dtype=torch.uint8))


def test_the_block_of_exchanges() -> None:
    layout = Layout(ranks=4, sites=20, region=512)
    assert layout_of(4, 20, layout.nbytes) == layout
    with pytest.raises(ValueError, match="no block for 20 exchanges of 4 ranks"):
        layout_of(4, 20, layout.nbytes + 8)
    assert given_up(GIVEN_UP | 3 << 28 | 77 << 10 | 19) == (19, 3, 77)


# --- GPUs, without any ---


class Library:
    def __init__(self, cubin: bytes, name: str) -> None:
        pass

    def kernel(self, symbol: str, **_: int) -> driver.Kernel:
        return driver.Kernel(symbol, symbol)


class Graph:
    """Notes which rank's launches run; computes nothing."""

    ran: list[int] = []  # noqa: RUF012  (what all graphs share)

    def __init__(self) -> None:
        self.count = 0

    def add(self, launch: driver.Launch, after: Sequence[driver.Edge] = (), *, name: str = "") -> int:
        self.count += 1
        return self.count

    def instantiate(self) -> None:
        pass

    def launch(self, stream: int) -> None:
        Graph.ran.append(self.count)


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> ranks.CudaRanks:
    def write(address: int, value: int, stream: int) -> None:
        ctypes.c_uint32.from_address(address).value = value

    monkeypatch.setattr(driver, "Library", Library)
    monkeypatch.setattr(driver, "Graph", Graph)
    monkeypatch.setattr(driver, "synchronize", lambda what: None)
    monkeypatch.setattr(driver, "current_context", lambda: 0)
    monkeypatch.setattr(driver, "reach", lambda context, what: None)
    monkeypatch.setattr(driver, "set_word", write)
    monkeypatch.setattr(cuda, "stream", lambda: 0)
    monkeypatch.setattr(ranks, "stream", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    plan = gpu_plan(wide_heads(), batch=1, verify=1, chunk=1, max_context=128, ranks=2, certify=False)
    return ranks.CudaRanks(plan, [torch.zeros(plan.blocks["weights"], dtype=torch.uint8)] * 2)


def wide_heads() -> Any:
    return replace(wide(), num_attention_heads=32)


def words(executor: ranks.CudaRanks, rank: int) -> list[int]:
    return executor.ranks[rank].blocks["exchange"][:64].view(torch.int32).tolist()


def test_every_rank_is_told_who_it_is_and_when(executor: ranks.CudaRanks) -> None:
    session = Session(executor.plan, executor)
    session.prefill([1])
    session.enqueue(2)
    assert [words(executor, rank)[:3] for rank in (0, 1)] == [[0, 3, 0], [1, 3, 0]]
    assert Graph.ran[-6:] == [len(executor.plan.program("decode").launches)] * 6  # both ranks, three steps
    inboxes = [words(executor, rank)[8:12] for rank in (0, 1)]
    assert inboxes[0] == inboxes[1]


def test_a_rank_that_gave_up_is_named_with_its_layer(executor: ranks.CudaRanks) -> None:
    session = Session(executor.plan, executor)
    session.prefill([1])
    status = executor.ranks[1].blocks["exchange"][8:12].view(torch.int32)
    status.fill_(GIVEN_UP - (1 << 32) | 1 << 10 | 2)  # step 1, its third exchange
    with pytest.raises(
        driver.LostRankError,
        match=re.escape("exchange 2, layers.1.attn.attn_out_sum: rank 1 (cpu) waited 1 s for rank 0"),
    ):
        session.wait()
    with pytest.raises(SessionError, match=re.escape("call reset()")):
        session.prefill([1])
    session.reset()
    assert words(executor, 1)[2] == 0
    session.prefill([1])
    session.wait()


def test_flags_come_again_only_where_nothing_is_left_of_them(executor: ranks.CudaRanks) -> None:
    executor.ranks[1].blocks["exchange"][-8:].fill_(7)
    executor._epoch = ranks.MOST_EPOCHS - 1
    Session(executor.plan, executor).prefill([1])
    assert words(executor, 0)[1] == 1
    assert not executor.ranks[1].blocks["exchange"][-8:].any()


@pytest.mark.parametrize(
    ("count", "names", "reach", "message"),
    [
        (1, "AA", True, "has 2 ranks, torch can use 1 GPUs of this machine"),
        (2, "AB", True, "its ranks would be on A and B"),
        (2, "AA", False, "GPU 0 cannot reach the memory of GPU 1"),
    ],
)
def test_gpus_that_do_not_do(
    executor: ranks.CudaRanks,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    names: str,
    reach: bool,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: reach)
    monkeypatch.setattr(
        cuda.Device, "number", lambda index: cuda.Device(names[index], (9, 0), 13000, 1 << 40, 1 << 40)
    )
    with pytest.raises(PlanError, match=message):
        ranks.check_devices(executor.plan)


def test_a_gpu_with_too_little_memory_is_named(
    executor: ranks.CudaRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [1 << 40, 1 << 20]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    monkeypatch.setattr(
        cuda.Device, "number", lambda index: cuda.Device("A", (9, 0), 13000, free[index], 1 << 40)
    )
    with pytest.raises(PlanError, match=r"GPU 1, A, has 0\.00 GiB free"):
        ranks.check_devices(executor.plan)
    free[1] = 1 << 40
    ranks.check_devices(executor.plan)


def test_several_processes_are_refused(executor: ranks.CudaRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PlanError, match=r"one of 2 processes .* as torchrun starts them"):
        ranks.check_devices(executor.plan)


def test_a_rank_alone_finds_the_words_that_it_waits_for(executor: ranks.CudaRanks) -> None:
    plan = executor.plan
    one = ranks.alone(plan, torch.zeros(plan.blocks["weights"], dtype=torch.uint8), 1)
    block, layout = one.blocks["exchange"], executor._layout
    assert block[:8].view(torch.int32).tolist() == [1, 1]  # the rank, the step
    assert not block[SITES : layout.inbox].any()
    assert block[INBOXES : INBOXES + 16].view(torch.int64).tolist() == [block.data_ptr() + layout.inbox] * 2
    words = block[layout.inbox :].view(torch.int32).reshape(-1, 2)
    assert words.unique(dim=0).tolist() == [[0, 1 << SITE_BITS]]
    with pytest.raises(PlanError, match="there is no rank 2 to time"):
        ranks.alone(plan, torch.zeros(256, dtype=torch.uint8), 2)


def test_tiles_have_a_block_of_their_own(executor: ranks.CudaRanks) -> None:
    region = TILE_FLAGS + 512
    plan = replace(executor.plan, blocks={**executor.plan.blocks, "tiles": 4 * 2 * region})
    two = ranks.CudaRanks(plan, [torch.zeros(plan.blocks["weights"], dtype=torch.uint8) for _ in range(2)])
    blocks = [rank.blocks["tiles"] for rank in two.ranks]
    header = two.ranks[0].blocks["exchange"][TILED : TILES + 16].view(torch.int64).tolist()
    assert header == [region, *(block.data_ptr() for block in blocks)]
    two._epoch = MOST_EPOCHS - 1
    blocks[1].fill_(1)
    two.begin("decode-1")
    flags = blocks[1].reshape(-1, region)[:, :TILE_FLAGS]
    assert not flags.any()
    assert blocks[1].reshape(-1, region)[:, TILE_FLAGS:].all()  # bytes need none
    one = ranks.alone(plan, torch.zeros(plan.blocks["weights"], dtype=torch.uint8), 1)
    first = one.blocks["tiles"].reshape(-1, region)[:, :TILE_FLAGS].contiguous().view(torch.int32)
    assert first.unique().tolist() == [1 << SITE_BITS]
    with pytest.raises(ValueError, match="no block for tiles of 2 ranks has 1001 bytes"):
        tiled_region(1001, 2)


def violations(plan: Plan, index: int, **changes: Any) -> list[str]:
    """What is said of a plan one of whose decode launches is another."""
    program = plan.program("decode")
    launches = list(program.launches)
    launches[index] = replace(launches[index], **changes)
    broken = replace(program, launches=tuple(launches))
    return [str(v) for v in check(replace(plan, buckets={**plan.buckets, "decode-1": broken}))]


def test_a_wait_that_could_be_forever_is_found(executor: ranks.CudaRanks) -> None:
    plan = executor.plan
    first, second, *_ = executor._sites["decode-1"]
    launches = plan.program("decode").launches
    assert "exchange" not in " ".join(str(v) for v in check(plan))
    swapped = violations(plan, first, arguments=launches[second].arguments)
    assert any("is exchange 0, at byte 256; gets the one at byte 272" in text for text in swapped)
    forked = violations(plan, second - 1, after=(first,))
    assert any("between two exchanges: expected" in text for text in forked)
    alone = replace(plan, deployment={**plan.deployment, "ranks": 1})
    assert any("exchanges values, in a plan for 1 rank" in str(v) for v in check(alone))
    blind = tuple(a for a in launches[first].arguments if a.value != "exchange")
    assert any("does not get the header" in text for text in violations(plan, first, arguments=blind))
