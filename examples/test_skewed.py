"""The test of `skewed`: pytest examples/test_skewed.py"""

from pathlib import Path

import pytest

from dynaflow_serving.strategies import build_strategy
from dynaflow_serving.testing import assert_valid

SKEWED = str(Path(__file__).with_name("skewed.py"))


@pytest.mark.parametrize("skew", [0, 1, 4])
def test_skewed_is_valid(skew: int) -> None:
    assert_valid(build_strategy(SKEWED, {"micro_batches": 3, "min_tokens": 1, "skew": skew}))
