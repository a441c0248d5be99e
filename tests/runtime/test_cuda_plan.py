"""The GPU executor without a GPU: a hand-made plan whose kernels are Python functions on real addresses."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4c.buckets import Bucket
from dsv4c.config import load_config
from dsv4c.errors import CheckpointError, PlanError, SessionError
from dsv4c.numerics.codec import Quantized, quantize
from dsv4c.numerics.forms import parse_packing
from dsv4c.numerics.packing import pack
from dsv4c.plan.folder import Plan
from dsv4c.plan.records import Argument, BodyCode, KernelCode, Launch, Place, Program, StateSlot
from dsv4c.runtime import bind as binding
from dsv4c.runtime import cuda, driver, residence
from dsv4c.runtime.cuda import CudaExecutor, Device, check_device, feeds_back
from dsv4c.runtime.residence import Resident
from dsv4c.runtime.session import Session
from dsv4c.types import BF16, F32, FP8_WEIGHT, I32, MXFP4, QuantType, TensorType, Type
from tests.codegen.lowered import gpu_plan

SLOTS, VOCAB, CONTEXT, WIDTH = 3, 16, 24, 4
BUCKETS = (Bucket("decode"), Bucket("decode", sequences=2), Bucket("verify", tokens=3))
H200 = Device("NVIDIA H200", (9, 0), 13000, 140 << 30, 141 << 30)

# --- a model in four kernels: the next token is 3 * token + position + a weight, in the vocabulary ----------


def ints(address: int, count: int) -> Any:
    return (ctypes.c_int32 * count).from_address(address)


def floats(address: int, count: int) -> Any:
    return (ctypes.c_float * count).from_address(address)


def kernels_of(bucket: Bucket) -> dict[str, Callable[..., None]]:
    """The model's kernels for so many rows, by symbol."""
    rows, per_sequence = bucket.rows, bucket.tokens

    def embed(tokens: int, streams: int) -> None:
        for r, token in enumerate(ints(tokens, rows)):
            for i in range(WIDTH):
                floats(streams, rows * WIDTH)[r * WIDTH + i] = float(token)

    def score(streams: int, positions: int, slots: int, weight: int, constant: int, logits: int) -> None:
        offset = floats(weight, 1)[0] + floats(constant, 1)[0]
        for r in range(rows):
            slot = ints(slots, bucket.sequences)[r // per_sequence]
            position = ints(positions, SLOTS)[slot] + r % per_sequence if slot >= 0 else 0
            token = floats(streams, rows * WIDTH)[r * WIDTH]
            for v in range(VOCAB):
                chosen = v == int(3 * token + position + offset) % VOCAB
                floats(logits, rows * VOCAB)[r * VOCAB + v] = float(chosen)

    def argmax(logits: int, following: int) -> None:
        for r in range(rows):
            row = floats(logits, rows * VOCAB)[r * VOCAB : (r + 1) * VOCAB]
            ints(following, rows)[r] = row.index(max(row))

    def advance(positions: int, lengths: int, slots: int) -> None:
        for slot, length in zip(ints(slots, bucket.sequences), ints(lengths, bucket.sequences), strict=True):
            if slot >= 0:
                ints(positions, SLOTS)[slot] += length

    return {f"{f.__name__}-{bucket.name}": f for f in (embed, score, argmax, advance)}


KERNELS = {symbol: kernel for bucket in BUCKETS for symbol, kernel in kernels_of(bucket).items()}
WEIGHT, CONSTANT = 5.0, 1.0


def expected_next(token: int, position: int) -> int:
    return int(3 * token + position + WEIGHT + CONSTANT) % VOCAB


def values_of(bucket: Bucket) -> dict[str, Place]:
    rows, sequences = bucket.rows, bucket.sequences
    return {
        "tokens": Place(TensorType(I32, (rows,)), "input", 0),
        "lengths": Place(TensorType(I32, (sequences,)), "input", 256),
        "slots": Place(TensorType(I32, (sequences,)), "input", 512),
        "position": Place(TensorType(I32, (SLOTS,)), "state", 256),
        "bias": Place(TensorType(F32, (1,)), "weights", 0),
        "shift": Place(TensorType(F32, (1,)), "constants", 0),
        "streams": Place(TensorType(F32, (rows, WIDTH)), "arena", 0),
        "out.logits": Place(TensorType(F32, (rows, VOCAB)), "arena", 256),
        "out.next": Place(TensorType(I32, (rows,)), "arena", 512),
    }


CHAIN = (
    ("embed", "tokens", "streams"),
    ("score", "streams", "position", "slots", "bias", "shift", "out.logits"),
    ("argmax", "out.logits", "out.next"),
    ("advance", "position", "lengths", "slots"),
)
TWO = BUCKETS[1]


def launches(chain: Iterable[Sequence[str]] = CHAIN, bucket: Bucket = TWO) -> tuple[Launch, ...]:
    made, values = [], values_of(bucket)
    for i, (kernel, *operands) in enumerate(chain):
        arguments = tuple(
            Argument(values[name].space, values[name].offset, name, "data", values[name].type.nbytes, "rw")
            for name in operands
        )
        made.append(
            Launch(
                name=f"{kernel}.{i}",
                op=kernel,
                nodes=(kernel, f"{kernel}_too"),
                scope="",
                code=KernelCode(
                    kernel=f"hash-{kernel}-{bucket.name}",
                    grid=(1, 1, 1),
                    block=32,
                    cluster=(1, 1, 1),
                    shared=0,
                    programmatic=i > 0,
                    waits=True,
                ),
                arguments=arguments,
                after=(i - 1,) if i else (),
            )
        )
    return tuple(made)


def program(bucket: Bucket = TWO, chain: Iterable[Sequence[str]] = CHAIN) -> Program:
    return Program(
        graph=f"graph.{bucket.name}.txt",
        bucket=bucket,
        values=values_of(bucket),
        arena_bytes=768,
        inputs=("tokens", "lengths", "slots"),
        outputs={"logits": "out.logits", "next": "out.next", "streams": "streams"},
        launches=launches(chain, bucket),
    )


SHIFT = Launch(  # of the first and only frequency: 1
    name="shift",
    op="rope_frequencies",
    nodes=("shift",),
    scope="",
    code=BodyCode(
        "theta=10000.0, dims=2, factor=1.0, original_max_position=64, beta_fast=32.0, beta_slow=1.0"
    ),
    arguments=(Argument("constants", 0, "shift", "data", 4, "w"),),
    after=(),
)
ONCE = Program(
    "graph.load.txt", None, {"shift": values_of(TWO)["shift"]}, 0, (), {"shift": "shift"}, (SHIFT,)
)
OWN = {"weights": 256, "state": 512, "constants": 256, "arena": 768, "input": 768}
BLOCKS = OWN | {"exchange": 0, "tiles": 0}


def plan(**changes: Any) -> Plan:
    """The toy's plan; `decode` are other launches of the step of two sequences."""
    programs = {bucket.name: program(bucket) for bucket in BUCKETS}
    if "decode" in changes:
        programs["decode-2"] = dataclasses.replace(programs["decode-2"], launches=changes.pop("decode"))
    kernels = {f"hash-{name}": {"symbol": name, "cubin": f"kernels/{name}.cubin"} for name in KERNELS}
    made = Plan(
        name="toy",
        config={"vocab_size": VOCAB},
        config_digest="0",
        deployment={
            "target": "sm_90a",
            "recipe": "official",
            "slots": SLOTS,
            "max_context": CONTEXT,
            "ranks": 1,
            "buckets": list(programs),
        },
        recipe="official",
        pipeline="",
        blocks=BLOCKS,
        buckets=programs,
        load=ONCE,
        state=(StateSlot("position", values_of(TWO)["position"].type, 256),),
        weights=(),
        kernels=kernels,
        files={f"kernels/{name}.cubin": name.encode() for name in KERNELS}
        | {p.graph: b"" for p in (*programs.values(), ONCE)},
    )
    return dataclasses.replace(made, **changes)


class FakeLibrary:
    def __init__(self, cubin: bytes, name: str) -> None:
        self.cubin = cubin

    def kernel(self, symbol: str, *, shared: int = 0, cluster: int = 1) -> driver.Kernel:
        assert self.cubin.decode() == symbol
        return driver.Kernel(symbol, KERNELS[symbol])


class FakeGraph:
    """Runs its nodes in the order in which they were added, counting launches."""

    launched = 0

    def __init__(self) -> None:
        self.nodes: list[driver.Launch] = []

    def add(self, launch: driver.Launch, after: Sequence[driver.Edge] = (), *, name: str = "") -> int:
        assert all(edge.node < len(self.nodes) for edge in after)
        self.nodes.append(launch)
        return len(self.nodes) - 1

    def instantiate(self) -> None:
        pass

    def launch(self, stream: int) -> None:
        FakeGraph.launched += 1
        for node in self.nodes:
            node.kernel.function(*node.arguments)


@pytest.fixture(autouse=True)
def _fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "Library", FakeLibrary)
    monkeypatch.setattr(driver, "Graph", FakeGraph)
    monkeypatch.setattr(driver, "synchronize", lambda what: None)
    monkeypatch.setattr(cuda, "stream", lambda: 0)


