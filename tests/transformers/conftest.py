"""Tiny models, and two real ranks: each scenario of `scenarios` runs in two processes over gloo."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs transformers (make env ENGINE=transformers)")

sys.path.append(str(Path(__file__).parent))  # scenarios.py is imported by its bare name, in the ranks too
import scenarios
import torch.multiprocessing as mp

from dynaflow_serving.bench.tiny_models import make_tiny_model

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: str(make_tiny_model(kind, folder)) for kind in ("llama", "qwen3", "qwen3_moe", "mixtral")}


@pytest.fixture
def two_ranks(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs a scenario on two ranks; returns what each found."""

    def run(scenario: Callable[..., Any], *arguments: Any) -> list[dict[str, Any]]:
        mp.spawn(scenarios.main, (str(tmp_path), scenario.__name__, arguments), nprocs=2)
        return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]

    return run
