"""Two real ranks compare the same steps, and refuse alike where only one of them sees a difference."""

from __future__ import annotations

from typing import Any

import check_ranks
import pytest
from two_ranks import on_two_ranks

REASON = "check: layers.1.Block differs from the un-split run"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """By rank, what it found where no rank, rank 1 and both ranks are wrong."""
    return on_two_ranks(check_ranks.all_scenarios, str(tmp_path_factory.mktemp("mismatch")))


def test_ranks_that_are_right_go_on(found: list[list[dict[str, Any]]]) -> None:
    for right, _, _ in found:
        assert right["equal"] == [True] * 3 and right["split"] == 3 and right["steps"] == 2  # x2 and x3
        assert not right["unsplit"] and not right["log"] and not right["files"]


@pytest.mark.parametrize("scenario", [1, 2])
def test_a_difference_on_one_rank_stops_both(found: list[list[dict[str, Any]]], scenario: int) -> None:
    for rank in found:
        wrong = rank[scenario]
        assert wrong["equal"] == [True] * 3
        assert wrong["split"] == 1 and wrong["unsplit"] == {REASON: 2} and wrong["steps"] == 1
        (line,) = wrong["log"]
        assert ("on rank 1" if scenario == 1 else "on rank 0") in line and "layers.1.Block (kernel a_kernel)" in line
        assert wrong["files"] == 1