def session(compiled: Plan | None = None, *, poison: bool = False) -> Session:
    compiled = compiled or plan()
    weights = torch.zeros(256, dtype=torch.uint8)
    weights[:4].view(torch.float32).fill_(WEIGHT)
    return Session(compiled, CudaExecutor(compiled, weights, poison=poison, device="cpu"))


def rows(tokens: Sequence[int], start: int = 0) -> list[int]:
    return [expected_next(token, start + i) for i, token in enumerate(tokens)]


# --- steps --------------------------------------------------------------------------------------------------


def test_prefill_gives_a_row_per_token_and_leaves_the_other_slots_alone() -> None:
    s = session()
    logits = s.prefill([3, 1, 4, 1], slot=1)
    assert logits.argmax(1).tolist() == rows([3, 1, 4, 1])
    assert s.next_tokens == rows([3, 1, 4, 1])
    assert s.positions == [0, 4, 0]
    assert s.executor.states["position"].tolist() == [0, 4, 0]
    assert s.streams[:, 0].tolist() == [3.0, 1.0, 4.0, 1.0]


def test_decode_moves_the_slots_that_got_a_token() -> None:
    s = session()
    s.prefill([3, 1], slot=0)
    logits = s.decode([None, 7, None])
    assert logits[0].isnan().all()
    assert int(logits[1].argmax()) == expected_next(7, 0)
    logits = s.decode({1: 2, 0: 9})
    assert logits[:2].argmax(1).tolist() == [expected_next(9, 2), expected_next(2, 1)]
    assert s.positions == s.executor.states["position"].tolist() == [3, 2, 0]


