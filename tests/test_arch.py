"""Architectures: the facts agree with each other, and with the names that users give."""

from __future__ import annotations

import pytest

from dsv4c.arch import ARCHS, SM_90A, SM_100A, SYSTEM_SHARED, Arch
from dsv4c.config import TARGETS


def test_every_architecture_is_a_target() -> None:
    assert ("cpu", *ARCHS) == TARGETS
    assert {name: arch.name for name, arch in ARCHS.items()} == {name: name for name in ARCHS}


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_names_say_the_capability(arch: Arch) -> None:
    major, minor = arch.capability
    assert arch.name == f"sm_{major}{minor}a"


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_ctas_that_share_an_sm_leave_what_the_system_takes_of_each(arch: Arch) -> None:
    assert arch.shared_of(1) == arch.shared_per_cta
    for resident in (2, 3, 4):
        assert resident * (arch.shared_of(resident) + SYSTEM_SHARED) <= arch.shared_per_sm


def test_a_floor_is_bytes_over_bandwidth() -> None:
    assert SM_90A.floor_us(4_450_000) == pytest.approx(1.0)
    assert SM_100A.floor_us(8_000_000) == pytest.approx(1.0)
