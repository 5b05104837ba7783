"""`dynaflow bench torch`: real rank processes with a user's model, on this machine and on two emulated nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from links import why_no_link
from typer.testing import CliRunner

from dynaflow_serving.bench.rank import difference
from dynaflow_serving.cli import app
from dynaflow_serving.config import Config
from dynaflow_serving.core.parse import parse_plan, parse_program
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.integrations.base import WorkloadSettings
from dynaflow_serving.integrations.torch.workload import TorchWorkload, made_by_user

SMALL = ("--requests", "6", "--pairs", "2", "-n", "2")
MODEL = """
import os
import torch
from torch import nn
from torch.nn import functional as F

class Relu(nn.Module):
    def forward(self, x):
        return F.relu(x)  # Dynamo looks for F in the module of this file

def factory():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Relu(), nn.Linear(8, 8)), (torch.randn(6, 8),)

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

class Dying(Parallel):
    calls = 0

    def forward(self, x):
        if not torch.compiler.is_compiling():
            Dying.calls += 1
            if Dying.calls == 3 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), 9)
        return super().forward(x)

def dying():
    return Dying(), (torch.randn(6, 8),)

def mixing():
    return (lambda x: x - x.mean(0)), (torch.randn(6, 8),)

def nothing():
    return 3
"""


linked = pytest.mark.skipif(bool(why_no_link()), reason=why_no_link())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the file of `MODEL`; temporary files of this test's processes go to a folder in there."""
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def bench(folder: Path, factory: str, *arguments: str) -> tuple[int, str, str, dict[str, Any]]:
    """The exit code, stdout, stderr and the JSON of `dynaflow bench torch` with a function of `MODEL`.

    The command runs in this process, which has imported torch; its ranks do not.
    """
    file = folder / "result.json"
    words = ["bench", "torch", "--model", f"{folder / 'model.py'}:{factory}", *SMALL, "--json", str(file), *arguments]
    done = CliRunner().invoke(app, words)
    return done.exit_code, done.stdout, done.stderr, json.loads(file.read_text()) if file.exists() else {}


def left(folder: Path) -> list[str]:
    """Folders that a run has left, and its processes."""
    mine = f"TMPDIR={folder / 'temporary'}".encode()
    running = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            running += [path.parent.name] if mine in path.read_bytes().split(b"\0") else []
        except OSError:  # it has ended
            continue
    return [*running, *(path.name for path in (folder / "temporary").glob("dynaflow-*"))]


def test_a_users_model(folder: Path) -> None:
    code, stdout, stderr, content = bench(folder, "factory")
    assert code == 0, stderr
    (part,) = content["parts"]
    assert part["limit"] is None and [r["strategy"] for r in part["rows"]] == ["stock", "sequential", "comm_overlap"]
    for row in part["rows"]:
        assert row["equal"] and len(row["passes"]) == 2
        assert row["split_steps"] == (0 if row["strategy"] == "stock" else 2)
    assert content["pass"] == "forward of 6 x 96" and "comm_overlap x2" in stdout
    assert left(folder) == []


@linked
def test_two_nodes_and_the_limit(folder: Path) -> None:
    """The model ends with a collective that nobody waits for: a pass is over when its output is there."""
    file, page, program = folder / "result.json", folder / "page.html", Path(sys.executable).with_name("dynaflow")
    words = [program, "bench", "torch", "--model", f"{folder / 'model.py'}:parallel", *SMALL, "--json", file]
    # Over a link the command goes on in a namespace, which this process must not enter.
    done = subprocess.run(
        [*words, "--link", "20", "--html", page], capture_output=True, text=True, check=False, timeout=240
    )
    stdout, stderr = done.stdout, done.stderr
    assert done.returncode == 0, stderr
    content = json.loads(file.read_text())
    (part,) = content["parts"]
    assert part["link_mbit"] == 20 and part["limit"]["network"] > 0.25  # 786 kB are 0.3 s
    for row in part["rows"]:
        assert row["efficiency"] == pytest.approx(max(part["limit"].values()) / row["seconds"]["median"])
        assert row["equal"] and row["seconds"]["median"] > 0.25 and row["retransmissions"] >= 0
    assert "The network is emulated" in stdout and "20 Mbit/s: pair 2 of 2: stock" in stderr
    assert content["config"]["tcp"] == "no slow start after idle"
    assert "20 Mbit/s, ratio to stock: sequential x2 " in stdout and "Outputs equal stock's in 2 of 2 rows." in stdout
    assert page.read_text().count("one step, measured: ") == 1  # of comm_overlap, traced by rank 0
    for row in part["rows"][1:]:  # what a prediction needs
        program_text, plan = parse_program(row["program"]), parse_plan(row["plan"])
        assert plan.program == program_text.digest and plan.micro_batches == 2
        assert {o["name"] for o in row["operators"]} == set(program_text.by_name)
    assert left(folder) == []