def test_a_call_runs_the_smallest_bucket_that_fits_and_more_slots_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s, called = session(), []
    run = s.executor.run

    def watched(bucket: str, *arguments: Any) -> Any:
        called.append(bucket)
        return run(bucket, *arguments)

    monkeypatch.setattr(s.executor, "run", watched)
    s.prefill([1, 2, 3, 4])
    s.prefill([1, 2], slot=1)
    s.decode({2: 1})
    s.decode({2: 1, 0: 1})
    logits = s.decode([5, 6, 7])
    s.verify({1: [3, 3]})
    verify, one, two = "verify-1x3", "decode-1", "decode-2"
    assert called == [verify, one, verify, one, two, two, one, verify]
    assert logits.argmax(1).tolist() == [expected_next(5, 5), expected_next(6, 2), expected_next(7, 2)]
    assert s.next_tokens == rows([3, 3], 3)
    assert s.positions == s.executor.states["position"].tolist() == [6, 5, 3]


def test_taken_back_tokens_never_were() -> None:
    s = session()
    s.prefill([3, 1], slot=1)
    s.verify({1: [4, 1, 5]})
    s.take_back(2, slot=1)
    assert s.positions == s.executor.states["position"].tolist() == [0, 3, 0]
    assert int(s.decode({1: 9})[1].argmax()) == expected_next(9, 3)


