"""Random programs of row-wise and mixing operators under `compile`: equal or refused, never wrong, never a crash.

`python -m benchmarks.independence programs --count 10000` looks further, and `--show SEED` prints a program.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import fixed_examples

from benchmarks.independence.judge import Mode, judge
from benchmarks.independence.programs import random_case

EXAMPLES = int(os.environ.get("DYNAFLOW_EXAMPLES", 2))
MODES = (Mode("dynamo"), Mode("dynamo", gradients=True), Mode("aot"), Mode("aot", gradients=True))
SEEN: Counter[str] = Counter()


def judged(seed: int, mode: Mode) -> None:
    program = random_case(seed, mode.gradients)
    outcome = judge(program.case, replace(mode, micro_batches=program.micro_batches))
    assert outcome is not None
    assert outcome.verdict in ("split", "refused"), f"{mode}: {outcome.verdict}: {outcome.reason}\n{program.source}"
    SEEN[outcome.verdict] += 1


@fixed_examples(40, mode=(0, len(MODES) - 1))
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), mode=st.integers(0, len(MODES) - 1))
def test_a_random_program_is_equal_or_refused(seed: int, mode: int) -> None:
    judged(seed, MODES[mode])


@pytest.mark.parametrize("seed", [4, 10])
def test_a_random_program_compiled_by_inductor(seed: int) -> None:
    judged(seed, Mode("inductor"))


def test_the_random_programs_reach_both_verdicts(report: Callable[[str], None]) -> None:
    report("random programs: " + ", ".join(f"{k} {v}" for k, v in sorted(SEEN.items())))
    if sum(SEEN.values()) > 30:
        assert SEEN["split"] >= 5 and SEEN["refused"] >= 5
