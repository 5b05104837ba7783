"""`dynaflow xdit` in front of xDiT's own runner, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
from readme import ROOT, command

from dynaflow_serving.config import load
from dynaflow_serving.errors import InactiveError

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("runner_script.py")
SHARED = Path(__file__).parents[1] / "shared"
ARGUMENTS = [
    *("--model", "tiny-wan", "--height", "32", "--width", "32", "--num_frames", "9", "--num_inference_steps", "4"),
    *("--guidance_scale", "5.0", "--seed", "42", "--attention_backend", "sdpa", "--ulysses_degree", "2"),
    *("--negative_prompt", "bad", "--prompt", "cat"),
]


OURS = ("xdit", "-c", "comm_overlap", "--")


def run(folder: Path, out: Path, *more: str, ours: Sequence[str] = OURS) -> subprocess.CompletedProcess[str]:
    """Run `dynaflow xdit` on two ranks; `ours` are its words before the runner's arguments."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    words = [*torchrun, str(SCRIPT), str(folder), str(out), *ours, *ARGUMENTS, *more]
    environment = {**os.environ, "PYTHONPATH": str(SHARED), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)


def test_the_runner_makes_the_stock_video_and_says_what_was_split(wan: Path, tmp_path: Path) -> None:
    finished = run(wan, tmp_path / "videos.npy")
    assert finished.returncode == 0, finished.stderr
    assert "DynaFlow: 3 denoising steps were split, 2 not: no guidance pair" in finished.stderr
    stock, ours = numpy.load(tmp_path / "videos.npy")
    assert abs(stock - ours).max() < 1e-5


@pytest.mark.long
def test_the_command_of_the_readme(wan: Path, tmp_path: Path) -> None:
    words = command("dynaflow xdit", MODEL="tiny-wan")
    finished = run(wan, tmp_path / "videos.npy", ours=words[words.index("xdit") :])
    assert finished.returncode == 0, finished.stderr
    stock, ours = numpy.load(tmp_path / "videos.npy")
    assert abs(stock - ours).max() < 1e-5 and "denoising steps were split" in finished.stderr


def test_what_cannot_be_run_is_refused_before_weights_load(tmp_path: Path) -> None:
    finished = run(tmp_path / "no weights here", tmp_path / "videos.npy", "--enable_sequential_cpu_offload")
    assert finished.returncode != 0
    assert "dynaflow: error" in finished.stderr, finished.stderr
    assert "enable_sequential_cpu_offload moves weights" in finished.stderr


def test_each_argument_that_cannot_be_run_is_named_with_its_remedy() -> None:
    import xfuser_loaded
    from xfuser import xFuserArgs

    from dynaflow_serving.integrations.xdit.limits import check_arguments

    assert xfuser_loaded
    config = load("comm_overlap")
    check_arguments(xFuserArgs(model="x", ulysses_degree=2), config)
    check_arguments(xFuserArgs(model="x", ring_degree=2), config)
    refused = {
        "pipefusion_parallel_degree": 2, "use_hybrid_attn_schedule": True, "cache_method": "dbcache",
        "use_fp8_comms": True, "enable_sequential_cpu_offload": True, "fully_shard_degree": 2,
        "vsa_drop_rates": [0.5], "ulysses_degree": 1, "attention_backend": "AITER_SPARGE", "use_cfg_parallel": True,
    }  # fmt: skip
    for name, value in refused.items():
        with pytest.raises(InactiveError) as raised:
            check_arguments(xFuserArgs(model="x", **{"ulysses_degree": 2, name: value}), config)
        assert str(raised.value).count(";") == 1 and "(" in str(raised.value), name
