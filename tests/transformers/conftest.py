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
    """Models of one layer, for tracing takes most of the time; `two_layers` is a Llama of two."""
    folder = tmp_path_factory.mktemp("models")
    made = {kind: make_tiny_model(kind, folder, layers=1) for kind in ("llama", "qwen3", "qwen3_moe", "mixtral")}
    return {kind: str(path) for kind, path in made.items()} | {"two_layers": str(make_tiny_model("llama", folder))}
