"""`dynaflow megatron` around an unchanged script, on two real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scenarios import launched
from two_ranks import on_two_ranks

pytestmark = pytest.mark.engine

SCRIPT = """
import sys
from dataclasses import replace
from beside_the_script import BATCH
from scenarios import TP
from training import make_model, train

assert __name__ == "__main__" and sys.argv[1:] == ["--lr", "1"]
setup = replace(TP, batch=BATCH)
model = make_model(setup)
losses = train(model, setup, 2).losses
assert model.decoder.forward is not type(model.decoder).forward
"""


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (4, "2 steps of decoders were split"),
        (1, "error: DynaFlow was requested (strategy comm_overlap), but 0 steps of decoders were split, 2 not: one"),
    ],
)
def test_an_unchanged_script_trains_under_a_strategy(tmp_path: Path, batch: int, said: str) -> None:
    (tmp_path / "beside_the_script.py").write_text(f"BATCH = {batch}\n")
    script = tmp_path / "pretrain.py"
    script.write_text(SCRIPT)
    results: list[Any] = on_two_ranks(launched, str(script))
    assert all(result.startswith(said) for result in results), results
