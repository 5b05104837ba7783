"""Pieces of the benchmark that need no process: traffic, environment, figures, verdict, JSON file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dynaflow_serving.bench import sglang_driver
from dynaflow_serving.bench.compare import BASELINE, DYNAFLOW, Engagement, Mismatch, OfflineResult, PassPair
from dynaflow_serving.bench.engines import ENGINES, find_engine
from dynaflow_serving.bench.environment import (
    KEPT_MEMORY,
    cores_of_ranks,
    sglang_environment,
    usable_cores,
    vllm_environment,
)
from dynaflow_serving.bench.result import failures, noise, ratios, record, throughput, write_json
from dynaflow_serving.bench.settings import EngineSettings, Traffic, requests_of_pass
from dynaflow_serving.bench.vllm_driver import engine_arguments
from dynaflow_serving.config import load
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.session.report import StepReport, WorkerReport

ENGAGED = Engagement("nanoflow", "test", 9, {"one request": 1}, "abc", True)


def pair(baseline: float, dynaflow: float) -> PassPair:
    return PassPair((BASELINE, DYNAFLOW), {BASELINE: baseline, DYNAFLOW: dynaflow})


def comparison(pairs: list[PassPair], **changes: Any) -> OfflineResult:
    return replace(OfflineResult("1.0", "test device", Traffic(4, 8, 4), pairs, [], ENGAGED), **changes)


def report(split: int, plan_hash: str) -> WorkerReport:
    steps = StepReport(split=split, unsplit={"rare": 1, "often": 5})
    return WorkerReport(strategy="s", mode="m", steps=steps, plan_hash=plan_hash)


def test_passes_have_equal_lengths_and_new_tokens() -> None:
    traffic = Traffic(requests=10, input_len=20, output_len=6, seed=3)
    first, again, second = (requests_of_pass(traffic, 100, n) for n in (1, 1, 2))
    assert first == again
    assert [len(r.prompt) for r in first] == [len(r.prompt) for r in second]
    assert first != second
    assert all(10 <= len(r.prompt) <= 30 and 3 <= r.output_len <= 9 for r in first)
    assert all(0 <= token < 100 for r in first for token in r.prompt)
    assert traffic.longest == max(len(r.prompt) + r.output_len for r in first)
    assert Traffic(3, 1, 1).lengths() == [(1, 1)] * 3


def test_environment_leaves_what_the_user_set() -> None:
    given = {"VLLM_CPU_KVCACHE_SPACE": "8"}
    cpu = vllm_environment(1, gpu=False, compiled=False, local_model=True, given=given)
    assert "VLLM_CPU_KVCACHE_SPACE" not in cpu
    assert cpu["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert cpu["HF_HUB_OFFLINE"] == "1" and cpu["VLLM_USE_AOT_COMPILE"] == "0"
    gpu = vllm_environment(1, gpu=True, compiled=True, local_model=False, given={})
    assert gpu == {"VLLM_NO_USAGE_STATS": "1"}


def test_cores_are_shared_out_to_ranks() -> None:
    assert cores_of_ranks([0, 1], 2) == "0|1"
    assert cores_of_ranks([0, 2, 4, 6, 8], 2) == "0,2|4,6"
    with pytest.raises(ConfigError, match="needs 4 cores; this process has 2"):
        cores_of_ranks([0, 1], 4)


def test_vllm_arguments_differ_in_additional_config_only() -> None:
    settings = EngineSettings(model="m", compiled=False, max_model_len=64)
    stock = engine_arguments(settings)
    dynaflow = engine_arguments(replace(settings, dynaflow={"strategy": "nanoflow"}))
    assert dynaflow.pop("additional_config") == {"dynaflow": {"strategy": "nanoflow"}}
    assert dynaflow == stock
    assert stock["compilation_config"]["backend"] == "eager"
    assert "compilation_config" not in engine_arguments(EngineSettings(model="m"))


def test_sglang_arguments_differ_in_the_model_overrides_only() -> None:
    settings = EngineSettings(model="m", tensor_parallel=2, max_model_len=64, max_batched_tokens=96)
    stock = sglang_driver.engine_arguments(settings, gpu=False)
    asked = replace(settings, dynaflow={"strategy": "nanoflow"})
    dynaflow = sglang_driver.engine_arguments(asked, gpu=False)
    assert dynaflow.pop("json_model_override_args") == '{"dynaflow": {"strategy": "nanoflow"}}'
    assert dynaflow == stock
    assert (stock["tp_size"], stock["context_length"], stock["chunked_prefill_size"]) == (2, 64, 96)
    assert "device" not in sglang_driver.engine_arguments(settings, gpu=True)


def test_sglang_environment() -> None:
    given = {"OMP_NUM_THREADS": "2"}
    cpu = sglang_environment(1, gpu=False, compiled=False, local_model=True, given=given)
    assert cpu == KEPT_MEMORY | {
        "HF_HUB_OFFLINE": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": ",".join(map(str, usable_cores())),
    }
    assert sglang_environment(1, gpu=True, compiled=False, local_model=False, given={}) == {}


def test_figures() -> None:
    result = comparison([pair(1.0, 2.0), pair(2.0, 2.0), pair(4.0, 2.0)])
    assert ratios(result) == {"median": 1.0, "min": 0.5, "max": 2.0}
    prompt, output = (sum(column) for column in zip(*result.traffic.lengths()))
    assert throughput(result, BASELINE) == {
        "requests_per_s": 2.0,
        "output_tokens_per_s": output / 2,
        "total_tokens_per_s": (prompt + output) / 2,
    }


def test_verdict() -> None:
    pairs = [pair(1.0, 1.0)]
    assert failures(comparison(pairs)) == []
    (idle,) = failures(comparison(pairs, engagement=replace(ENGAGED, split=0)))
    assert "split no step" in idle and "1 because: one request" in idle and "min_tokens" in idle
    (other,) = failures(comparison(pairs, engagement=replace(ENGAGED, split=0, unsplit={})))
    assert "none was counted" in other and "min_tokens" not in other
    (differs,) = failures(comparison(pairs, mismatches=[Mismatch(0, 2, 1, 5)]))
    assert "2 of 4 requests in the warm-up, the first at token 5 of request 1" in differs
    (ranks,) = failures(comparison(pairs, engagement=replace(ENGAGED, ranks_agree=False)))
    assert "ranks" in ranks


def test_noise_is_named() -> None:
    assert noise(comparison([pair(1.0, 2.0), pair(1.1, 2.1)])) == ""
    assert "dynaflow took 1.00 to 3.00 s" in noise(comparison([pair(1.0, 1.0), pair(1.1, 3.0)]))


def test_engagement_compares_ranks() -> None:
    same = Engagement.from_reports([report(3, "a"), report(3, "a")])
    assert same.ranks_agree and same.split == 3
    assert list(same.unsplit) == ["often", "rare"]
    assert not Engagement.from_reports([report(3, "a"), report(3, "b")]).ranks_agree
    assert not Engagement.from_reports([report(3, "a"), report(2, "a")]).ranks_agree


def test_json_is_complete_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_json(path, record(comparison([pair(1.0, 1.0)]), {"engine": "fake"}))
    assert json.loads(path.read_text())["ratio"]["median"] == 1.0
    with pytest.raises(TypeError):
        write_json(path, {"not": object()})
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]
    assert json.loads(path.read_text())["engine"] == "fake"


def test_engines_and_the_default_config() -> None:
    from dynaflow_serving.bench.defaults import DEFAULT_CONFIG

    assert find_engine("vllm") is ENGINES["vllm"]
    with pytest.raises(ConfigError, match=r"unknown engine 'vlm'. Did you mean 'vllm'"):
        find_engine("vlm")
    assert find_engine("vllm").compiled(True) and not find_engine("sglang").compiled(None)
    with pytest.raises(ConfigError, match="not for sglang"):
        find_engine("sglang").compiled(False)
    assert load(DEFAULT_CONFIG).options == {"micro_batches": 2, "min_tokens": 1}
