"""The README's command for SGLang serves under DynaFlow."""

import sys

import pytest
from readme import ROOT, command

from dynaflow_serving.bench.serving.server import Server, free_port

ON_CPU = ["--device", "cpu", "--dtype", "float32", "--mem-fraction-static", "0.3", "--max-total-tokens", "4096"]
CORES = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_the_quickstart(model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the configs are given as the README has them
    port, log = free_port(), tmp_path / "log"
    words = command("sglang.launch_server", MODEL=model_path("llama"))
    server = Server(
        "sglang", [sys.executable, *words[1:], *ON_CPU, "--disable-cuda-graph", "--port", str(port)], port, CORES, log
    )
    try:
        server.wait(500)
        assert "DynaFlow is on: strategy auto" in log.read_text()
    finally:
        server.stop()
