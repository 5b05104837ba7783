"""The tests of xDiT run on two real ranks over gloo, with tiny models that are made here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "xdit"), str(TESTS / "shared")]  # the ranks import from there, too
os.environ.setdefault("XDIT_LOGGING_LEVEL", "ERROR")

from two_ranks import preload  # noqa: E402

preload("xfuser_loaded")


@pytest.fixture(scope="session")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan 2.1."""
    return _made(tmp_path_factory.mktemp("wan"), second=False)


@pytest.fixture(scope="session")
def wan_2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan 2.2, which has two transformers."""
    return _made(tmp_path_factory.mktemp("wan_2"), second=True)


def _made(folder: Path, second: bool) -> Path:
    import xfuser_loaded
    from tiny_wan import make

    assert xfuser_loaded
    return make(folder, second)
