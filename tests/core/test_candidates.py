"""The candidates that a config of `strategy: auto` names, and what is wrong with some."""

from __future__ import annotations

from typing import Any

import pytest

from dynaflow_serving.config import load
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.policy.selector import build_selector


def test_candidates_of_one_strategy_are_told_apart_by_their_options() -> None:
    candidates = [
        {"strategy": "comet", "options": {"chunks": 4}},
        {"strategy": "nanoflow", "options": {"cut": "token"}},
    ]
    options = {"candidates": ["comet", "nanoflow", *candidates], "micro_batches": [2]}
    selector = build_selector(load({"strategy": "auto", "options": options}))
    assert selector.candidates == ("comet", "nanoflow x2", "comet chunks=4", "nanoflow x2 cut=token")
    options = {"candidates": ["comm_overlap", "nanoflow"], "micro_batches": [1, 2]}  # nanoflow orders no un-split step
    selector = build_selector(load({"strategy": "auto", "options": options}))
    assert selector.candidates == ("comm_overlap", "comm_overlap x2", "nanoflow x2")
    assert selector.whole_planners == ("comm_overlap",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": ["nanoflo"]}, "unknown strategy 'nanoflo'. Did you mean 'nanoflow'"),
        ({"candidates": ["auto"]}, "'auto' itself is none"),
        ({"micro_batches": [0, 2]}, "each at least 1"),
        ({"candidates": [{"strategy": "sequential", "options": {"micro_batches": 1}}]}, "nothing to choose"),
        ({"candidates": ["nanoflow", {"strategy": "nanoflow"}]}, "nanoflow x2 is given twice"),
        ({"candidates": [{"name": "nanoflow"}]}, "is not {strategy: NAME, options: {...}}"),
        ({"candidates": [{"strategy": "nanoflow", "options": {"cuts": 1}}]}, "unknown option 'cuts'"),
        ({"budget_second": 5}, "unknown option 'budget_second'. Did you mean 'budget_seconds'"),
    ],
)
def test_wrong_options_say_what_is_valid(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_selector(load({"strategy": "auto", "options": options}))
    assert message in str(error.value)
