"""What takes long to make again, kernels and certificates, kept by key. Losing any of it loses time only.

An entry is verified whenever it is read; one that is damaged, foreign, of another version or unreadable is
as good as none, and where nothing can be written nothing is kept. So processes and users may share a cache,
and it may be read-only. The digest of an entry protects against accidents, not against people: whoever may
write to a cache decides what code later plans contain, so let only those write whose code you would run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from dsv4c.errors import BuildError
from dsv4c.publish import published

REMEDY = "name another with --cache DIR, or set XDG_CACHE_HOME"
LARGEST = 1 << 28  # bytes of an entry; a larger file is not one of ours

_MAGIC = b"dsv4c-cache-1 "


def cache_folder(given: Path | None = None) -> Path:
    """`given`, or `dsv4c` in $XDG_CACHE_HOME, by default ~/.cache; made if it is not there.

    Raises BuildError for a given one that cannot be made, and where there is no home to have one in.
    """
    try:
        folder = given or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv4c"
    except RuntimeError:
        raise BuildError(f"there is no home folder for the cache; {REMEDY}") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if given is not None:
            raise BuildError(f"{folder}: the cache cannot be written: {error.strerror}; {REMEDY}") from None
    return folder


@dataclass(frozen=True)
class Store:
    """Entries by key, a file for each. A key names everything that decides the entry."""

    folder: Path

    def get(self, key: str) -> bytes | None:
        """The entry, or None where there is none that can be believed."""
        path = self.folder / key
        try:
            if not path.is_file() or path.stat().st_size > LARGEST:
                return None
            head, _, content = path.read_bytes().partition(b"\n")
        except OSError:
            return None
        return content if head == _head(key, content) else None

    def put(self, key: str, content: bytes) -> None:
        """Keep an entry, where that is possible."""
        path = self.folder / key
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with published(path, durable=False) as made:
                made.write_bytes(_head(key, content) + b"\n" + content)


def _head(key: str, content: bytes) -> bytes:
    """First line of an entry; its digest covers the key, too, so no entry passes for another."""
    return _MAGIC + hashlib.sha256(key.encode() + b"\n" + content).hexdigest().encode()
