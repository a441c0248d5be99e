"""Rotation against complex multiplication, and the frequency table against its formula."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dsv4c.ir.ops.rope import Rope, RopeFrequencies
from dsv4c.reference import run

PLAIN = RopeFrequencies(10000.0, 64, 1.0, 65536, 32.0, 1.0)
YARN = RopeFrequencies(160000.0, 64, 16.0, 65536, 32.0, 1.0)


def test_plain_frequencies() -> None:
    expected = [10000 ** (-2 * i / 64) for i in range(32)]
    assert run(PLAIN).tolist() == pytest.approx(expected, rel=2e-7)


def test_yarn_keeps_fast_pairs_divides_slow_ones_and_blends() -> None:
    base = [160000 ** (-2 * i / 64) for i in range(32)]
    expected = [
        f * (1 if i <= 15 else 1 / 16 if i >= 25 else 1 - 0.09375 * (i - 15)) for i, f in enumerate(base)
    ]
    assert run(YARN).tolist() == pytest.approx(expected, rel=3e-7)


def test_a_ramp_that_ends_before_it_begins_is_the_official_codes() -> None:
    """Over 4 tokens even the slowest pair makes less than a turn: the ramp runs from 0 back to -1, so that
    `linear_ramp_factor` is 0 everywhere and no pair is divided.
    """
    short = replace(YARN, original_max_position=4)
    assert torch.equal(run(short), run(replace(short, factor=1.0)))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("stride", [1, 4, 128])
@pytest.mark.parametrize("middle", [(), (3,), (2, 3)])
def test_rotation_is_a_complex_product(inverse: bool, stride: int, middle: tuple[int, ...]) -> None:
    positions = torch.tensor([0, 1, 7, 8191], dtype=torch.int32)
    x, frequencies = torch.randn(4, *middle, 96), run(YARN)
    y = run(Rope(inverse=inverse, stride=stride), x, positions, frequencies)
    for n, position in enumerate(positions.tolist()):
        angle = torch.tensor(float(position * stride)) * frequencies  # in f32
        turn = torch.polar(torch.ones(32).double(), angle.double() * (-1 if inverse else 1))
        expected = torch.view_as_complex(x[n, ..., 32:].double().unflatten(-1, (-1, 2))) * turn
        torch.testing.assert_close(
            y[n, ..., 32:].double(), torch.view_as_real(expected).flatten(-2), rtol=0, atol=1e-6
        )
    assert torch.equal(y[..., :32], x[..., :32])


def test_bf16_rows_are_rotated_in_f32_and_cast_once() -> None:
    x, positions = torch.randn(6, 2, 64).to(torch.bfloat16), torch.arange(6, dtype=torch.int32) * 1001
    wide = run(Rope(), x.float(), positions, run(PLAIN))
    assert torch.equal(run(Rope(), x, positions, run(PLAIN)), wide.to(torch.bfloat16))


def test_the_inverse_undoes_the_rotation() -> None:
    x, positions = torch.randn(5, 64), torch.tensor([-1, 0, 3, 65535, 1048575], dtype=torch.int32)
    there = run(Rope(), x, positions, run(YARN))
    torch.testing.assert_close(run(Rope(inverse=True), there, positions, run(YARN)), x, rtol=0, atol=2e-6)
    assert not torch.allclose(there[3:], x[3:], atol=0.1)


def test_the_angle_is_an_f32_product() -> None:
    """The fastest pair at position 1,000,003: f32 keeps the integer, so angles are within rounding of f64."""
    frequencies = run(PLAIN)
    position = torch.tensor([1_000_003], dtype=torch.int32)
    y = run(Rope(), torch.tensor([1.0, 0.0]).repeat(1, 32), position, frequencies)[0]
    rounded = (torch.tensor(1_000_003.0) * frequencies).double()
    assert torch.equal(y[0::2], rounded.cos().float())
    exact = 1_000_003 * frequencies.double()
    assert (rounded - exact).abs().max() > 0.005  # so a product in f64 would be told apart
    assert math.isclose(y[0].item(), math.cos(1_000_003), rel_tol=1e-6)
