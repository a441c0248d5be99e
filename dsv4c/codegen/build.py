"""Kernel sources to cubins, without a GPU: worker processes compile, a content-addressed store remembers.

A source is a Python module with one `@cute.jit` function `host` whose parameters are `cute.Pointer`, `Int32`
and a last `stream`; `ELEMENTS` names pointer element types (Uint8 unless named). An entry's key covers the
source, `codegen/lib`, the toolchain and the target. Entries are written atomically, so processes may share a
store; damaged ones are rebuilt.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import queue
import re
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from dsv4c.arch import ARCHS
from dsv4c.errors import BuildError

TARGETS = tuple(ARCHS)
LIB = Path(__file__).parent / "lib"
_MAGIC = b"dsv4c-kernel-2\n"


@dataclass(frozen=True)
class Source:
    """One kernel to compile: its entry point's name and the text of its module."""

    symbol: str
    text: str


@dataclass(frozen=True)
class Resources:
    """What the cubin says a kernel uses; bytes, except registers (per thread)."""

    registers: int
    stack: int  # per thread: spills and dynamically indexed register arrays; 0 in every kernel we ship
    static_shared: int
    code: int


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
    """Compile `sources` for `target`, in their order, taking from `store` what it has.

    `workers` processes compile (default: one per core). Raises BuildError naming every kernel that failed.
    """
    if target not in TARGETS:
        raise BuildError(f"cannot compile for {target!r}: targets are {', '.join(TARGETS)}")
    keys = [source_key(source, target) for source in sources]
    ready: dict[str, Built] = {}
    jobs: queue.SimpleQueue[tuple[str, Source]] = queue.SimpleQueue()
    todo = 0
    for key, source in dict(zip(keys, sources, strict=True)).items():
        entry = read_entry(_entry_path(store, key), key)
        if entry is None:
            jobs.put((key, source))
            todo += 1
        else:
            _settle(ready, entry, len(set(keys)), progress)
    failures = _compile_all(
        jobs, min(todo, workers or os.cpu_count() or 1), target, store, ready, len(set(keys)), progress
    )
    if failures:
        raise BuildError("\n".join(failures))
    return [ready[key] for key in keys]


def source_key(source: Source, target: str) -> str:
    """Content address of a kernel: everything that decides its cubin."""
    text = "\0".join((source.symbol, source.text, target, toolchain(), lib_digest()))
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def toolchain() -> str:
    """The compiler's identity, without importing it."""
    return f"nvidia-cutlass-dsl {importlib.metadata.version('nvidia-cutlass-dsl')}"


@cache
def lib_digest() -> str:
    """Digest of the device library, read once per process."""
    files = sorted(LIB.glob("*.py"))
    return hashlib.sha256(b"\0".join(f.name.encode() + b"\0" + f.read_bytes() for f in files)).hexdigest()


def _settle(ready: dict[str, Built], built: Built, total: int, progress: Progress | None) -> None:
    ready[built.key] = built
    if progress:
        progress(len(ready), total, built)


# The store --------------------------------------------------------------------------------------------------


def _entry_path(store: Path, key: str) -> Path:
    return store / key[:2] / f"{key}.kernel"


def write_entry(path: Path, built: Built) -> None:
    """Write an entry so that a reader sees all of it or none: header line, cubin, PTX, sha256 of what
    precedes.
    """
    header = {
        "symbol": built.symbol,
        "target": built.target,
        "key": built.key,
        "cubin": len(built.cubin),
        "resources": asdict(built.resources),
    }
    payload = _MAGIC + json.dumps(header).encode() + b"\n" + built.cubin + built.ptx.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".partial", delete=False) as file:
        file.write(payload + hashlib.sha256(payload).digest())
    os.replace(file.name, path)


