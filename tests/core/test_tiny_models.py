"""Tiny models; making one needs transformers, which the core's environment does not have."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from dynaflow_serving.bench import tiny_models
from dynaflow_serving.bench.tiny_models import ARCHITECTURES, make_tiny_model
from dynaflow_serving.errors import ConfigError, DynaflowError
from dynaflow_serving.files import cache_directory


def test_unknown_kind_and_layers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown tiny model 'lama'. Did you mean 'llama'"):
        make_tiny_model("lama", tmp_path)
    with pytest.raises(ConfigError, match="at least one layer, not 0"):
        make_tiny_model("llama", tmp_path, layers=0)


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(DynaflowError, match=r"'transformers', which cannot be imported here.*--model"):
        make_tiny_model("llama", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def save(kind: str, layers: int, folder: Path) -> None:
        made.append((kind, layers))
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(tiny_models, "_save_model", save)
    monkeypatch.setattr(tiny_models, "_save_tokenizer", lambda folder: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = make_tiny_model("llama")
    assert first.is_relative_to(cache_directory()) and first.is_relative_to(tmp_path)
    assert make_tiny_model("llama") == first
    assert len({make_tiny_model("llama", layers=3), make_tiny_model("qwen3"), first}) == 3
    assert made == [("llama", 2), ("llama", 3), ("qwen3", 2)]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_real_model(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = make_tiny_model(kind, tmp_path, layers=1)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 1 and config["vocab_size"] == 2048
    assert {"model.safetensors", "tokenizer.json"} <= {p.name for p in folder.iterdir()}
    weights = (folder / "model.safetensors").read_bytes()
    assert (make_tiny_model(kind, tmp_path / "again", layers=1) / "model.safetensors").read_bytes() == weights
