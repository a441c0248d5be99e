"""Kernel sources to cubins, without a GPU: worker processes compile, a content-addressed store remembers.

A source is a Python module with one `@cute.jit` function `host` whose parameters are `cute.Pointer`, `Int32`
and a last `stream`; `ELEMENTS` names pointer element types (Uint8 unless named). An entry's key covers the
source, `codegen/lib`, the package that contributed it, the toolchain and the target; damaged ones are rebuilt
(`dsv4c.cache`).

Compilers run neither in the caller's folder nor with its environment: no module is found there, and no
variable changes the code.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import dsv4c.numerics.forms
import dsv4c.types
from dsv4c.arch import ARCHS
from dsv4c.cache import Store
from dsv4c.errors import BuildError
from dsv4c.plan.cubin import CubinError, Resources, read_cubin
from dsv4c.publish import scratch_folder
from dsv4c.threads import cores

TARGETS = tuple(ARCHS)
LIB, MEANINGS = Path(__file__).parent / "lib", Path(__file__).parent / "meanings"
_COMPILER = "nvidia-cutlass-dsl"
VERSION = 3  # of a kernel's entry in the store; part of every key


@dataclass(frozen=True)
class Package:
    """An installed package that contributes kernels by `module`. Their texts may import its modules, which
    are found in `folder`; `digest` covers the files of these.
    """

    name: str
    version: str
    module: str
    folder: str
    digest: str

    def __str__(self) -> str:
        return f"package {self.name} {self.version} ({self.module})"


@dataclass(frozen=True)
class Source:
    """One kernel to compile: its entry point's name, the text of its module, and who contributed it, if it is
    not dsv4c's.
    """

    symbol: str
    text: str
    package: Package | None = None

    @property
    def name(self) -> str:
        """What launches call it, and its file in a plan: the same wherever this text is generated."""
        return _name(self.symbol, self.text)


@cache
def _name(symbol: str, text: str) -> str:
    return f"{symbol.removesuffix('_0')}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Built:
    """A compiled kernel. `cached` says that it came from the store."""

    symbol: str
    target: str
    key: str
    cubin: bytes
    ptx: str
    resources: Resources
    cached: bool


Progress = Callable[[int, int, Built], None]  # (done, total, the kernel that just became ready)


def build(
    sources: Sequence[Source],
    target: str,
    store: Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Built]:
    """Compile `sources` for `target`, in their order, taking from the folder `store` what it has.

    `workers` processes compile (default: one per core that this process may use). Raises BuildError naming
    every kernel that failed.
    """
    if target not in TARGETS:
        raise BuildError(f"cannot compile for {target!r}: targets are {', '.join(TARGETS)}")
    kept = Store(store)
    keys = [source_key(source, target) for source in sources]
    ready: dict[str, Built] = {}
    jobs: queue.SimpleQueue[tuple[str, Source]] = queue.SimpleQueue()
    todo = 0
    for key, source in dict(zip(keys, sources, strict=True)).items():
        entry = _kept(kept, key, target)
        if entry is None:
            jobs.put((key, source))
            todo += 1
        else:
            _settle(ready, entry, len(set(keys)), progress)
    failures = _compile_all(
        jobs, min(todo, workers or cores()), target, kept, ready, len(set(keys)), progress
    )
    if failures:
        raise BuildError("\n".join(failures))
    return [ready[key] for key in keys]


def source_key(source: Source, target: str) -> str:
    """Content address of a kernel: everything that decides its cubin."""
    parts = [str(VERSION), source.symbol, source.text, target, toolchain(), lib_digest()]
    if "from dsv4c.codegen.meanings import " in source.text:
        parts.append(meanings_digest())
    if source.package is not None:
        parts.append(source.package.digest)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@cache
def toolchain() -> str:
    """The compiler's identity, without importing it."""
    return f"{_COMPILER} {importlib.metadata.version(_COMPILER)}"


@cache
def lib_digest() -> str:
    """Digest of the device library and what it imports, read once per process."""
    return _digest([*sorted(LIB.glob("*.py")), Path(dsv4c.numerics.forms.__file__)])


@cache
def meanings_digest() -> str:
    """Digest of the device meanings of primitives and what they import besides, read once per process."""
    return _digest([*sorted(MEANINGS.glob("*.py")), Path(dsv4c.types.__file__)])


