"""`dynaflow fastvideo` in front of a script makes the video that the script makes, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from readme import ROOT, command

from dynaflow_serving.config import load
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations.fastvideo.limits import check_arguments, check_generation

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("generate.py")
SHARED = Path(__file__).parents[1] / "shared"
GENERATIONS = [{"num_inference_steps": 8}, {"num_inference_steps": 4, "height": 48}]
GATE = "0.5"  # FastVideo leaves the second call out in the second half of the steps


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "PYTHONPATH": str(SHARED), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "GENERATIONS": json.dumps(GENERATIONS), "FASTVIDEO_CFG_GATE_STEP": GATE,
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


DYNAFLOW = (str(Path(sys.executable).with_name("dynaflow")), "fastvideo", "-c", "comm_overlap", "--")


def test_videos_are_stock_and_it_is_said_what_was_split(wan: Path, tmp_path: Path) -> None:
    stock, ours = (str(tmp_path / f"{name}.npy") for name in ("stock", "ours"))
    finished = run(str(SCRIPT), str(wan), stock)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    finished = run(*DYNAFLOW, str(SCRIPT), str(wan), ours)
    output = finished.stdout + finished.stderr
    assert finished.returncode == 0, output
    assert abs(numpy.load(stock) - numpy.load(ours)).max() < 1e-3  # of 255
    found = [int(n) for n in re.findall(r"DynaFlow: (\d+) denoising steps were split", output)]
    # The first step of each generation shows the pair, and the first one without a second call wastes it.
    assert sorted(found) == 2 * [3 + 1] + 2 * [3 + 1 + 1 + 1], output
    assert "1 not: the second call of a guidance pair came with other arguments" in output


@pytest.mark.long
def test_the_command_of_the_readme(wan: Path, tmp_path: Path) -> None:
    stock, ours = (tmp_path / f"{name}.npy" for name in ("stock", "ours"))
    assert run(str(SCRIPT), str(wan), str(stock)).returncode == 0
    words = command("dynaflow fastvideo", **{"script.py": str(SCRIPT), "ARGS": f"{wan} {ours}"})
    finished = run(DYNAFLOW[0], *words[1:])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert abs(numpy.load(stock) - numpy.load(ours)).max() < 1e-3  # of 255


def arguments(**changes: Any) -> SimpleNamespace:
    usual = {
        "training_mode": False, "num_gpus": 2, "sp_size": 2, "tp_size": 1, "distributed_executor_backend": "mp",
        "use_fsdp_inference": False, "dit_layerwise_offload": False, "inference_torch_compile": False,
        "VSA_sparsity": 0.0, "attention_backend": None,
    }  # fmt: skip
    return SimpleNamespace(**{**usual, **changes})


def test_each_argument_that_cannot_be_run_is_named_with_its_remedy() -> None:
    config = load("comm_overlap")
    check_arguments(arguments(), config)
    for name, value in {
        "training_mode": True, "sp_size": 1, "tp_size": 2, "distributed_executor_backend": "ray",
        "use_fsdp_inference": True, "dit_layerwise_offload": True, "inference_torch_compile": True,
        "VSA_sparsity": 0.5, "attention_backend": "SLA_ATTN",
    }.items():  # fmt: skip
        with pytest.raises(InactiveError) as raised:
            check_arguments(arguments(**{name: value}), config)
        assert str(raised.value).count(";") == 1, name
    with pytest.raises(InactiveError, match="enable_teacache"):
        check_generation(SimpleNamespace(enable_teacache=True))


def test_arguments_are_refused_before_ranks_start() -> None:
    from dynaflow_serving.integrations.fastvideo import activate, cuda_stand_in

    cuda_stand_in.install()
    activate("comm_overlap")
    from fastvideo import VideoGenerator

    with pytest.raises(InactiveError, match="dit_layerwise_offload moves weights"):
        VideoGenerator(arguments(dit_layerwise_offload=True), None, log_stats=False)
    with pytest.raises(InactiveError, match="activate it once"):
        activate("comm_overlap")


def test_a_script_that_is_not_there_is_one_line() -> None:
    finished = run(*DYNAFLOW, "no.py")
    assert finished.returncode == 2 and "error: the script no.py does not exist" in finished.stderr
