"""The scheduler's own steps: radix cache, chunked and mixed prefill, two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
DYNAFLOW = {"strategy": "nanoflow", "options": {"min_tokens": 1, "micro_batches": 3, "cut": "token"}}


def run_engine(folder, model, prompts, dynaflow):
    options = {} if dynaflow is None else {"json_model_override_args": json.dumps({"dynaflow": dynaflow})}
    out = folder / f"{'stock' if dynaflow is None else 'dynaflow'}.json"
    request = json.dumps({"model": model, "prompts": prompts, "options": options})
    environment = {**os.environ, "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    script = Path(__file__).with_name("engine_run.py")
    done = subprocess.run([sys.executable, script, request, out], capture_output=True, text=True, env=environment)
    assert out.exists(), done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.alone
def test_tokens_equal_stock(tmp_path, model_path, prompts):
    stock = run_engine(tmp_path, model_path("mixtral"), prompts, None)
    ours = run_engine(tmp_path, model_path("mixtral"), prompts, DYNAFLOW)
    assert ours["tokens"] == stock["tokens"]
    assert ours["cached"] == stock["cached"] > 0
    first, second = ours["reports"]
    assert first["steps"]["split"] > 12 and first["steps"] == ours["state"]["steps"]
    assert (first["steps"], first["plan_hash"]) == (second["steps"], second["plan_hash"])
    operators = [line.split()[1] for line in first["programs"][0]["program"].splitlines() if line.startswith("op ")]
    # Of the embedding, and after attention and MLP of two layers; SGLang's module of its experts has one inside.
    assert sum("all_reduce" in name for name in operators) == 5
    assert stock["state"] is None
