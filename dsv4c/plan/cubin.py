"""What a cubin says about itself: an ELF file with one kernel, read without a driver."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

# Attributes of `.nv.info` (EIATTR_*). Of all kernels, as pairs of (symbol index, value):
_FRAME_SIZE, _REGISTERS = 0x11, 0x2F
# Of one kernel:
_REQUIRED_THREADS, _PARAMETER, _PARAMETER_BYTES = 0x10, 0x17, 0x19

_NO_BYTES = 8  # SHT_NOBITS
_CUDA = 190  # EM_CUDA


class CubinError(ValueError):
    """No cubin, or not one with a single kernel."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What the cubin says a kernel uses; bytes, except registers (per thread)."""

    registers: int
    stack: int  # per thread: spills and dynamically indexed register arrays; 0 in every kernel we ship
    static_shared: int
    code: int


@dataclass(frozen=True, slots=True)
class Cubin:
    """A cubin's one kernel: its entry point, what it runs on, and what it takes.

    parameters: bytes of each, in ABI order. threads: the block that it must be launched with. Grid, cluster
    and dynamic shared memory are no part of a cubin.
    """

    symbol: str
    architecture: str
    parameters: tuple[int, ...]
    threads: tuple[int, int, int]
    resources: Resources


class _Section(NamedTuple):
    """`size` bytes at run time, of which some sections have none in the file."""

    size: int
    content: memoryview


def read_cubin(content: bytes) -> Cubin:
    """Raises CubinError for what is no cubin, is cut off, or has not exactly one kernel."""
    try:
        architecture, sections = _architecture(content), _sections(content)
        symbols = [name.removeprefix(".text.") for name in sections if name.startswith(".text.")]
        if len(symbols) != 1:
            raise CubinError(f"has {len(symbols)} kernels ({', '.join(symbols)[:200]}); expected one")
        (symbol,) = symbols
        everyone = {at: values[1] for at, values in _attributes(sections[".nv.info"].content) if values[1:]}
        own = list(_attributes(sections[f".nv.info.{symbol}"].content))
        parameters = _parameters([values for at, values in own if at == _PARAMETER])
        single = dict(own)
        if single.get(_PARAMETER_BYTES, (0,)) != (sum(parameters),):
            raise CubinError(f"its parameters of {parameters} bytes are not what it takes in all")
        x, y, z = single[_REQUIRED_THREADS]
    except (struct.error, KeyError, IndexError, UnicodeDecodeError) as error:
        raise CubinError(f"is cut off or damaged: {error!r:.120}") from None
    except ValueError as error:
        raise CubinError(str(error)) from None
    shared = sections.get(f".nv.shared.{symbol}")
    return Cubin(
        symbol,
        architecture,
        parameters,
        (x, y, z),
        Resources(
            registers=everyone.get(_REGISTERS, 0),
            stack=everyone.get(_FRAME_SIZE, 0),
            static_shared=shared.size if shared is not None else 0,
            code=sections[f".text.{symbol}"].size,
        ),
    )


def _architecture(elf: bytes) -> str:
    """As the compiler calls it. The flags' layout is decided by the ABI's version."""
    if elf[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", elf, 0x12) != (_CUDA,):
        raise CubinError("is no 64-bit ELF file for CUDA")
    (flags,) = struct.unpack_from("<I", elf, 0x30)
    if elf[8] == 7:
        number, accelerated = flags & 0xFF, flags & 0x800
    elif elf[8] == 8:
        number, accelerated = flags >> 8 & 0xFF, flags & 0x8
    else:
        raise CubinError(f"has version {elf[8]} of CUDA's ABI; expected 7 or 8")
    return f"sm_{number}{'a' if accelerated else ''}"


def _sections(elf: bytes) -> Mapping[str, _Section]:
    """By name."""
    (offset,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    if offset + count * size > len(elf):
        raise CubinError(f"its section headers end at byte {offset + count * size} of {len(elf)}")
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, offset + i * size) for i in range(count)]
    base, whole = headers[names][4], memoryview(elf)
    found = {}
    for name, kind, _flags, _address, start, length, *_rest in headers:
        if max(base + name, 0 if kind == _NO_BYTES else start + length) > len(elf):
            raise CubinError(f"a section ends at byte {start + length} of {len(elf)}")
        label = elf[base + name : elf.index(b"\0", base + name)].decode()
        found[label] = _Section(length, whole[:0] if kind == _NO_BYTES else whole[start : start + length])
    return found


def _attributes(info: memoryview) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(attribute, 32-bit words) of records of format, attribute, size and payload, padded to 4 bytes."""
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == 4:
            yield attribute, struct.unpack_from(f"<{size // 4}I", info, at)
            at += -(-size // 4) * 4
        else:  # the value is in place of the size
            yield attribute, (size,)


def _parameters(records: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Bytes of each parameter. A record is (index, ordinal and offset, flags with the size on top)."""
    found = sorted((place & 0xFFFF, place >> 16, flags >> 18) for _, place, flags in records)
    end = 0
    for number, (ordinal, offset, size) in enumerate(found):
        if (ordinal, offset) != (number, end):
            raise CubinError(f"parameter {number} is at byte {offset}, after {end} bytes")
        end += size
    return tuple(size for _, _, size in found)
