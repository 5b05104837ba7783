"""What runs in the processes of `test_session`: importable there by name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dynaflow_serving.config import Config
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.examples import example_capture
from dynaflow_serving.integrations.session import Session


def session(**options: Any) -> Session:
    config = Config(strategy="nanoflow", options={"min_tokens": 4, **options})
    return Session(config, "cpu", "test", logging.getLogger("test"))


def agree(rank: int, folder: str, micro_batches: list[int]) -> None:
    """Compare plans with the other rank over gloo; the outcome goes to a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    s = session(micro_batches=micro_batches[rank])
    s.add(example_capture("llama"))
    try:
        s.check(dist.group.WORLD)
        outcome = "agreed"
    except InactiveError as error:
        outcome = str(error)
    Path(folder, f"rank{rank}").write_text(outcome)
    dist.destroy_process_group()
