"""The folder of what takes long to make again: kernels and certificates. Losing it loses time only."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from dsv4c.errors import BuildError

REMEDY = "name another with --cache DIR, or set XDG_CACHE_HOME"


def cache_folder(given: Path | None = None) -> Path:
    """`given`, or `dsv4c` in $XDG_CACHE_HOME, by default ~/.cache; made if it is not there.

    Raises BuildError if it cannot be written.
    """
    try:
        folder = given or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv4c"
    except RuntimeError:
        raise BuildError(f"there is no home folder for the cache; {REMEDY}") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise BuildError(f"{folder}: the cache cannot be written: {error.strerror}; {REMEDY}") from None
