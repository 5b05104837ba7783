"""The README's command for SGLang serves under DynaFlow."""

import sys

import pytest
from readme import ROOT, command, serving

ON_CPU = ["--device", "cpu", "--dtype", "float32", "--mem-fraction-static", "0.3", "--max-total-tokens", "4096"]
CORES = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_the_quickstart(model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the configs are given as the README has them
    words = command("sglang.launch_server", MODEL=model_path("llama"))
    on_cpu = [sys.executable, *words[1:], *ON_CPU, "--disable-cuda-graph"]
    with serving(on_cpu, CORES, tmp_path / "log") as server:
        assert "DynaFlow is on: strategy auto" in server.log.read_text()
