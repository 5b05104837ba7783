"""The policy: what is measured is adopted or declined for the right reason, kept for what it holds, and watched."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import policy_ranks
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_support import BATCH, Engine, adopted, fixed, per_token, table_for, trial, tune, tune_until_adopted
from two_ranks import on_two_ranks

from dynaflow_serving.config import Config
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.policy import table as tables
from dynaflow_serving.policy.bucket import (
    DECODE,
    MIXED,
    PREFILL,
    TYPICAL_REQUESTS,
    Bucket,
    Limits,
    bucket_of,
    representatives,
)
from dynaflow_serving.policy.guard import COMPARED, RECHECKED, Guard
from dynaflow_serving.policy.selector import (
    COMPARING,
    FASTER_WHOLE,
    NOT_DECIDED,
    SWITCHED_OFF,
    AutoOptions,
    AutoSelector,
)
from dynaflow_serving.policy.show import as_text, log_lines
from dynaflow_serving.policy.side_effects import Facts, SideEffects
from dynaflow_serving.policy.start import start_policy
from dynaflow_serving.policy.table import Decision, Table
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.session.session import Session
from dynaflow_serving.strategy.splitting import cut_evenly

HERE = logging.getLogger("test")


# -- buckets -------------------------------------------------------------------------------------------
@given(st.lists(st.integers(1, 500), min_size=1, max_size=64), st.integers(1, 8))
def test_a_bucket_holds_its_batch(tokens: list[int], width: int) -> None:
    bucket = bucket_of(Batch(tuple(tokens), width=width))
    assert bucket.tokens / 2 < sum(tokens) * width <= bucket.tokens
    assert bucket.requests / 4 < len(tokens) <= bucket.requests
    ones = tokens.count(1) if width == 1 else 0
    assert bucket.kind == (DECODE if ones == len(tokens) else MIXED if ones else PREFILL)


@given(st.integers(2, 9000), st.integers(2, 300), st.integers(4, 5000), st.integers(600, 100_000))
def test_representatives_are_what_the_engine_can_run_one_per_bucket(
    tokens: int, requests: int, length: int, cached: int
) -> None:
    found = list(representatives(Limits(tokens, requests, length, cached)))
    for batch in found:
        assert 2 <= len(batch.tokens) <= requests and sum(batch.tokens) <= tokens
        assert max(new + old for new, old in zip(batch.tokens, batch.context, strict=True)) <= length
        assert sum(batch.tokens) + sum(batch.context) <= cached
    assert len({bucket_of(b) for b in found}) == len(found)
    decodes = [len(b.tokens) for b in found if bucket_of(b).kind == DECODE]
    far = [round(abs(math.log2(n / TYPICAL_REQUESTS))) for n in decodes]
    assert far == sorted(far)  # what serving meets most comes first


def test_many_prompts_and_few_decodes_are_a_mixed_batch_that_is_tried() -> None:
    """The first request of a burst is served alone, and decodes in the step that has the prompts of all others."""
    burst = bucket_of(Batch((1, *[96] * 29)))
    found = {bucket_of(b): b for b in representatives(Limits(tokens=4096, requests=256, length=128, cached=100_000))}
    assert burst in found and found[burst].tokens.count(1) >= 1


# -- side effects --------------------------------------------------------------------------------------
def test_side_effects_are_told_and_can_veto() -> None:
    facts = Facts({}, weight_bytes=3 << 20, collective_bytes=512, graphs=True)
    batch = Batch((30, 4))
    effects = SideEffects.of_split(batch, cut_evenly(batch, 3), facts)
    assert effects.in_words() == [
        "reads 6.0 MiB of weights again",
        "collectives of 6 KiB and more",
        "2 cuts inside a request",
        "runs without the engine's CUDA graph",
    ]
    assert effects.veto(straddle=True, min_collective_kib=0) == ""
    assert effects.veto(straddle=False, min_collective_kib=0) == "cuts inside 2 requests (straddle: false)"
    assert "would move 6 KiB, under 8 KiB" in effects.veto(straddle=True, min_collective_kib=8)


def test_a_veto_is_a_verdict_and_effects_are_part_of_the_reason() -> None:
    engine = Engine(per_token, min_collective_kib=4)
    engine.facts = Facts({}, weight_bytes=5 << 20, collective_bytes=64)
    (decision,) = tune(engine).decisions
    assert decision.trials[0].verdict == "a collective would move 2 KiB, under 4 KiB" and not decision.candidate
    engine = Engine(per_token)
    engine.facts = Facts({}, weight_bytes=5 << 20)
    assert "reads 5.0 MiB of weights again" in tune(engine).decisions[0].reason


# -- serving by the table ------------------------------------------------------------------------------
def test_a_step_is_looked_up_and_all_ranks_look_up_the_same() -> None:
    auto = AutoSelector()
    declined = Decision(**bucket_of(Batch((1, 1)))._asdict(), trials=[trial(0.5)])
    auto.serve_by(table_for(adopted(), declined), Session(auto, Config(strategy="auto")))
    assert auto.split(BATCH).reason == COMPARING  # the first steps of a bucket are compared
    assert auto.split(BATCH).candidate == "nanoflow x2"
    assert auto.split(Batch((1, 1))).reason == "auto: not split is faster"
    assert auto.split(Batch((100, 100))).reason == NOT_DECIDED


def test_before_the_table_nothing_is_split() -> None:
    assert AutoSelector().split(BATCH) == Split(AutoSelector().cut(BATCH, "").micro_batches, reason=NOT_DECIDED)


def test_a_table_that_names_a_stranger_is_refused() -> None:
    with pytest.raises(ConfigError, match="the policy table names strange x9: no candidate of this config"):
        engine = Engine(per_token)
        engine.selector.serve_by(table_for(adopted(candidate="strange x9")), engine.session)


# -- the guard -----------------------------------------------------------------------------------------
@pytest.mark.alone
def test_a_candidate_that_becomes_slow_after_tuning_is_switched_off_within_its_window(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Engine(per_token, guard_window=16, retune=True)
    assert tune_until_adopted(engine).adopted
    auto = engine.selector
    auto.serve_by(table_for(adopted()), engine.session)
    for _ in range(COMPARED + 16):
        engine.step(BATCH)
    assert engine.session.counts.split == COMPARED // 2 + 16 and auto.switched_off == 0
    engine.seconds = lambda tokens: per_token(tokens) * (3 if tokens < 64 else 1)  # the lie
    with caplog.at_level(logging.WARNING):
        for _ in range(16 + COMPARED + 1):  # a window, then a comparison
            engine.step(BATCH)
    assert auto.switched_off == 1
    lines = [r.getMessage() for r in caplog.records if "switched off" in r.getMessage()]
    assert len(lines) == 1 and "nanoflow x2 is switched off for prefill, up to 64 tokens of 16 requests: 0." in lines[0]
    before = engine.session.counts.split
    engine.step(BATCH)
    assert engine.session.counts.split == before and engine.session.counts.unsplit[SWITCHED_OFF] == 2


@pytest.mark.alone
def test_a_candidate_that_was_never_as_fast_as_tuned_is_switched_off_after_the_first_comparison() -> None:
    engine = Engine(lambda tokens: per_token(tokens) * (3 if tokens < 64 else 1))
    engine.selector.serve_by(table_for(adopted()), engine.session)
    for _ in range(COMPARED + 1):
        engine.step(BATCH)
    assert engine.selector.switched_off == 1


# -- deciding while serving ----------------------------------------------------------------------------
def served(auto: AutoSelector, batch: Batch, steps: int, seconds: dict[str, float]) -> list[str]:
    """The candidates of so many steps ("" for un-split ones), which take the seconds of their candidate, or 1."""
    assert auto.guard is not None
    ran = []
    for _ in range(steps):
        ran.append(auto.split(batch).candidate)
        auto.guard.record_step(bucket_of(batch), bool(ran[-1]), sum(batch.tokens), seconds.get(ran[-1], 1.0))
    return ran


def online(**options: Any) -> AutoSelector:
    auto = AutoSelector(AutoOptions(candidates=["nanoflow", "comm_overlap"], micro_batches=[2], online=True, **options))
    table, facts = table_for(adopted(candidate="comm_overlap x2")), Facts({}, collective_bytes=64)
    auto.serve_by(table, Session(auto, Config(strategy="auto")), facts=facts)
    return auto


def test_an_undecided_kind_of_batch_is_decided_from_live_steps(caplog: pytest.LogCaptureFixture) -> None:
    """What a neighbour runs under is tried first, and loses here; the next one wins, and the guard goes on watching."""
    auto, batch, seconds = online(), Batch((100, 100)), {"comm_overlap x2": 1.1, "nanoflow x2": 0.8}
    with caplog.at_level(logging.INFO):
        ran = served(auto, batch, 2 * COMPARED + 4, seconds)
    pairs = COMPARED // 2
    assert ran == [*["", "comm_overlap x2"] * pairs, "", *["", "nanoflow x2"] * pairs, *["nanoflow x2"] * 3]
    assert [r.getMessage() for r in caplog.records] == [
        "DynaFlow: comm_overlap x2 is not adopted for prefill, up to 256 tokens of 4 requests: 0.91x as fast as "
        "un-split steps while serving",
        "DynaFlow: nanoflow x2 is adopted for prefill, up to 256 tokens of 4 requests: 1.25x as fast as un-split steps "
        "while serving",
    ]
    seconds["nanoflow x2"] = 2.0
    assert served(auto, batch, 64 + COMPARED + 1, seconds)[-1] == "" and auto.switched_off == 1
    assert auto.split(batch).reason == SWITCHED_OFF  # and it is not tried again


def test_a_small_gain_is_none_while_serving_and_what_lost_is_not_tried_again() -> None:
    auto, batch = online(), Batch((100, 100))
    served(auto, batch, 2 * COMPARED + 2, {"comm_overlap x2": 0.99, "nanoflow x2": 0.99})
    assert auto.split(batch).reason == FASTER_WHOLE


def test_what_the_options_rule_out_is_not_tried_while_serving() -> None:
    auto = online(min_collective_kib=10)
    assert auto.split(Batch((100, 100))).reason == NOT_DECIDED  # a half would move 6 KiB
    assert auto.split(Batch((200, 200))).reason == COMPARING


BUCKET = Bucket(PREFILL, 64, 16)


def watched(steps: int, seconds: Callable[[int, bool], float]) -> tuple[list[float], int]:
    """(speed-ups at switching off, un-split steps) of so many steps that take `seconds(step, split)`."""
    off: list[float] = []
    guard, plain_steps = Guard(16, Ranks(), lambda bucket, speed_up: off.append(speed_up)), 0
    guard.watch_bucket(BUCKET, noise=0.05)
    for step in range(steps):
        plain = guard.runs_plain(BUCKET)
        if off:
            break
        plain_steps += plain
        guard.record_step(BUCKET, not plain, 60, seconds(step, not plain))
    return off, plain_steps


def test_the_guard_keeps_a_candidate_while_everything_gets_slower() -> None:
    off, plain = watched(400, lambda step, split: (1 + step / 50) * (0.9 if split else 1.0))
    assert off == [] and plain > 8  # it has compared again, for it looked slower


def test_steady_steps_are_hardly_ever_compared() -> None:
    off, plain = watched(16 * RECHECKED * 4, lambda step, split: 0.9 if split else 1.0)
    assert off == [] and plain == 4 * COMPARED // 2


def test_what_un_split_steps_have_gained_is_found_by_the_regular_comparison() -> None:
    off, _ = watched(16 * RECHECKED + 20, lambda step, split: 0.9 if split else (1.0 if step < 100 else 0.5))
    assert off == [pytest.approx(0.5 / 0.9)]


def test_time_saved_is_estimated_from_the_last_comparison() -> None:
    guard = Guard(16, Ranks(), lambda bucket, speed_up: None)
    guard.watch_bucket(BUCKET, noise=0.1)
    saved = 0.0
    for _ in range(COMPARED + 2):
        plain = guard.runs_plain(BUCKET)
        saved += guard.record_step(BUCKET, not plain, 50, 1.0 if plain else 0.8)
    assert saved == pytest.approx(2 * 0.2)  # nothing is claimed before the comparison is over
    assert guard.record_step(Bucket(DECODE, 4, 4), True, 50, 0.6) == 0.0


# -- the file ------------------------------------------------------------------------------------------
def start(engine: Engine) -> Table:
    start_policy(engine.session, engine, lambda: engine.facts, engine.ranks)
    assert engine.selector.table is not None
    return engine.selector.table


def test_a_table_is_kept_and_read_for_the_same_key_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = str(tmp_path / "deep" / "table.json")
    first = Engine(per_token, table=file)
    decided = start(first)
    assert first.ran
    again = Engine(per_token, table=file)
    assert start(again) == decided and again.ran == []
    assert (again.selector.split(BATCH).reason == COMPARING) == bool(decided.adopted)
    for change in ({"device": "elsewhere"}, {"dynaflow_serving": "0.0.1"}):
        other = Engine(per_token, table=file)
        other.facts = Facts({**other.facts.key, **change})
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            start(other)
        assert other.ran, "a stale table was used"
        (name,) = change
        assert f"is stale and not used: {name}:" in caplog.text or name in caplog.text
    (tmp_path / "deep" / "table.json").write_text("{")
    broken = Engine(per_token, table=file)
    with caplog.at_level(logging.WARNING):
        start(broken)
    assert broken.ran and "cannot be read and is not used" in caplog.text


def test_retune_measures_though_there_is_a_table(tmp_path: Path) -> None:
    file = str(tmp_path / "table.json")
    start(Engine(per_token, table=file))
    again = Engine(per_token, table=file, retune=True)
    start(again)
    assert again.ran


def test_the_default_place_depends_on_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    places = {tables.default_path({"device": d}) for d in ("a", "b", "a")}
    assert len(places) == 2 and all(p.is_relative_to(tmp_path / "dynaflow_serving" / "policy") for p in places)


def test_tuning_is_neither_counted_nor_left_behind() -> None:
    engine = Engine(per_token, retune=True)
    tune(engine)
    assert engine.session.counts.split == 0 and not engine.session.counts.unsplit


@pytest.mark.alone
def test_the_start_up_table_says_what_and_why(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(lambda tokens: per_token(tokens) if tokens > 8 else fixed(tokens), [BATCH, Batch((1, 1))])
    table = tune_until_adopted(engine)
    text, lines = as_text(table), list(log_lines(table))
    assert "1 of 2 kinds of batches are split" in lines[0] and len(lines) == 3
    assert "prefill, up to 64 tokens of 16 requests: nanoflow x2: predicted 1." in lines[1]
    for word in ("prefill", "decode", "nanoflow x2", "not split", "predicted", "measured"):
        assert word in text
    assert json.loads(table.model_dump_json())["decisions"][0]["candidate"] == "nanoflow x2"


# -- ranks ---------------------------------------------------------------------------------------------
@pytest.mark.alone
@pytest.mark.parametrize("scenario", [policy_ranks.different_tables, policy_ranks.guard_of_one_rank])
def test_two_ranks(tmp_path: Path, scenario: Callable[..., None]) -> None:
    assert on_two_ranks(scenario, tmp_path) == ["as expected"] * 2
