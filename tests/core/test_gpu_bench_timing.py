"""How benchmarks/gpu measures, without a GPU: who is timed when, statistics, the time budget, tables."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from gpu_bench_support import LIMITS, FakeTimer, named
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.gpu.limits import Limits, Work, measure
from benchmarks.gpu.report import losses, rows_of, table
from benchmarks.gpu.timing import ROUNDS, WARM_UP, Section, VariantTimes, run_sections, time_in_turn
from dynaflow_serving.core.measurement import Spread


def test_variants_are_timed_in_turn_and_warm_up_is_not_a_sample() -> None:
    timer = FakeTimer()
    variants = {n: named(n) for n in "abc"}
    measured = time_in_turn(variants, timer, 0, timer.clock)
    names = ["".join(n for n, c in variants.items() if c is call) for call, _ in timer.log]
    assert names[:6] == ["a", "a", "b", "b", "c", "c"]  # warm-up, then one call to size the samples
    assert names[6:12] == ["a", "b", "c", "c", "b", "a"]
    assert [calls for _, calls in timer.log[:2]] == [WARM_UP, 1]
    assert {len(s) for s in measured.samples.values()} == {ROUNDS[0]}  # at least so many, whatever the time


def test_a_sample_is_as_many_calls_as_fill_its_time() -> None:
    slow, fast, instant = named("slow"), named("fast"), named("instant")
    timer = FakeTimer(lambda call: {slow: 500.0, fast: 2.0, instant: 1e-9}[call])
    time_in_turn({"slow": slow, "fast": fast, "instant": instant}, timer, 0, timer.clock)
    assert {call: calls for call, calls in timer.log} == {slow: 1, fast: 10, instant: 100}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cost=st.floats(0.01, 40), seconds=st.floats(0, 30))
def test_more_time_is_more_rounds_within_limits(cost: float, seconds: float) -> None:
    timer = FakeTimer(lambda call: cost)
    measured = time_in_turn({"a": named("a"), "b": named("b")}, timer, seconds, timer.clock)
    rounds = len(measured.samples["a"])
    assert ROUNDS[0] <= rounds <= ROUNDS[1]
    round_s = 2 * max(cost, min(100, round(20 / cost)) * cost) / 1e3
    assert rounds == ROUNDS[0] or timer.now <= seconds + round_s + 1e-6
    assert rounds == ROUNDS[1] or timer.now >= seconds or rounds == ROUNDS[0]


def test_speedups_are_of_rounds_so_drift_cancels() -> None:
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]
    measured = VariantTimes({"base": [3 * d for d in drift], "new": [2 * d for d in drift]})
    assert measured.speedup("new", "base") == Spread(1.5, 1.5, 1.5)
    uneven = VariantTimes({"base": [1.0, 10.0, 100.0], "new": [2.0, 5.0, 100.0]})  # the medians' ratio would be 2
    assert uneven.speedup("new", "base") == Spread(1.0, 0.5, 2.0)
    assert Spread.of_values([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


def test_a_variant_that_fails_has_its_error_and_the_others_their_figures() -> None:
    def broken() -> None:
        raise RuntimeError("out of memory\nlong trace")

    timer = FakeTimer()
    measured = time_in_turn({"good": named("good"), "bad": broken}, timer, 0, timer.clock)
    assert measured.failed == {"bad": "RuntimeError: out of memory"}
    assert list(measured.samples) == ["good"]
    assert time_in_turn({"bad": broken}, timer, 5, timer.clock).samples == {}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    weights=st.lists(st.floats(0.1, 5), min_size=1, max_size=6),
    total=st.floats(1, 500),
    seed=st.integers(0, 2**16),
    overrun=st.floats(0.2, 3),
)
def test_sections_share_what_is_left(weights: list[float], total: float, seed: int, overrun: float) -> None:
    rng, clock, given_s = random.Random(seed), FakeTimer(), []

    def run(seconds: float) -> list[dict[str, Any]]:
        given_s.append(seconds)
        assert 0 < seconds <= total - clock.now + 1e-6
        clock.now += seconds * rng.uniform(0.2, overrun)
        return [{}]

    outcomes = list(run_sections([Section(str(w), w, run) for w in weights], total, clock.clock))
    assert len(outcomes) == len(weights)
    assert sum(bool(o.rows) for o in outcomes) == len(given_s)
    assert all(o.rows or "not run" in o.error for o in outcomes)  # nothing is skipped in silence
    if overrun <= 1:
        assert clock.now <= total * (1 + 1e-9) and all(o.rows for o in outcomes)


def test_a_section_that_fails_leaves_the_others() -> None:
    def broken(seconds: float) -> list[dict[str, Any]]:
        raise ValueError("no such kernel")

    first, second = run_sections([Section("a", 1, broken), Section("b", 1, lambda s: [{"ok": 1}])], 10)
    assert first.error == "ValueError: no such kernel" and not first.rows
    assert second.rows == [{"ok": 1}] and not second.error


# -- limits and report -------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(0, 1e15), st.floats(0, 1e13)), min_size=1, max_size=5))
def test_overlap_can_only_lower_the_limit(parts: list[tuple[float, float]]) -> None:
    work = [Work(*p) for p in parts]
    overlapped, apart = (LIMITS.milliseconds(work, overlapped=o) for o in (True, False))
    assert overlapped <= apart * (1 + 1e-9)
    assert apart <= 2 * overlapped * (1 + 1e-9)  # two resources: no more than twice


def test_limits_are_in_milliseconds() -> None:
    compute, memory = Work(2e12, 0), Work(0, 1e10)  # 20 ms of arithmetic, 10 ms of memory
    assert LIMITS.milliseconds([compute, memory], overlapped=False) == pytest.approx(30)
    assert LIMITS.milliseconds([compute, memory], overlapped=True) == pytest.approx(20)
    timer = FakeTimer(lambda call: 2.0)
    limits = measure(timer, 0, "cpu", torch.float32, side=8, mib=1)
    assert limits == Limits(2 * 2**20 / 2e-3, 2 * 8**3 / 2e-3)


def test_losses_are_listed_and_rows_are_plain_data() -> None:
    measured = VariantTimes(
        {"base": [2.0, 2.0, 2.0], "win": [1.0, 1.0, 1.0], "loss": [4.0, 2.5, 2.4]}, {"dead": "no SMs"}
    )
    against = dict.fromkeys(("win", "loss", "dead"), ("base", "dead"))
    rows = rows_of("case", measured, dict.fromkeys(("base", "win", "loss"), 0.5), against, {"win": {"plan": "abc"}})
    assert json.loads(json.dumps(rows)) == rows
    by_name = {r["variant"]: r for r in rows}
    assert by_name["win"]["speedup"] == {"base": {"median": 2.0, "min": 2.0, "max": 2.0}}
    assert by_name["win"]["plan"] == "abc" and by_name["win"]["of_limit"] == 0.5
    assert by_name["dead"] == {"case": "case", "variant": "dead", "error": "no SMs"}
    assert losses(rows) == ["case: loss is slower than base: 0.800x (0.500 - 0.833)"]
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table("figures", rows))
    text = console.export_text()
    assert "no SMs" in text and "0.800x (0.500 - 0.833) base" in text and "2.500 (2.400 - 4.000)" in text
