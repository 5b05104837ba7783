"""Tiny models; each scenario of `scenarios` runs on two real ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers (make env ENGINE=transformers)")

sys.path.append(str(Path(__file__).parent))  # scenarios.py is imported by its bare name, in the ranks too

from two_ranks import preload

from dynaflow_serving.bench.tiny_models import make_tiny_model

os.environ["HF_HUB_OFFLINE"] = "1"
preload(*(f"transformers.models.{kind}.modeling_{kind}" for kind in ("llama", "mixtral", "qwen3", "qwen3_moe")))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: str(make_tiny_model(kind, folder)) for kind in ("llama", "qwen3", "qwen3_moe", "mixtral")}
