"""The tests of Megatron-LM run on two real ranks over gloo."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "megatron"), str(TESTS / "shared")]  # the ranks import from there, too
