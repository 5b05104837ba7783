"""YAML configs and the strategy registry: every mistake names its cause and what is valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import built

from dynaflow_serving.config import Config, load
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.policy.selector import json_schema, strategy_names
from dynaflow_serving.strategies import get_strategy
from dynaflow_serving.strategies.nanoflow import NanoFlow
from dynaflow_serving.strategies.sequential import Sequential
from dynaflow_serving.strategy.registry import register_strategy

GOOD = "strategy: nanoflow\noptions:\n  min_tokens: 64\n"

FILE_STRATEGY = """
from dynaflow_serving import OpScheduler, register_strategy
from dynaflow_serving.strategy.splitting import cut_evenly

@register_strategy("{name}")
class Mine(OpScheduler):
    def split(self, batch):
        return cut_evenly(batch, 2)

    def schedule(self, s):
        while ready := s.get_ready_ops():
            s.execute(ready[0])
"""


def test_load_takes_a_path_a_name_a_mapping_and_a_config(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(GOOD)
    from_file = load(file)
    assert from_file == load(str(file)) == load({"strategy": "nanoflow", "options": {"min_tokens": 64}})
    assert load(from_file) is from_file
    strategy = built(from_file)
    assert isinstance(strategy, NanoFlow) and strategy.options.min_tokens == 64
    assert load("nanoflow") == Config(strategy="nanoflow")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "strategy: nanoflw",
            r"unknown strategy 'nanoflw'. Did you mean 'nanoflow'\? Valid: .*dual_batch, flux, fused_norms, nanoflow",
        ),
        (
            "strategy: nanoflow\noptions: {min_token: 1}",
            r"'nanoflow': unknown option 'min_token'. Did you mean 'min_tokens'\?",
        ),
        ("strategy: nanoflow\noptions: {min_tokens: many}", r"min_tokens: .*integer.*got 'many'"),
        ("strategy: nanoflow\noptions: {cut: tokn}", r"cut: .*'request' or 'token'.*got 'tokn'"),
        ("strategy: nanoflow\noptions: {min_tokens: 0}", r"min_tokens: .*greater than or equal to 1.*got 0"),
        (
            "strategy: nanoflow\noption: {}",
            r"unknown option 'option'. Did you mean 'options'\? Valid: capture, check, executor, fallback",
        ),
        ("strategy: nanoflow\nexecutor: gpu", r"executor: .*'auto', 'sequential', 'cpu' or 'cuda'.*got 'gpu'"),
        ("strategy: 3", r"strategy: .*string.*got 3"),
        ("options: {}", r"'strategy' is missing. Valid: capture, check, executor, fallback, graph, max_graphs"),
        ("strategy: nanoflow\ngraph: on", r"graph: .*'off' or 'whole'.*got True"),
        ("strategy: nanoflow\nmax_graphs: 0", r"max_graphs: .*greater than or equal to 1.*got 0"),
        ("strategy: nanoflow\nstreams: {compute: {priority: -1}}", r"'compute' is the caller's own"),
        ("strategy: nanoflow\nstreams: {network: {sm_share: 1}}", r"streams.network.sm_share: .*less than 1.*got 1"),
        (
            "strategy: nanoflow\nstreams: {network: {prio: -1}}",
            r"unknown option 'streams.network.prio'.*Valid: priority, sm_share",
        ),
        (
            "strategy: nanoflow\nstreams: {network: {sm_share: 0.2, priority: -1}}",
            r"streams.network: .*give priority or sm_share, not both",
        ),
        ("- a\n- b", r"must hold a mapping with at least 'strategy: NAME'"),
        ("", r"must hold a mapping"),
        ("strategy: [", r"is not valid YAML: .*line 1"),
        ("1: 2", r"a.yaml"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        built(file)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.yaml", r"config file 'missing.yaml' does not exist \(looked in /"),
        ("nanoflo", r"unknown strategy 'nanoflo'. Did you mean 'nanoflow'\?"),
        ("configs/none", r"config file 'configs/none' does not exist"),
        ("missing.py", r"strategy file 'missing.py' does not exist"),
        ({"strategy": "nanoflow", "options": 3}, r"the config: options: .*got 3"),
    ],
)
def test_mistakes_elsewhere(source: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(source)


def test_options_of_the_executor(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(GOOD + "graph: off\nstreams:\n  network: {sm_share: 0.2}\n  side: {priority: 1}\n")
    config = load(file)
    assert config.graph == "off"  # YAML reads it as a boolean
    assert (config.streams["network"].sm_share, config.streams["side"].priority) == (0.2, 1)
    assert load({"strategy": "nanoflow", "graph": "whole", "max_graphs": 3}).max_graphs == 3
    assert load(config.model_dump()) == config  # as integrations hand it to worker processes


def test_a_strategy_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FILE_STRATEGY.format(name="mine"))
    assert get_strategy(str(file)).name == "mine"
    assert built(str(file)).name == "mine"  # again: the same file, registered anew
    assert built({"strategy": str(file)}).name == "mine"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "must register one strategy, it registers 0"),
        ("def broken(:", r"bad.py.* line 1"),
        ("import no_such_module_here", "bad.py.*No module named 'no_such_module_here'"),
        (FILE_STRATEGY.format(name="nanoflow"), "two strategies are called 'nanoflow'"),
    ],
)
def test_a_bad_strategy_file(tmp_path: Path, source: str, message: str) -> None:
    file = tmp_path / "bad.py"
    file.write_text(source)
    with pytest.raises(ConfigError, match=message):
        get_strategy(str(file))
    assert get_strategy("nanoflow") is NanoFlow


def test_names_are_unique() -> None:
    assert {"dual_batch", "nanoflow", "sequential"} <= set(strategy_names())
    with pytest.raises(ConfigError, match="two strategies are called 'nanoflow'"):
        register_strategy("nanoflow")(Sequential)
    assert Sequential.name == "sequential"


def test_the_schema_describes_the_options_of_every_strategy() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(Config.model_fields)
    assert "sm_share" in schema["$defs"]["StreamOptions"]["properties"]
    described = {
        c["if"]["properties"]["strategy"]["const"]: c["then"]["properties"]["options"] for c in schema["allOf"]
    }
    assert "min_tokens" in described["nanoflow"]["properties"]
    assert described["nanoflow"]["properties"]["min_tokens"]["description"]