def read_entry(path: Path, key: str) -> Built | None:
    """The entry at `path`, or None when it is missing or damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    payload, digest = data[:-32], data[-32:]
    if not payload.startswith(_MAGIC) or hashlib.sha256(payload).digest() != digest:
        return None
    line, _, blob = payload[len(_MAGIC) :].partition(b"\n")
    header = json.loads(line)
    if header["key"] != key:
        return None
    size = header["cubin"]
    resources = Resources(**header["resources"])
    return Built(
        header["symbol"], header["target"], key, blob[:size], blob[size:].decode(), resources, cached=True
    )


# Worker processes -------------------------------------------------------------------------------------------


def _compile_all(
    jobs: queue.SimpleQueue[tuple[str, Source]],
    workers: int,
    target: str,
    store: Path,
    ready: dict[str, Built],
    total: int,
    progress: Progress | None,
) -> list[str]:
    """Drain `jobs` with `workers` processes into `store` and `ready`; the messages of those that failed."""
    failures: list[str] = []
    crashes: list[BaseException] = []
    lock = threading.Lock()

    def drain() -> None:
        try:
            with _Worker() as worker:
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
                    write_entry(_entry_path(store, key), built)
                    with lock:
                        _settle(ready, built, total, progress)
        except BaseException as error:  # handed to the caller's thread below
            crashes.append(error)

    threads = [threading.Thread(target=drain, name=f"build-{i}") for i in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if crashes:
        raise crashes[0]
    return sorted(failures)


class _Worker:
    """A process that compiles one source at a time: a request and a reply are a JSON line each.

    A fresh interpreter, not a fork: the caller may hold threads (a progress bar) or a CUDA context.
    """

    def __enter__(self) -> _Worker:
        command = [sys.executable, "-m", "dsv4c.codegen.build"]
        path = os.pathsep.join(
            [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": path, "NO_COLOR": "1"},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.close()
        self._process.wait()
        self._replies.close()
        self._errors.close()

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


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    for line in requests:
        request = json.loads(line)
        try:
            cubin, ptx = compile_source(Source(request["symbol"], request["text"]), request["target"])
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


def _annotations(function: Any) -> dict[str, Any]:
    import inspect

    signature = inspect.signature(getattr(function, "__wrapped__", function), eval_str=True)
    return {name: parameter.annotation for name, parameter in signature.parameters.items()}


# What a cubin says about itself -----------------------------------------------------------------------------

_FRAME_SIZE, _REGISTERS = 0x11, 0x2F  # EIATTR_FRAME_SIZE, EIATTR_REGCOUNT: pairs of (symbol index, value)


def read_resources(cubin: bytes, symbol: str) -> Resources:
    """Registers, stack, static shared memory and code size of the one kernel in `cubin`.

    Raises BuildError when the cubin's entry point is not `symbol`.
    """
    sections = dict(_sections(cubin))
    text = sections.get(f".text.{symbol}")
    if text is None:
        found = ", ".join(name[6:] for name in sections if name.startswith(".text.")) or "none"
        raise BuildError(
            f"the cubin has no kernel {symbol!r}: found {found}; set_name_prefix must match the symbol"
        )
    attributes = dict(_global_attributes(sections.get(".nv.info", b"")))
    shared = sections.get(f".nv.shared.{symbol}", b"")
    return Resources(
        registers=attributes.get(_REGISTERS, 0),
        stack=attributes.get(_FRAME_SIZE, 0),
        static_shared=len(shared),
        code=len(text),
    )


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and contents of each section of a 64-bit little-endian ELF file (empty for sections without
    bytes).
    """
    (offset,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, offset + i * size) for i in range(count)]
    base = headers[names][4]
    for name, kind, _flags, _address, start, length, *_rest in headers:
        end = elf.index(b"\0", base + name)
        data = bytes(length) if kind == 8 else elf[start : start + length]  # kind 8: SHT_NOBITS
        yield elf[base + name : end].decode(), data


def _global_attributes(info: bytes) -> Iterator[tuple[int, int]]:
    """(attribute, value) of `.nv.info`: records of format, attribute, size and payload, padded to 4 bytes."""
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == 4:  # sized payload; other forms keep their value in `size`
            if size == 8:
                yield attribute, struct.unpack_from("<I", info, at + 4)[0]
            at += -(-size // 4) * 4


if __name__ == "__main__":
    _replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # the compiler prints; replies have their own descriptor
    _serve(sys.stdin.buffer, _replies)
