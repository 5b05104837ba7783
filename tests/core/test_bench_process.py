"""The benchmark with real child processes and a fake engine in them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dynaflow_serving.bench.engines import ENGINES, Engine
from dynaflow_serving.bench.process import EngineProcess, EngineProcessError, ask_all
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
        if self.fault == "dies later":
            time.sleep(0.5)
            os._exit(3)
        time.sleep(0.01)
        off = self.fault == "wrong and idle" and self.dynaflow and self.passes == 2
        return [[r.prompt[-1] + i + off for i in range(r.output_len)] for r in requests]

    def report(self):
        split = 0 if self.fault == "wrong and idle" else self.counted
        steps = {"split": split, "unsplit": {"a micro-batch would have under 9 tokens": 4 * self.counted}}
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
    shape = ["--requests", "3", "--input-len", "4", "--output-len", "4", "-o", "min_tokens=1"]
    command = ["bench", "fake", "--model", str(folder), "--json", str(path), *shape, *arguments]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, command)
    return result, json.loads(path.read_text()) if path.exists() else {}


def test_happy_path(engine: Path) -> None:
    page = engine / "page.html"
    result, content = bench(engine, "--pairs", "2", "-n", "3", "--html", str(page))
    assert result.exit_code == 0, result.output
    for text in ("ratio to stock", "equal", "steps split", "under 9 tokens", "fake device", "expected to lose"):
        assert text in result.stdout
    assert "strategy comm_overlap: micro_batches=3" in result.stderr and "pair 2 of 2: stock" in result.stderr
    assert content["system"] == "fake" and content["release"] == "9.9"
    (part,) = content["parts"]
    assert part["link_mbit"] == 0 and part["limit"] is None
    assert [row["strategy"] for row in part["rows"]] == ["stock", "sequential", "comm_overlap"]
    for row in part["rows"]:
        assert set(row["ratio"]) == set(row["seconds"]) == {"median", "min", "max"}
        assert row["equal"] is True and len(row["passes"]) == 2
    strategy = part["rows"][-1]
    assert strategy["split_steps"] == 2 and strategy["unsplit_steps"] == {"a micro-batch would have under 9 tokens": 8}
    assert strategy["plan_hash"] == "abc" and strategy["options"] == {"micro_batches": 3, "min_tokens": 1}
    assert content["failures"] == [] and {"model", "command", "date", "machine", "config"} <= set(content)
    assert "comm_overlap x3" in page.read_text()


def test_one_node_stands_beside_two(engine: Path) -> None:
    for words, message in (((), "add --link MBIT"), (("--link", "300"), "add --strategy auto")):
        result, _ = bench(engine, "--one-node", *words)
        assert result.exit_code == 2 and message in result.stderr


def test_every_side_takes_its_turn_in_every_round(engine: Path) -> None:
    result, _ = bench(engine, "--pairs", "2")
    turns = [line for line in result.stderr.splitlines() if "warm-up" in line or "pair" in line]
    names = ["stock", "sequential x3", "comm_overlap x3"]
    assert turns == [
        *(f"warm-up: {name}" for name in reversed(names)),
        *(f"pair 1 of 2: {name}" for name in names),
        *(f"pair 2 of 2: {name}" for name in reversed(names)),
    ]


def test_a_run_that_proves_nothing_fails_after_its_json(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "wrong and idle")
    result, content = bench(engine, "--pairs", "1")
    assert result.exit_code == 1
    assert "no step was split" in result.stderr and "-o min_tokens=1" in result.stderr
    assert "pair 1 of 1: 3 of 3 requests, the first at token 0 of request 0" in result.stderr
    rows = content["parts"][0]["rows"]
    assert [row["equal"] for row in rows] == [True, False, False] and rows[1]["split_steps"] == 0
    assert len(content["failures"]) == 4  # of each side under DynaFlow


def test_an_inactive_engine_is_an_error(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "inactive")
    result, content = bench(engine)
    assert result.exit_code == 2 and not content
    assert "sequential x3: the model cannot be split" in result.stderr and "sequential-x3.log" in result.stderr
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


def test_of_two_that_fail_the_dead_one_is_told(engine: Path) -> None:
    """The other one fails because it waited for the dead one, and says so first."""
    faults = ("raises", "dies later")
    processes = [EngineProcess(f, ENGINES["fake"].driver, {"FAKE": f}, engine / f"{f}.log") for f in faults]
    try:
        for process in processes:
            process.start(EngineSettings(model="m"))
        with pytest.raises(EngineProcessError, match="the process of dies later ended with exit code 3"):
            ask_all(processes, "generate", requests=[])
    finally:
        for process in processes:
            process.kill()
