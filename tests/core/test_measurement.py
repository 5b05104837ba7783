"""The spread of repeated measurements, and the order in which things take turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynaflow_serving.core.measurement import NOISY, Spread, in_turn, noise

RATIOS = st.lists(st.floats(min_value=0.01, max_value=100), min_size=1)


def test_a_spread_is_median_least_and_greatest() -> None:
    spread = Spread.of_values([3.0, 1.0, 2.0])
    assert spread == Spread(median=2.0, min=1.0, max=3.0)
    assert spread.as_dict() == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_noise_is_half_of_the_interquartile_range() -> None:
    assert noise([1.0]) == 0
    assert noise([1.3, 1.0]) == pytest.approx(NOISY, abs=1e-3)
    assert noise([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 9.0]) == 0  # an outlier on either side is no noise


def test_half_and_double_are_equally_far_from_one() -> None:
    assert Spread.of_ratios([0.5, 2.0]) == Spread(median=1.0, min=0.5, max=2.0)
    assert Spread.of_ratios([0.8, 1.25, 4.0]).median == 1.25


@given(RATIOS)
def test_the_inverse_ratios_have_the_inverse_spread(ratios: list[float]) -> None:
    spread, inverse = Spread.of_ratios(ratios), Spread.of_ratios([1 / r for r in ratios])
    assert inverse.median == pytest.approx(1 / spread.median)
    assert (inverse.min, inverse.max) == (1 / spread.max, 1 / spread.min)
    assert spread.min * (1 - 1e-12) <= spread.median <= spread.max * (1 + 1e-12)


def test_every_second_round_is_in_reverse() -> None:
    assert [list(in_turn("abc", number)) for number in range(3)] == [list("abc"), list("cba"), list("abc")]
