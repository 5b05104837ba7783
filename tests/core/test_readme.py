"""The README's strategy is real: it loads, splits, and its plans verify."""

from __future__ import annotations

import re
from pathlib import Path

from support import example

from dynaflow_serving.capture.examples import EXAMPLES
from dynaflow_serving.config import load
from dynaflow_serving.core.batch import Batch
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.policy.selector import build_selector

README = Path(__file__).parents[2] / "README.md"


def test_strategy_of_the_readme(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (source,) = [b for b in blocks if "@register_strategy" in b]
    assert len([line for line in source.splitlines() if line.strip()]) <= 30
    file = tmp_path / "lock_step.py"
    file.write_text(source)
    strategy = build_selector(load({"strategy": str(file), "options": {"min_tokens": 2}})).strategy("")
    assert len(strategy.split(Batch((3, 3))).micro_batches) == 2
    for name in EXAMPLES:
        program = example(name).program
        verify(program, lower(strategy.record(program, 2), "lock_step"))
