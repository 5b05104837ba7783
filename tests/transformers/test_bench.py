"""`dynaflow bench transformers`: two real ranks on two emulated nodes; figures, equality, prediction."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from links import why_no_link


def run(file: Path, model: str, *arguments: str) -> dict[str, Any]:
    command = [str(Path(sys.executable).with_name("dynaflow")), "bench", "transformers", "--model", model]
    command += ["--requests", "4", "--input-len", "64", "--pairs", "1", "-n", "2", "--json", str(file), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(file.read_text())
    return result


@pytest.mark.long  # ranks of the bench on two nodes are tested with torch
@pytest.mark.skipif(bool(why_no_link()), reason=why_no_link())
def test_two_nodes(tmp_path: Path, models: dict[str, str]) -> None:
    content = run(
        tmp_path / "link.json", models["llama"], "--link", "20", "--link", "0", "-s", "comm_overlap", "-s", "auto"
    )
    limited, unlimited = content["parts"]
    assert [row["strategy"] for row in limited["rows"]] == ["stock", "sequential", "comm_overlap", "auto"]
    assert all(row["equal"] for part in content["parts"] for row in part["rows"])
    assert limited["limit"]["network"] > 2 * unlimited["limit"]["network"]  # the limit is in force
    strategy, auto = limited["rows"][-2:]
    assert auto["micro_batches"] == 0 and auto["split_steps"] + sum(auto["unsplit_steps"].values()) == 1
    assert strategy["split_steps"] == 1 and "network | run" in strategy["plan"]
    assert {o["micro_batch"] for o in strategy["operators"]} == {0, 1}


def test_forward_and_backward(tmp_path: Path, models: dict[str, str]) -> None:
    content = run(tmp_path / "training.json", models["llama"], "--training", "--tensor-parallel", "2")
    (part,) = content["parts"]
    assert all(row["equal"] for row in part["rows"]) and part["rows"][-1]["split_steps"] >= 1
    assert content["pass"] == "forward and backward of 4 x 64"
