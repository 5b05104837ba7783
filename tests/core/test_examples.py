"""examples/ run as a reader would run them, and `assert_valid`, which their tests call, finds what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from said import said_by
from test_author import InOrder

from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.strategies import build_strategy
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.strategy.splitting import cut_evenly
from dynaflow_serving.testing import assert_valid

ROOT = Path(__file__).parents[2]


def test_the_examples_pass_their_own_tests() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "examples")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["torch_compile", "own_operator", "own_kernel"])
def test_an_example_prints_what_it_says(name: str) -> None:
    file = ROOT / "examples" / f"{name}.py"
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [said_by(file)], done.stderr


def test_examples_are_short() -> None:
    lengths = {file.name: len(file.read_text().splitlines()) for file in (ROOT / "examples").glob("*.py")}
    assert len(lengths) >= 9 and max(lengths.values()) < 60, lengths


def test_the_example_of_the_documentation_is_the_file() -> None:
    source = (ROOT / "examples" / "skewed.py").read_text()
    code = source.partition('"""\n\n')[2]
    assert code in (ROOT / "docs" / "strategies" / "write-your-own.md").read_text()
    assert len(source.splitlines()) < 30


@pytest.mark.parametrize(
    "name", ["branches", "comm_overlap", "dual_batch", "nanoflow", "prefill_decode", "round_robin", "token_weave"]
)
def test_shipped_strategies_are_valid(name: str) -> None:
    assert_valid(name)


def test_sequential_is_valid_with_several_micro_batches() -> None:
    assert_valid(build_strategy("sequential", {"micro_batches": 3}))


class Wrong(InOrder):
    """Cuts a batch into too many if a request has seven tokens, as no probe has."""

    name = "wrong"

    def split(self, batch: Batch) -> Split:
        return cut_evenly(batch, 3 if 7 in batch.tokens else 2)


class Doubling(InOrder):
    name = "doubling"

    def schedule(self, s: Schedule) -> None:
        while ready := s.get_ready_ops():
            s.execute(ready[0], replace=doubled if ready[0].name.endswith("all_reduce.1") else None)


def doubled(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    return x * 4


class Lazy(InOrder):
    name = "lazy"

    def schedule(self, s: Schedule) -> None:
        s.execute(s.get_ready_ops()[0])


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Wrong(), r"strategy 'wrong' splits wrongly \(random batch \d+, Batch.*made 3 micro-batches, more than"),
        (Lazy(), r"strategy 'lazy', example 'llama', 2 micro-batches: ScheduleError: .* left \d+ operators unexecuted"),
        (
            Doubling(),
            r"strategy 'doubling', example 'llama', 2 micro-batches: the result differs from the un-split one: ",
        ),
    ],
)
def test_what_is_wrong_is_named(strategy: InOrder, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_valid(strategy)
