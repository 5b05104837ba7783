"""A server of vLLM or SGLang, asked over HTTP: python examples/serve.py vllm|sglang [MODEL]

It prints, with counts that depend on when requests arrive: 8 answers; dynaflow_steps_total: nanoflow 9, none 2
"""

import re
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from json import dumps, loads
from pathlib import Path

from dynaflow_serving.bench.tiny_models import make_tiny_model

CONFIG = Path(__file__).with_name("serve.yaml")
PORT = 8123
URL = f"http://127.0.0.1:{PORT}"


def command(engine: str, model: str) -> list[str]:
    """Return the server's command. The only words that are ours are the last two."""
    program = [str(Path(sys.executable).with_name("vllm")), "serve", model, "--max-model-len", "512"]
    if engine == "sglang":
        program = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--enable-metrics"]
    return [*program, "--port", str(PORT), "--dtype", "float32", "--dynaflow", str(CONFIG)]


def get(path: str, body: dict[str, object] | None = None) -> str:
    request = urllib.request.Request(URL + path, dumps(body).encode() if body else None)
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


def main(engine: str, model: str) -> None:
    server = subprocess.Popen(command(engine, model), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while server.poll() is None:
            try:
                get("/health")
                break
            except OSError:
                time.sleep(1)
        asked = {"model": model, "prompt": "how are you " * 20, "max_tokens": 8, "temperature": 0}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda i: loads(get("/v1/completions", {**asked, "seed": i})), range(8)))
        time.sleep(2)  # counters are written once a second
        found = re.findall(r'dynaflow_steps_total\{.*?strategy="(\w+)".*?\} ([\d.]+)', get("/metrics"))
        counts = {name: sum(float(n) for s, n in found if s == name) for name in ("nanoflow", "none")}
        print(f"{len(answers)} answers; dynaflow_steps_total: " + ", ".join(f"{s} {n:.0f}" for s, n in counts.items()))
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else str(make_tiny_model("llama")))
