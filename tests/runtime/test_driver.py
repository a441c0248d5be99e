"""Messages of the driver's layer, with a driver that answers as told."""

from __future__ import annotations

from typing import Any

import pytest
from cuda.bindings.driver import CUresult

from dsv4c.runtime import driver


@pytest.fixture(autouse=True)
def _names(monkeypatch: pytest.MonkeyPatch) -> None:
    success = CUresult.CUDA_SUCCESS
    monkeypatch.setattr(driver.cuda, "cuGetErrorName", lambda status: (success, status.name.encode()))
    monkeypatch.setattr(driver.cuda, "cuGetErrorString", lambda status: (success, b"its own words"))


def answers(monkeypatch: pytest.MonkeyPatch, name: str, status: CUresult, *values: Any) -> None:
    monkeypatch.setattr(driver.cuda, name, lambda *_: (status, *values))


def test_a_cubin_that_the_driver_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "cuLibraryLoadData", CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU, None)
    wanted = r"load embed_0 \(kernels/ab\.cubin\): CUDA_ERROR_NO_BINARY_FOR_GPU: its own words"
    with pytest.raises(driver.DriverError, match=wanted):
        driver.Library(b"\x7fELF", "embed_0 (kernels/ab.cubin)")


def test_a_setting_that_the_driver_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelGetFunction"):
        answers(monkeypatch, name, CUresult.CUDA_SUCCESS, 1)
    answers(monkeypatch, "cuFuncSetAttribute", CUresult.CUDA_ERROR_INVALID_VALUE)
    library = driver.Library(b"", "wo_b_0 (kernels/cd.cubin)")
    wanted = r"kernel wo_b_0 of wo_b_0 .*MAX_DYNAMIC_SHARED_SIZE_BYTES = 300000: CUDA_ERROR_INVALID_VALUE"
    with pytest.raises(driver.DriverError, match=wanted):
        library.kernel("wo_b_0", shared=300000)


def test_a_failure_on_the_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "cuCtxSynchronize", CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)
    with pytest.raises(driver.DriverError, match=r"launch 3, y: CUDA_ERROR_ILLEGAL_ADDRESS: its own"):
        driver.synchronize("launch 3, y")


def test_the_version_without_a_driver_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "cuDriverGetVersion", CUresult.CUDA_SUCCESS, 12080)
    assert driver.version() == 12080

    def missing() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(driver.cuda, "cuDriverGetVersion", missing)
    assert driver.version() == 0
