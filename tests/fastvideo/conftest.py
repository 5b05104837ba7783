"""The tests of FastVideo start its own `VideoGenerator` with two ranks over gloo, on a tiny model that is made here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "fastvideo"), str(TESTS / "shared")]


@pytest.fixture(scope="session")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan 2.1."""
    from tiny_wan import make

    from dynaflow_serving.integrations.diffusion import cuda_stand_in

    cuda_stand_in.install()
    return make(tmp_path_factory.mktemp("wan"))
