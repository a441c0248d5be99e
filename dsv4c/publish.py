"""Puts a file or a folder in its place, whole or not at all, whenever the process or the machine stops.

It is written in a hidden folder beside its place, flushed to disk, and exchanged with what stood there. The
hidden folder is locked while its maker lives, so whoever publishes beside it next removes what a killed one
left, and nothing else.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = ".dsv4c-partial-"
"""Names of the hidden folders."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


class OccupiedError(FileExistsError):
    """A folder that is not empty stands where another was to be put, and is not to be replaced."""


@contextmanager
def published(
    target: Path,
    *,
    replace: bool = True,
    keep: Callable[[str], bool] = lambda name: False,
    durable: bool = True,
    stream: bool = False,
) -> Iterator[Path]:
    """A path to write a file or a folder at, which becomes `target` when the block ends without an error.

    A folder takes the place of another in one step (where the file system cannot exchange, the old one is
    moved aside first, and the next call here moves it back should this one be killed in between); entries
    of the old one that `keep` accepts by name go along. Without `replace` a folder that is not empty stays.
    `durable` waits until the disk has everything; caches can do without. What is no regular file, a device
    or a pipe, is never replaced; with `stream` it is written to directly. Raises OSError, OccupiedError for a
    folder that stays.
    """
    if _is_stream(target):
        if not stream:
            raise OSError(errno.EINVAL, "it is no regular file", str(target))
        yield target
        return
    place = Path(os.path.realpath(target)) if target.is_symlink() else target
    with scratch_folder(place.parent) as scratch:
        made = scratch / "new"
        yield made
        if durable:
            _flush(made)
        if made.is_dir():
            _place_folder(made, place, scratch, replace, keep)
        else:
            _place_file(made, place, scratch)
        if durable:
            _flush_entry(place.parent)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder in `folder`, for nobody else, gone afterwards, and so are those of the dead."""
    scratch, lock = _claim(folder)
    try:
        sweep(folder)
        yield scratch
    finally:
        _discard(scratch)
        os.close(lock)


def sweep(folder: Path) -> None:
    """Remove the hidden folders in `folder` whose makers are dead, and put back what they had moved aside."""
    with os.scandir(folder) as entries:
        found = [Path(entry) for entry in entries if entry.name.startswith(PREFIX)]
    for scratch in found:
        try:
            lock = _lock(scratch)
        except OSError:  # its maker lives, or it is not ours to remove
            continue
        try:
            _discard(scratch)
        finally:
            os.close(lock)


def require_writable(folder: Path) -> None:
    """Raise OSError unless entries may be made in `folder`, so that long work fails before it starts."""
    os.stat(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(code, os.strerror(code), str(folder))


def _is_stream(target: Path) -> bool:
    """Is it there, and something to write to rather than to replace? So is what a process has open."""
    try:
        mode = os.stat(target).st_mode
    except OSError:
        return False
    if not stat.S_ISREG(mode):
        return not stat.S_ISDIR(mode)
    named = target.parent / os.readlink(target) if target.is_symlink() else target
    return Path(os.path.realpath(named.parent)).parts[1:2] == ("proc",)  # /dev/stdout, /dev/fd/3


def _claim(folder: Path) -> tuple[Path, int]:
    """A new hidden folder in `folder`, and the lock that shows that its maker lives."""
    while True:
        scratch = folder / f"{PREFIX}{secrets.token_hex(8)}"
        scratch.mkdir(mode=0o700)
        try:
            return scratch, _lock(scratch)
        except (FileNotFoundError, BlockingIOError):  # another process took it for a dead one's, just now
            continue


def _lock(scratch: Path) -> int:
    """Raises BlockingIOError while somebody else holds it, FileNotFoundError when it is gone, PermissionError
    for another user's.
    """
    lock = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(lock).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(scratch))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(scratch).st_ino != os.fstat(lock).st_ino:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(scratch))
    except BaseException:
        os.close(lock)
        raise
    return lock


def _discard(scratch: Path) -> None:
    """Remove a hidden folder; what was moved aside and not replaced goes back to its place."""
    for old in (scratch / "old").glob("*"):
        if not os.path.lexists(scratch.parent / old.name):
            old.rename(scratch.parent / old.name)
    shutil.rmtree(scratch, ignore_errors=True)


def _place_file(made: Path, place: Path, scratch: Path) -> None:
    """With the rights of the old file, or those that a new file has, whatever its writer gave it."""
    like = place if place.exists() else scratch / "usual"
    if like != place:
        like.touch()
    os.chmod(made, stat.S_IMODE(os.stat(like).st_mode))
    os.replace(made, place)


def _place_folder(made: Path, place: Path, scratch: Path, replace: bool, keep: Callable[[str], bool]) -> None:
    try:
        made.rename(place)  # onto nothing, or onto an empty folder
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not replace:
            raise OccupiedError(errno.EEXIST, os.strerror(errno.EEXIST), str(place)) from None
    for entry in sorted(place.iterdir()):
        if keep(entry.name) and not os.path.lexists(made / entry.name):
            _carry(entry, made / entry.name)
    if _exchange(made, place):
        return
    aside = scratch / "old" / place.name
    aside.parent.mkdir()
    place.rename(aside)
    made.rename(place)


def _carry(entry: Path, to: Path) -> None:
    """The same files under another name; the old folder still has them, should the exchange not happen."""

    def link(source: str, copy: str) -> None:
        try:
            os.link(source, copy, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, copy, follow_symlinks=False)

    if entry.is_dir() and not entry.is_symlink():
        shutil.copytree(entry, to, symlinks=True, copy_function=link)
    else:
        link(str(entry), str(to))


def _exchange(made: Path, place: Path) -> bool:
    """Swap two entries in one step. False where the system or the file system does not know how."""
    import ctypes

    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is None:
        return False
    if swap(_AT_FDCWD, os.fsencode(made), _AT_FDCWD, os.fsencode(place), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(place))


def _flush(made: Path) -> None:
    if made.is_dir():
        for folder, _, files in os.walk(made):
            for name in files:
                _flush_entry(Path(folder, name))
            _flush_entry(Path(folder))
    else:
        _flush_entry(made)


def _flush_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
