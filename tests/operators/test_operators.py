"""A share of PyTorch's own operator samples, stock and split: never wrong, and no exception that stock does not raise.

`python -m benchmarks.independence operators` runs all of them, in all modes.
"""

from __future__ import annotations

import pytest

from benchmarks.independence.judge import Mode, judge
from benchmarks.independence.samples import UNDEFINED, cases_of, operators

EVERY, SAMPLES = 5, 2
MODES = (Mode("dynamo"), Mode("aot", gradients=True), Mode("aot"), Mode("dynamo", gradients=True))
SHARE = [(name, MODES[i % len(MODES)]) for i, name in enumerate(list(operators())[::EVERY]) if name not in UNDEFINED]


@pytest.mark.parametrize("name, mode", SHARE, ids=[f"{name}-{mode}".replace(" ", "-") for name, mode in SHARE])
def test_an_operator_is_split_and_equal_or_refused(name: str, mode: Mode) -> None:
    for number, case in enumerate(cases_of(name, SAMPLES)):
        outcome = judge(case, mode)
        if outcome is not None:
            assert outcome.verdict not in ("wrong", "crash"), f"sample {number}: {outcome.verdict}: {outcome.reason}"


def test_a_plain_operator_is_really_split() -> None:
    for name in ("add", "nn.functional.linear", "softmax"):
        for mode in (Mode("dynamo"), Mode("aot")):
            outcomes = [judge(case, mode) for case in cases_of(name, 6)]
            assert "split" in [o.verdict for o in outcomes if o is not None], (name, outcomes)
