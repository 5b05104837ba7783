"""The scheduler's own steps: radix cache, chunked and mixed prefill, two ranks; and the HTTP server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
DYNAFLOW = {"strategy": "nanoflow", "options": {"min_tokens": 1}}


def run_engine(folder, model, prompts, ranks, dynaflow):
    options = {"tp_size": ranks}
    if dynaflow is not None:
        options["json_model_override_args"] = json.dumps({"dynaflow": dynaflow})
    out = folder / f"{'stock' if dynaflow is None else 'dynaflow'}.json"
    request = json.dumps({"model": model, "prompts": prompts, "options": options})
    environment = {**os.environ, "SGLANG_CPU_OMP_THREADS_BIND": "0" if ranks == 1 else "0|1"}
    script = Path(__file__).with_name("engine_run.py")
    done = subprocess.run([sys.executable, script, request, out], capture_output=True, text=True, env=environment)
    assert out.exists(), done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("kind", "ranks", "config"),
    [
        ("llama", 1, {"strategy": "nanoflow", "options": {"min_tokens": 1, "micro_batches": 3, "cut": "token"}}),
        ("mixtral", 2, DYNAFLOW),  # SGLang's module of its experts has an all-reduce inside
    ],
)
def test_tokens_equal_stock(tmp_path, model_path, prompts, kind, ranks, config):
    stock = run_engine(tmp_path, model_path(kind), prompts, ranks, None)
    ours = run_engine(tmp_path, model_path(kind), prompts, ranks, config)
    assert ours["tokens"] == stock["tokens"]
    assert ours["cached"] == stock["cached"] > 0
    assert len(ours["reports"]) == ranks
    first = ours["reports"][0]
    assert first["steps"]["split"] > 12 and first["steps"] == ours["state"]["steps"]
    assert all((r["steps"], r["plan_hash"]) == (first["steps"], first["plan_hash"]) for r in ours["reports"])
    operators = [line.split()[1] for line in first["programs"][0]["program"].splitlines() if line.startswith("op ")]
    reductions = [name for name in operators if "all_reduce" in name]
    assert len(reductions) == (0 if ranks == 1 else 5)  # of the embedding, and after attention and MLP of two layers
    assert stock["state"] is None


def test_server(model_path, serve):
    with serve(model_path("llama"), "--dynaflow", "nanoflow") as server:
        server.generate([[11, 12, 13]], 4)
        info = server.info
        assert info["dynaflow"] == "nanoflow"
        steps = info["internal_states"][0]["dynaflow"]["steps"]
        assert steps["split"] == 0 and sum(steps["unsplit"].values()) >= 4, steps  # with the server's own warm-up
