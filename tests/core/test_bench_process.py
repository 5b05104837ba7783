"""The benchmark with real child processes and a fake engine in them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dynaflow_serving.bench.engines import ENGINES, Engine
from dynaflow_serving.bench.process import EngineProcess, EngineProcessError
from dynaflow_serving.bench.settings import EngineSettings, Request
from dynaflow_serving.cli import app

# The fake adds 1 to the prompt's last token for each token it makes; the variable FAKE says what it does wrong.
FAKE = """
import os, sys, time
from dynaflow_serving.bench.drivers import EngineInfo
from dynaflow_serving.errors import InactiveError

class Fake:
    def start(self, settings):
        self.dynaflow, self.fault = settings.dynaflow is not None, os.environ.get("FAKE", "")
        print("the engine says hello")
        if self.fault == "dies at start":
            print("out of luck", file=sys.stderr, flush=True)
            if os.fork() == 0:  # a worker that outlives the child and holds its pipe
                time.sleep(60)
            os._exit(3)
        if self.fault == "inactive" and self.dynaflow:
            raise InactiveError("the model cannot be split")
        self.passes = self.counted = 0
        return EngineInfo("9.9", 50, "a fake device")

    def generate(self, requests):
        self.passes += 1
        self.counted += 1
        if self.fault == "raises":
            raise RuntimeError("no memory")
        time.sleep(0.01)
        off = self.fault == "wrong and idle" and self.dynaflow and self.passes == 2
        return [[r.prompt[-1] + i + off for i in range(r.output_len)] for r in requests]

    def report(self):
        split = 0 if self.fault == "wrong and idle" else self.counted
        steps = {"split": split, "unsplit": {"a micro-batch would have under 9 tokens": 4}}
        return [{"strategy": "nanoflow", "mode": "fake", "steps": steps, "plan_hash": "abc", "programs": []}]

    def reset(self):
        self.counted = 0

    def close(self):
        pass
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine called `fake`, and a folder that looks like a model."""
    (tmp_path / "fake_driver.py").write_text(FAKE)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(ENGINES, "fake", Engine("fake_driver:Fake"))
    monkeypatch.setattr("dynaflow_serving.bench.environment.has_gpu", lambda: False)
    return tmp_path


def bench(folder: Path, *arguments: str) -> tuple[Result, dict[str, Any]]:
    path = folder / "out" / "result.json"
    shape = ["--requests", "3", "--input-len", "4", "--output-len", "4"]
    command = ["bench", "fake", "--model", str(folder), "--json", str(path), *shape, *arguments]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, command)
    return result, json.loads(path.read_text()) if path.exists() else {}


def test_happy_path(engine: Path) -> None:
    result, content = bench(engine, "--pairs", "2", "-n", "3")
    assert result.exit_code == 0, result.output
    for text in ("requests/s", "ratio, median", "tokens equal", "steps split", "under 9 tokens", "abc", "fake device"):
        assert text in result.stdout
    assert "expected to lose" in result.stdout
    assert "default of this command" in result.stderr and "pair 2 of 2: baseline" in result.stderr
    for side in ("baseline", "dynaflow"):
        assert set(content[side]) == {"requests_per_s", "output_tokens_per_s", "total_tokens_per_s"}
    assert set(content["ratio"]) == {"median", "min", "max"}
    assert content["tokens_equal"] is True
    assert content["steps"] == {"split": 2, "unsplit": {"a micro-batch would have under 9 tokens": 4}}
    assert content["plan_hash"] == "abc" and content["engine_version"] == "9.9"
    assert content["strategy"] == "nanoflow" and content["engine"] == "fake" and content["device"] == "a fake device"
    assert content["config"]["dynaflow"]["options"] == {"micro_batches": 3, "min_tokens": 1}
    assert [p["order"][0] for p in content["pairs"]] == ["baseline", "dynaflow"]
    assert {"model", "command", "date", "torch_version"} <= set(content)


def test_a_run_that_proves_nothing_fails_after_its_json(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "wrong and idle")
    result, content = bench(engine, "--pairs", "1")
    assert result.exit_code == 1
    assert "split no step" in result.stderr and "-o min_tokens=1" in result.stderr
    assert "3 of 3 requests in pair 1, the first at token 0 of request 0" in result.stderr
    assert content["tokens_equal"] is False and content["steps"]["split"] == 0
    assert len(content["failures"]) == 2


def test_an_inactive_engine_is_an_error(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "inactive")
    result, content = bench(engine)
    assert result.exit_code == 2 and not content
    assert "dynaflow: the model cannot be split" in result.stderr and "dynaflow.log" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_dead_child_is_noticed_though_its_worker_lives(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "dies at start")
    begin = time.monotonic()
    process = EngineProcess("stock", ENGINES["fake"].driver, {}, engine / "logs" / "stock.log")
    try:
        with pytest.raises(EngineProcessError) as error:
            process.start(EngineSettings(model="m"))
    finally:
        process.kill()
    assert time.monotonic() - begin < 50
    assert "the process of stock ended with exit code 3 during 'start'" in str(error.value)
    assert "out of luck" in str(error.value) and "stock.log" in str(error.value)


def test_an_exception_in_the_engine_is_told_with_the_log(engine: Path) -> None:
    process = EngineProcess("stock", ENGINES["fake"].driver, {"FAKE": "raises"}, engine / "stock.log")
    try:
        assert process.start(EngineSettings(model="m")).vocabulary == 50
        with pytest.raises(EngineProcessError, match="stock could not generate: RuntimeError: no memory"):
            process.generate([Request([1], 1)])
        assert process.report()[0].mode == "fake"  # it still answers
        process.close()
    finally:
        process.kill()
    assert "Traceback" in (engine / "stock.log").read_text()
