"""The cache: whatever happened to an entry or its folder, it is as good as none, and nothing fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv4c import cache
from dsv4c.cache import Store, cache_folder
from dsv4c.errors import BuildError

KEY, OTHER = "ab" * 32, "ac" * 32


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.put(KEY, b"content")
    return store


def entry(store: Store) -> Path:
    return store.folder / KEY


def test_what_is_put_is_got(store: Store) -> None:
    assert store.get(KEY) == b"content"
    assert store.get(OTHER) is None
    store.put(KEY, b"other\ncontent")
    assert store.get(KEY) == b"other\ncontent"
    assert [path.name for path in entry(store).parent.iterdir()] == [KEY]


def test_every_flipped_bit_and_every_cut_is_noticed(store: Store) -> None:
    good = entry(store).read_bytes()
    for bit in range(8 * len(good)):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        entry(store).write_bytes(damaged)
        assert store.get(KEY) is None
    for length in range(len(good)):
        entry(store).write_bytes(good[:length])
        assert store.get(KEY) is None


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a folder": replaced(lambda path: (path / "full").mkdir(parents=True)),
    "a pipe": replaced(os.mkfifo),
    "a loop": replaced(lambda path: path.symlink_to(path)),
    "a dangling link": replaced(lambda path: path.symlink_to("nowhere")),
    "of another version": lambda path: path.write_bytes(b"dsv4c-cache-2 " + path.read_bytes()),
    "another entry": lambda path: shutil.copy(_other(path), path),
    "huge": lambda path: os.truncate(path, 1 << 40),
}


def _other(path: Path) -> Path:
    Store(path.parents[1] / "second").put(OTHER, b"content")
    return path.parents[1] / "second" / OTHER


@pytest.mark.parametrize("name", DAMAGES)
def test_a_foreign_entry_is_none_and_putting_again_never_fails(name: str, store: Store) -> None:
    DAMAGES[name](entry(store))
    assert store.get(KEY) is None
    store.put(KEY, b"again")
    assert store.get(KEY) == (None if name in ("a folder", "a pipe") else b"again")


def test_a_file_in_place_of_a_folder_keeps_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.write_text("")
    store = Store(folder)
    store.put(KEY, b"content")
    assert store.get(KEY) is None


def test_another_users_cache_is_read_and_not_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a read-only file system: nothing can be made there."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    store.put(OTHER, b"new")
    assert (store.get(KEY), store.get(OTHER)) == (b"content", None)


def test_entries_are_for_everybody_whom_the_umask_lets_read(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        Store(tmp_path / "store").put(KEY, b"content")
    finally:
        os.umask(old)
    assert entry(Store(tmp_path / "store")).stat().st_mode & 0o777 == 0o644
    assert entry(Store(tmp_path / "store")).parent.stat().st_mode & 0o777 == 0o755


def test_a_folder_that_was_asked_for_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match=r"file/cache: the cache cannot be written: Not a directory"):
        cache_folder(tmp_path / "file" / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder() == tmp_path / "file" / "dsv4c"  # the usual one is done without


def test_the_limit_is_of_whole_entries(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    size = entry(store).stat().st_size
    monkeypatch.setattr(cache, "LARGEST", size)
    assert store.get(KEY) == b"content"
    monkeypatch.setattr(cache, "LARGEST", size - 1)
    assert store.get(KEY) is None
