"""Kernel files that a person edited, in the place of those that were generated.

A plan's `kernels/NAME.py` says in its name what was generated: an edited file of that name replaces that text
and no other. Edited files are code. `compile` alone reads them, and only its compiler processes run them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dsv4c.codegen.abi import check_edit
from dsv4c.codegen.build import Source
from dsv4c.errors import BuildError, listed


def edited(sources: Mapping[str, Source], folder: Path) -> dict[str, Source]:
    """Of a plan's kernels, by name, those that `folder` has another text of.

    Raises BuildError for a file that is no kernel of the plan, or is not launched as the generated one.
    """
    if not folder.is_dir():
        raise BuildError(f"{folder}: is no folder; give one of kernel files as `compile` wrote them")
    found = {}
    for path in sorted(folder.glob("*.py")):
        if path.stem not in sources:
            raise BuildError(
                f"{path}: is no kernel of this plan, whose kernels are {listed(sources, path.stem)}; "
                "edit files that this compile wrote without --kernels"
            )
        generated, text = sources[path.stem], _read(path)
        if text != generated.text:
            check_edit(str(path), text, generated)
            found[path.stem] = replace(generated, text=text)
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BuildError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BuildError(f"{path}: is not text at byte {error.start}; expected a kernel's source") from None