def _digest(files: Sequence[Path]) -> str:
    return hashlib.sha256(b"\0".join(f.name.encode() + b"\0" + f.read_bytes() for f in files)).hexdigest()


def _settle(ready: dict[str, Built], built: Built, total: int, progress: Progress | None) -> None:
    ready[built.key] = built
    if progress:
        progress(len(ready), total, built)


# The store --------------------------------------------------------------------------------------------------


def _keep(store: Store, built: Built) -> None:
    """A header line, the cubin and the PTX."""
    header = {"symbol": built.symbol, "cubin": len(built.cubin), "resources": asdict(built.resources)}
    store.put(built.key, json.dumps(header).encode() + b"\n" + built.cubin + built.ptx.encode())


def _kept(store: Store, key: str, target: str) -> Built | None:
    """The kernel with that key, or None when the store has none."""
    content = store.get(key)
    if content is None:
        return None
    line, _, blob = content.partition(b"\n")
    header = json.loads(line)
    size, resources = header["cubin"], Resources(**header["resources"])
    return Built(header["symbol"], target, key, blob[:size], blob[size:].decode(), resources, cached=True)


# Worker processes -------------------------------------------------------------------------------------------


def _compile_all(
    jobs: queue.SimpleQueue[tuple[str, Source]],
    workers: int,
    target: str,
    store: Store,
    ready: dict[str, Built],
    total: int,
    progress: Progress | None,
) -> list[str]:
    """Drain `jobs` with `workers` processes into `store` and `ready`; the messages of those that failed."""
    failures: list[str] = []
    crashes: list[BaseException] = []
    running: list[_Worker] = []
    lock = threading.Lock()

    def drain() -> None:
        try:
            with _Worker() as worker:
                running.append(worker)
                while not crashes:
                    try:
                        key, source = jobs.get_nowait()
                    except queue.Empty:
                        return
                    reply = worker.compile(source, target)
                    if "error" in reply:
                        failures.append(f"{source.symbol} does not compile for {target}: {reply['error']}")
                        continue
                    cubin = bytes.fromhex(reply["cubin"])
                    resources = read_resources(cubin, source.symbol)
                    built = Built(source.symbol, target, key, cubin, reply["ptx"], resources, cached=False)
                    _keep(store, built)
                    with lock:
                        _settle(ready, built, total, progress)
        except BaseException as error:  # handed to the caller's thread below
            crashes.append(error)

    with ThreadPoolExecutor(max(workers, 1), "build") as pool:
        try:
            for drained in [pool.submit(drain) for _ in range(workers)]:
                drained.result()
        except BaseException as interrupt:  # compilers would work on, and this process would wait for them
            crashes.insert(0, interrupt)
            for worker in running:
                worker.kill()
    if crashes:
        raise crashes[0]
    return sorted(failures)


_START = """import site, sys
root, *sites = sys.argv[1:]
sys.path[:0] = [root] if root not in sys.path else []
for folder in sites:
    if folder not in sys.path:
        site.addsitedir(folder)
from dsv4c.codegen.build import serve
serve()
"""
_ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "USER")


