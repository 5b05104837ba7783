"""The examples of Transformers run as a reader would run them, and print what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["transformers_tp", "transformers_training"])
def test_an_example_prints_what_it_says(name: str, models: dict[str, str]) -> None:
    file = EXAMPLES / f"{name}.py"
    said = re.search(r"^It prints: (.*)$", file.read_text(), re.MULTILINE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run([*torchrun, str(file), models["llama"]], capture_output=True, text=True, check=False)
    assert said is not None and done.stdout.splitlines()[-1:] == [said[1]], done.stderr
