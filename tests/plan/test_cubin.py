"""What is read from a kernel's cubin and source, and that nothing else is taken for one."""

from __future__ import annotations

import random

import pytest

from dsv4c.plan.cubin import Cubin, CubinError, Resources, read_cubin
from dsv4c.plan.declared import SourceError, read_source
from tests.codegen.lowered import gpu_plan
from tests.plan.cubins import RESOURCES, cubin

SOURCE = '''"""A kernel."""
THREADS = 64

    smem = ptx.shared(1280)

def host(
    m_x: cute.Pointer,
    m_x_scale: cute.Pointer,
    rows: Int32,
    stream: cuda.CUstream,
):
    kernel(
        m_x,
        m_x_scale,
    ).launch(
        grid=[rows * 4, 2, 1],
        block=[THREADS, 1, 1],
        cluster=[4, 1, 1],
        stream=stream,
        use_pdl=True,
    )
'''


@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
def test_a_cubin_is_read(target: str) -> None:
    used = Resources(registers=40, stack=8, static_shared=1024, code=256)
    found = read_cubin(cubin("k_0", target, (8, 4, 8), (96, 1, 1), used))
    assert found == Cubin("k_0", target, (8, 4, 8), (96, 1, 1), used)


def test_a_cut_or_altered_cubin_is_an_error_or_another_cubin() -> None:
    """Never anything but CubinError, wherever it is cut or a byte is another."""
    whole, chance = cubin("k_0", "sm_90a", (8, 8), (32, 1, 1)), random.Random(1)
    for end in range(len(whole)):
        with pytest.raises(CubinError):
            read_cubin(whole[:end])
    refused = 0
    for _ in range(5000):
        altered = bytearray(whole)
        altered[chance.randrange(len(whole))] = chance.randrange(256)
        try:
            read_cubin(bytes(altered))
        except CubinError:
            refused += 1
    assert 1000 < refused < 5000


def test_a_source_is_read() -> None:
    found = read_source(SOURCE)
    assert (found.parameters, found.sizes) == (("m_x", "m_x_scale"), ("rows",))
    assert (found.block, found.cluster, found.shared, found.programmatic) == (64, (4, 1, 1), 1280, True)
    assert found.grid_of({"rows": 3}) == (12, 2, 1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def host", "def main", "has no host function"),
        ("THREADS = 64\n", "THREADS = 64\nTHREADS = 32\n", "not one number of threads"),
        ("grid=[rows * 4, 2, 1]", "grid=[rows * f(), 2, 1]", "has a grid of"),
        ("grid=[rows * 4, 2, 1]", "grid=[columns, 2, 1]", "has a grid of 'columns'"),
        ("rows", "columns", "has a grid of"),
        ("ptx.shared(1280)", "ptx.shared(X.shared)", "allocates shared memory of X.shared"),
        ("ptx.shared(1280)", "ptx.shared(1280)\n    b = ptx.shared(64)", "expected one number"),
        ("block=[THREADS, 1, 1]", "block=[64, 1, 1]", "does not launch its kernel once"),
    ],
)
def test_another_source_is_refused(old: str, new: str, message: str) -> None:
    assert old in SOURCE
    with pytest.raises(SourceError, match=message.replace("(", r"\(")):
        read_source(SOURCE.replace(old, new))


@pytest.mark.parametrize("recipe", ["official", "bf16", "nvfp4", "nvfp4-experts"])
@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
def test_every_generated_kernel_declares_its_launch(recipe: str, target: str) -> None:
    plan = gpu_plan(recipe=recipe, target=target, batch=1, verify=1, chunk=1, certify=False)
    for record in plan.kernels.values():
        declared = read_source(plan.files[record["source"]].decode())
        found = read_cubin(plan.files[record["cubin"]])
        assert len(declared.parameters) == len(found.parameters) > 0
        assert found.resources == RESOURCES
