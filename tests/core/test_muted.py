"""Collectives that return at once and are noted, and what was noted, sent again; in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynaflow_serving.bench.muted import Replay, messages, prepare

SCRIPT = """
import torch, torch.distributed as dist
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
x = torch.arange(4.0)
dist.all_reduce(x)
parts = [torch.zeros(4), torch.zeros(4)]
dist.all_gather(parts, x)  # a stock one would refuse two parts of one rank
whole = torch.zeros(8)
dist.all_gather_into_tensor(whole, x)
dist.gather(x, [torch.zeros(4)])
half = torch.zeros(2)
dist.reduce_scatter_tensor(half, x)
control = torch.tensor([7])
dist.all_reduce(control)  # of integers: not muted
compiled = torch.compile(lambda y: (dist.all_reduce(y), y + 1)[1], backend="eager", fullgraph=True)
assert torch.equal(compiled(x), x + 1)
print(parts[1].tolist(), whole.tolist(), half.tolist(), control.item())
"""


def test_collectives_are_noted_and_leave_outputs_of_the_right_shape(tmp_path: Path) -> None:
    environment = {**os.environ, **prepare(tmp_path / "muted")}
    script = "import sys\n" + SCRIPT
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "meeting")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    x = [0.0, 1.0, 2.0, 3.0]
    assert done.stdout == f"{x} {x + x} {x[:2]} 7\n"
    noted = [("all_reduce", 16), *[("all_gather", 16)] * 3, ("reduce_scatter", 16), ("all_reduce", 16)]
    assert messages(tmp_path / "muted") == noted


def test_nothing_was_noted(tmp_path: Path) -> None:
    assert messages(tmp_path) == []


def test_what_was_noted_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    threads, replay = torch.get_num_threads(), Replay()
    try:
        replay.start()
        assert replay.run([("all_reduce", 4096), ("all_gather", 4096), ("reduce_scatter", 4096)]) > 0
    finally:
        replay.close()
        torch.set_num_threads(threads)
