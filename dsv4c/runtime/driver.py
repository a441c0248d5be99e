"""The CUDA driver behind named errors: libraries of cubins, kernels, and explicit graphs of kernel nodes.

Needs cuda-bindings and a current context (torch makes one). A failing call raises DriverError with the call,
the object it concerned and CUDA's own words.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import cuda.bindings.driver as cuda

from dsv4c.errors import Dsv4cError
from dsv4c.plan.records import Box

PORTABLE_CLUSTER = 8


class DriverError(Dsv4cError):
    """A CUDA driver call failed."""


class LostRankError(DriverError):
    """A rank waited for another in vain."""


def call(what: str, result: tuple[Any, ...]) -> Any:
    """The values of a driver call's result tuple. Raises DriverError naming `what`."""
    status, *values = result
    if status != cuda.CUresult.CUDA_SUCCESS:
        _, name = cuda.cuGetErrorName(status)
        _, text = cuda.cuGetErrorString(status)
        raise DriverError(f"{what}: {_decode(name)}: {_decode(text)}")
    return values[0] if len(values) == 1 else tuple(values)


def _decode(text: bytes | str | None) -> str:
    return text.decode() if isinstance(text, bytes) else str(text)


@dataclass(frozen=True)
class Kernel:
    """An entry point of a loaded library."""

    symbol: str
    function: Any  # CUfunction


class Library:
    """A cubin in the driver. Keep it alive as long as its kernels run."""

    def __init__(self, cubin: bytes, name: str) -> None:
        """Load `cubin`; `name` is what errors call it."""
        self.name = name
        self._handle = call(f"load {name}", cuda.cuLibraryLoadData(cubin, None, None, 0, None, None, 0))

    def kernel(self, symbol: str, *, shared: int = 0, cluster: int = 1) -> Kernel:
        """The kernel `symbol`, allowed `shared` bytes of dynamic shared memory and clusters of `cluster`
        CTAs.
        """
        what = f"kernel {symbol} of {self.name}"
        kernel = call(what, cuda.cuLibraryGetKernel(self._handle, symbol.encode()))
        function = call(what, cuda.cuKernelGetFunction(kernel))
        attribute = cuda.CUfunction_attribute
        settings = {attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: shared}
        if cluster > PORTABLE_CLUSTER:
            settings[attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED] = 1
        for key, value in settings.items():
            call(f"{what}: {key.name} = {value}", cuda.cuFuncSetAttribute(function, key, value))
        return Kernel(symbol, function)

    def set_pointer(self, variable: str, address: int) -> None:
        """Let a global variable of 8 bytes hold `address`."""
        what = f"{variable} of {self.name}"
        place, size = call(what, cuda.cuLibraryGetGlobal(self._handle, variable.encode()))
        call(what, cuda.cuMemcpyHtoD(place, address.to_bytes(8, "little"), size))

    def close(self) -> None:
        """Unload the library."""
        call(f"unload {self.name}", cuda.cuLibraryUnload(self._handle))


def assemble(ptx: str, name: str) -> bytes:
    """A cubin of PTX for the current device, by the driver's own assembler; `name` is what errors call it."""
    what = f"assemble {name}"
    state = call(what, cuda.cuLinkCreate(0, [], []))
    data = ptx.encode() + b"\0"
    kind = cuda.CUjitInputType.CU_JIT_INPUT_PTX
    call(what, cuda.cuLinkAddData(state, kind, data, len(data), name.encode(), 0, [], []))
    address, size = call(what, cuda.cuLinkComplete(state))
    cubin = ctypes.string_at(address, size)
    call(what, cuda.cuLinkDestroy(state))
    return cubin


