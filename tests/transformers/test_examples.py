"""The examples of Transformers run as a reader would run them, and print what they say."""

from __future__ import annotations

import subprocess
import sys

import pytest
from said import EXAMPLES, said_by


@pytest.mark.parametrize("name", ["transformers_tp", "transformers_training"])
def test_an_example_prints_what_it_says(name: str, models: dict[str, str]) -> None:
    file = EXAMPLES / f"{name}.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run([*torchrun, str(file), models["llama"]], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == [said_by(file)], done.stderr
