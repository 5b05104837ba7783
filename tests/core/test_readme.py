"""The README is true: its strategy loads, splits, and its plans verify; its line for PyTorch runs; its files exist."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from readme import ROOT, blocks, command, line_with
from support import example

import dynaflow_serving
from dynaflow_serving.capture.examples import EXAMPLES
from dynaflow_serving.config import load
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.policy.selector import build_selector


def test_strategy_of_the_readme(tmp_path: Path) -> None:
    (source,) = [block for block in blocks("python") if "@register_strategy" in block]
    assert len([line for line in source.splitlines() if line.strip()]) <= 30
    file = tmp_path / "lock_step.py"
    file.write_text(source)
    strategy = build_selector(load({"strategy": str(file), "options": {"min_tokens": 2}})).strategy("")
    assert len(strategy.split(Batch((3, 3))).micro_batches) == 2
    for name in EXAMPLES:
        program = example(name).program
        verify(program, lower(strategy.record(program, 2), "lock_step"))


def test_line_for_pytorch() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    names = {"dynaflow_serving": dynaflow_serving, "model": model}
    exec(line_with("dynaflow_serving.compile("), names)
    x = torch.ones(32, 8)
    with torch.no_grad():
        torch.testing.assert_close(names["model"](x), model(x))
        assert names["model"].session.report().steps.split == 1


def test_configs_and_commands_exist() -> None:
    configs = set(re.findall(r"configs/\S+?\.yaml", "".join(blocks("console") + blocks("python"))))
    assert len(configs) >= 6 and all((ROOT / config).is_file() for config in configs)
    targets = {command(f"make {name}")[1] for name in ("bench", "test")}
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
