"""The build: two targets from one source, a store that survives damage and company, named errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4c.codegen.build import TARGETS, Source, build, read_resources, source_key
from dsv4c.errors import BuildError

ADD = '''"""y = x + {addend}."""
import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute

ELEMENTS = {{"x": cutlass.Float32, "y": cutlass.Float32}}


@cute.kernel
def kernel(x: cute.Pointer, y: cute.Pointer, n: cutlass.Int32):
    tid, _, _ = cute.arch.thread_idx()
    if tid < n:
        layout = cute.make_layout(128)
        cute.make_tensor(y, layout)[tid] = cute.make_tensor(x, layout)[tid] + cutlass.Float32({addend})


@cute.jit
def host(x: cute.Pointer, y: cute.Pointer, n: cutlass.Int32, stream: cuda.CUstream):
    kernel.set_name_prefix("add", remove_cutlass_symbol=True, keep_mangled_name=False)
    kernel(x, y, n).launch(grid=[1, 1, 1], block=[128, 1, 1], stream=stream)
'''


def add(addend: int = 1) -> Source:
    return Source("add_0", ADD.format(addend=addend))


def entries(store: Path) -> list[Path]:
    return sorted(path for path in store.rglob("*") if path.is_file())


def test_one_source_compiles_for_both_targets(tmp_path: Path) -> None:
    cubins = set()
    for target in TARGETS:
        (built,) = build([add()], target, tmp_path, workers=1)
        assert not built.cached
        assert f".target {target}" in built.ptx
        assert ".param .u64" in built.ptx.split(".entry add_0")[1].split(")")[0]
        assert 0 < built.resources.registers <= 255
        assert built.resources.stack == 0
        assert built.resources.code > 0
        cubins.add(built.cubin)
    assert len(cubins) == len(TARGETS)


def test_a_second_build_takes_everything_from_the_store(tmp_path: Path) -> None:
    sources = [add(1), add(2), add(1)]  # equal sources are one kernel
    seen: list[tuple[int, int, str]] = []
    first = build(
        sources, "sm_90a", tmp_path, progress=lambda done, total, b: seen.append((done, total, b.symbol))
    )
    second = build(sources, "sm_90a", tmp_path)
    assert [b.cubin for b in first] == [b.cubin for b in second]
    assert [b.cached for b in second] == [True, True, True]
    assert len(entries(tmp_path)) == 2
    assert sorted(seen) == [(1, 2, "add_0"), (2, 2, "add_0")]


def flip(entry: Path) -> None:
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 1
    entry.write_bytes(data)


def test_a_damaged_entry_is_rebuilt(tmp_path: Path) -> None:
    (good,) = build([add()], "sm_90a", tmp_path, workers=1)
    (entry,) = entries(tmp_path)
    flip(entry)
    (again,) = build([add()], "sm_90a", tmp_path, workers=1)
    assert (again.cached, again.cubin) == (False, good.cubin)
    assert build([add()], "sm_90a", tmp_path) == [replace(good, cached=True)]


def test_two_processes_share_a_store(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dsv4c.codegen.build import Source, build\n"
        "built = build([Source('add_0', Path(sys.argv[1]).read_text())], 'sm_90a', Path(sys.argv[2]))\n"
        "print(built[0].resources.registers)"
    )
    source = tmp_path / "add.py"
    source.write_text(add().text)
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "store")]
    root = Path(__file__).parents[2]
    both = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1]
    assert len(entries(tmp_path / "store")) == 1


def test_the_key_covers_source_target_and_symbol() -> None:
    keys = {source_key(add(1), "sm_90a"), source_key(add(2), "sm_90a"), source_key(add(1), "sm_100a")}
    keys.add(source_key(Source("other_0", add(1).text), "sm_90a"))
    assert len(keys) == 4


def test_meanings_are_part_of_the_key_where_a_kernel_imports_them(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = add(1)
    sources = plain, Source(plain.symbol, f"{plain.text}\nfrom dsv4c.codegen.meanings import math\n")
    before = [source_key(source, "sm_90a") for source in sources]
    monkeypatch.setattr("dsv4c.codegen.build.meanings_digest", lambda: "others")
    after = [source_key(source, "sm_90a") for source in sources]
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False]


def test_every_failure_is_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    broken = Source("broken_0", add().text.replace("thread_idx()", "no_such_thing()"))
    with pytest.raises(BuildError, match=r"broken_0 does not compile for sm_90a.*no_such_thing") as error:
        build([broken, add()], "sm_90a", tmp_path, workers=1)
    assert "\x1b" not in str(error.value)
    assert len(entries(tmp_path)) == 1


def test_a_compiler_that_dies_is_an_error(tmp_path: Path) -> None:
    fatal = Source("fatal_0", '"""Dies."""\nimport os\nos._exit(9)\n')
    with pytest.raises(BuildError, match=r"died with status 9 on fatal_0 for sm_90a"):
        build([fatal], "sm_90a", tmp_path, workers=1)


def test_unknown_targets_and_wrong_symbols_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"sm_80.*sm_90a, sm_100a"):
        build([add()], "sm_80", tmp_path)
    with pytest.raises(BuildError, match=r"no kernel 'misnamed_0': found add_0"):
        build([Source("misnamed_0", add().text)], "sm_90a", tmp_path, workers=1)
    (good,) = build([add()], "sm_90a", tmp_path, workers=1)
    assert read_resources(good.cubin, "add_0") == good.resources


HOSTILE = "import pathlib; pathlib.Path({mark!r}).write_text('a file of the working folder ran')\n"


def test_nothing_in_the_working_folder_or_the_environment_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plain,) = build([add()], "sm_90a", tmp_path / "plain", workers=1)
    folder, mark = tmp_path / "downloaded", tmp_path / "it ran"
    folder.mkdir()
    for name in ("queue", "cutlass", "cuda", "dsv4c", "sitecustomize", "usercustomize", "json"):
        (folder / f"{name}.py").write_text(HOSTILE.format(mark=str(mark)))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("PYTHONSTARTUP", str(folder / "queue.py"))
    monkeypatch.setenv("CUTE_DSL_LINEINFO", "1")
    monkeypatch.setenv("CUTE_DSL_CACHE_DIR", str(folder / "cache"))
    (again,) = build([add()], "sm_90a", tmp_path / "again", workers=1)
    assert again == plain
    assert not mark.exists()
    assert not (folder / "cache").exists()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python leaves interrupts ignored where its parent did, as shells do for what is in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    slow = Source("slow_0", '"""Sleeps."""\nimport time\ntime.sleep(60)\n')
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        build([slow, replace(slow, symbol="slow_1")], "sm_90a", tmp_path / "store", workers=1)
    assert time.perf_counter() - started < 20
    assert list(tmp_path.iterdir()) == []
