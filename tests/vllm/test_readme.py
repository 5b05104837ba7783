"""The README's command for vLLM serves, says that DynaFlow is on, and counts steps."""

import sys
from pathlib import Path

import pytest
from readme import ROOT, command

from dynaflow_serving.bench.serving.server import Server, free_port

# Tests keep vLLM quiet otherwise.
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_LOGGING_LEVEL": "INFO"}


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_the_quickstart(model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the configs are given as the README has them
    port, log = free_port(), tmp_path / "log"
    words = command("vllm serve", MODEL=model_path("llama"))
    words[0] = str(Path(sys.executable).with_name("vllm"))
    server = Server("vllm", [*words, "--port", str(port), "--max-model-len", "512"], port, ENVIRONMENT, log)
    try:
        server.wait(500)
        assert "dynaflow_steps_total" in server.metrics()
        assert "DynaFlow is on: strategy auto, options {" in log.read_text()
    finally:
        server.stop()
