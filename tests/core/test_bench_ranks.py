"""`dynaflow bench torch`: real rank processes with a user's model, on this machine and on two emulated nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from links import why_no_link

from dynaflow_serving.bench.rank import difference
from dynaflow_serving.config import Config
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.integrations.base import WorkloadSettings
from dynaflow_serving.integrations.torch.workload import TorchWorkload, made_by_user

SMALL = ("--requests", "6", "--pairs", "2", "-n", "2")
MODEL = """
import torch
from torch import nn

def factory():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), (torch.randn(6, 8),)

class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x):
        from torch.distributed._functional_collectives import all_reduce
        return all_reduce(self.second(self.first(x)), "sum", [0, 1])

def parallel():
    torch.manual_seed(0)
    return Parallel(), (torch.randn(6, 4096, 8),)

def mixing():
    return (lambda x: x - x.mean(0)), (torch.randn(6, 8),)

def nothing():
    return 3
"""


linked = pytest.mark.skipif(bool(why_no_link()), reason=why_no_link())


def bench(folder: Path, factory: str, *arguments: str, **environment: str) -> tuple[int, str, str, dict[str, Any]]:
    """The exit code, stdout, stderr and the JSON of `dynaflow bench torch` with a function of `MODEL`."""
    model, file = folder / "model.py", folder / "result.json"
    model.write_text(MODEL)
    temporary = folder / "temporary"
    temporary.mkdir(exist_ok=True)
    done = subprocess.run(
        [str(Path(sys.executable).with_name("dynaflow")), "bench", "torch", "--model", f"{model}:{factory}",
         *SMALL, "--json", str(file), *arguments],
        env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr, json.loads(file.read_text()) if file.exists() else {}


def left(folder: Path) -> list[str]:
    """Folders that a run has left, and processes that run its model."""
    mine = str(folder / "model.py")
    running = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            running += [path.parent.name] if mine in path.read_text() else []
        except OSError:  # it has ended
            continue
    return [*running, *(path.name for path in (folder / "temporary").glob("dynaflow-*"))]


def test_a_users_model(tmp_path: Path) -> None:
    code, stdout, stderr, content = bench(tmp_path, "factory")
    assert code == 0, stderr
    (part,) = content["parts"]
    assert part["limit"] is None and [r["strategy"] for r in part["rows"]] == ["stock", "sequential", "comm_overlap"]
    for row in part["rows"]:
        assert row["equal"] and len(row["passes"]) == 2
        assert row["split_steps"] == (0 if row["strategy"] == "stock" else 2)
    assert content["pass"] == "forward of 6 x 96" and "comm_overlap x2" in stdout
    assert left(tmp_path) == []


@linked
def test_two_nodes_and_the_limit(tmp_path: Path) -> None:
    """The model ends with a collective that nobody waits for: a pass is over when its output is there."""
    code, stdout, stderr, content = bench(tmp_path, "parallel", "--link", "20")
    assert code == 0, stderr
    (part,) = content["parts"]
    assert part["link_mbit"] == 20 and part["limit"]["network"] > 0.25  # 786 kB are 0.3 s
    for row in part["rows"]:
        assert row["efficiency"] == pytest.approx(max(part["limit"].values()) / row["seconds"]["median"])
        assert row["equal"] and row["seconds"]["median"] > 0.25 and row["retransmissions"] >= 0
    assert "The network is emulated" in stdout and "20 Mbit/s: pair 2 of 2: stock" in stderr
    assert content["config"]["tcp"] == "no slow start after idle"
    assert left(tmp_path) == []


@linked
def test_a_rank_that_dies_in_a_pass(tmp_path: Path) -> None:
    model = tmp_path / "model.py"
    model.write_text(MODEL)
    command = [str(Path(sys.executable).with_name("dynaflow")), "bench", "torch", "--model", f"{model}:parallel"]
    process = subprocess.Popen(
        [*command, "--requests", "6", "--pairs", "1000", "--link", "20"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "pair 2 of" in line:
            break
    os.kill(next(pid for pid in children(process.pid) if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()), 9)
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 2
    assert "the process of rank 1 was killed by signal 9 during 'run'" in rest and "Traceback" not in rest
    assert [pid for pid in children(process.pid) if Path(f"/proc/{pid}").exists()] == []


def children(parent: int) -> list[int]:
    """The processes that a process has started."""
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def test_a_model_that_cannot_be_split_is_one_paragraph_and_leaves_nothing(tmp_path: Path) -> None:
    code, _, stderr, content = bench(tmp_path, "mixing")
    assert code == 2 and not content
    errors = stderr[stderr.index("dynaflow: error:") :]
    assert "cannot be split" in errors and len(errors.strip().splitlines()) == 1
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.py:nothing", r"nothing\(\) in model.py returned int"),
        ("model.py:factroy", "has no function 'factroy'. It has: factory"),
        ("model.py", "not 'model.py'"),
        ("other.py:factory", "the file other.py does not exist"),
    ],
)
def test_a_wrong_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        made_by_user(name)


def test_training_has_loss_and_gradients(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    settings = WorkloadSettings(f"{tmp_path}/model.py:factory", "float32", 6, 1, training=True, seed=0)
    workload = TorchWorkload(settings)
    expected = [t.clone() for t in workload.stock()]
    assert len(expected) == 5  # the loss, two weights, two biases
    side = workload.under(Config(strategy="comm_overlap", options={"micro_batches": 2, "min_tokens": 1}))
    apart, equal = difference(side.run(), expected)
    assert equal and apart < 1e-5
    assert side.session.counts.split == 1


def test_outputs_that_differ_are_not_equal() -> None:
    one = [torch.tensor([1.0, 100.0])]
    assert difference([torch.tensor([1.0, 100.001])], one) == (pytest.approx(1e-5, rel=0.1), True)
    assert difference([torch.tensor([1.0, 101.0])], one)[1] is False
    assert difference([torch.tensor([1.0, float("nan")])], one)[1] is False
    assert difference([torch.zeros(3)], one) == (float("inf"), False)
    assert difference([torch.tensor([1, 2])], [torch.tensor([1, 3])])[1] is False


def test_what_a_link_needs_is_said(tmp_path: Path) -> None:
    code, _, stderr, _ = bench(tmp_path, "factory", "--link", "100", PATH=str(tmp_path))
    assert code == 2 and "install the packages iproute2 and util-linux" in stderr
    for tool in ("nsenter", "ip", "tc", "nstat"):
        (tmp_path / tool).symlink_to("/bin/true")
    (tmp_path / "unshare").write_text(
        "#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2; exit 1\n"
    )
    (tmp_path / "unshare").chmod(0o755)
    code, _, stderr, _ = bench(tmp_path, "factory", "--link", "100", PATH=f"{tmp_path}:/bin")
    assert code == 2 and "not allowed here (unshare: unshare failed: Operation not permitted)" in stderr
    assert "user.max_user_namespaces" in stderr and "Without --link" in stderr
    assert left(tmp_path) == []