@pytest.mark.parametrize("poison", [False, True])
def test_tokens_are_fed_back_without_the_host(poison: bool) -> None:
    s = session(poison=poison)
    s.prefill([3, 1], slot=0)
    s.prefill([5], slot=2)  # steps of one slot must not lose the other's next token
    wanted, token = [], expected_next(1, 1)
    for i in range(4):
        token = expected_next(token, 2 + i)
        wanted.append(token)
    chosen = s.steps(4, [2, 0])
    assert chosen[:, 0].tolist() == wanted
    assert chosen[:, 1].tolist() == [-1] * 4
    assert int(chosen[0, 2]) == expected_next(expected_next(5, 0), 1)
    assert s.positions == [6, 0, 5]


class Watch(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran.append(op._schema.name)
        return op(*args, **kwargs or {})


def test_portions_of_steps_bring_nothing_from_the_host_and_wait_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Indexing by a list, a tensor made of numbers and a number read are what makes torch wait for a GPU."""
    s = session()
    monkeypatch.setattr(s, "_look", lambda slots: None)  # which it does on a CPU alone
    s.prefill([3, 1], slot=0)
    s.prefill([5], slot=2)
    s.settle(s.say(2, {2: 4, 0: 7}))
    with Watch() as watch:
        said = [s.say(4, slots=[2, 0]) for _ in range(3)]
    waits = {"index", "index_put_", "_local_scalar_dense", "item", "nonzero", "lift_fresh", "_to_copy"}
    assert not {f"aten::{name}" for name in waits} & set(watch.ran)
    assert len(watch.ran) <= 3 * (4 * 4 + 28)
    assert [len(s.settle(one)[0]) for one in said] == [4, 4, 4]


def test_enqueue_continues_and_launches_one_graph_per_step() -> None:
    s, other = session(), session()
    for one in (s, other):
        one.prefill([3], slot=0)
    s.steps(2, [0])
    FakeGraph.launched = 0
    s.enqueue(5, [0])
    assert FakeGraph.launched == 5
    assert torch.equal(s.steps(1, [0])[:, 0], other.steps(8, [0])[-1:, 0])


def test_a_plan_whose_tokens_are_read_late_copies_them_between_steps() -> None:
    late = (*CHAIN, ("embed", "tokens", "streams"))
    early, copied = session(), session(plan(decode=launches(late)))
    assert early.executor.programs["decode-2"].feeds_back
    assert not copied.executor.programs["decode-2"].feeds_back
    for one in (early, copied):
        one.prefill([3], slot=0)
        one.prefill([4], slot=1)
    assert torch.equal(early.steps(6, [0, 1]), copied.steps(6, [0, 1]))


def test_state_goes_to_a_file_and_back(tmp_path: Path) -> None:
    s = session()
    s.prefill([3, 1, 4], slot=0)
    path = s.save_state(tmp_path / "state")
    first = s.decode({0: 2})
    s.reset()
    assert s.positions == [0, 0, 0]
    s.load_state(path)
    assert s.positions == [3, 0, 0]
    again = s.decode({0: 2})
    assert torch.equal(first[0], again[0])


def test_reset_of_one_slot_keeps_the_others() -> None:
    s = session()
    s.prefill([3, 1], slot=0)
    s.prefill([5, 2, 6], slot=1)
    s.reset(1)
    assert s.positions == s.executor.states["position"].tolist() == [2, 0, 0]


# --- refused requests change nothing ------------------------------------------------------------------------


def refused(s: Session, request: Callable[[], object], message: str) -> None:
    before = s.executor.blocks["state"].clone(), s.positions
    FakeGraph.launched = 0
    with pytest.raises(SessionError, match=message):
        request()
    assert FakeGraph.launched == 0
    assert torch.equal(s.executor.blocks["state"], before[0])
    assert s.positions == before[1]
    s.decode({0: 1})


def test_a_full_context_is_refused_before_the_step() -> None:
    s = session()
    s.prefill([1] * (CONTEXT - 2), slot=0)
    refused(s, lambda: s.prefill([1, 2, 3]), "slot 0 holds 22 tokens; 3 more exceed the context of 24")
    refused(s, lambda: s.enqueue(2, [0]), "slot 0 holds 23 tokens; 2 more exceed")


def test_a_full_slot_is_refused_and_the_others_go_on() -> None:
    s = session()
    s.prefill([1] * CONTEXT, slot=0)
    before = s.executor.blocks["state"].clone()
    for request in (
        lambda: s.decode({0: 1, 1: 2}),
        lambda: s.steps(1, [0]),
        lambda: s.prefill([1]),
        lambda: s.verify({0: [1]}),
    ):
        with pytest.raises(SessionError, match="slot 0 holds 24 tokens; 1 more exceed the context of 24"):
            request()
    assert torch.equal(s.executor.blocks["state"], before)
    assert s.decode({1: 7})[1].argmax() == expected_next(7, 0)
    assert s.positions == [CONTEXT, 1, 0]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda s: s.decode([1, 2]), "3 in all, got 2"),
        (lambda s: s.decode([None] * 3), "no token for any slot"),
        (lambda s: s.decode({}), "no token for any slot"),
        (lambda s: s.decode({3: 1}), "no slot 3"),
        (lambda s: s.decode([VOCAB, None, None]), "out of range"),
        (lambda s: s.prefill([]), "the prompt is empty"),
        (lambda s: s.prefill([1], slot=3), "no slot 3"),
        (lambda s: s.verify({}), "no tokens for any slot"),
        (
            lambda s: s.verify({0: [1] * 4}),
            "verify got 4 tokens of 1 slots; no bucket of the plan takes as many",
        ),
        (lambda s: s.verify({0: [1, 1], 1: [1]}), "verify got 2 tokens of 2 slots; no bucket"),
        (lambda s: s.take_back(3), "slot 0 holds 2 tokens, 3 cannot be taken back"),
        (lambda s: s.take_back(1, slot=7), "no slot 7"),
        (lambda s: s.enqueue(0, [0]), "a number of at least 1"),
        (lambda s: s.steps(-1, [0]), "a number of at least 1"),
        (lambda s: s.steps("2", [0]), "a number of at least 1"),
        (lambda s: s.enqueue(1), "slot 1 has no likeliest token yet"),
        (lambda s: s.enqueue(1, []), "expected at least one, each once"),
        (lambda s: s.enqueue(1, [0, 0]), "expected at least one, each once"),
        (lambda s: s.steps(1, [5]), "no slot 5"),
    ],
)
def test_wrong_requests_are_refused(request_: Callable[[Session], object], message: str) -> None:
    s = session()
    s.prefill([1, 2], slot=0)
    refused(s, lambda: request_(s), message)


def test_more_slots_than_any_bucket_takes_do_not_move_on_together() -> None:
    s = session()
    for slot in range(SLOTS):
        s.prefill([1, 2], slot=slot)
    refused(
        s, lambda: s.steps(1), r"no bucket of the plan decodes 3 slots together, only decode-1, .*--batch"
    )


def test_tokens_of_a_loaded_state_are_not_guessed(tmp_path: Path) -> None:
    s = session()
    s.prefill([3], slot=0)
    s.load_state(s.save_state(tmp_path / "state"))
    refused(s, lambda: s.enqueue(1, [0]), "slot 0 has no likeliest token yet")


def test_a_token_that_was_taken_back_is_followed_by_none() -> None:
    s = session()
    s.prefill([3, 1], slot=0)
    s.take_back(1)
    refused(s, lambda: s.enqueue(1, [0]), "slot 0 has no likeliest token yet")


# --- plans and machines that do not fit ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ({"capability": (10, 0)}, r"compiled for sm_90a, this GPU \(NVIDIA H200\) is sm_100"),
        ({"driver": 12080}, "needs a driver for CUDA 13.0 or newer, this machine's speaks CUDA 12.8"),
        ({"free": 1 << 20}, r"needs 1\.00 GiB of GPU memory \(weights 0\.00 GiB.* has 0\.00 GiB free of 141"),
    ],
)
def test_a_machine_that_cannot_run_the_plan(device: dict[str, Any], message: str) -> None:
    check_device(plan(), H200)
    with pytest.raises(PlanError, match=message):
        check_device(plan(), dataclasses.replace(H200, **device))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ({"capability": (10, 0)}, "compile with --target sm_100a, or run on a GPU of that architecture"),
        ({"driver": 12080}, "install driver 580 or newer"),
        ({"free": 1 << 30}, r"needs 5\.00 GiB of GPU memory \(weights 4\.00 GiB.* has 1\.00 GiB free of 141"),
    ],
)
def test_a_machine_is_refused_before_weights_are_opened(
    device: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch, **device)
    with pytest.raises(PlanError, match=message):
        plan(blocks={**BLOCKS, "weights": 4 << 30}).bind(tmp_path / "absent")


def here(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    """A machine on which `bind` may check, and must not allocate."""

    def allocated(size: int, **_: object) -> Tensor:
        raise AssertionError(f"{size} bytes were allocated")

    monkeypatch.setattr(Device, "current", lambda: dataclasses.replace(H200, **facts))
    monkeypatch.setattr(binding, "torch", SimpleNamespace(empty=allocated, uint8=torch.uint8))


def test_a_driver_that_torch_cannot_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(driver, "version", lambda: 12080)
    with pytest.raises(PlanError, match=r"a GPU plan needs a driver for CUDA 13\.0 .* speaks CUDA 12\.8"):
        plan().bind(tmp_path)


def test_weights_of_another_config_are_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch)
    compiled = gpu_plan(checkpoint)
    with pytest.raises(AssertionError, match="bytes were allocated"):
        compiled.bind(checkpoint)
    wider = gpu_plan(dataclasses.replace(load_config(checkpoint), vocab_size=640))
    with pytest.raises(CheckpointError, match="of another model: vocab_size is 512, the plan has 640"):
        wider.bind(checkpoint)


def test_a_plan_for_no_gpu() -> None:
    with pytest.raises(PlanError, match="compiled for cpu, which is no GPU"):
        check_device(plan(deployment={"target": "cpu", "slots": 1, "max_context": 1}), H200)


def test_a_machine_without_a_gpu_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(driver, "version", lambda: 0)
    with pytest.raises(PlanError, match="no NVIDIA GPU"):
        plan().bind(tmp_path)


def test_a_pointer_outside_its_block_is_refused() -> None:
    first, *rest = launches()
    far = dataclasses.replace(first.arguments[1], offset=1 << 20)
    broken = dataclasses.replace(first, arguments=(first.arguments[0], far))
    with pytest.raises(PlanError, match=r"streams\.data lies at bytes 1048576 to .* of arena"):
        session(plan(decode=(broken, *rest)))


def test_a_launch_of_an_unknown_kernel_is_refused() -> None:
    first = launches()[0]
    broken = dataclasses.replace(first, code=dataclasses.replace(first.kernel, kernel="gone"))
    with pytest.raises(PlanError, match="names kernel gone"):
        session(plan(decode=(broken,)))


def test_code_of_the_cpu_is_no_kernel() -> None:
    with pytest.raises(PlanError, match=r"launch shift has no kernel"):
        session(plan(decode=(SHIFT,)))


def test_an_error_on_the_device_names_launch_and_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    s = session(poison=True)

    def fail(what: str) -> None:
        if "launch 2" in what:
            raise driver.DriverError(f"{what}: CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(driver, "synchronize", fail)
    with pytest.raises(driver.DriverError, match=r"launch 2, argmax\.2 \(nodes argmax, argmax_too\): CUDA_"):
        s.decode({0: 1, 1: 1})
    with pytest.raises(SessionError, match="half-written"):
        s.decode({0: 1, 1: 1})


FAILED = r"a step of plan toy failed: .*CUDA.*; bind with poison=True \(--poison\) to run"


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ..."),
        driver.DriverError("launch graph: CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure"),
    ],
    ids=["torch", "driver"],
)
def test_an_error_of_a_step_without_poison_names_the_plan(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = session()
    s.prefill([3], slot=0)

    def fail(self: FakeGraph, stream: int) -> None:
        raise error

    monkeypatch.setattr(FakeGraph, "launch", fail)
    for request in (lambda: s.prefill([1]), lambda: s.decode({0: 1, 1: 2})):
        with pytest.raises(driver.DriverError, match=FAILED) as raised:
            request()
        assert "\n" not in str(raised.value)
        with pytest.raises(SessionError, match="half-written"):
            request()
        s.reset()


@pytest.mark.parametrize("look", [lambda s: s.wait(), lambda s: s.next_tokens], ids=["wait", "next_tokens"])
def test_an_error_that_comes_up_later_names_the_plan(
    look: Callable[[Session], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    s = session()
    s.prefill([3], slot=0)

    def fail(what: str) -> None:
        raise driver.DriverError(f"{what}: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access")

    monkeypatch.setattr(driver, "synchronize", fail)
    with pytest.raises(driver.DriverError, match=FAILED):
        look(s)
    with pytest.raises(SessionError, match="half-written"):
        s.decode({0: 1, 1: 1})


def test_feedback_needs_every_reader_before_the_argmax() -> None:
    step = program()
    assert feeds_back(step)
    unordered = tuple(dataclasses.replace(launch, after=()) for launch in launches())
    assert not feeds_back(dataclasses.replace(step, launches=unordered))


def test_steps_of_several_tokens_do_not_feed_back() -> None:
    assert not feeds_back(program(Bucket("verify", tokens=3)))


# --- addresses ----------------------------------------------------------------------------------------------


def test_pointers_are_block_addresses_and_the_argmax_writes_the_tokens() -> None:
    executor = session().executor
    bound = executor.programs["decode-2"]._bound
    base = {name: block.data_ptr() for name, block in executor.blocks.items()}
    assert bound[0].arguments == (base["input"], base["arena"])
    pointers = (base["state"] + 256, base["input"] + 512, base["weights"], base["constants"])
    assert bound[1].arguments[1:5] == pointers
    assert bound[2].arguments == (base["arena"] + 256, base["input"])


def test_buckets_share_blocks_and_kernels_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[bytes] = []

    class Counted(FakeLibrary):
        def __init__(self, cubin: bytes, name: str) -> None:
            super().__init__(cubin, name)
            loaded.append(cubin)

    monkeypatch.setattr(driver, "Library", Counted)
    again = dataclasses.replace(program(), bucket=Bucket("decode", sequences=4))
    executor = session(plan(buckets={**plan().buckets, "decode-4": again})).executor
    assert sorted(loaded) == sorted(name.encode() for name in KERNELS)
    two, four = (executor.programs[name]._bound for name in ("decode-2", "decode-4"))
    assert [a.arguments for a in two] == [b.arguments for b in four]


def test_prefixes_of_the_step_are_graphs_too() -> None:
    executor = session().executor
    step = executor.programs["decode-2"]
    step.inputs["tokens"].fill_(3)
    step.inputs["slots"].copy_(torch.tensor([2, 0]))
    step.graph_of(range(2)).launch(0)
    assert step.outputs["logits"].argmax(1).tolist() == [expected_next(3, 0)] * 2
    assert executor.states["position"].tolist() == [0] * SLOTS


# --- weights ------------------------------------------------------------------------------------------------


def resident(type_: Type, form: str, components: Sequence[tuple[str, int, int]]) -> Resident:
    return Resident.from_json(
        {
            "name": "w",
            "type": str(type_),
            "sources": {},
            "form": form,
            "components": [{"name": n, "offset": o, "nbytes": b} for n, o, b in components],
        }
    )


@pytest.mark.parametrize("slab", [1 << 12, 1 << 26])
@pytest.mark.parametrize("packing", ["fp8/1x1", "fp8/4x2"])
def test_a_matrix_is_packed_in_slabs_as_in_one(
    slab: int, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residence, "SLAB", slab)
    torch.manual_seed(1)
    value = quantize(torch.randn(200, 256), FP8_WEIGHT)
    packed = pack(parse_packing(packing), value.data)
    place = resident(
        QuantType(FP8_WEIGHT, (200, 256)),
        packing,
        [("data", 256, packed.numel()), ("scale", 0, value.scale.numel())],
    )
    block = torch.zeros(256 + packed.numel(), dtype=torch.uint8)
    place.store(block, value)
    assert torch.equal(block[256:], packed)
    assert torch.equal(block[: value.scale.numel()], value.scale.flatten())


def test_stacked_experts_carry_their_scales_in_the_units() -> None:
    torch.manual_seed(2)
    value = quantize(torch.randn(3, 32, 128), MXFP4)
    packed = pack(parse_packing("mxfp4/2x1"), value.data, value.scale)
    place = resident(QuantType(MXFP4, (3, 32, 128)), "mxfp4/2x1", [("data", 0, packed.numel())])
    block = torch.zeros(packed.numel(), dtype=torch.uint8)
    place.store(block, value)
    assert torch.equal(block, packed.flatten())


def test_plain_components_and_widened_gains() -> None:
    value = Quantized(
        MXFP4, torch.full((2, 16), 7, dtype=torch.uint8), torch.full((2, 1), 120, dtype=torch.uint8)
    )
    block = torch.zeros(128, dtype=torch.uint8)
    resident(QuantType(MXFP4, (2, 32)), "plain", [("data", 16, 32), ("scale", 64, 2)]).store(block, value)
    assert block[16:48].tolist() == [7] * 32
    assert block[64:66].tolist() == [120, 120]
    gain = torch.tensor([1.5, -2.25], dtype=torch.bfloat16)
    resident(TensorType(BF16, (2,)), "f32", [("data", 96, 8)]).store(block, gain)
    assert block[96:104].view(torch.float32).tolist() == [1.5, -2.25]


def test_places_of_another_size_are_refused() -> None:
    block = torch.zeros(4096, dtype=torch.uint8)
    gain = torch.zeros(4, dtype=torch.bfloat16)
    with pytest.raises(PlanError, match="16 bytes for a place of 8"):
        resident(TensorType(BF16, (4,)), "f32", [("data", 0, 8)]).store(block, gain)
    with pytest.raises(PlanError, match="has a place for scale"):
        resident(TensorType(BF16, (4,)), "plain", [("scale", 0, 8)]).store(block, gain)
    matrix = torch.zeros(16, 64, dtype=torch.bfloat16)
    with pytest.raises(PlanError, match=r"take 2048 bytes, their place has 4096"):
        resident(TensorType(BF16, (16, 64)), "bf16/1x1", [("data", 0, 4096)]).store(block, matrix)
    with pytest.raises(PlanError, match="cannot be read"):
        resident(TensorType(BF16, (4,)), "fp9/1x1", [])


# --- what it needs ------------------------------------------------------------------------------------------


def test_it_loads_without_the_compiler_and_its_packages() -> None:
    blocked = ("cutlass", "jinja2", "pydantic", "networkx", "typer", "rich", "graphviz")
    program = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        "import dsv4c.runtime.cuda\n"
        "loaded = [m for m in sys.modules if m.startswith(('dsv4c.ir', 'dsv4c.passes', 'dsv4c.codegen'))]\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