def test_a_rank_that_dies_in_a_pass(folder: Path) -> None:
    """The other one waits for it in a collective."""
    code, _, stderr, content = bench(folder, "dying", "--strategy", "sequential", "--tensor-parallel", "2")
    assert code == 2 and not content
    assert "the process of rank 1 was killed by signal 9 during 'run'" in stderr and "Traceback" not in stderr
    assert [name for name in left(folder) if name.isdecimal()] == []  # the logs stay


def test_a_model_that_cannot_be_split_is_one_paragraph_and_leaves_nothing(folder: Path) -> None:
    code, _, stderr, content = bench(folder, "mixing")
    assert code == 2 and not content
    errors = stderr[stderr.index("dynaflow: error:") :]
    assert "cannot be split" in errors and len(errors.strip().splitlines()) == 1
    assert left(folder) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.py:nothing", r"nothing\(\) in model.py returned int"),
        ("model.py:factroy", "has no function 'factroy'. It has: Relu, factory"),
        ("model.py", "not 'model.py'"),
        ("other.py:factory", "the file other.py does not exist"),
    ],
)
def test_a_wrong_factory(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=message):
        made_by_user(name)


def test_training_has_loss_and_gradients(folder: Path) -> None:
    settings = WorkloadSettings(f"{folder}/model.py:factory", "float32", 6, 1, training=True, seed=0)
    workload = TorchWorkload(settings)
    expected = [t.clone() for t in workload.stock()]
    assert len(expected) == 5  # the loss, two weights, two biases
    side = workload.under(Config(strategy="comm_overlap", options={"micro_batches": 2, "min_tokens": 1}))
    apart, equal = difference(side.run(), expected)
    assert equal and apart < 1e-5
    assert side.session.counts.split == 2  # the forward and the backward graph


def test_outputs_that_differ_are_not_equal() -> None:
    one = [torch.tensor([1.0, 100.0])]
    assert difference([torch.tensor([1.0, 100.001])], one) == (pytest.approx(1e-5, rel=0.1), True)
    assert difference([torch.tensor([1.0, 101.0])], one)[1] is False
    assert difference([torch.tensor([1.0, float("nan")])], one)[1] is False
    assert difference([torch.zeros(3)], one) == (float("inf"), False)
    assert difference([torch.tensor([1, 2])], [torch.tensor([1, 3])])[1] is False


def test_what_a_link_needs_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = folder / "tools"
    tools.mkdir()
    monkeypatch.setattr(os, "execvp", lambda *_: pytest.fail("it goes on in a namespace"))
    monkeypatch.setenv("PATH", str(tools))
    code, _, stderr, _ = bench(folder, "factory", "--link", "100")
    assert code == 2 and "install the packages iproute2 and util-linux" in stderr
    for tool in ("nsenter", "ip", "tc", "nstat"):
        (tools / tool).symlink_to("/bin/true")
    (tools / "unshare").write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2; exit 1\n")
    (tools / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/bin")
    code, _, stderr, _ = bench(folder, "factory", "--link", "100")
    assert code == 2 and "not allowed here (unshare: unshare failed: Operation not permitted)" in stderr
    assert "user.max_user_namespaces" in stderr and "Without --link" in stderr
    assert left(folder) == []