class _Worker:
    """A process that compiles one source at a time: a request and a reply are a JSON line each.

    A fresh interpreter, not a fork: the caller may hold threads (a progress bar) or a CUDA context. It finds
    modules where this package and the compiler are installed, and nowhere else; it has a folder of its own to
    work in, and of the environment what says where programs and libraries are. The compiler's own cache stays
    out of it: its place in /tmp can be guessed.
    """

    def __enter__(self) -> _Worker:
        if not os.path.isabs(sys.executable or ""):
            raise BuildError(f"the Python interpreter is {sys.executable!r}; start it by its absolute path")
        root = str(Path(__file__).resolve().parents[2])
        installed = importlib.metadata.distribution(_COMPILER).locate_file("")
        self._exit = ExitStack()
        folder = str(self._exit.enter_context(scratch_folder(Path(tempfile.gettempdir()))))
        self._errors = self._exit.enter_context(tempfile.TemporaryFile())
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _START, root, str(installed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=folder,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
            | {"NO_COLOR": "1", "TMPDIR": folder, "CUTE_DSL_CACHE_DIR": folder}
            | {"CUTE_DSL_DISABLE_FILE_CACHING": "1"},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        return self

    def __exit__(self, *_: object) -> None:
        with self._exit:
            with contextlib.suppress(BrokenPipeError):  # it may be dead
                self._requests.close()
            self._process.wait()
            self._replies.close()

    def kill(self) -> None:
        """End the process; whoever waits for its reply gets a BuildError."""
        self._process.kill()

    def compile(self, source: Source, target: str) -> dict[str, Any]:
        try:
            self._requests.write(json.dumps({**asdict(source), "target": target}).encode() + b"\n")
            self._requests.flush()
            reply = self._replies.readline()
        except BrokenPipeError:
            reply = b""
        if not reply:
            code = self._process.wait()
            self._errors.seek(0)
            tail = self._errors.read().decode(errors="replace")[-2000:]
            raise BuildError(
                f"the compiler process died with status {code} on {source.symbol} for {target}\n{tail}"
            )
        answer: dict[str, Any] = json.loads(reply)
        return answer


def serve() -> None:
    """Answer requests until there are no more: what a worker process does."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # the compiler prints; replies have their own descriptor
    _serve(sys.stdin.buffer, replies)


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    for line in requests:
        request = json.loads(line)
        try:
            package = None if request["package"] is None else Package(**request["package"])
            source = Source(request["symbol"], request["text"], package)
            cubin, ptx = compile_source(source, request["target"])
            reply = {"cubin": cubin.hex(), "ptx": ptx}
        except Exception as error:  # whatever the compiler raises is the answer, not our crash
            reply = {"error": _explain(error)}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def _explain(error: Exception) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}")
    lines = [line.rstrip() for line in plain.splitlines() if line.strip()]
    return "\n  ".join(lines[:15])


def compile_source(source: Source, target: str) -> tuple[bytes, str]:
    """Cubin and PTX of one source, in this process (imports the compiler; not thread-safe)."""
    import importlib.util

    import cutlass
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_stream, make_ptr

    with tempfile.TemporaryDirectory(
        prefix="dsv4c-build-"
    ) as folder:  # dump names collide: one folder per compile
        if source.package is not None and source.package.folder not in sys.path:
            sys.path.append(source.package.folder)  # its modules take the place of no other
        path = Path(folder) / f"{source.symbol}.py"
        path.write_text(source.text)
        spec = importlib.util.spec_from_file_location(source.symbol, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        elements = getattr(module, "ELEMENTS", {})
        arguments: list[Any] = []
        for name, annotation in _annotations(module.host).items():
            if name == "stream":
                arguments.append(make_fake_stream())
            elif annotation is cute.Pointer:
                element = elements.get(name, cutlass.Uint8)
                arguments.append(make_ptr(element, 0, cute.AddressSpace.gmem, assumed_align=16))
            elif annotation is cutlass.Int32:
                arguments.append(cutlass.Int32(0))
            else:
                raise BuildError(
                    f"parameter {name}: {annotation} of {source.symbol}: want cute.Pointer or Int32"
                )
        options = f"--gpu-arch {target} --keep-ptx --keep-cubin --dump-dir {folder}"
        compiled = cute.compile(module.host, *arguments, options=options)
        cubin, ptx = compiled.__cubin__, compiled.__ptx__
    if not isinstance(cubin, bytes) or not cubin.startswith(b"\x7fELF"):
        raise BuildError(f"the compiler left no cubin for {source.symbol} ({target}): got {cubin!r:.200}")
    return cubin, ptx


def read_resources(cubin: bytes, symbol: str) -> Resources:
    """What the one kernel in `cubin` uses. Raises BuildError when it is not `symbol`."""
    try:
        found = read_cubin(cubin)
    except CubinError as error:
        raise BuildError(f"the cubin of {symbol!r} {error}") from None
    if found.symbol != symbol:
        raise BuildError(
            f"the cubin has no kernel {symbol!r}: found {found.symbol}; set_name_prefix must match the symbol"
        )
    return found.resources


def _annotations(function: Any) -> dict[str, Any]:
    import inspect

    signature = inspect.signature(getattr(function, "__wrapped__", function), eval_str=True)
    return {name: parameter.annotation for name, parameter in signature.parameters.items()}
