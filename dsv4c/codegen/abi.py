"""Does a kernel's text take what its launch gives? Asked of texts that dsv4c did not write.

The text says by itself how it is launched (`dsv4c.plan.declared`); nothing of it runs here.
"""

from __future__ import annotations

from dsv4c.codegen.build import Package, Source
from dsv4c.codegen.emit import Emission
from dsv4c.errors import BuildError
from dsv4c.plan.declared import Declared, read_source


def check_emission(emission: Emission, package: Package) -> None:
    """Raise BuildError unless a contributed kernel's text is launched as its emission says."""
    where = f"{package}: kernel {emission.symbol}"
    declared = _declared(where, emission.source)
    facts = {
        "parameters": (declared.parameters, tuple(p.name for p in emission.parameters)),
        "block": (declared.block, emission.block),
        "cluster": (declared.cluster, emission.cluster),
        "shared": (declared.shared, emission.shared),
        "waits": (declared.waits, emission.waits),
    }
    for fact, (found, wanted) in facts.items():
        if found != wanted:
            raise BuildError(
                f"{where}: its text has {_said(fact, found)}, its emission {_said(fact, wanted)}"
            )


def check_edit(path: str, text: str, generated: Source) -> None:
    """Raise BuildError unless an edited text is launched as the generated one, in whose place it comes."""
    found, wanted = _declared(path, text), read_source(generated.text)
    for fact in Declared.__slots__:
        if (ours := getattr(wanted, fact)) != (theirs := getattr(found, fact)):
            raise BuildError(
                f"{path}: has {_said(fact, theirs)}; its launches were made for {_said(fact, ours)}: edit "
                "what the kernel does, not how it is launched"
            )


def _declared(where: str, text: str) -> Declared:
    try:
        compile(text, where, "exec", dont_inherit=True)
        return read_source(text)
    except (SyntaxError, ValueError) as error:
        what = f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else error
        raise BuildError(f"{where}: {what}") from None


def _said(fact: str, value: object) -> str:
    """`parameters m_x, m_y`, `block 256`."""
    if fact == "grid":
        assert isinstance(value, tuple)
        counts = (f"{name} * {count}" if name and count > 1 else name or str(count) for name, count in value)
        return f"grid [{', '.join(counts)}]"
    if isinstance(value, tuple):
        return f"{fact} {', '.join(map(str, value)) or 'none'}"
    return f"{fact} {value}"
