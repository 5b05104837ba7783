"""The README's command for SGLang serves under DynaFlow."""

import sys

import pytest
from readme import ROOT, command
from server import OPTIONS, SGLangServer

from dynaflow_serving.bench.serving.server import free_port


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_the_quickstart(model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the configs are given as the README has them
    port = free_port()
    words = [sys.executable, *command("sglang.launch_server", MODEL=model_path("llama"))[1:]]
    on_cpu = [*OPTIONS, "--disable-cuda-graph", "--port", str(port)]
    cores = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    server = SGLangServer("sglang", [*words, *on_cpu], port, cores, tmp_path / "log")
    try:
        server.wait(500, path="/server_info")
        assert "DynaFlow is on: strategy auto" in (tmp_path / "log").read_text()
        assert len(server.generate([[5, 6, 7]], 4)[0]) == 4
    finally:
        server.stop()
