"""Cubins for tests, without a compiler: ELF files that say of a kernel what its source does, with no code."""

from __future__ import annotations

import struct

from dsv4c.arch import ARCHS
from dsv4c.plan.cubin import Resources
from dsv4c.plan.declared import read_source

RESOURCES = Resources(registers=32, stack=0, static_shared=0, code=128)
HEADER = 64


def stand_in_cubin(symbol: str, source: str, target: str) -> bytes:
    """What `dsv4c.plan.cubin.read_cubin` reads as a kernel of the source's parameters and threads."""
    declared = read_source(source)
    return cubin(symbol, target, (8,) * len(declared.parameters), (declared.block, 1, 1))


def cubin(
    symbol: str,
    target: str,
    parameters: tuple[int, ...],
    threads: tuple[int, int, int],
    resources: Resources = RESOURCES,
) -> bytes:
    """An ELF file of one kernel, of `resources.code` zeros."""
    everyone = _sized(0x2F, 1, resources.registers) + _sized(0x11, 1, resources.stack)
    offsets = [sum(parameters[:i]) for i in range(len(parameters))]
    own = b"".join(
        _sized(0x17, 0, i | at << 16, 0x1F400 | size << 18)
        for i, (at, size) in reversed(list(enumerate(zip(offsets, parameters, strict=True))))
    )
    own += _sized(0x10, *threads) + struct.pack("<BBH", 3, 0x19, sum(parameters))
    sections = {
        "": b"",
        ".nv.info": everyone,
        f".nv.info.{symbol}": own,
        f".text.{symbol}": bytes(resources.code),
        f".nv.shared.{symbol}": resources.static_shared,
    }
    names = b"".join(name.encode() + b"\0" for name in (*sections, ".shstrtab"))
    sections[".shstrtab"] = names
    body, headers, at = b"", b"", 0
    for name, content in sections.items():
        kind, size = (8, content) if isinstance(content, int) else (1, len(content))
        headers += struct.pack("<IIQQQQIIQQ", at, kind, 0, 0, HEADER + len(body), size, 0, 0, 1, 0)
        body += b"" if isinstance(content, int) else content
        at += len(name) + 1
    major, minor = ARCHS[target].capability
    number = major * 10 + minor
    abi, flags = (7, number | 0x800) if major == 9 else (8, number << 8 | 0x8)
    head = b"\x7fELF\x02\x01\x01\x41" + bytes([abi]) + bytes(7)
    head += struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, HEADER + len(body), flags, 64, 0, 0, 64, 6, 5)
    return head + body + headers


def _sized(attribute: int, *words: int) -> bytes:
    return struct.pack(f"<BBH{len(words)}I", 4, attribute, 4 * len(words), *words)
