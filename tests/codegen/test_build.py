"""The build: two targets from one source, a store that survives damage and company, named errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dsv4c.codegen.build import (
    TARGETS,
    Built,
    Source,
    build,
    read_entry,
    read_resources,
    source_key,
    write_entry,
)
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
    return sorted(store.rglob("*.kernel"))


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


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_entry_is_rebuilt(tmp_path: Path, damage: str) -> None:
    (good,) = build([add()], "sm_90a", tmp_path, workers=1)
    (entry,) = entries(tmp_path)
    data = bytearray(entry.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    entry.write_bytes({"flip": data, "truncate": data[:-100], "empty": b""}[damage])
    assert read_entry(entry, good.key) is None
    (again,) = build([add()], "sm_90a", tmp_path, workers=1)
    assert (again.cached, again.cubin) == (False, good.cubin)
    assert read_entry(entry, good.key) is not None


def test_an_entry_under_a_foreign_key_is_not_taken(tmp_path: Path) -> None:
    (good,) = build([add()], "sm_90a", tmp_path, workers=1)
    assert read_entry(entries(tmp_path)[0], "0" * 64) is None
    copy = tmp_path / "copy"
    write_entry(copy, good)
    assert read_entry(copy, good.key) == Built(**{**good.__dict__, "cached": True})


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
    assert not list((tmp_path / "store").rglob("*.partial"))


def test_the_key_covers_source_target_and_symbol() -> None:
    keys = {source_key(add(1), "sm_90a"), source_key(add(2), "sm_90a"), source_key(add(1), "sm_100a")}
    keys.add(source_key(Source("other_0", add(1).text), "sm_90a"))
    assert len(keys) == 4


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
