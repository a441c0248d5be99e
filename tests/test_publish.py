"""Publishing: the old or the new at any moment, whatever stops it, and nothing left behind by the dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from dsv4c import publish
from dsv4c.publish import PREFIX, OccupiedError, published, sweep

REPOSITORY = Path(__file__).parents[1]


def put(target: Path, text: str, **options: object) -> None:
    """Publish a folder whose files all hold `text`."""
    with published(target, **options) as made:  # type: ignore[arg-type]
        made.mkdir()
        for name in ("a", "b"):
            (made / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot swap two entries."""
    monkeypatch.setattr(publish, "_exchange", lambda made, place: False)


@pytest.fixture(params=[True, False], ids=["exchange", "aside"])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        without_exchange(monkeypatch)
    return bool(request.param)


def test_a_folder_replaces_another_and_keeps_what_is_not_its_own(tmp_path: Path, exchanges: bool) -> None:
    target = tmp_path / "it"
    put(target, "old")
    (target / "notes").mkdir()
    (target / "notes" / "thesis.txt").write_text("words")
    (target / "link").symlink_to("notes")
    put(target, "new", keep=lambda name: name in ("notes", "link", "a"))
    assert (target / "notes" / "thesis.txt").read_text() == "words"
    assert os.readlink(target / "link") == "notes"
    assert (target / "a").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_this_file_system_exchanges(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put(tmp_path / name, name)
    assert publish._exchange(tmp_path / "a", tmp_path / "b")
    assert content(tmp_path / "a") == {"a": "b", "b": "b"}


def test_without_replace_a_full_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    put(tmp_path / "it", "first", replace=False)
    with pytest.raises(OccupiedError):
        put(tmp_path / "it", "second", replace=False)
    assert content(tmp_path / "it") == {"a": "first", "b": "first"}
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failure_inside_changes_nothing(tmp_path: Path, failure: BaseException) -> None:
    put(tmp_path / "it", "old")

    def fail() -> None:
        with published(tmp_path / "it") as made:
            made.mkdir()
            raise failure

    with pytest.raises((KeyboardInterrupt, OSError)):
        fail()
    assert content(tmp_path / "it") == {"a": "old", "b": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_a_file_keeps_its_rights_and_a_new_one_has_the_usual(tmp_path: Path) -> None:
    file, usual = tmp_path / "file", tmp_path / "usual"
    usual.write_text("")
    with published(file) as made:
        made.write_text("first")
        made.chmod(0o600)  # as libraries do that write files of their own
    assert file.stat().st_mode == usual.stat().st_mode
    file.chmod(0o640)
    with published(file) as made:
        made.write_text("second")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("second", 0o640)


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    for text in ("first", "second"):
        with published(tmp_path / "link") as made:
            made.write_text(text)
        assert (tmp_path / "far" / "file").read_text() == text
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["far", "file", "link"]


def test_a_pipe_and_a_device_are_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with published(pipe, stream=True) as made:
        made.write_text("words")
    assert os.read(reader, 100) == b"words"
    os.close(reader)
    with published(Path(os.devnull), stream=True) as made:
        assert made == Path(os.devnull)


def test_a_pipe_and_a_device_are_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="it is no regular file"), published(pipe):
        pytest.fail("nothing may be written")
    with pytest.raises(OSError, match="it is no regular file"), published(Path(os.devnull)):
        pytest.fail("nothing may be written")


def test_standard_output_in_a_file_is_written_to(tmp_path: Path) -> None:
    script = "from pathlib import Path; from dsv4c.publish import published\n"
    script += "with published(Path('/dev/stdout'), stream=True) as made: made.write_text('words')"
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "words"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no /dev/shm here")
def test_memory_that_looks_like_a_disk_is_one() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for text in ("old", "new"):
            put(Path(folder) / "it", text)
            with published(Path(folder) / "file") as made:
                assert made != Path(folder) / "file"
                made.write_text(text)
        assert content(Path(folder) / "it") == {"a": "new", "b": "new"}


# --- who was killed ---


def killed_at(folder: Path, script: str) -> None:
    code = f"""
        import os, signal
        from pathlib import Path
        from dsv4c import publish
        from dsv4c.publish import published

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        def aside(path, target):
            if not Path("it").exists():
                die()
            os.rename(path, target)

        {script}
        with published(Path("it")) as made:
            made.mkdir()
            (made / "a").write_text("new")
            (made / "b").write_text("new")
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("publish._flush = die", "old"),
        ("publish._place_folder = die", "old"),
        ("publish._exchange = die", "old"),
        ("publish._discard = die", "new"),
        ("publish._exchange = lambda *_: False; Path.rename = aside", "old"),
    ],
    ids=["written", "flushed", "before the exchange", "exchanged", "moved aside"],
)
def test_whoever_comes_next_finds_the_old_or_the_new_and_tidies(
    script: str, found: str, tmp_path: Path
) -> None:
    put(tmp_path / "it", "old")
    killed_at(tmp_path, script)
    assert len(list(tmp_path.glob(f"{PREFIX}*"))) == 1
    with published(tmp_path / "other") as made:
        made.write_text("")
    assert content(tmp_path / "it") == {"a": found, "b": found}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it", "other"]


def test_the_living_and_the_foreign_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".it-partial").mkdir()
    (tmp_path / f"{PREFIX}file").write_text("no folder, so not ours")
    with published(tmp_path / "it") as made:
        made.mkdir()
        put(tmp_path / "it", "first")
        sweep(tmp_path)
        (made / "a").write_text("second")
    assert content(tmp_path / "it") == {"a": "second"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{PREFIX}file", ".it-partial", "it"]


def test_one_whose_folder_was_swept_before_it_was_locked_takes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, calls = publish._lock, []

    def swept_first(scratch: Path) -> int:
        calls.append(scratch)
        if len(calls) == 1:
            scratch.rmdir()
        return lock(scratch)

    monkeypatch.setattr(publish, "_lock", swept_first)
    put(tmp_path / "it", "new")
    assert calls[0] != calls[1]
    assert content(tmp_path / "it") == {"a": "new", "b": "new"}
