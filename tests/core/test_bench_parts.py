"""Pieces of the benchmark that need no process: traffic, environment, figures, verdict, page, JSON file."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dynaflow_serving.bench import sglang_driver
from dynaflow_serving.bench.engines import ENGINES, find_engine
from dynaflow_serving.bench.environment import (
    KEPT_MEMORY,
    allocator,
    cores_of_ranks,
    sglang_environment,
    usable_cores,
    vllm_environment,
)
from dynaflow_serving.bench.link import ONE_NODE
from dynaflow_serving.bench.measure import PartResult, SidePasses, differs, merged, since
from dynaflow_serving.bench.page import render
from dynaflow_serving.bench.report import conclusions, tables
from dynaflow_serving.bench.result import failures, notes, record, write_json
from dynaflow_serving.bench.runner.base import COMPUTE, NETWORK, PassResult, SideSteps
from dynaflow_serving.bench.runner.ranks import steps_of
from dynaflow_serving.bench.settings import EngineSettings, Traffic, requests_of_pass
from dynaflow_serving.bench.sides import make_sides
from dynaflow_serving.bench.vllm_driver import engine_arguments
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.session.report import StepReport, WorkerReport

STOCK, SEQUENTIAL, OVERLAP = make_sides(["comm_overlap"])
RUN: dict[str, Any] = {
    "system": "fake",
    "release": "1.0",
    "model": "m",
    "pass": "1 request",
    "machine": {"device": "test device", "gpu": 0},
    "command": "dynaflow bench fake",
    "config": {"pairs": 3},
}


def part(*overlap: float, mbit: float | None = 300.0, **changes: Any) -> PartResult:
    """A part where stock took 2 s and `comm_overlap` what is given, in each round."""
    rounds = len(overlap)
    passes: dict[str, Any] = {"steps": SideSteps(split=9, unsplit={"one request": 1}), "load": [0.0] * rounds}
    stock = SidePasses(STOCK, seconds=[2.0] * rounds, load=[0.0] * rounds)
    side = SidePasses(OVERLAP, seconds=list(overlap), **(passes | changes))
    return PartResult(mbit, [stock, side], {COMPUTE: [0.5] * rounds, NETWORK: [0.8] * rounds})


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
    assert cpu == allocator(given) | {
        "HF_HUB_OFFLINE": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": ",".join(map(str, usable_cores())),
    }
    assert sglang_environment(1, gpu=True, compiled=False, local_model=False, given={}) == {}


def test_all_sides_get_an_allocator_that_keeps_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    assert allocator(given={}) == KEPT_MEMORY
    assert "MALLOC_MMAP_MAX_" not in allocator(given={"MALLOC_MMAP_MAX_": "9"})
    monkeypatch.setattr("ctypes.util.find_library", lambda name: "libtcmalloc_minimal.so.4")
    assert allocator(given={}) == {"LD_PRELOAD": "libtcmalloc_minimal.so.4"}


def test_a_row_has_ratio_limit_and_efficiency() -> None:
    (found,) = record([part(1.0, 2.0, 4.0)], RUN)["parts"]
    assert found["link_mbit"] == 300 and found["limit"] == {"compute": 0.5, "network": 0.8}
    stock, overlap = found["rows"]
    assert stock["strategy"] == "stock" and stock["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert overlap["ratio"] == {"median": 1.0, "min": 0.5, "max": 2.0}
    assert overlap["seconds"] == {"median": 2.0, "min": 1.0, "max": 4.0}
    assert overlap["efficiency"] == pytest.approx(0.8 / 2.0)
    assert (overlap["micro_batches"], overlap["split_steps"], overlap["equal"]) == (3, 9, True)
    unlinked = part(1.0)
    unlinked.alone = {}
    assert record([unlinked], RUN)["parts"][0]["limit"] is None


def test_rows_that_show_nothing_are_failures() -> None:
    assert failures(part(1.0)) == []
    (idle,) = failures(part(1.0, steps=SideSteps(0, {"a micro-batch would have under 9 tokens": 4})))
    assert "300 Mbit/s, comm_overlap x3: no step was split" in idle and "-o min_tokens=1" in idle
    (other,) = failures(part(1.0, steps=SideSteps()))
    assert "none was counted" in other and "min_tokens" not in other
    (wrong,) = failures(part(1.0, differences=["pair 1: 2 of 4 requests"]))
    assert "differ from the stock system's: pair 1: 2 of 4 requests" in wrong and "--dtype float32" in wrong
    (ranks,) = failures(part(1.0, steps=SideSteps(3, {}, problem="The ranks report different steps")))
    assert "ranks report different" in ranks
    (gone,) = failures(part(1.0, failed=["pair 1: 3 of 9 requests failed."]))
    assert "3 of 9 requests failed" in gone
    declined = part(1.0, steps=SideSteps(0, {"auto: declined": 4}))
    declined.sides[1].side = make_sides(["auto"])[1]
    assert failures(declined) == []
    slower = part(2.2, 2.15, 2.1, steps=SideSteps(3, {}))
    slower.sides[1].side = make_sides(["auto"])[1]
    assert "auto is slower than the stock system in every round (0.93x)" in failures(slower)[0]


def test_rows_that_may_mislead_are_noted() -> None:
    assert notes(part(1.0, 1.1, 1.05)) == []
    (noisy,) = notes(part(1.0, 3.0, 1.0))
    assert "equal passes took 1.00 to 3.00 s" in noisy
    (busy,) = notes(part(1.0, load=[0.6]))
    assert "something else kept 0.6 cores busy" in busy
    (link,) = notes(part(1.0, retransmissions=500))
    assert "500 TCP segments were sent again, 0 under the stock system" in link


def test_where_outputs_differ() -> None:
    stock = PassResult(1.0, outputs=[[1, 2, 3], [4, 5, 6]])
    assert differs(stock, PassResult(1.0, outputs=[[1, 2, 3], [4, 5, 6]])) == ""
    found = differs(stock, PassResult(1.0, outputs=[[1, 2, 3], [4, 9, 6]]))
    assert found == "1 of 2 requests, the first at token 1 of request 1"
    assert "character 2 of request 0" in differs(PassResult(1.0, ["abc"]), PassResult(1.0, ["abz"]))
    assert differs(stock, PassResult(1.0, outputs=[[1, 2, 3]])) == "1 outputs instead of 2"
    assert differs(PassResult(1.0), PassResult(1.0, difference="the outputs differ")) == "the outputs differ"


def test_steps_are_counted_between_two_readings_and_compared_between_ranks() -> None:
    counted = since(SideSteps(2, {"a": 1, "b": 3}), SideSteps(5, {"a": 1, "b": 4}, "mode", "hash"))
    assert counted == SideSteps(3, {"b": 1}, "mode", "hash")
    assert steps_of([report(3, "a"), report(3, "a")]).problem == ""
    assert "different" in steps_of([report(3, "a"), report(3, "b")]).problem
    assert "different" in steps_of([report(3, "a"), report(2, "a")]).problem


def test_several_starts_are_one_result() -> None:
    one, other = part(1.0, 2.0), part(3.0, retransmissions=5, differences=["pair 1: 1 of 4 requests"])
    (both,) = merged([[one], [other]])
    assert both.sides[1].seconds == [1.0, 2.0, 3.0] and both.alone[COMPUTE] == [0.5] * 3
    assert both.sides[1].steps == SideSteps(18, {"one request": 2})
    assert both.sides[1].retransmissions == 5 and len(both.sides[1].differences) == 1


def test_the_page_and_the_table_show_all_rows() -> None:
    result = record([part(1.0, 1.0), part(4.0, 4.0, mbit=0.0)], {**RUN, "model": "<b>m</b>"})
    page = render(result)
    for text in ("fake 1.0", "comm_overlap x3", "emulated", "no limit", 'class="win"', 'class="loss"', "<svg", "limit"):
        assert text in page
    assert "<b>m</b>" not in page and "<script" not in page
    console = Console(width=200, file=io.StringIO(), force_terminal=False)
    for table in tables(result):
        console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "comm_overlap x3" in shown and "40%" in shown and "80%" in shown and "compute 0.500, network 0.800" in shown


def test_conclusions_say_gain_equality_and_where_the_policy_declined() -> None:
    (_, auto) = make_sides(["auto"])
    alone = part(2.0, 2.0, mbit=ONE_NODE)
    alone.alone = {}
    alone.sides[1] = SidePasses(auto, seconds=[2.0, 1.9], load=[0.0] * 2, steps=SideSteps(0, {"declined": 4}))
    result = record([part(1.0, 1.0), alone], RUN)
    assert conclusions(result) == [
        "300 Mbit/s, ratio to stock: comm_overlap x3 2.00 (2.00 - 2.00), 80% of limit.",
        "one node, ratio to stock: auto 1.03 (1.00 - 1.05), which split no step.",
        "Outputs equal stock's in 2 of 2 rows.",
    ]
    assert result["failures"] == [] and "one node" in render(result)


def test_json_is_complete_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_json(path, record([part(1.0)], RUN))
    assert json.loads(path.read_text())["parts"][0]["rows"][1]["ratio"]["median"] == 2.0
    with pytest.raises(TypeError):
        write_json(path, {"not": object()})
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]
    assert json.loads(path.read_text())["system"] == "fake"


def test_engines() -> None:
    assert find_engine("vllm") is ENGINES["vllm"]
    with pytest.raises(ConfigError, match=r"unknown engine 'vlm'. Did you mean 'vllm'"):
        find_engine("vlm")
    assert find_engine("vllm").compiled(True) and not find_engine("sglang").compiled(None)
    with pytest.raises(ConfigError, match="not for sglang"):
        find_engine("sglang").compiled(False)