@dataclass(frozen=True)
class Launch:
    """A kernel with its launch shape and arguments: an int is an 8-byte pointer, bytes are themselves."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: int
    shared: int
    arguments: tuple[int | bytes, ...]
    cluster: tuple[int, int, int] = (1, 1, 1)


@dataclass(frozen=True)
class Edge:
    """A dependence on `node`; programmatic ones let the dependent start when `node` triggers."""

    node: Any  # CUgraphNode
    programmatic: bool = False


def _argument_table(arguments: Sequence[int | bytes]) -> tuple[Any, list[Any]]:
    blobs = [a.to_bytes(8, "little") if isinstance(a, int) else a for a in arguments]
    buffers = [ctypes.create_string_buffer(blob, len(blob)) for blob in blobs]
    table = (ctypes.c_void_p * len(buffers))(*[ctypes.addressof(b) for b in buffers])
    return table, buffers


class Graph:
    """A CUDA graph built node by node, then instantiated once and launched any number of times."""

    def __init__(self) -> None:
        self._graph = call("create graph", cuda.cuGraphCreate(0))
        self._executable: Any = None

    def add(self, launch: Launch, after: Sequence[Edge] = (), *, name: str = "") -> Any:
        """Add a kernel node behind `after`; the driver copies the arguments. Returns the node."""
        what = f"node {name or launch.kernel.symbol}"
        table, buffers = _argument_table(launch.arguments)
        params = cuda.CUDA_KERNEL_NODE_PARAMS()
        params.func = launch.kernel.function
        params.gridDimX, params.gridDimY, params.gridDimZ = launch.grid
        params.blockDimX, params.blockDimY, params.blockDimZ = launch.block, 1, 1
        params.sharedMemBytes = launch.shared
        params.kernelParams = ctypes.addressof(table)
        node = call(what, cuda.cuGraphAddKernelNode(self._graph, None, 0, params))
        del buffers
        if launch.cluster != (1, 1, 1):
            value = cuda.CUkernelNodeAttrValue()
            value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = launch.cluster
            attribute = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            call(
                f"{what}: cluster {launch.cluster}",
                cuda.cuGraphKernelNodeSetAttribute(node, attribute, value),
            )
        for edge in after:
            self._depend(node, edge, what)
        return node

    def _depend(self, node: Any, edge: Edge, what: str) -> None:
        data = cuda.CUgraphEdgeData()
        if edge.programmatic:
            data.from_port = 1  # CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC
            data.type = cuda.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
        call(f"{what}: edge", cuda.cuGraphAddDependencies(self._graph, [edge.node], [node], [data], 1))

    def instantiate(self) -> None:
        """Make the graph launchable."""
        self._executable = call("instantiate graph", cuda.cuGraphInstantiate(self._graph, 0))

    def launch(self, stream: int) -> None:
        """Enqueue one run on `stream` (a CUstream address)."""
        call("launch graph", cuda.cuGraphLaunch(self._executable, cuda.CUstream(stream)))

    def close(self) -> None:
        """Free the graph. It must not be running."""
        if self._executable is not None:
            call("destroy graph", cuda.cuGraphExecDestroy(self._executable))
        call("destroy graph", cuda.cuGraphDestroy(self._graph))


def tensor_map(address: int, box: Box) -> bytes:
    """What a kernel copies boxes of the array at `address` by: 128 bytes, to lie at a multiple of 64."""
    kinds = cuda.CUtensorMapDataType
    named = {1: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8, 2: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT16}
    named[8] = kinds.CU_TENSOR_MAP_DATA_TYPE_UINT64
    swizzle = cuda.CUtensorMapSwizzle
    result = cuda.cuTensorMapEncodeTiled(
        named[box.element],
        len(box.sizes),
        address,
        [cuda.cuuint64_t(n) for n in box.sizes],
        [cuda.cuuint64_t(n) for n in box.strides],
        [cuda.cuuint32_t(n) for n in box.box],
        [cuda.cuuint32_t(1)] * len(box.sizes),
        cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle.CU_TENSOR_MAP_SWIZZLE_128B if box.swizzled else swizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
        cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    made = call(f"a tensor map of {box}", result)
    return ctypes.string_at(int(made.getPtr()), 128)


def set_word(address: int, value: int, stream: int) -> None:
    """Enqueue a u32 to be written to `address`, of the current context's device."""
    call(f"write {value}", cuda.cuMemsetD32Async(cuda.CUdeviceptr(address), value, 1, cuda.CUstream(stream)))


def current_context() -> Any:
    """The current context (CUcontext)."""
    return call("ask for the context", cuda.cuCtxGetCurrent())


def reach(context: Any, what: str) -> None:
    """Let the current context's kernels reach the memory of another's. Raises DriverError naming `what`."""
    result = cuda.cuCtxEnablePeerAccess(context, 0)
    if result[0] != cuda.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED:
        call(what, result)


def exported(address: int) -> tuple[bytes, int]:
    """What lets other processes reach memory of the current context's device: a handle of its allocation, and
    where in it the address is.
    """
    start, _ = call("find an allocation", cuda.cuMemGetAddressRange(cuda.CUdeviceptr(address)))
    handle = call("let other processes reach memory", cuda.cuIpcGetMemHandle(cuda.CUdeviceptr(int(start))))
    return bytes(handle.reserved), address - int(start)


@cache
def imported(handle: bytes, what: str) -> int:
    """The address of another process's allocation in the current context, where it stays. Raises DriverError
    naming `what`.
    """
    given = cuda.CUipcMemHandle()
    given.reserved = handle
    lazily = cuda.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
    return int(call(what, cuda.cuIpcOpenMemHandle(given, lazily.value)))


def synchronize(what: str) -> None:
    """Wait for all work of the current context. Raises DriverError naming `what` if any of it failed."""
    call(what, cuda.cuCtxSynchronize())


def version() -> int:
    """The CUDA version that the driver speaks: 1000 * major + 10 * minor, or 0 if there is no driver."""
    try:
        answer = cuda.cuDriverGetVersion()
    except RuntimeError:  # the bindings find no libcuda
        return 0
    return int(call("ask for the driver's version", answer))
