"""The README's command for vLLM serves, says that DynaFlow is on, and counts steps."""

import sys
from pathlib import Path

import pytest
from readme import ROOT, command, serving

# Tests keep vLLM quiet otherwise.
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_LOGGING_LEVEL": "INFO"}


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_the_quickstart(model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the configs are given as the README has them
    words = command("vllm serve", MODEL=model_path("llama"))
    words[0] = str(Path(sys.executable).with_name("vllm"))
    with serving([*words, "--max-model-len", "512"], ENVIRONMENT, tmp_path / "log") as server:
        assert "dynaflow_steps_total" in server.metrics()
        assert "DynaFlow is on: strategy auto, options {" in server.log.read_text()
