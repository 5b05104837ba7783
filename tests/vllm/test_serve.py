"""`vllm serve MODEL --dynaflow CONFIG` with an OpenAI client, as a user runs it."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

VLLM = Path(sys.executable).with_name("vllm")


@pytest.fixture
def server(model_path, tmp_path):
    """`server(*flags)` -> (base URL, log path) once it answers; stopped afterwards."""
    running = []

    def start(*flags):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        log = tmp_path / f"serve{len(running)}.log"
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TEST_MODE3": "",
        }
        command = [
            str(VLLM), "serve", model_path("llama"), "--served-model-name", "tiny", "--port", str(port),
            "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16",
            "--compilation-config", '{"mode": 2, "backend": "eager"}', *flags,
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment)
        running.append(process)
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2)
                return url, log
            except OSError:
                time.sleep(1)
        raise TimeoutError(log.read_text()[-3000:])

    yield start
    for process in running:
        process.terminate()
        process.wait(60)


def test_served_tokens_equal_offline_stock(server, stock_tokens, prompts, tmp_path):
    from openai import OpenAI

    file = tmp_path / "nanoflow.yaml"
    file.write_text(yaml.safe_dump({"strategy": "nanoflow", "options": {"min_tokens": 1}}))
    url, log = server("--dynaflow", str(file))
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.completions.create(
        model="tiny",
        prompt=prompts,
        max_tokens=12,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    tokens = [json.loads(choice.model_dump_json())["token_ids"] for choice in answer.choices]
    assert tokens == stock_tokens("llama")
    text = log.read_text()
    assert "DynaFlow is on: strategy nanoflow" in text
    assert "DynaFlow: first split step, 2 micro-batches" in text
