"""The GPU executor without a GPU: a hand-made plan whose kernels are Python functions on real addresses."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from dsv4c.config import load_config
from dsv4c.errors import CheckpointError, PlanError, SessionError
from dsv4c.numerics.codec import Quantized, quantize
from dsv4c.numerics.packing import pack, parse_packing
from dsv4c.plan.records import Argument, Bucket, KernelLaunch, Plan, Slot, StateSlot, load
from dsv4c.runtime import cuda, driver, residence
from dsv4c.runtime.cuda import CudaExecutor, CudaSession, Device, check_device, feeds_back
from dsv4c.runtime.residence import Resident
from dsv4c.types import BF16, F32, FP8_WEIGHT, I32, MXFP4, QuantType, TensorType, Type
from tests.codegen.lowered import gpu_plan

BATCH, VOCAB, CONTEXT, WIDTH = 2, 16, 24, 4
H200 = Device("NVIDIA H200", (9, 0), 13000, 140 << 30, 141 << 30)

# --- a model in four kernels: the next token is 3 * token + position + a weight, in the vocabulary ----------


def ints(address: int, count: int) -> Any:
    return (ctypes.c_int32 * count).from_address(address)


def floats(address: int, count: int) -> Any:
    return (ctypes.c_float * count).from_address(address)


def embed(tokens: int, streams: int) -> None:
    for b, token in enumerate(ints(tokens, BATCH)):
        for i in range(WIDTH):
            floats(streams, BATCH * WIDTH)[b * WIDTH + i] = float(token)


def score(streams: int, positions: int, weight: int, constant: int, logits: int) -> None:
    offset = floats(weight, 1)[0] + floats(constant, 1)[0]
    for b, position in enumerate(ints(positions, BATCH)):
        token = floats(streams, BATCH * WIDTH)[b * WIDTH]
        for v in range(VOCAB):
            chosen = v == int(3 * token + position + offset) % VOCAB
            floats(logits, BATCH * VOCAB)[b * VOCAB + v] = float(chosen)


def argmax(logits: int, following: int) -> None:
    for b in range(BATCH):
        row = floats(logits, BATCH * VOCAB)[b * VOCAB : (b + 1) * VOCAB]
        ints(following, BATCH)[b] = row.index(max(row))


def advance(positions: int, lengths: int) -> None:
    for b in range(BATCH):
        ints(positions, BATCH)[b] += ints(lengths, BATCH)[b]


KERNELS: dict[str, Callable[..., None]] = {f.__name__: f for f in (embed, score, argmax, advance)}
WEIGHT, CONSTANT = 5.0, 2.0


def expected_next(token: int, position: int) -> int:
    return int(3 * token + position + WEIGHT + CONSTANT) % VOCAB


VALUES: dict[str, Slot] = {
    "tokens": Slot(TensorType(I32, (BATCH,)), "input", 0),
    "lengths": Slot(TensorType(I32, (BATCH,)), "input", 256),
    "position": Slot(TensorType(I32, (BATCH,)), "state", 256),
    "bias": Slot(TensorType(F32, (1,)), "weights", 0),
    "shift": Slot(TensorType(F32, (1,)), "constants", 0),
    "streams": Slot(TensorType(F32, (BATCH, WIDTH)), "arena", 0),
    "out.logits": Slot(TensorType(F32, (BATCH, VOCAB)), "arena", 256),
    "out.next": Slot(TensorType(I32, (BATCH,)), "arena", 512),
}
CHAIN = (
    ("embed", "tokens", "streams"),
    ("score", "streams", "position", "bias", "shift", "out.logits"),
    ("argmax", "out.logits", "out.next"),
    ("advance", "position", "lengths"),
)


def launches(chain: Iterable[Sequence[str]] = CHAIN) -> tuple[KernelLaunch, ...]:
    made = []
    for i, (kernel, *operands) in enumerate(chain):
        arguments = tuple(
            Argument(VALUES[name].space, VALUES[name].offset, name, "data", VALUES[name].type.nbytes, "rw")
            for name in operands
        )
        made.append(
            KernelLaunch(
                name=f"{kernel}.{i}",
                op=kernel,
                nodes=(kernel, f"{kernel}_too"),
                scope="",
                kernel=f"hash-{kernel}",
                grid=(1, 1, 1),
                block=32,
                cluster=(1, 1, 1),
                shared=0,
                programmatic=i > 0,
                waits=True,
                arguments=arguments,
                after=(i - 1,) if i else (),
            )
        )
    return tuple(made)


def plan(**changes: Any) -> Plan:
    bucket = Bucket(
        graph="graph.decode.txt",
        tokens=BATCH,
        sequences=BATCH,
        values=VALUES,
        arena_bytes=768,
        input_bytes=512,
        inputs=("tokens", "lengths"),
        outputs={"logits": "out.logits", "next": "out.next", "streams": "streams"},
        launches=changes.pop("launches", launches()),
    )
    kernels = {f"hash-{name}": {"symbol": name, "cubin": f"kernels/{name}.cubin"} for name in KERNELS}
    made = Plan(
        name="toy",
        config={"vocab_size": VOCAB},
        config_digest="0",
        deployment={"target": "sm_90a", "recipe": "official", "batch": BATCH, "max_context": CONTEXT},
        recipe="official",
        pipeline="",
        buckets={"decode": bucket},
        state=(StateSlot("position", VALUES["position"].type, 256),),
        state_bytes=512,
        weights=(),
        weights_bytes=256,
        kernels=kernels,
        constants={"file": "constants.safetensors", "bytes": 256, "values": {"shift": SHIFT}},
        files={f"kernels/{name}.cubin": name.encode() for name in KERNELS}
        | {"graph.decode.txt": b"", "constants.safetensors": save({"shift": torch.tensor([CONSTANT])})},
    )
    return dataclasses.replace(made, **changes)


SHIFT = {"type": "f32[1]", "offset": 0}


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
    monkeypatch.setattr(cuda, "_stream", lambda: 0)


def session(compiled: Plan | None = None, *, poison: bool = False) -> CudaSession:
    compiled = compiled or plan()
    weights = torch.zeros(256, dtype=torch.uint8)
    weights[:4].view(torch.float32).fill_(WEIGHT)
    return CudaSession(compiled, CudaExecutor(compiled, weights, poison=poison, device="cpu"))


def rows(tokens: Sequence[int], start: int = 0) -> list[int]:
    return [expected_next(token, start + i) for i, token in enumerate(tokens)]


# --- steps --------------------------------------------------------------------------------------------------


def test_prefill_gives_a_row_per_token_and_leaves_the_other_sequence_alone() -> None:
    s = session()
    logits = s.prefill([3, 1, 4], sequence=1)
    assert logits.argmax(1).tolist() == rows([3, 1, 4])
    assert s.next_tokens == rows([3, 1, 4])
    assert s.positions == [0, 3]
    assert s.executor.states["position"].tolist() == [0, 3]
    assert s.streams[:, 0].tolist() == [3.0, 1.0, 4.0]


def test_decode_moves_the_sequences_that_got_a_token() -> None:
    s = session()
    s.prefill([3, 1], sequence=0)
    logits = s.decode([None, 7])
    assert logits[0].isnan().all()
    assert int(logits[1].argmax()) == expected_next(7, 0)
    logits = s.decode([9, 2])
    assert logits.argmax(1).tolist() == [expected_next(9, 2), expected_next(2, 1)]
    assert s.positions == s.executor.states["position"].tolist() == [3, 2]


@pytest.mark.parametrize("poison", [False, True])
def test_tokens_are_fed_back_without_the_host(poison: bool) -> None:
    s = session(poison=poison)
    s.prefill([3, 1], sequence=0)
    s.prefill([5], sequence=1)  # steps of one sequence must not lose the other's next token
    wanted, token = [], expected_next(1, 1)
    for i in range(4):
        token = expected_next(token, 2 + i)
        wanted.append(token)
    chosen = s.generate(4)
    assert chosen[:, 0].tolist() == wanted
    assert int(chosen[0, 1]) == expected_next(expected_next(5, 0), 1)
    assert s.positions == [6, 5]


def test_enqueue_continues_and_launches_one_graph_per_step() -> None:
    s, other = session(), session()
    for one in (s, other):
        one.prefill([3], sequence=0)
    s.generate(2, [0])
    FakeGraph.launched = 0
    s.enqueue(5, [0])
    assert FakeGraph.launched == 5
    assert torch.equal(s.generate(1, [0])[:, 0], other.generate(8, [0])[-1:, 0])


def test_a_plan_whose_tokens_are_read_late_copies_them_between_steps() -> None:
    late = (*CHAIN, ("embed", "tokens", "streams"))
    early, copied = session(), session(plan(launches=launches(late)))
    assert early.executor.feeds_back
    assert not copied.executor.feeds_back
    for one in (early, copied):
        one.prefill([3], sequence=0)
    assert torch.equal(early.generate(6, [0])[:, 0], copied.generate(6, [0])[:, 0])


def test_state_goes_to_a_file_and_back(tmp_path: Path) -> None:
    s = session()
    s.prefill([3, 1, 4], sequence=0)
    path = s.save_state(tmp_path / "state")
    first = s.decode([2, None])
    s.reset()
    assert s.positions == [0, 0]
    s.load_state(path)
    assert s.positions == [3, 0]
    again = s.decode([2, None])
    assert torch.equal(first[0], again[0])


def test_reset_of_one_sequence_keeps_the_others() -> None:
    s = session()
    s.prefill([3, 1], sequence=0)
    s.prefill([5, 2, 6], sequence=1)
    s.reset(1)
    assert s.positions == s.executor.states["position"].tolist() == [2, 0]


# --- refused requests change nothing ------------------------------------------------------------------------


def refused(s: CudaSession, request: Callable[[], object], message: str) -> None:
    before = s.executor.state.clone(), s.positions
    FakeGraph.launched = 0
    with pytest.raises(SessionError, match=message):
        request()
    assert FakeGraph.launched == 0
    assert torch.equal(s.executor.state, before[0])
    assert s.positions == before[1]
    s.decode([1, None])


def test_a_full_context_is_refused_before_the_step() -> None:
    s = session()
    s.prefill([1] * (CONTEXT - 2), sequence=0)
    refused(s, lambda: s.prefill([1, 2, 3]), "sequence 0 holds 22 tokens; 3 more exceed the context of 24")
    refused(s, lambda: s.enqueue(2, [0]), "sequence 0 holds 23 tokens; 2 more exceed")


def test_a_full_sequence_is_refused_and_the_others_go_on() -> None:
    s = session()
    s.prefill([1] * CONTEXT, sequence=0)
    before = s.executor.state.clone()
    for request in (lambda: s.decode([1, 2]), lambda: s.generate(1, [0]), lambda: s.prefill([1])):
        with pytest.raises(SessionError, match="sequence 0 holds 24 tokens; 1 more exceed the context of 24"):
            request()
    assert torch.equal(s.executor.state, before)
    assert s.decode([None, 7])[1].argmax() == expected_next(7, 0)
    assert s.positions == [CONTEXT, 1]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda s: s.decode([1, 2, 3]), "2 in all, got 3"),
        (lambda s: s.decode([None, None]), "no token for any sequence"),
        (lambda s: s.decode([VOCAB, None]), "out of range"),
        (lambda s: s.prefill([]), "the prompt is empty"),
        (lambda s: s.prefill([1], sequence=2), "no sequence 2"),
        (lambda s: s.enqueue(0), "a number of at least 1"),
        (lambda s: s.enqueue(1), "sequence 1 has no likeliest token yet"),
        (lambda s: s.generate(1, [5]), "no sequence 5"),
    ],
)
def test_wrong_requests_are_refused(request_: Callable[[CudaSession], object], message: str) -> None:
    s = session()
    s.prefill([1, 2], sequence=0)
    refused(s, lambda: request_(s), message)


def test_tokens_of_a_loaded_state_are_not_guessed(tmp_path: Path) -> None:
    s = session()
    s.prefill([3], sequence=0)
    s.load_state(s.save_state(tmp_path / "state"))
    refused(s, lambda: s.enqueue(1, [0]), "sequence 0 has no likeliest token yet")


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
        plan(weights_bytes=4 << 30).bind(tmp_path / "absent")


def here(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    """A machine on which `bind` may check, and must not allocate."""

    def allocated(size: int, device: object) -> Tensor:
        raise AssertionError(f"{size} bytes were allocated")

    monkeypatch.setattr(Device, "current", lambda: dataclasses.replace(H200, **facts))
    monkeypatch.setattr(cuda, "_block", allocated)


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
    with pytest.raises(CheckpointError, match=r"embed\.weight in .* is \[512, 256\], expected \[640, 256\]"):
        wider.bind(checkpoint)


def test_a_plan_for_no_gpu() -> None:
    with pytest.raises(PlanError, match="compiled for cpu, which is no GPU"):
        check_device(plan(deployment={"target": "cpu", "batch": 1, "max_context": 1}), H200)


def test_a_machine_without_a_gpu_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(driver, "version", lambda: 0)
    with pytest.raises(PlanError, match="no NVIDIA GPU"):
        plan().bind(tmp_path)


def test_an_altered_cubin_is_found_at_load(tmp_path: Path) -> None:
    folder = plan().save(tmp_path / "plan")
    assert load(folder).bucket("decode").launches == launches()
    cubin = folder / "kernels" / "score.cubin"
    cubin.write_bytes(cubin.read_bytes()[:-1] + b"E")
    with pytest.raises(PlanError, match=r"score\.cubin: was altered"):
        load(folder)


def test_a_pointer_outside_its_block_is_refused() -> None:
    first, *rest = launches()
    far = dataclasses.replace(first.arguments[1], offset=1 << 20)
    broken = dataclasses.replace(first, arguments=(first.arguments[0], far))
    with pytest.raises(PlanError, match=r"streams\.data lies at bytes 1048576 to .* of arena"):
        session(plan(launches=(broken, *rest)))


def test_a_launch_of_an_unknown_kernel_is_refused() -> None:
    broken = dataclasses.replace(launches()[0], kernel="gone")
    with pytest.raises(PlanError, match="names kernel gone"):
        session(plan(launches=(broken,)))


def test_a_plan_without_kernels_is_refused() -> None:
    with pytest.raises(PlanError, match="launches without kernels"):
        session(plan(launches=()))


def test_an_error_on_the_device_names_launch_and_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    s = session(poison=True)

    def fail(what: str) -> None:
        if "launch 2" in what:
            raise driver.DriverError(f"{what}: CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(driver, "synchronize", fail)
    with pytest.raises(driver.DriverError, match=r"launch 2, argmax\.2 \(nodes argmax, argmax_too\): CUDA_"):
        s.decode([1, None])
    with pytest.raises(SessionError, match="half-written"):
        s.decode([1, None])


FAILED = (
    r"one of the 4 launches of a step of plan toy failed: .*CUDA.*; bind with poison=True \(--poison\) to run"
)


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
    s.prefill([3], sequence=0)

    def fail(self: FakeGraph, stream: int) -> None:
        raise error

    monkeypatch.setattr(FakeGraph, "launch", fail)
    for request in (lambda: s.prefill([1]), lambda: s.decode([1, 2])):
        with pytest.raises(driver.DriverError, match=FAILED) as raised:
            request()
        assert "\n" not in str(raised.value)
        with pytest.raises(SessionError, match="half-written"):
            request()
        s.reset()


@pytest.mark.parametrize("look", [lambda s: s.wait(), lambda s: s.next_tokens], ids=["wait", "next_tokens"])
def test_an_error_that_comes_up_later_names_the_plan(
    look: Callable[[CudaSession], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    s = session()
    s.prefill([3], sequence=0)

    def fail(what: str) -> None:
        raise driver.DriverError(f"{what}: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access")

    monkeypatch.setattr(driver, "synchronize", fail)
    with pytest.raises(driver.DriverError, match=FAILED):
        look(s)
    with pytest.raises(SessionError, match="half-written"):
        s.decode([1, None])


def test_feedback_needs_every_reader_before_the_argmax() -> None:
    assert feeds_back(plan())
    unordered = [dataclasses.replace(launch, after=()) for launch in launches()]
    assert not feeds_back(plan(launches=tuple(unordered)))


# --- addresses ----------------------------------------------------------------------------------------------


def test_pointers_are_block_addresses_and_the_argmax_writes_the_tokens() -> None:
    executor = session().executor
    bound = executor._bound
    base = {name: block.data_ptr() for name, block in executor.blocks.items()}
    assert bound[0].arguments == (base["input"], base["arena"])
    assert bound[1].arguments[1:4] == (base["state"] + 256, base["weights"], base["constants"])
    assert bound[2].arguments == (base["arena"] + 256, base["input"])


def test_prefixes_of_the_step_are_graphs_too() -> None:
    executor = session().executor
    executor.inputs["tokens"].fill_(3)
    executor.graph_of(range(2)).launch(0)
    assert executor.outputs["logits"].argmax(1).tolist() == [expected_next(3, 0)] * BATCH
    assert executor.states["position"].tolist() == [0, 0]


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
