"""The parts of the benchmark of servers: loads, metrics, verdicts, and the command lines of both tools."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dynaflow_serving.bench.report import number, spread
from dynaflow_serving.bench.serving.loads import LONGEST, SHORTEST, Load, ShareGPT, lengths, make_loads, seed_of_pass
from dynaflow_serving.bench.serving.record import LOSS, METRICS, NOISE, WIN, figure_of, noise_note, verdict
from dynaflow_serving.bench.serving.run import ServedPass
from dynaflow_serving.bench.serving.server_metrics import (
    ServedSteps,
    read_metrics,
    reason_not_engaged,
    reason_not_stock,
    steps_between,
)
from dynaflow_serving.bench.serving.sglang_tool import SGLangTool
from dynaflow_serving.bench.serving.tool import ClientJob, PassFigures, ServingTool, flags
from dynaflow_serving.bench.serving.vllm_tool import VLLMTool
from dynaflow_serving.bench.settings import EngineSettings

INF = float("inf")


RANDOM = Load("random", 8, 128, 64, INF)
PROMETHEUS = """
# TYPE dynaflow_steps_total counter
dynaflow_steps_total{strategy="nanoflow",reason=""} 7
dynaflow_steps_total{strategy="none",reason="one request"} 3
dynaflow_steps_total{strategy="none",reason="a micro-batch would have under 9 tokens"} 1
# TYPE dynaflow_steps_created gauge
dynaflow_steps_created{strategy="nanoflow",reason=""} 1.7e9
# TYPE dynaflow_overlap_ratio gauge
dynaflow_overlap_ratio 0.25
vllm:tokens_total{model_name="/cache/dynaflow_serving/llama"} 9
"""


def test_loads() -> None:
    loads = make_loads(["random", "sharegpt", "random"], [8.0, INF], 16, 128, 64)
    assert [load.name for load in loads] == [
        "random, 8/s",
        "random, all at once",
        "sharegpt, 8/s",
        "sharegpt, all at once",
    ]
    assert loads[1].facts()["rate"] == "inf" and json.dumps(loads[0].facts(), allow_nan=False)
    seeds = {seed_of_pass(base, load, number) for base in (0,) for load in range(9) for number in range(9)}
    assert len(seeds) == 81


def test_sharegpt_has_its_lengths(tmp_path: Path) -> None:
    load = Load("sharegpt", 4000, 128, 64, INF)
    drawn = lengths(load, 5)
    assert drawn == lengths(load, 5) != lengths(load, 6)
    for mean, column in zip((128, 64), zip(*drawn)):
        assert all(SHORTEST <= n <= LONGEST for n in column)
        assert sum(column) / len(column) == pytest.approx(mean, rel=0.1)
        middle = sorted(column)[len(column) // 2]
        assert middle == pytest.approx(mean / 2.718**0.5, rel=0.1)  # log-normal: the median is below the mean
    words = re.compile(r"\S+\s*")
    text = " ".join(f"word{i}" for i in range(3000))
    maker = ShareGPT(text, lambda text: [match.span() for match in words.finditer(text)])
    small = Load("sharegpt", 20, 100, 50, INF)
    maker.write(tmp_path / "a.json", small, 1)
    content = json.loads((tmp_path / "a.json").read_text())
    turns = [[turn["value"] for turn in one["conversations"]] for one in content]
    assert [(len(words.findall(a)), len(words.findall(b))) for a, b in turns] == lengths(small, 1)
    assert [turn["from"] for turn in content[0]["conversations"]] == ["human", "gpt"]


def test_metrics() -> None:
    found = read_metrics(PROMETHEUS)
    assert {s.name for s in found} == {"dynaflow_steps_total", "dynaflow_overlap_ratio"}
    steps = steps_between([], found)
    assert steps == ServedSteps({"nanoflow": 7}, {"one request": 3, "a micro-batch would have under 9 tokens": 1})
    later = read_metrics(PROMETHEUS.replace('reason=""} 7', 'reason=""} 9'))
    assert steps_between(found, later) == ServedSteps({"nanoflow": 2}, {})
    assert reason_not_stock([]) == "" and "dynaflow_overlap_ratio" in reason_not_stock(found)
    assert read_metrics("vllm:x_total{reason='dynaflow_steps_total'} 1".replace("'", '"')) == []


def test_engagement() -> None:
    idle = ServedSteps({}, {"auto: not split is faster": 5})
    assert reason_not_engaged("nanoflow", ServedSteps({"nanoflow": 1}, {})) == ""
    assert "split no step" in reason_not_engaged("nanoflow", idle) and "5 because: auto" in reason_not_engaged(
        "nanoflow", idle
    )
    assert reason_not_engaged("auto", idle) == ""
    assert "counted no step" in reason_not_engaged("auto", ServedSteps({}, {}))


def test_the_middle_of_two_gains_favours_no_side() -> None:
    figures: dict[str, Any] = {"completed": 1, "failed": 0, "seconds": 1.0, "input_tokens": 1, "output_tokens": 1}
    figures |= {"requests_per_s": 1.0, "total_tokens_per_s": 1.0, "errors": {}}
    stock, half, double = (
        PassFigures(**figures, output_tokens_per_s=speed, latencies={"ttft median": speed or None})
        for speed in (4.0, 2.0, 8.0)
    )
    passes = [ServedPass(0, pair, "baseline", stock, ServedSteps({}, {}), []) for pair in (1, 2)]
    passes += [
        ServedPass(0, pair, "dynaflow", ours, ServedSteps({}, {}), []) for pair, ours in ((1, half), (2, double))
    ]
    for metric in (m for m in METRICS if m.key in ("output_tokens_per_s", "ttft median")):
        assert figure_of(metric, passes)["gain"] == {"median": 1.0, "min": 0.5, "max": 2.0}


def test_verdicts_and_numbers() -> None:
    assert verdict({"median": 1.1, "min": 1.01, "max": 1.2}) == WIN
    assert verdict({"median": 0.9, "min": 0.8, "max": 0.99}) == LOSS
    assert verdict({"median": 1.1, "min": 0.99, "max": 1.2}) == NOISE
    assert verdict(None) == ""
    figure = {"key": "output_tokens_per_s", "label": "Output throughput", "noisy": False}
    assert noise_note({"name": "random", "figures": [figure]}) == ""
    figure["noisy"] = True
    assert "in: Output throughput. Something else" in noise_note({"name": "random", "figures": [figure]})
    assert [number(x) for x in (4778.4, 100.0, 36.12, 1.5, 0.8321)] == ["4,778", "100", "36.1", "1.50", "0.832"]
    assert spread({"median": 0.8321, "min": 0.8, "max": 12.0}, ratio=True) == "0.832 (0.800 - 12.0)"


@pytest.mark.parametrize("tool", [VLLMTool(), SGLangTool()], ids=["vllm", "sglang"])
def test_servers_differ_in_dynaflow_alone(tool: ServingTool) -> None:
    settings = EngineSettings(model="m", compiled=False, tensor_parallel=2, max_batched_tokens=96)
    asked = EngineSettings(**{**settings.__dict__, "dynaflow": {"strategy": "nanoflow"}})
    for gpu in (True, False):
        stock, ours = tool.server(settings, 80, gpu=gpu), tool.server(asked, 80, gpu=gpu)
        assert ours[: len(stock)] == stock
        name, value = ours[len(stock) :]
        assert name in ("--additional-config", "--json-model-override-args")
        assert json.loads(value) == {"dynaflow": {"strategy": "nanoflow"}}
        assert "--port 80" in " ".join(stock) and "--host 127.0.0.1" in " ".join(stock)
    with_defaults = " ".join(tool.server(EngineSettings(model="m"), 80, gpu=True))
    assert "compilation" not in with_defaults and "batched" not in with_defaults and "chunked" not in with_defaults


@pytest.mark.parametrize("tool", [VLLMTool(), SGLangTool()], ids=["vllm", "sglang"])
def test_load_generators(tool: ServingTool, tmp_path: Path) -> None:
    job = ClientJob("m", 80, Load("random", 8, 128, 64, 4.0), 7, None, tmp_path / "r.json")
    command = " ".join(tool.client(job))
    assert "--num-prompts 8" in command and "--request-rate 4.0" in command and "--seed 7" in command
    file = ClientJob("m", 80, Load("sharegpt", 8, 128, 64, INF), 7, tmp_path / "d.json", tmp_path / "r.json")
    assert f"--dataset-name sharegpt --dataset-path {tmp_path / 'd.json'}" in " ".join(tool.client(file))
    assert "--request-rate inf" in " ".join(tool.client(file))


@pytest.mark.parametrize(
    ("tool", "total", "e2e"),
    [(VLLMTool(), "total_token_throughput", "e2el"), (SGLangTool(), "total_throughput", "e2e_latency")],
    ids=["vllm", "sglang"],
)
def test_results_of_both_tools_become_the_same_record(tool: ServingTool, total: str, e2e: str) -> None:
    content: dict[str, Any] = {
        "completed": 7, "duration": 2.0, "total_input_tokens": 90, "total_output_tokens": 40, "request_throughput": 3.5,
        "output_throughput": 20.0, total: 65.0, "errors": ["", "Traceback (most ...)\n  File\nOSError: x\n"],
    }  # fmt: skip
    for index, name in enumerate(("ttft", "tpot", "itl", e2e)):
        content |= {f"{how}_{name}_ms": 10.0 * index + i for i, how in enumerate(("mean", "median", "p99"))}
    figures = tool.figures(json.dumps(content), RANDOM)
    assert (figures.completed, figures.failed, figures.total_tokens_per_s) == (7, 1, 65.0)
    assert figures.errors == {"OSError: x": 1}
    assert figures.latencies["ttft mean"] is None  # 0: nothing was measured
    assert (figures.latencies["itl p99"], figures.latencies["e2e median"]) == (22.0, 31.0)


def test_flags() -> None:
    arguments = {"tp_size": 2, "sleep_on_idle": True, "config": {"a": 1}, "rate": INF}
    assert flags(arguments) == ["--tp-size", "2", "--sleep-on-idle", "--config", '{"a": 1}', "--rate", "inf"]
